# SPDX-License-Identifier: Apache-2.0
"""Restoring images with a critic: the signal-to-noise ratio, and adversarial regularisation to compare with."""
import torch

from transport.common.critics import Critic, gradient

STEPS, STEP_SIZE = 200, 0.05        # Gradient descent as in the papers on Trust the Critics.


def psnr(x: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in decibels, [N], of images [N, ...] with values in [-1, 1]."""
    return -10 * (0.5 * (x - clean)).square().flatten(1).mean(dim=1).log10()


def regularise(critic: Critic, y: torch.Tensor, weight: float, steps: int = STEPS,
               step_size: float = STEP_SIZE) -> torch.Tensor:
    """Minimise |x - y|^2 + weight u(x) by gradient descent from y [N, ...]: adversarial regularisation.

    Lunz, Oektem and Schoenlieb 2018; they take weight = 2 E |noise|. For u of slope 1 along the way the minimiser is
    y - weight / 2 grad u(y), one step of Trust the Critics with eta = E |noise|.
    """
    x = y
    for _ in range(steps):
        x = x - step_size * (2 * (x - y) + weight * gradient(critic, x))
    return x
