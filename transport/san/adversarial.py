# SPDX-License-Identifier: Apache-2.0
"""A discriminator that is a GAN's or a SAN's, class-conditional or not, and the two steps of training."""
from collections.abc import Callable

import torch

from training.discriminators.san import (
    PlainEmbedding,
    PlainLinear,
    SanEmbedding,
    SanLinear,
    SanOutput,
    discriminator_loss,
    generator_loss,
    project_directions,
)
from transport.common import critics

MODELS = ("gan", "san")
COLOURS = {"gan": "tab:orange", "san": "tab:blue"}      # The same in all figures.

#----------------------------------------------------------------------------

class Discriminator(torch.nn.Module):
    """f(x, c) = <w_c, h(x)>: features h, and a last layer that is SAN's or a plain one.

    Args:
        body: h, [N, ...] -> [N, width].
        width: D.
        san: Whether w is a direction and a scale that train apart.
        num_classes: Rows of w; 0: one row for all, and a bias.
    """

    def __init__(self, body: torch.nn.Module, width: int, san: bool, num_classes: int = 0):
        super().__init__()
        self.body, self.num_classes = body, num_classes
        self.last: SanEmbedding | PlainEmbedding | SanLinear | PlainLinear
        if num_classes:
            self.last = (SanEmbedding if san else PlainEmbedding)(num_classes, width)
        else:
            self.last = (SanLinear if san else PlainLinear)(width, 1)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """f: [N]; c int64 [N], without effect if there are no classes."""
        h = self.body(x)
        y: torch.Tensor = self.last(c) * h if self.num_classes else self.last(h)
        return y.sum(dim=1) if self.num_classes else y.squeeze(1)

    def san(self, x: torch.Tensor, c: torch.Tensor) -> SanOutput:
        """Both outputs of a discriminator step, [N] each."""
        h = self.body(x)
        if not self.num_classes:
            fun, along = self.last.san(h)
            return SanOutput(fun.squeeze(1), along.squeeze(1))
        row = self.last.san(c)
        return SanOutput((row.fun * h).sum(dim=1), (row.dir * h.detach()).sum(dim=1))

    def rows(self) -> torch.Tensor:
        """w, without the bias: [1 or num_classes, width]."""
        return self.last.weight.detach()

#----------------------------------------------------------------------------

def adam(network: torch.nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Adam as one kernel; with networks this small, most of the time would go into its many small operations."""
    return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, fused=True)


def train_discriminator(loss: str, D: Discriminator, optimizer: torch.optim.Optimizer, real: torch.Tensor,
                        fake: torch.Tensor, c: torch.Tensor,
                        penalty: Callable[[critics.Critic], torch.Tensor] | None = None) -> None:
    """Train D for one step. Both sides have the classes c [N]; `penalty` gets x -> f and returns a term of the loss."""
    classes = (c, c) if D.num_classes else ()
    value = discriminator_loss(loss, D.san(real, c), D.san(fake, c), *classes)
    if penalty is not None:
        value = value + penalty(lambda x: D.san(x, c).fun)      # Like the loss, the penalty leaves the direction alone.
    optimizer.zero_grad(set_to_none=True)
    value.backward()
    optimizer.step()
    project_directions(D)


def train_generator(loss: str, D: Discriminator, optimizer: torch.optim.Optimizer, fake: torch.Tensor,
                    c: torch.Tensor) -> None:
    """Train the generator that made `fake` for one step, which uses up the graph of `fake`."""
    D.requires_grad_(False)
    optimizer.zero_grad(set_to_none=True)
    generator_loss(loss, D(fake, c)).backward()
    optimizer.step()
    D.requires_grad_(True)
