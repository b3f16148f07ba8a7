# SPDX-License-Identifier: Apache-2.0
"""Folders and zip archives of images, and decoding to RGB."""
import functools
import io
import os
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from dnnlib import UserError
from training.data.labels import IMAGE_SUFFIXES, METADATA_NAME, fingerprints, is_image_name, parse_metadata
from training.data.zip_index import ZipIndex, load_index, make_index, open_index, read_member, read_metadata

# What Pillow raises for damaged files, and what the readers below raise.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error, zlib.error,
                 PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning)

#----------------------------------------------------------------------------
# Where files lie. Both kinds can be pickled and used after a fork.

class FolderStore:
    """The images in a folder, whatever their depth, sorted by name."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.names = sorted(name for name in self._walk() if is_image_name(name))   # With forward slashes.
        metadata = self.path / METADATA_NAME
        self.metadata = parse_metadata(metadata, metadata.read_bytes()) if metadata.is_file() else {}
        self.lists_labels = bool(self.metadata.get("labels"))
        self.labels, self.classes = None, None          # Not known before `training.data.labels.read_labels`.
        self.fingerprints: tuple[str, str] | None = None

    def _walk(self) -> Iterator[str]:
        seen = set()                # Links to folders are followed, but never in a circle.
        for folder, folders, files in os.walk(self.path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            for file in files:
                yield os.path.relpath(os.path.join(folder, file), self.path).replace(os.sep, "/")

    def where(self, index: int) -> str:
        """The file as error messages name it."""
        return str(self.path / self.names[index])

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError."""
        return (self.path / self.names[index]).read_bytes()

    def content_key(self, index: int) -> tuple[int, int]:
        """Size and CRC-32 of the content."""
        data = self.read(index)
        return len(data), zlib.crc32(data)

    def close(self) -> None:
        """Nothing is held open."""


class ZipStore:
    """The images in a zip archive, sorted by name.

    The archive is listed once, for all processes (`training.data.zip_index`). Members are read by their offsets,
    through a descriptor that has no position: it may be used by several threads and after a fork.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._fd: int | None = None
        self._take(open_index(path))

    def _take(self, index: ZipIndex) -> None:
        self._index = index
        self.names, self.labels, self.fingerprints = index.names, index.labels, index.fingerprints
        self.lists_labels, self.classes = index.lists_labels, index.classes

    @functools.cached_property
    def metadata(self) -> dict[str, Any]:
        """The object in dataset.json, which may be large: `labels` and `lists_labels` do without it."""
        member = self._index.metadata_member
        return {} if member is None else read_metadata(self.path, self._descriptor(), member)

    def where(self, index: int) -> str:
        """The file as error messages name it."""
        return f"{self.path}: {self.names[index]}"

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

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_fd": None}
        if self._index.file is not None:        # The other process maps the same file.
            for name in ("_index", "names", "labels", "metadata"):
                state.pop(name, None)
            state["signature"] = self._index.signature
            state["file"] = self._index.file
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        signature, file = state.pop("signature", None), state.pop("file", None)
        self.__dict__.update(state)
        if file is not None:
            self._take(load_index(file, signature) or make_index(self.path))
            if self._index.signature != signature:
                raise UserError(f"{self.path}: changed while it was in use: start again")

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()


def open_store(path: str | os.PathLike) -> FolderStore | ZipStore:
    """Index a folder or a zip archive of images.

    Raises:
        UserError: nothing is there, it is neither kind, it cannot be read or it holds no images.
    """
    store: FolderStore | ZipStore
    try:
        if not os.path.exists(path):
            raise UserError(f"{path}: no such folder or zip archive: check the path")
        store = FolderStore(path) if os.path.isdir(path) else ZipStore(path)
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror or err}): check the path and its permissions") from err
    if not store.names:
        raise UserError(f"{path}: no images in it: files must end in {', '.join(IMAGE_SUFFIXES)}")
    return store


def content_fingerprint(store: FolderStore | ZipStore, indices: Sequence[int] | np.ndarray, xflip: bool) -> str:
    """SHA-256 of names, sizes and CRC-32 of files, of labels and of mirroring. 64 hex digits.

    Equal for an archive and a folder of the same files. A zip archive is not read for it, a folder is read whole, once.
    """
    everything = len(indices) == len(store.names)
    known = getattr(store, "fingerprints", None)
    if everything and known is not None:
        return known[xflip]
    both = fingerprints(((store.names[i], *store.content_key(i)) for i in indices), store.metadata)
    if everything:
        store.fingerprints = both
    return both[xflip]

#----------------------------------------------------------------------------
# Decoding.

def open_image(data: bytes) -> PIL.Image.Image:
    """A decoded image in whatever mode the file has. Raises one of DECODE_ERRORS."""
    if not data:
        raise OSError("the file is empty")
    try:
        image = PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError as err:
        raise OSError("not an image, or damaged") from err      # The original text only names a memory address.
    limit = PIL.Image.MAX_IMAGE_PIXELS      # Pillow itself only warns up to twice as many.
    if limit is not None and image.width * image.height > limit:
        raise OSError(f"{image.width}x{image.height} pixels, more than the {limit} that one image may have")
    image.load()
    return image


def to_rgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, list[str]]:
    """Any decoded image as upright RGB, and what was done to it, in words.

    Raises:
        ValueError: the values have no defined range (32-bit integers beyond 16 bits, floats).
    """
    notes = []
    if getattr(image, "n_frames", 1) > 1:
        notes.append("animated: first frame taken")
    orientation = image.getexif().get(0x0112, 1)
    if orientation != 1:
        image = PIL.ImageOps.exif_transpose(image)
        notes.append("turned upright by its EXIF orientation")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no defined range")
        image = PIL.Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
        notes.append("16 bits reduced to 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
        notes.append("transparency laid over white")
    elif image.mode != "RGB":
        notes.append(f"mode {image.mode} converted")
    return image.convert("RGB"), notes
