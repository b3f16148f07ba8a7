# SPDX-License-Identifier: Apache-2.0
"""Files of tensors and plain values: written atomically, read without running any code."""
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.util import atomic_file


def save(path: str | os.PathLike, content: dict[str, Any]) -> None:
    """Write a dict of tensors and plain values (None, bool, int, float, str, list, tuple, dict).

    The file is a zip archive as `torch.save` writes it and can be read with `torch.load(..., weights_only=True)`.
    """
    with atomic_file(path) as f:
        torch.save(content, f)


def is_checkpoint(path: str | os.PathLike) -> bool:
    """Whether the file looks like one that `save` wrote (official pickles do not start like a zip archive)."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


def load(path: str | os.PathLike, expected_format: str) -> dict[str, Any]:
    """Read a file that `save` wrote, to the CPU.

    Args:
        path: The file.
        expected_format: Value that its key 'format' must have.

    Raises:
        UserError: no such file; damaged or cut off; holds anything but tensors and plain values; another format.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as err:
        raise UserError(f"{path}: holds more than tensors and plain values and was not read: "
                        "use a snapshot that train.py wrote, or an official pickle") from err
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, zipfile.BadZipFile) as err:
        raise UserError(f"{path}: damaged or cut off (size {os.path.getsize(path)} bytes): "
                        "copy it again, or take an earlier snapshot of the run") from err
    if not isinstance(content, dict) or content.get("format") != expected_format:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: expected a file of format {expected_format!r}, found {found!r}")
    return content
