# SPDX-License-Identifier: Apache-2.0
"""Folders and zip archives of images."""
import functools
import os
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from dnnlib import UserError
from dnnlib.util import format_bytes, is_special
from training.data.labels import IMAGE_SUFFIXES, METADATA_NAME, fingerprints, is_image_name, parse_metadata
from training.data.wrapping import metadata_folder, put_in_folder
from training.data.zip_index import Signature, ZipIndex, load_index, make_index, open_index, read_member, read_metadata

MAX_FILE_BYTES = 512 << 20      # Encoded images that are larger are never read.
MAX_LINKS = 100                 # How often one folder may be reached by links.

#----------------------------------------------------------------------------

class ReadableStore(Protocol):
    """Files by index."""

    def size(self, index: int) -> int:
        """Bytes that `read` would return. Raises OSError."""

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError."""


class ContentStore(Protocol):
    """Files by index whose content is known by checksums, and what is said of them."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the files, sorted."""

    @property
    def metadata(self) -> dict[str, object]:
        """The content of dataset.json; {} if there is none."""

    def content_key(self, index: int) -> tuple[int, int]:
        """Size and CRC-32 of the content. Raises OSError."""


def printable(name: str) -> str:
    """A file name that every terminal and JSON reader takes: bytes that are no UTF-8 are written as \\xff."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_file(store: ReadableStore, index: int) -> bytes:
    """Content of a file, unless it is too large to be one image. Raises OSError, whose text is the reason."""
    size = store.size(index)
    if size > MAX_FILE_BYTES:
        raise OSError(f"{format_bytes(size)}, more than the {format_bytes(MAX_FILE_BYTES)} that one image may have")
    return store.read(index)

#----------------------------------------------------------------------------
# Where files lie. Both kinds can be pickled and used after a fork.

class FolderStore:
    """The images in a folder, whatever their depth, sorted by name. Links are followed, but never in a circle."""

    reads_in_order = False

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.other_files: list[str] = []        # Files that are no images, sorted likewise, without hidden ones.
        self.names = sorted(self._images())     # With forward slashes.
        self.other_files.sort()
        folder = metadata_folder(path, self.other_files, self.names)
        metadata = self.path / (folder or "") / METADATA_NAME
        content = parse_metadata(metadata, metadata.read_bytes()) if folder is not None else {}
        self.metadata = put_in_folder(content, folder or "")
        self.lists_labels = bool(self.metadata.get("labels"))
        self.labels: np.ndarray | None = None           # Not known before `training.data.labels.read_labels`.
        self.classes: list[str] | None = None
        self.fingerprints: tuple[str, str] | None = None

    def _images(self) -> Iterator[str]:
        for name in _walk(self.path):
            if is_image_name(name):
                yield name
            elif not _is_hidden(name):
                self.other_files.append(name)

    def where(self, index: int) -> str:
        """The file as error messages name it."""
        return printable(str(self.path / self.names[index]))

    def size(self, index: int) -> int:
        """Bytes of the file. Raises OSError."""
        return os.path.getsize(self.path / self.names[index])

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError."""
        return (self.path / self.names[index]).read_bytes()

    def content_key(self, index: int) -> tuple[int, int]:
        """Size and CRC-32 of the content."""
        data = self.read(index)
        return len(data), zlib.crc32(data)

    def close(self) -> None:
        """Nothing is held open."""


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or "/." in name or "__MACOSX" in name.split("/")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:         # A link to itself: who reads it, learns that.
        return False


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _walk(top: Path) -> Iterator[str]:
    """All files below a folder, by their names relative to it, with forward slashes.

    A folder that several links lead to is listed below each of them, since each may be a class. Not listed again is a
    folder that lies inside of itself.

    Raises:
        UserError: links lead to one folder so often that there would be no end of it, or a pipe or a device lies
            among the files.
        OSError: a folder cannot be read.
    """
    visits: dict[str, int] = {}

    def walk(folder: str, prefix: str, above: frozenset[str]) -> Iterator[str]:
        real = os.path.realpath(folder)
        if real in above:
            return
        visits[real] = visits.get(real, 0) + 1
        if visits[real] > MAX_LINKS:
            raise UserError(f"{folder}: links lead to this folder more than {MAX_LINKS} times: remove some")
        inside: list[str] = []
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    inside.append(entry.name)
                elif not _is_file(entry) and is_special(entry.path) and not entry.name.startswith("."):
                    raise UserError(f"{printable(entry.path)}: is a pipe, a socket or a device: move it out of the "
                                    "folder")
                else:
                    yield prefix + entry.name
        for name in inside:
            yield from walk(os.path.join(folder, name), f"{prefix}{name}/", above | {real})

    yield from walk(str(top), "", frozenset())


class ZipStore:
    """The images in a zip archive, sorted by name.

    The archive is listed once, for all processes (`training.data.zip_index`). Members are read by their offsets,
    through a descriptor that has no position: it may be used by several threads and after a fork.
    """

    reads_in_order = False

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._fd: int | None = None
        self._take(open_index(path))

    def _take(self, index: ZipIndex) -> None:
        self._index = index
        self.names, self.labels = index.names, index.labels
        self.fingerprints: tuple[str, str] | None = index.fingerprints
        self.lists_labels, self.classes = index.lists_labels, index.classes

    @functools.cached_property
    def metadata(self) -> dict[str, object]:
        """The object in dataset.json, which may be large: `labels` and `lists_labels` do without it."""
        member = self._index.metadata_member
        if member is None:
            return {}
        return read_metadata(self.path, self._descriptor(), member, self._index.metadata_folder)

    def where(self, index: int) -> str:
        """The file as error messages name it."""
        return f"{self.path}: {self.names[index]}"

    def size(self, index: int) -> int:
        """Bytes of the content."""
        return int(self._index.members[index]["size"])

    def read(self, index: int) -> bytes:
        """Content of the file.

        Raises:
            OSError: it is cut off or damaged.
            UserError: the archive is not the one that was opened any more.
        """
        fd = self._descriptor()
        try:
            return read_member(fd, self._index.members[index].tolist())
        except OSError:
            self._check_unchanged(os.fstat(fd))
            raise

    def content_key(self, index: int) -> tuple[int, int]:
        """Size and CRC-32 of the content, from the central directory."""
        member = self._index.members[index]
        return int(member["size"]), int(member["crc"])

    def _descriptor(self) -> int:
        """The archive, opened when it is needed."""
        if self._fd is None:
            fd = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
            try:
                self._check_unchanged(os.fstat(fd))
            except UserError:
                os.close(fd)
                raise
            self._fd = fd
        return self._fd

    def _check_unchanged(self, stat: os.stat_result) -> None:
        """Raises UserError if this is not the file that was listed."""
        was = self._index.signature
        if (stat.st_size, stat.st_mtime_ns) != (was.size, was.mtime_ns):
            raise UserError(f"{self.path}: changed while it was in use, from {was.size} to {stat.st_size} bytes, last "
                            f"at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(stat.st_mtime))}: start again, "
                            "and write new data under another name")

    def close(self) -> None:
        """Close the archive; it opens again when needed."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __getstate__(self) -> dict[str, object]:
        state = {**self.__dict__, "_fd": None}
        if self._index.file is not None:        # The other process maps the same file.
            for name in ("_index", "names", "labels", "metadata"):
                state.pop(name, None)
            state["signature"] = self._index.signature
            state["file"] = self._index.file
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        signature, file = state.pop("signature", None), state.pop("file", None)
        self.__dict__.update(state)
        if isinstance(file, Path) and isinstance(signature, Signature):
            self._take(load_index(file, signature) or make_index(self.path))
            if self._index.signature != signature:
                raise UserError(f"{self.path}: changed while it was in use: start again")

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()


def open_store(path: str | os.PathLike[str]) -> FolderStore | ZipStore:
    """Index a folder or a zip archive of images.

    Raises:
        UserError: nothing is there, it is neither kind, it cannot be read or it holds no images.
    """
    store: FolderStore | ZipStore
    try:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such folder or zip archive: check the path")
        if os.path.isdir(path):
            store = FolderStore(path)
            store.other_files.clear()           # There may be as many, and nobody asks.
        elif not _may_be_zip(path):
            raise UserError(f"{path}: not a whole zip archive, nor a folder: make a data set of it with "
                            f"dataset_tool.py --source={path}")
        else:
            store = ZipStore(path)
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror or err}): check the path and its permissions") from err
    if not store.names:
        raise UserError(f"{path}: no images in it: files must end in {', '.join(IMAGE_SUFFIXES)}; of data of another "
                        f"kind make a data set with dataset_tool.py --source={path}")
    return store


def _may_be_zip(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK" or zipfile.is_zipfile(file)


def content_fingerprint(store: ContentStore, indices: Sequence[int] | np.ndarray, xflip: bool) -> str:
    """SHA-256 of names, sizes and CRC-32 of files, of labels and of mirroring. 64 hex digits.

    Equal for an archive and a folder of the same files. A zip archive is not read for it, a folder is read whole, once.
    """
    keeper = store if isinstance(store, FolderStore | ZipStore) and len(indices) == len(store.names) else None
    if keeper is not None and keeper.fingerprints is not None:
        return keeper.fingerprints[xflip]
    both = fingerprints(((store.names[i], *store.content_key(i)) for i in indices), store.metadata)
    if keeper is not None:
        keeper.fingerprints = both
    return both[xflip]
