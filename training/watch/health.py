# SPDX-License-Identifier: Apache-2.0
"""Tells whether a run is well: measures variety, and gives verdicts in plain words.

Every number here is equal on all processes, so that they decide alike.
"""
import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from torch_utils import distributed
from torch_utils.misc import autotuning
from torch_utils.training_stats import Stat
from training.config import TrainConfig
from training.data.randomness import CounterRNG
from training.dataset import ImageDataset, real_pair_distance
from training.generator.synthesis import synthesize
from training.networks_stylegan3 import Generator
from training.step.guard import GradientGuard

EXIT_NONFINITE, EXIT_COLLAPSE = 4, 5    # Exit codes after gradients that are not finite, and with --on-collapse=stop.

#----------------------------------------------------------------------------

class DiversityProbe:
    """Variety of G_ema's images of one class as a share of the variety of real ones: 1 is right, 0 is one picture.

    Variety is the mean absolute difference of two images of a class, pixels in [-1, 1], as in
    `training.dataset.real_pair_distance`: here over all pairs among `GROUP_SIZE` images of each of `NUM_GROUPS`
    classes, whose latents never change. Classes are drawn as often as the data has them. That is 32 images per
    measurement.
    """

    NUM_GROUPS, GROUP_SIZE = 8, 4
    NUM_REAL_PAIRS = 256        # Their mean is good to some percent, and reading them takes seconds at most.

    def __init__(self, dataset: ImageDataset, c_dim: int, z_dim: int, seed: int, batch: int):
        rng = CounterRNG(seed)
        self.batch = batch
        self.z = torch.from_numpy(rng.normal("diversity/z", np.arange(self.NUM_GROUPS * self.GROUP_SIZE), (z_dim,)))
        labels = np.zeros(self.NUM_GROUPS, dtype=np.int64)
        if c_dim > 0:
            labels = rng.integers_from("diversity/c", np.arange(self.NUM_GROUPS), dataset.label_distribution())
        self.labels = torch.from_numpy(labels.repeat(self.GROUP_SIZE))
        distance = real_pair_distance(dataset, seed, self.NUM_REAL_PAIRS) if distributed.rank() == 0 else 0.0
        self.real_distance: float = distributed.broadcast_object(distance)

    def measure(self, G_ema: Generator) -> float | None:
        """The ratio; None if no class has two real images. Rank 0 computes it, but every process must call this."""
        if self.real_distance == 0:
            return None
        own = self._fake_distance(G_ema) / self.real_distance if distributed.rank() == 0 else 0.0
        ratio: float = distributed.broadcast_object(own)
        return ratio

    def _fake_distance(self, G_ema: Generator) -> float:
        with autotuning(False):
            parts = [synthesize(G_ema, z, labels).clamp(-1, 1).cpu()
                     for z, labels in zip(self.z.split(self.batch), self.labels.split(self.batch), strict=True)]
        images = torch.cat(parts).unflatten(0, (self.NUM_GROUPS, self.GROUP_SIZE))
        a, b = torch.triu_indices(self.GROUP_SIZE, self.GROUP_SIZE, offset=1)
        return float(np.mean([float((group[a] - group[b]).abs().mean()) for group in images]))

#----------------------------------------------------------------------------
# Verdicts.

@dataclasses.dataclass(frozen=True)
class Measures:
    """The numbers of one tick from which the health of a run is judged; None: not measured."""

    diversity: float | None     # As `DiversityProbe` measures it.
    sign_real: float | None     # Mean sign of D's logits of real images, in [-1, 1].
    sign_fake: float | None


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way in which a run may go wrong, the numbers that show it, and the advice that the user gets."""

    name: str
    is_bad: Callable[[Measures], bool]
    text: str                   # May name fields of Measures, which are filled in.


MIN_DIVERSITY = 0.05
PINNED_SIGN = 0.99


def low_diversity(m: Measures) -> bool:
    """Whether all z give about the same image of a class. A generator whose images are not finite counts, too."""
    return m.diversity is not None and not m.diversity >= MIN_DIVERSITY


def pinned_signs(m: Measures) -> bool:
    """Whether D is sure of nearly every real and nearly every generated image, rightly or wrongly."""
    return (m.sign_real is not None and m.sign_fake is not None
            and abs(m.sign_real) > PINNED_SIGN and abs(m.sign_fake) > PINNED_SIGN)


RULES = (
    Rule("collapse", low_diversity,
         "images of one class are nearly the same for every z (diversity {diversity:.3f} of real images'): look at the "
         "newest fakes*.png; start again from a snapshot before it fell, with half --glr and --dlr; with few images "
         "per class try --diversity=4; check that --mirror and the data fit"),
    Rule("pinned signs", pinned_signs,
         "the discriminator's signs no longer move (mean {sign_real:+.3f} on real, {sign_fake:+.3f} on generated "
         "images), so the generator learns little from it: halve --dlr, or take a larger --batch; with few images take "
         "--preset=small; check that --data has the images you mean"),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The news that a rule began or ceased to hold."""

    name: str
    is_bad: bool
    text: str


class CollapseWatch:
    """Turns measurements into verdicts: a rule must hold PATIENCE times in a row, for PATIENCE_STEPS, after a warm-up.

    A discriminator begins with easy images and is sure of them for a while, which is as it should be. One verdict is
    given when a rule has held for long enough, and one when it no longer holds.
    """

    WARMUP_STEPS = 500          # Iterations since the start of the stage.
    PATIENCE = 3                # Measurements, one per tick.
    PATIENCE_STEPS = 100        # Iterations from the first of them to the last.

    def __init__(self, rules: tuple[Rule, ...] = RULES):
        self._rules = rules
        self._bad_steps: dict[str, list[int]] = {rule.name: [] for rule in rules}   # Steps in a row at which it held.
        self._told: set[str] = set()

    def update(self, measures: Measures, step: int) -> list[Verdict]:
        """Look at one tick's measurements, taken after `step` iterations."""
        if step < self.WARMUP_STEPS:
            return []
        verdicts = []
        for rule in self._rules:
            steps = self._bad_steps[rule.name] = [*self._bad_steps[rule.name], step] if rule.is_bad(measures) else []
            if not steps and rule.name in self._told:
                self._told.remove(rule.name)
                verdicts.append(Verdict(rule.name, False, "over"))
            elif (rule.name not in self._told and len(steps) >= self.PATIENCE
                  and steps[-1] - steps[0] >= self.PATIENCE_STEPS):
                self._told.add(rule.name)
                verdicts.append(Verdict(rule.name, True, rule.text.format(**dataclasses.asdict(measures))))
        return verdicts

#----------------------------------------------------------------------------

class HealthCheck:
    """The numbers and verdicts that training asks for once per tick. Every process must make the same calls."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, guard: GradientGuard):
        generator = config.generator
        self.guard, self.stops = guard, config.on_collapse == "stop"
        self.probe = DiversityProbe(dataset, generator.c_dim, generator.z_dim, config.seed, config.batch_gpu)
        self.watch = CollapseWatch()

    def numbers(self, G_ema: Generator) -> dict[str, float | None]:
        """The diversity, and the non-finite gradient elements since this process began: all, and per network."""
        counts = self.guard.counts()
        by_network = {f"nonfinite/{net}": sum(n for phase, n in counts.items() if phase.startswith(net))
                      for net in ("G", "D")}
        return {"diversity": self.probe.measure(G_ema), "nonfinite": sum(counts.values())} | by_network

    def judge(self, stats: dict[str, Stat], numbers: dict[str, float | None], cur_nimg: int, step: int,
              tell: Callable[[Verdict, int], None]) -> bool:
        """Tell what changed; returns whether to save and stop.

        Args:
            stats: Statistics of the tick.
            numbers: From `numbers`.
            cur_nimg: Images shown.
            step: Iterations done in this stage.
            tell: Takes a verdict and `cur_nimg`.
        """
        signs = [stats[name].mean if name in stats else None for name in ("Loss/signs/real", "Loss/signs/fake")]
        verdicts = self.watch.update(Measures(numbers["diversity"], *signs), step)
        for verdict in verdicts:
            tell(verdict, cur_nimg)
        return self.stops and any(verdict.is_bad for verdict in verdicts)
