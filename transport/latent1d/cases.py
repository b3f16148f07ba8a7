# SPDX-License-Identifier: Apache-2.0
"""A sample with its best walks, and what generators with a one-dimensional latent are measured against."""
import dataclasses

import numpy as np

from transport.common.study import seeded
from transport.latent1d import line_generators, semidiscrete, walks
from transport.latent1d.curves import Curve, bound, optimal_curve
from transport.latent1d.line_generators import Training
from transport.latent1d.walks import Walk


@dataclasses.dataclass(frozen=True)
class Case:
    """A sample with its best walk, and the best that visits every point once (None beyond 15 points)."""

    points: np.ndarray
    walk: Walk
    permutation: Walk | None


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained generator and how good it is."""

    field: str
    loss: str
    start: str              # "random" or "optimum"
    speed: float            # K.
    w1: float               # Exact.
    ratio: float            # w1 / (c / 4 K). Below K* the denominator is no bound.
    curve: Curve

#----------------------------------------------------------------------------

def solve(points: np.ndarray, gap: float = 0) -> Case:
    """The best walks of a sample."""
    few = len(points) <= walks.MAX_EXACT
    return Case(points, walks.shortest_walk(points, gap), walks.shortest_permutation(points) if few else None)


def optimal_w1(case: Case, speeds: np.ndarray) -> np.ndarray:
    """W1 [k] of the optimal curve at each speed, computed by exact transport; on the line, of the linear programme."""
    if case.points.shape[1] == 1:
        return np.array([semidiscrete.line_optimum(case.points, k, cells=480)[0] for k in speeds])
    return walked_w1(case, case.walk, speeds)


def walked_w1(case: Case, walk: Walk | None, speeds: np.ndarray) -> np.ndarray:
    """W1 [k] of a walk's curve at each speed; NaN below its threshold, or without a walk."""
    values = np.full(len(speeds), np.nan)
    for i, speed in enumerate(speeds):
        if walk is not None and speed >= walk.threshold:
            values[i] = semidiscrete.transport(fine(optimal_curve(case.points, walk, speed), case), case.points).value
    return values


def fine(curve: Curve, case: Case) -> np.ndarray:
    """A curve as places: a whole number per point, at least 2000."""
    return curve.grid(len(case.points) * max(1, -(-2000 // len(case.points))))


def train(case: Case, training: Training, seed: int, number: int, device: str = "cpu",
          start: Curve | None = None) -> Trained:
    """The generator of random start `number`, or of one from a curve, and its exact W1."""
    stream = seeded(seed, f"{training.field}/{training.loss}/{number}")
    curve = line_generators.train(case.points, training, stream, device, start)
    w1 = semidiscrete.transport(fine(curve, case), case.points).value
    return Trained(field=training.field, loss=training.loss, start="random" if start is None else "optimum",
                   speed=training.speed, w1=w1, ratio=w1 / bound(case.walk, training.speed), curve=curve)
