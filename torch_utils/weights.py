# SPDX-License-Identifier: Apache-2.0
"""Weights of networks in files that others publish: .safetensors, or a plain state dict that torch.save wrote.

Both are read as data, within limits that the size of the file sets, and what is not finite is refused. Files of our own
of the first kind have a JSON object in their header, which says what they are.
"""
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dnnlib import UserError
from dnnlib.util import parse_json
from torch_utils import checkpoint
from torch_utils.schema import Unfit, check_finite, check_tensors, shown

HEADER_KEY = "stylesan_xl"      # The header's only entry: the order of several would differ from file to file.
LENGTH_BYTES = 8                # A file begins with the length of its header, which is JSON.

#----------------------------------------------------------------------------

@contextlib.contextmanager
def open_safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A .safetensors file, whose library compares what its header claims with what is there, for the block.

    Raises:
        UserError: no such file; damaged or cut off.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as err:
        raise UserError(f"{path}: damaged or cut off (size {os.path.getsize(path)} bytes): "
                        "copy it again from where it came") from err


def is_safetensors(path: str | os.PathLike[str]) -> bool:
    """Whether the file looks like a .safetensors: by its content, and by its name in case it is cut off."""
    with open(path, "rb") as file:
        start = file.read(LENGTH_BYTES + 1)
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    fits = start[LENGTH_BYTES:] == b"{" and length <= os.path.getsize(path) - LENGTH_BYTES
    return fits or Path(path).suffix == ".safetensors"


def safetensors_bytes(state: Mapping[str, torch.Tensor], header: dict[str, Any]) -> bytes:
    """A .safetensors with these tensors, and plain values in its header. Equal content gives equal bytes."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return safetensors.torch.save(tensors, metadata={HEADER_KEY: json.dumps(header, sort_keys=True)})


def read_header(path: str | os.PathLike[str], file: Any, expected_format: str, remedy: str) -> dict[str, Any]:
    """The values that `safetensors_bytes` put into a header. Beyond their format they are for a schema to check.

    Args:
        path: The file, for messages.
        file: What `open_safetensors` gives.
        expected_format: Value that the key 'format' must have.
        remedy: What to do if it has another one.

    Raises:
        UserError: it has another one.
    """
    try:
        header = parse_json((file.metadata() or {}).get(HEADER_KEY, "{}"))
    except ValueError:
        header = None
    found = header.get("format") if isinstance(header, dict) else None
    if not isinstance(header, dict) or found != expected_format:
        raise UserError(f"{path}: expected a file of format {expected_format!r}, found {shown(found)}: {remedy}")
    return header


def read_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Tensors by name, on the CPU.

    Raises:
        UserError: no such file; damaged; holds more than tensors, or some that are not finite.
    """
    if Path(path).suffix == ".safetensors":
        with open_safetensors(path) as file:
            state: Any = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    else:
        state = checkpoint.load_plain(path)
    try:
        check_tensors(state, "its content")
        check_finite(state)
    except Unfit as err:
        raise UserError(f"{path}: {err}: fetch it again") from err
    return dict(state)
