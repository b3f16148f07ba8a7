# SPDX-License-Identifier: Apache-2.0
"""What every source of images looks like to the rest of data_prep."""
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dnnlib.util import format_bytes
from training.data.png import encode_plain_png
from training.data.stores import FolderStore, ZipStore

MAX_FILE_BYTES = 512 << 20      # Of one encoded image. Larger files are listed as skipped and never read.


class ImageStore(Protocol):
    """Files by index, sorted by name; FolderStore and ZipStore of training.data.stores are two of them."""

    path: Path

    @property
    def names(self) -> Sequence[str]:
        """Of the files, sorted."""
        ...

    def where(self, index: int) -> str:
        """The file as messages name it."""

    def size(self, index: int) -> int:
        """Bytes that `read` would return. Raises OSError."""

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError."""

    def close(self) -> None:
        """Close whatever is open; it opens again when needed."""


def printable(name: str) -> str:
    """A file name that every terminal and JSON reader takes: bytes that are no UTF-8 are written as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class FolderFiles(FolderStore):
    """A folder of images."""

    def where(self, index: int) -> str:
        return printable(super().where(index))

    def size(self, index: int) -> int:
        return os.path.getsize(self.path / self.names[index])


class ZipFiles(ZipStore):
    """A zip archive of images."""

    def size(self, index: int) -> int:
        return self.content_key(index)[0]


@dataclasses.dataclass(frozen=True)
class Source:
    """The images to convert."""

    store: ImageStore
    indices: Sequence[int]                  # Which of store.names, in order.
    labels: list[int] | None = None         # For each of them.
    classes: list[str] | None = None
    layout: str = "images"                  # How the labels were found; goes to the report.

    @property
    def is_imagenet(self) -> bool:
        return self.layout == "imagenet"


def read_image(store: ImageStore, index: int) -> bytes | str:
    """Content of a file, or the reason in words why there is none."""
    try:
        size = store.size(index)
        if size > MAX_FILE_BYTES:
            return f"{format_bytes(size)}, more than the {format_bytes(MAX_FILE_BYTES)} that one image may have"
        return store.read(index)
    except OSError as err:
        return err.strerror or str(err)


class ArrayStore:
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
