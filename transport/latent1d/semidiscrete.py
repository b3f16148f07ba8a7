# SPDX-License-Identifier: Apache-2.0
"""The exact distance of the image of a uniform latent from a finite sample: W1 with the Euclidean distance."""
import dataclasses

import numpy as np
import scipy.optimize
import scipy.sparse as sp
from scipy.spatial.distance import cdist

from dnnlib import UserError


@dataclasses.dataclass(frozen=True)
class Transport:
    """An optimal transport from M places of equal weight to n points of equal weight."""

    value: float                # W1.
    plan: np.ndarray            # [M, n], sums to 1.


def distances(places: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Euclidean distances [M, n].

    Raises:
        UserError: places [M, d] and points [n, d] of different d.
    """
    if places.shape[1] != points.shape[1]:
        raise UserError(f"places of {places.shape[1]} dimensions and points of {points.shape[1]}: give them the same")
    found: np.ndarray = cdist(places, points)
    return found


def transport(places: np.ndarray, points: np.ndarray) -> Transport:
    """W1 of `places` [M, d] and `points` [n, d] by the network simplex method of POT.

    Raises:
        UserError: they have different dimensions.
    """
    import ot
    cost = distances(places, points)
    weights = [np.full(size, 1 / size) for size in cost.shape]
    plan, log = ot.emd(*weights, cost, numItermax=10 ** 7, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"POT: {log['warning']}")
    return Transport(value=float(log["cost"]), plan=plan)



#----------------------------------------------------------------------------
# Below the threshold.

def line_optimum(points: np.ndarray, speed: float, cells: int = 1200) -> tuple[float, np.ndarray]:
    """The best K-Lipschitz curve for points [n, 1] on the line, for any K: a linear programme.

    Sorting a curve keeps its Lipschitz constant, so the best one is the L1 projection of the sample's quantile function
    onto nondecreasing K-Lipschitz functions.

    Args:
        points: The sample.
        speed: K > 0.
        cells: Values of the function, rounded up to a multiple of n.

    Returns:
        (W1, values [cells] at the middles of the cells).

    Raises:
        UserError: points of more than one dimension, or K <= 0.
    """
    if points.ndim != 2 or points.shape[1] != 1:
        raise UserError(f"points of shape {list(points.shape)}: the linear programme takes points on the line, [n, 1]")
    check_speed(speed)
    copies = -(-cells // len(points))
    quantile = np.repeat(np.sort(points[:, 0]), copies)
    m = len(quantile)
    eye, step = sp.eye_array(m), sp.diags_array([-np.ones(m - 1), np.ones(m - 1)], offsets=[0, 1], shape=(m - 1, m))
    none = sp.csr_array((m - 1, m))
    rows = sp.block_array([[eye, -eye], [-eye, -eye], [step, none], [-step, none]], format="csr")
    limits = np.concatenate([quantile, -quantile, np.full(m - 1, speed / m), np.zeros(m - 1)])
    weights = np.repeat([0.0, 1 / m], m)
    result = scipy.optimize.linprog(weights, A_ub=rows, b_ub=limits, bounds=(None, None), method="highs")
    if not result.success:
        raise RuntimeError(f"HiGHS: {result.message}")
    return float(result.fun), result.x[:m]



def geometric_median(points: np.ndarray) -> tuple[np.ndarray, float]:
    """The place [d] with the least mean distance to points [n, d], to which K -> 0 leads, and that distance."""
    def mean_distance(place: np.ndarray) -> tuple[float, np.ndarray]:
        way = place - points
        length = np.linalg.norm(way, axis=1, keepdims=True)
        return float(length.mean()), (way / np.where(length > 0, length, 1)).mean(axis=0)

    best = points[int(cdist(points, points).mean(axis=1).argmin())]     # A sum of cones: often one of its tips.
    smooth = scipy.optimize.minimize(mean_distance, points.mean(axis=0), jac=True, method="L-BFGS-B",
                                     options={"ftol": 1e-15, "gtol": 1e-12})
    if smooth.fun < mean_distance(best)[0]:
        best = smooth.x
    return best, mean_distance(best)[0]


def check_speed(speed: float) -> None:
    """Raises UserError unless the Lipschitz constant is above 0."""
    if not speed > 0:
        raise UserError(f"a Lipschitz constant of {speed:g}: must be above 0")
