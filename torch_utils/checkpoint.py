# SPDX-License-Identifier: Apache-2.0
"""Files of tensors and plain values: written atomically, read without running any code."""
import os
import pickle
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from dnnlib import UserError
from dnnlib.util import atomic_file


def save(path: str | os.PathLike[str], content: dict[str, Any], previous: Path | None = None) -> None:
    """Write a dict of tensors and plain values (None, bool, int, float, str, list, tuple, dict).

    The file is a zip archive as `torch.save` writes it and can be read with `torch.load(..., weights_only=True)`.

    Args:
        path: The file. It has its old content or all of the new one, also when writing fails.
        content: What to write.
        previous: Where the content that `path` had before stays.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    try:
        with atomic_file(path, previous) as f:
            recorded = _ErrorKeeper(f)
            torch.save(content, cast(IO[bytes], recorded))      # It uses no other methods.
            if recorded.error is not None:
                raise recorded.error
    except OSError as err:
        raise UserError(f"{path}: cannot be written ({os.strerror(err.errno or 0)}): files written before are whole: "
                        "mend that (a full disk needs room) and run the same command again, it continues from them"
                        ) from err


class _ErrorKeeper:
    """A file for `torch.save` that remembers the first error and swallows what follows.

    torch.save itself turns a failed write into a RuntimeError that does not name the reason.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Bytes written, or said to be."""
        if self.error is None:
            try:
                return self.file.write(data)
            except OSError as err:
                self.error = err
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Nothing: `atomic_file` does it."""


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether the file looks like one that `save` wrote (official pickles do not start like a zip archive)."""
    with open(path, "rb") as f:
        return f.read(4) == b"PK\x03\x04"


def load(path: str | os.PathLike[str], expected_format: str, mmap: bool = False,
         verify: bool = False) -> dict[str, Any]:
    """Read a file that `save` wrote, to the CPU.

    Args:
        path: The file.
        expected_format: Value that its key 'format' must have.
        mmap: Read tensors only when they are used: for files of which little is wanted.
        verify: Compare all bytes with their checksums, which torch.load does not.

    Raises:
        UserError: no such file; damaged or cut off; holds anything but tensors and plain values; another format.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        if verify:
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(damaged)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
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
