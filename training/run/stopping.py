# SPDX-License-Identifier: Apache-2.0
"""Ends before the end: signals, --restart_every, a STOP file, patience.

SIGTERM and SIGUSR1 (Slurm, a shell), SIGINT (Ctrl-C), SIGHUP (the terminal is closed) and --restart_every mean: finish
the iteration, save, exit with code 3, "start me again". A second Ctrl-C ends at once. A file STOP in the run folder and
patience mean: the stage is finished, exit code 0.
"""
import contextlib
import dataclasses
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

import torch

from torch_utils import distributed
from torch_utils.launch import STOP_SIGNALS, TWICE_SECONDS
from torch_utils.peer_monitor import end_process
from training.config import TrainConfig
from training.trainer import Progress

EXIT_DONE, EXIT_RESTART = 0, 3      # What a launcher reads: finished; start me again.
STOP_FILE = "STOP"
AGAIN = "the same command continues here"
POLL_SECONDS = 5.0                  # Between two agreements of several processes.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Request:
    """What all processes have agreed on."""

    restart: str | None = None      # Why to save the state and exit with code 3.
    finish: str | None = None       # Why the stage is finished.


NOTHING = Request()


class StopRequests:
    """Notices requests and has all processes agree on them. A context manager: signals are caught inside it.

    A signal is seen by a thread, at once, whatever the main thread is doing: so a second Ctrl-C ends every wait.

    One process looks after every iteration. Several send each other a message of four numbers, as rarely as every
    `POLL_SECONDS` seconds (after every iteration, where one takes longer): so a request is met after at most that time
    and an iteration, and the device is waited for no more often.
    """

    def __init__(self, restart_every: float = 0, end: Callable[[str, int], None] = end_process):
        self.restart_every = restart_every      # Seconds; 0: never.
        self.folder: Path | None = None         # Where a STOP file is looked for, once it is known.
        self._started = time.monotonic()
        self._signal: int = 0
        self._interrupted: float | None = None  # When Ctrl-C was pressed first.
        self._end = end
        self._leave = contextlib.ExitStack()
        self._until_poll, self._interval, self._last_poll = 1, 1, time.monotonic()
        self._last_look = 0.0

    def __enter__(self) -> "StopRequests":
        self._leave.enter_context(unbreakable_output())
        if threading.current_thread() is threading.main_thread():      # Others may not set handlers.
            self._listen()
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:      # Else it stays ignored: nohup, "command &".
                    self._leave.callback(signal.signal, number, signal.signal(number, self._notice))
        return self

    def __exit__(self, *error: object) -> None:
        self._leave.close()

    def _listen(self) -> None:
        """Start the thread, to which the system writes the number of each signal that has a handler."""
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

        def listen() -> None:
            while numbers := reader.recv(64):
                for number in numbers:
                    self._hear(number)
        thread = threading.Thread(target=listen, name="signals", daemon=True)
        thread.start()

        def end() -> None:
            signal.set_wakeup_fd(before)
            writer.shutdown(socket.SHUT_RDWR)       # Closing would not do: loader processes have it open, too.
            writer.close()
            thread.join()
            reader.close()
        self._leave.callback(end)

    def _hear(self, number: int) -> None:
        if number not in STOP_SIGNALS:
            return
        now = time.monotonic()
        if number == signal.SIGINT and self._interrupted is not None and now - self._interrupted > TWICE_SECONDS:
            self._end(f"ended at once by a second Ctrl-C: {AGAIN}, from the last state", 128 + number)
        if number == signal.SIGINT and self._interrupted is None:
            self._interrupted = now
            if distributed.rank() == 0:
                print("\nCtrl-C: the iteration is finished and the state saved; a second Ctrl-C ends at once",
                      file=sys.stderr, flush=True)
        self._signal = self._signal or number

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or number

    def is_asked(self) -> bool:
        """Whether a signal came, to this process."""
        return self._signal != 0

    def poll(self) -> Request:
        """Call after every iteration, on all processes; all get the same answer."""
        self._until_poll -= 1
        if self._until_poll > 0:
            return NOTHING
        now = time.monotonic()
        # Signal, out of time, STOP file, and the first process's wish for when to meet next.
        numbers = [self._signal, int(0 < self.restart_every <= now - self._started), int(self._sees_stop_file(now)), 1]
        if distributed.world_size() > 1:
            numbers = self._agree(numbers, now)
        self._until_poll = self._interval = max(numbers[3], 1)
        if numbers[0]:
            return Request(restart=f"stopped by {signal.Signals(numbers[0]).name}: {AGAIN}")
        if numbers[1]:
            return Request(restart=f"stopped to be started again (--restart_every={self.restart_every:g}): {AGAIN}")
        return Request(finish=f"done: stopped by the file {STOP_FILE}") if numbers[2] else NOTHING

    def _agree(self, numbers: list[int], now: float) -> list[int]:
        seconds = max(now - self._last_poll, 1e-6) / self._interval
        self._last_poll = now
        numbers[3] = min(max(int(POLL_SECONDS / seconds), 1), 2 * self._interval)
        table = distributed.all_gather(torch.tensor([numbers], device=distributed.device())).tolist()
        highest = [max(column) for column in zip(*table, strict=True)]
        return [highest[0], table[0][1], table[0][2], table[0][3]]

    def _sees_stop_file(self, now: float) -> bool:
        """Looks at most once per second: the folder may be on a slow disk."""
        if distributed.rank() != 0 or self.folder is None or now - self._last_look < 1:
            return False
        self._last_look = now
        return (self.folder / STOP_FILE).exists()

    def remove_file(self) -> None:
        """Remove the STOP file, so that the same command trains on."""
        if distributed.rank() == 0 and self.folder is not None:
            (self.folder / STOP_FILE).unlink(missing_ok=True)

#----------------------------------------------------------------------------

class _Output:
    """A stream whose end ends nothing: what is written after that is lost."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Characters written, or said to be."""
        with self._forgiven():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As that of a file."""
        with self._forgiven():
            self._stream.flush()

    @contextlib.contextmanager
    def _forgiven(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            if err.errno not in (errno.EPIPE, errno.EIO):
                raise
            null = os.open(os.devnull, os.O_WRONLY)     # Also for what Python itself flushes at the end.
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def unbreakable_output() -> Iterator[None]:
    """In the block, a terminal that is closed, or a program behind a pipe that ended, does not end this one: it has
    something to save."""
    before = sys.stdout, sys.stderr
    # A stream that was closed before the start is None, to which `print` writes nothing.
    sys.stdout, sys.stderr = (stream and cast(TextIO, _Output(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before

#----------------------------------------------------------------------------

def stage_end(config: TrainConfig, progress: Progress) -> str | None:
    """Why the stage is finished: by its length, or by patience; None while it is not."""
    if progress.cur_nimg >= int(config.total_kimg * 1000):
        return "done"
    if 0 < config.saving.stop_patience <= progress.bad_evals:
        return (f"done: {progress.bad_evals} evaluations without a better {progress.best_metric} than that at kimg "
                f"{(progress.best_nimg or 0) / 1e3:g} (--stop-patience={config.saving.stop_patience})")
    return None
