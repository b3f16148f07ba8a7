# SPDX-License-Identifier: Apache-2.0
"""How the best walk, its threshold and the best curve change with the number of random points."""
import dataclasses

import numpy as np
from scipy.stats import qmc

from transport.latent1d import point_sets, semidiscrete
from transport.latent1d.curves import optimal_curve
from transport.latent1d.walks import shortest_walk, tree_walk


@dataclasses.dataclass(frozen=True)
class Rate:
    """Means over draws of n independent points, uniform in the unit cube of d dimensions."""

    dims: int
    points: int
    draws: int
    cost: float                     # c*, or the cost of the best walk that is known.
    cost_error: float               # Standard error of `cost`.
    lower: float                    # Lower bound of c*.
    threshold: float                # Median of K* over these walks; a mean would follow a few near points.


def measure(count: int, dims: int, draws: int, gap: float, rng: np.random.Generator, tree: bool = False) -> Rate:
    """Measure a `Rate`. With `tree`, the walks go around the spanning tree, which suits many points and may cost up to
    twice as much as the best walk."""
    samples = [point_sets.uniform(count, dims, rng) for _ in range(draws)]
    walks = [tree_walk(points) if tree else shortest_walk(points, gap) for points in samples]
    cost = np.array([walk.cost for walk in walks])
    return Rate(dims=dims, points=count, draws=draws, cost=float(cost.mean()),
                cost_error=float(cost.std(ddof=1) / np.sqrt(draws)) if draws > 1 else float("nan"),
                lower=float(np.mean([walk.lower for walk in walks])),
                threshold=float(np.median([walk.threshold for walk in walks])))


def line_cost(count: int) -> float:
    """E c* of n independent uniform points on [0, 1]: n - 1 gaps, of mean square 2 / ((n + 1) (n + 2)) each."""
    return 2 * (count - 1) / ((count + 1) * (count + 2))


def slope(sizes: list[int], values: list[float]) -> float:
    """The exponent of a power law through (size, value), by least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ToTheLaw:
    """W1 to the uniform law itself, mean over draws: of the sample, and of the curve that imitates it."""

    dims: int
    points: int
    sample: float
    curve: float                    # The curve with K = K* of the sample's best walk.


def measure_to_law(count: int, dims: int, draws: int, gap: float, rng: np.random.Generator,
                   resolution: int = 1024) -> ToTheLaw:
    """Measure a `ToTheLaw`. The law is represented by `resolution` points of a Sobol' sequence, a power of two."""
    law = qmc.Sobol(dims, rng=rng).random(resolution)
    values = []
    for _ in range(draws):
        points = point_sets.uniform(count, dims, rng)
        walk = shortest_walk(points, gap)
        places = optimal_curve(points, walk, walk.threshold).grid(resolution)
        values.append([semidiscrete.transport(law, points).value, semidiscrete.transport(law, places).value])
    sample, curve = np.mean(values, axis=0)
    return ToTheLaw(dims=dims, points=count, sample=float(sample), curve=float(curve))
