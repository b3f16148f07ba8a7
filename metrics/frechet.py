# SPDX-License-Identifier: Apache-2.0
"""Frechet distance between two Gaussians: the FID when they are fitted to features of images."""
import numpy as np
import scipy.linalg.lapack
import torch

#----------------------------------------------------------------------------

def covariance_factor(sigma: np.ndarray) -> np.ndarray:
    """F [D, r] with `F F^T = sigma` [D, D], where r is the numerical rank.

    Cholesky's decomposition with pivots (LAPACK's dpstrf). It stops where all that is left is below D times the
    rounding error of the largest entry, so singular matrices need no exception: their factor is just narrower.
    """
    packed, pivots, rank, _info = scipy.linalg.lapack.dpstrf(np.asfortranarray((sigma + sigma.T) / 2), lower=1)
    factor = np.empty([len(sigma), rank])
    factor[pivots - 1] = np.tril(packed[:, :rank])
    return factor


def frechet_distance(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """Squared Frechet (2-Wasserstein) distance of N(mu_a, sigma_a) and N(mu_b, sigma_b).

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule", eq. 6:
    `|mu_a - mu_b|^2 + tr(sigma_a) + tr(sigma_b) - 2 tr((sigma_a sigma_b)^(1/2))`.

    The trace is the sum of the singular values of `A^T B` with `sigma_a = A A^T` and `sigma_b = B B^T`, here the square
    roots of the eigenvalues of its Gram matrix. Real by construction, and as exact for singular matrices as for others:
    the factors have full rank, so there are no eigenvalues that should be zero and whose rounding errors a square root
    would magnify.

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
    product = torch.from_numpy(covariance_factor(sigma_a).T @ covariance_factor(sigma_b))       # A^T B [r_a, r_b]
    wide = product if product.shape[0] <= product.shape[1] else product.T
    roots = torch.linalg.eigvalsh(wide @ wide.T).clamp(min=0).sqrt()        # PyTorch's LAPACK is faster than NumPy's.
    distance = np.square(mu_a - mu_b).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * float(roots.sum())
    return max(float(distance), 0.0)                        # A square; below zero only by rounding.
