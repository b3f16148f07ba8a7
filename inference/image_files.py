# SPDX-License-Identifier: Apache-2.0
"""Images in files to be scored: folders, zip and tar archives, with labels from dataset.json or from sub-folders."""
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
import torch
import torch.utils.data

from dnnlib import UserError
from dnnlib.util import list_some
from inference.npz_source import Batch, labels_sorted
from inference.tar_store import TarStore
from training.data.labels import class_list, label_table, labels_of
from training.data.loading import obey_parent_only, start_loading
from training.data.report import read_report
from training.data.stores import DECODE_ERRORS, FolderStore, ZipStore, content_fingerprint, open_image

CHECKED_AT_START = 256      # Files looked at before anything is computed; the rest when they are read.
# Folders that only hold a thousand files each and are no classes: of official data sets, and of EDM2's samples.
NUMBERED = (re.compile(r"(.*/)?\d{5}/img\d{8}\.\w+"), re.compile(r"(.*/)?(\d{3})000/\2\d{3}\.\w+"))
PNG_START, PNG_DEPTH = b"\x89PNG\r\n\x1a\n", 24     # Pillow reduces 16-bit colours to 8 bits without a word.
ImageStore = FolderStore | ZipStore | TarStore
TO_RGB = "save it as 8-bit RGB, for example with PIL: image.convert('RGB').save('x.png')"

#----------------------------------------------------------------------------

class ImageFiles:
    """Square 8-bit RGB or grayscale images of one size, any size. Item i is (uint8 [3, H, W], 0).

    A data set for training must have a size that is a power of two; images to be scored need not. Grayscale is served
    as three equal channels. Nothing else is converted: how would be part of the result. Can be pickled.

    Raises:
        UserError: an image is not as it must be; the message names the file.
    """

    def __init__(self, store: ImageStore):
        self._store = store
        self.resolution = self._look()
        store.close()

    def _look(self) -> int:
        """Check some files spread over all; returns the resolution that all must have."""
        step = max(len(self) / CHECKED_AT_START, 1)
        numbers = np.arange(0, len(self), step).astype(np.int64).tolist()
        sizes = {i: self._open(i).size for i in numbers}
        width, height = sizes[0]
        if width != height:
            raise UserError(f"{self._store.where(0)}: {width}x{height} pixels, but images must be square: crop them as "
                            "the images they are compared with were cropped")
        if others := [i for i in numbers if sizes[i] != sizes[0]]:
            named = list_some([f"{self.file_name(i)} ({sizes[i][0]}x{sizes[i][1]})" for i in others], 3)
            raise UserError(f"{self._store.path}: images of different sizes: {self.file_name(0)} has {width}x{height} "
                            f"pixels, but not {named}: make all of one size")
        return width

    def _open(self, i: int) -> PIL.Image.Image:
        where = self._store.where(i)
        try:
            data = self._store.read(i)
            image = open_image(data)
        except DECODE_ERRORS as err:
            raise UserError(f"{where}: cannot be decoded ({err}): replace the file") from err
        if data.startswith(PNG_START) and data[PNG_DEPTH] == 16 or image.mode.startswith(("I", "F")):
            raise UserError(f"{where}: has more than 8 bits per channel, and rounding is yours to choose: {TO_RGB}")
        if image.mode not in ("L", "RGB") or image.has_transparency_data:
            what = "a palette" if image.mode.startswith("P") else image.mode
            alpha = " with transparency" if image.has_transparency_data else ""
            raise UserError(f"{where}: pixels are {what}{alpha}, but must be RGB or grayscale: {TO_RGB}")
        return image

    def __len__(self) -> int:
        return len(self._store.names)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        image = self._open(i)
        if image.size != (self.resolution, self.resolution):
            raise UserError(f"{self._store.where(i)}: {image.size[0]}x{image.size[1]} pixels, but {self.file_name(0)} "
                            f"has {self.resolution}x{self.resolution}: make all of one size")
        pixels = np.asarray(image.convert("RGB"))       # [H, W, 3]
        return pixels.transpose(2, 0, 1).copy(), 0

    def file_name(self, i: int) -> str:
        """Name of item i's file inside the folder or archive."""
        return self._store.names[i]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of names, sizes and CRC-32 of the files and of dataset.json: that of a data set for training."""
        return content_fingerprint(self._store, range(len(self)), xflip=False)

#----------------------------------------------------------------------------

def crop_of_file(path: str | Path) -> str | None:
    """The crop that dataset_tool noted in the data set's report; None where nothing is known."""
    try:
        crop = (read_report(path) or {}).get("transform")
    except UserError:           # Only a warning hangs on it.
        return None
    return crop if isinstance(crop, str) else None

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
    return torch.stack(images), torch.tensor(labels)


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
        self.num_images = len(dataset)
        self.fingerprint = dataset.fingerprint
        names = [dataset.file_name(i) for i in range(len(dataset))]
        self.description: dict[str, Any] = {
            "kind": "dataset", "format": "data set", "path": path, "num_images": self.num_images,
            "resolution": dataset.resolution, "class_names": class_names, "labels_sorted": labels_sorted(labels),
            "crop": crop_of_file(path),
            "has_jpeg": any(name.lower().endswith((".jpg", ".jpeg")) for name in names)}

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

def folder_labels(dataset: ImageDatasetLike) -> tuple[np.ndarray, list[str]] | None:
    """Labels from 'one sub-folder per class': the index of the folder in sorted order; None if there are none.

    Folders that all files share ('out/samples/') are passed over. Numbered folders of a thousand files each, as
    official data sets without labels and EDM2's samples have them, are not taken for classes.
    """
    names = [dataset.file_name(i) for i in range(len(dataset))]
    if not all("/" in name for name in names):
        return None
    if any(all(pattern.fullmatch(name) for name in names) for pattern in NUMBERED):
        return None
    parts = [name.split("/")[:-1] for name in names]
    depth = 0
    while len({tuple(part[: depth + 1]) for part in parts}) == 1 and all(len(part) > depth + 1 for part in parts):
        depth += 1
    folders = [part[depth] for part in parts]
    classes = sorted(set(folders))
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index[folder] for folder in folders], dtype=np.int64), classes


def stored_labels(store: ImageStore) -> tuple[np.ndarray, list[str]] | None:
    """Labels from dataset.json, int64 [N], and the names of the classes; None if there are none.

    Raises:
        UserError: they are broken, or some images have none.
    """
    table = label_table(store)
    if table is None:
        return None
    labels = labels_of(store, table)
    return labels, class_list(store) or [str(i) for i in range(int(labels.max()) + 1)]


def open_files(store: ImageStore, form: str, labels: bool, workers: int) -> DatasetSource:
    """A folder or archive of images.

    Args:
        store: Where the files are.
        form: What it is called in the record: 'folder', 'zip archive', 'tar archive'.
        labels: Serve labels, from dataset.json, else from sub-folders. Without it only their order is looked at.
        workers: Processes that decode.

    Raises:
        UserError: unreadable, not square, not of one size, not 8-bit RGB or grayscale; broken labels that are wanted.
    """
    files, found = ImageFiles(store), None
    try:
        found = stored_labels(store)
    except UserError:
        if labels:
            raise
    if found is None and (found := folder_labels(files)) is not None and len(found[1]) > 1:
        form += " with one sub-folder per class"
    values, names = found if found is not None and labels else (None, None)
    source = DatasetSource(files, str(store.path), values, names, workers)
    source.description.update(format=form, labels_sorted=labels_sorted(found[0] if found else None))
    return source
