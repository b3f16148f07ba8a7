# SPDX-License-Identifier: Apache-2.0
"""Train a network of your own on labelled images: features for discriminator, guidance and metrics, no download.

    python -m training.feature_networks.train --data=digits.zip --dest=net.safetensors
    python -m training.feature_networks.train --data=digits.zip --dest=judge.safetensors --split=1/2 --seed=0

Networks of different splits k/n with the same n and seed see disjoint images, so that one can guide training and
another, which the generator has never been near, can judge the result.
"""
import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
import tqdm

from dnnlib import UserError, cli
from torch_utils.images import to_uint8_nearest
from torch_utils.misc import select_device
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from training.data.randomness import permutation
from training.dataset import ImageDataset

EVAL_BATCH = 500

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Settings:
    """How a network of your own is trained."""

    widths: tuple[int, ...] = (16, 32, 64, 128) # Channels per level; every level halves the size.
    resolution: int = 32                        # Images are resized to this before anything else.
    split: tuple[int, int] = (0, 1)             # (k, n): take the k-th of n disjoint parts of the images.
    seed: int = 0                               # Decides the parts, the initial weights, the order and the shifts.
    epochs: int = 12
    batch: int = 64
    lr: float = 3e-3                            # Adam's rate, which falls to 0 along a cosine.
    max_shift: float = 1 / 16                   # Largest random shift, as a share of the side. There are no flips.


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of a training."""

    num_train: int
    num_heldout: int
    train_accuracy: float
    heldout_accuracy: float | None              # None when every image was used for training.


def split_items(num_items: int, split: tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of part k of n and of all the rest. The parts of one seed are disjoint and cover everything."""
    k, n = split
    order = permutation(seed, 0, num_items)
    chosen = np.arange(num_items) % n == k
    return np.sort(order[chosen]), np.sort(order[~chosen])

#----------------------------------------------------------------------------

def train_own_network(dataset: Any, settings: Settings, device: str = "cpu", progress: bool = False,
                        ) -> tuple[OwnNetwork, Report]:
    """Train a classifier by cross entropy on one part of a data set and score it on the rest.

    Args:
        dataset: `ImageDataset` with labels in use, or anything with its `labels`, `class_names`, len and items.
        settings: The settings.
        device: Where to compute. On the CPU the same arguments give the same weights.
        progress: Whether to draw a bar.

    Returns:
        The network (on the CPU, in eval mode, frozen) and the report.

    Raises:
        UserError: fewer than two classes, or too few images.
    """
    if len(dataset.class_names) < 2:
        raise UserError(f"--data: {len(dataset.class_names)} classes: a classifier needs images of at least two")
    config = own_config(len(dataset.class_names), settings.resolution, settings.widths, dataset.class_names)
    train, rest = split_items(len(dataset), settings.split, settings.seed)
    if len(train) < 2:
        raise UserError(f"--split={settings.split[0]}/{settings.split[1]}: leaves {len(train)} of {len(dataset)} "
                        "images to train on: take fewer parts")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        net = OwnNetwork(config).to(device)
    labels = torch.as_tensor(dataset.labels, dtype=torch.int64)
    with _one_thread():
        pixels = _pixels(dataset, net, progress)
        _fit(net, pixels[train], labels[train], settings, device, progress)
        net.eval().requires_grad_(False)
        heldout = _accuracy(net, pixels[rest], labels[rest], device) if len(rest) else None
        report = Report(len(train), len(rest), _accuracy(net, pixels[train], labels[train], device), heldout)
    return net.cpu(), report


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One CPU thread for the block. Layers this small gain little from more, lose a lot to them on a busy machine, and
    sums that do not depend on the number of cores give the same weights everywhere."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)


def _pixels(dataset: Any, net: OwnNetwork, progress: bool) -> torch.Tensor:
    """All images, resized once: uint8 [num, 3, R, R]."""
    size = net.input_resolution
    pixels = torch.empty(len(dataset), 3, size, size, dtype=torch.uint8)
    for i in tqdm.trange(len(dataset), desc="reading", unit="img", disable=not progress):
        x = net.prepare(torch.as_tensor(dataset[i][0])[None])
        pixels[i] = to_uint8_nearest(x)[0]
    return pixels


def _fit(net: OwnNetwork, pixels: torch.Tensor, labels: torch.Tensor, settings: Settings, device: str,
         progress: bool) -> None:
    """The optimisation. Batches that would hold one image are left out: BatchNorm needs two."""
    generator = torch.Generator().manual_seed(settings.seed)
    batch = min(settings.batch, len(pixels))
    steps = settings.epochs * (len(pixels) // batch)
    optimiser = torch.optim.Adam(net.parameters(), lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=max(steps, 1))
    net.train()
    bar = tqdm.tqdm(total=steps, desc="training", unit="step", disable=not progress)
    for items in _batches(len(pixels), batch, settings.epochs, generator):
        x = _shifted(pixels[items], round(settings.max_shift * net.input_resolution), generator)
        loss = F.cross_entropy(net.logits(net.prepare(x.to(device))), labels[items].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        bar.update()
    bar.close()


def _batches(num_items: int, batch: int, epochs: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Indices of full batches, in a new order every epoch."""
    for _epoch in range(epochs):
        order = torch.randperm(num_items, generator=generator)
        yield from order[:num_items // batch * batch].split(batch)


def _shifted(images: torch.Tensor, largest: int, generator: torch.Generator) -> torch.Tensor:
    """Each image moved by whole pixels, up to `largest` each way; its border is repeated. [N, 3, R, R]."""
    count, _, size, _ = images.shape
    offsets = torch.randint(-largest, largest + 1, (2, count, 1), generator=generator)
    y, x = (torch.arange(size) + offsets).clamp(0, size - 1)                            # [N, R] each
    return images[torch.arange(count)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)


@torch.no_grad()
def _accuracy(net: OwnNetwork, pixels: torch.Tensor, labels: torch.Tensor, device: str) -> float:
    """Share of images whose class has the largest logit."""
    hits = 0
    for x, label in zip(pixels.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True):
        hits += int((net.logits(net.prepare(x.to(device))).argmax(dim=1).cpu() == label).sum())
    return hits / len(pixels)

#----------------------------------------------------------------------------

class _Split(click.ParamType):
    """'0/2' -> (0, 2)."""

    name = "K/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)/(\d+)", value)
        if match is None or int(match[1]) >= int(match[2]):
            self.fail(f"{value!r} is not a part such as 0/2 or 1/2", param, ctx)
        return int(match[1]), int(match[2])


def _widths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise click.BadParameter(f"{value!r} is not a list such as 16,32,64,128", ctx, param)
    return tuple(int(part) for part in value.split(","))


def _open(path: str) -> ImageDataset:
    dataset = ImageDataset(path)
    if not dataset.has_labels:
        raise UserError(f"--data={path}: has no labels: make it with dataset_tool.py from a folder that has one "
                        "sub-folder per class")
    return ImageDataset(path, use_labels=True)


@click.command(cls=cli.Command)
@click.option("--data", metavar="ZIP|DIR", type=cli.PathType(), required=True,
              help="Labelled images, as dataset_tool.py writes them")
@click.option("--dest", metavar="FILE", type=cli.PathType(), required=True,
              help="Where to write the network (*.safetensors)")
@click.option("--split", type=_Split(), default="0/1", show_default=True,
              help="Train on part K of N disjoint parts of the images; the rest is held out")
@click.option("--seed", type=cli.Seed(), default=0, show_default=True,
              help="Decides the parts and everything random in training")
@click.option("--epochs", type=cli.IntRange(min=1), default=12, show_default=True, help="Passes over the part")
@click.option("--widths", metavar="N,N...", default="16,32,64,128", show_default=True, callback=_widths,
              help="Channels per level; every level halves the size")
@click.option("--resolution", type=cli.IntRange(min=2), default=32, show_default=True,
              help="Images are resized to this")
@click.option("--batch", type=cli.IntRange(min=2), default=64, show_default=True, help="Images per step")
@cli.device_option()
def main(data: str, dest: str, device: str, **options: Any) -> None:
    """Train a small classifier on your own labelled images.

    Examples:

    \b
    python -m training.feature_networks.train --data=digits.zip --dest=net.safetensors
    python -m training.feature_networks.train --data=digits.zip --dest=judge.safetensors --split=1/2
    """
    if not dest.endswith(".safetensors"):
        raise UserError(f"--dest={dest}: the name must end with .safetensors")
    settings = Settings(**options)
    dataset = _open(data)
    net, report = train_own_network(dataset, settings, select_device(device), progress=True)
    sha256 = save_own_network(dest, net, {
        "data": dataset.name, "data_fingerprint": dataset.fingerprint,
        "settings": dataclasses.asdict(settings), "report": dataclasses.asdict(report),
    })
    click.echo(json.dumps({"file": dest, "sha256": sha256, **dataclasses.asdict(report)}))


if __name__ == "__main__":
    main()
