# SPDX-License-Identifier: Apache-2.0
"""Axes of w: the algebra, in float64, without networks."""
from typing import NamedTuple

import numpy as np

from dnnlib import UserError

FLAT = 1e-6             # A spread of w below this part of its size is rounding.


class Axes(NamedTuple):
    """Axes by rank."""

    vectors: np.ndarray         # float64 [N, D], of unit length.
    shares: np.ndarray          # float64 [N]: which part of the trace of the matrix belongs to each.


def principal_axes(matrix: np.ndarray, num: int) -> Axes:
    """The eigenvectors of a symmetric matrix [D, D] with the `num` largest eigenvalues, which are not negative.

    An eigenvector has no sign of its own. It is given the one that makes its largest component positive, so that the
    same matrix has the same axes everywhere.
    """
    values, vectors = np.linalg.eigh(matrix.astype(np.float64))
    first = vectors.T[::-1][:num]
    largest = np.abs(first).argmax(axis=1)
    signs = np.sign(first[np.arange(len(first)), largest])
    shares = np.clip(values[::-1][:num], 0, None) / max(float(np.trace(matrix)), np.finfo(np.float64).tiny)
    return Axes(first * signs[:, None], shares)


def factorised(weights: np.ndarray, num: int) -> Axes:
    """The axes along which a change of w changes `weights` @ w most: eigenvectors of A^T A (Shen and Zhou 2021).

    Args:
        weights: A, [rows, D].
        num: How many axes.
    """
    A = weights.astype(np.float64)
    return principal_axes(A.T @ A, num)


def components(w: np.ndarray, num: int) -> Axes:
    """Principal components of w [N, D] (Harkonen et al. 2020)."""
    centered = w.astype(np.float64) - w.mean(axis=0, dtype=np.float64)
    return principal_axes(centered.T @ centered / max(len(w) - 1, 1), num)


def deviations(axes: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Standard deviations [K] of w [N, D] along axes [K, D].

    Raises:
        UserError: w does not vary along one of them.
    """
    along = w.astype(np.float64) @ axes.T
    found: np.ndarray = along.std(axis=0, ddof=1)
    size = float(np.sqrt(np.mean(np.square(w, dtype=np.float64)) * w.shape[1]))
    flat = found <= FLAT * size
    if flat.any():
        first = int(flat.argmax())
        remedy = f"ask for at most {first} by --num" if first else "take a network that is trained further"
        raise UserError(f"w of this network does not vary along {int(flat.sum())} of {len(axes)} directions, so that "
                        f"strengths along them have no unit: {remedy}")
    return found
