# SPDX-License-Identifier: Apache-2.0
"""Building blocks of the small discriminators: classic spectral normalisation and a halving block."""
import math

import torch
import torch.nn.functional as F

NORM_EPS = 1e-12

#----------------------------------------------------------------------------

class SpectralConv2d(torch.nn.Module):
    """Convolution whose weight is divided by its largest singular value (Miyato et al., ICLR 2018, algorithm 1).

    The weight is seen as a matrix [out_channels, in_channels * k * k]. Each forward in training mode does one step of
    power iteration on the stored singular vectors; in eval mode they stay as they are. sigma = u^T W v is
    differentiated with u and v held constant. Names in the state dict are those of the classic implementation.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0,
                 bias: bool = True):
        super().__init__()
        self.stride, self.padding = stride, padding
        fan_in = in_channels * kernel_size ** 2
        bound = 1 / math.sqrt(fan_in)       # The usual initialisation of convolutions in PyTorch.
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight_orig = torch.nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = torch.nn.Parameter(torch.empty(out_channels).uniform_(-bound, bound)) if bias else None
        self.register_buffer("weight_u", _unit(torch.randn(out_channels)))
        self.register_buffer("weight_v", _unit(torch.randn(fan_in)))

    @torch.no_grad()
    def _power_iteration(self) -> None:
        matrix = self.weight_orig.flatten(1)
        self.weight_v.copy_(_unit(matrix.T @ self.weight_u))
        self.weight_u.copy_(_unit(matrix @ self.weight_v))

    def weight(self) -> torch.Tensor:
        """weight_orig / sigma, [out_channels, in_channels, k, k]."""
        # Copies, because a second forward before the backward overwrites the buffers (real, then generated images).
        u, v = self.weight_u.clone(), self.weight_v.clone()
        return self.weight_orig / torch.dot(u, self.weight_orig.flatten(1) @ v)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H', W']."""
        if self.training:
            self._power_iteration()
        return F.conv2d(x, self.weight(), self.bias, stride=self.stride, padding=self.padding)


def _unit(vector: torch.Tensor) -> torch.Tensor:
    return F.normalize(vector, dim=0, eps=NORM_EPS)

#----------------------------------------------------------------------------

class DownBlock(torch.nn.Module):
    """Halve the size: spectrally normalised 4x4 convolution with stride 2, BatchNorm, leaky ReLU 0.2."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.main = torch.nn.Sequential(
            SpectralConv2d(in_channels, out_channels, kernel_size=4, stride=2, padding=1),
            torch.nn.BatchNorm2d(out_channels),
            torch.nn.LeakyReLU(0.2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H/2, W/2]."""
        return self.main(x)
