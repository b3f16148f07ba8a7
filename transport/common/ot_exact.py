# SPDX-License-Identifier: Apache-2.0
"""Exact optimal transport of small samples with the Euclidean distance as cost: the ground truth of the studies."""
import numpy as np
import scipy.optimize
from scipy.spatial.distance import cdist

from dnnlib import UserError

MAX_POINTS = 5000       # An assignment of n points takes n^2 numbers of memory and up to n^3 steps.



def assignment(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An optimal pairing of two samples [N, d] of equal size.

    Returns:
        (partner, distance): x[i] goes to y[partner[i]], over distance[i]; both [N]. Their mean distance is W1.

    Raises:
        UserError: sizes differ, or there are more than MAX_POINTS points.
    """
    if x.shape != y.shape:
        raise UserError(f"samples of shapes {list(x.shape)} and {list(y.shape)}: an assignment takes two of one shape")
    if len(x) > MAX_POINTS:
        raise UserError(f"{len(x)} points: an exact assignment takes up to {MAX_POINTS}: use fewer")
    cost = cdist(x, y)
    _, partner = scipy.optimize.linear_sum_assignment(cost)
    return partner, cost[np.arange(len(x)), partner]


def w1(x: np.ndarray, y: np.ndarray) -> float:
    """W1 of two samples [N, d] of equal size, by assignment."""
    return float(assignment(x, y)[1].mean())
