# SPDX-License-Identifier: Apache-2.0
"""Tar archives, read in place: an index of names, offsets and sizes, also of tars inside tars.

Headers are parsed here because the standard library keeps a kilobyte per member, which is more than a gigabyte for
ImageNet. Formats: ustar, GNU long names, pax (its path and size records). Images that are links, devices or sparse
files are refused: passed over, they would be missing.
"""
import bz2
import contextlib
import gzip
import lzma
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dnnlib import UserError
from dnnlib.util import format_bytes
from training.data.labels import clean_name, is_image_name

BLOCK = 512
MAX_NAME_BYTES = 65536
MAX_DEPTH = 2                       # A tar of tars, and no deeper.
MAX_EXPANSION = 200                 # Unpacked bytes per packed byte; images hardly shrink at all.
FREE_EXPANSION = 64 << 20           # Allowed in any case.
_COMPRESSED: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


class NoPlainFile(ValueError):
    """An image in a tar is a link or a device: the archive is whole, but not all in it."""


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str           # Clean: relative, forward slashes. Of a tar in a tar: 'n01440764/n01440764_10026.JPEG'.
    offset: int         # Where its content begins in the outermost file.
    size: int

#----------------------------------------------------------------------------
# Headers.

def _number(field: bytes) -> int:
    """A size: octal digits, or base 256 if the first bit is set. Raises ValueError."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _checked(header: bytes) -> bytes:
    """The header, if its checksum fits. Raises ValueError."""
    found = _number(header[148:156])
    if found != sum(header) - sum(header[148:156]) + 8 * 32:
        raise ValueError("a header's checksum is wrong")
    return header


def _pax_records(data: bytes) -> dict[str, str]:
    """The records 'length key=value\\n' of a pax header. Raises ValueError."""
    records = {}
    while data.strip(b"\0"):
        length = int(data.split(b" ", 1)[0])
        if not 4 < length <= len(data):
            raise ValueError("an extended header is damaged")
        key, _, value = data[:length - 1].split(b" ", 1)[1].partition(b"=")
        records[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


def _headers(file: BinaryIO, start: int, end: int) -> Iterator[tuple[str, str, int, int]]:
    """(name, type, offset, size) of every member between two positions. Raises ValueError if the tar is damaged."""
    position, long_name = start, None
    pax: dict[str, str] = {}
    while True:
        file.seek(position)
        header = file.read(min(BLOCK, end - position))
        if len(header) < BLOCK:
            raise ValueError("it ends before its end mark: it is cut off")
        if header == bytes(BLOCK):
            return
        kind = _checked(header)[156:157].decode("latin1")
        size = int(pax["size"]) if "size" in pax else _number(header[124:136])
        content = position + BLOCK
        position = content + -(-size // BLOCK) * BLOCK
        if size < 0 or content + size > end:
            raise ValueError("its last file is cut off")
        if kind in "LxgK":
            if size > MAX_NAME_BYTES and kind != "g":
                raise ValueError("a name is too long")
            data = file.read(min(size, MAX_NAME_BYTES))
            if kind == "L":
                long_name = _text(data)
            elif kind == "x":
                pax = _pax_records(data)
            continue
        prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
        if any(key.startswith("GNU.sparse.") for key in pax):
            kind = "S"
        name = pax.get("path") or long_name or (f"{prefix}/" if prefix else "") + _text(header[:100])
        long_name, pax = None, {}
        yield name, kind, content, size

#----------------------------------------------------------------------------
# Whole archives.

def is_tar_name(name: str) -> bool:
    """True for names of tar archives, packed or not."""
    return name.lower().endswith((".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz"))


def _stem(name: str) -> str:
    return name.rpartition("/")[2].split(".tar")[0]


def _walk(file: BinaryIO, start: int, end: int, prefix: str, depth: int) -> Iterator[Member]:
    for raw, kind, offset, size in _headers(file, start, end):
        if kind not in "0\0" + "7" or raw.endswith("/"):
            if kind != "5" and is_image_name(raw):
                raise NoPlainFile(f"{raw!a} is a link, a device or a sparse file: pack plain files only, with tar's "
                                  f"--dereference and --hard-dereference")
            continue
        if not raw.isascii() and any("\ud800" <= c <= "\udfff" for c in raw):
            raw = raw.encode("utf-8", "surrogateescape").decode("latin1")       # Neither UTF-8 nor ASCII.
        name = prefix + clean_name(raw)
        if name.lower().endswith(".tar") and depth < MAX_DEPTH:
            try:
                yield from _walk(file, offset, offset + size, f"{prefix}{_stem(name)}/", depth + 1)
            except ValueError as err:
                raise type(err)(f"{raw}: {err}") from err
        else:
            yield Member(name, offset, size)


def members(path: str | os.PathLike[str], file: BinaryIO) -> Iterator[Member]:
    """Every regular file of an open tar, in the order of the archive; the files of tars inside lie in a folder of
    that tar's name.

    Raises:
        UserError: the tar is damaged or cut off, or a name leads out of it.
    """
    try:
        yield from _walk(file, 0, file.seek(0, os.SEEK_END), "", 1)
    except NoPlainFile as err:
        raise UserError(f"{path}: {err}") from err
    except (ValueError, IndexError, OverflowError) as err:
        raise UserError(f"{path}: not a usable tar archive ({err}): copy or make it again") from err


@contextlib.contextmanager
def _unpacked(path: Path, opener: Callable[[Path], Any]) -> Iterator[BinaryIO]:
    """A packed tar, unpacked to a temporary file that has no name. Raises UserError."""
    limit = FREE_EXPANSION + MAX_EXPANSION * path.stat().st_size
    with tempfile.TemporaryFile(prefix="dataset_tool.") as whole:
        try:
            with opener(path) as packed:
                while chunk := packed.read(1 << 20):
                    whole.write(chunk)
                    if whole.tell() > limit:
                        raise UserError(f"{path}: unpacks to more than {format_bytes(limit)}, which no images do: "
                                        f"refused")
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, ValueError) as err:
            raise UserError(f"{path}: not a whole archive ({err}): copy it again") from err
        except OSError as err:
            if err.errno is not None:
                raise
            raise UserError(f"{path}: not a whole archive ({err}): copy it again") from err
        whole.flush()           # Reading goes past the buffer.
        yield whole


def first_bytes(path: str | os.PathLike[str], count: int = BLOCK) -> bytes:
    """The beginning of a file, unpacked if it is packed with gzip, bzip2 or xz. Raises OSError."""
    with open(path, "rb") as f:
        start = f.read(count)
    opener = _opener(start)
    if opener is None:
        return start
    try:
        with opener(Path(path)) as packed:
            return bytes(packed.read(count))
    except (EOFError, OSError, lzma.LZMAError, zlib.error, ValueError):
        return b""


def _opener(start: bytes) -> Callable[[Path], Any] | None:
    return next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)


def starts_like_a_tar(start: bytes) -> bool:
    """Whether these may be the first bytes of a tar archive."""
    try:
        return len(start) >= BLOCK and any(start[:100]) and _number(_checked(start[:BLOCK])[124:136]) >= 0
    except (ValueError, IndexError):
        return False


class OpenTar:
    """One tar archive, held open: plain ones in place, packed ones as an unpacked temporary file."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._stack = contextlib.ExitStack()
        with open(self.path, "rb") as f:
            opener = _opener(f.read(6))
        self.file = self._stack.enter_context(_unpacked(self.path, opener) if opener else open(self.path, "rb"))

    def members(self) -> Iterator[Member]:
        return members(self.path, self.file)

    def read(self, member: Member) -> bytes:
        """Content of a member. Raises OSError if the archive is shorter than it was."""
        if hasattr(os, "pread"):        # Without a position: processes that came by a fork share it.
            data = os.pread(self.file.fileno(), member.size, member.offset)
        else:
            self.file.seek(member.offset)
            data = self.file.read(member.size)
        if len(data) != member.size:
            raise OSError("the archive is shorter than it was")
        return data

    def close(self) -> None:
        self._stack.close()
