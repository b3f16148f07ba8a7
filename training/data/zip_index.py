# SPDX-License-Identifier: Apache-2.0
"""What a data set needs to know of a zip archive, made once and kept as a memory-mapped file beside it.

Opening an archive of a million images then takes a fraction of a second, and all processes on a machine share one copy
of the list. The file is made anew when the archive has another size, time or end, or when the file is damaged.

File: MAGIC, bytes of the header and CRC-32 of what follows as little-endian 64-bit integers, header (JSON), padding to
a multiple of 64, arrays.
"""
import collections
import contextlib
import dataclasses
import hashlib
import json
import operator
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import BinaryIO, SupportsIndex, overload

import numpy as np

from dnnlib import UserError
from dnnlib.download import cache_dir
from dnnlib.util import atomic_file, parse_json, read_at
from training.data.labels import (
    METADATA_NAME,
    PLAIN_NAME,
    class_list,
    clean_name,
    fingerprints,
    is_image_name,
    label_table,
    labels_of,
    parse_metadata,
)
from training.data.wrapping import metadata_folder, put_in_folder
from training.data.zip_directory import ENCRYPTED, Directory, read_directory, read_tail

MAGIC = b"SSXL-ZIP"
VERSION = 2                     # Goes up when the form of the file or what is in it changes.
MIN_ENTRIES = 10_000            # Fewer are listed in no time: no file is made.
MAX_MEMBER = 2 * 10 ** 9        # Bytes of one file: what an archive claims beyond that is not believed.
LOCAL_HEADER, LOCAL_BYTES = b"PK\x03\x04", 30
READ_AHEAD = 256                # Name and extra field in front of a file's content are rarely longer.
REPACK = "unpack the archive and name the folder, or pack that again without compression (zip -0 -r)"

# A member of the archive: place of its local header, bytes in the archive, bytes of the content, CRC-32, method.
MEMBER_FIELDS = [("offset", "<i8"), ("compressed", "<i8"), ("size", "<i8"), ("crc", "<u4"), ("method", "<u4")]
MEMBER_TYPE = np.dtype(MEMBER_FIELDS)

#----------------------------------------------------------------------------

class Names(Sequence[str]):
    """Strings in one block of bytes, which may be memory-mapped."""

    def __init__(self, block: np.ndarray, ends: np.ndarray):
        self.block = block      # UTF-8 without separators, uint8.
        self.ends = ends        # Where each string ends in it, int64.

    @classmethod
    def of(cls, names: list[str]) -> "Names":
        """The names, packed into one block."""
        encoded = [name.encode() for name in names]
        block = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        return cls(block, np.cumsum([len(name) for name in encoded], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        k = operator.index(index)
        if not -len(self) <= k < len(self):
            raise IndexError(f"name {k} of {len(self)}")
        k %= len(self)
        start = int(self.ends[k - 1]) if k else 0
        return self.block[start:int(self.ends[k])].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        block, start = self.block.tobytes(), 0
        for end in self.ends.tolist():
            yield block[start:end].decode()
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclasses.dataclass(frozen=True)
class Signature:
    """By which a changed archive is known."""

    size: int
    mtime_ns: int
    tail: str           # SHA-256 of its last 64 KiB, in which the directory ends.

    @classmethod
    def of(cls, file: BinaryIO) -> "Signature":
        """The signature of an open archive."""
        stat = os.fstat(file.fileno())
        return cls(stat.st_size, stat.st_mtime_ns, hashlib.sha256(read_tail(file)[1]).hexdigest())


@dataclasses.dataclass(frozen=True)
class ZipIndex:
    """The images in an archive, sorted by name, and what its dataset.json says."""

    signature: Signature
    names: Names
    members: np.ndarray                         # MEMBER_TYPE [images].
    metadata_member: tuple[int, ...] | None     # dataset.json,
    metadata_folder: str                        # and the folder around all images in which it lies; '' if at the top.
    lists_labels: bool                          # Whether it lists labels, right or wrong.
    labels: np.ndarray | None                   # int32 [images], if they are right,
    classes: list[str] | None                   # and the names of their classes, if there are any.
    fingerprints: tuple[str, str]               # Two hashes of all images: as they are, and mirrored.
    file: Path | None = None                    # Where this is kept; None: nowhere.


def read_member(fd: int, member: Sequence[int]) -> bytes:
    """Content of a member through an open descriptor, whose position does not matter: processes may share it.

    Raises:
        OSError: the archive is cut off or damaged here.
    """
    offset, compressed, size, crc, method = member
    if max(size, compressed) > MAX_MEMBER:
        raise OSError(f"it is of {max(size, compressed)} bytes, at most {MAX_MEMBER} are read")
    data = read_at(fd, compressed + READ_AHEAD, offset)
    if len(data) < LOCAL_BYTES or data[:4] != LOCAL_HEADER:
        raise OSError("the archive is damaged here")
    start = LOCAL_BYTES + sum(struct.unpack_from("<HH", data, 26))     # May differ from the central directory's.
    if len(data) < start + compressed:
        data, start = read_at(fd, compressed, offset + start), 0
    content: bytes | memoryview = memoryview(data)[start:start + compressed]
    if method == zipfile.ZIP_DEFLATED:
        try:
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except zlib.error as err:
            raise OSError("the archive is damaged here") from err
    if len(content) != size or zlib.crc32(content) != crc:
        raise OSError("the archive is damaged here: the content does not fit its checksum")
    return bytes(content)

#----------------------------------------------------------------------------
# Making.

def make_index(path: str | os.PathLike[str]) -> ZipIndex:
    """Read the directory and the dataset.json of an archive.

    Raises:
        UserError: not a whole archive; names twice or leading out; encrypted or oddly compressed images; dataset.json
            is no JSON object.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        signature = Signature.of(file)
        try:
            directory = read_directory(file)
        except zipfile.BadZipFile as err:
            raise UserError(f"{path}: not a whole zip archive ({err}): copy or make it again") from err
        images, names, metadata_at, folder = _choose(path, directory)
        metadata: dict[str, object] = {}
        metadata_member: tuple[int, ...] | None = None
        if metadata_at is not None:
            metadata_member = tuple(_members(directory, [metadata_at])[0].tolist())
            metadata = read_metadata(path, file.fileno(), metadata_member, folder)
    members = _members(directory, images)
    files = zip(names, members["size"].tolist(), members["crc"].tolist(), strict=True)
    return ZipIndex(signature, Names.of(names), members, metadata_member, folder, bool(metadata.get("labels")),
                    *_right_labels(path, names, metadata), fingerprints(files, metadata))


def read_metadata(path: str | os.PathLike[str], fd: int, member: Sequence[int], folder: str = "") -> dict[str, object]:
    """dataset.json of an archive, which lies in `folder` there. Raises UserError."""
    where = f"{path}: {METADATA_NAME}"
    if member[4] not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{where} is neither stored nor deflated (method {member[4]}): {REPACK}")
    try:
        data = read_member(fd, member)
    except OSError as err:
        raise UserError(f"{path}: not a whole zip archive ({METADATA_NAME}: {err}): copy or make it again") from err
    return put_in_folder(parse_metadata(where, data), folder)


def _members(directory: Directory, indices: Sequence[int]) -> np.ndarray:
    members = np.empty(len(indices), dtype=MEMBER_TYPE)
    for name, _ in MEMBER_FIELDS:
        members[name] = getattr(directory, name)[indices]
    return members


def _choose(path: str | os.PathLike[str], directory: Directory) -> tuple[list[int], list[str], int | None, str]:
    """Images as indices into the directory, sorted by name; their clean names; index of dataset.json; its folder."""
    clean: list[str] = []
    places: list[int] = []
    for i, raw in enumerate(directory.names):
        name = raw if PLAIN_NAME(raw) else _clean(path, raw)
        if name is not None:
            clean.append(name)
            places.append(i)
    if len(set(clean)) != len(clean):
        twice = next(name for name, count in collections.Counter(clean).items() if count > 1)
        raise UserError(f"{path}: holds {twice} twice: make the archive again")
    keep = [k for k, name in enumerate(clean) if is_image_name(name)]
    if not all(map(operator.lt, (clean[k] for k in keep), islice((clean[k] for k in keep), 1, None))):
        keep.sort(key=clean.__getitem__)
    images, names = [places[k] for k in keep], [clean[k] for k in keep]
    _check_methods(path, directory, images, names)
    folder = metadata_folder(path, [name for name in clean if name.endswith(METADATA_NAME)], names)
    metadata_at = None if folder is None else places[clean.index(folder + METADATA_NAME)]
    return images, names, metadata_at, folder or ""


def _clean(path: str | os.PathLike[str], raw: str) -> str | None:
    """A clean name; None for a folder."""
    raw = raw.partition("\0")[0]
    if raw.endswith("/") or not raw:
        return None
    try:
        return clean_name(raw)
    except ValueError as err:
        raise UserError(f"{path}: {err}: make the archive again with relative names") from err


def _check_methods(path: str | os.PathLike[str], directory: Directory, images: list[int], names: list[str]) -> None:
    """Images must be readable by `read_member`."""
    encrypted = directory.flags[images] & ENCRYPTED != 0
    if encrypted.any():
        raise UserError(f"{path}: {names[int(encrypted.argmax())]} is encrypted: make the archive again without a "
                        "password")
    methods = directory.method[images]
    odd = (methods != zipfile.ZIP_STORED) & (methods != zipfile.ZIP_DEFLATED)
    if odd.any():
        k = int(odd.argmax())
        raise UserError(f"{path}: {names[k]} is neither stored nor deflated (method {methods[k]}): {REPACK}")


@dataclasses.dataclass
class _Listed:
    """What the functions of `training.data.labels` ask for."""

    path: str | os.PathLike[str]
    names: Sequence[str]
    metadata: dict[str, object]
    labels: np.ndarray | None = None
    classes: list[str] | None = None


def _right_labels(path: str | os.PathLike[str], names: list[str],
                  metadata: dict[str, object]) -> tuple[np.ndarray | None, list[str] | None]:
    """int32 [images], class names; None if there are none or if they are wrong: an error only for who uses them."""
    store = _Listed(path, names, metadata)
    try:
        table = label_table(store) if names else None
        if table is not None:
            return labels_of(store, table).astype(np.int32), class_list(store)
    except UserError:
        pass
    return None, None

#----------------------------------------------------------------------------
# Keeping.

def index_files(path: str | os.PathLike[str]) -> list[Path]:
    """Where the index of an archive is looked for: beside it, or in the cache for folders that cannot be written."""
    path = Path(path)
    key = hashlib.sha256(os.fsencode(os.path.realpath(path))).hexdigest()[:16]
    return [path.with_name(f"{path.name}.index"), cache_dir() / "indices" / f"{path.name}-{key}.index"]


def open_index(path: str | os.PathLike[str]) -> ZipIndex:
    """The index of an archive: from its file, or made now, and kept if the archive is large. Raises as `make_index`."""
    with open(path, "rb") as file:
        signature = Signature.of(file)
    for place in index_files(path):
        kept = load_index(place, signature)
        if kept is not None:
            return kept
    index = make_index(path)
    if len(index.names) < MIN_ENTRIES:
        return index
    for place in index_files(path):
        with contextlib.suppress(OSError):      # Not writable, or the disk is full.
            save_index(place, index)
            return load_index(place, index.signature) or index
    return index


def prepare_index(path: str | os.PathLike[str]) -> None:
    """Have the index of a new archive made by one process, before many open it. What is wrong, `open_index` tells."""
    with contextlib.suppress(UserError, OSError):
        if os.path.isfile(path):
            open_index(path)


def save_index(place: Path, index: ZipIndex) -> None:
    """Write the file. Raises OSError."""
    names = index.names
    arrays = {"name_bytes": names.block, "name_ends": names.ends, "members": index.members}
    if index.labels is not None:
        arrays["labels"] = index.labels
    blocks, table, at = [], {}, 0
    for name, array in arrays.items():
        table[name] = [at, len(array)]
        blocks.append(array.tobytes())
        blocks.append(bytes(-len(blocks[-1]) % 64))
        at += len(blocks[-2]) + len(blocks[-1])
    header = json.dumps({
        "version": VERSION, "signature": dataclasses.asdict(index.signature), "arrays": table, "bytes": at,
        "metadata_member": index.metadata_member, "metadata_folder": index.metadata_folder,
        "lists_labels": index.lists_labels,
        "classes": index.classes, "fingerprints": index.fingerprints}).encode()
    header += b" " * (-(len(MAGIC) + 16 + len(header)) % 64)
    crc = zlib.crc32(header)
    for block in blocks:
        crc = zlib.crc32(block, crc)
    with atomic_file(place) as file:
        file.write(MAGIC + struct.pack("<QQ", len(header), crc) + header)
        file.writelines(blocks)


ARRAY_TYPES: dict[str, np.dtype] = {"name_bytes": np.dtype("u1"), "name_ends": np.dtype("<i8"), "members": MEMBER_TYPE,
               "labels": np.dtype("<i4")}


def load_index(place: Path, signature: Signature) -> ZipIndex | None:
    """The index in a file, memory-mapped; None if there is none, or not of this archive, or damaged."""
    try:
        data = np.memmap(place, dtype=np.uint8, mode="r")
        head = len(MAGIC) + 16
        if len(data) < head or data[:len(MAGIC)].tobytes() != MAGIC:
            return None
        header_bytes, crc = struct.unpack_from("<QQ", data[:head].tobytes(), len(MAGIC))
        header = parse_json(data[head:head + header_bytes].tobytes())
        if header["version"] != VERSION or header["signature"] != dataclasses.asdict(signature):
            return None
        if zlib.crc32(data[head:].data) != crc:
            return None
        arrays = {}
        for name, (at, count) in header["arrays"].items():
            kind = ARRAY_TYPES[name]
            start = head + header_bytes + at
            arrays[name] = np.frombuffer(data, dtype=kind, count=count, offset=start)
        member = header["metadata_member"]
        return ZipIndex(signature, Names(arrays["name_bytes"], arrays["name_ends"]), arrays["members"],
                        None if member is None else tuple(member), header["metadata_folder"], header["lists_labels"],
                        arrays.get("labels"), header["classes"], tuple(header["fingerprints"]), place)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None
