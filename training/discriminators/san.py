# SPDX-License-Identifier: Apache-2.0
"""Last layers and losses for slicing adversarial networks: SAN (Takida et al., ICLR 2024).

A last linear map w is held as a direction w/|w| (unit norm per output row) and a trainable scale. The discriminator
step asks for two outputs of equal value, `scale * <direction, h>`, that differ in what they train:

* `fun = scale * <stop(direction), h>` trains features and scale; it goes with the base loss (hinge, say);
* `dir = stop(scale) * <direction, stop(h)>` trains the direction; it goes with a loss of the Wasserstein kind.

Any GAN becomes a SAN in three lines: `SanLinear(d, 1)` as last layer, `discriminator_loss("hinge", last.san(h(real)),
last.san(h(fake)))` as loss, and `project_directions(D)` after the step. docs/transport.md has an example.

The plain layers have the same interface and no direction objective: for training without SAN.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from dnnlib import UserError

NORM_EPS = 1e-12    # Keeps an all-zero row finite; any row of sensible size is untouched.

#----------------------------------------------------------------------------

class SanOutput(NamedTuple):
    """The two outputs of a discriminator step: equal values, different gradients."""

    fun: torch.Tensor   # Gradients reach features and scale, never the direction.
    dir: torch.Tensor   # Gradients reach the direction, never features or scale.


class SanMixin:
    """The common part of SAN layers: `weight` with one unit row per output along axis 0, and `scale`, one per row.

    A layer that mixes this in is a module with the parameters `weight` and `scale`, and calls `_split_norm_` on a
    freshly drawn weight.
    """

    weight: torch.nn.Parameter
    scale: torch.nn.Parameter

    def row_norms(self) -> torch.Tensor:
        """Norms of the stored rows, shaped to divide `weight`: [out, 1, ...]."""
        rows = self.weight.flatten(1)
        norms = rows.square().sum(dim=1).sqrt().clamp_min(NORM_EPS)
        return norms.reshape([-1] + [1] * (self.weight.ndim - 1))

    def direction(self) -> torch.Tensor:
        """w/|w|, of the shape of `weight`."""
        return self.weight / self.row_norms()

    @torch.no_grad()
    def project_(self) -> None:
        """Bring the stored rows back to unit norm, as after every optimiser step. The function stays the same."""
        self.weight.copy_(self.direction())

    @torch.no_grad()
    def _split_norm_(self) -> None:
        """scale := norm of the drawn weight, weight := its direction."""
        self.scale.copy_(self.row_norms().reshape(self.scale.shape))
        self.project_()

#----------------------------------------------------------------------------

class _SanLinearMap(SanMixin, torch.nn.Module):
    """The common part of linear and convolutional layers. A bias, where there is one, is added to the input, so that
    the output stays an inner product with the direction."""

    def __init__(self, weight_shape: tuple[int, ...], bias: bool):
        super().__init__()
        out_features, in_features = weight_shape[:2]
        fan_in = math.prod(weight_shape[1:])
        bound = 1 / math.sqrt(fan_in)       # PyTorch initialises its layers so, too.
        self.weight = torch.nn.Parameter(torch.empty(weight_shape).uniform_(-bound, bound))
        self.scale = torch.nn.Parameter(torch.empty(out_features))
        self.bias = torch.nn.Parameter(torch.zeros(in_features)) if bias else None
        self._split_norm_()

    def _apply_map(self, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        """<direction, x> per output row and position."""
        raise NotImplementedError

    def _along_channels(self, vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[C] -> [1, C, 1, ...] with the number of axes of `like`."""
        return vector.reshape([1, -1] + [1] * (like.ndim - 2))

    def _shifted(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.bias is None else x + self._along_channels(self.bias, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """scale * <w/|w|, x + bias>: the generator step and inference.

        Args:
            x: [N, in_features] or [N, in_channels, ...].
        """
        y = self._apply_map(self._shifted(x), self.direction())
        return y * self._along_channels(self.scale, y)

    def san(self, x: torch.Tensor) -> SanOutput:
        """Both outputs of the discriminator step; `x` as in `forward`."""
        h, direction = self._shifted(x), self.direction()
        fun = self._apply_map(h, direction.detach())
        along = self._apply_map(h.detach(), direction)
        scale = self._along_channels(self.scale, fun)
        return SanOutput(fun * scale, along * scale.detach())


class SanLinear(_SanLinearMap):
    """[N, in_features] -> [N, out_features]."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__((out_features, in_features), bias)

    def _apply_map(self, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        return F.linear(x, direction)


class SanConv1d(_SanLinearMap):
    """[N, in_channels, L] -> [N, out_channels, L']."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                 bias: bool = True):
        super().__init__((out_channels, in_channels, kernel_size), bias)
        self.stride, self.padding = stride, padding

    def _apply_map(self, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        return F.conv1d(x, direction, stride=self.stride, padding=self.padding)


class SanConv2d(_SanLinearMap):
    """[N, in_channels, H, W] -> [N, out_channels, H', W']; the norm is over input channels and taps."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                 bias: bool = True):
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), bias)
        self.stride, self.padding = stride, padding

    def _apply_map(self, x: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, direction, stride=self.stride, padding=self.padding)


class SanEmbedding(SanMixin, torch.nn.Module):
    """Class number -> last linear map of a conditional discriminator: one direction and one scale per class.

    The inner product with the features is the caller's: `<fun, h>` and `<dir, stop(h)>`.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(num_embeddings, embedding_dim))
        self.scale = torch.nn.Parameter(torch.empty(num_embeddings, 1))
        self._split_norm_()

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """int64 [N] -> scale * direction, [N, embedding_dim]."""
        return F.embedding(index, self.direction() * self.scale)

    def san(self, index: torch.Tensor) -> SanOutput:
        """int64 [N] -> the map that trains the scale and the map that trains the direction, each [N, embedding_dim]."""
        direction, scale = F.embedding(index, self.direction()), F.embedding(index, self.scale)
        return SanOutput(direction.detach() * scale, direction * scale.detach())

#----------------------------------------------------------------------------
# SAN without layers of its own, and layers with the same interface that are not SAN's.

def split_linear(x: torch.Tensor, weight: torch.Tensor) -> SanOutput:
    """Both outputs of an ordinary linear map [N, in] -> [N, out] with this `weight` [out, in], whose norm is the scale.

    It keeps the parameters of a network as they are: `split_linear(h, self.last.weight)`. The gradients of fun + dir by
    the weight are those of the ordinary layer. Nothing has to be projected; steps on `dir` alone make rows longer.
    """
    norms = weight.norm(dim=1)
    direction = weight / norms.clamp_min(NORM_EPS)[:, None]
    return SanOutput(F.linear(x, direction.detach()) * norms, F.linear(x.detach(), direction) * norms.detach())


class PlainLinear(torch.nn.Linear):
    """An ordinary linear layer. It has no direction objective: `san(x).dir` is zero."""

    def san(self, x: torch.Tensor) -> SanOutput:
        """Both outputs for x [N, in_features]."""
        y = self(x)
        return SanOutput(y, torch.zeros_like(y))


class PlainConv2d(torch.nn.Conv2d):
    """An ordinary convolution. It has no direction objective: `san(x).dir` is zero."""

    def san(self, x: torch.Tensor) -> SanOutput:
        """Both outputs for x [N, in_channels, H, W]."""
        y = self(x)
        return SanOutput(y, torch.zeros_like(y))


class PlainEmbedding(torch.nn.Embedding):
    """An ordinary table of class vectors. It has no direction objective: `san(index).dir` is zero."""

    def san(self, index: torch.Tensor) -> SanOutput:
        """Both outputs for class numbers, int64 [N]."""
        row = self(index)
        return SanOutput(row, torch.zeros_like(row))

#----------------------------------------------------------------------------
# Losses. Only `discriminator_loss` and `generator_loss` average over samples; what they are made of is per output.

class GanLoss(NamedTuple):
    """A GAN's loss as functions of an output f, all to be minimised, and what they make of the direction's objective.

    In the paper's words R1 = -real, R2 = -fake and R3 = generator.
    """

    real: Callable[[torch.Tensor], torch.Tensor]
    fake: Callable[[torch.Tensor], torch.Tensor]
    generator: Callable[[torch.Tensor], torch.Tensor]
    weight: Callable[[torch.Tensor], torch.Tensor]      # r = -R3' > 0: how much the generator heeds a sample.


def _square_softplus(x: torch.Tensor) -> torch.Tensor:
    return F.softplus(x).square()


GAN_LOSSES = {
    "wasserstein": GanLoss(lambda f: -f, lambda f: f, lambda f: -f, torch.ones_like),
    "hinge": GanLoss(lambda f: torch.relu(1 - f), lambda f: torch.relu(1 + f), lambda f: -f, torch.ones_like),
    "saturating": GanLoss(lambda f: F.softplus(-f), F.softplus, lambda f: -F.softplus(f), torch.sigmoid),
    "non-saturating": GanLoss(lambda f: F.softplus(-f), F.softplus, lambda f: F.softplus(-f),
                              lambda f: torch.sigmoid(-f)),
    # Least squares are made monotone by softplus inside the squares (Shibuya et al. 2024, "BigVSAN"): (1 - f)^2
    # would push away samples whose output is above 1.
    "least-squares": GanLoss(lambda f: _square_softplus(1 - f), _square_softplus, lambda f: _square_softplus(1 - f),
                             lambda f: 2 * F.softplus(1 - f) * torch.sigmoid(1 - f)),
}


def loss_named(name: str) -> GanLoss:
    """The loss of that name in `GAN_LOSSES`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in GAN_LOSSES:
        raise UserError(f"GAN loss {name}: choose from {', '.join(GAN_LOSSES)}")
    return GAN_LOSSES[name]


def direction_objective(name: str, real: SanOutput, fake: SanOutput, real_class: torch.Tensor | None = None,
                        fake_class: torch.Tensor | None = None) -> torch.Tensor:
    """L_omega, to be maximised: a scalar whose gradient reaches the direction only (Takida et al. 2024).

    E_0 dir - E_theta dir, means weighted by r(f), each normalised by its own sum: a vector added to all features then
    does not turn the direction. For the hinge and Wasserstein losses all weights are one. BigVSAN publishes
    E_theta R3(dir) - E_0 R3(dir) for least squares, whose weights are not normalised: on eight Gaussians that direction
    was far from the optimal one (docs/transport.md).

    Args:
        real, fake: outputs of one shape each, [N], [N, 1] or [N, ...].
        real_class, fake_class: int64 [N], for one direction per class: weights are normalised within each class. Both
            sides should show every class equally often.
    """
    loss = loss_named(name)
    return _weighted_mean(real, loss, real_class) - _weighted_mean(fake, loss, fake_class)


def _weighted_mean(output: SanOutput, loss: GanLoss, classes: torch.Tensor | None) -> torch.Tensor:
    """sum r dir / sum r, or with classes that of each class, averaged over samples."""
    weight = loss.weight(output.fun.detach())
    if classes is None:
        return (weight * output.dir).sum() / weight.sum()
    weight = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
    count = int(classes.max()) + 1
    totals = weight.new_zeros(count).index_add(0, classes, weight.sum(dim=1))
    members = weight.new_zeros(count).index_add(0, classes, weight.new_ones(len(classes)))
    share = weight * (members / totals)[classes][:, None] / len(classes)
    return (share * output.dir.reshape(weight.shape)).sum()


def discriminator_loss(name: str, real: SanOutput, fake: SanOutput, real_class: torch.Tensor | None = None,
                       fake_class: torch.Tensor | None = None) -> torch.Tensor:
    """The whole loss of a discriminator step, a scalar to be minimised: the GAN's on `fun`, minus L_omega on `dir`.

    With plain layers, whose `dir` is zero, it is the GAN's. Arguments as `direction_objective`; the generated images
    come detached.

    Raises:
        UserError: no loss of that name.
    """
    loss = loss_named(name)
    base = loss.real(real.fun).mean() + loss.fake(fake.fun).mean()
    return base - direction_objective(name, real, fake, real_class, fake_class)


def generator_loss(name: str, fake: torch.Tensor) -> torch.Tensor:
    """The loss of a generator step, a scalar to be minimised: E R3(f) of the layer's plain output f = last(h(G(z))).

    Raises:
        UserError: no loss of that name.
    """
    return loss_named(name).generator(fake).mean()


def project_directions(network: torch.nn.Module) -> None:
    """Bring the directions of all SAN layers of a network back to unit norm, as after every discriminator step."""
    for module in network.modules():
        if isinstance(module, SanMixin):
            module.project_()
