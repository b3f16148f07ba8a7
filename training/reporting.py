# SPDX-License-Identifier: Apache-2.0
"""What a run tells: the status line, stats.jsonl, TensorBoard, sample sheets. From rank 0, and always appended."""
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib.util import format_bytes, format_time
from torch_utils import distributed
from torch_utils.images import image_grid, save_image, to_uint8_sample
from torch_utils.misc import evaluating, one_hot
from torch_utils.training_stats import Stat
from training.dataset import ImageDataset
from training.networks_stylegan3 import Generator

#----------------------------------------------------------------------------

class Reporter:
    """Writes one line per tick to the screen and to log.txt, and the same numbers to stats.jsonl and TensorBoard."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._writer = None
        if distributed.rank() == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
                self._writer = SummaryWriter(folder)
            except ImportError:
                self.say("TensorBoard is not installed: no event files (pip install tensorboard)")

    def say(self, text: str) -> None:
        """Print a line and append it to log.txt."""
        if distributed.rank() == 0:
            print(text, flush=True)
            with open(self.folder / "log.txt", "a") as f:
                f.write(text + "\n")

    def tick(self, stats: dict[str, Stat], cur_nimg: int, total_nimg: int, progress: dict[str, float]) -> None:
        """Report one interval. `progress` holds tick, elapsed, sec_per_tick, sec_per_kimg, data_wait, maintenance."""
        if distributed.rank() != 0:
            return
        left = (total_nimg - cur_nimg) / 1e3 * progress["sec_per_kimg"]
        parts = [f"tick {progress['tick']:<4d}", f"kimg {cur_nimg / 1e3:<9.1f}",
                 f"time {format_time(progress['elapsed']):<11s}", f"eta {format_time(max(left, 0)):<11s}",
                 f"sec/kimg {progress['sec_per_kimg']:<8.3g}", f"wait {100 * progress['data_wait']:<5.1f}%"]
        for label, name in (("real", "Loss/signs/real"), ("fake", "Loss/signs/fake")):
            if name in stats:
                parts.append(f"sign {label} {stats[name].mean:<+6.2f}")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        parts.append(f"cpumem {format_bytes(peak)}")
        if torch.cuda.is_available():
            parts.append(f"gpumem {format_bytes(torch.cuda.max_memory_allocated())}")
        self.say("  ".join(parts))
        line = {name: stat.as_dict() for name, stat in stats.items()}
        line |= {"cur_nimg": cur_nimg, "timestamp": time.time()} | {f"Progress/{k}": v for k, v in progress.items()}
        self._write("stats.jsonl", line)
        if self._writer is not None:
            for name, stat in stats.items():
                self._writer.add_scalar(name, stat.mean, cur_nimg)
            for name, value in progress.items():
                self._writer.add_scalar(f"Progress/{name}", value, cur_nimg)
            self._writer.flush()

    def metrics(self, results: list[dict[str, Any]], cur_nimg: int, snapshot: str) -> None:
        """Report metric results: one line each to metric-<name>.jsonl and one number each to the screen."""
        if distributed.rank() != 0:
            return
        for result in results:
            line = result | {"snapshot_pkl": snapshot, "timestamp": time.time()}
            self._write(f"metric-{result['metric']}.jsonl", line)
            values = "  ".join(f"{name} {value:.4g}" for name, value in result["results"].items())
            self.say(f"metric {result['metric']:<14s} {values}")
            for name, value in result["results"].items():
                if self._writer is not None:
                    self._writer.add_scalar(f"Metrics/{name}", value, cur_nimg)

    def _write(self, name: str, line: dict[str, Any]) -> None:
        with open(self.folder / name, "a") as f:
            f.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

#----------------------------------------------------------------------------

class SampleSheets:
    """A picture of real images and, again and again, one of the same latents: a row per class."""

    def __init__(self, folder: Path, dataset: ImageDataset, c_dim: int, z_dim: int, seed: int, max_pixels: int = 2048):
        self.folder = folder
        per_side = max(min(max_pixels // dataset.resolution, 16), 2)
        self.columns = per_side
        self.rows = min(c_dim, per_side) if c_dim > 0 else per_side
        rng = np.random.RandomState(seed)
        self.items, self.labels = [], []
        for row in range(self.rows):
            choices = np.flatnonzero(dataset.labels == row) if c_dim > 0 else np.arange(len(dataset))
            choices = choices if len(choices) else np.arange(len(dataset))
            self.items += rng.choice(choices, self.columns).tolist()
            self.labels += [row] * self.columns
        self.z = torch.from_numpy(rng.randn(len(self.items), z_dim)).float()
        self.c_dim = c_dim

    def save_reals(self, dataset: ImageDataset) -> None:
        """reals.png: images of the same classes as the samples."""
        images = torch.stack([torch.from_numpy(dataset[i][0]) for i in self.items])
        save_image(self.folder / "reals.png", image_grid(images, self.columns))

    @torch.no_grad()
    def save_fakes(self, name: str, G_ema: Generator, device: torch.device, batch: int = 32) -> None:
        """<name>.png: samples of G_ema."""
        with evaluating(G_ema):
            images = torch.cat([to_uint8_sample(G_ema(z, c)).cpu() for z, c in self._batches(device, batch)])
        save_image(self.folder / f"{name}.png", image_grid(images, self.columns))

    def _batches(self, device: torch.device, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        labels = torch.tensor(self.labels)
        for z, label in zip(self.z.split(batch), labels.split(batch), strict=True):
            yield z.to(device), one_hot(label, self.c_dim).to(device)
