# SPDX-License-Identifier: Apache-2.0
"""How long a run will take, from a few of its iterations on this machine. Nothing is written.

Every phase is timed by itself, with the run's own networks, data, micro-batches and processes, and counted as often as
the run has it: path lengths every k-th iteration and only after their first million images. Weights are random, which
moves no time. Left out: the start (class table, compilation), sample sheets, snapshots, states and metrics.
"""
import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.util import format_bytes, format_time
from torch_utils import distributed, misc
from torch_utils.memory import peak_memory
from training.config import TrainConfig
from training.dataset import ImageDataset
from training.run.autotuning import autotunes
from training.run.batch_size import explained_memory_errors
from training.run.networks import make_classifier, make_networks
from training.run.training_data import TrainingData
from training.step.batches import BatchSource
from training.step.phases import Phase
from training.trainer import Progress, Trainer

WARM_UP = 2                 # Iterations that are not counted: compilation, caches, the loader's start.
MIN_ITERATIONS = 3
SECONDS = 10.0              # Go on for so long, if iterations are short.
MICRO_BATCHES = 4           # Where an iteration has more, so many are run, and one alone; the rest is computed.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class StageTime:
    """What a stage takes on these processes. Seconds are of all its iterations, or means over the stage."""

    resolution: int
    processes: int
    batch: int
    batch_gpu: int
    total_kimg: float
    phases: dict[str, float]        # Seconds of one run of each phase; 'EMA': of what ends an iteration.
    runs: dict[str, int]            # How often the stage has each.
    data_wait: float                # Share of the time.
    peak_memory: int                # Bytes of the process with most: on GPUs the device's, elsewhere the process's.

    @property
    def total_seconds(self) -> float:
        return sum(self.phases[name] * count for name, count in self.runs.items())

    @property
    def sec_per_iteration(self) -> float:
        return self.total_seconds / max(self.runs["EMA"], 1)

    @property
    def sec_per_kimg(self) -> float:
        return self.sec_per_iteration / self.batch * 1e3

    def as_dict(self) -> dict[str, Any]:
        """For a line of JSON."""
        return dataclasses.asdict(self) | {
            "sec_per_iteration": self.sec_per_iteration, "sec_per_kimg": self.sec_per_kimg,
            "images_per_sec": 1e3 / self.sec_per_kimg, "total_seconds": self.total_seconds,
            "total_days": self.total_seconds / 86400}

    def lines(self) -> list[str]:
        """For people."""
        cut = self.batch // (self.processes * self.batch_gpu)
        names = ", ".join(f"{name} {seconds:.3g} s (x {self.runs[name]})" for name, seconds in self.phases.items())
        return [f"{self.resolution} pixels, batch {self.batch} = {self.processes} process(es) x {self.batch_gpu} x "
                f"{cut} micro-batches",
                f"  phases:      {names}",
                f"  speed:       {self.sec_per_iteration:.3g} s/iteration, {self.sec_per_kimg:.3g} s/kimg, "
                f"{1e3 / self.sec_per_kimg:.3g} images/s",
                f"  data wait:   {100 * self.data_wait:.1f} %",
                f"  peak memory: {format_bytes(self.peak_memory)} per process",
                f"  {self.total_kimg:g} kimg:  {format_time(self.total_seconds)}"]


def runs_of_stage(config: TrainConfig, phases: list[Phase]) -> dict[str, int]:
    """How often each phase runs from the first image to `total_kimg`, and 'EMA': the number of iterations."""
    total = int(config.total_kimg * 1000)
    iterations = math.ceil(total / config.batch)
    counts = {}
    for phase in phases:
        first = next((nimg for nimg in (0, int(config.loss.pl_start_kimg * 1000)) if phase.is_active(nimg)), None)
        if first is not None:
            begin = math.ceil(math.ceil(first / config.batch) / phase.interval)
            counts[phase.name] = math.ceil(iterations / phase.interval) - begin
    return {name: count for name, count in counts.items() if count > 0} | {"EMA": iterations}

#----------------------------------------------------------------------------

class Rehearsal:
    """A trainer and its data as the training loop has them, and a clock."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, device: torch.device):
        G, D = make_networks(dataclasses.replace(config, embedding="random"), dataset, None, device)
        classifier = make_classifier(config, dataset.class_names, device)
        self.trainer = Trainer(config, G, D, classifier, device, real_distance=1.0)
        self.runs = runs_of_stage(config, self.trainer.phases)
        self.data = TrainingData(self.trainer, dataset)

    def iteration(self, batches: BatchSource, number: int) -> dict[str, float]:
        """Seconds of each phase that is due, and of what follows them ('EMA').

        All iterations are of the stage's last image: phases that begin late take part, and the blur is gone.
        """
        config, times = self.trainer.config, {}
        self.trainer.progress = Progress(cur_nimg=int(config.total_kimg * 1000), batch_idx=number)

        @contextlib.contextmanager
        def clock(name: str) -> Iterator[None]:
            began = time.perf_counter()
            with explained_memory_errors(name, config, self.trainer.device):
                yield
                self._wait()
            times[name] = time.perf_counter() - began

        began = time.perf_counter()
        self.trainer.step(batches, clock)
        self._wait()
        times["EMA"] = time.perf_counter() - began - sum(times.values())
        return {name: seconds for name, seconds in times.items() if name in self.runs}

    def _wait(self) -> None:
        """Until the device is done."""
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)

    def medians(self, micro_batches: int) -> tuple[dict[str, float], float]:
        """(seconds of each phase with so many micro-batches, seconds of an iteration spent on waiting for images)."""
        batches = self.data.batches(micro_batches)
        for number in range(WARM_UP):
            self.iteration(batches, number)
        batches.wait_seconds()
        found: dict[str, list[float]] = {}
        rounds, go_on, start = 0, True, time.perf_counter()
        while go_on:
            for name, seconds in self.iteration(batches, rounds).items():
                found.setdefault(name, []).append(seconds)
            rounds += 1
            enough = rounds >= MIN_ITERATIONS and time.perf_counter() - start >= SECONDS
            go_on = not distributed.broadcast_object(enough)        # All stop together.
        wait = batches.wait_seconds() / rounds
        return {name: statistics.median(seconds) for name, seconds in found.items()}, wait


def full_phases(few: dict[str, float], one: dict[str, float], num_few: int, num_all: int) -> dict[str, float]:
    """Seconds with all micro-batches, from those with a few and with one: a line, as each adds the same."""
    return {name: few[name] + (num_all - num_few) * max(few[name] - one[name], 0.0) / (num_few - 1) if name != "EMA"
            else few[name] for name in few}


@misc.full_precision()
@misc.autotuning(False)
def time_stage(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> StageTime:
    """Run a few iterations; every process calls this.

    Args:
        config: As the run has it.
        dataset: Its data.
        device: Where this process computes.

    Raises:
        UserError: no image to train on; missing weights; out of memory, with a remedy.
    """
    if config.total_kimg * 1000 < 1:
        raise UserError(f"--kimg={config.total_kimg:g} beside --bench: a run without images takes no time: give the "
                        "length that the run will have")
    torch.backends.cudnn.benchmark = autotunes(config, 0, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rehearsal = Rehearsal(config, dataset, device)
    num_all = config.batch // (config.batch_gpu * distributed.world_size())
    num_few = min(num_all, MICRO_BATCHES)
    try:
        phases, wait = rehearsal.medians(num_few)
        if num_all > num_few:
            phases = full_phases(phases, rehearsal.medians(1)[0], num_few, num_all)
            wait *= num_all / num_few
    finally:
        rehearsal.data.close()
    everyones = distributed.all_gather_object((phases, wait, peak_memory(device) or 0))
    slowest = {name: max(times[name] for times, _, _ in everyones) for name in phases}
    stage = StageTime(config.generator.img_resolution, distributed.world_size(), config.batch, config.batch_gpu,
                      config.total_kimg, slowest, rehearsal.runs, 0.0, max(peak for _, _, peak in everyones))
    share = max(wait for _, wait, _ in everyones) / stage.sec_per_iteration
    return dataclasses.replace(stage, data_wait=min(share, 1.0))
