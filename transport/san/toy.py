# SPDX-License-Identifier: Apache-2.0
"""GAN against SAN on eight Gaussians: is the direction optimal, is the slice separable, are all modes there?

The set-up of Takida et al. (ICLR 2024) on a mixture of Gaussians. Its networks and optimiser were not at hand; those
here are our own (docs/transport.md).
"""
import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from training.discriminators import san_conditions
from training.discriminators.san import GAN_LOSSES
from transport.common import critics, plotting
from transport.common.study import check, option, seeded, study_command
from transport.san.adversarial import COLOURS, MODELS, Discriminator, adam, train_discriminator, train_generator

MODES = 8
Z_DIM = 10
NEAR, COVERED = 0.15, 0.01      # A mode counts if more than 1 % of all samples are within 0.15 of it.
SETTLED = 0.4                   # Means over iterations leave out this first share of them.


@dataclasses.dataclass(frozen=True)
class Config:
    """GAN against SAN on eight Gaussians on the unit circle."""

    loss: str = option("hinge", "Loss of the GAN", choices=(*GAN_LOSSES, "all"))
    model: str = option("both", "What to train", choices=(*MODELS, "both"))
    conditional: bool = option(False, "A class, and a direction, per Gaussian")
    seeds: int = option(3, "Runs, with seeds 0, 1, ...", min=1)
    iterations: int = option(5000, "Steps of the generator", min=1)
    d_steps: int = option(3, "Steps of the discriminator per step of the generator", min=1)
    width: int = option(128, "Units per layer of both networks, and features of the discriminator", min=2)
    batch: int = option(256, "Samples per step", min=2)
    lr: float = option(1e-4, "Learning rate of Adam, betas (0, 0.9)", min=0, open_min=True)
    std: float = option(0.05, "Standard deviation of a Gaussian", min=0, open_min=True)
    penalty: float = option(10.0, "Weight of the gradient penalty, with the Wasserstein loss only", min=0)
    every: int = option(500, "Iterations between two measurements", min=1)
    samples: int = option(20_000, "Samples per side of a measurement", min=100)
    device: str = option("cpu", "Where to compute; networks this small are as fast on a CPU")

    def quick(self) -> "Config":
        return dataclasses.replace(self, seeds=1, iterations=1500, width=64, batch=64, lr=3e-4,
                                   every=150, samples=5000)

#----------------------------------------------------------------------------

class Conditions(NamedTuple):
    """What one row w of the last layer reads on features h of real and of generated samples."""

    inner_product: float        # <w/|w|, optimal direction>.
    weighted: float             # The same with the weights r(f) of the loss, which is SAN's objective.
    floor: float                # What an optimal w would read (plain weights).
    gap: float                  # |E_0 h - E_theta h|.
    separability: float         # S along w.


class Measurement(NamedTuple):
    """A discriminator and a generator after some iterations."""

    iteration: int
    conditions: Conditions      # With classes, means over them.
    modes: int                  # How many of the eight are covered.
    near: float                 # Share of samples within 0.15 of a mode; with classes, of their own mode.


@dataclasses.dataclass(frozen=True)
class Run:
    """The record of one training."""

    loss: str
    model: str
    seed: int
    history: list[Measurement]
    points: np.ndarray          # Samples at the end, [N, 2].

    def settled(self, field: str) -> float:
        """Mean over the measurements after the first part of training."""
        first = SETTLED * self.history[-1].iteration
        return statistics.fmean(getattr(m.conditions, field) for m in self.history if m.iteration >= first)


@dataclasses.dataclass(frozen=True)
class Result:
    """All runs: the numbers, and the samples that the figures show."""

    config: Config
    runs: list[Run]

    def of(self, loss: str, model: str) -> list[Run]:
        return [run for run in self.runs if (run.loss, run.model) == (loss, model)]

    def headline(self) -> dict[str, Any]:
        line: dict[str, Any] = {"conditional": self.config.conditional, "iterations": self.config.iterations}
        for loss, model in dict.fromkeys((run.loss, run.model) for run in self.runs):
            line[f"{loss} {model}"] = _summary(self.of(loss, model))
        return line


def _summary(runs: list[Run]) -> dict[str, Any]:
    """Numbers per seed, and medians over seeds; inner products and S are means over iterations, the rest is from the
    end of training."""
    ips = [run.settled("inner_product") for run in runs]
    return {"ip": [round(ip, 3) for ip in ips], "ip_median": round(statistics.median(ips), 3),
            "ip_weighted_median": round(statistics.median(run.settled("weighted") for run in runs), 3),
            "floor_median": round(statistics.median(run.settled("floor") for run in runs), 3),
            "separability_median": round(statistics.median(run.settled("separability") for run in runs), 3),
            "modes": [run.history[-1].modes for run in runs],
            "near": [round(run.history[-1].near, 3) for run in runs]}

#----------------------------------------------------------------------------

def centres() -> torch.Tensor:
    """[8, 2] on the unit circle."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def mlp(sizes: tuple[int, ...], slope: float, last: bool) -> torch.nn.Sequential:
    """Linear layers with LeakyReLU between them, and after the last one if asked for."""
    layers: list[torch.nn.Module] = []
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [torch.nn.Linear(a, b), torch.nn.LeakyReLU(slope)]
    return torch.nn.Sequential(*layers[:None if last else -1])


class Training:
    """Networks, optimisers and random streams of one run. GAN and SAN of a seed begin with the same G and h."""

    def __init__(self, config: Config, loss: str, model: str, seed: int):
        self.config, self.loss, self.device = config, loss, torch.device(config.device)
        classes, width = MODES if config.conditional else 0, config.width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.G = mlp((Z_DIM + classes, width, width, width, 2), 0.0, last=False).to(self.device)
            # LeakyReLU without a narrow layer keeps h injective, which SAN takes for granted.
            body = mlp((2, width, width, width), 0.1, last=True)
            self.D = Discriminator(body, width, model == "san", classes).to(self.device)
        self.adam_G, self.adam_D = (adam(net, config.lr, (0.0, 0.9)) for net in (self.G, self.D))
        self.draws, self.test_draws = seeded(seed, "training"), seeded(seed, "measurement")
        self.centres = centres().to(self.device)

    def classes(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(MODES, [count], generator=generator).to(self.device)

    def real(self, c: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        noise = torch.randn([len(c), 2], generator=generator).to(self.device)
        return self.centres[c] + self.config.std * noise

    def fake(self, c: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        z = torch.randn([len(c), Z_DIM], generator=generator).to(self.device)
        if self.config.conditional:
            z = torch.cat([z, torch.nn.functional.one_hot(c, MODES).to(z)], dim=1)
        points: torch.Tensor = self.G(z)
        return points

    def iterate(self) -> None:
        """Train D for some steps, then G for one."""
        for _ in range(self.config.d_steps):
            c = self.classes(self.config.batch, self.draws)
            x = self.real(c, self.draws)
            with torch.no_grad():
                y = self.fake(c, self.draws)
            penalty = None
            if self.loss == "wasserstein":
                z = critics.between(x, y, self.draws)
                penalty = lambda critic, z=z: self.config.penalty * critics.penalty(critic, z)
            train_discriminator(self.loss, self.D, self.adam_D, x, y, c, penalty)
        c = self.classes(self.config.batch, self.draws)
        train_generator(self.loss, self.D, self.adam_G, self.fake(c, self.draws), c)

    @torch.no_grad()
    def measure(self, iteration: int) -> tuple[Measurement, np.ndarray]:
        """Measure on fresh samples; returns some generated ones, [N, 2], too."""
        c = self.classes(self.config.samples, self.test_draws)
        x, y = self.real(c, self.test_draws), self.fake(c, self.test_draws)
        groups = [c == k for k in range(MODES)] if self.config.conditional else [torch.ones_like(c, dtype=torch.bool)]
        rows = [self._measure_row(w, x[group], y[group], c[group])
                for w, group in zip(self.D.rows(), groups, strict=True)]
        conditions = Conditions(*(statistics.fmean(values) for values in zip(*rows, strict=True)))
        distance = torch.cdist(y, self.centres)
        modes = int(((distance < NEAR).double().mean(dim=0) > COVERED).sum())
        own = distance.gather(1, c[:, None]).squeeze(1) if self.config.conditional else distance.min(dim=1).values
        near = float((own < NEAR).double().mean())
        return Measurement(iteration, conditions, modes, near), y[:2000].cpu().numpy()

    def _measure_row(self, w: torch.Tensor, x: torch.Tensor, y: torch.Tensor, c: torch.Tensor) -> Conditions:
        weight, (h, g) = GAN_LOSSES[self.loss].weight, (self.D.body(points) for points in (x, y))
        plain = weighted = san_conditions.direction_optimality(w, h, g)
        if weight is not torch.ones_like:       # With weights of one, plain and weighted are the same.
            weighted = san_conditions.direction_optimality(w, h, g, weight(self.D(x, c)), weight(self.D(y, c)))
        along = san_conditions.slice_along(w, h, g)
        return Conditions(plain.inner_product, weighted.inner_product, plain.floor, plain.gap, along.separability)


def train(config: Config, loss: str, model: str, seed: int) -> Run:
    """Train one model from the start."""
    training, history = Training(config, loss, model, seed), []
    for iteration in range(1, config.iterations + 1):
        training.iterate()
        if iteration % config.every == 0 or iteration == config.iterations:
            measurement, points = training.measure(iteration)
            history.append(measurement)
    return Run(loss, model, seed, history, points)


def run(config: Config) -> Result:
    """Train every loss, model and seed that was asked for.

    Raises:
        UserError: a setting out of its range.
    """
    check(config)
    losses = GAN_LOSSES if config.loss == "all" else (config.loss,)
    models = MODELS if config.model == "both" else (config.model,)
    return Result(config, [train(config, loss, model, seed)
                           for loss in losses for model in models for seed in range(config.seeds)])

#----------------------------------------------------------------------------

def draw(result: Result, folder: Path) -> list[Path]:
    """Per loss: samples of each model's first seed, and the inner product over iterations, all seeds."""
    losses = list(dict.fromkeys(run.loss for run in result.runs))
    models = [model for model in MODELS if any(run.model == model for run in result.runs)]
    rows = len(models) + 1
    if len(losses) == 1:                        # One loss side by side, several in columns.
        figure, axes = plotting.panels(1, rows, 2.6, 2.6)
        axes = axes.T
    else:
        figure, axes = plotting.panels(rows, len(losses), 2.2, 2.2)
    for column, loss in enumerate(losses):
        for row, model in enumerate(models):
            axis, first = axes[row, column], result.of(loss, model)[0]
            plotting.draw_points(axis, first.points, s=2, color=COLOURS[model])
            axis.plot(*centres().T.numpy(), "k+", markersize=5)
            axis.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), xticks=[], yticks=[])
            axis.set_title(f"{loss} {model.upper()}: {first.history[-1].modes} modes", fontsize=8)
            _draw_inner_products(axes[-1, column], model, result.of(loss, model))
    axes[-1, 0].legend(fontsize=7, loc="lower left")
    axes[-1, 0].set_ylabel("<w, optimal direction>", fontsize=8)
    return [plotting.save(figure, folder / "eight_gaussians.png")]


def _draw_inner_products(axis: Any, model: str, runs: list[Run]) -> None:
    for number, one in enumerate(runs):
        axis.plot([m.iteration for m in one.history], [m.conditions.inner_product for m in one.history],
                  color=COLOURS[model], alpha=0.8, linewidth=1.2, label=None if number else model.upper())
    axis.set_ylim(-0.2, 1.05)
    axis.set_xlabel("iteration", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)


main = study_command("san_toy", Config, run, draw)
