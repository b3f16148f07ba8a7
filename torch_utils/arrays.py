# SPDX-License-Identifier: Apache-2.0
"""NumPy's files within limits: no array takes more memory than a small multiple of the file that holds it.

NumPy itself believes the header of an array, and a packed archive of some megabytes may unpack to many gigabytes. Here
an array is made only after its type and shape have been compared with the bytes that the archive has for it, and all
arrays together must stay within `torch_utils.pickle_values.Limits`.
"""
import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dnnlib import UserError
from dnnlib.npy import npy_header
from torch_utils.pickle_values import Limits, Refused

PLAIN_KINDS = "biufcSU"         # Kinds of NumPy types that are read: bools, numbers and texts.

# What a file that is damaged, or no such file, can raise while it is read.
DAMAGED = (ValueError, EOFError, NotImplementedError, RuntimeError, OverflowError, zipfile.BadZipFile,
           zipfile.LargeZipFile, zlib.error)

#----------------------------------------------------------------------------

def _read_array(f: BinaryIO, size: int) -> np.ndarray:
    """The array of a stream of `size` bytes in .npy format. Raises ValueError."""
    shape, fortran, dtype = npy_header(f)
    if dtype.kind not in PLAIN_KINDS or dtype.hasobject or dtype.fields is not None:
        raise ValueError(f"an array of type {str(dtype)[:40]}, which holds more than numbers or text")
    left = size - f.tell()
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != left:
        raise ValueError(f"an array {list(shape)[:8]} of {str(dtype)[:40]} that has {left} bytes")
    data = bytearray(left)
    if f.readinto(data) != left:        # type: ignore[attr-defined]    # Files that are read have it.
        raise ValueError("an array that ends early")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


class Arrays:
    """The arrays of an .npz, read one by one as they are asked for."""

    def __init__(self, path: str | os.PathLike[str], archive: zipfile.ZipFile):
        self.zip = archive
        self.files = [name.removesuffix(".npy") for name in archive.namelist()]
        self._path, self._limits = path, Limits(str(path), os.path.getsize(path))

    def __getitem__(self, key: str) -> np.ndarray:
        """An array.

        Raises:
            UserError: it would take many times the memory of the file.
            KeyError: there is none of this name.
            ValueError, zipfile.BadZipFile and others: it is damaged, or holds objects.
        """
        if key not in self.files:
            raise KeyError(key)
        info = self.zip.getinfo(key if key in self.zip.namelist() else f"{key}.npy")
        try:
            self._limits.copy(info.file_size)
        except Refused as err:
            raise UserError(f"{self._path}: {err} ({key[:40]!a} unpacks to {info.file_size} bytes): "
                            "make the file again, or save it without packing (numpy.savez)") from err
        with self.zip.open(info) as f:
            return _read_array(f, info.file_size)       # type: ignore[arg-type]    # A file to read, in all it has.


@contextlib.contextmanager
def open_npz(path: str | os.PathLike[str]) -> Iterator[Arrays]:
    """The arrays of an .npz, for the block. Raises what `zipfile` raises for other files."""
    with open(path, "rb") as f, zipfile.ZipFile(f) as archive:
        yield Arrays(path, archive)


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """The array of an .npy file. Raises ValueError: it is none, or its header claims other bytes than there are."""
    with open(path, "rb") as f:
        return _read_array(f, Path(path).stat().st_size)
