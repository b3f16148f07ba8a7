# SPDX-License-Identifier: Apache-2.0
"""A generator by itself in a .safetensors: the tensors of G_ema, and the settings to rebuild it as JSON in the header.

What only training needs (G, D, the optimisers) is left out, and so are the settings of the run, which name folders of
the machine that it ran on. What is read is a snapshot like any other, without those parts.
"""
import math
import os
from typing import Any

import torch

from dnnlib import UserError
from torch_utils.schema import Unfit, entries, exactly, items, nothing_or, plain, record, text
from torch_utils.weights import open_safetensors, read_header, safetensors_bytes
from training.run.formats import NETWORK_FORMAT, VERSION, check_snapshot
from training.run.snapshots import Snapshot, build_generator

FORMAT = "stylesan-xl/generator/1"
REMEDY = "name a file that export.py --format=safetensors wrote"

HEADER = record({
    "format": exactly(FORMAT),
    "generator_config": plain,              # `check_snapshot` looks at it together with the tensors.
}, {
    "class_names": nothing_or(items(text)),
    "progress": entries(plain),
    "score": nothing_or(entries(plain)),
}, others=plain)

#----------------------------------------------------------------------------

def _finite(values: dict[str, Any] | None) -> dict[str, Any]:
    """The single values of a dict. JSON has no infinity, which is the best score of a run that has had none."""
    return {name: value for name, value in (values or {}).items() if isinstance(value, str | int | float)
            and not (isinstance(value, float) and not math.isfinite(value))}


def generator_bytes(snapshot: Snapshot) -> bytes:
    """The file with the G_ema of a snapshot that was read. Equal snapshots give equal files."""
    score = snapshot.get("score")
    header = {
        "format": FORMAT,
        "generator_config": snapshot["generator_config"],
        "class_names": snapshot.get("class_names"),
        "progress": _finite(snapshot.get("progress")),
        "score": score if score and "value" in _finite(score) else None,
    }
    # Tensors of a snapshot may share memory, and what comes from a network has each its own.
    return safetensors_bytes(build_generator(snapshot).state_dict(), header)


def read_generator(path: str | os.PathLike[str]) -> Snapshot:
    """A file of this kind as a snapshot whose 'G' and 'D' are None, on the CPU, checked.

    Raises:
        UserError: no such file; damaged; of another kind; settings and tensors do not fit each other; weights that are
            not finite.
    """
    with open_safetensors(path) as file:
        header = read_header(path, file, FORMAT, REMEDY)
        state: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    content = {
        "format": NETWORK_FORMAT,
        "version": VERSION,
        "generator_config": header.get("generator_config"),
        "G_ema": state,
        "G": None,
        "discriminator_config": None,
        "D": None,
        "class_names": header.get("class_names"),
        "progress": header.get("progress") or {},
        "score": header.get("score"),
        "source": "exported generator",
    }
    try:
        HEADER(header, "its header")
        check_snapshot(content)
    except Unfit as err:
        raise UserError(f"{path}: not a usable generator: {err}: copy it again, or export it again") from err
    return content
