# SPDX-License-Identifier: Apache-2.0
"""What a run writes while it trains: states, network snapshots, the best model; in the background, whole or not at all.

Training waits only while tensors are copied to memory. One thread then writes the files, in order: a snapshot, the best
model, what `--keep` lets go, the state. A kill at any moment leaves files that load.
"""
import dataclasses
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dnnlib import UserError
from dnnlib.util import format_bytes, link_or_copy
from torch_utils import checkpoint, distributed
from torch_utils.memory import free_memory
from torch_utils.nested import copy_to_cpu, first_nonfinite, tensor_bytes
from training.config import TrainConfig
from training.run import formats
from training.run.folder import BEST_FILE, PREVIOUS_STATE_FILE, STATE_FILE, settings_of_state
from training.run.snapshots import (
    images_shown,
    network_snapshot,
    snapshot_name,
    snapshots_by_age,
    training_state,
)
from training.trainer import Progress, Trainer

#----------------------------------------------------------------------------

class Writer:
    """Runs jobs that write files, one at a time, in order: in a thread, or at once.

    A job that failed is reported by the next call of any method.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writer")
        self._job: Future[None] | None = None

    def submit(self, job: Callable[[], None], background: bool) -> None:
        """Run `job` after the one before. Waits for that one, so that at most one copy of a state is in memory."""
        self.wait()
        if background:
            self._job = self._pool.submit(job)
        else:
            job()

    def check(self) -> None:
        """Raise the error of a job that ended with one. Does not wait."""
        if self._job is not None and self._job.done():
            self.wait()

    def wait(self) -> None:
        """Wait until everything is on disk; raise the error of a job that failed."""
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Wait, and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

#----------------------------------------------------------------------------
# The best model.

@dataclasses.dataclass(frozen=True)
class Score:
    """The value that decides which model is best. It is stored in the snapshot that it belongs to."""

    metric: str
    value: float
    lower_is_better: bool = True

    def is_better_than(self, other: "Score | None") -> bool:
        """Whether this one wins, in its own direction, which a snapshot does not say; NaN never wins."""
        if not math.isfinite(self.value):
            return False
        if other is None or other.metric != self.metric:
            return True
        return self.value < other.value if self.lower_is_better else self.value > other.value

    def replaces(self, other: "Score") -> bool:
        """Whether it takes the place of `other`: better, or the same evaluation once more."""
        return self.is_better_than(other) or (self.metric, self.value) == (other.metric, other.value)


def pick_score(results: list[dict[str, Any]], metric: str | None) -> Score:
    """The score among metric results, by the name of the metric; None: the first.

    A result's own name says more: the detector, where the metric leaves it open, and after an '@' where it departs from
    the metric of that name.
    """
    found = [r for r in results if r.get("asked_for", r["metric"].partition("@")[0]) == metric] or results
    return Score(found[0]["metric"], float(next(iter(found[0]["results"].values()))), found[0]["lower_is_better"])


def read_score(path: Path) -> Score | None:
    """The score in a snapshot; None where there is none or where the file is missing or damaged."""
    try:
        score = formats.read_score(path)
        return Score(score["metric"], float(score["value"])) if score else None
    except UserError:
        return None


def update_best(progress: Progress, score: Score) -> None:
    """Count an evaluation: a new best one, or one more without improvement."""
    before = None if progress.best_value is None else Score(progress.best_metric or score.metric, progress.best_value)
    if score.is_better_than(before):
        progress.best_metric, progress.best_value = score.metric, score.value
        progress.best_nimg, progress.bad_evals = progress.cur_nimg, 0
    else:
        progress.bad_evals += 1

#----------------------------------------------------------------------------
# Retention.

def superfluous(positions: list[int], keep: int, keep_every: float) -> list[int]:
    """Snapshots that may go.

    Args:
        positions: Images shown before each of them.
        keep: The last so many stay; 0: all.
        keep_every: In kimg: the first snapshot at or after each multiple stays; 0: no grid.
    """
    if keep == 0:
        return []
    ordered = sorted(positions)
    grid = {}
    if keep_every > 0:
        for position in reversed(ordered):
            grid[int(position // (keep_every * 1000))] = position       # The first in each cell remains.
    return [p for p in ordered[:-keep] if p not in grid.values()]


def prune(folder: Path, keep: int, keep_every: float, protected: set[int]) -> None:
    """Delete network snapshots that `--keep` and `--keep-every` let go, never those in `protected`."""
    files = {nimg: path for path in snapshots_by_age(folder) if (nimg := images_shown(path.name)) is not None}
    for nimg in superfluous(list(files), keep, keep_every):
        if nimg not in protected:
            files[nimg].unlink(missing_ok=True)

#----------------------------------------------------------------------------

class NonFiniteState(UserError):
    """Weights or moments are NaN or infinite, so nothing is written; the message names one of them."""


class Saver:
    """Writes the files of a run. Only the first process has anything to write."""

    def __init__(self, folder: Path, config: TrainConfig, class_names: list[str], say: Callable[[str], None]):
        self.folder, self.config, self.class_names, self.say = folder, config, class_names, say
        self.writer = Writer()
        self._options = settings_of_state(folder)
        self._last_state = time.monotonic()
        self._told = False

    def save_state(self, trainer: Trainer) -> None:
        """Write the training state; the one before it stays as training-state-prev.pt.

        A state that is not finite is not written: `training.watch.nonfinite.broken_weights` ends the run at its tick.
        """
        if distributed.rank() == 0:
            try:
                self.write_state(self.capture(trainer))
            except NonFiniteState as err:
                self._last_state = time.monotonic()
                self.say(f"NOTE: no state is saved now: {err}")

    def write_state(self, captured: tuple[dict[str, Any], bool]) -> None:
        """Write what `capture` returned."""
        self._last_state = time.monotonic()
        self.writer.submit(lambda: self._replace_state(captured[0]), captured[1])

    def state_is_due(self) -> bool:
        """Whether `--snap-state` minutes have passed since the last state."""
        minutes = self.config.saving.state_minutes
        return distributed.rank() == 0 and 0 < minutes * 60 <= time.monotonic() - self._last_state

    def capture(self, trainer: Trainer) -> tuple[dict[str, Any], bool]:
        """What a state file holds, and whether it is a copy that may be written while training goes on.

        Copied only if the copy takes at most half of the memory that is left; else tensors are those in use.

        Raises:
            NonFiniteState: it must not be written.
        """
        self.writer.wait()          # The copy before this one is gone then.
        content = training_state(trainer.state_dict()) | self._options
        if (bad := first_nonfinite(content)) is not None:
            raise NonFiniteState(f"{bad} is not finite, so nothing is saved: start a new run from the last snapshot, "
                                 "with --fp32=1 or half --glr and --dlr")
        if not self.config.saving.background:
            return content, False
        size, left = tensor_bytes(content), free_memory()
        if left is not None and size > left / 2:
            if not self._told:
                self.say(f"saving in the foreground: a copy of the state takes {format_bytes(size)}, more than half of "
                         f"the {format_bytes(left)} of memory that are left")
            self._told = True
            return content, False
        return copy_to_cpu(content), True

    def save_snapshot(self, progress: Progress, captured: tuple[dict[str, Any], bool], score: Score | None) -> None:
        """Write a network snapshot, make it the best model if it is, let go of old ones, write the state.

        Args:
            progress: As it is after the evaluation.
            captured: What `capture` returned for the same networks.
            score: What this snapshot scores; None without metrics: then the newest model counts as the best.
        """
        content = captured[0] | {"counters": dataclasses.asdict(progress)}
        kept = None if score is None else {"metric": score.metric, "value": score.value}
        snapshot = network_snapshot(content, self.config, self.class_names, kept)
        name, saving = snapshot_name(progress.cur_nimg), self.config.saving
        protected = {progress.cur_nimg, progress.cur_nimg if progress.best_nimg is None else progress.best_nimg}

        def write() -> None:
            checkpoint.save(self.folder / name, snapshot)
            # Compared with the score inside the file that is there: after a restart from an older state, that one may
            # be of a later moment, and better.
            standing = read_score(self.folder / BEST_FILE)
            if standing is None or (score is not None and score.replaces(standing)):
                link_or_copy(self.folder / name, self.folder / BEST_FILE)
            prune(self.folder, saving.keep, saving.keep_every, protected)
            self._replace_state(content)

        self._last_state = time.monotonic()
        self.writer.submit(write, captured[1])

    def _replace_state(self, content: dict[str, Any]) -> None:
        checkpoint.save(self.folder / STATE_FILE, content, previous=self.folder / PREVIOUS_STATE_FILE)

    def check(self) -> None:
        """Raise the error of a save that failed meanwhile."""
        self.writer.check()

    def close(self) -> None:
        """Wait until everything is on disk, on all processes: a launcher ends them all when the first one exits.

        Raises:
            UserError: the last save failed.
        """
        self.writer.close()
        distributed.barrier()

