# SPDX-License-Identifier: Apache-2.0
"""Processes of one job look after each other through its store: nobody waits for a process that has failed.

A thread in every process beats in the store, looks whether somebody reported a failure, and whether the process after
it still beats. Collectives cannot be interrupted, so on bad news the thread ends the process.
"""
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

BEAT_SECONDS = 2.0
SILENT_SECONDS = 300.0      # Without a beat for so long a process counts as dead: its node is off or it was killed.
LOST_BEATS = 5              # Failed calls in a row after which the store counts as gone.
GOODBYE_SECONDS = 10.0      # For so long the host of the store waits for others to read of its failure.
FAILURE = "failure"
EXIT_FAILED = 1


def end_process(message: str, code: int = EXIT_FAILED) -> None:
    """Print to stderr and end this process at once, whatever its main thread is waiting for."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


class PeerMonitor:
    """The thread that looks after the other processes. `store` is a client of its own, because a blocking call of the
    main thread must not stop it."""

    def __init__(self, store: Any, rank: int, world_size: int, host: str,
                 end: Callable[[str], None] = end_process):
        self.store, self.rank, self.world_size, self.host = store, rank, world_size, host
        self._end = end
        self._stop = threading.Event()
        self._deadline: tuple[float, Any] | None = None
        self._thread = threading.Thread(target=self._run, name="peer monitor", daemon=True)
        self._beats, self._seen, self._seen_time, self._lost = 0, None, time.monotonic(), 0

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        self._thread.join(timeout=GOODBYE_SECONDS)

    def set_deadline(self, seconds: float | None, explain: Callable[[], str] = lambda: "") -> None:
        """End the process with the text of `explain` unless this is called again in time; None: no deadline."""
        self._deadline = None if seconds is None else (time.monotonic() + seconds, explain)

    def report(self, error: BaseException) -> bool:
        """Tell all processes that this one failed. Returns whether it is the first to fail."""
        text = "".join(traceback.format_exception(error))
        return self._report(self.rank, self.host, text, f"{type(error).__name__}: {error}")

    def wait_for_readers(self) -> None:
        """Stay a little, so that others can read of the failure. The process that hosts the store calls it."""
        end = time.monotonic() + GOODBYE_SECONDS
        others = [f"read/{rank}" for rank in range(self.world_size) if rank != self.rank]
        while time.monotonic() < end and others:
            others = [name for name in others if not self.store.check([name])]
            time.sleep(0.1)

    #------------------------------------------------------------------------

    def _report(self, rank: int, host: str, text: str, summary: str) -> bool:
        message = json.dumps({"rank": rank, "host": host, "text": text, "summary": summary, "by": self.rank})
        try:
            return bool(json.loads(self.store.compare_set(FAILURE, "", message))["by"] == self.rank)
        except RuntimeError:
            return True             # Without a store there is nobody to tell.

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS if self._deadline is None else BEAT_SECONDS / 4):
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
                shown = failure["text"] if failure["host"] != self.host else failure["summary"] + "\n"
                self._end(f"rank {self.rank} on {self.host} ends, because rank {failure['rank']} on "
                          f"{failure['host']} failed:\n{shown}")
            return
        self._beats += 1
        self.store.set(f"beat/{self.rank}", str(self._beats))
        self._look_after_next()

    def _look_after_next(self) -> None:
        """Look after the next process only. So each looks after one, and the store can serve thousands."""
        other = (self.rank + 1) % self.world_size
        name = f"beat/{other}"
        beat = self.store.get(name) if self.store.check([name]) else None
        now = time.monotonic()
        if beat != self._seen:
            self._seen, self._seen_time = beat, now
        elif now - self._seen_time > SILENT_SECONDS:
            host = self.store.get(f"here/{other}").decode() if self.store.check([f"here/{other}"]) else "its node"
            summary = f"no sign of life for {SILENT_SECONDS:.0f} s: it was killed, or its node is gone"
            self._report(other, host, summary + "\n", summary)
