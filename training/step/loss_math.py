# SPDX-License-Identifier: Apache-2.0
"""The losses as pure functions of network outputs. Every function returns one value per sample, [N].

The scores of a sample are its logits, concatenated over the scales of a backbone; a sample's value is their mean,
summed over backbones. How samples are averaged is the business of the caller: officially adversarial terms are summed
over a micro-batch while others are averaged, and nothing here may decide that (docs/architecture.md).
"""
import functools
from collections.abc import Iterable, Sequence

import torch

from training.discriminators.san import GAN_LOSSES, SanOutput

HINGE = GAN_LOSSES["hinge"]


def generator_loss(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """-D(G(z, c), c): logits [N, L] per backbone -> [N]."""
    return _sum_over_backbones(HINGE.generator(x) for x in logits)


def discriminator_loss_fake(outputs: Sequence[SanOutput]) -> torch.Tensor:
    """Hinge on `fun`, Wasserstein on `dir` (Takida et al. 2024, equation 14 with the hinge GAN): -> [N]."""
    return _sum_over_backbones(HINGE.fake(fun) + dir for fun, dir in outputs)


def discriminator_loss_real(outputs: Sequence[SanOutput]) -> torch.Tensor:
    """The loss of `discriminator_loss_fake` with the signs that real images have: -> [N]."""
    return _sum_over_backbones(HINGE.real(fun) - dir for fun, dir in outputs)


def _sum_over_backbones(terms: Iterable[torch.Tensor]) -> torch.Tensor:
    """[N, L] per backbone -> [N]: the means over logits, added up."""
    return functools.reduce(torch.add, (x.mean(dim=1) for x in terms))


def path_lengths(images: torch.Tensor, ws: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Norms of the Jacobian-vector products J_w^T y (Karras et al. 2020, section 3.2): -> [N], with their graph.

    Args:
        images: [N, 3, H, W], a function of `ws`.
        ws: [N, num_ws, w_dim].
        noise: [N, 3, H, W], standard normal.
    """
    height, width = images.shape[2:]
    product = (images * (noise.to(images.dtype) / (height * width) ** 0.5)).sum()
    (grad,) = torch.autograd.grad(product, ws, create_graph=True)
    return grad.square().sum(dim=2).mean(dim=1).sqrt()
