# SPDX-License-Identifier: Apache-2.0
"""Images in files as metrics take them: uint8 batches, with labels if there are any and somebody asks."""
import collections
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.utils.data

from data_prep.sources.base import Source
from dnnlib import UserError
from dnnlib.util import list_some
from training.data.images import Decoded, changes_in_words, decode, decode_pixels
from training.data.loading import obey_parent_only, shared, start_loading
from training.data.report import read_report
from training.data.stores import content_fingerprint, read_file

CHECKED_AT_START = 256      # Files looked at before anything is computed; the rest when they are read.
Batch = tuple[torch.Tensor, torch.Tensor | None]            # uint8 [N, 3, H, W], int64 [N] or None

#----------------------------------------------------------------------------

class ImageFiles:
    """Square images of one size, any size. Item i is (uint8 [3, H, W], 0).

    A data set for training must have a size that is a power of two; images to be scored need not. What is no 8-bit RGB
    is converted as `dataset_tool.py` does it (`training.data.images`). Can be pickled.

    Raises:
        UserError: an image is not as it must be; the message names the file.
    """

    def __init__(self, source: Source):
        self._store, self._indices = source.store, source.indices
        self.changes = ""           # What is done to files when they are read, in words; "" if nothing.
        self.lossy = ""             # The lossy compressions among the files looked at.
        self.resolution = self._look()
        self._store.close()

    def _look(self) -> int:
        """Check some files spread over all, and one of each suffix; returns the resolution that all must have."""
        step = max(len(self) / CHECKED_AT_START, 1)
        suffixes: dict[str, int] = {}
        for i in range(len(self)):
            suffixes.setdefault(self.file_name(i).rpartition(".")[2], i)
        numbers = sorted({*np.arange(0, len(self), step).astype(np.int64).tolist(), *suffixes.values()})
        sizes, changes, lossy = {}, collections.Counter[str](), set()
        for i in numbers:
            found = self._open(i)
            sizes[i] = found.image.size
            changes.update(found.notes)
            lossy.add(found.lossy)
        self.changes, self.lossy = changes_in_words(changes, len(numbers)), ", ".join(sorted(lossy - {""}))
        width, height = sizes[0]
        if width != height:
            raise UserError(f"{self._where(0)}: {width}x{height} pixels, but images must be square: crop them as the "
                            "images they are compared with were cropped")
        if others := [i for i in numbers if sizes[i] != sizes[0]]:
            named = list_some([f"{self.file_name(i)} ({sizes[i][0]}x{sizes[i][1]})" for i in others], 3)
            raise UserError(f"{self._store.path}: images of different sizes: {self.file_name(0)} has {width}x{height} "
                            f"pixels, but not {named}: make all of one size")
        return width

    def _where(self, i: int) -> str:
        return self._store.where(self._indices[i])

    def _open(self, i: int) -> Decoded:
        try:
            return decode(read_file(self._store, self._indices[i]))
        except (OSError, ValueError) as err:
            raise self._cannot_decode(i, err) from err

    def _cannot_decode(self, i: int, err: Exception) -> UserError:
        return UserError(f"{self._where(i)}: cannot be decoded ({err}): replace the file")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        try:
            pixels = decode_pixels(read_file(self._store, self._indices[i]), self.resolution)       # [H, W, 3]
        except (OSError, ValueError) as err:
            raise self._cannot_decode(i, err) from err
        if pixels.shape[:2] != (self.resolution, self.resolution):
            raise UserError(f"{self._where(i)}: {pixels.shape[1]}x{pixels.shape[0]} pixels, but {self.file_name(0)} "
                            f"has {self.resolution}x{self.resolution}: make all of one size")
        return pixels.transpose(2, 0, 1).copy(), 0

    def file_name(self, i: int) -> str:
        """Name of item i's file inside the folder or archive."""
        return self._store.names[self._indices[i]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and CRC-32 of the files and of dataset.json: that of a data set for training."""
        return content_fingerprint(self._store, self._indices, xflip=False)

#----------------------------------------------------------------------------

def crop_of_file(path: str | Path) -> str | None:
    """The crop that dataset_tool noted in the data set's report; None where nothing is known."""
    try:
        crop = (read_report(path) or {}).get("transform")
    except UserError:           # Only a warning hangs on it.
        return None
    return crop if isinstance(crop, str) else None


def labels_sorted(labels: np.ndarray | None) -> bool:
    """Whether labels come in ascending order with more than one class: scores that depend on order then mislead."""
    return labels is not None and len(labels) > 0 and bool((np.diff(labels) >= 0).all() and labels[0] != labels[-1])

#----------------------------------------------------------------------------

class ImageDatasetLike(Protocol):
    """What is used of `ImageFiles` and of `training.dataset.ImageDataset`."""

    @property
    def resolution(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]: ...

    def file_name(self, i: int) -> str:
        """Name of item i's file inside the data set."""
        ...


class _Items(torch.utils.data.Dataset[tuple[torch.Tensor, int] | UserError]):
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
    images, labels = [], []
    for item in items:
        if isinstance(item, UserError):
            return item
        images.append(item[0])
        labels.append(item[1])
    try:
        batch = shared(torch.empty([len(images), *images[0].shape], dtype=images[0].dtype))
        return torch.stack(images, out=batch), shared(torch.tensor(labels))
    except UserError as err:
        return err


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
        self.can_read_ahead = workers == 0      # Workers are ahead by themselves, and a thread must not start them.
        self.label_values = None if labels is None else np.unique(labels)
        self.num_images = len(dataset)
        self.fingerprint = dataset.fingerprint
        self.understood = ""                    # Splits and classes that were found, for people.
        self.description: dict[str, Any] = {
            "kind": "dataset", "format": "data set", "path": path, "num_images": self.num_images,
            "resolution": dataset.resolution, "class_names": class_names, "labels_sorted": labels_sorted(labels),
            "crop": crop_of_file(path)}

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in order."""
        return self.batches_at(batch_size, range(self.num_images))

    def batches_at(self, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
        """The images with these numbers, in this order."""
        indices = list(indices)
        loader = torch.utils.data.DataLoader(
            _Items(self.dataset), batch_size=batch_size, sampler=indices, num_workers=self.workers,
            worker_init_fn=obey_parent_only,
            collate_fn=_stack, generator=torch.Generator())     # Its own, or it would draw from the global one.
        done = 0
        for batch in start_loading(loader):
            if isinstance(batch, UserError):
                raise batch
            numbers = indices[done : done + len(batch[0])]
            done += len(numbers)
            yield batch[0], None if self.labels is None else torch.from_numpy(self.labels[numbers])

#----------------------------------------------------------------------------

def source_of_files(source: Source, path: str, labels: np.ndarray | None, workers: int) -> DatasetSource:
    """The images of a source, for metrics.

    Args:
        source: The images.
        path: For the record.
        labels: To serve, int64 [N]; None: none.
        workers: Processes that decode.

    Raises:
        UserError: an image is unreadable or not square, or they are not of one size.
    """
    files, form = ImageFiles(source), source.kind
    if source.layout in ("folders", "imagenet") and source.classes is not None and len(source.classes) > 1:
        form += " with one sub-folder per class"
    found = DatasetSource(files, path, labels, source.classes if labels is not None else None,
                          0 if source.store.reads_in_order else workers)
    order = None if source.labels is None else np.array(source.labels, dtype=np.int64)
    found.description.update(
        kind="samples" if source.layout == "array" else "dataset", format=form, labels_sorted=labels_sorted(order),
        lossy=files.lossy, changes=files.changes, split=", ".join(source.chosen) or None)
    return found
