# SPDX-License-Identifier: Apache-2.0
"""Throughput at one and two processes, and what saving and continuing cost at the size of ImageNet-256.

    python benchmarks/bench_distributed.py

The throughput is that of `train.py` with the demo's networks on random images. Saving is measured with the real
networks of the 256-pixel stage (nothing is trained: Adam's moments are made by hand), once with the training thread
doing nothing but waiting for the copy, as it does at `--snap-state`. Writes benchmarks/results/distributed.md.
"""
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import cli  # noqa: E402
from dnnlib.util import atomic_write_text, format_bytes  # noqa: E402
from torch_utils import checkpoint  # noqa: E402
from torch_utils.nested import copy_to_cpu, tensor_bytes  # noqa: E402
from training.config import (  # noqa: E402
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)
from training.discriminators.projected import ProjectedDiscriminator  # noqa: E402
from training.generator.layer_schedule import stem_config, superres_config  # noqa: E402
from training.networks_stylegan3 import Generator  # noqa: E402
from training.run.formats import STATE_FORMAT  # noqa: E402
from training.run.snapshots import training_state  # noqa: E402
from training.trainer import Trainer  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "distributed.md"
STATE_SECONDS = 600         # The default of --snap-state.

#----------------------------------------------------------------------------
# Throughput.

def write_images(path: Path, count: int = 64) -> None:
    """A data set of random pictures of 16 pixels."""
    rng = np.random.RandomState(0)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            with archive.open(f"img{i:03d}.png", "w") as f:
                PIL.Image.fromarray(rng.randint(0, 256, [16, 16, 3], dtype=np.uint8)).save(f, format="PNG")


def images_per_second(processes: int, iterations: int, threads: int) -> float:
    """Speed of `train.py`, between its first and its last status line."""
    with tempfile.TemporaryDirectory() as temp:
        work = Path(temp)
        write_images(work / "images.zip")
        command = [sys.executable, str(ROOT / "train.py"), "--cfg=stylegan3-t", "--preset=demo", f"--outdir={work}",
                   f"--data={work}/images.zip", "--device=cpu", "--workers=0", "--metrics=none", f"--gpus={processes}",
                   "--backbones=local:random", "--tick=0.32", f"--kimg={iterations * 0.032:g}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                       env=os.environ | {"OMP_NUM_THREADS": str(threads)})
        (stats,) = work.glob("0*/stats.jsonl")
        ticks = [json.loads(line) for line in stats.read_text(encoding="utf-8").splitlines()]
        seconds = [tick["Progress/sec_per_kimg"] for tick in ticks[1:]]     # The first holds the warm-up.
        return 1000 / float(np.median(seconds))

#----------------------------------------------------------------------------
# Saving.

def imagenet256_config() -> GeneratorConfig:
    """The generator of the last stage: `--syn_layers=10`, then four stages of `--head_layers=7`."""
    config = stem_config(16, 10, 65536, 1024, c_dim=1000)
    for _ in range(4):
        config = superres_config(config, 2, 7)
    return config


def full_size_trainer() -> Trainer:
    """That of the 256-pixel stage, with moments in both Adams."""
    G = Generator(imagenet256_config()).requires_grad_(False)
    # The heads do not depend on the weights of the feature networks.
    names = ("deit_base_distilled_patch16_224:random", "tf_efficientnet_lite0:random")
    config = TrainConfig(
        DataConfig("", 256, 1000), G.config, DiscriminatorConfig(names, 256, 1000), LossConfig(),
        OptimConfig.official(256), batch=256, batch_gpu=8, total_kimg=1, kimg_per_tick=1, snapshot_ticks=1)
    D = ProjectedDiscriminator(config.discriminator).requires_grad_(False)
    trainer = Trainer(config, G, D, None, torch.device("cpu"))
    for phase in trainer.phases:
        for p in phase.parameters:
            p.grad = torch.zeros_like(p)
        phase.optimizer.step()
        phase.optimizer.zero_grad(set_to_none=True)
    return trainer


def timed(action) -> tuple[float, Any]:
    """Seconds, and what `action` returned."""
    start = time.perf_counter()
    result = action()
    return time.perf_counter() - start, result


def saving_rows(folder: Path) -> list[tuple[str, str]]:
    """Measured rows about states of full size."""
    trainer = full_size_trainer()
    parameters = sum(p.numel() for p in trainer.G.parameters())
    stall, _ = timed(lambda: copy_to_cpu(training_state(trainer.state_dict())))
    again, copied = timed(lambda: copy_to_cpu(training_state(trainer.state_dict())))
    size = tensor_bytes(copied)
    writing, _ = timed(functools.partial(checkpoint.save, folder / "state.pt", copied))
    del copied
    reading, content = timed(lambda: checkpoint.load(folder / "state.pt", STATE_FORMAT))
    taking, _ = timed(lambda: trainer.load_state_dict(content))
    worst = max(stall, again)
    return [
        ("parameters of G", f"{parameters / 1e6:.0f} M"),
        ("size of a state", format_bytes(size)),
        ("training waits at a save (first, later)", f"{stall:.2f} s, {again:.2f} s"),
        ("share of the time at a save every 10 minutes", f"{100 * worst / STATE_SECONDS:.2f} %"),
        ("a thread writes it to disk", f"{writing:.1f} s"),
        ("time to resume: read the file", f"{reading:.1f} s"),
        ("time to resume: fill networks and Adam", f"{taking:.1f} s"),
    ]

#----------------------------------------------------------------------------

def table(rows: list[tuple[str, str]]) -> str:
    """Two columns in Markdown."""
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


@click.command(cls=cli.Command)
@click.option("--iterations", metavar="INT", type=cli.IntRange(min=30), default=50, show_default=True,
              help="Iterations per throughput measurement")
@click.option("--folder", metavar="DIR", type=cli.PathType(), default=None,
              help="Where the state is written  [default: temporary folder]")
def main(iterations: int, folder: str | None) -> None:
    """Measure throughput at 1 and 2 processes, and the cost of saving and resuming ImageNet-256."""
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        saving = saving_rows(work)
    finally:
        shutil.rmtree(work)
    cores = os.cpu_count() or 1
    one = images_per_second(1, iterations, cores)
    two = images_per_second(2, iterations, max(cores // 2, 1))
    throughput = [(f"1 process, {cores} threads", f"{one:.1f} images/s"),
                  (f"2 processes, {max(cores // 2, 1)} thread(s) each", f"{two:.1f} images/s"),
                  ("2 over 1 process", f"{two / one:.2f} x")]
    text = (f"# Distribution and saving\n\n`python benchmarks/bench_distributed.py` on {platform.machine()}, {cores} "
            f"cores, torch {torch.__version__}, CPU.\n\n## Throughput: demo networks, 16 pixels, global batch 32\n\n"
            f"{table(throughput)}\n\n## State of the ImageNet-256 stage\n\n{table(saving)}\n")
    atomic_write_text(RESULT, text)
    click.echo(text)


if __name__ == "__main__":
    main()
