# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between two Gaussians: the FID when they are fitted to features of images."""
import numpy as np


def frechet_distance(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of N(mu_a, sigma_a) and N(mu_b, sigma_b).

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6:
    `|mu_a - mu_b|^2 + tr(sigma_a) + tr(sigma_b) - 2 tr((sigma_a sigma_b)^(1/2))`.

    The trace is the sum of the square roots of the eigenvalues of `sigma_a sigma_b`, which are those of the symmetric
    `F^T sigma_b F` with `sigma_a = F F^T`. Real by construction and defined for singular matrices, where a matrix
    square root of the product is neither; eigenvalues that rounding made negative are zero.

    Args:
        mu_a, mu_b: [D].
        sigma_a, sigma_b: [D, D], symmetric positive semi-definite.

    Raises:
        ValueError: shapes do not fit, or a value is not finite.
    """
    mu_a, sigma_a, mu_b, sigma_b = (np.asarray(x, dtype=np.float64) for x in (mu_a, sigma_a, mu_b, sigma_b))
    dim = mu_a.shape[0] if mu_a.ndim == 1 else -1
    if mu_b.shape != (dim,) or sigma_a.shape != (dim, dim) or sigma_b.shape != (dim, dim):
        raise ValueError(f"means {mu_a.shape}, {mu_b.shape} and covariances {sigma_a.shape}, {sigma_b.shape} "
                         "are not [D], [D], [D, D], [D, D]")
    if not all(np.isfinite(x).all() for x in (mu_a, sigma_a, mu_b, sigma_b)):
        raise ValueError("a mean or covariance is not finite")
    values, vectors = np.linalg.eigh((sigma_a + sigma_a.T) / 2)
    factor = vectors * np.sqrt(values.clip(min=0))          # F [D, D]
    product = factor.T @ sigma_b @ factor
    roots = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2).clip(min=0))
    distance = np.square(mu_a - mu_b).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * roots.sum()
    return max(float(distance), 0.0)                        # A square; below zero only by rounding.
