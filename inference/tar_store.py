# SPDX-License-Identifier: Apache-2.0
"""Images in a tar archive, read by offset like those in a zip archive: nothing is unpacked."""
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dnnlib import UserError
from training.data.labels import METADATA_NAME, clean_name, is_image_name, parse_metadata

BLOCK = 512
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZ": "bunzip2", b"\xfd7": "unxz", b"\x28\xb5": "unzstd"}   # By first bytes.


def is_tar(path: str | os.PathLike[str]) -> bool:
    """Whether an existing file is a tar archive, plain or compressed."""
    with open(path, "rb") as f:
        head = f.read(BLOCK)
    if head[:2] in COMPRESSED:
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class TarStore:
    """The images in a tar archive, sorted by name, with an index of where each begins.

    Made in one pass over the headers. The same interface as the stores in `training.data.stores`; can be pickled,
    and every process reads through a handle of its own.

    Raises:
        UserError: compressed, cut off, damaged, or it holds links, devices, names that lead out of it or twice the
            same name.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self._file: BinaryIO | None = None
        self._file_pid: int | None = None
        self._refuse_compressed()
        entries: dict[str, tuple[int, int]] = {}        # Name -> offset and size of the content.
        try:
            with tarfile.open(path, "r:") as archive:
                for member in archive:
                    self._add(entries, member)
                stopped_at = archive.offset
            if any(self._read(stopped_at, min(BLOCK, os.path.getsize(path) - stopped_at))):
                raise UserError(f"{path}: damaged at byte {stopped_at}: copy or make the archive again")
            end = os.path.getsize(path)
        except (tarfile.TarError, OSError, EOFError, ValueError) as err:
            raise UserError(f"{path}: not a whole tar archive ({err}): copy or make it again") from err
        for name, (offset, size) in entries.items():
            if offset + size > end:
                raise UserError(f"{path}: cut off inside {name}: copy or make the archive again")
        metadata = entries.get(METADATA_NAME)
        if metadata is not None:
            self.metadata = parse_metadata(f"{path}: {METADATA_NAME}", self._read(*metadata))
        self.names = sorted(name for name in entries if is_image_name(name))
        # Columns: offset and size.
        self._entries = np.array([entries[name] for name in self.names], dtype=np.int64).reshape(-1, 2)
        self.close()
        if not self.names:
            raise UserError(f"{path}: no images in it")

    def _refuse_compressed(self) -> None:
        with open(self.path, "rb") as f:
            program = COMPRESSED.get(f.read(2))
        if program is not None:
            raise UserError(f"{self.path}: a compressed file, whose images cannot be read by number: unpack the "
                            f"compression with {program}, a plain tar is enough")

    def _add(self, entries: dict[str, tuple[int, int]], member: tarfile.TarInfo) -> None:
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            raise UserError(f"{self.path}: {member.name!a} is a link, a device or a sparse file: make the archive "
                            "again with plain files only")
        try:
            name = clean_name(member.name)
        except ValueError as err:
            raise UserError(f"{self.path}: {err}: make the archive again with relative names") from err
        if name in entries:
            raise UserError(f"{self.path}: holds {name} twice: make the archive again")
        entries[name] = member.offset_data, member.size

    def where(self, index: int) -> str:
        """The file as error messages name it."""
        return f"{self.path}: {self.names[index]}"

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError when it is cut off."""
        return self._read(*self._entries[index].tolist())

    def _read(self, offset: int, size: int) -> bytes:
        # A handle that came through a fork shares its place in the file.
        if self._file is None or self._file_pid != os.getpid():
            self._file, self._file_pid = open(self.path, "rb"), os.getpid()
        self._file.seek(offset)
        data = self._file.read(size)
        if len(data) != size:
            raise OSError("the archive is cut off here")
        return data

    def content_key(self, index: int) -> tuple[int, int]:
        """Size and CRC-32 of the content."""
        data = self.read(index)
        return len(data), zlib.crc32(data)

    def close(self) -> None:
        """Close the archive; it opens again when needed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_file_pid": None}
