# SPDX-License-Identifier: Apache-2.0
"""Finite samples for the study of one-dimensional latents: known ones, random ones, and those of a file."""
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.spatial.distance import pdist, squareform

from dnnlib import UserError
from dnnlib.util import first_line

_LEAVES = np.deg2rad([90.0, 210.0, 330.0])
KNOWN = {
    "star": np.concatenate([np.zeros([1, 2]), np.stack([np.cos(_LEAVES), np.sin(_LEAVES)], axis=1)]),
    "eight": np.array([[.1, .2], [.9, .1], [.5, .5], [.2, .8], [.8, .9], [.6, .15], [.35, .35], [.95, .55]]),
    "bent": np.array([[0, 0], [2, 0], [1, .1], [1, 2]]),
    "triangle": np.array([[0, 0], [1, 0], [.5, np.sqrt(.75)]]),
    "square": np.array([[0.0, 0], [1, 0], [1, 1], [0, 1]]),
    "line": np.array([[0.0], [1], [3]]),
}


def checked(points: np.ndarray, name: str) -> np.ndarray:
    """A sample as float64 [n, d]; [n] is read as n points on the line.

    Args:
        points: Numbers [n, d] or [n].
        name: The option or the file that messages name.

    Raises:
        UserError: fewer than two points, points that coincide, numbers that are none, or another shape.
    """
    if points.dtype.kind not in "iuf" or points.ndim not in (1, 2) or points.size == 0:
        raise UserError(f"{name}: an array of {points.dtype} and shape {list(points.shape)}: give numbers [points, d]")
    points = points.reshape(len(points), -1).astype(np.float64)
    if not np.isfinite(points).all():
        raise UserError(f"{name}: row {int(np.argwhere(~np.isfinite(points))[0, 0])} is not finite: leave it out")
    if len(points) < 2:
        raise UserError(f"{name}: one point: a walk needs at least two")
    squares = squareform(pdist(points, "sqeuclidean"))      # Squares are the costs: they must not vanish either.
    np.fill_diagonal(squares, np.inf)
    if squares.min() == 0:
        first, second = np.unravel_index(int(squares.argmin()), squares.shape)
        raise UserError(f"{name}: points {first} and {second} are the same: leave one out")
    return points


def load(path: str) -> np.ndarray:
    """The sample [n, d] of a file: .npy, or .csv with a point per line and no heading.

    Raises:
        UserError: the file cannot be read, or see `checked`.
    """
    readers: dict[str, Callable[[], np.ndarray]] = {".npy": lambda: np.load(path, allow_pickle=False),
                                                    ".csv": lambda: np.loadtxt(path, delimiter=",", ndmin=2)}
    reader = readers.get(Path(path).suffix.lower())
    if reader is None:
        raise UserError(f"--points={path}: give a .npy or a .csv file")
    try:
        points = reader()
    except (OSError, ValueError) as error:
        raise UserError(f"--points={path}: cannot be read: {first_line(error)}") from None
    return checked(points, f"--points={path}")


def uniform(count: int, dims: int, rng: np.random.Generator) -> np.ndarray:
    """`count` independent points [count, dims], uniform in the unit cube."""
    return rng.uniform(size=[count, dims])
