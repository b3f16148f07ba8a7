# SPDX-License-Identifier: Apache-2.0
"""Attribute dictionaries, formatting, names, hashing, atomic files and files that grow."""
import contextlib
import errno
import functools
import hashlib
import importlib
import json
import os
import re
import shutil
import stat
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:     # Not on Windows.
    fcntl = None    # type: ignore[assignment]

LOCKED_BYTE = 1 << 30   # Place of the byte that locks a file: far beyond its content.

#----------------------------------------------------------------------------

class EasyDict(dict[str, Any]):
    """A dict whose keys are also attributes."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        del self[name]

#----------------------------------------------------------------------------
# Formatting.

def format_time(seconds: float) -> str:
    """Seconds as '42s', '3m 05s', '2h 10m 00s' or '5d 04h 00m'."""
    s = int(round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 60 * 60:
        return f"{s // 60}m {s % 60:02}s"
    if s < 24 * 60 * 60:
        return f"{s // 3600}h {s // 60 % 60:02}m {s % 60:02}s"
    return f"{s // 86400}d {s // 3600 % 24:02}h {s // 60 % 60:02}m"


def format_bytes(count: float) -> str:
    """Bytes as '512 B', '3.2 KiB', '1.5 GiB'."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def list_some(items: Sequence[object], limit: int = 5) -> str:
    """The first `limit` items joined by commas, with a count of the rest: for error messages."""
    text = ", ".join(str(item) for item in items[:limit])
    return text if len(items) <= limit else f"{text} and {len(items) - limit} more"


def first_line(error: BaseException) -> str:
    """What an error says first; its class if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def printable(text: str) -> str:
    """`text` in one line, with escapes for what would move the cursor or has no letter."""
    line = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)

#----------------------------------------------------------------------------
# Names.

def normalized_name(name: str) -> str:
    """The one form (NFC) of names that look alike: an accent may be a part of its letter or a character after it.

    What a command line in an ASCII locale holds as bytes becomes the letters that it stands for.
    """
    with contextlib.suppress(UnicodeError):     # Bytes that are no UTF-8 stay.
        name = name.encode("utf-8", "surrogateescape").decode("utf-8")
    return unicodedata.normalize("NFC", name)


def existing_spelling(path: str) -> str:
    """`path` with those of its names that are on the disk in another form of Unicode spelled as they are there."""
    if path.isascii() or os.path.lexists(path):
        return path
    folder, name = os.path.split(path.rstrip("/"))
    if not name:
        return path
    folder = existing_spelling(folder)
    with contextlib.suppress(OSError):          # No such folder yet, or none that may be listed.
        found = [other for other in os.listdir(folder or ".") if normalized_name(other) == normalized_name(name)]
        name = found[0] if found and name not in found else name
    return os.path.join(folder, name)


def is_address(path: str) -> bool:
    """Whether a text is an address such as https://..., and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None

#----------------------------------------------------------------------------
# Files.

FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})       # Python does not say which file these concern.

_position = threading.Lock()    # Where reading at a place moves the descriptor, one thread at a time does it.


def is_special(path: str | os.PathLike[str]) -> bool:
    """Whether a pipe, a socket or a device is there: who reads it may wait for ever, or read without end."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, as 64 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@functools.cache
def _umask() -> int:
    """The permissions that new files lack. Reading it means setting it, which other threads would notice: so once."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _sync_folder(folder: Path) -> None:
    """Bring names to the disk, so that a rename survives a power cut. Not every file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically: a hard link costs no space; elsewhere a copy."""
    temp = target.with_name(f".{target.name}.link.tmp")
    temp.unlink(missing_ok=True)
    try:
        try:
            os.link(source, temp)
        except OSError:
            shutil.copyfile(source, temp)
        os.replace(temp, target)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
    temp.unlink(missing_ok=True)        # Renaming a link onto another link of the same file leaves both.
    _sync_folder(target.parent)


def _refuse_what_is_no_file(path: Path) -> None:
    """A rename would put a file in the place of a device like /dev/null."""
    if path.exists() and not path.is_file():
        number = errno.EISDIR if path.is_dir() else errno.EEXIST
        raise OSError(number, f"{os.strerror(number)}, and it is no ordinary file", str(path))


@contextlib.contextmanager
def _naming(path: Path, temp: str | Path) -> Iterator[None]:
    """Let errors of a full disk, and those of the temporary place, in the block name the path that was asked for."""
    try:
        yield
    except OSError as err:
        name = err.filename
        if err.errno in FULL_DISK if name is None else isinstance(name, str) and Path(name).is_relative_to(temp):
            err.filename = str(path)
        raise


@contextlib.contextmanager
def _temporary_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path`, which goes with the block. Raises OSError, which names `path`."""
    try:
        # It is absolute, because programs take a name such as -x or a:b for something else.
        place = Path(os.path.abspath(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")))
    except OSError as err:
        err.filename = str(path)        # The name that was asked for, not the temporary one.
        raise
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], previous: Path | None = None) -> Iterator[BinaryIO]:
    """Open a temporary binary file beside `path`; rename it to `path` when the block ends without an error.

    Whoever reads `path` sees the old content or the whole new content, never a part, also after a power cut.

    Args:
        path: The file.
        previous: Where the content that `path` had before stays.

    Raises:
        OSError: there is a folder, a device or a pipe of this name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_what_is_no_file(path)
    try:
        fd, temp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as err:
        err.filename = str(path)
        raise
    try:
        with _naming(path, temp), os.fdopen(fd, "w+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        # mkstemp makes files private; give the result the permissions that open() would have given it.
        os.chmod(temp, 0o666 & ~_umask())
        if previous is not None and path.is_file():
            link_or_copy(path, previous)
        os.replace(temp, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temp)
        raise


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name beside `path` for those who create a file by name: what is there without an error in the end gets `path`.

    Raises:
        OSError: there is a folder, a device or a pipe of this name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _refuse_what_is_no_file(path)
    with _temporary_folder(path) as place:
        temp = place / path.name
        with _naming(path, place):
            yield temp
            with open(temp, "r+b") as f:
                os.fsync(f.fileno())
        os.replace(temp, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder whose content is that of the folder `path` if the block ends without an error.

    A folder `path` that is there must be empty. It stays the same one, because it may be a link, the place of a mounted
    disk or a folder whose neighbours may not be touched.

    Raises:
        OSError: something else has this name, or something is in the folder, before the block or after it.
    """
    path = Path(path)
    if path.is_dir():
        with _filled(path) as temp, _naming(path, temp):
            yield temp
        return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_folder(path) as place:
        temp = place / path.name        # mkdtemp's own folder is private.
        temp.mkdir()
        with _naming(path, place):
            yield temp
        os.replace(temp, path)
        _sync_folder(path.parent)


@contextlib.contextmanager
def _filled(path: Path) -> Iterator[Path]:
    """`atomic_folder` for an empty folder that is there."""
    with _temporary_folder(path / "new") as place:
        _refuse_neighbours(path, place)         # Also another run that has begun with the same folder.
        yield place
        _refuse_neighbours(path, place)
        for child in sorted(place.iterdir()):
            child.rename(path / child.name)
        _sync_folder(path)


def _refuse_neighbours(folder: Path, only: Path) -> None:
    """Raises OSError if anything else is in a folder."""
    if os.listdir(folder) != [only.name]:
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file in UTF-8 so that readers see the old or the new content, never a part."""
    with atomic_file(path) as f:
        f.write(text.encode("utf-8", "backslashreplace"))       # Names of files need not be valid Unicode.


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Append lines to a text file in UTF-8.

    A line that a crash cut off is ended first: it would swallow the next one.
    """
    with open(path, "a+b") as f:
        if f.seek(0, os.SEEK_END) > 0:
            f.seek(-1, os.SEEK_END)
            text = text if f.read(1) == b"\n" else "\n" + text
        f.write(text.encode("utf-8", "backslashreplace"))


def parse_json(text: str | bytes, make_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value in JSON that may come from anywhere.

    Args:
        text: The JSON.
        make_object: From names and values to an object, such as `unique_keys`; None: the last of equal names counts.

    Raises:
        ValueError: it is no JSON in UTF-8, or its lists lie deeper in each other than the parser goes.
    """
    try:
        return json.loads(text, object_pairs_hook=make_object)
    except RecursionError as err:
        raise ValueError("its lists or objects lie too deep in each other") from err


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `parse_json`, where people wrote the file. Raises ValueError if one name has two values."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found and found[name] != value:
            raise ValueError(f"{name!r} stands there twice, with different values")
        found[name] = value
    return found


def read_at(fd: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes of an open file from `offset`, whatever the position of its descriptor."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    with _position:             # Windows, where a read starts at the descriptor's position.
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)


def try_lock(fd: int, shared: bool = False) -> bool | None:
    """Lock an open file, for as long as it is open here or in a process that inherited it.

    Args:
        fd: Descriptor; for an exclusive lock it must be open for writing (network disks want that).
        shared: Go together with other shared locks; on Windows all locks are exclusive.

    Returns:
        Whether it is locked now; None where files cannot be locked.
    """
    try:
        if fcntl is not None:
            fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            msvcrt = importlib.import_module("msvcrt")
            os.lseek(fd, LOCKED_BYTE, os.SEEK_SET)      # Windows forbids to read what is locked.
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return None
    return True


@contextlib.contextmanager
def file_lock(path: str | os.PathLike[str], seconds: float) -> Iterator[None]:
    """Hold a lock for the block; it ends with this process, however that ends.

    After so many seconds, or where locks do not work, the block runs without it.
    """
    with open(path, "wb") as file:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and try_lock(file.fileno()) is False:
            time.sleep(0.01)
        yield
