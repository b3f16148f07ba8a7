# SPDX-License-Identifier: Apache-2.0
"""A DCGAN and the same as SAN on small images, by the protocol of SAN's small published code, and its variants.

The published code (Takida et al., ICLR 2024, "simple-san", MNIST) has spectral norm and no BatchNorm in the features of
the discriminator, Adam 1e-3 with betas (0, 0.99), batches of 128, and one step of each network. So has this study; its
networks are smaller, since its images are.
"""
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch.nn.utils.parametrizations import spectral_norm

from dnnlib import UserError
from dnnlib.util import atomic_write_text, first_line, list_some, parse_json
from metrics.precision_recall import K_NEIGHBOURS
from torch_utils.images import from_uint8, to_uint8_nearest
from torch_utils.misc import evaluating
from training.dataset import ImageDataset
from training.discriminators import san_conditions
from training.discriminators.san import GAN_LOSSES
from transport.common import critics, plotting
from transport.common.sklearn_images import load_digits
from transport.common.study import check, option, seeded, study_command
from transport.san.adversarial import COLOURS, MODELS, Discriminator, adam, train_discriminator, train_generator
from transport.san.judge import Judge, Score, score, train_judge

Z_DIM, CLASS_DIM = 32, 32       # Numbers of z, and of the learned vector of a class beside it.
RESOLUTIONS = (8, 16, 32)
NORMS = ("spectral", "batch", "none")
MIN_IMAGES = 2 * (K_NEIGHBOURS + 1)     # Precision and recall of one half against the other.
PAIRS = 256                     # So many real and as many generated images have their distances compared.


@dataclasses.dataclass(frozen=True)
class Config:
    """DCGAN against DCGAN as SAN on small images, the 8-pixel digits of scikit-learn or a data set archive.

    With --outdir every finished run is kept, and the same command goes on with those that are missing.
    """

    data: str = option("digits", "'digits', or an archive or folder of images with classes, at 8, 16 or 32 pixels")
    loss: str = option("hinge", "Loss of the GAN", choices=(*GAN_LOSSES, "all"))
    conditional: bool = option(False, "Both networks are told the class; a direction per class")
    norm: str = option("spectral", "What the features of the discriminator are normalised by", choices=NORMS)
    seeds: int = option(5, "Runs per loss and model, with seeds 0, 1, ...", min=1)
    iterations: int = option(3000, "Steps of each network", min=1)
    every: int = option(1000, "Steps between two measurements", min=1)
    batch: int = option(128, "Images per step", min=2)
    lr: float = option(1e-3, "Learning rate of Adam", min=0, open_min=True)
    beta1: float = option(0.0, "Adam's average of gradients", min=0, max=1, open_max=True)
    beta2: float = option(0.99, "Adam's average of squared gradients", min=0, max=1, open_max=True)
    judge_steps: int = option(1000, "Steps of the classifier that scores", min=1)
    device: str = option("cpu", "Where to compute")
    outdir: str | None = None

    def quick(self) -> "Config":
        return dataclasses.replace(self, seeds=1, iterations=1000, every=500)


class Conditions(NamedTuple):
    """SAN's three conditions on the discriminator, with classes as means over them, and how steep it is."""

    inner_product: float    # <w/|w|, optimal direction>.
    floor: float            # What an optimal direction would read on as many samples.
    gap: float              # |E_real h - E_generated h|.
    separability: float     # |mean difference| / W1 along w, in [0, 1].
    pair_ratio: float       # min over pairs |h(x) - h(y)| / |x - y|, over the ratio of typical distances.
    stretch: float          # That ratio of typical distances: spread of h over spread of x.
    slope: float            # Mean |df/dx| at generated images.


class Measurement(NamedTuple):
    """Both networks after some steps."""

    iteration: int
    score: Score
    conditions: Conditions


@dataclasses.dataclass(frozen=True)
class Run:
    """The record of one training."""

    loss: str
    model: str
    seed: int
    history: list[Measurement]
    samples: np.ndarray                 # uint8 [N, H, W, C], of the last step.


@dataclasses.dataclass(frozen=True)
class Result:
    """All runs, and how well the judge knows the real images."""

    config: Config
    runs: list[Run]
    accuracy: float                     # The judge's, on the half that it did not train on.
    real: Score                         # One half of the real images against the other.

    def of(self, loss: str, model: str) -> list[Run]:
        return [run for run in self.runs if (run.loss, run.model) == (loss, model)]

    def headline(self) -> dict[str, Any]:
        line: dict[str, Any] = {"judge_accuracy": round(self.accuracy, 4),
                                "real_halves": [round(value, 3) for value in self.real]}
        for loss, model in dict.fromkeys((run.loss, run.model) for run in self.runs):
            line[f"{loss} {model}"] = _summary(self.of(loss, model))
        return line


def _summary(runs: list[Run]) -> dict[str, Any]:
    """Every number at every measurement, per seed, and of the Frechet distance its mean and deviation over seeds."""
    found: dict[str, Any] = {"iterations": [m.iteration for m in runs[0].history]}
    for part, fields in (("score", Score._fields), ("conditions", Conditions._fields)):
        found |= {field: [[_rounded(getattr(getattr(m, part), field)) for m in run.history] for run in runs]
                  for field in fields}
    columns = list(zip(*found["fid"], strict=True))
    found["fid_mean"] = [round(statistics.fmean(column), 2) for column in columns]
    found["fid_std"] = [round(statistics.stdev(column), 2) if len(column) > 1 else None for column in columns]
    return found


def _rounded(value: float) -> float:
    """Four digits are more than seeds agree on."""
    return float(f"{value:.4g}")

#----------------------------------------------------------------------------
# Finished runs, as plain values in a file each.

MAY_DIFFER = ("loss", "seeds", "device", "outdir")      # Settings in which the runs of one folder may differ.


def settings_of(config: Config, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """What decides a run beside loss, model and seed. Data are known by their content, wherever they lie."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_DIFFER}
    if config.data != "digits":
        content = (part.cpu().contiguous().numpy().tobytes() for part in (images, labels))
        settings["data"] = f"images with the hash {hashlib.sha256(b''.join(content)).hexdigest()[:16]}"
    return settings


def save_run(settings: dict[str, Any], run: Run, path: Path) -> None:
    """Write a run with the settings that it was made with; whole or not at all."""
    record = {"settings": settings, "run": [run.loss, run.model, run.seed], "samples": run.samples.tolist(),
              "history": [[m.iteration, [*m.score], [*m.conditions]] for m in run.history]}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(path, json.dumps(record))


def load_run(config: Config, settings: dict[str, Any], path: Path, loss: str, model: str, seed: int) -> Run:
    """Read what `save_run` has written.

    Raises:
        UserError: the file is damaged, or its run has other settings.
    """
    try:
        record = parse_json(path.read_bytes())
        there = dict(record["settings"])
        history = [Measurement(int(iteration), Score(*values), Conditions(*conditions))
                   for iteration, values, conditions in record["history"]]
        if odd := [value for m in history for value in (*m.score, *m.conditions) if not _is_finite(value)]:
            raise ValueError(f"{odd[0]!r} is no finite number")
        samples = np.array(record["samples"], dtype=np.uint8)
        if not len(samples) or samples.ndim != 4:
            raise ValueError("it has no samples")
        if record.get("run", [loss, model, seed]) != [loss, model, seed]:       # Earlier files do not say.
            raise ValueError(f"it is of the run {record['run']}")
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as err:
        raise UserError(f"{path}: damaged ({first_line(err)}): delete it to have the run made again") from err
    for name, value in settings.items():
        if there.get(name) != value:
            raise UserError(f"{path}: was made with {name}={there.get(name)}, not {name}={value}: name another "
                            "--outdir, or delete the file to have the run made again")
    if [m.iteration for m in history] != measured_at(config):
        raise UserError(f"{path}: damaged (it lacks measurements): delete it to have the run made again")
    return Run(loss, model, seed, history, samples)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def measured_at(config: Config) -> list[int]:
    """The steps after which a run is measured; the last one is among them."""
    return [*range(config.every, config.iterations, config.every), config.iterations]

#----------------------------------------------------------------------------
# Images.

def load_images(data: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and their classes: (float32 [N, C, R, R] in [-1, 1], int64 [N]).

    Args:
        data: 'digits', or the path of an archive or a folder with labels.

    Raises:
        UserError: it cannot be read, has no classes, or its images are too few or not of 8, 16 or 32 pixels.
    """
    if data == "digits":
        return load_digits()
    dataset = ImageDataset(data, use_labels=True)
    if dataset.resolution not in RESOLUTIONS:
        raise UserError(f"--data={data}: has {dataset.resolution} pixels, but the networks of this study are made for "
                        f"{', '.join(map(str, RESOLUTIONS))}: make it with dataset_tool.py --resolution=16")
    if len(dataset) < MIN_IMAGES:
        raise UserError(f"--data={data}: has {len(dataset)} images, but this study compares its halves and needs "
                        f"{MIN_IMAGES}: name a larger one")
    items = [dataset[k] for k in range(len(dataset))]
    images = from_uint8(torch.from_numpy(np.stack([image for image, _ in items])))
    if bool((images[:, 0] == images[:, 1]).all() and (images[:, 0] == images[:, 2]).all()):
        images = images[:, :1]          # Grey images have three equal channels in an archive.
    return images.contiguous(), torch.tensor([label for _, label in items])

#----------------------------------------------------------------------------
# Networks. GAN and SAN of a seed differ in the last layer of the discriminator, and in nothing else.

class Generator(torch.nn.Module):
    """DCGAN's (Radford et al. 2016) for small images: z [N, Z_DIM], c int64 [N] -> [N, C, R, R] in [-1, 1].

    Without classes, c may be left out.
    """

    def __init__(self, channels: int, resolution: int, num_classes: int = 0):
        super().__init__()
        self.embedding = torch.nn.Embedding(num_classes, CLASS_DIM) if num_classes else None
        inputs, width = Z_DIM + (CLASS_DIM if num_classes else 0), 8 * resolution
        layers: list[torch.nn.Module] = [torch.nn.Unflatten(1, (inputs, 1, 1)),
                                         torch.nn.ConvTranspose2d(inputs, width, 2, bias=False)]
        for _ in range(int(math.log2(resolution)) - 2):
            layers += [torch.nn.BatchNorm2d(width), torch.nn.ReLU(),
                       torch.nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=False)]
            width //= 2
        self.layers = torch.nn.Sequential(
            *layers, torch.nn.BatchNorm2d(width), torch.nn.ReLU(),
            torch.nn.ConvTranspose2d(width, channels, 4, stride=2, padding=1, bias=False), torch.nn.Tanh())

    def forward(self, z: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        images: torch.Tensor = self.layers(z if self.embedding is None else torch.cat([z, self.embedding(c)], dim=1))
        return images


def discriminator_body(channels: int, resolution: int, norm: str = "spectral") -> tuple[torch.nn.Sequential, int]:
    """All of the discriminator but the last layer: [N, C, R, R] -> [N, width], and the width.

    Three convolutions of 64, 128 and 256 features, each at half the resolution of the one before until 2 pixels are
    left; all but the first are normalised.

    Args:
        channels: C.
        resolution: R, 8 to 32.
        norm: 'spectral' as published, 'batch' (BatchNorm) or 'none'.
    """
    layers: list[torch.nn.Module] = []
    for number, width in enumerate((64, 128, 256)):
        taps, stride = (4, 2) if resolution > 2 else (3, 1)
        conv = torch.nn.Conv2d(channels, width, taps, stride=stride, padding=1, bias=number == 0 or norm != "batch")
        layers.append(spectral_norm(conv) if number and norm == "spectral" else conv)
        if number and norm == "batch":
            layers.append(torch.nn.BatchNorm2d(width))
        layers.append(torch.nn.LeakyReLU(0.2))
        channels, resolution = width, resolution // stride
    return torch.nn.Sequential(*layers, torch.nn.Flatten()), channels * resolution ** 2

#----------------------------------------------------------------------------
# Training, as published: one step of D, one of G, on batches of their own.

class Training:
    """Networks, optimisers and random streams of one run. GAN and SAN of a seed begin with the same G and h."""

    def __init__(self, config: Config, images: torch.Tensor, labels: torch.Tensor, loss: str, model: str, seed: int):
        self.config, self.images, self.labels, self.loss = config, images, labels, loss
        self.num_classes = int(labels.max()) + 1 if config.conditional else 0
        shape = images.shape[1], images.shape[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.G = Generator(*shape, self.num_classes).to(images.device)
            self.D = Discriminator(*discriminator_body(*shape, config.norm), model == "san",
                                   self.num_classes).to(images.device)
        betas = config.beta1, config.beta2
        self.adam_G, self.adam_D = (adam(net, config.lr, betas) for net in (self.G, self.D))
        self.draws, self.seed = seeded(seed, "training"), seed

    def iterate(self) -> None:
        """Train D for a step, then G."""
        index = torch.randint(len(self.images), [self.config.batch], generator=self.draws).to(self.images.device)
        real, c = self.images[index], self.labels[index]        # Both sides show the same classes.
        fake = self.G(self._latents(len(c), self.draws), c)
        penalty = None
        if self.loss == "wasserstein":                          # As published for this loss (Gulrajani et al. 2017).
            z = critics.between(real, fake.detach(), self.draws)
            penalty = lambda critic, z=z: 10 * critics.penalty(critic, z, two_sided=True)
        train_discriminator(self.loss, self.D, self.adam_D, real, fake.detach(), c, penalty)
        train_generator(self.loss, self.D, self.adam_G, fake, c)

    def _latents(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randn([count, Z_DIM], generator=generator).to(self.images.device)

    @torch.no_grad()
    def samples(self) -> torch.Tensor:
        """As many as there are real images, of their classes: [N, C, R, R], with BatchNorm's running statistics."""
        with evaluating(self.G):
            images: torch.Tensor = self.G(self._latents(len(self.images), seeded(self.seed, "samples")), self.labels)
        return images

    @torch.no_grad()
    def conditions(self, fake: torch.Tensor) -> Conditions:
        """The discriminator on all real images and on as many generated ones [N, C, R, R], with the same classes."""
        D = copy.deepcopy(self.D).eval()                        # Spectral norm's vectors and statistics stay.
        some = [x[torch.randperm(len(x), generator=seeded(0, "pairs"))[:PAIRS].to(x.device)]
                for x in (self.images, fake)]
        x = torch.cat(some)
        h = D.body(x)                                           # A function of one image: with running statistics.
        stretch = san_conditions.spread(h) / max(san_conditions.spread(x), san_conditions.TINY)
        closest = san_conditions.min_pair_ratio(x, h) / max(stretch, san_conditions.TINY)
        classes = torch.zeros_like(self.labels) if not self.num_classes else self.labels
        slopes = critics.gradient(lambda y: D(y, classes[:PAIRS]), fake[:PAIRS]).flatten(1).norm(dim=1)
        for module in D.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.train()                                  # A training step normalises over each side apart.
        real_h, fake_h = D.body(self.images), D.body(fake)
        rows = []
        for k, w in enumerate(D.rows()):
            a, b = real_h[classes == k], fake_h[classes == k]
            direction = san_conditions.direction_optimality(w, a, b)
            rows.append((*direction, san_conditions.slice_along(w, a, b).separability))
        inner, gap, floor, separability = (statistics.fmean(column) for column in zip(*rows, strict=True))
        return Conditions(inner, floor, gap, separability, closest, stretch, float(slopes.mean()))

    def measure(self, judge: Judge, iteration: int) -> tuple[Measurement, torch.Tensor]:
        """Score the generator and look at the discriminator; returns the generated images, too.

        Raises:
            UserError: the training has diverged.
        """
        fake = self.samples()
        if not bool(fake.isfinite().all()):
            raise UserError(f"loss {self.loss}, seed {self.seed}: not finite after {iteration} steps: "
                            f"lower --lr={self.config.lr}")
        return Measurement(iteration, score(judge, self.images, fake), self.conditions(fake)), fake


def train(training: Training, judge: Judge, model: str) -> Run:
    """Train both networks, and measure every so many steps; a line on stderr tells of each measurement."""
    config, history = training.config, []
    measured = set(measured_at(config))
    for iteration in range(1, config.iterations + 1):
        training.iterate()
        if iteration in measured:
            measurement, fake = training.measure(judge, iteration)
            history.append(measurement)
            click.echo(f"{training.loss} {model}, seed {training.seed}, step {iteration}: Frechet distance "
                       f"{measurement.score.fid:.1f}, {measurement.score.classes} classes, "
                       f"inner product {measurement.conditions.inner_product:.2f}", err=True)
    images = to_uint8_nearest(fake[:50]).permute(0, 2, 3, 1).cpu().numpy()
    return Run(training.loss, model, training.seed, history, images)


def run(config: Config) -> Result:
    """Train the judge, then every loss with every model and seed that --outdir does not hold already.

    Raises:
        UserError: a setting out of its range, data that do not suit, or a folder with runs of other settings.
    """
    check(config)
    images, labels = (t.to(config.device) for t in load_images(config.data))
    if config.conditional and (rare := (labels.bincount() == 1).nonzero()[:, 0].tolist()):
        raise UserError(f"--conditional=true: of class {list_some(rare)} --data={config.data} has one image, and what "
                        "a class is like takes two: name data with more, or leave --conditional out")
    settings = settings_of(config, images, labels)
    judge, accuracy = train_judge(images, labels, config.judge_steps)
    losses = GAN_LOSSES if config.loss == "all" else (config.loss,)
    runs = []
    for loss, seed, model in itertools.product(losses, range(config.seeds), MODELS):
        path = config.outdir and Path(config.outdir, "runs", f"{loss}-{model}-{seed}.json")
        if path and path.exists():
            runs.append(load_run(config, settings, path, loss, model, seed))
            continue
        runs.append(train(Training(config, images, labels, loss, model, seed), judge, model))
        if path:
            save_run(settings, runs[-1], path)
    return Result(config, runs, accuracy, score(judge, images[0::2], images[1::2]))

#----------------------------------------------------------------------------

def draw(result: Result, folder: Path) -> list[Path]:
    """Per loss: samples of each model's first seed, and the distance over steps, all seeds."""
    losses = list(dict.fromkeys(run.loss for run in result.runs))
    figure, axes = plotting.panels(len(losses), 3, 2.8, 2.2)
    for row, loss in enumerate(losses):
        for column, model in enumerate(MODELS):
            plotting.draw_images(axes[row, column], result.of(loss, model)[0].samples, columns=10)
            axes[row, column].set_title(f"{loss} {model.upper()}, seed 0", fontsize=9)
            for number, one in enumerate(result.of(loss, model)):
                axes[row, 2].plot([m.iteration for m in one.history], [m.score.fid for m in one.history], ".-",
                                  color=COLOURS[model], alpha=0.7, label=None if number else model.upper())
        axes[row, 2].set_yscale("log")
        axes[row, 2].set_ylabel("Frechet distance", fontsize=8)
        axes[row, 2].set_xlabel("step", fontsize=8)
        axes[row, 2].legend(fontsize=7)
    return [plotting.save(figure, folder / "samples.png")]


main = study_command("san_dcgan", Config, run, draw)
