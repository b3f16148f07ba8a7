# SPDX-License-Identifier: Apache-2.0
"""Files of tensors and plain values: written atomically, read without running any code."""
import os
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch

from dnnlib import UserError
from dnnlib.util import atomic_file
from torch_utils import safe_pickle
from torch_utils.pickle_values import TensorRecord
from torch_utils.schema import COUNTERS, FLOATS, MAX_DEPTH, Unfit, shown

PLAIN = (type(None), bool, int, float, str)

#----------------------------------------------------------------------------

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


def load(path: str | os.PathLike[str], expected_format: str, mmap: bool = False) -> dict[str, Any]:
    """Read a file that `save` wrote, to the CPU. What its keys hold is for a schema to check (`torch_utils.schema`).

    Nothing is unpacked, and tensors take no more memory than the file: what claims more is refused.

    Args:
        path: The file.
        expected_format: Value that its key 'format' must have.
        mmap: Read tensors only when they are used: for files of which little is wanted. Otherwise all of their bytes
            are compared with their checksums.

    Raises:
        UserError: no such file; damaged or cut off; holds anything but dense tensors of numbers and plain values;
            another format.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = _convert(safe_pickle.read_torch_zip(path, verify=not mmap), mmap)
    except Unfit as err:
        raise UserError(f"{path}: {err}: use a snapshot that train.py wrote, or an official pickle") from err
    if not isinstance(content, dict) or content.get("format") != expected_format:
        found = content.get("format") if isinstance(content, dict) else content
        raise UserError(f"{path}: expected a file of format {expected_format!r}, found {shown(found)}")
    return content


def load_plain(path: str | os.PathLike[str], mmap: bool = False) -> Any:
    """Read a file of either format of `torch.save` that holds only tensors and plain values, such as weights.

    Args:
        path: The file.
        mmap: As in `load`.

    Raises:
        UserError: as in `load`.
    """
    root = safe_pickle.read_torch_zip(path, verify=not mmap) if is_checkpoint(path) else safe_pickle.read(path)
    try:
        return _convert(root, mmap)
    except Unfit as err:
        raise UserError(f"{path}: {err}: fetch it again, or save its tensors as a plain state dict") from err


def _convert(root: Any, mmap: bool) -> Any:
    """Notes of `safe_pickle` as values. What was one object remains one.

    Raises:
        Unfit: more than tensors and plain values, or containers in themselves.
    """
    done: dict[int, Any] = {}       # By identity; `root` keeps the objects alive.

    def convert(value: Any, depth: int) -> Any:
        if type(value) in PLAIN:
            return value
        if id(value) in done:
            return done[id(value)]
        if depth > MAX_DEPTH:
            raise Unfit("is nested beyond measure")
        made: Any
        if isinstance(value, TensorRecord):
            if value.dtype not in FLOATS + COUNTERS:
                raise Unfit(f"holds a tensor of type {value.dtype}, which no network has")
            made = value.load(mapped=mmap)
        elif isinstance(value, dict):
            if not all(type(key) in (str, int) for key in value):
                raise Unfit("has keys that are neither names nor numbers")
            made = {key: convert(item, depth + 1) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            made = [convert(item, depth + 1) for item in value]
            made = tuple(made) if isinstance(value, tuple) else made
        else:
            raise Unfit("holds more than tensors and plain values and was not read")
        done[id(value)] = made
        return made

    return convert(root, 0)
