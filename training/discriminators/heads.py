# SPDX-License-Identifier: Apache-2.0
"""The trainable part of a projected discriminator: one small network per scale (Sauer et al., NeurIPS 2021, section 3).

Names of modules are those of official snapshots: mini_discs.<i>.main.<j>.main.<k>, .cls, .embed, .last_layer.
"""
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F

from training.discriminators.blocks import DownBlock, SpectralConv2d
from training.discriminators.san import PlainConv2d, PlainEmbedding, SanConv2d, SanEmbedding, SanOutput

END_SIZE = 8            # Maps are halved down to this size before the last layer.
CHANNELS_TIMES_SIZE = 4096
MIN_CHANNELS = 64
LAST_KERNEL = 4

#----------------------------------------------------------------------------

def nominal_size(map_size: int) -> int:
    """The next power of two at or above the side of a map: 112 -> 128."""
    return 1 << max(map_size - 1, 0).bit_length()


def channels_at(size: int, max_channels: int) -> int:
    """Channels of a block whose output has this nominal size: 64, 128, 256, 512 at 64, 32, 16, 8, capped."""
    return min(max(CHANNELS_TIMES_SIZE // size, MIN_CHANNELS), max_channels)


def down_blocks(in_channels: int, map_size: int, max_channels: int) -> tuple[torch.nn.Sequential, int, int]:
    """Blocks that bring a map of this size to the nominal size 8, and at least one.

    Official maps are never so small that they need none, but those of networks of your own are: without a block their
    scale would be a linear function of frozen features, which sees means and no variety.

    Returns:
        The blocks, their output channels, and the kernel size of the layer that comes next (4, or less if the map that
        is left is smaller than that).
    """
    blocks: list[torch.nn.Module] = []
    channels, size = in_channels, nominal_size(map_size)
    while size > END_SIZE or (not blocks and map_size > 1):
        size, map_size = size // 2, map_size // 2
        blocks.append(DownBlock(channels, channels_at(size, max_channels)))
        channels = channels_at(size, max_channels)
    return torch.nn.Sequential(*blocks), channels, min(LAST_KERNEL, map_size)



#----------------------------------------------------------------------------

class ScaleDisc(torch.nn.Module):
    """The small discriminator of one scale: blocks, then inner products of the features with one or more directions."""

    def __init__(self, in_channels: int, map_size: int, max_channels: int):
        super().__init__()
        self.main, self.main_channels, self.kernel = down_blocks(in_channels, map_size, max_channels)

    def num_logits(self, x: torch.Tensor) -> int:
        """Logits per sample of a map `x` [N, in_channels, H, W]."""
        height, width = (size >> len(self.main) for size in x.shape[2:])
        return (height - self.kernel + 1) * (width - self.kernel + 1)

    def san(self, x: torch.Tensor, c: torch.Tensor) -> SanOutput:
        """Both outputs of the discriminator step, each [N, h, w], of a map `x` for one-hot `c` [N, c_dim]."""
        raise NotImplementedError

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """The features of which inner products with directions are taken: [N, positions, D]."""
        raise NotImplementedError

    def directions(self) -> torch.Tensor:
        """The directions as unit vectors: [c_dim, D], or [1, D] without classes."""
        raise NotImplementedError


class SingleDisc(ScaleDisc):
    """Unconditional: blocks, then a last convolution to one channel without a bias."""

    def __init__(self, in_channels: int, map_size: int, max_channels: int = 512, san: bool = True):
        super().__init__(in_channels, map_size, max_channels)
        self.last_layer = (SanConv2d if san else PlainConv2d)(self.main_channels, 1, self.kernel, bias=False)

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Logits [N, h, w] of a map `x` [N, in_channels, H, W]; `c` is not used."""
        logits: torch.Tensor = self.last_layer(self.main(x))
        return logits[:, 0]

    def san(self, x: torch.Tensor, c: torch.Tensor) -> SanOutput:
        """As in `ScaleDisc`; `c` is not used."""
        fun, along = self.last_layer.san(self.main(x))
        return SanOutput(fun[:, 0], along[:, 0])

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """The patches of the last map under the last layer's kernel: [N, positions, channels * k * k]."""
        return F.unfold(self.main(x), self.kernel).transpose(1, 2)

    def directions(self) -> torch.Tensor:
        """The last layer as unit vectors: [1, channels * k * k]."""
        return F.normalize(self.last_layer.weight.flatten(1), dim=1)


class SingleDiscCond(ScaleDisc):
    """Conditional: features of width `cmap_dim`, inner product with the class's linear map, over sqrt(cmap_dim)."""

    def __init__(self, in_channels: int, map_size: int, c_dim: int, cmap_dim: int = 64, max_channels: int = 512,
                 san: bool = True):
        super().__init__(in_channels, map_size, max_channels)
        self.cls = SpectralConv2d(self.main_channels, cmap_dim, self.kernel, bias=False)
        self.embed = (SanEmbedding if san else PlainEmbedding)(c_dim, cmap_dim)
        self.gain = 1 / math.sqrt(cmap_dim)

    def _inner(self, h: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """h [N, D, h, w], row [N, D] -> [N, h, w]."""
        return (h * row[:, :, None, None]).sum(dim=1) * self.gain

    def forward(self, x: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        """Logits [N, h, w] of a map `x` [N, in_channels, H, W] for one-hot `c` [N, c_dim]."""
        return self._inner(self.cls(self.main(x)), self.embed(c.argmax(dim=1)))

    def san(self, x: torch.Tensor, c: torch.Tensor) -> SanOutput:
        """As in `ScaleDisc`."""
        h = self.cls(self.main(x))
        fun, along = self.embed.san(c.argmax(dim=1))
        return SanOutput(self._inner(h, fun), self._inner(h.detach(), along))

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """The output of the convolution `cls`: [N, positions, cmap_dim]."""
        h: torch.Tensor = self.cls(self.main(x))
        return h.flatten(2).transpose(1, 2)

    def directions(self) -> torch.Tensor:
        """The classes' linear maps as unit vectors: [c_dim, cmap_dim]."""
        return F.normalize(self.embed.weight, dim=1)

#----------------------------------------------------------------------------

class MultiScaleD(torch.nn.Module):
    """One small discriminator per scale of one backbone; their logits are concatenated per sample."""

    def __init__(self, channels: Sequence[int], map_sizes: Sequence[int], c_dim: int = 0, cmap_dim: int = 64,
                 max_channels: int = 512, san: bool = True):
        super().__init__()
        discs: list[ScaleDisc] = []
        for width, size in zip(channels, map_sizes, strict=True):
            if c_dim > 0:
                discs.append(SingleDiscCond(width, size, c_dim, cmap_dim, max_channels, san))
            else:
                discs.append(SingleDisc(width, size, max_channels, san))
        self.mini_discs = torch.nn.ModuleDict({str(i): disc for i, disc in enumerate(discs)})

    def scales(self) -> list[ScaleDisc]:
        """The small discriminators, shallowest first."""
        return [cast(ScaleDisc, disc) for disc in self.mini_discs.values()]

    def forward(self, features: Sequence[torch.Tensor], c: torch.Tensor) -> torch.Tensor:
        """Logits [N, L]; `features` are the mixed maps, shallowest first; `c` one-hot [N, c_dim]."""
        return torch.cat([disc(x, c).flatten(1) for disc, x in zip(self.scales(), features, strict=True)], dim=1)

    def scale_sizes(self, features: Sequence[torch.Tensor]) -> list[int]:
        """How many of the L logits come from each scale, in their order."""
        return [disc.num_logits(x) for disc, x in zip(self.scales(), features, strict=True)]

    def san(self, features: Sequence[torch.Tensor], c: torch.Tensor) -> SanOutput:
        """Both outputs of the discriminator step, each [N, L]."""
        outputs = [disc.san(x, c) for disc, x in zip(self.scales(), features, strict=True)]
        return SanOutput(*(torch.cat([part.flatten(1) for part in parts], dim=1)
                           for parts in zip(*outputs, strict=True)))
