# SPDX-License-Identifier: Apache-2.0
"""Images to be scored, whatever a user has them in: a zip or folder, a folder per class, or an .npz of samples.

Each reader numbers its images and serves them as `metrics.sources` describes: uint8 batches with or without labels.
What a path holds is found from its content, not from its name.
"""
import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data

from dnnlib import UserError

Batch = tuple[torch.Tensor, torch.Tensor | None]            # uint8 [N, 3, H, W], int64 [N] or None
OFFICIAL_NAME = re.compile(r"\d{5}/img\d{8}\.\w+")          # A thousand files per folder: not classes.

#----------------------------------------------------------------------------
# What a path holds.

def kind_of(path: str | os.PathLike) -> str:
    """'statistics' (.npz with mu and sigma), 'samples' (.npz with other arrays) or 'dataset' (zip or folder of images).

    Raises:
        UserError: nothing is there, or it is neither a folder nor a zip archive (an .npz is one).
    """
    if os.path.isdir(path):
        return "dataset"
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file or folder: check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except (zipfile.BadZipFile, OSError, EOFError) as err:
        raise UserError(f"{path}: neither a folder, a zip archive nor an .npz file: name one of these") from err
    if {"mu.npy", "sigma.npy"} <= names:
        return "statistics"
    return "samples" if names and all(name.endswith(".npy") for name in names) else "dataset"


def has_samples(path: str | os.PathLike) -> bool:
    """Whether an .npz of statistics also holds images, as ADM's reference files do."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()

#----------------------------------------------------------------------------
# Data sets.

class ImageDatasetLike(Protocol):
    """What is used of `training.dataset.ImageDataset`, which scripts hand over."""

    resolution: int
    has_labels: bool
    class_names: list[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]: ...

    def file_name(self, i: int) -> str:
        """Name of item i's file inside the data set."""
        ...


class _Items(torch.utils.data.Dataset):
    """Items with errors as values: an exception that passes between processes becomes an unreadable one."""

    def __init__(self, dataset: ImageDatasetLike):
        self.dataset = dataset

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int] | UserError:
        try:
            image, label = self.dataset[i]
        except UserError as err:
            return err
        return torch.as_tensor(image), int(label)


def _stack(items: list[tuple[torch.Tensor, int] | UserError]) -> tuple[torch.Tensor, torch.Tensor] | UserError:
    for item in items:
        if isinstance(item, UserError):
            return item
    return torch.stack([image for image, _label in items]), torch.tensor([label for _image, label in items])


class DatasetSource:
    """A data set, with its own labels, with those of its sub-folders, or without."""

    def __init__(self, dataset: ImageDatasetLike, path: str, labels: np.ndarray | None = None,
                 class_names: list[str] | None = None, workers: int = 0):
        """Args:
            dataset: The images.
            path: For the record.
            labels: int64 [len(dataset)]; None: none.
            class_names: Names of the labels.
            workers: Processes that decode; 0: this one.
        """
        self.dataset = dataset
        self.labels = labels
        self.workers = workers
        self.num_images = len(dataset)
        self.fingerprint = dataset.fingerprint
        names = [dataset.file_name(i) for i in range(len(dataset))]
        self.description: dict[str, Any] = {
            "kind": "dataset", "path": path, "num_images": self.num_images, "resolution": dataset.resolution,
            "class_names": class_names, "has_jpeg": any(name.lower().endswith((".jpg", ".jpeg")) for name in names)}

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in order."""
        return self.batches_at(batch_size, range(self.num_images))

    def batches_at(self, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
        """The images with these numbers, in this order."""
        indices = list(indices)
        loader = torch.utils.data.DataLoader(
            _Items(self.dataset), batch_size=batch_size, sampler=indices, num_workers=self.workers,
            collate_fn=_stack, generator=torch.Generator())     # Its own, or it would draw from the global one.
        done = 0
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            numbers = indices[done : done + len(batch[0])]
            done += len(numbers)
            yield batch[0], None if self.labels is None else torch.from_numpy(self.labels[numbers])


def folder_labels(dataset: ImageDatasetLike) -> tuple[np.ndarray, list[str]] | None:
    """Labels from 'one sub-folder per class': the index of the first folder in sorted order; None if there are none.

    Official data sets without labels have numbered folders of a thousand files each; these are not taken for classes.
    """
    names = [dataset.file_name(i) for i in range(len(dataset))]
    if not all("/" in name for name in names) or all(OFFICIAL_NAME.fullmatch(name) for name in names):
        return None
    folders = [name.split("/")[0] for name in names]
    classes = sorted(set(folders))
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[folder] for folder in folders], dtype=np.int64), classes


def open_dataset(path: str, make: Callable[..., ImageDatasetLike], labels: bool = False,
                 workers: int = 0) -> DatasetSource:
    """A zip archive or folder of images.

    Args:
        path: Of the data set.
        make: `training.dataset.ImageDataset`.
        labels: Read labels, from dataset.json, else from sub-folders.
        workers: Processes that decode.

    Raises:
        UserError: unreadable, not square, not of one size, no images, labels that are asked for but broken.
    """
    dataset = make(path)
    if not labels:
        return DatasetSource(dataset, path, workers=workers)
    if dataset.has_labels:
        dataset = make(path, use_labels=True)
        return DatasetSource(dataset, path, dataset.labels, dataset.class_names, workers)
    found = folder_labels(dataset)
    return DatasetSource(dataset, path, *(found or (None, None)), workers=workers)

#----------------------------------------------------------------------------
# Samples in an .npz, as ADM, DiT and their kin write them: arr_0 uint8 [N, H, W, 3], labels in arr_1 if at all.

class NpzSource:
    """The images of an .npz, read as a stream: 50,000 images of 256 pixels are 10 GB, so never whole."""

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        try:
            with zipfile.ZipFile(path) as archive:
                members = {info.filename: info for info in archive.infolist()}
                if "arr_0.npy" not in members:
                    raise UserError(f"{path}: holds {', '.join(sorted(members)) or 'nothing'}, but images are expected "
                                    "in an array arr_0: write it with numpy.savez(path, images)")
                with archive.open("arr_0.npy") as f:
                    shape, fortran, dtype = _read_header(f)
                self.labels = _read_labels(archive, shape[0] if shape else 0) if "arr_1.npy" in members else None
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as err:
            raise UserError(f"{path}: not a whole .npz file ({type(err).__name__}): make it again") from err
        self._check(shape, fortran, dtype)
        self.num_images, self.height, self.width = shape[:3]
        # The archive keeps size and CRC-32 of the content, so 10 GB need not be read to know it.
        content = [(name, info.file_size, info.CRC) for name, info in sorted(members.items())]
        self.fingerprint = hashlib.sha256(repr(content).encode()).hexdigest()
        self.description: dict[str, Any] = {"kind": "samples", "path": self.path, "num_images": self.num_images,
                                            "resolution": self.width, "class_names": None}

    def _check(self, shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> None:
        if dtype != np.uint8:
            raise UserError(f"{self.path}: arr_0 is {dtype}, but images must be uint8 with values 0 to 255: round them "
                            "yourself, so that the rounding is yours")
        if len(shape) != 4 or shape[3] != 3 or fortran:
            order = " in Fortran order" if fortran else ""
            raise UserError(f"{self.path}: arr_0 is {list(shape)}{order}, but images must be [N, H, W, 3] in C order")
        if shape[0] < 1 or shape[1] != shape[2]:
            raise UserError(f"{self.path}: {shape[0]} images of {shape[2]}x{shape[1]} pixels, but it takes square "
                            "images and at least one of them")

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in order."""
        return self.batches_at(batch_size, range(self.num_images))

    def batches_at(self, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
        """The images with these ascending numbers. Others are skipped in the stream."""
        size = self.height * self.width * 3
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as f:
            _read_header(f)
            place, held, labels = 0, [], []
            for count, i in enumerate(indices, start=1):
                if i < place:
                    raise ValueError("the numbers of images must ascend")
                self._skip(f, (i - place) * size)
                held.append(self._read(f, size))
                labels.append(i)
                place = i + 1
                if len(held) == batch_size or count == len(indices):
                    pixels = np.frombuffer(bytearray(b"".join(held)), dtype=np.uint8)
                    images = torch.from_numpy(pixels.reshape(-1, self.height, self.width, 3)).permute(0, 3, 1, 2)
                    yield images.contiguous(), None if self.labels is None else torch.from_numpy(self.labels[labels])
                    held, labels = [], []

    def _read(self, f: zipfile.ZipExtFile, size: int) -> bytes:
        try:
            data = f.read(size)
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError) as err:
            raise UserError(f"{self.path}: arr_0 is damaged: make the file again") from err
        if len(data) != size:
            raise UserError(f"{self.path}: arr_0 is cut off: make the file again")
        return data

    def _skip(self, f: zipfile.ZipExtFile, size: int) -> None:
        while size > 0:
            step = min(size, 1 << 24)
            self._read(f, step)
            size -= step


def _read_header(f: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of the .npy stream; leaves it at the first value. Raises ValueError."""
    version = np.lib.format.read_magic(f)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"unknown version {version} of the .npy format")
    return readers[version](f)


def _read_labels(archive: zipfile.ZipFile, num: int) -> np.ndarray | None:
    """arr_1 as int64 [num], if it is that."""
    with archive.open("arr_1.npy") as f:
        labels = np.lib.format.read_array(f, allow_pickle=False)
    is_labels = labels.shape == (num,) and labels.dtype.kind in "iu"
    return labels.astype(np.int64) if is_labels else None

#----------------------------------------------------------------------------

def open_images(path: str | os.PathLike, make: Callable[..., ImageDatasetLike], labels: bool = False,
                workers: int = 0) -> DatasetSource | NpzSource:
    """The images at `path`, whichever kind it is.

    Args:
        path: Zip archive, folder, or .npz.
        make: `training.dataset.ImageDataset`.
        labels: Read labels where there are any.
        workers: Processes that decode.

    Raises:
        UserError: nothing there, or no images in it.
    """
    path = Path(path)
    if kind_of(path) == "dataset":
        return open_dataset(str(path), make, labels, workers)
    return NpzSource(path)
