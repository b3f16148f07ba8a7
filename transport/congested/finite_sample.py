# SPDX-License-Identifier: Apache-2.0
"""Congested transport between two finite sets, exactly: what a critic without limits reaches on a fixed sample.

With n points each in general position, in three dimensions or more, the segments from x_i to y_j meet only in their
end points, and the penalty's law sigma is spread over them with density 1 / (n^2 d_ij). Only the critic's values a_i at
x_i and b_j at y_j matter (along a segment it is best straight), and the best critic solves

    max_{a,b}  mean(a) - mean(b) - (Lam / n^2) sum_ij (|a_i - b_j| / d_ij - 1)_+^2.

Its dual is quadratically regularised transport with signed flows f (f_ij from x_i to y_j, row and column sums 1/n):

    min_f  sum_ij |f_ij| d_ij + (n^2 / (4 Lam)) sum_ij f_ij^2 d_ij^2,
    f_ij = (2 Lam / n^2) (|a_i - b_j| / d_ij - 1)_+ sign(a_i - b_j) / d_ij.

Both follow from the duality of Milne & Nachman (2022, arXiv 2109.00528) for this sigma; the flow built from the critic
proves the value.
"""
import dataclasses

import numpy as np
import scipy.optimize
from scipy.spatial.distance import cdist, pdist

from dnnlib import UserError
from transport.common import ot_exact
from transport.common.critics import check_lamb

MIN_DIMS = 3            # In the plane segments cross, and on the line they overlap, which makes other problems of it.
MAX_POINTS = 1000
NEWTON_STEPS = 50       # A piecewise quadratic function: Newton ends after a few pieces.


@dataclasses.dataclass(frozen=True)
class FiniteSample:
    """A solution with its proof: dual <= P <= primal (+ what the balance is worth)."""

    dual: float             # The value that the critic reaches.
    primal: float           # The cost of the flow.
    balance: float          # Largest violation of the flow's row and column sums; they are 1/n.
    flow: np.ndarray        # f [n, n], signed.
    at_x: np.ndarray        # The critic's values a [n] at the points x.
    at_y: np.ndarray        # The critic's values b [n] at the points y.
    w1: float               # W1 of the two samples, by assignment.
    lower: float            # W1 + W1^2 / (4 Lam) <= P.
    upper: float            # P <= the cheaper of: along the best pairing, and spread over all pairs.


def check_samples(x: np.ndarray, y: np.ndarray) -> None:
    """Raises UserError unless both are [n, d] with n >= 2 distinct finite points in d >= 3 dimensions."""
    if x.shape != y.shape or x.ndim != 2:
        raise UserError(f"samples of shapes {list(x.shape)} and {list(y.shape)}: give two of one shape [points, dims]")
    count, dims = x.shape
    if count < 2:
        raise UserError(f"{count} point per sample: give two or more (for one, P = d + d^2 / (4 Lam))")
    if count > MAX_POINTS:
        raise UserError(f"{count} points per sample: an exact solution takes up to {MAX_POINTS}: use fewer")
    if dims < MIN_DIMS:
        raise UserError(f"samples in {dims} dimensions: segments between points meet there, give {MIN_DIMS} or more")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise UserError("samples with numbers that are not finite: remove them")
    if pdist(np.concatenate([x, y])).min() == 0:
        raise UserError("repeated points in the samples: leave each in once, and no point in both")


def bounds(x: np.ndarray, y: np.ndarray, lamb: float) -> tuple[float, float]:
    """(W1 + W1^2 / (4 Lam), E|x-y| + E|x-y|^2 / (4 Lam)) of two samples [n, d]: P lies between.

    The lower one is Cauchy-Schwarz; for the upper one every pair goes along its segment.
    """
    check_lamb(lamb)
    w1, distance = ot_exact.w1(x, y), cdist(x, y)
    return w1 + w1 ** 2 / (4 * lamb), float(distance.mean() + (distance ** 2).mean() / (4 * lamb))


def solve(x: np.ndarray, y: np.ndarray, lamb: float) -> FiniteSample:
    """P of two samples [n, d] with its proof: L-BFGS on the critic's values, then Newton's method to the last digit.

    Raises:
        UserError: Lam is not above 0, or the samples are not two sets of n >= 2 distinct points in d >= 3 dimensions.
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    check_lamb(lamb)
    check_samples(x, y)
    d, n = cdist(x, y), len(x)
    problem = _Dual(d, lamb)
    start = np.concatenate([d.mean(axis=1), np.zeros(n)])
    found = scipy.optimize.minimize(problem.loss, start, jac=True, method="L-BFGS-B",
                                    options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-12})
    values = problem.polish(found.x)
    flow = problem.flow(values)
    balance = max(np.abs(flow.sum(axis=0) - 1 / n).max(), np.abs(flow.sum(axis=1) - 1 / n).max())
    _, matched = ot_exact.assignment(x, y)
    lower, spread = bounds(x, y, lamb)
    upper = min(matched.mean() + n * (matched ** 2).mean() / (4 * lamb), spread)
    return FiniteSample(dual=-problem.loss(values)[0], primal=problem.cost(flow), balance=float(balance), flow=flow,
                        at_x=values[:n], at_y=values[n:], w1=float(matched.mean()), lower=lower, upper=float(upper))

#----------------------------------------------------------------------------

class _Dual:
    """The concave problem in the critic's values v = [a, b], as a loss to be minimised."""

    def __init__(self, d: np.ndarray, lamb: float):
        self.d, self.n, self.lamb = d, len(d), lamb

    def flow(self, values: np.ndarray) -> np.ndarray:
        """f [n, n] that belongs to the values."""
        step = values[:self.n, None] - values[None, self.n:]
        excess = np.clip(np.abs(step) / self.d - 1, 0, None)
        flow: np.ndarray = 2 * self.lamb / self.n ** 2 * excess * np.sign(step) / self.d
        return flow

    def cost(self, flow: np.ndarray) -> float:
        moved = np.abs(flow) * self.d
        return float(moved.sum() + self.n ** 2 / (4 * self.lamb) * (moved ** 2).sum())

    def loss(self, values: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the critic's objective, and its gradient: what the flow's row and column sums lack."""
        n = self.n
        flow = self.flow(values)
        penalty = n ** 2 / (4 * self.lamb) * ((flow * self.d) ** 2).sum()
        reached = values[:n].mean() - values[n:].mean() - penalty
        return -float(reached), np.concatenate([flow.sum(axis=1) - 1 / n, 1 / n - flow.sum(axis=0)])

    def polish(self, values: np.ndarray) -> np.ndarray:
        """Newton steps as long as the gradient shrinks."""
        _, grad = self.loss(values)
        for _ in range(NEWTON_STEPS):
            step = np.linalg.lstsq(self._hessian(values), grad, rcond=1e-12)[0]     # Adding a constant changes nothing.
            _, next_grad = self.loss(values - step)
            if np.abs(next_grad).max() >= np.abs(grad).max():
                break
            values, grad = values - step, next_grad
        return values

    def _hessian(self, values: np.ndarray) -> np.ndarray:
        active = (self.flow(values) != 0) * 2 * self.lamb / (self.n * self.d) ** 2
        return np.block([[np.diag(active.sum(axis=1)), -active], [-active.T, np.diag(active.sum(axis=0))]])
