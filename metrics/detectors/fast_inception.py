# SPDX-License-Identifier: Apache-2.0
"""The Inception network made faster without being changed: the same weights and the same function, up to rounding.

- Each normalisation (a fixed scale and shift when features are taken) is folded into the convolution before it.
- 1x1 convolutions that read the same map are one convolution.
- Average pooling in front of a 1x1 convolution comes after it, where there are fewer channels: both are linear and one
  works on pixels, the other on channels, so they commute.
- On a CPU tensors have the channels-last layout, which its kernels work in.
- There, too, a few images go through at a time, so that the maps between layers fit into its caches.
- There, too, long sums are cut: the channels-last kernels add up thousands of products one after the other in float32.
  With the sums of the 17x17 layers cut at MAX_TERMS the map that sFID takes is 9e-7 from that of the network as loaded,
  1.2e-6 without.
"""
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from torch_utils.side_by_side import side_by_side

CPU_BATCH = 8       # Images at a time. Fixed, so that a result never depends on a batch size.
MAX_TERMS = 300     # So many are added in one sum on a CPU. Everywhere it would be 8.9e-7, and take a tenth longer.

#----------------------------------------------------------------------------

class FoldedConv(torch.nn.Module):
    """Convolution, normalisation and rectification in one step."""

    def __init__(self, *layers: torch.nn.Module):
        """Args:
            layers: With a convolution `conv` without bias, then a batch normalisation `bn`. Several must differ in
                their output channels only; the result then has the channels of all, in their order.
        """
        super().__init__()
        folded = [fold(layer) for layer in layers]
        self.widths = [len(bias) for _weight, bias in folded]
        self.weights = torch.nn.ParameterList([torch.cat([weight for weight, _bias in folded])]).requires_grad_(False)
        self.register_buffer("bias", torch.cat([bias for _weight, bias in folded]))
        self.stride, self.padding = layers[0].conv.stride, layers[0].conv.padding

    def cut(self, max_terms: int) -> None:
        """Make of a sum of more than `max_terms` products several, over a part of the input channels each."""
        (weight,) = self.weights
        num = min(math.ceil(weight[0].numel() / max_terms), weight.shape[1])
        self.weights = torch.nn.ParameterList(weight.tensor_split(num, dim=1)).requires_grad_(False)

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        """The same without rectification."""
        parts = x.split([weight.shape[1] for weight in self.weights], dim=1)
        y: torch.Tensor = F.conv2d(parts[0], self.weights[0], self.bias, self.stride, self.padding)
        for part, weight in zip(parts[1:], list(self.weights)[1:], strict=True):
            y += F.conv2d(part, weight, None, self.stride, self.padding)
        return y

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).relu_()


def fold(layer: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, bias) float32 of the convolution that does what `layer.conv` and `layer.bn` do one after the other."""
    bn = layer.bn
    scale = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    weight = layer.conv.weight.double() * scale.reshape(-1, 1, 1, 1)
    return weight.float(), (bn.bias.double() - bn.running_mean.double() * scale).float()

#----------------------------------------------------------------------------
class Paths(torch.nn.Module):
    """The paths of a block that begin with a 1x1 convolution of its input, side by side in their order."""

    def __init__(self, block: torch.nn.Module, paths: dict[str, torch.nn.Module], pooled: str | None = None):
        """Args:
            block: Where layers are looked up.
            paths: Name of the first layer -> what follows it.
            pooled: Name of a layer whose input is averaged over 3x3 pixels, the last path; None: there is none.
        """
        super().__init__()
        names = [*paths, pooled] if pooled else [*paths]
        self.first = FoldedConv(*(block.get_submodule(name) for name in names))
        self.rest = torch.nn.ModuleList(paths.values())
        self.has_pooled = pooled is not None

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        maps = list(self.first.linear(x).split(self.first.widths, dim=1))
        last = [F.avg_pool2d(maps.pop(), 3, 1, 1, count_include_pad=False)] if self.has_pooled else []
        return [rest(part.relu()) for rest, part in zip(self.rest, maps, strict=True)] + [y.relu_() for y in last]


class Mixed(torch.nn.Module):
    """A block that keeps the size of its input; its last path is pooled."""

    def __init__(self, block: torch.nn.Module, paths: dict[str, torch.nn.Module], largest: bool = False):
        """Args:
            block: The block as loaded.
            paths: Name of the first layer -> what follows it.
            largest: The last path takes the largest of 3x3 pixels, not their average.
        """
        super().__init__()
        self.paths = Paths(block, paths, None if largest else "branch_pool")
        self.after_largest = FoldedConv(block.branch_pool) if largest else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.paths(x)
        if self.after_largest is not None:
            parts.append(self.after_largest(F.max_pool2d(x, 3, 1, 1)))
        return torch.cat(parts, dim=1)


class Reduction(torch.nn.Module):
    """A block that halves the size of its input."""

    def __init__(self, block: torch.nn.Module, direct: str | None, paths: dict[str, torch.nn.Module]):
        super().__init__()
        self.direct = FoldedConv(block.get_submodule(direct)) if direct else None
        self.paths = Paths(block, paths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.direct(x)] if self.direct is not None else []
        return torch.cat([*parts, *self.paths(x), F.max_pool2d(x, 3, 2)], dim=1)


class Fork(torch.nn.Module):
    """Two convolutions of one map, side by side."""

    def __init__(self, a: torch.nn.Module, b: torch.nn.Module):
        super().__init__()
        self.a, self.b = FoldedConv(a), FoldedConv(b)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], dim=1)

#----------------------------------------------------------------------------
# The blocks: Szegedy et al. 2015, "Rethinking the Inception Architecture for Computer Vision", figures 5 to 7, 10.

def _chain(block: torch.nn.Module, *names: str) -> torch.nn.Sequential:
    return torch.nn.Sequential(*(FoldedConv(block.get_submodule(name)) for name in names))


def _mixed_5(block: torch.nn.Module) -> Mixed:
    return Mixed(block, {"branch1x1": _chain(block), "branch5x5_1": _chain(block, "branch5x5_2"),
                         "branch3x3dbl_1": _chain(block, "branch3x3dbl_2", "branch3x3dbl_3")})


def _mixed_6a(block: torch.nn.Module) -> Reduction:
    return Reduction(block, "branch3x3", {"branch3x3dbl_1": _chain(block, "branch3x3dbl_2", "branch3x3dbl_3")})


def _mixed_6(block: torch.nn.Module) -> Mixed:
    return Mixed(block, {"branch1x1": _chain(block), "branch7x7_1": _chain(block, "branch7x7_2", "branch7x7_3"),
                         "branch7x7dbl_1": _chain(block, *(f"branch7x7dbl_{i}" for i in (2, 3, 4, 5)))})


def _mixed_7a(block: torch.nn.Module) -> Reduction:
    return Reduction(block, None, {"branch3x3_1": _chain(block, "branch3x3_2"),
                                   "branch7x7x3_1": _chain(block, *(f"branch7x7x3_{i}" for i in (2, 3, 4)))})


def _mixed_7(block: torch.nn.Module, largest: bool) -> Mixed:
    twice = torch.nn.Sequential(FoldedConv(block.branch3x3dbl_2), Fork(block.branch3x3dbl_3a, block.branch3x3dbl_3b))
    paths = {"branch1x1": _chain(block), "branch3x3_1": Fork(block.branch3x3_2a, block.branch3x3_2b),
             "branch3x3dbl_1": twice}
    return Mixed(block, paths, largest)


class Maps(NamedTuple):
    """What is taken of the network's maps; all but the first are averages over positions."""

    spatial: torch.Tensor       # First channels of the map of `Mixed_6d`: [N, num_channels, 17, 17].
    pool64: torch.Tensor        # After the first pooling: [N, 64].
    pool192: torch.Tensor       # After the second: [N, 192].
    pool768: torch.Tensor       # Means over the map of `Mixed_6e`: [N, 768].
    pool: torch.Tensor          # The features: [N, 2048].


class FastInception(torch.nn.Module):
    """torch-fidelity's network rebuilt for speed."""

    def __init__(self, net: torch.nn.Module, device: torch.device):
        """Args:
            net: That network with its weights, on the CPU.
            device: Where this one will be. It decides the layout: GPUs are faster with channels first in float32.
        """
        super().__init__()
        self.is_on_cpu = device.type == "cpu"
        pool = torch.nn.MaxPool2d(3, 2)
        # What lies between the maps that somebody takes features from.
        self.stages = torch.nn.ModuleList([
            torch.nn.Sequential(*_chain(net, "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"), pool),
            torch.nn.Sequential(*_chain(net, "Conv2d_3b_1x1", "Conv2d_4a_3x3"), pool),
            torch.nn.Sequential(
                _mixed_5(net.Mixed_5b), _mixed_5(net.Mixed_5c), _mixed_5(net.Mixed_5d), _mixed_6a(net.Mixed_6a),
                _mixed_6(net.Mixed_6b), _mixed_6(net.Mixed_6c), _mixed_6(net.Mixed_6d)),
            _mixed_6(net.Mixed_6e),
            torch.nn.Sequential(_mixed_7a(net.Mixed_7a), _mixed_7(net.Mixed_7b, largest=False),
                                _mixed_7(net.Mixed_7c, largest=True))])
        self.register_buffer("fc_weight", net.fc.weight.detach().clone())
        if self.is_on_cpu:
            for block in list(self.stages[2])[-4:]:
                for module in block.modules():
                    if isinstance(module, FoldedConv):
                        module.cut(MAX_TERMS)
            self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor],
                num_channels: int) -> Maps:
        """What is taken of images.

        Args:
            images: [N, 3, H, W].
            prepare: From some of them to float [n, 3, 299, 299] in the network's range.
            num_channels: How many channels of the map are wanted.
        """
        def run(part: torch.Tensor) -> Maps:
            x = prepare(part)
            x = x.contiguous(memory_format=torch.channels_last) if self.is_on_cpu else x
            maps = list(itertools.accumulate(self.stages, lambda x, stage: stage(x), initial=x))[1:]
            spatial = maps[2][:, :num_channels].clone()         # A view would keep the whole map in memory.
            return Maps(spatial, *(maps[i].mean(dim=(2, 3)) for i in (0, 1, 3, 4)))

        if not self.is_on_cpu:
            return run(images)
        return Maps(*(torch.cat(parts) for parts in zip(*side_by_side(run, images.split(CPU_BATCH)), strict=True)))
