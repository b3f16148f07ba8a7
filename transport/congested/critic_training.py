# SPDX-License-Identifier: Apache-2.0
"""A critic trained with a gradient penalty, and what it reaches on fresh samples.

It maximises E u(x) - E u(y) - Lam E (|grad u(z)| - 1)_+^2, z = (1-t)x + ty with one t per sample; the pairs (x, y) are
independent. What any critic reaches is at most P of oracles.py (but for the noise of the samples), whatever its
size and however it was trained. The two-sided penalty of WGAN-GP (Gulrajani et al. 2017) leaves out the bracket's plus:
it forbids more, so that its critic reaches at most as much.
"""
import dataclasses
import math

import numpy as np
import torch

from dnnlib import UserError
from transport.common import critics
from transport.common.critics import check_lamb
from transport.congested.pairs import Draw

SIDES = ("one-sided", "two-sided")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a critic is trained."""

    lamb: float
    sides: str = "one-sided"
    steps: int = 2500
    batch: int = 512            # Fresh pairs per step.
    rate: float = 1e-3          # Adam's rate, which falls to 0 along a cosine.
    width: int = 64
    depth: int = 3
    device: str = "cpu"


@dataclasses.dataclass(frozen=True)
class Reached:
    """A critic's value on samples; all expectations are means over them."""

    gap: float              # E u(x) - E u(y), which implementations log as the Wasserstein estimate.
    penalty: float          # Lam E (|grad u| - 1)_+^2.
    error: float            # Standard error of the objective.
    norms: np.ndarray       # |grad u| on sigma [count].

    @property
    def objective(self) -> float:
        """The value that was maximised, an estimate of P from below."""
        return self.gap - self.penalty

    def histogram(self, bins: int = 60) -> tuple[np.ndarray, np.ndarray]:
        """(density [bins], edges [bins + 1]) of |grad u| on sigma, up to its 99.9 % quantile."""
        return np.histogram(self.norms, bins=bins, range=(0, float(np.quantile(self.norms, 0.999))), density=True)

    def summary(self) -> dict[str, float]:
        """The numbers, rounded, for a JSON line."""
        values = {"gap": self.gap, "penalty": self.penalty, "objective": self.objective, "error": self.error,
                  "grad_mean": float(self.norms.mean())}
        return {name: round(value, 4) for name, value in values.items()}


def check_draw(draw: Draw, generator: torch.Generator) -> int:
    """The number of features of a pair of laws.

    Raises:
        UserError: x and y are not both [count, features] with finite numbers.
    """
    x, y = draw(2, generator)
    if x.shape != y.shape or x.ndim != 2:
        raise UserError(f"samples of shapes {list(x.shape)} and {list(y.shape)}: give two of one shape [points, dims]")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise UserError("samples with numbers that are not finite: remove them")
    return x.shape[1]


def train(draw: Draw, recipe: Recipe, generator: torch.Generator) -> critics.MLP:
    """A critic for a pair of laws; `generator` (on the CPU) settles its first weights and every sample.

    Raises:
        UserError: Lam is not above 0, unknown `sides`, or x and y have different shapes.
    """
    check_lamb(recipe.lamb)
    if recipe.sides not in SIDES:
        raise UserError(f"sides {recipe.sides}: choose from {', '.join(SIDES)}")
    dims = check_draw(draw, generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2 ** 31, [1], generator=generator)))
        critic = critics.MLP(dims, recipe.width, recipe.depth).to(recipe.device)
    adam = torch.optim.Adam(critic.parameters(), lr=recipe.rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam, recipe.steps)
    for _ in range(recipe.steps):
        x, y = (sample.to(recipe.device) for sample in draw(recipe.batch, generator))
        z = critics.between(x, y, generator)
        pull = critic(y).mean() - critic(x).mean()
        loss = pull + recipe.lamb * critics.penalty(critic, z, two_sided=recipe.sides == "two-sided")
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()
        cosine.step()
    return critic.requires_grad_(False).eval()


def measure(critic: critics.MLP, draw: Draw, recipe: Recipe, generator: torch.Generator, *,
            count: int = 20_000, rounds: int = 40) -> Reached:
    """Measure what a critic reaches on `rounds` independent batches of `count` fresh samples each."""
    check_lamb(recipe.lamb)
    gaps, penalties, norms = [], [], []
    for _ in range(rounds):
        x, y = (sample.to(recipe.device) for sample in draw(count, generator))
        norm = critics.gradient(critic, critics.between(x, y, generator)).flatten(1).norm(dim=1)
        excess = norm - 1 if recipe.sides == "two-sided" else (norm - 1).clamp_min(0)
        with torch.no_grad():
            gaps.append((critic(x).double().mean() - critic(y).double().mean()).item())
        penalties.append(recipe.lamb * excess.double().square().mean().item())
        norms.append(norm.cpu().numpy())
    spread = np.std(np.subtract(gaps, penalties), ddof=1) if rounds > 1 else math.nan
    return Reached(float(np.mean(gaps)), float(np.mean(penalties)), float(spread / math.sqrt(rounds)),
                   np.concatenate(norms))
