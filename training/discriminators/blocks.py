# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the small discriminators: classic spectral normalisation and a halving block.

Officially both kinds of normalisation depend on how a batch is cut: BatchNorm takes its statistics from a micro-batch,
and spectral norm does a power iteration per forward. With `set_ghost_batch` neither does: statistics are taken over
ghost batches, which are a fixed number of consecutive samples each (Hoffer et al., NeurIPS 2017), and what moves with
the training moves once per step (`begin_step`, `end_step`).
"""
import math

import torch
import torch.nn.functional as F

from torch_utils import distributed

NORM_EPS = 1e-12

#----------------------------------------------------------------------------

class SpectralConv2d(torch.nn.Module):
    """Convolution whose weight is divided by its largest singular value (Miyato et al., ICLR 2018, algorithm 1).

    The weight is seen as a matrix [out_channels, in_channels * k * k]. Each forward in training mode does one step of
    power iteration on the stored singular vectors (with `once_per_step` only `begin_step` does); in eval mode they stay
    as they are. sigma = u^T W v is differentiated with u and v held constant. Names in the state dict are those of the
    classic implementation. The output is divided by sigma, which is the same and touches fewer numbers than dividing
    the weight.
    """

    once_per_step = False
    hold_bias = False           # True: a BatchNorm behind takes the bias out again, so its gradient is set to 0.
    weight_u: torch.Tensor      # [out_channels]: the left one of the stored singular vectors.
    weight_v: torch.Tensor      # [in_channels * k * k]: the right one.

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                 bias: bool = True):
        super().__init__()
        self.stride, self.padding = stride, padding
        fan_in = in_channels * kernel_size ** 2
        bound = 1 / math.sqrt(fan_in)       # PyTorch initialises convolutions so, too.
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight_orig = torch.nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias: torch.nn.Parameter | None = None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound))
        self.register_buffer("weight_u", _unit(torch.randn(out_channels)))
        self.register_buffer("weight_v", _unit(torch.randn(fan_in)))

    @torch.no_grad()
    def power_iteration(self) -> None:
        """Bring the stored vectors one step closer to the first singular pair."""
        matrix = self.weight_orig.flatten(1)
        self.weight_v.copy_(_unit(matrix.T @ self.weight_u))
        self.weight_u.copy_(_unit(matrix @ self.weight_v))

    def sigma(self) -> torch.Tensor:
        """The largest singular value, as far as the stored vectors know it."""
        # These are copies, because a second forward before the backward (real after generated) overwrites the buffers.
        u, v = self.weight_u.clone(), self.weight_v.clone()
        return torch.dot(u, self.weight_orig.flatten(1) @ v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W']."""
        if self.training and not self.once_per_step:
            self.power_iteration()
        y = F.conv2d(x, self.weight_orig, stride=self.stride, padding=self.padding)
        gain = self.sigma().reciprocal()
        if self.bias is None:
            return y * gain
        # Where the gradient should be 0, rounding errors would remain, and Adam makes whole steps of them.
        bias = self.bias.detach() + 0 * self.bias if self.hold_bias else self.bias
        return torch.addcmul(bias[:, None, None], y, gain)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return F.normalize(vector, dim=0, eps=NORM_EPS)

#----------------------------------------------------------------------------

class GhostBatchNorm2d(torch.nn.BatchNorm2d):
    """BatchNorm that in training normalises every ghost batch of consecutive samples by itself.

    With `ghost_batch` 0, the default, it is torch's BatchNorm: all samples of a forward are normalised together. With
    ghost batches the running statistics, which only evaluation uses, wait for `end_step` and then move once, towards
    the mean over all ghost batches of the step.
    """

    ghost_batch = 0
    sums: torch.Tensor      # [3, num_features]: means and variances, added up over ghost batches, and their number.

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.register_buffer("sums", torch.zeros(3, num_features), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the same shape; N is a multiple of `ghost_batch`."""
        if not (self.training and self.ghost_batch):
            return super().forward(x)
        num, channels = len(x) // self.ghost_batch, x.shape[1]
        # BatchNorm has one statistic per channel, so ghost batches become channels: [ghost_batch, num * C, H, W].
        grouped = x.unflatten(0, (num, self.ghost_batch)).transpose(0, 1).flatten(1, 2)
        mean, var = x.new_zeros(num * channels), x.new_ones(num * channels)
        y = F.batch_norm(grouped, mean, var, self.weight.repeat(num), self.bias.repeat(num), training=True,
                         momentum=1.0, eps=self.eps)
        with torch.no_grad():
            sums = [part.view(num, channels).sum(dim=0) for part in (mean, var)]
            self.sums += torch.stack([*sums, torch.full_like(sums[0], num)])
        z: torch.Tensor = y.unflatten(1, (num, channels)).transpose(0, 1).flatten(0, 1)
        return z

    @torch.no_grad()
    def move_running(self) -> None:
        """Move the running statistics by what `sums` holds, if it holds anything, and empty it."""
        running_mean, running_var, momentum = self.running_mean, self.running_var, self.momentum
        assert running_mean is not None, "the constructor asks for running statistics"
        assert running_var is not None
        assert momentum is not None
        assert self.num_batches_tracked is not None
        has_any = self.sums[2] > 0          # The device answers this itself, so nothing waits for it.
        for running, total in zip((running_mean, running_var), self.sums[:2], strict=True):
            running.copy_(torch.where(has_any, running.lerp(total / self.sums[2], momentum), running))
        self.num_batches_tracked += has_any[0]
        self.sums.zero_()


class DownBlock(torch.nn.Module):
    """Halve the size: spectrally normalised 4x4 convolution with stride 2, BatchNorm, leaky ReLU 0.2."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        conv = SpectralConv2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1)
        self.main = torch.nn.Sequential(conv, GhostBatchNorm2d(out_channels), torch.nn.LeakyReLU(0.2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H/2, W/2]."""
        y: torch.Tensor = self.main(x)
        return y

    def set_hold_bias(self, hold: bool) -> None:
        """Say whether the bias of the convolution, which BatchNorm takes out again, stays as it is."""
        conv = self.main[0]
        assert isinstance(conv, SpectralConv2d)
        conv.hold_bias = hold

#----------------------------------------------------------------------------
# Normalisation that does not depend on how a batch is cut.

def set_ghost_batch(module: torch.nn.Module, size: int) -> None:
    """Let the blocks below `module` normalise over ghost batches of this size; 0: over a micro-batch, as officially."""
    for part in module.modules():
        if isinstance(part, SpectralConv2d):
            part.once_per_step = size > 0
        elif isinstance(part, GhostBatchNorm2d):
            part.ghost_batch = size
        elif isinstance(part, DownBlock):
            part.set_hold_bias(size > 0)


def begin_step(module: torch.nn.Module) -> None:
    """Move the singular vectors, which move once per step, before its first forward."""
    for part in module.modules():
        if isinstance(part, SpectralConv2d) and part.once_per_step:
            part.power_iteration()


@torch.no_grad()
def end_step(module: torch.nn.Module) -> None:
    """Move the running statistics, which move once per step, after its last forward and over all processes."""
    norms = [part for part in module.modules() if isinstance(part, GhostBatchNorm2d) and part.ghost_batch]
    if norms:
        total = distributed.all_reduce_sum(torch.cat([norm.sums.flatten() for norm in norms]))
        for norm, sums in zip(norms, total.split([norm.sums.numel() for norm in norms]), strict=True):
            norm.sums.copy_(sums.view_as(norm.sums))
            norm.move_running()
