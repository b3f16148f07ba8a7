# SPDX-License-Identifier: Apache-2.0
"""Processes of one job look after each other through its store: nobody waits for a process that has failed.

A thread in every process beats in the store, looks whether somebody reported a failure, and whether the process after
it still beats. Collectives cannot be interrupted, so on bad news the thread ends the process. A process that is stopped
cannot look; its sentinel, a small process beside it, ends it.
"""
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib import UserError
from torch_utils.launch import leaves_exit_code

BEAT_SECONDS = 2.0
# Without a sign of life for so long a process is killed by its sentinel, on its own node: it is stopped or hangs. After
# twice that its neighbour takes it for dead: its node is gone. $STYLESAN_SILENT_SECONDS goes first.
SILENT_SECONDS = 60.0
DEAD_BEATS = 2.5            # Without a beat for so many, a process is suspected when a connection broke.
LOST_BEATS = 5              # Failed calls in a row after which the store counts as gone.
GOODBYE_SECONDS = 10.0      # For so long the host of the store waits for others to read of its failure.
LAST_WORDS_SECONDS = 1.0    # For what a process prints when it ends.
FAILURE = "failure"
EXIT_FAILED = 1


def silent_seconds() -> float:
    """How long a process may show no sign of life; 0: for ever."""
    return float(os.environ.get("STYLESAN_SILENT_SECONDS", SILENT_SECONDS))


def end_process(message: str, code: int = EXIT_FAILED) -> None:
    """Print to stderr and end this process at once, whatever its main thread is waiting for.

    That may be a pipe which nobody reads (`| less`), so this waits only `LAST_WORDS_SECONDS` for what it prints itself.
    """
    def last_words() -> None:
        with contextlib.suppress(OSError, ValueError):      # A terminal may be gone.
            if message:
                print(message, file=sys.stderr, flush=True)
            if sys.stdout is not None:                      # It was closed before the start.
                sys.stdout.flush()

    try:
        speaker = threading.Thread(target=last_words, daemon=True)
        speaker.start()
        speaker.join(timeout=LAST_WORDS_SECONDS)
    finally:
        os._exit(code)


class PeerMonitor:
    """The thread that looks after the other processes. `store` is a client of its own, because a blocking call of the
    main thread must not stop it."""

    def __init__(self, store: Any, rank: int, world_size: int, host: str,
                 end: Callable[..., None] = end_process):
        self.store, self.rank, self.world_size, self.host = store, rank, world_size, host
        self._end = end
        self._stop = threading.Event()
        self._deadline: tuple[float, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="peer monitor", daemon=True)
        self._beats, self._same, self._lost = 0, 0, 0
        self._seen: bytes | None = None             # The last beat of the process after this one,
        self._parent = os.getppid()
        self._sentinel: Sentinel | None = None

    def start(self) -> None:
        """Begin to look."""
        if silent_seconds() > 0 and hasattr(signal, "SIGKILL"):
            self._sentinel = Sentinel(f"rank {self.rank} on {self.host}", silent_seconds())
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(timeout=GOODBYE_SECONDS)
        if self._sentinel is not None:
            self._sentinel.stop()

    def set_deadline(self, seconds: float | None, explain: Callable[[], str] = lambda: "") -> None:
        """End the process with the text of `explain` unless this is called again in time; None: no deadline."""
        self._deadline = None if seconds is None else (time.monotonic() + seconds, explain)

    def report(self, error: BaseException) -> bool:
        """Tell all processes that this one failed. Returns whether it is the first to fail."""
        text = "".join(traceback.format_exception(error))
        code = error.exit_code if isinstance(error, UserError) else None
        return self._report(self.rank, self.host, text, f"{type(error).__name__}: {error}", code)

    def blame_the_silent(self) -> str | None:
        """After an error that may come from the end of another process: report that one, and say so.

        Returns:
            What was reported; None if all others show signs of life, or a failure was reported before.
        """
        try:
            before = [self._beat_of(rank) for rank in range(self.world_size)]
            time.sleep(DEAD_BEATS * BEAT_SECONDS)
            if self.store.check([FAILURE]):
                return None
            silent = [rank for rank in range(self.world_size)
                      if rank != self.rank and self._beat_of(rank) == before[rank] is not None]
            if not silent:
                return None
            self._report_silent(silent[0], DEAD_BEATS * BEAT_SECONDS)
            return f"rank {silent[0]} on {self._host_of(silent[0])}"
        except RuntimeError:
            return None             # No store any more.

    def wait_for_readers(self) -> None:
        """Stay a little, so that others can read of the failure. The process that hosts the store calls it."""
        end = time.monotonic() + GOODBYE_SECONDS
        others = [f"read/{rank}" for rank in range(self.world_size) if rank != self.rank]
        while time.monotonic() < end and others:
            others = [name for name in others if not self.store.check([name])]
            time.sleep(0.1)

    #------------------------------------------------------------------------

    def _report(self, rank: int, host: str, text: str, summary: str, code: int | None = None) -> bool:
        message = json.dumps({"rank": rank, "host": host, "text": text, "summary": summary, "by": self.rank,
                              "code": code})
        try:
            return bool(json.loads(self.store.compare_set(FAILURE, "", message))["by"] == self.rank)
        except RuntimeError:
            return True             # Without a store there is nobody to tell.

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS if self._deadline is None else BEAT_SECONDS / 4):
            if self._sentinel is not None:
                self._sentinel.beat()
            if os.getppid() != self._parent:
                self._end(f"rank {self.rank} on {self.host} ends, because the process that started it is gone")
            if self._deadline is not None and time.monotonic() > self._deadline[0]:
                self._end(f"rank {self.rank} on {self.host}: {self._deadline[1]()}")
            try:
                self._look()
                self._lost = 0
            except RuntimeError as err:     # Stores raise this, whatever is wrong.
                self._lost += 1
                if self._lost >= LOST_BEATS and not self._stop.is_set():
                    self._end(f"rank {self.rank} on {self.host} ends: the store of the job cannot be reached "
                              f"({err}): its host, or the first process, is gone")

    def _look(self) -> None:
        if self.store.check([FAILURE]):
            failure = json.loads(self.store.get(FAILURE))
            if failure["by"] != self.rank or failure["rank"] != self.rank:
                self.store.set(f"read/{self.rank}", "")
                if failure["code"] is not None and leaves_exit_code():
                    self._end("", 0)        # A mistake that the user can mend: one process tells it, in one line.
                shown = failure["text"] if failure["host"] != self.host else failure["summary"] + "\n"
                self._end(f"rank {self.rank} on {self.host} ends, because rank {failure['rank']} on "
                          f"{failure['host']} failed:\n{shown}")
            return
        self._beats += 1
        self.store.set(f"beat/{self.rank}", str(self._beats))
        self._look_after_next()

    def _look_after_next(self) -> None:
        """Look after the next process only. So each looks after one, and the store can serve thousands.

        Looks are counted, and not time: a job may be stopped as a whole and go on.
        """
        other = (self.rank + 1) % self.world_size
        beat = self._beat_of(other)
        self._same = self._same + 1 if beat == self._seen else 0
        self._seen = beat
        if 0 < 2 * silent_seconds() < self._same * BEAT_SECONDS:
            self._report_silent(other, self._same * BEAT_SECONDS)

    def _beat_of(self, rank: int) -> bytes | None:
        name = f"beat/{rank}"
        return self.store.get(name) if self.store.check([name]) else None

    def _host_of(self, rank: int) -> str:
        return self.store.get(f"here/{rank}").decode() if self.store.check([f"here/{rank}"]) else "its node"

    def _report_silent(self, rank: int, seconds: float) -> None:
        summary = f"no sign of life for {seconds:.0f} s: it was killed or stopped, or its node is gone"
        self._report(rank, self._host_of(rank), summary + "\n", summary)


class Sentinel:
    """A small process that kills this one when it shows no sign of life: a stopped process cannot end itself, and what
    started it would wait for it for ever."""

    def __init__(self, label: str, seconds: float):
        command = [sys.executable, "-I", str(Path(__file__).with_name("sentinel.py")), label, f"{seconds:g}"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None      # A pipe was asked for.
        self._pipe = self._process.stdin.fileno()
        os.set_blocking(self._pipe, False)

    def beat(self) -> None:
        """Show a sign of life."""
        with contextlib.suppress(OSError):          # It is gone or stopped: this process goes on without.
            os.write(self._pipe, b".")

    def stop(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=GOODBYE_SECONDS)
