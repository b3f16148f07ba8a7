# SPDX-License-Identifier: Apache-2.0
"""Images in NumPy's files: samples as ADM, DiT and their kin write them (arr_0, labels in arr_1), .npy arrays, and the
.npz files of small data sets (x_train, y_train, x_test, ...; train_images, train_labels, ...).

50,000 images of 256 pixels are 10 GB, so nothing is read whole: arrays are streams, stored or deflated.
"""
import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import labels
from data_prep.sources.base import NoMetadata, Source, chain
from dnnlib import UserError
from dnnlib.npy import npy_header
from dnnlib.util import file_sha256, format_bytes, list_some
from training.data.labels import array_labels
from training.data.png import encode_plain_png
from training.data.splits import choose, in_order, split_of_file

SKIP_BYTES = 1 << 22            # At a time, of images that nobody asked for.
MAX_LABEL_BYTES = 1 << 30
READ_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)
LABEL_WORDS = ("label", "labels", "y", "target", "targets", "class", "classes")
IMAGES, LABELS = "arr_0", ("arr_1", "labels", "label", "y")     # What samples call them; the first that is there.


@dataclasses.dataclass(frozen=True)
class Header:
    """What an array is, without its values."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int              # Bytes of the header itself.
    size: int               # Bytes of header and values.


class NumpyStore(NoMetadata):
    """The images of one array: uint8 [N, H, W], [N, H, W, 1] or [N, H, W, 3] in C order, read in ascending order.

    It can be pickled, and used after a fork.
    """

    reads_in_order = True

    def __init__(self, path: Path, array: str, header: Header):
        """Args:
            path: An .npy file, or an .npz.
            array: The array's name in the .npz; "" for an .npy.
            header: What it says of itself.

        Raises:
            UserError: it holds no images of this kind.
        """
        self.path, self.array, self._header = path, array, header
        self._where = f"{path}: {array}" if array else str(path)
        self._check()
        self.names = [f"{i:08d}.png" for i in range(header.shape[0])]
        self._image_bytes = math.prod(header.shape[1:])
        self._stream: tuple[int, Any, contextlib.ExitStack] | None = None       # Process, stream, what closes it.
        self._place = 0                 # Number of the next image in it.
        self._broken: tuple[int, str] | None = None     # Where the stream cannot be read on, and why.

    def _check(self) -> None:
        shape, where = self._header.shape, self._where
        if self._header.dtype != np.uint8:
            raise UserError(f"{where} is {self._header.dtype}, but images must be uint8 with values 0 to 255: round "
                            "them yourself, so that the rounding is yours")
        if len(shape) not in (3, 4) or shape[3:] not in ((), (1,), (3,)) or self._header.fortran:
            order = " in Fortran order" if self._header.fortran else ""
            turned = ": save numpy.ascontiguousarray(images)" if self._header.fortran else ""
            alpha = ": drop the alpha channel" if shape[3:] == (4,) else ""
            first = ": move the channels to the end" if len(shape) == 4 and shape[1] in (1, 3) else ""
            raise UserError(f"{where} is {list(shape)}{order}, but images must be [N, H, W, 3], [N, H, W, 1] or "
                            f"[N, H, W] in C order{alpha or first or turned}")
        if len(shape) == 3 and shape[2] in (3, 4) and shape[1] > shape[2]:
            raise UserError(f"{where} is {list(shape)}, which looks like one image with {shape[2]} channels: save "
                            "images[None], uint8 [1, H, W, 3]")
        if min(shape) < 1:
            raise UserError(f"{where}: {shape[0]} images of {shape[2]}x{shape[1]} pixels: at least one is needed")
        if self._header.size != self._header.start + math.prod(shape):
            raise UserError(f"{where} is cut off: make the file again")

    @functools.cached_property
    def fingerprints(self) -> tuple[str, str]:
        """SHA-256 of the content, as it is and mirrored. An archive keeps CRC-32 and size: it is not read for that."""
        if self.array:
            with zipfile.ZipFile(self.path) as archive:
                content = [(info.filename, info.file_size, info.CRC) for info in archive.infolist()]
            plain = hashlib.sha256(repr(sorted(content)).encode()).hexdigest()
            if self.array != IMAGES:
                plain = hashlib.sha256(f"{plain}|{self.array}".encode()).hexdigest()
        else:
            plain = file_sha256(self.path)
        return plain, hashlib.sha256(plain.encode() + b"|xflip").hexdigest()

    def where(self, index: int) -> str:
        return f"{self._where}: image {index}"

    def size(self, index: int) -> int:
        return self._image_bytes

    def read(self, index: int) -> bytes:
        """The image as a PNG file. Raises OSError."""
        return encode_plain_png(self.pixels(index))

    def pixels(self, index: int) -> np.ndarray:
        """uint8 [H, W] or [H, W, 3]. Raises OSError."""
        if self._broken is not None and index >= self._broken[0]:
            raise OSError(self._broken[1])
        if self._stream is None or self._stream[0] != os.getpid() or index < self._place:
            self._start()
        assert self._stream is not None     # Just made.
        self._skip((index - self._place) * self._image_bytes)
        data = self._take(self._image_bytes)
        self._place = index + 1
        shape = self._header.shape[1:]
        return np.frombuffer(data, dtype=np.uint8).reshape(shape[:2] if shape[2:] == (1,) else shape)

    def _start(self) -> None:
        self.close()
        stack = contextlib.ExitStack()
        try:
            stream: Any
            if self.array:
                archive = stack.enter_context(zipfile.ZipFile(self.path))
                stream = stack.enter_context(archive.open(f"{self.array}.npy"))
            else:
                stream = stack.enter_context(open(self.path, "rb"))
            npy_header(stream)
        except (*READ_ERRORS, ValueError) as err:
            stack.close()
            raise OSError("the file is damaged, or it has changed") from err
        self._stream, self._place = (os.getpid(), stream, stack), 0

    def _skip(self, size: int) -> None:
        assert self._stream is not None     # Only called by `pixels`.
        if not self.array:
            self._stream[1].seek(size, os.SEEK_CUR)
            return
        while size > 0:
            self._take(min(size, SKIP_BYTES))
            size -= SKIP_BYTES

    def _take(self, size: int) -> bytes:
        assert self._stream is not None     # Only called by `pixels`.
        reason, cause = "the array is cut off", None
        try:
            data: bytes = self._stream[1].read(size)
            if len(data) == size:
                return data
        except READ_ERRORS as err:
            reason, cause = "the array is damaged", err
        self._broken = (self._place, reason)        # Every further try would read from the start.
        raise OSError(reason) from cause

    def close(self) -> None:
        if self._stream is not None:
            if self._stream[0] == os.getpid():
                self._stream[2].close()
            self._stream = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None, "_place": 0}

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self.close()

#----------------------------------------------------------------------------
# Labels.

def _read_labels(path: Path, name: str, header: Header, num: int) -> tuple[list[int], list[str] | None]:
    """The labels of `num` images, and the names of the classes, if any. Raises UserError if it holds something else."""
    where = f"{path}: {name}"
    if header.dtype.hasobject:
        raise UserError(f"{where} is an array of objects, which are not read: save labels as an array of whole numbers")
    if header.size > MAX_LABEL_BYTES:
        raise UserError(f"{where} takes {format_bytes(header.size)}, which no labels need: save whole numbers [N]")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as f:
            array = np.lib.format.read_array(f, allow_pickle=False)
    except (*READ_ERRORS, ValueError) as err:
        raise UserError(f"{where} cannot be read ({err}): make the file again") from err
    values, names = array_labels(where, array, num)
    return values.tolist(), names

#----------------------------------------------------------------------------
# Files.

def npy(path: Path) -> Source:
    """The images of an .npy file. Raises UserError."""
    try:
        with open(path, "rb") as f:
            header = Header(*npy_header(f), f.tell(), os.path.getsize(path))
    except (OSError, ValueError, EOFError) as err:
        raise UserError(f"{path}: not a whole .npy file ({err}): make it again") from err
    store = NumpyStore(path, "", header)
    return Source(store, range(len(store.names)), layout="array", kind="npy array")


def _headers(path: Path) -> dict[str, Header]:
    """The arrays in an .npz. Raises UserError."""
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                with archive.open(info) as f:
                    found[info.filename.removesuffix(".npy")] = Header(*npy_header(f), f.tell(), info.file_size)
    except (*READ_ERRORS, ValueError) as err:
        raise UserError(f"{path}: not a whole .npz file ({type(err).__name__}): make it again") from err
    return found


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+", name.lower())


def _image_arrays(path: Path, headers: Mapping[str, Header]) -> dict[str, str]:
    """Split -> array of images; '' stands for no split. Raises UserError."""
    if IMAGES in headers:
        return {"": IMAGES}
    names = [name for name, header in headers.items() if header.dtype == np.uint8 and len(header.shape) in (3, 4)
             and not set(_words(name)) & set(LABEL_WORDS)]
    held = list_some(sorted(f"{name}.npy" for name in headers)) or "nothing"
    found: dict[str, str] = {}
    for name in names:
        if found.setdefault(split_of_file(name) or "", name) != name:
            raise UserError(f"{path}: holds {held}, and it is not clear which are the images: they are expected in an "
                            "array arr_0: write it with numpy.savez(path, images)")
    if not found:
        raise UserError(f"{path}: holds {held}, but images are expected in an array arr_0: write it with "
                        "numpy.savez(path, images)")
    return found


def _label_array(path: Path, headers: Mapping[str, Header], images: str) -> str | None:
    """The array of labels that belongs to one of images. Raises UserError if there are several."""
    if images == IMAGES:
        found = [name for name in LABELS if name in headers][:1]
    else:
        found = [name for name, header in headers.items() if name != images and set(_words(name)) & set(LABEL_WORDS)
                 and split_of_file(name) == split_of_file(images)]
    if len(found) > 1:
        raise UserError(f"{path}: {list_some(found)} may be the labels of {images}: keep one of them")
    return found[0] if found else None


def npz(path: Path, use_labels: bool, allow_gaps: bool, split: str | None, option: str) -> Source:
    """The images of an .npz, and their labels if it has any. Raises UserError."""
    headers = _headers(path)
    arrays = _image_arrays(path, headers)
    counts = {key: headers[arrays[key]].shape[0] for key in in_order(key for key in arrays if key)}
    loose = [arrays[""]] if "" in arrays and counts else []
    keys = choose(str(path), counts, split, option, loose=loose) if counts else [""]
    parts = {}
    for key in keys:
        name = arrays[key]
        store = NumpyStore(path, name, headers[name])
        source = Source(store, range(len(store.names)), layout="array", kind="npz of samples", splits=counts,
                        chosen=tuple(keys) if counts else ())
        beside = _label_array(path, headers, name) if use_labels else None
        if beside is not None:
            values, names = _read_labels(path, beside, headers[beside], len(store.names))
            found, classes = labels.encode(f"{path}: {beside}", store.names, values, names, allow_gaps)
            source = dataclasses.replace(source, labels=found, classes=classes)
        parts[key] = source
    return chain(str(path), parts)
