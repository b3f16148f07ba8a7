# SPDX-License-Identifier: Apache-2.0
"""Who owns a run folder: one start of a command, for as long as its first process lives.

The lock is the operating system's: it ends with the process, however that ends. The file says who holds it, and counts
up while the owner lives. On a network disk whose locks reach one machine only, or that has none, that count tells
whether an owner on another machine is alive.
"""
import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
from pathlib import Path

from dnnlib import UserError
from dnnlib.util import parse_json, try_lock

LOCK_FILE = "run.lock"
BEAT_SECONDS = 5.0          # Between two signs of life in the file.
SILENT_BEATS = 3            # Without a sign for so long, an owner whose lock cannot be seen counts as gone.
PATIENCE_SECONDS = 3.0      # For an owner that is just ending, and for somebody who only looks.
RECORD_BYTES = 512          # Written in one piece, so that nobody reads half of it.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Owner:
    """What the file says of the process that holds the lock."""

    host: str
    pid: int
    since: str              # Local time there.
    beats: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def this_process() -> Owner:
    """As it would write itself into the file."""
    return Owner(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S"))


def _read(path: Path) -> Owner | None:
    """The owner in the file; None if it was left in order, or tells nothing."""
    try:
        return Owner(**parse_json(path.read_bytes()[:RECORD_BYTES]))
    except (OSError, ValueError, TypeError):
        return None


def _open(path: Path) -> int:
    """The descriptor of the file, which is made if it is missing. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)


def owner_of(folder: Path) -> Owner | None:
    """Who holds the lock of a run folder now; None where nobody does, as far as the system can tell. Writes nothing."""
    path = folder / LOCK_FILE
    try:
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return None
    try:
        held = try_lock(fd, shared=True) is False
    finally:
        os.close(fd)
    return (_read(path) or Owner("this machine", 0, "a moment ago")) if held else None


def refusal(folder: Path, owner: Owner) -> UserError:
    """The line for somebody who wants what another process has."""
    is_here = owner.host == socket.gethostname()
    remedy = f"stop it (kill {owner.pid})" if is_here else "stop it there"
    lost = "" if is_here else f". If that machine is off, delete {folder / LOCK_FILE}"
    return UserError(f"{folder} is in use by {owner}: wait until it ends, or {remedy}; for a second run with the same "
                     f"settings give another --desc or --outdir{lost}")

#----------------------------------------------------------------------------

class RunLock:
    """Holds a run folder until `release`, or until this process ends. `note` says what an owner before it left."""

    def __init__(self, folder: Path):
        """Take the folder, which is made if it is missing.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        self.path = folder / LOCK_FILE
        self.note: str | None = None
        self._stop = threading.Event()
        self._writing = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._fd = _open(self.path)
        except OSError as err:
            raise UserError(f"--outdir: cannot write to {folder} ({os.strerror(err.errno or 0)}): "
                            "name a folder that you may write to") from err
        try:
            self._take(folder)
        except BaseException:
            self._close()
            raise
        self._owner = this_process()
        self._write()
        _open_locks.add(self)
        threading.Thread(target=self._beat, name="run-lock", daemon=True).start()

    def _take(self, folder: Path) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (locked := try_lock(self._fd)) is False:
            if time.monotonic() > deadline:
                raise refusal(folder, _read(self.path) or Owner("another machine", 0, "a moment ago"))
            time.sleep(0.1)
        before = _read(self.path)
        if before is None:
            return
        if (locked is None or before.host != socket.gethostname()) and _is_beating(self.path, before):
            raise refusal(folder, before)
        self.note = f"the run was left by {before}, which ended without leaving it in order: it is continued"

    def _write(self) -> None:
        text = json.dumps(dataclasses.asdict(self._owner)).encode()[:RECORD_BYTES]
        with self._writing:
            if self._fd >= 0:           # Else it was released meanwhile.
                os.lseek(self._fd, 0, os.SEEK_SET)
                os.write(self._fd, text.ljust(RECORD_BYTES))

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._owner = dataclasses.replace(self._owner, beats=self._owner.beats + 1)
            with contextlib.suppress(OSError):      # A full disk or a lost network: whoever needs the disk says so.
                self._hold_again()
                self._write()

    def _hold_again(self) -> None:
        """If somebody deleted the file although its owner lives, make it and lock it anew."""
        with self._writing:
            if self._fd < 0:                # It was released meanwhile.
                return
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self.path), os.fstat(self._fd)):
                    return
            fd = _open(self.path)
            if try_lock(fd) is False:       # Another process was faster: what it has is its own.
                os.close(fd)
                return
            old, self._fd = self._fd, fd
            os.close(old)

    def release(self) -> None:
        """Give the folder back. The file stays: whoever waits for it has it open."""
        self._stop.set()
        with self._writing:
            if self._fd < 0:
                return
            with contextlib.suppress(OSError):      # Else the next owner finds the name of this one, which is gone.
                os.ftruncate(self._fd, 0)
            self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        _open_locks.discard(self)
        if fd >= 0:
            os.close(fd)

    def forget(self) -> None:
        """In a process that was forked: the lock is the other one's, and must not live as long as this one."""
        self._stop.set()
        self._close()


def _is_beating(path: Path, seen: Owner) -> bool:
    """Whether the count in the file goes on. Waits for some beats."""
    deadline = time.monotonic() + SILENT_BEATS * BEAT_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(BEAT_SECONDS / 4, 1.0))
        if _read(path) not in (seen, None):
            return True
    return False


_open_locks: set[RunLock] = set()


def _after_fork() -> None:
    for lock in list(_open_locks):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
