# SPDX-License-Identifier: Apache-2.0
"""Image data sets in the official format: the order in which images are shown, the stream of micro-batches, and how far
the images of a class are apart."""
import collections
import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.utils.data

from dnnlib import UserError
from dnnlib.classes import Classes, match
from training.data.credit import Credit, credit_of
from training.data.images import Decoded, changes_in_words, decode, decode_pixels
from training.data.inventory import Inventory, inventory
from training.data.labels import METADATA_NAME, read_labels
from training.data.loading import Loading, obey_parent_only, shared, start_loading
from training.data.randomness import permutation
from training.data.splits import find_splits, in_words
from training.data.stores import content_fingerprint, open_store, read_file

CHECKED_AT_START = 256      # Files whose size and mode are looked at before training; the rest when they are read.
MIN_RESOLUTION = 4
NUM_PAIRS = 1024            # Pairs of images whose distance is measured, at most.

#----------------------------------------------------------------------------

def _cannot_decode(where: str, err: Exception) -> UserError:
    return UserError(f"{where}: cannot be decoded ({err}): replace the file or make the data set again with "
                     "dataset_tool.py")


class ImageDataset(torch.utils.data.Dataset[tuple[np.ndarray, int]]):
    """Square images in a zip archive or a folder, with optional class labels in dataset.json.

    Files of other kinds than 8-bit RGB are converted as dataset_tool.py does it (`training.data.images`). Item i is
    (uint8 [3, resolution, resolution], class index; 0 without labels). Files are in the order of their names.
    Can be pickled; worker processes open the archive for themselves.

    Raises:
        UserError: the path, an image or the labels are not as they must be; the message names the file.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],        # A zip archive or a folder.
        use_labels: bool = False,       # Read the labels and serve them.
        xflip: bool = False,            # Append every image again, mirrored.
        max_size: int | None = None,    # Serve a random choice of this many images, before mirroring.
        seed: int = 0,                  # Seed of that choice.
    ):
        self.path = str(path)
        self.name = os.path.splitext(os.path.basename(os.path.normpath(self.path)))[0]
        self.xflip = xflip
        self._store = open_store(path)
        self._check_splits()
        self._use_labels = use_labels
        self._image_labels: np.ndarray | None = None
        self.class_names: list[str] = []
        if use_labels:
            self._image_labels, self.class_names = self._read_labels()
        self._chosen = np.arange(len(self._store.names))        # Images served, as indices into the stored ones.
        if max_size is not None and max_size < len(self._chosen):
            if max_size < 1:
                raise UserError(f"{path}: at least one image is needed, but max_size is {max_size}")
            np.random.RandomState(seed % (1 << 31)).shuffle(self._chosen)
            self._chosen = np.sort(self._chosen[:max_size])
        self.changes = ""               # What is done to files when they are read, in words; '' if nothing.
        self.resolution = self._check_images()

    @functools.cached_property
    def credit(self) -> Credit | None:
        """Who is to be named with the images. It is read when it is asked for: dataset.json may be large."""
        return credit_of(f"{self.path}: {METADATA_NAME}", self._store.metadata)

    def _check_splits(self) -> None:
        """Images for training and others must not be mixed unseen; a dataset.json that lists all means all."""
        splits = None if self._store.lists_labels else find_splits(self._store.names)
        if splits is not None and len(splits.counts) > 1:
            raise UserError(f"{self.path}: has the splits {in_words(splits.counts, 'images')}: name the folder of one, "
                            f"or make a data set with dataset_tool.py --split={next(iter(splits.counts))}")

    def _read_labels(self) -> tuple[np.ndarray, list[str]]:
        """Labels of all stored images, integers, and the names of the classes."""
        found = read_labels(self._store)
        if found is None:
            raise UserError(f"{self.path}: has no labels in a {METADATA_NAME}: make it with dataset_tool.py from a "
                            "folder that has one sub-folder per class, or train without classes (--cond=0)")
        return found

    def renumber(self, indices: Sequence[int], class_names: list[str]) -> None:
        """Serve `indices[label]` instead of each label; the names are by those."""
        self._image_labels, self.class_names = np.array(indices)[self._image_labels], class_names

    def _check_images(self) -> int:
        """Look at some files spread over the data set; returns the resolution that all must have."""
        (width, height), first = self._decode(self._chosen[0]).image.size, self._store.where(self._chosen[0])
        if width != height:
            raise UserError(f"{first}: {width}x{height} pixels, but images must be square: "
                            f"convert with dataset_tool.py --transform=center-crop --resolution=N")
        if width < MIN_RESOLUTION or width & (width - 1):
            raise UserError(f"{first}: {width}x{width} pixels, but the size must be a power of two: "
                            f"convert with dataset_tool.py --resolution={1 << max(width.bit_length() - 1, 3)}")
        step, conversions = max(len(self._chosen) / CHECKED_AT_START, 1), collections.Counter[str]()
        places = np.arange(0, len(self._chosen), step).astype(np.int64)
        for k in places:
            found = self._decode(self._chosen[k])
            self._check(found.image.size, self._chosen[k], width)
            conversions.update(found.notes)
        self.changes = changes_in_words(conversions, len(places))
        self._store.close()
        return width

    def _check(self, size: tuple[int, int], index: int, resolution: int) -> None:
        if size != (resolution, resolution):
            raise UserError(f"{self._store.where(index)}: {size[0]}x{size[1]} pixels, but {self.file_name(0)} has "
                            f"{resolution}x{resolution}: convert with dataset_tool.py --transform=center-crop "
                            f"--resolution={resolution}")

    def _decode(self, index: int) -> Decoded:
        try:
            return decode(read_file(self._store, index))
        except (OSError, ValueError) as err:
            raise _cannot_decode(self._store.where(index), err) from err

    def __len__(self) -> int:
        return len(self._chosen) * (2 if self.xflip else 1)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        mirrored, place = divmod(int(i), len(self._chosen))
        index = int(self._chosen[place])
        pixels = self._pixels(index)[:, ::-1 if mirrored else 1]        # [H, W, 3]
        label = 0 if self._image_labels is None else int(self._image_labels[index])
        return np.ascontiguousarray(pixels.transpose(2, 0, 1)), label

    def _pixels(self, index: int) -> np.ndarray:
        """A stored image, uint8 [H, W, 3]."""
        try:
            pixels = decode_pixels(read_file(self._store, index), self.resolution)
        except (OSError, ValueError) as err:
            raise _cannot_decode(self._store.where(index), err) from err
        self._check((pixels.shape[1], pixels.shape[0]), index, self.resolution)
        return pixels

    def file_name(self, i: int) -> str:
        """Name of item i's file inside the data set."""
        return self._store.names[int(self._chosen[i % len(self._chosen)])]

    def close(self) -> None:
        """Close the archive; it opens again when needed."""
        self._store.close()

    @property
    def c_dim(self) -> int:
        """Number of classes; 0 unless labels are used."""
        return len(self.class_names)

    @property
    def has_labels(self) -> bool:
        """Whether dataset.json lists labels, used or not."""
        return self._store.lists_labels

    @property
    def labels(self) -> np.ndarray:
        """Label of every item, int64 [len(self)]; zeros unless labels are used."""
        if self._image_labels is None:
            return np.zeros(len(self), dtype=np.int64)
        labels = self._image_labels[self._chosen].astype(np.int64)
        return np.tile(labels, 2 if self.xflip else 1)

    @property
    def label_counts(self) -> np.ndarray:
        """Items per class, int64 [c_dim]."""
        return np.bincount(self.labels, minlength=self.c_dim)[:self.c_dim]

    def label_distribution(self) -> np.ndarray:
        """Share of each class among the items, float64 [c_dim]."""
        return self.label_counts / len(self)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what is served: names, sizes and CRC-32 of the files, labels, mirroring. 64 hex digits."""
        return content_fingerprint(self._store, self._chosen, self.xflip)

    def inventory(self) -> Inventory:
        """What it consists of, file by file."""
        return inventory(self._store, self.labels, self.class_names)

def follow_classes(dataset: ImageDataset, whose: str, known: Classes) -> str | None:
    """Number the classes of a data set as a network or run does that knows them, found by their names.

    Args:
        dataset: It is changed.
        whose: Who knows them, for messages: 'the stem'.
        known: The classes there.

    Returns:
        What was taken for granted, if anything.

    Raises:
        UserError: an image is of a class that is not known there.
    """
    if dataset.c_dim == 0:
        return None
    used = np.flatnonzero(dataset.label_counts).tolist()
    found = match(f"--data={dataset.path}", Classes(dataset.class_names), whose, known, "use the data set that it was "
                  "trained on, or call the classes so in \"classes\" of dataset.json", used)
    dataset.renumber(found.indices, known.names if known.has_names else dataset.class_names)
    return found.note

#----------------------------------------------------------------------------

class EpochOrder:
    """Which item is shown at which position: one fresh permutation per epoch, a pure function of (seed, position).

    A position counts the items shown since the start of training, over all processes. There is nothing to save.
    """

    def __init__(self, num_items: int, seed: int = 0):
        if num_items < 1:
            raise ValueError(f"an order of {num_items} items")
        self.num_items = num_items
        self.seed = seed
        self._permutations: dict[int, np.ndarray] = {}      # Those of the last epochs asked for.

    def index(self, position: int) -> int:
        """Item at one position."""
        return int(self.indices([position])[0])

    def indices(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """Items at several positions, int64 [N]."""
        epochs, places = np.divmod(np.asarray(positions, dtype=np.int64), self.num_items)
        items = np.empty(len(epochs), dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            items[here] = self._permutation(epoch)[places[here]]
        return items

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            while len(self._permutations) > 1:
                del self._permutations[next(iter(self._permutations))]
            self._permutations[epoch] = permutation(self.seed, epoch, self.num_items)
        return self._permutations[epoch]

#----------------------------------------------------------------------------

class _MicroBatches(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor] | UserError]):
    """Items by lists of indices, stacked. A user's mistake is handed over as a value: an exception that passes
    between processes comes out with the whole traceback for a message."""

    def __init__(self, dataset: ImageDataset):
        self.dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | UserError:
        try:
            labels = shared(torch.empty([len(indices)], dtype=torch.int64))
            their_labels = labels.numpy()
            first, their_labels[0] = self.dataset[indices[0]]
            images = shared(torch.empty([len(indices), *first.shape], dtype=torch.uint8))
            to_fill = images.numpy()
            to_fill[0] = first
            for k, i in enumerate(indices[1:], start=1):
                to_fill[k], their_labels[k] = self.dataset[i]
        except UserError as err:
            return err
        return images, labels


def load_batches(dataset: ImageDataset, batches: Sequence[np.ndarray],
                 workers: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(uint8 [N, 3, H, W], int64 [N]) for each list of items in turn, loaded by `workers` processes.

    Raises (while iterating):
        UserError: an image cannot be served.
    """
    loader = torch.utils.data.DataLoader(
        _MicroBatches(dataset), sampler=batches, batch_size=None, num_workers=workers, generator=torch.Generator(),
        worker_init_fn=obey_parent_only)
    for batch in start_loading(loader):
        if isinstance(batch, UserError):
            raise batch
        yield batch[0], batch[1]


class _MicroBatchIndices(torch.utils.data.Sampler[np.ndarray]):
    """Without end, the items of one process's micro-batches."""

    def __init__(self, order: EpochOrder, batch_gpu: int, first: int, stride: int):
        self.order = order
        self.batch_gpu = batch_gpu
        self.first = first          # Position of the first item.
        self.stride = stride        # Positions from one micro-batch of this process to its next.

    def __iter__(self) -> Iterator[np.ndarray]:
        for start in itertools.count(self.first, self.stride):
            yield self.order.indices(np.arange(start, start + self.batch_gpu))


class TrainingStream:
    """Endless micro-batches of one process: (uint8 [batch_gpu, 3, H, W], int64 [batch_gpu]).

    Micro-batch k of process `rank` holds the batch_gpu positions from start_nimg + (k * world_size + rank) * batch_gpu.

    Raises (while iterating):
        UserError: an image cannot be served; the message names the file. Or none come (`training.data.loading`).
    """

    def __init__(
        self,
        dataset: ImageDataset,
        order: EpochOrder,              # It must have len(dataset) items.
        rank: int = 0,                  # Process number.
        world_size: int = 1,            # Number of processes.
        batch_gpu: int = 1,             # Images per micro-batch.
        start_nimg: int = 0,            # Images seen before, by all processes.
        workers: int = 0,               # Loader processes; 0 loads in this one.
        pin_memory: bool = False,       # For training on a GPU: copies from there do not wait for it.
        is_asked_to_stop: Callable[[], bool] = lambda: False,   # Then it is not waited long for images.
    ):
        if order.num_items != len(dataset):
            raise ValueError(f"the order is of {order.num_items} items, the data set of {len(dataset)}")
        if not 0 <= rank < world_size or batch_gpu < 1 or start_nimg < 0:
            raise ValueError(f"rank {rank} of {world_size}, batch_gpu {batch_gpu}, start_nimg {start_nimg}")
        sampler = _MicroBatchIndices(order, batch_gpu, start_nimg + rank * batch_gpu, world_size * batch_gpu)
        self._loader: torch.utils.data.DataLoader[tuple[torch.Tensor, torch.Tensor] | UserError] | None
        self._loader = torch.utils.data.DataLoader(
            _MicroBatches(dataset), sampler=sampler, batch_size=None, num_workers=workers,
            pin_memory=pin_memory, persistent_workers=workers > 0,
            worker_init_fn=obey_parent_only,
            generator=torch.Generator(),        # The loader draws a seed for its workers: not from the global state.
        )
        self._is_asked_to_stop = is_asked_to_stop
        self._batches: Loading | None = None

    def __iter__(self) -> "TrainingStream":
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._loader is None:
            raise StopIteration
        if self._batches is None:
            self._batches = Loading(self._loader, self._is_asked_to_stop)
        batch = next(self._batches)
        if isinstance(batch, UserError):
            raise batch
        images, labels = batch          # Through pinned memory a tuple arrives as a list.
        return images, labels

    def close(self) -> None:
        """End the loader processes and the stream."""
        if self._batches is not None:
            self._batches.close()
        self._batches = self._loader = None

#----------------------------------------------------------------------------

def real_pair_distance(dataset: ImageDataset, seed: int = 0, num_pairs: int = NUM_PAIRS) -> float:
    """Mean absolute difference of two random images of one class, pixels in [-1, 1]; 0 if no class has two.

    Args:
        dataset: The images; without labels all count as one class.
        seed: Chooses the pairs.
        num_pairs: Pairs to look at, at most; classes come as often as in the data.
    """
    labels = np.asarray(dataset.labels)
    order = permutation(seed, 0, len(labels))
    order = order[np.argsort(labels[order], kind="stable")]         # Class by class, shuffled within.
    pairs = np.stack([order[:-1], order[1:]], axis=1)
    pairs = pairs[labels[pairs[:, 0]] == labels[pairs[:, 1]]]
    if len(pairs) == 0:
        return 0.0
    pairs = pairs[permutation(seed, 1, len(pairs))[:num_pairs]]
    distances = [np.abs(dataset[a][0].astype(np.float64) - dataset[b][0]).mean() for a, b in pairs]
    return float(np.mean(distances) / 127.5)
