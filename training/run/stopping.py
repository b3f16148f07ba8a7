# SPDX-License-Identifier: Apache-2.0
"""Ends before the end: signals, --restart_every, a STOP file, patience.

SIGTERM, SIGUSR1 (Slurm, a shell) and --restart_every mean: finish the iteration, save, exit with code 3, "start me
again". A file STOP in the run folder and patience mean: the stage is finished, exit code 0.
"""
import dataclasses
import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from torch_utils import distributed
from training.config import TrainConfig
from training.trainer import Progress

EXIT_DONE, EXIT_RESTART = 0, 3      # What a launcher reads: finished; start me again.
STOP_FILE = "STOP"
SIGNALS = ("SIGTERM", "SIGUSR1")
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

    One process looks after every iteration. Several send each other a message of four numbers, as rarely as every
    `POLL_SECONDS` seconds (after every iteration, where one takes longer): so a request is met after at most that time
    and an iteration, and the device is waited for no more often.
    """

    def __init__(self, restart_every: float = 0):
        self.restart_every = restart_every      # Seconds; 0: never.
        self.folder: Path | None = None         # Where a STOP file is looked for, once it is known.
        self._started = time.monotonic()
        self._signal: int = 0
        self._handlers: dict[int, Any] = {}        # What `signal.signal` gave back.
        self._until_poll, self._interval, self._last_poll = 1, 1, time.monotonic()
        self._last_look = 0.0

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():      # Others may not set handlers.
            for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                self._handlers[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._signal = number

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

def stage_end(config: TrainConfig, progress: Progress) -> str | None:
    """Why the stage is finished: by its length, or by patience; None while it is not."""
    if progress.cur_nimg >= int(config.total_kimg * 1000):
        return "done"
    if 0 < config.saving.stop_patience <= progress.bad_evals:
        return (f"done: {progress.bad_evals} evaluations without a better {progress.best_metric} than that at kimg "
                f"{(progress.best_nimg or 0) / 1e3:g} (--stop-patience={config.saving.stop_patience})")
    return None
