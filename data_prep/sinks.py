# SPDX-License-Identifier: Apache-2.0
"""Where converted images go: a zip archive or a folder, built under a hidden name that a later run can continue.

An archive under construction is the row of its members; the list of them, which a zip file has at its end, is written
last. So it can be cut back to any member and go on from there. Members are stored, not compressed, and carry one fixed
date, so equal images make equal archives.
"""
import array
import contextlib
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from dnnlib import UserError

MSDOS_DATE = (1 << 5) | 1               # 1980-01-01, the first that the format knows.
MODE = 0o100644 << 16
LIMIT_32, LIMIT_16 = 0xFFFFFFFF, 0xFFFF


def image_name(number: int) -> str:
    """Name of the image at this place, as in the official data sets."""
    return f"{number // 1000:05d}/img{number:08d}.png"


def is_archive(dest: Path) -> bool:
    return dest.suffix.lower() == ".zip"


def partial_path(dest: Path) -> Path:
    """Where a data set is built before it gets its name."""
    return dest.with_name(f".{dest.name}.partial")


class Sink(Protocol):
    """A data set under construction. Images are numbered by the order in which they come."""

    def write(self, data: bytes) -> None:
        """Append an image. Raises OSError."""

    def sync(self) -> int:
        """Bring what is written to the disk; returns a mark to continue from. Raises OSError."""

    def seal(self, extra: dict[str, bytes]) -> None:
        """Add other files and complete the data set, still under its hidden name. Raises OSError."""

    def close(self) -> None:
        """Let go of the file, whatever its state."""

#----------------------------------------------------------------------------

class ZipSink:
    """A zip archive."""

    def __init__(self, dest: Path, sizes: "array.array[int]", crcs: "array.array[int]", mark: int | None = None):
        """Args:
            dest: The final name.
            sizes: Of the images written so far; images to come are added.
            crcs: Likewise, their CRC-32.
            mark: Where to continue, as `sync` returned it; None starts anew.

        Raises:
            UserError: the file is shorter than the mark.
        """
        self.sizes, self.crcs = sizes, crcs
        self._extra: list[tuple[str, int, int]] = []
        partial = partial_path(dest)
        self._file = open(partial, "w+b" if mark is None else "r+b")
        if self._file.seek(0, os.SEEK_END) < (mark or 0):
            self._file.close()
            raise UserError(f"{partial}: shorter than its journal says, so it cannot be continued: add --restart")
        self._file.truncate(mark or 0)
        self._file.seek(mark or 0)

    def write(self, data: bytes) -> None:
        crc = zlib.crc32(data)
        self._member(image_name(len(self.sizes)), data, crc)
        self.sizes.append(len(data))
        self.crcs.append(crc)

    def _member(self, name: str, data: bytes, crc: int) -> None:
        if len(data) >= LIMIT_32:
            raise OSError(f"{name}: a member of 4 GiB or more")
        self._file.write(_local_header(name, len(data), crc))
        self._file.write(data)

    def sync(self) -> int:
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def seal(self, extra: dict[str, bytes]) -> None:
        for name, data in extra.items():
            crc = zlib.crc32(data)
            self._member(name, data, crc)
            self._extra.append((name, len(data), crc))
        start = self._file.tell()
        for entry in self._directory():
            self._file.write(entry)
        self._file.write(_end(len(self.sizes) + len(self._extra), start, self._file.tell() - start))
        self.sync()

    def _directory(self) -> Iterator[bytes]:
        """The entries of the list of members."""
        offset = 0
        images = ((image_name(i), self.sizes[i], self.crcs[i]) for i in range(len(self.sizes)))
        for members in (images, self._extra):
            for name, size, crc in members:
                yield _directory_entry(name, size, crc, offset)
                offset += 30 + len(name) + size

    def close(self) -> None:
        with contextlib.suppress(OSError):      # What cannot be flushed is written again when the run goes on.
            self._file.close()


def _local_header(name: str, size: int, crc: int) -> bytes:
    return struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 0, 0, MSDOS_DATE, crc, size, size, len(name), 0) + name.encode()


def _directory_entry(name: str, size: int, crc: int, offset: int) -> bytes:
    extra = struct.pack("<HHQ", 1, 8, offset) if offset >= LIMIT_32 else b""        # Zip64.
    version = 45 if extra else 20
    head = struct.pack("<4s6H3I5H2I", b"PK\1\2", 3 << 8 | version, version, 0, 0, 0, MSDOS_DATE, crc, size, size,
                       len(name), len(extra), 0, 0, 0, MODE, min(offset, LIMIT_32))
    return head + name.encode() + extra


def _end(count: int, start: int, size: int) -> bytes:
    """What ends an archive: number, place and size of the list of members; with 64 bits if they need it."""
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(count, LIMIT_16), min(count, LIMIT_16), min(size, LIMIT_32),
                      min(start, LIMIT_32), 0)
    if count < LIMIT_16 and size < LIMIT_32 and start < LIMIT_32:
        return end
    wide = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 3 << 8 | 45, 45, 0, 0, count, count, size, start)
    return wide + struct.pack("<4sIQI", b"PK\6\7", 0, start + size, 1) + end

#----------------------------------------------------------------------------

class FolderSink:
    """A folder of files."""

    def __init__(self, dest: Path, sizes: "array.array[int]", crcs: "array.array[int]"):
        """Continue after the images in `sizes`; images to come are added to it and to `crcs`."""
        self.sizes, self.crcs, self.partial = sizes, crcs, partial_path(dest)
        self.partial.mkdir(exist_ok=True)

    def write(self, data: bytes) -> None:
        path = self.partial / image_name(len(self.sizes))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        self.sizes.append(len(data))
        self.crcs.append(zlib.crc32(data))

    def sync(self) -> int:
        """The number of files. Each file is complete in the operating system's hands; no more is promised."""
        return len(self.sizes)

    def seal(self, extra: dict[str, bytes]) -> None:
        # A run that was broken off may have left files behind its last mark; they have been written over since,
        # unless this run stops earlier.
        number = len(self.sizes)
        while (path := self.partial / image_name(number)).exists():
            path.unlink()
            number += 1
        for name, data in extra.items():
            (self.partial / name).write_bytes(data)

    def close(self) -> None:
        """Nothing is held open."""


def open_sink(dest: Path, sizes: "array.array[int]", crcs: "array.array[int]",
              mark: int | None = None) -> ZipSink | FolderSink:
    """A sink for an archive or a folder, by its name; see ZipSink. Raises OSError, UserError."""
    return ZipSink(dest, sizes, crcs, mark) if is_archive(dest) else FolderSink(dest, sizes, crcs)


def publish(dest: Path) -> None:
    """Give a sealed data set its name, in the place of an old one. Raises OSError."""
    partial = partial_path(dest)
    if is_archive(dest):
        os.replace(partial, dest)
        return
    old = dest.with_name(f".{dest.name}.old")
    if dest.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(dest, old)
    os.rename(partial, dest)
    shutil.rmtree(old, ignore_errors=True)


def discard(dest: Path) -> None:
    """Remove a data set under construction."""
    partial = partial_path(dest)
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)
