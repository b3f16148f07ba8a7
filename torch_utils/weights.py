# SPDX-License-Identifier: Apache-2.0
"""Weights of networks in files that others publish: .safetensors, or a plain state dict that torch.save wrote.

Both are read as data, within limits that the size of the file sets, and what is not finite is refused.
"""
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch

from dnnlib import UserError
from torch_utils import checkpoint
from torch_utils.schema import Unfit, check_finite, check_tensors

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
