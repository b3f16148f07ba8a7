# SPDX-License-Identifier: Apache-2.0
"""Kernel inception distance: squared maximum mean discrepancy with a cubic polynomial kernel."""
import dataclasses

import numpy as np
import torch

from dnnlib import UserError

NUM_SUBSETS = 100
MAX_SUBSET_SIZE = 1000

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class KernelDistance:
    """The mean over subsets and how it came about."""

    mean: float             # May be below zero: the estimator is unbiased.
    std: float              # Over the subsets, ddof 0.
    num_subsets: int
    subset_size: int
    seed: int


def squared_mmd(x: torch.Tensor, y: torch.Tensor) -> float:
    """Unbiased estimate of the squared MMD between two samples.

    Binkowski et al. 2018, "Demystifying MMD GANs", eq. 4 with the kernel of section 3, `(<a, b> / D + 1)^3`: sums
    within a sample leave out the diagonal.

    Args:
        x: float64 [M, D].
        y: float64 [M, D].
    """
    m, dim = x.shape
    k_xx = (x @ x.T / dim + 1) ** 3
    k_yy = (y @ y.T / dim + 1) ** 3
    k_xy = (x @ y.T / dim + 1) ** 3
    within = k_xx.sum() - k_xx.diagonal().sum() + k_yy.sum() - k_yy.diagonal().sum()
    return float(within / (m * (m - 1)) - 2 * k_xy.sum() / (m * m))


def kernel_distance(real: torch.Tensor, gen: torch.Tensor, num_subsets: int = NUM_SUBSETS,
                    max_subset_size: int = MAX_SUBSET_SIZE, seed: int = 0,
                    device: torch.device | str = "cpu") -> KernelDistance:
    """KID: the mean of `squared_mmd` over random subsets of both sets, in float64.

    Args:
        real: Features [N, D].
        gen: Features [M, D].
        num_subsets: How many pairs of subsets.
        max_subset_size: Their size; min(N, M) where there are fewer.
        seed: Chooses what is drawn (without replacement within a subset).
        device: Where to multiply; one without float64 is replaced by the CPU.

    Raises:
        UserError: fewer than two images on a side.
    """
    size = min(len(real), len(gen), max_subset_size)
    if size < 2:
        raise UserError(f"kid: {len(real)} real and {len(gen)} generated images: it needs two or more of each")
    device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
    rng = np.random.Generator(np.random.PCG64(seed))
    values = []
    for _subset in range(num_subsets):
        x = real[torch.from_numpy(rng.choice(len(real), size, replace=False))]
        y = gen[torch.from_numpy(rng.choice(len(gen), size, replace=False))]
        values.append(squared_mmd(x.to(device, torch.float64), y.to(device, torch.float64)))
    return KernelDistance(float(np.mean(values)), float(np.std(values)), num_subsets, size, seed)
