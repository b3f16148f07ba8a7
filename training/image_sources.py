# SPDX-License-Identifier: Apache-2.0
"""Folders and zip archives of images, their labels, and the conversion of images to square RGB."""
import dataclasses
import hashlib
import io
import json
import os
import posixpath
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

from dnnlib import UserError
from dnnlib.util import list_some

IMAGE_SUFFIXES = (".avif", ".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
METADATA_NAME = "dataset.json"
MAX_CLASSES = 1_000_000

# What Pillow raises for damaged files, and what the readers below raise.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, struct.error, zlib.error,
                 PIL.Image.DecompressionBombError)

#----------------------------------------------------------------------------
# Names.

def clean_name(name: str) -> str:
    """A file name inside a data set with forward slashes and without '.' parts.

    Raises:
        ValueError: the name is absolute or leads out of the data set.
    """
    clean = name.replace("\\", "/")
    if clean.startswith("/") or re.match(r"[A-Za-z]:", clean) or ".." in clean.split("/"):
        raise ValueError(f"the file name {name!r} leads out of the data set")
    return posixpath.normpath(clean)


def is_image_name(name: str) -> bool:
    """True for names that end like an image and are not hidden (as macOS leaves them in archives)."""
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
    return not hidden and name.lower().endswith(IMAGE_SUFFIXES)

#----------------------------------------------------------------------------
# Where files lie. Both kinds can be pickled and used after a fork.

class FolderStore:
    """The images in a folder, whatever their depth, sorted by name."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.names = sorted(name for name in self._walk() if is_image_name(name))   # With forward slashes.
        metadata = self.path / METADATA_NAME
        self.metadata = parse_metadata(metadata, metadata.read_bytes()) if metadata.is_file() else {}

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

    The central directory is read once, into one array: that is small for a million images, and data-loader
    workers read members by offset through a file handle of their own.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        self._file_pid: int | None = None
        members: dict[str, zipfile.ZipInfo] = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    self._add(members, info)
                if METADATA_NAME in members:
                    self.metadata = parse_metadata(f"{path}: {METADATA_NAME}", archive.read(members[METADATA_NAME]))
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as err:
            raise UserError(f"{path}: not a whole zip archive ({err}): copy or make it again") from err
        self.names = sorted(name for name in members if is_image_name(name))
        # Columns: offset of the local header, compressed size, size, CRC-32, compression method.
        self._entries = np.array([(i.header_offset, i.compress_size, i.file_size, i.CRC, i.compress_type)
                                  for i in (members[name] for name in self.names)], dtype=np.int64).reshape(-1, 5)

    def _add(self, members: dict[str, zipfile.ZipInfo], info: zipfile.ZipInfo) -> None:
        if info.is_dir():
            return
        try:
            name = clean_name(info.filename)
        except ValueError as err:
            raise UserError(f"{self.path}: {err}: make the archive again with relative names") from err
        if name in members:
            raise UserError(f"{self.path}: holds {name} twice: make the archive again")
        if is_image_name(name):
            if info.flag_bits & 1:
                raise UserError(f"{self.path}: {name} is encrypted: make the archive again without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"{self.path}: {name} is neither stored nor deflated (method {info.compress_type}): "
                                f"make the archive again, for example with dataset_tool.py")
        members[name] = info

    def where(self, index: int) -> str:
        """The file as error messages name it."""
        return f"{self.path}: {self.names[index]}"

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError when it is cut off or damaged."""
        offset, compressed, size, crc, method = self._entries[index].tolist()
        file = self._handle()
        file.seek(offset)
        header = file.read(30)      # Local header: its name and extra field may differ from the central directory's.
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise OSError("the archive is damaged here")
        file.seek(sum(struct.unpack("<HH", header[26:30])), os.SEEK_CUR)
        data = file.read(compressed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error as err:
                raise OSError("the archive is damaged here") from err
        if len(data) != size or zlib.crc32(data) != crc:
            raise OSError("the archive is damaged here: the content does not fit its checksum")
        return data

    def content_key(self, index: int) -> tuple[int, int]:
        """Size and CRC-32 of the content, from the central directory."""
        return int(self._entries[index, 2]), int(self._entries[index, 3])

    def _handle(self) -> BinaryIO:
        """The archive, opened by this very process: a handle that came through a fork shares its place in the file."""
        if self._file is None or self._file_pid != os.getpid():
            self._file = open(self.path, "rb")
            self._file_pid = os.getpid()
        return self._file

    def close(self) -> None:
        """Close the archive; it opens again when needed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_file_pid": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
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


def content_fingerprint(store: FolderStore | ZipStore, indices: Iterable[int], xflip: bool) -> str:
    """SHA-256 of names, sizes and CRC-32 of files, of labels and of mirroring. 64 hex digits.

    Equal for an archive and a folder of the same files. A zip archive is not read for it, a folder is read whole.
    """
    digest = hashlib.sha256()
    for index in indices:
        digest.update(repr((store.names[index], *store.content_key(index))).encode())
    described = {"labels": store.metadata.get("labels") or None, "classes": store.metadata.get("classes"),
                 "xflip": xflip}
    digest.update(json.dumps(described, sort_keys=True).encode())
    return digest.hexdigest()

#----------------------------------------------------------------------------
# Labels: dataset.json = {"labels": [["00000/img00000000.png", 6], ...], "classes": ["tench", ...]}.

def parse_metadata(where: str | os.PathLike, data: bytes) -> dict[str, Any]:
    """The object in a dataset.json. Raises UserError if it is no JSON object."""
    try:
        metadata = json.loads(data)
    except ValueError as err:
        raise UserError(f"{where}: not valid JSON ({err}): make it again") from err
    if not isinstance(metadata, dict):
        raise UserError(f'{where}: must be an object such as {{"labels": [["0.png", 6]]}}')
    return metadata


def label_table(store: FolderStore | ZipStore) -> dict[str, int] | None:
    """File name -> label as dataset.json lists them, or None when it lists none.

    Raises:
        UserError: an entry is not a pair of a name inside the data set and a class index, or contradicts another.
    """
    entries = store.metadata.get("labels")
    if not entries:
        return None
    where = f"{store.path}: {METADATA_NAME}"
    table: dict[str, int] = {}
    if not isinstance(entries, list):
        raise UserError(f'{where}: "labels" must be a list such as [["0.png", 6], ...]')
    for entry in entries:
        if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f'{where}: the entry {entry!r} in "labels" must look like ["00000/img00000000.png", 6]')
        name, label = entry
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise UserError(f"{where}: the label {label!r} of {name} must be a whole number from 0 "
                            f"to {MAX_CLASSES - 1}, the index of a class")
        try:
            clean = clean_name(name)
        except ValueError as err:
            raise UserError(f"{where}: {err}: name files relative to the data set") from err
        if table.setdefault(clean, label) != label:
            raise UserError(f"{where}: {clean} has two labels, {table[clean]} and {label}: keep one")
    return table


def class_list(store: FolderStore | ZipStore) -> list[str] | None:
    """Class names that dataset.json lists, or None. Raises UserError if it is no list of different names."""
    classes = store.metadata.get("classes")
    if classes is None:
        return None
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise UserError(f'{store.path}: {METADATA_NAME}: "classes" must be a list of names')
    if len(set(classes)) != len(classes):
        raise UserError(f'{store.path}: {METADATA_NAME}: "classes" lists a name twice: names must differ')
    return classes


def labels_of(store: FolderStore | ZipStore, table: dict[str, int]) -> np.ndarray:
    """Label of every image, int64 [len(store.names)].

    Raises:
        UserError: some images have no label, or a label has no name in "classes".
    """
    missing = [name for name in store.names if name not in table]
    if missing:
        raise UserError(f"{store.path}: {METADATA_NAME} gives no label for {len(missing)} of {len(store.names)} "
                        f"images: {list_some(missing)}: add them to \"labels\" or take the files away")
    labels = np.array([table[name] for name in store.names], dtype=np.int64)
    classes = class_list(store)
    if classes is not None and labels.max() >= len(classes):
        name = store.names[int(labels.argmax())]
        raise UserError(f'{store.path}: {METADATA_NAME}: the label {labels.max()} of {name} has no name: '
                        f'"classes" lists {len(classes)}')
    return labels

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

#----------------------------------------------------------------------------
# Conversion of one image.

@dataclasses.dataclass(frozen=True)
class Fit:
    """What is done to every image."""

    resolution: int | None          # None keeps the size.
    center_crop: bool
    drop_grayscale: bool


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A converted image, or the reason why there is none."""

    png: bytes | None = None
    size: tuple[int, int] = (0, 0)
    reason: str = ""
    notes: tuple[str, ...] = ()
    dropped: bool = False           # A grayscale file of ImageNet: not a fault.


def encode_png(image: PIL.Image.Image) -> bytes:
    """PNG without compression, as in the official data sets: it loads fastest."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def convert(fit: Fit, where: str, data: bytes | str) -> Outcome:
    """The content of a file (or the reason why it could not be read) as an RGB image of the wanted size.

    Raises:
        UserError: the image is not square and is not to be cropped.
    """
    if isinstance(data, str):
        return Outcome(reason=data)
    try:
        image = open_image(data)
        if fit.drop_grayscale and image.mode in ("1", "L"):
            return Outcome(dropped=True)
        image, notes = to_rgb(image)
    except DECODE_ERRORS as err:
        return Outcome(reason=str(err) or type(err).__name__)
    width, height = image.size
    if fit.center_crop:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    elif width != height:
        raise UserError(f"{where}: {width}x{height} pixels, but images must be square: "
                        f"add --transform=center-crop and --resolution=N")
    if fit.resolution is not None and image.size[0] != fit.resolution:
        if image.size[0] < fit.resolution:
            notes.append("enlarged")
        image = image.resize((fit.resolution, fit.resolution), PIL.Image.Resampling.LANCZOS)
    return Outcome(encode_png(image), image.size, notes=tuple(notes))
