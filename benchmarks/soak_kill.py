# SPDX-License-Identifier: Apache-2.0
"""Kill a training run again and again, and see whether it ends as if nothing had happened.

A small run on the CPU writes a state after every iteration. SIGKILL hits all its processes at random moments: while it
starts, trains, copies, writes, renames. After each kill the state must load, with all checksums right, and must not be
older than the one after the kill before. At the end every tensor of the state must be equal, bit by bit, to that of a
run that nobody killed.

Before that come three faults that could hang a run or mix two: the same command a second time while the first one
trains, a loader process that is stopped, and shared memory that is full. Each must end in seconds with one line and
exit code 2, and the run goes on from its state afterwards.
"""
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from torch_utils.launch import children_of, state_of  # noqa: E402
from training.data import loading  # noqa: E402
from training.run import preflight  # noqa: E402
from training.run.folder import STATE_FILE, has_state  # noqa: E402
from training.run.resume import load_state  # noqa: E402

OPTIONS = ("--cfg=stylegan3-t --preset=demo --cbase=64 --cmax=8 --batch=8 --batch-gpu=4 --device=cpu --workers=0 "
           "--metrics=none --backbones=local:random --tick=0.08 --snap=1 --keep=2 --snap-state=0.00001").split()

#----------------------------------------------------------------------------

def write_images(path: Path) -> None:
    """A data set of 16 pictures of 16 pixels."""
    rng = np.random.RandomState(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(16):
            with archive.open(f"img{i:02d}.png", "w") as f:
                PIL.Image.fromarray(rng.randint(0, 256, [16, 16, 3], dtype=np.uint8)).save(f, format="PNG")


class Job:
    """One start of the command: its processes, forked from this one, which has imported everything already."""

    def __init__(self, work: Path, name: str, kimg: float, world_size: int, *more: str,
                 before: Callable[[], None] = lambda: None):
        """`before` is called in each process, before the command."""
        options = [*OPTIONS, f"--outdir={work / name}", f"--data={work}/images.zip", f"--kimg={kimg:g}", *more]
        self._before = before
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        self.log, self.codes = work / f"{name}.log", {}
        sys.stdout.flush()
        self.pids = [self._fork(options, rank, world_size, port) for rank in range(world_size)]

    def _fork(self, options: list[str], rank: int, world_size: int, port: int) -> int:
        pid = os.fork()
        if pid > 0:
            return pid
        code = 1
        try:
            with open(self.log, "a", encoding="utf-8") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            if world_size > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                               "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            self._before()
            train.main.main(options)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)      # Nothing of this script may run in the child.

    def said(self) -> str:
        """What its processes have printed."""
        return self.log.read_text(encoding="utf-8")

    def has_ended(self) -> bool:
        """Whether a process of it has."""
        for pid in set(self.pids) - set(self.codes):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return bool(self.codes)

    def code(self, seconds: float) -> int:
        """The exit code of the first process, which must end within so many seconds."""
        end = time.monotonic() + seconds
        while not self.has_ended():
            if time.monotonic() > end:
                self.kill()
                raise UserError(f"the run did not end within {seconds:.0f} s: {self.said()[-2000:]}")
            time.sleep(0.05)
        return self.codes[self.pids[0]]

    def wait(self) -> None:
        """Until all have ended well."""
        for pid in set(self.pids) - set(self.codes):
            self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if any(self.codes.values()):
            raise UserError(f"the run failed: {self.said()[-2000:]}")

    def kill(self) -> None:
        """SIGKILL to all."""
        for pid in set(self.pids) - set(self.codes):
            os.kill(pid, signal.SIGKILL)
        for pid in set(self.pids) - set(self.codes):
            os.waitpid(pid, 0)


def run_folder(work: Path, name: str) -> Path | None:
    """The newest run below that has a state."""
    return max((p for p in (work / name).glob("0*") if has_state(p)), default=None)


def wait_for_saves(job: Job, work: Path, count: int, name: str = "killed") -> None:
    """Until the run has replaced its state so many times, or has ended."""
    seen: set[tuple] = set()
    while not job.has_ended() and len(seen) <= count:
        folder = run_folder(work, name)
        if folder is not None and (folder / STATE_FILE).is_file():
            info = (folder / STATE_FILE).stat()
            seen.add((folder.name, info.st_ino, info.st_mtime_ns))
        elif not seen:
            seen.add(())        # No state yet: the first one counts as a replacement.
        time.sleep(0.002)


def differences(a: object, b: object, path: str = "") -> list[str]:
    """Where two states differ, bit by bit; times of day apart."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in sorted(set(a) | set(b), key=str) if key != "elapsed"
                for d in differences(a.get(key), b.get(key), f"{path}/{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    return [] if a == b else [path]


def count_tensors(value: object) -> int:
    """Tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return 1
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(count_tensors, items))


def kill_again_and_again(work: Path, kills: int, seed: int, kimg: float, gpus: int) -> list[tuple]:
    """(seconds that the process lived, half-written files that it left, images in the state) of each kill.

    The moment is a random time after a random number of saves, so that it does not depend on the machine's speed; every
    fifth kill hits the start.
    """
    rng, rows, nimg = random.Random(seed), [], 0
    while len(rows) < kills:
        began, job = time.monotonic(), Job(work, "killed", kimg, gpus)
        if len(rows) % 5 == 4:
            time.sleep(rng.uniform(0, 3))
        else:
            wait_for_saves(job, work, rng.randint(1, 8))
            time.sleep(rng.uniform(0, 0.5))
        if job.has_ended():
            raise UserError(f"the run ended before kill {len(rows) + 1} of {kills}: take more --kimg, or see "
                            f"what it said: {job.said()[-2000:]}")
        job.kill()
        folder = run_folder(work, "killed")
        halves = len(list(folder.glob(".*.tmp"))) if folder else 0
        state = load_state(folder, print) if folder else None
        reached = state["counters"]["cur_nimg"] if state else 0
        if reached < nimg:
            raise UserError(f"kill {len(rows) + 1}: the state went back from {nimg} to {reached} images")
        nimg = reached
        rows.append((time.monotonic() - began, halves, nimg))
        click.echo(f"kill {len(rows):3d} of {kills}: after {rows[-1][0]:5.1f} s, {halves} half-written files, state at "
                   f"{nimg} images: loads")
    return rows


def ends_with(job: Job, seconds: float, pattern: str, since: int) -> str:
    """The line that a faulty start ends with. It must come in time, with exit code 2."""
    code, said = job.code(seconds), job.said()[since:]
    match = re.search(f"^Error: .*{pattern}.*$", said, re.M)
    if code != 2 or match is None or "Traceback" in said:
        raise UserError(f"expected exit code 2 and a line with {pattern!r}, got {code}: {said[-2000:]}")
    return match[0]


def seconds_of(fault: Callable[[], None]) -> float:
    """How long it takes."""
    began = time.monotonic()
    fault()
    return time.monotonic() - began


def second_starter(work: Path) -> None:
    """The same command while the first one trains: it is refused and writes nothing."""
    first = Job(work, "second", 100, 1)
    wait_for_saves(first, work, 1, "second")
    folder = run_folder(work, "second")
    size = first.log.stat().st_size
    second = Job(work, "second", 100, 1)
    ends_with(second, 60, "is in use by process", 0)
    if list((work / "second").iterdir()) != [folder] or first.has_ended() or size > first.log.stat().st_size:
        raise UserError("the second start disturbed the first one")
    first.kill()


def deaf_loader(work: Path) -> None:
    """A loader process that is stopped: the run ends, and with it the loader."""
    def soon() -> None:
        loading.STOPPED_SECONDS = 2.0
    job = Job(work, "second", 100, 1, "--workers=1", before=soon)
    since, end = job.log.stat().st_size if job.log.exists() else 0, time.monotonic() + 60
    while "first iteration done" not in job.said()[since:] and time.monotonic() < end:
        time.sleep(0.05)
    loaders = children_of(job.pids[0])
    for pid in loaders:
        os.kill(pid, signal.SIGSTOP)
    ends_with(job, 60, "is stopped", since)
    if left := [pid for pid in loaders if state_of(pid) not in ("", "Z")]:
        raise UserError(f"loader processes {left} are left")


def full_shared_memory(work: Path) -> None:
    """Full shared memory, simulated in the loader processes: the check before the start is left out."""
    def fill() -> None:
        preflight.SHARED_MEMORY = Path("/nowhere")
        torch.Tensor.share_memory_ = no_space       # type: ignore[method-assign]

    def no_space(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")
    job = Job(work, "second", 100, 1, "--workers=2", before=fill)
    ends_with(job, 60, "shared memory .*--workers", job.log.stat().st_size if job.log.exists() else 0)


def faults(work: Path) -> dict[str, float]:
    """Seconds to the end of each fault; then the run must go on."""
    took = {fault.__doc__.partition(":")[0]: seconds_of(lambda fault=fault: fault(work))
            for fault in (second_starter, deaf_loader, full_shared_memory)}
    for name, seconds in took.items():
        click.echo(f"{name}: ended with its line, {seconds:.1f} s")
    job = Job(work, "second", 100, 1)
    wait_for_saves(job, work, 1, "second")
    if job.has_ended():
        raise UserError(f"the run does not go on: {job.said()[-2000:]}")
    job.kill()
    return took


def table(rows: list[tuple], took: dict[str, float], command: str, total: int, tensors: int, minutes: float) -> str:
    """The result as Markdown."""
    lines = ["# Killed at random moments", "",
             f"`{command}`, {minutes:.0f} minutes on a CPU, torch {torch.__version__}.", "",
             f"{len(rows)} times SIGKILL to all processes of a run that writes a state after every iteration. Each time"
             " the state loaded, with right checksums, and had not gone back. Then the run was left alone: its state at"
             f" {total} images is equal to that of an unbroken run in all {tensors} tensors, bit by bit.", "",
             "| kill | seconds after the start | half-written files left | images in the state |", "|---|---|---|---|"]
    lines += [f"| {i} | {wait:.1f} | {halves} | {nimg} |" for i, (wait, halves, nimg) in enumerate(rows, start=1)]
    lines += ["", "Other faults, each of which ended with one line and exit code 2:", "",
              "| fault | seconds, start of the run included |", "|---|---|"]
    lines += [f"| {name} | {seconds:.1f} |" for name, seconds in took.items()]
    return "\n".join(lines) + "\n"


@click.command(cls=cli.Command)
@click.option("--kills", metavar="INT", type=cli.IntRange(min=1), default=20, show_default=True, help="How often")
@click.option("--seed", metavar="INT", type=cli.Seed(), default=0, show_default=True, help="When to kill")
@click.option("--gpus", metavar="INT", type=cli.IntRange(min=1), default=1, show_default=True, help="Processes")
@click.option("--kimg", metavar="KIMG", type=cli.FloatRange(min=0), default=2.0, show_default=True,
              help="Length of the run")
@click.option("--dest", metavar="FILE", type=cli.PathType(), default=str(ROOT / "benchmarks/results/soak_kill.md"),
              show_default=True, help="Where the table goes")
def main(kills: int, seed: int, gpus: int, kimg: float, dest: str) -> None:
    """Kill a small training run at random moments; compare its end with that of an unbroken one.

    \b
    Examples:
      python benchmarks/soak_kill.py
      python benchmarks/soak_kill.py --kills=5 --gpus=2 --kimg=0.8
    """
    started = time.monotonic()
    torch.set_num_threads(1)        # Threads do not survive a fork.
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        write_images(work / "images.zip")
        took = faults(work)
        rows = kill_again_and_again(work, kills, seed, kimg, gpus)
        for run in ("killed", "whole"):
            Job(work, run, kimg, gpus).wait()
        states = [load_state(run_folder(work, run), print) for run in ("killed", "whole")]
        if different := differences(*states):
            raise UserError(f"{len(different)} parts of the state differ, first {different[0]}")
    total = states[0]["counters"]["cur_nimg"]
    command = f"python benchmarks/soak_kill.py --kills={kills} --seed={seed} --gpus={gpus} --kimg={kimg:g}"
    minutes = (time.monotonic() - started) / 60
    atomic_write_text(dest, table(rows, took, command, total, count_tensors(states[0]), minutes))
    click.echo(f"equal in all {count_tensors(states[0])} tensors at {total} images; {dest}")


if __name__ == "__main__":
    main()
