# SPDX-License-Identifier: Apache-2.0
"""The central directory of a zip archive as arrays: a million entries in a second or two.

Layout: PKWARE's APPNOTE.TXT 6.3.10, sections 4.3.12 (central directory), 4.3.14 to 4.3.16 (its end), 4.5.3 (ZIP64).
"""
import dataclasses
import os
import struct
import zipfile
from typing import BinaryIO

import numpy as np

END, END64, LOCATOR64, RECORD = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07", b"PK\x01\x02"
END_BYTES, END64_BYTES, LOCATOR64_BYTES, RECORD_BYTES = 22, 56, 20, 46
MAX_COMMENT = 65535
TAIL_BYTES = END_BYTES + MAX_COMMENT + LOCATOR64_BYTES + END64_BYTES    # All that can follow the directory.
ALL_ONES = 0xFFFFFFFF           # The value is in the ZIP64 extra field.
ENCRYPTED, UTF8 = 0x1, 0x800    # Bits of `flags`.

RECORD_TYPE = np.dtype([        # 4.3.12, packed.
    ("signature", "S4"), ("made_by", "<u2"), ("needed", "<u2"), ("flags", "<u2"), ("method", "<u2"), ("time", "<u4"),
    ("crc", "<u4"), ("compressed", "<u4"), ("size", "<u4"), ("name_bytes", "<u2"), ("extra_bytes", "<u2"),
    ("comment_bytes", "<u2"), ("disk", "<u2"), ("internal", "<u2"), ("external", "<u4"), ("offset", "<u4")])


@dataclasses.dataclass(frozen=True)
class Directory:
    """All entries of an archive, folders included, in the order of the archive."""

    names: list[str]        # As they are written.
    offset: np.ndarray      # Where the local header begins; int64, as the next two.
    compressed: np.ndarray  # Bytes in the archive.
    size: np.ndarray        # Bytes of the content.
    crc: np.ndarray         # CRC-32 of the content, uint32.
    method: np.ndarray      # zipfile.ZIP_STORED and so on, uint16.
    flags: np.ndarray       # ENCRYPTED, UTF8, uint16.


def read_directory(file: BinaryIO) -> Directory:
    """Read the central directory of an archive that is open for reading.

    Raises:
        zipfile.BadZipFile: it is damaged, cut off, or its parts contradict each other.
        OSError: it cannot be read.
    """
    start, size, count, shift = find_directory(file)
    file.seek(start)
    data = file.read(size)
    if len(data) != size:
        raise zipfile.BadZipFile("its directory is cut off")
    array = np.frombuffer(data, dtype=np.uint8)
    at = record_starts(array)
    if len(at) != count:
        raise zipfile.BadZipFile(f"its end speaks of {count} files, its directory of {len(at)}")
    records = _gather(array, at, RECORD_BYTES).view(RECORD_TYPE)[:, 0]
    sizes = _resolve_zip64(data, array, at, records)
    sizes["offset"] += shift
    beyond = ((sizes["offset"] < 0) | (sizes["compressed"] < 0) | (sizes["size"] < 0)
              | (sizes["offset"] > start) | (sizes["compressed"] > start - sizes["offset"]))
    names = _names(data, at, records)
    if beyond.any():
        raise zipfile.BadZipFile(f"{names[int(beyond.argmax())]} lies outside of it")
    return Directory(names, **sizes, crc=records["crc"].copy(), method=records["method"].copy(),
                     flags=records["flags"].copy())

#----------------------------------------------------------------------------

def read_tail(file: BinaryIO) -> tuple[int, bytes]:
    """Size of the file, and its last bytes, in which the directory ends."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - TAIL_BYTES, 0))
    return size, file.read(TAIL_BYTES)


def find_directory(file: BinaryIO) -> tuple[int, int, int, int]:
    """Where the directory begins, its bytes, its entries, and how far offsets in it have to be shifted.

    They have to be if something stands before the archive in its file, such as a program that unpacks it.
    """
    file_size, tail = read_tail(file)
    at = tail.rfind(END, 0, max(len(tail) - END_BYTES + len(END), 0))
    if at < 0:
        raise zipfile.BadZipFile("it has no end of a directory")
    _, disk, first_disk, here, count, size, offset, _ = struct.unpack_from("<4s4H2LH", tail, at)
    end = file_size - len(tail) + at
    locator = at - LOCATOR64_BYTES
    if locator >= END64_BYTES and tail[locator:locator + 4] == LOCATOR64:
        record = locator - END64_BYTES
        if tail[record:record + 4] != END64:
            raise zipfile.BadZipFile("its ZIP64 end is damaged")
        disk, first_disk, here, count, size, offset = struct.unpack_from("<2L4Q", tail, record + 16)
        end = file_size - len(tail) + record
    if disk != 0 or first_disk != 0 or here != count:
        raise zipfile.BadZipFile("it is one of several parts")
    start = end - size
    if start < 0 or start < offset:
        raise zipfile.BadZipFile("its directory is cut off")
    return start, size, count, start - offset


def record_starts(array: np.ndarray) -> np.ndarray:
    """Positions of the records in the bytes of a directory, int64 [entries].

    A record's length is written in it, so each leads to the next. It is quicker to look for all signatures at once, and
    to see that they form one chain.
    """
    at = np.flatnonzero(array[:max(len(array) - RECORD_BYTES + 1, 0)] == RECORD[0])
    for k in range(1, len(RECORD)):
        at = at[array[at + k] == RECORD[k]]
    if len(array) == 0:
        return at
    if len(at):
        ends = at + _record_bytes(_gather(array, at, RECORD_BYTES).view(RECORD_TYPE)[:, 0])
        if at[0] == 0 and ends[-1] == len(array) and np.array_equal(ends[:-1], at[1:]):
            return at
    return _walk(array.tobytes())       # A name or a comment contains the signature, or something is wrong.


def _record_bytes(records: np.ndarray) -> np.ndarray:
    lengths: np.ndarray = records["name_bytes"].astype(np.int64) + records["extra_bytes"] + records["comment_bytes"]
    return lengths + RECORD_BYTES


def _walk(data: bytes) -> np.ndarray:
    """`record_starts`, one by one."""
    starts: list[int] = []
    at = 0
    while at < len(data):
        if data[at:at + 4] != RECORD or at + RECORD_BYTES > len(data):
            raise zipfile.BadZipFile(f"its directory is damaged after {len(starts)} files")
        starts.append(at)
        at += RECORD_BYTES + sum(struct.unpack_from("<3H", data, at + 28))
    if at != len(data):
        raise zipfile.BadZipFile("its directory is cut off")
    return np.array(starts, dtype=np.int64)


def _gather(array: np.ndarray, at: np.ndarray, count: int) -> np.ndarray:
    """`count` bytes from each position, [len(at), count]."""
    if not len(at):
        return np.empty((0, count), dtype=np.uint8)
    rows: np.ndarray = np.lib.stride_tricks.sliding_window_view(array, count)[at]
    return rows

#----------------------------------------------------------------------------

def _resolve_zip64(data: bytes, array: np.ndarray, at: np.ndarray, records: np.ndarray) -> dict[str, np.ndarray]:
    """size, compressed and offset as int64 [entries], from the ZIP64 extra fields where they have overflown."""
    values = {name: records[name].astype(np.int64) for name in ("size", "compressed", "offset")}    # In their order.
    missing = {name: value == ALL_ONES for name, value in values.items()}
    count = sum(m.astype(np.int64) for m in missing.values())
    rows = np.flatnonzero(count)
    if not len(rows):
        return values
    extra = at[rows] + RECORD_BYTES + records["name_bytes"][rows]
    # Nearly always the field is the first one.
    room = records["extra_bytes"][rows].astype(np.int64) >= 4 + 8 * count[rows]
    head = np.zeros((len(rows), 2), dtype="<u2")
    head[room] = _gather(array, extra[room], 4).view("<u2")
    first = room & (head[:, 0] == 1) & (head[:, 1] >= 8 * count[rows])
    field = extra + 4
    for k in np.flatnonzero(~first):
        field[k] = _find_zip64(data, int(extra[k]), int(records["extra_bytes"][rows[k]]), 8 * int(count[rows[k]]))
    for name, value in values.items():
        here = missing[name][rows]
        value[rows[here]] = _gather(array, field[here], 8).view("<i8")[:, 0]
        field = field + 8 * here
    return values


def _find_zip64(data: bytes, at: int, extra_bytes: int, wanted: int) -> int:
    """Where the content of the ZIP64 field begins among an entry's extra fields."""
    end = at + extra_bytes
    while at + 4 <= end:
        kind, size = struct.unpack_from("<2H", data, at)
        if kind == 1 and wanted <= size <= end - at - 4:
            return at + 4
        at += 4 + size
    raise zipfile.BadZipFile("a file of more than 4 GiB, or behind them, has no ZIP64 field")


def _names(data: bytes, at: np.ndarray, records: np.ndarray) -> list[str]:
    text = data.decode("latin-1")       # Positions stay those of the bytes.
    starts = at + RECORD_BYTES
    ends = starts + records["name_bytes"]
    names = [text[a:b] for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]
    for i, name in enumerate(names):
        if not name.isascii():
            names[i] = _decode(name.encode("latin-1"), bool(records["flags"][i] & UTF8))
    return names


def _decode(name: bytes, is_utf8: bool) -> str:
    try:
        return name.decode("utf-8" if is_utf8 else "cp437")
    except UnicodeDecodeError as err:
        raise zipfile.BadZipFile(f"the file name {name[:80]!r} is not UTF-8, as it should be") from err
