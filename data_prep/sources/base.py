# SPDX-License-Identifier: Apache-2.0
"""What every source of images looks like to those who read it: `dataset_tool.py` and `calc_metrics.py`."""
import bisect
import collections
import dataclasses
import itertools
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dnnlib import UserError
from training.data.credit import Credit
from training.data.png import encode_plain_png
from training.data.splits import in_words
from training.data.stores import printable as printable
from training.data.stores import read_file


class ImageStore(Protocol):
    """Files by index, sorted by name; those of training.data.stores are two of them. It can be pickled."""

    path: Path
    reads_in_order: bool            # Images are streamed: several processes would each read everything.

    @property
    def names(self) -> Sequence[str]:
        """The names of the files, sorted."""
        ...

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of a dataset.json; {} if there is none."""
        ...

    def where(self, index: int) -> str:
        """The file as messages name it."""

    def size(self, index: int) -> int:
        """Bytes that `read` would return. Raises OSError."""

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError."""

    def content_key(self, index: int) -> tuple[int, int]:
        """Size and CRC-32 of the content. Raises OSError."""

    def close(self) -> None:
        """Close whatever is open; it opens again when needed."""


class NoMetadata:
    """What stores have in common that are no folders or archives of files."""

    reads_in_order = False

    @property
    def metadata(self) -> dict[str, Any]:
        """There is no dataset.json."""
        return {}

    def content_key(self, index: int) -> tuple[int, int]:
        """Size and CRC-32 of the content. Raises OSError."""
        data = self.read(index)
        return len(data), zlib.crc32(data)

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Source:
    """Images and what is known of them."""

    store: ImageStore
    indices: Sequence[int]                  # Which of store.names, in order.
    labels: list[int] | None = None         # For each of them.
    classes: list[str] | None = None
    layout: str = "images"                  # How the labels were found; goes to the report.
    kind: str = ""                          # What the images lie in: 'folder', 'zip archive', ...
    splits: dict[str, int] = dataclasses.field(default_factory=dict)    # All that are there, with their sizes,
    split_unit: str = "images"              # which are numbers of these.
    chosen: tuple[str, ...] = ()            # Which splits are taken.
    not_read: tuple[str, ...] = ()          # What lies beside the images and is none, as far as it is worth a word.
    credit: Credit | None = None            # Who is to be named; goes into what is made of it.

    @property
    def is_imagenet(self) -> bool:
        return self.layout == "imagenet"


def splits_in_words(source: Source) -> str:
    """'split train of train (4 images), val (2 images)', '' if there are none."""
    if not source.splits:
        return ""
    return f"split {', '.join(source.chosen)} of {in_words(source.splits, source.split_unit)}"


def class_counts(labels: Sequence[int] | None, classes: Sequence[str] | None) -> dict[str, int]:
    """Name of each class -> images; {} without labels."""
    if not labels:
        return {}
    found = collections.Counter(labels)
    return {name: found[i] for i, name in enumerate(classes or [str(i) for i in range(max(labels) + 1)])}


def read_image(store: ImageStore, index: int) -> bytes | str:
    """Content of a file, or the reason in words why there is none."""
    try:
        return read_file(store, index)
    except OSError as err:
        return err.strerror or str(err)


class ArrayStore(NoMetadata):
    """Images that lie in one array in memory: uint8 [N, H, W] or [N, H, W, 3]."""

    def __init__(self, path: str | os.PathLike[str], images: np.ndarray):
        self.path = Path(path)
        self.names = [f"{i:08d}.png" for i in range(len(images))]
        self._images = images

    def where(self, index: int) -> str:
        return f"{self.path}: image {index}"

    def size(self, index: int) -> int:
        return int(self._images[index].nbytes)

    def read(self, index: int) -> bytes:
        return encode_plain_png(self._images[index])

    def close(self) -> None:
        """Nothing is held open."""


class ChainedStore(NoMetadata):
    """Several stores, one after the other: splits that are taken together."""

    def __init__(self, path: str | os.PathLike[str], parts: dict[str, ImageStore]):
        """Args:
            path: For messages.
            parts: Folder that stands for a store in the names -> the store.
        """
        self.path = Path(path)
        self._stores = list(parts.values())
        self.reads_in_order = any(store.reads_in_order for store in self._stores)
        self.names = [f"{folder}/{name}" for folder, store in parts.items() for name in store.names]
        self._starts = list(itertools.accumulate((len(store.names) for store in self._stores), initial=0))

    def _at(self, index: int) -> tuple[ImageStore, int]:
        number = bisect.bisect_right(self._starts, index) - 1
        return self._stores[number], index - self._starts[number]

    def where(self, index: int) -> str:
        store, number = self._at(index)
        return store.where(number)

    def size(self, index: int) -> int:
        store, number = self._at(index)
        return store.size(number)

    def read(self, index: int) -> bytes:
        store, number = self._at(index)
        return store.read(number)

    def close(self) -> None:
        for store in self._stores:
            store.close()


def chain(path: str, parts: dict[str, Source]) -> Source:
    """Splits as one source. Raises UserError if they have different classes."""
    sources = list(parts.values())
    if len(sources) == 1:
        return sources[0]
    store = ChainedStore(path, {split: source.store for split, source in parts.items()})
    lengths = itertools.accumulate((len(source.store.names) for source in sources), initial=0)
    starts = dict(zip(parts, lengths, strict=False))
    indices = [starts[split] + i for split, source in parts.items() for i in source.indices]
    lists = [source.classes for source in sources]
    longest = max(lists, key=lambda names: len(names or []))
    labels: list[int] | None = None
    if all(source.labels is not None for source in sources):
        if any(names != (longest or [])[:len(names or [])] for names in lists if names is not None):
            raise UserError(f"{path}: the splits {', '.join(parts)} have different classes: take one of them")
        labels = [label for source in sources for label in source.labels or []]
    elif any(source.labels is not None for source in sources):
        without = [split for split, source in parts.items() if source.labels is None]
        raise UserError(f"{path}: no labels in the split {', '.join(without)}: take another one, or add --no-labels")
    return dataclasses.replace(sources[0], store=store, indices=indices, labels=labels,
                               classes=longest if labels is not None else None)
