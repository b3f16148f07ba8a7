# SPDX-License-Identifier: Apache-2.0
"""Piecewise linear maps of [0, 1]: the generators of the study of one-dimensional latents."""
import dataclasses

import numpy as np

from dnnlib import UserError
from transport.latent1d.walks import Walk, steps


@dataclasses.dataclass(frozen=True)
class Curve:
    """A map t -> R^d, linear between knots."""

    times: np.ndarray       # [p], from 0 to 1, never falling.
    places: np.ndarray      # [p, d]

    def at(self, t: np.ndarray) -> np.ndarray:
        """Places [m, d] at latents [m]."""
        return np.stack([np.interp(t, self.times, x) for x in self.places.T], axis=1)

    def grid(self, cells: int) -> np.ndarray:
        """The image of a uniform latent as `cells` points of equal weight [cells, d]: the middle of every cell.

        The laws of both are within K / (4 cells) of each other in W1, for a K-Lipschitz curve.
        """
        return self.at((np.arange(cells) + 0.5) / cells)



def optimal_curve(points: np.ndarray, walk: Walk, speed: float) -> Curve:
    """Rest at every stop of a walk, go straight to the next at full speed, so that every point gets 1 / n of the time.

    Half of a step's time belongs to each of its ends; what a point is due beyond that is rest, shared by its visits.

    Args:
        points: [n, d]
        walk: A walk through all of them.
        speed: The Lipschitz constant K, at least the walk's threshold.

    Raises:
        UserError: the speed is below the threshold.
    """
    if not speed >= walk.threshold * (1 - 1e-12):
        raise UserError(f"a Lipschitz constant of {speed:g} is below this walk's threshold {walk.threshold:g}: "
                        f"no time would be left to rest")
    stops, lengths = np.array(walk.stops), steps(points, walk.stops)
    half = np.zeros(len(points))
    np.add.at(half, stops[:-1], lengths / 2)
    np.add.at(half, stops[1:], lengths / 2)
    rest = np.maximum(1 / len(points) - half / speed, 0) / np.bincount(stops, minlength=len(points))
    spent = np.zeros(2 * len(stops))                # Before every knot: arrive, leave, arrive, leave, ...
    spent[1::2] = rest[stops]
    spent[2::2] = lengths / speed
    times = np.cumsum(spent)
    return Curve(times=np.minimum(times / times[-1], 1), places=np.repeat(points[stops], 2, axis=0))


def bound(walk: Walk, speed: float) -> float:
    """c / (4 K): W1 between the sample and the walk's optimal curve, for K at or above the threshold."""
    return walk.cost / (4 * speed)
