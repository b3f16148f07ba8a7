# SPDX-License-Identifier: Apache-2.0
"""The frozen random projections between backbone and heads (Sauer et al., NeurIPS 2021, section 3.2).

Cross-channel mixing (CCM) maps every feature map through a random 1x1 convolution. Cross-scale mixing (CSM) then walks
from the deepest map up: add the map of that level, enlarge bilinearly by 2, random 1x1 convolution.
"""
import contextlib
import zlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

#----------------------------------------------------------------------------

@contextlib.contextmanager
def seeded(seed: int, what: str) -> Iterator[None]:
    """Draw from a CPU stream that depends on the seed and the purpose only; the caller's stream goes on untouched."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would set the GPUs' streams too.
        torch.default_generator.manual_seed(zlib.crc32(f"{what}/{seed}".encode()))
        yield


def frozen(module: torch.nn.Module) -> torch.nn.Module:
    """Switch off gradients of the module's parameters; returns its argument."""
    return module.requires_grad_(False)

#----------------------------------------------------------------------------

class FeatureFusion(torch.nn.Module):
    """CCM and CSM for any number of maps, shallowest first.

    CCM gives map i `proj_channels * 2^i` channels; CSM gives half of that (`proj_channels` for i = 0) at twice the
    size. Names in the state dict are official: layer<i>_ccm, layer<i>_csm.out_conv.
    """

    def __init__(self, in_channels: Sequence[int], proj_channels: int):
        super().__init__()
        self.num_maps = len(in_channels)
        mixed = [proj_channels * 2 ** i for i in range(self.num_maps)]
        self.out_channels = [proj_channels] + mixed[:-1]
        for i in range(self.num_maps):
            self.add_module(f"layer{i}_ccm", torch.nn.Conv2d(in_channels[i], mixed[i], kernel_size=1))
            out_conv = torch.nn.Conv2d(mixed[i], self.out_channels[i], kernel_size=1)
            self.add_module(f"layer{i}_csm", torch.nn.ModuleDict({"out_conv": out_conv}))
        frozen(self)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """[N, C_i, H_i, W_i] per scale -> mixed [N, out_channels_i, 2 H_i, 2 W_i] per scale."""
        mixed = [getattr(self, f"layer{i}_ccm")(x) for i, x in enumerate(maps)]
        outputs: list[torch.Tensor] = []
        below = None
        for i in reversed(range(self.num_maps)):
            x = mixed[i] if below is None else mixed[i] + below
            # The size doubles, but where halving an odd size has rounded, it becomes that of the next map.
            size = mixed[i - 1].shape[2:] if i > 0 else (2 * x.shape[2], 2 * x.shape[3])
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
            below = getattr(self, f"layer{i}_csm")["out_conv"](x)
            outputs.insert(0, below)
        return outputs

    def out_sizes(self, map_sizes: Sequence[int]) -> list[int]:
        """Sides of the mixed maps for given sides of the backbone's maps."""
        return [2 * map_sizes[0], *map_sizes[:-1]]

#----------------------------------------------------------------------------

class Reassembly(torch.nn.Module):
    """Tokens of a vision transformer at one size -> a pyramid of four maps (after Ranftl et al., ICCV 2021, section 3).

    Random and frozen: 1x1 convolutions to C/8, C/4, C/2 and C channels, then transposed convolutions 4x4 with stride 4
    and 2x2 with stride 2, nothing, and a 3x3 convolution with stride 2. Names are official: layer<i>.3, layer<i>.4.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.out_channels = [channels // 8, channels // 4, channels // 2, channels]
        c1, c2, _c3, c4 = self.out_channels
        resize = [
            torch.nn.ConvTranspose2d(c1, c1, kernel_size=4, stride=4),
            torch.nn.ConvTranspose2d(c2, c2, kernel_size=2, stride=2),
            None,
            torch.nn.Conv2d(c4, c4, kernel_size=3, stride=2, padding=1),
        ]
        for i, (width, last) in enumerate(zip(self.out_channels, resize, strict=True), start=1):
            steps: dict[str, torch.nn.Module] = {"3": torch.nn.Conv2d(channels, width, kernel_size=1)}
            if last is not None:
                steps["4"] = last
            self.add_module(f"layer{i}", torch.nn.ModuleDict(steps))
        frozen(self)

    def forward(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Four maps [N, C, h, w] of blocks from shallow to deep -> maps of sides 4h, 2h, h, ceil(h/2)."""
        outputs = []
        for i, x in enumerate(maps, start=1):
            for step in getattr(self, f"layer{i}").values():
                x = step(x)
            outputs.append(x)
        return outputs

    def out_sizes(self, map_sizes: Sequence[int]) -> list[int]:
        """Sides of the four maps for given sides of the transformer's maps."""
        a, b, c, d = map_sizes
        return [4 * a, 2 * b, c, (d + 1) // 2]
