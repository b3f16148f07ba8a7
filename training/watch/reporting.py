# SPDX-License-Identifier: Apache-2.0
"""What a run tells: status line, stats.jsonl, TensorBoard, W&B, sample sheets. From rank 0, and always appended."""
import contextlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Protocol

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import append_text, atomic_write_text, first_line, format_bytes, format_time, parse_json
from torch_utils import distributed
from torch_utils.images import image_grid, save_image, to_uint8_sample
from torch_utils.memory import peak_memory
from torch_utils.misc import random_state
from torch_utils.training_stats import Stat
from training.config import TrainConfig, to_dict
from training.dataset import ImageDataset
from training.generator.synthesis import synthesize
from training.networks_stylegan3 import Generator
from training.run.folder import run_start
from training.watch.health import Verdict
from training.watch.html_report import REPORT_FILE, write_report

WANDB_FILE = "wandb-run.json"       # The id under which the service knows the run.
REPORT_SECONDS = 30                 # Drawing takes one or two.

#----------------------------------------------------------------------------
# Services that draw curves. stats.jsonl is always written and holds the same numbers.

class Curves(Protocol):
    """Takes numbers by name."""

    def continue_at(self, cur_nimg: int) -> None:
        """The run goes on from a state after `cur_nimg` images: what was said of later ones is void."""

    def scalars(self, values: dict[str, float], cur_nimg: int) -> None:
        """Numbers after `cur_nimg` images."""

    def picture(self, name: str, path: Path, cur_nimg: int) -> None:
        """A picture that lies at `path`."""

    def close(self) -> None:
        """The run has ended."""


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path):
        from torch.utils.tensorboard import SummaryWriter
        self._open = SummaryWriter
        self._writer: SummaryWriter | None = None
        self._purge: int | None = None
        self._folder = folder

    def continue_at(self, cur_nimg: int) -> None:
        """A killed run wrote numbers after its last state, which are written again: TensorBoard drops the old ones."""
        self._purge = cur_nimg + 1

    def scalars(self, values: dict[str, float], cur_nimg: int) -> None:
        if self._writer is None:
            self._writer = self._open(self._folder, purge_step=self._purge)
        for name, value in values.items():
            self._writer.add_scalar(name, value, cur_nimg)
        self._writer.flush()

    def picture(self, name: str, path: Path, cur_nimg: int) -> None:
        """Nothing: the pictures already lie beside the event files."""

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def import_wandb(project: str) -> ModuleType:
    """The package wandb, which is asked for by `--wandb` and is no dependency.

    Raises:
        UserError: it is not installed, or broken.
    """
    try:
        import wandb
    except ImportError as err:
        raise UserError(f"--wandb={project}: the package wandb is not installed: pip install wandb") from err
    except Exception as err:
        raise UserError(f"--wandb={project}: the package wandb cannot be imported ({type(err).__name__}: "
                        f"{first_line(err)}): install it anew, or leave --wandb out") from err
    module: ModuleType = wandb
    return module


def read_wandb_id(path: Path) -> str:
    """The id in the file; one is made if there is none that can be read."""
    try:
        return str(parse_json(path.read_text(encoding="utf-8"))["id"])
    except (OSError, ValueError, KeyError, TypeError):
        name = uuid.uuid4().hex[:8]
        atomic_write_text(path, json.dumps({"id": name}) + "\n")
        return name


class WeightsAndBiases:
    """One run of the service per run folder, however often it is restarted. WANDB_MODE=offline needs no network."""

    def __init__(self, folder: Path, config: TrainConfig, project: str):
        self._wandb = import_wandb(project)
        # The x axis is kimg: a run that was killed shows some images twice, and the service's own steps only grow.
        self._run = self._wandb.init(project=project, id=read_wandb_id(folder / WANDB_FILE), name=folder.name,
                                     dir=str(folder), config=to_dict(config), resume="allow")
        self._run.define_metric("kimg")
        self._run.define_metric("*", step_metric="kimg")

    def continue_at(self, cur_nimg: int) -> None:
        """Nothing: the service draws by kimg, and of two values at one place the later."""

    def scalars(self, values: dict[str, float], cur_nimg: int) -> None:
        self._run.log(values | {"kimg": cur_nimg / 1e3})

    def picture(self, name: str, path: Path, cur_nimg: int) -> None:
        self._run.log({name: self._wandb.Image(str(path)), "kimg": cur_nimg / 1e3})

    def close(self) -> None:
        self._run.finish()

#----------------------------------------------------------------------------

def memory_gb() -> dict[str, float]:
    """Peak memory of this process in GiB: of the CPU, where the system tells, and of the GPU if there is one."""
    peak = peak_memory()
    memory = {} if peak is None else {"cpu_mem_gb": peak / 2 ** 30}
    if torch.cuda.is_available():
        memory["gpu_mem_gb"] = torch.cuda.max_memory_allocated() / 2 ** 30
    return memory


def print_nowhere() -> None:
    """Nobody reads the output any more: what is printed from now on, and when Python ends, meets no error."""
    with contextlib.suppress(OSError):      # Also what is no file, such as the output within a test.
        null = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, sys.stdout.fileno())
        finally:
            os.close(null)


class Reporter:
    """Writes one line per tick to the screen and to log.txt, and the same numbers to stats.jsonl, TensorBoard and, with
    `config.wandb`, Weights & Biases. Only log.txt, stats.jsonl and the metrics' files may stop a run (a full disk):
    of everything else that fails one line tells, and the run goes on without it."""

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder, self.run_start = folder, run_start(folder)
        self._curves: list[Curves] = []
        self._seconds = self._kimg = 0.0        # Reported by this process so far, with maintenance.
        self._drawn = time.monotonic()          # When report.html was.
        if distributed.rank() == 0:
            self._open("TensorBoard", "tensorboard", lambda: TensorBoard(folder))
            if project := config.wandb:
                self._open("WeightsAndBiases", "wandb", lambda: WeightsAndBiases(folder, config, project))

    def _open(self, name: str, package: str, make: Callable[[], Curves]) -> None:
        """Add a service. Whatever it does while it starts, the run goes on without it."""
        try:
            self._curves.append(make())
        except (Exception, SystemExit) as err:
            remedy = f": pip install {package}" if isinstance(err, ImportError) else ""
            self.say(f"NOTE: {name} gets no numbers until the run is started again: {type(err).__name__}: "
                     f"{first_line(err)}{remedy}")

    def continue_at(self, cur_nimg: int) -> None:
        """The run goes on from a state after `cur_nimg` images."""
        self._draw(lambda curves: curves.continue_at(cur_nimg))

    def say(self, text: str) -> None:
        """Print a line and append it to log.txt."""
        if distributed.rank() == 0:
            try:
                print(text, flush=True)
            except OSError:     # The terminal was closed, or the program that read the lines ended.
                print_nowhere()
            append_text(self.folder / "log.txt", text + "\n")

    def tick(self, stats: dict[str, Stat], cur_nimg: int, total_nimg: int, progress: dict[str, float | None],
             diagnosis: Mapping[str, float] = MappingProxyType({})) -> None:
        """Report one interval. The names of the numbers are explained in docs/watching.md.

        Args:
            stats: From the collector.
            progress: tick, elapsed, sec_per_tick, sec_per_kimg, data_wait, maintenance (seconds before this interval),
                nonfinite, and what else is known; None if it is not.
            diagnosis: What was measured of D, by the names of the curves; at snapshots, with --diagnose.
        """
        if distributed.rank() != 0:
            return
        known = {name: value for name, value in progress.items() if value is not None}
        seconds = known["sec_per_tick"] + known["maintenance"]
        self._seconds += seconds
        self._kimg += known["sec_per_tick"] / known["sec_per_kimg"]
        left = max(total_nimg - cur_nimg, 0) / 1e3 * self._seconds / self._kimg
        known |= {"img_per_sec": 1e3 / known["sec_per_kimg"], "eta_sec": left,
                  "maintenance_share": known["maintenance"] / max(seconds, 1e-9)} | memory_gb()
        self.say(status_line(stats, cur_nimg, known))
        numbers = {f"Progress/{name}": value for name, value in known.items()} | dict(diagnosis)
        line = {name: stat.as_dict() for name, stat in stats.items()}
        self._write("stats.jsonl", cur_nimg, line | numbers)
        means = {name: stat.mean for name, stat in stats.items()}
        self._scalars(means | numbers, cur_nimg)

    def metrics(self, results: list[dict[str, Any]], cur_nimg: int, snapshot: str) -> None:
        """Report metric results: one line each to metric-<name>.jsonl and one number each to the screen."""
        if distributed.rank() != 0:
            return
        for result in results:
            self._write(f"metric-{result['metric']}.jsonl", cur_nimg, result | {"snapshot_pkl": snapshot})
            values = "  ".join(f"{name} {value:.4g}" for name, value in result["results"].items())
            self.say(f"metric {result['metric']:<14s} {values}")
            self._scalars({f"Metrics/{name}": value for name, value in result["results"].items()}, cur_nimg)

    def verdict(self, verdict: Verdict, cur_nimg: int) -> None:
        """Say how the run is; also a line of health.jsonl."""
        if distributed.rank() == 0:
            self.say(f"VERDICT at kimg {cur_nimg / 1e3:.1f}: {verdict.name}: {verdict.text}")
            self._write("health.jsonl", cur_nimg,
                        {"verdict": verdict.name, "is_bad": verdict.is_bad, "text": verdict.text})

    def snapshot(self, fakes: str, cur_nimg: int) -> None:
        """A snapshot was written, with the sheet `fakes`: show it, and draw report.html anew. Never raises.

        Snapshots that follow one another faster than REPORT_SECONDS share a report; `close` draws the last one.
        """
        if distributed.rank() == 0:
            self._draw(lambda curves: curves.picture("fakes", self.folder / f"{fakes}.png", cur_nimg))
            if time.monotonic() - self._drawn > REPORT_SECONDS:
                self.refresh()

    def refresh(self) -> None:
        """Draw report.html anew. A picture is not worth a run: errors are told and not raised."""
        if distributed.rank() == 0:
            try:
                write_report(self.folder)
            except Exception as err:
                self.say(f"NOTE: {REPORT_FILE} was not refreshed: {type(err).__name__}: {first_line(err)}")
            self._drawn = time.monotonic()

    def _scalars(self, values: dict[str, float], cur_nimg: int) -> None:
        self._draw(lambda curves: curves.scalars(values, cur_nimg))

    def _draw(self, action: Callable[[Curves], None]) -> None:
        """Run `action` on every service; one that fails is told and given up."""
        for curves in list(self._curves):
            try:
                action(curves)
            except (Exception, SystemExit) as err:
                self._curves.remove(curves)
                self.say(f"NOTE: {type(curves).__name__} gets no more numbers until the run is started again: "
                         f"{type(err).__name__}: {first_line(err)}")

    def _write(self, name: str, cur_nimg: int, line: dict[str, Any]) -> None:
        line = line | {"cur_nimg": cur_nimg, "run_start": self.run_start, "timestamp": time.time()}
        append_text(self.folder / name, json.dumps(line) + "\n")

    def close(self) -> None:
        """The run has ended, for now."""
        self.refresh()
        self._draw(lambda curves: curves.close())


def status_line(stats: dict[str, Stat], cur_nimg: int, progress: dict[str, float]) -> str:
    """One interval on one line."""
    parts = [f"tick {progress['tick']:<4d}", f"kimg {cur_nimg / 1e3:<9.1f}",
             f"time {format_time(progress['elapsed']):<11s}", f"eta {format_time(progress['eta_sec']):<11s}",
             f"sec/kimg {progress['sec_per_kimg']:<8.3g}", f"img/s {progress['img_per_sec']:<7.3g}",
             f"wait {100 * progress['data_wait']:<4.1f}%", f"upkeep {100 * progress['maintenance_share']:<4.1f}%"]
    for kind in ("real", "fake"):
        if f"Loss/signs/{kind}" in stats:
            parts.append(f"sign {kind} {stats[f'Loss/signs/{kind}'].mean:<+5.2f}")
    if progress.get("diversity") is not None:
        parts.append(f"diversity {progress['diversity']:<5.2f}")
    for kind in ("cpu", "gpu"):
        if f"{kind}_mem_gb" in progress:
            parts.append(f"{kind}mem {format_bytes(progress[f'{kind}_mem_gb'] * 2 ** 30)}")
    if progress.get("nonfinite"):
        parts.append(f"nonfinite {progress['nonfinite']}")
    return "  ".join(parts)

#----------------------------------------------------------------------------

class SampleSheets:
    """A picture of real images and, again and again, one of the same latents: a row per class."""

    def __init__(self, folder: Path, dataset: ImageDataset, c_dim: int, z_dim: int, seed: int, max_pixels: int = 2048):
        self.folder = folder
        per_side = max(min(max_pixels // dataset.resolution, 16), 2)
        self.columns = per_side
        self.rows = min(c_dim, per_side) if c_dim > 0 else per_side
        rng = random_state(seed)
        self.items, self.labels = [], []
        for row in range(self.rows):
            choices = np.flatnonzero(dataset.labels == row) if c_dim > 0 else np.arange(len(dataset))
            choices = choices if len(choices) else np.arange(len(dataset))
            self.items += rng.choice(choices, self.columns).tolist()
            self.labels += [row] * self.columns
        self.z = torch.from_numpy(rng.randn(len(self.items), z_dim)).float()

    def save_reals(self, dataset: ImageDataset) -> None:
        """reals.png: images of the same classes as the samples."""
        images = torch.stack([torch.from_numpy(dataset[i][0]) for i in self.items])
        save_image(self.folder / "reals.png", image_grid(images, self.columns))

    def save_fakes(self, name: str, G_ema: Generator, batch: int = 32) -> None:
        """<name>.png: samples of G_ema."""
        parts = zip(self.z.split(batch), torch.tensor(self.labels).split(batch), strict=True)
        images = torch.cat([to_uint8_sample(synthesize(G_ema, z, labels)).cpu() for z, labels in parts])
        save_image(self.folder / f"{name}.png", image_grid(images, self.columns))
