# SPDX-License-Identifier: Apache-2.0
"""What is taken away from the page: the command line that makes the same picture, and its latents as a file."""
import dataclasses
import io
import json
import shlex
from collections.abc import Collection, Sequence

import numpy as np
import torch

from dnnlib import UserError
from inference.page.scene import Controls
from inference.sampling import find_classes

LATENTS_FILE = "latents.npz"


@dataclasses.dataclass(frozen=True)
class Origin:
    """What the pictures are made with: as much of it as a command line says."""

    network: str                            # As it was given.
    sha256: str = ""                        # Of its file,
    mapping_sha256: str = ""                # and of the weights that make w.
    class_names: Sequence[str] | None = None
    c_dim: int = 0
    directions: Sequence[str] = ()          # Files.
    style_names: Collection[str] = ()       # Directions in them that move styles, which latents do not hold.
    options: Sequence[str] = ()             # Further options, such as --precision=fp32.

#----------------------------------------------------------------------------

def class_word(origin: Origin, class_idx: int) -> str:
    """What --class takes for a class: its name, or its number where the name means another or cannot be typed."""
    names = origin.class_names
    if names and names[class_idx].isprintable():
        try:
            if find_classes(names[class_idx], names, origin.c_dim) == [class_idx]:
                return names[class_idx]
        except UserError:           # A name such as '7-3' is read as a range.
            pass
    return str(class_idx)


def command_line(origin: Origin, controls: Controls) -> str:
    """The command that makes the picture. What no option says is in the file of latents, which it names then."""
    words = ["python", "gen_images.py", f"--network={origin.network}"]
    if controls.is_plain:
        words.append(f"--seeds={controls.seed}")
        if origin.c_dim > 0:
            words.append(f"--class={class_word(origin, controls.class_idx)}")
        if controls.psi != 1:
            words.append(f"--trunc={_number(controls.psi)}")
    else:
        words.append(f"--w={LATENTS_FILE}")
    edits = [(name, strength) for name, strength in controls.edits
             if strength != 0 and (controls.is_plain or name in origin.style_names)]
    if edits:
        words.append(f"--directions={','.join(origin.directions)}")
        words += [f"--edit={name}:{_number(strength)}" for name, strength in edits]
    if controls.translate != (0, 0):
        words.append(f"--translate={','.join(map(_number, controls.translate))}")
    if controls.rotate != 0:
        words.append(f"--rotate={_number(controls.rotate)}")
    return shlex.join([*words, *origin.options, "--outdir=out"])


def _number(value: float) -> str:
    """A number as it is typed: all its digits, and no more."""
    return repr(float(value)).removesuffix(".0")


def latents_file(origin: Origin, controls: Controls, ws: torch.Tensor) -> bytes:
    """An .npz with the array `w` [1, num_ws, w_dim], and what it takes to find it again."""
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, w=ws.numpy(), network=np.array(origin.network),
             network_sha256=np.array(origin.sha256), mapping_sha256=np.array(origin.mapping_sha256),
             controls=np.array(json.dumps(dataclasses.asdict(controls))))
    return file.getvalue()
