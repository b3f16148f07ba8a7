# SPDX-License-Identifier: Apache-2.0
"""Samples in an .npz, as ADM, DiT and their kin write them: arr_0 uint8 [N, H, W, 3], labels in arr_1 or labels."""
import hashlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import list_some
from metrics.references.reading import npy_header
from training.data.labels import array_labels

Batch = tuple[torch.Tensor, torch.Tensor | None]            # uint8 [N, 3, H, W], int64 [N] or None
LABEL_KEYS = ("arr_1", "labels", "label", "y")
SKIP_BYTES = 1 << 22        # At a time, of images that nobody asked for.
READ_ERRORS = (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError)


def labels_sorted(labels: np.ndarray | None) -> bool:
    """Whether labels come in ascending order with more than one class: scores that depend on order then mislead."""
    return labels is not None and len(labels) > 0 and bool((np.diff(labels) >= 0).all() and labels[0] != labels[-1])


class NpzSource:
    """The images of an .npz, stored or deflated, read as a stream: 50,000 of 256 pixels are 10 GB, so never whole."""

    def __init__(self, path: str | os.PathLike[str], needs_labels: bool = False):
        """Args:
            path: The file.
            needs_labels: Refuse an array of labels that holds none. Otherwise the images count as having none.
        """
        self.path = str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                members = {info.filename: info for info in archive.infolist()}
                if "arr_0.npy" not in members:
                    raise UserError(f"{path}: holds {list_some(sorted(members)) or 'nothing'}, but images are expected "
                                    "in an array arr_0: write it with numpy.savez(path, images)")
                with archive.open("arr_0.npy") as f:
                    shape, fortran, dtype = npy_header(f)
                    header = f.tell()
                self.labels, names = None, None
                if key := next((key for key in LABEL_KEYS if f"{key}.npy" in members), None):
                    self.labels, names = _read_labels(str(path), archive, key, shape[0] if shape else 0, needs_labels)
        except (*READ_ERRORS, ValueError) as err:
            raise UserError(f"{path}: not a whole .npz file ({type(err).__name__}): make it again") from err
        self._check(shape, fortran, dtype)
        self.num_images, self.height, self.width = shape[:3]
        if members["arr_0.npy"].file_size != header + self.num_images * self.height * self.width * 3:
            raise UserError(f"{path}: arr_0 is cut off: make the file again")
        # The archive keeps size and CRC-32 of the content, so 10 GB need not be read to know it.
        content = [(name, info.file_size, info.CRC) for name, info in sorted(members.items())]
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()
        self.description: dict[str, Any] = {
            "kind": "samples", "format": "npz of samples", "path": self.path, "num_images": self.num_images,
            "resolution": self.width, "class_names": names, "labels_sorted": labels_sorted(self.labels), "crop": None}
        self.can_read_ahead = True
        self.label_values = None if self.labels is None else np.unique(self.labels)

    def _check(self, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> None:
        if dtype != np.uint8:
            raise UserError(f"{self.path}: arr_0 is {dtype}, but images must be uint8 with values 0 to 255: round them "
                            "yourself, so that the rounding is yours")
        if len(shape) != 4 or shape[3] != 3 or fortran:
            order = " in Fortran order" if fortran else ""
            alpha = ": drop the alpha channel" if len(shape) == 4 and shape[3] == 4 else ""
            raise UserError(f"{self.path}: arr_0 is {list(shape)}{order}, but images must be [N, H, W, 3] in C order"
                            f"{alpha}")
        if shape[0] < 1 or shape[1] < 1 or shape[1] != shape[2]:
            raise UserError(f"{self.path}: {shape[0]} images of {shape[2]}x{shape[1]} pixels, but it takes square "
                            "images and at least one of them")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in order."""
        return self.batches_at(batch_size, range(self.num_images))

    def batches_at(self, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
        """The images with these ascending numbers. Others are skipped in the stream."""
        indices = list(indices)
        shape, place = (self.height, self.width, 3), 0
        size = self.height * self.width * 3
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as f:
            npy_header(f)
            for start in range(0, len(indices), batch_size):
                numbers = indices[start : start + batch_size]
                images = np.empty([len(numbers), 3, self.height, self.width], dtype=np.uint8)
                for k, i in enumerate(numbers):
                    if i < place:
                        raise ValueError("the numbers of images must ascend")
                    self._skip(f, (i - place) * size)
                    images[k] = np.frombuffer(self._read(f, size), dtype=np.uint8).reshape(shape).transpose(2, 0, 1)
                    place = i + 1
                labels = None if self.labels is None else torch.from_numpy(self.labels[numbers])
                yield torch.from_numpy(images), labels

    def _read(self, f: Any, size: int) -> bytes:
        try:
            data: bytes = f.read(size)
        except READ_ERRORS as err:
            raise UserError(f"{self.path}: arr_0 is damaged: make the file again") from err
        if len(data) != size:
            raise UserError(f"{self.path}: arr_0 is cut off: make the file again")
        return data

    def _skip(self, f: Any, size: int) -> None:
        while size > 0:
            step = min(size, SKIP_BYTES)
            self._read(f, step)
            size -= step


def _read_labels(path: str, archive: zipfile.ZipFile, key: str, num: int,
                 are_needed: bool) -> tuple[np.ndarray | None, list[str] | None]:
    """The labels in an array, int64 [num], and the names of their classes, if any.

    Raises:
        UserError: they are needed, and it holds something else. Otherwise it is no label.
    """
    where, name = f"{path}: {key}", f"{key}.npy"
    size = archive.getinfo(name).file_size
    try:
        with archive.open(name) as f:
            shape, _fortran, dtype = npy_header(f)
            if dtype.hasobject or math.prod(shape) * dtype.itemsize != size - f.tell():
                what = "an array of objects" if dtype.hasobject else "cut off"
                raise UserError(f"{where} is {what}: save labels as an array of whole numbers")
        with archive.open(name) as f:
            return array_labels(where, np.lib.format.read_array(f, allow_pickle=False), num)
    except UserError:
        if are_needed:
            raise
        return None, None
