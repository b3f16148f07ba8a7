# SPDX-License-Identifier: Apache-2.0
"""Everything worth knowing about one GPU, in the ten minutes for which somebody has it.

    python benchmarks/gpu_report.py [--minutes=8] [--device=auto] [--quick]

The steps below run one after the other, the most important first, each in a process of its own with a time limit: a
hang or a crash costs that limit and nothing else. Every step writes what it finds at once, and after every step, also
after Ctrl-C, the table is written from that: benchmarks/results/gpu.md. Nothing has to be installed for it beyond what
training needs; what is missing is reported. What the steps do is in gpu_steps.py and gpu_speed.py.
"""
import contextlib
import dataclasses
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from gpu_results import read_results  # noqa: E402
from gpu_table import Report, table  # noqa: E402

from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from torch_utils import misc  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "gpu.md"
GRACE = 2.0                 # Seconds between asking a step to end and ending it.
LEAST = 3.0                 # A step with less time than that is not started.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Step:
    """One process. Without a command it is the step of that name in gpu_steps.py."""

    name: str
    title: str
    limit: float            # Seconds.
    command: tuple[str, ...] = ()


STEPS = (
    Step("versions", "versions and device", 60),
    Step("build", "compiling the operations", 90),
    Step("self_check", "self-check of the operations", 60),
    Step("training", "training, sampling, fid", 150),
    Step("ops", "operations at the layers of ImageNet-256", 100),
    Step("iteration", "one iteration, 128 -> 256", 160),
    Step("convolutions", "convolutions at the layers of ImageNet-256", 80),
    Step("stem", "one iteration of the stem", 80),
    Step("sampling", "sampling at 256 pixels", 60),
    Step("loading", "loading data", 40),
    Step("two_processes", "two processes on one GPU", 80),
    Step("tests", "GPU tests", 120),
)


class Interrupted(BaseException):
    """Somebody wants this to end. Its argument is the signal's number."""


class Runner:
    """Runs steps and keeps the table up to date."""

    def __init__(self, steps: Sequence[Step], folder: Path, dest: Path, seconds: float, options: Sequence[str] = (),
                 quick: bool = False, say: Callable[[str], None] = click.echo):
        self.steps, self.folder, self.dest, self.options, self.quick = steps, folder, dest, options, quick
        self.say, self.end = say, time.monotonic() + seconds
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.date = ""

    def results_of(self, step: Step) -> Path:
        """Where a step leaves what it finds."""
        return self.folder / f"{step.name}.json"

    def log_of(self, step: Step) -> Path:
        """What it prints."""
        return self.folder / f"{step.name}.log"

    def continue_from_folder(self) -> None:
        """Outcomes of an earlier report with the same options stay; those of others do not belong beside them."""
        with contextlib.suppress(OSError, ValueError):
            before = json.loads((self.folder / "report.json").read_text(encoding="utf-8"))
            if before["options"] == list(self.options):
                self.outcomes, self.date = before["outcomes"], before["date"]
                return
        self.clear(self.steps)

    def clear(self, steps: Sequence[Step]) -> None:
        """Forget what these steps found before."""
        for step in steps:
            self.outcomes.pop(step.name, None)
            for path in (self.results_of(step), self.log_of(step)):
                path.unlink(missing_ok=True)

    def run(self, steps: Sequence[Step]) -> None:
        """Run these steps; the table is there however this ends."""
        self.clear(steps)
        try:
            self.write()
            for number, step in enumerate(steps, 1):
                self._run_step(step, f"[{number}/{len(steps)}]")
                self.write()
        finally:
            self.write()

    def _run_step(self, step: Step, place: str) -> None:
        began, outcome = time.monotonic(), "interrupted"
        left = self.end - began - GRACE
        limit = min(step.limit, left)
        if left < LEAST:
            self.outcomes[step.name] = {"outcome": "not run: no time left", "seconds": 0.0}
            self.say(f"{place} {step.title}: not run: no time left")
            return
        try:
            self.say(f"{place} {step.title} (at most {limit:.0f} s) ...")
            outcome = self._outcome(step, limit)
        finally:
            took = time.monotonic() - began
            self.outcomes[step.name] = {"outcome": outcome, "seconds": took}
            self.date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
            found = read_results(self.results_of(step))["found"]
            self.say(f"{place} {step.title}: {outcome} after {took:.1f} s{': ' if found else ''}{found}")

    def _outcome(self, step: Step, limit: float) -> str:
        """Run the step's process and say how it ended."""
        command = step.command or (sys.executable, str(ROOT / "benchmarks" / "gpu_steps.py"), step.name,
                                   f"--out={self.results_of(step)}", f"--folder={self.folder}", *self.options)
        with open(self.log_of(step), "wb") as log, process_group(command, log) as process:
            try:
                code = process.wait(limit)
            except subprocess.TimeoutExpired:
                return f"ended at its limit of {limit:.0f} s"
        if code == 0:
            reason = read_results(self.results_of(step))["skipped"]
            return f"skipped: {reason}" if reason else "ok"
        what = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        return f"failed ({what}): {last_line(self.log_of(step))}"

    def write(self) -> None:
        """The outcomes for a later call, and the table."""
        atomic_write_text(self.folder / "report.json", json.dumps(
            {"options": list(self.options), "date": self.date, "outcomes": self.outcomes}, indent=1) + "\n")
        results = {step.name: read_results(self.results_of(step)) for step in self.steps}
        names = [(step.name, step.title) for step in self.steps]
        atomic_write_text(self.dest, table(Report(self.quick, self.date, names, self.outcomes, results)))


@contextlib.contextmanager
def process_group(command: Sequence[str], log: Any) -> Iterator[subprocess.Popen]:
    """A process in a group of its own. When the block ends nothing of that group is left."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT,
                               start_new_session=True)
    try:
        yield process
    finally:
        try:
            if process.poll() is None:
                send(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
        finally:                                # A second Ctrl-C comes here at once.
            send(process.pid, signal.SIGKILL)   # Also to children that outlived the process.
            process.wait()


def send(group: int, number: signal.Signals) -> None:
    """A signal to a process group, if it is still there."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def last_line(path: Path) -> str:
    """The last line of a log, without what would not fit into a table."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it printed nothing"


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise Interrupted inside the block, so that what it has begun is ended in order."""
    def interrupt(number: int, _frame: Any) -> None:
        raise Interrupted(number)
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

#----------------------------------------------------------------------------

def chosen(names: list[str]) -> list[Step]:
    """The steps of these names, in their order. Raises UserError."""
    known = [step.name for step in STEPS]
    if unknown := sorted(set(names) - set(known)):
        raise UserError(f"--only={','.join(unknown)}: no such step: choose from {', '.join(known)}, or none")
    return [step for step in STEPS if step.name in names]


@click.command(cls=cli.Command)
@click.option("--minutes", metavar="FLOAT", type=cli.FloatRange(min=0, min_open=True), default=8, show_default=True,
              help="For everything together")
@click.option("--quick", is_flag=True, help="In miniature, for a look at whether it runs")
@click.option("--only", metavar="[STEP,STEP...|none]", type=cli.StrList(), default=None,
              help="Run these steps; results of the others stay as they are in --folder  [default: all, anew]")
@click.option("--folder", metavar="DIR", type=cli.PathType(), default=str(ROOT / "build" / "gpu_report"),
              help="For results as JSON, logs "
              "and files of the steps  [default: build/gpu_report]")
@click.option("--dest", metavar="FILE", type=cli.PathType(), default=None,
              help="The table  [default: benchmarks/results/gpu.md; with "
              "--quick and without a GPU gpu.md in --folder]")
@cli.device_option()
def main(minutes: float, quick: bool, only: list[str] | None, folder: str, dest: str | None, device: str) -> None:
    """Measure what matters on one GPU, whatever hangs or crashes meanwhile."""
    kind = misc.select_device(device)
    if kind not in ("cuda", "cpu"):
        raise UserError(f"--device={device}: a report is made of a GPU, and on a CPU with --quick: use cuda or cpu")
    steps = list(STEPS) if only is None else chosen(only)
    if kind == "cpu" and not quick and steps:
        raise UserError("--device=cpu: a processor would need days at the sizes of a GPU: add --quick")
    place = Path(folder).resolve()
    target = Path(dest).resolve() if dest else place / "gpu.md" if quick else RESULT
    if only is None:
        shutil.rmtree(place / "training", ignore_errors=True)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UserError(f"--folder={folder}: cannot be made ({err.strerror or err}): name a place that you may write "
                        "to") from err
    runner = Runner(STEPS, place, target, 60 * minutes, [f"--device={kind}", *(["--quick"] if quick else [])], quick)
    if only is not None:
        runner.continue_from_folder()
    try:
        with interruptible():
            runner.run(steps)
    except Interrupted as interruption:
        click.echo(f"interrupted; the table has what was found: {target}", err=True)
        sys.exit(128 + interruption.args[0])
    click.echo(f"table: {target}")


if __name__ == "__main__":
    main()
