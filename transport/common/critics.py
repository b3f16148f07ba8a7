# SPDX-License-Identifier: Apache-2.0
"""Small critics for points, and how a critic is trained with a gradient penalty.

Convention of this package: Lam is the weight of the penalty (the code's `lamb`; lambda of the papers is 2 Lam), and a
critic is large on `x` and small on `y`: it maximises E u(x) - E u(y) - Lam E (|grad u| - 1)_+^2.
"""
import itertools
import math
from collections.abc import Callable

import torch

from dnnlib import UserError

Critic = Callable[[torch.Tensor], torch.Tensor]      # [N, ...] -> [N]


class MLP(torch.nn.Module):
    """[N, in_features] -> [N], or [N, out_features] if there are several; smooth (SiLU) between linear layers."""

    def __init__(self, in_features: int, width: int = 64, depth: int = 3, out_features: int = 1):
        super().__init__()
        sizes = [in_features] + [width] * depth
        layers = [[torch.nn.Linear(a, b), torch.nn.SiLU()] for a, b in itertools.pairwise(sizes)]
        self.layers = torch.nn.Sequential(*itertools.chain(*layers), torch.nn.Linear(sizes[-1], out_features))
        self.out_features = out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y.squeeze(1) if self.out_features == 1 else y


def gradient(critic: Critic, x: torch.Tensor, create_graph: bool = False) -> torch.Tensor:
    """grad u at every sample: [N, ...] like `x`, whose own graph takes no part."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(critic(x).sum(), x, create_graph=create_graph)[0]


def between(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One point on each segment from x to y, t ~ U[0, 1] per sample: the sampling law sigma of the penalty."""
    t = torch.rand([len(x)] + [1] * (x.ndim - 1), generator=generator).to(x)
    return x.lerp(y, t)


def penalty(critic: Critic, z: torch.Tensor, two_sided: bool = False) -> torch.Tensor:
    """E (|grad u(z)| - 1)_+^2, without the bracket's plus if two-sided (Gulrajani et al. 2017): a scalar."""
    excess: torch.Tensor = gradient(critic, z, create_graph=True).flatten(1).norm(dim=1) - 1
    return (excess if two_sided else excess.clamp_min(0)).square().mean()

#----------------------------------------------------------------------------

def check_lamb(lamb: float) -> None:
    """Raises UserError unless the weight of the penalty is a positive number."""
    if not (math.isfinite(lamb) and lamb > 0):
        raise UserError(f"Lam {lamb}: the weight of the penalty must be a number above 0")


def w1_at_most(value: float, lamb: float) -> float:
    """2 Lam (sqrt(1 + P / Lam) - 1): the largest W1 for which the penalised optimum can be P = `value`.

    By Cauchy-Schwarz P is at least W1 + W1^2 / (4 Lam) (Milne & Nachman 2022, arXiv 2109.00528). What a trained critic
    reaches falls short of P, so it gives an estimate and no bound; a negative value gives 0.
    """
    check_lamb(lamb)
    return 2 * lamb * (math.sqrt(1 + max(value, 0.0) / lamb) - 1)
