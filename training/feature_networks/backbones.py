# SPDX-License-Identifier: Apache-2.0
"""Frozen feature networks behind one interface: timm's convolutional pyramids and transformers, and small networks that
users train on their own images."""
import functools
from typing import Protocol, cast

import timm.models
import torch
import torch.nn.functional as F

from dnnlib import UserError
from torch_utils.own_network import OwnNetwork
from torch_utils.published import trained_with

NUM_MAPS = 4                # So many maps are taken from a timm model, the deepest ones, or all if it has fewer.
BN_WARMUP_SIZE = 256
MIN_SIZE = 64               # Here the deepest map of a network that halves five times has two pixels per side.
FUSED = "fused_attn"        # The attribute by which timm's attention layers are told to use the fused kernel.

#----------------------------------------------------------------------------

@functools.lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[1, C, 1, 1]. It is kept between calls, because copying numbers to a GPU waits for it, so do not write to it."""
    with torch.inference_mode(False):       # Else the first caller's mode would decide what later callers may do.
        return torch.tensor(values, dtype=dtype, device=device).reshape(1, -1, 1, 1)


def standardized(images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...],
                 net: torch.nn.Module) -> torch.Tensor:
    """Images in [-1, 1] as a frozen network was trained with them: scaled to [0, 1], then (x - mean) / std per channel.

    The result has the type of the network's parameters, but at least single precision. Mean and std are rounded to that
    type only: as buffers of a network that is cast to double they would keep the rounding to single precision.
    """
    dtype = torch.promote_types(next(net.parameters()).dtype, torch.float32)
    center, spread = (_per_channel(values, dtype, images.device) for values in (mean, std))
    return ((images.to(dtype) + 1) / 2 - center) / spread

#----------------------------------------------------------------------------

class Backbone(torch.nn.Module):
    """A frozen network that turns images into a pyramid of feature maps. It stays in eval mode whatever it is told.

    Attributes:
        name: The name that the user gave.
        net: The network itself; its state dict has its own library's keys.
        channels: Channels of the maps, shallowest first.
        map_sizes: Sides of the maps for images of `input_size`.
        input_size: Side of the images it was made for, or that `look_at` set.
        mean, std: Per channel of images in [0, 1], as the network was trained with them.
        always_resize: Whether images of every other size are resized to it; if not, only smaller ones are.
        isotropic: All maps have one size (transformers); a pyramid is made of them later.
        sha256: SHA-256 of the weights file; None for random weights, which have no file.
        source: Where the weights came from.
        bn_warmed_up: Whether `warm_up_batch_norm` was called; it acts once.
        reduced_dtype: Type of the large products, see `training.feature_networks.fast`; None: float32.
    """

    def __init__(self, name: str, net: torch.nn.Module, input_size: int, always_resize: bool,
                 mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.name = name
        self.net = net.requires_grad_(False)
        self.input_size = input_size
        self.always_resize = always_resize
        self.isotropic = False
        self.bn_warmed_up = False
        self.reduced_dtype: torch.dtype | None = None
        self.sha256: str | None = None
        self.source = "given"
        self.channels: list[int] = []
        self.map_sizes: list[int] = []
        self.mean, self.std = tuple(mean), tuple(std)
        self.train(False)

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in eval mode: BatchNorm statistics of a frozen network must not move."""
        return super().train(False)

    @torch.no_grad()
    def probe(self) -> "Backbone":
        """Read off channels and sizes of the maps from one image of zeros."""
        maps = self._maps(torch.zeros(1, 3, self.input_size, self.input_size))
        if any(x.ndim != 4 or x.shape[2] != x.shape[3] for x in maps):
            raise UserError(f"backbone {self.name}: gives maps of shapes {[list(x.shape) for x in maps]}, "
                            "square [N, C, H, W] needed: choose another model")
        self.channels = [x.shape[1] for x in maps]
        self.map_sizes = [x.shape[2] for x in maps]
        return self

    def look_at(self, size: int) -> None:
        """Have images that are smaller enlarged to this side, instead of the one that the network was made for.

        Raises:
            UserError: the network takes images of one size only, or this one is too small for it.
        """
        if size == self.input_size:
            return
        if self.always_resize:
            raise UserError(f"--feature-size={size}: {self.name} takes images of {self.input_size} pixels only: leave "
                            "--feature-size out, or choose other --backbones, such as tf_efficientnet_lite0")
        if size < MIN_SIZE:
            raise UserError(f"--feature-size={size}: {self.name} needs {MIN_SIZE} pixels or more: take as many, or 0 "
                            f"for {self.input_size}")
        self.input_size = size
        self.probe()

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images [N, 3, R, R] in [-1, 1] as `maps` takes them: standardised, and resized bilinearly where needed."""
        x = standardized(images, self.mean, self.std, self.net)
        if x.shape[-1] < self.input_size or (self.always_resize and x.shape[-1] != self.input_size):
            x = F.interpolate(x, size=self.input_size, mode="bilinear", align_corners=False)
        return x

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps [N, channels[i], h_i, w_i], float32, of preprocessed images, shallowest first."""
        if self.reduced_dtype is None:
            maps = self._maps(x)
        else:
            with torch.autocast(x.device.type, self.reduced_dtype):
                maps = [y.to(x.dtype) for y in self._maps(x)]
        shapes = [(y.shape[1], y.shape[2] if x.shape[2] == self.input_size else None) for y in maps]
        expected = [(c, s if x.shape[2] == self.input_size else None)
                    for c, s in zip(self.channels, self.map_sizes, strict=True)]
        assert shapes == expected, f"backbone {self.name}: maps (channels, side) {shapes}, expected {expected}"
        return maps

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """Last map averaged over positions, [N, channels[-1]], of preprocessed images."""
        return self.maps(x)[-1].mean(dim=(2, 3))

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError


class TimmModel(Protocol):
    """The methods that are used of a model of timm, which publishes no types."""

    def forward_intermediates(self, x: torch.Tensor, *, indices: list[int], intermediates_only: bool,
                              output_fmt: str) -> list[torch.Tensor]:
        """The maps with these indices."""
        ...


def is_isotropic(net: torch.nn.Module) -> bool:
    """Whether all maps of a model of timm have one size, as those of vision transformers."""
    reductions = [info["reduction"] for info in getattr(net, "feature_info", [])]
    return len(reductions) > 1 and len(set(reductions)) == 1


class TimmBackbone(Backbone):
    """A model of timm. Maps are the deepest ones that it lists; those of a transformer are activations after evenly
    spaced blocks (of 12 blocks: 2, 5, 8 and 11) without the leading tokens and without the final normalisation."""

    def __init__(self, name: str, net: torch.nn.Module):
        images = trained_with(net)
        reductions = [info["reduction"] for info in getattr(net, "feature_info", [])]
        if not reductions or not hasattr(net, "forward_intermediates"):
            raise UserError(f"backbone {name}: this model of timm gives no feature maps: choose another model")
        isotropic = is_isotropic(net)
        super().__init__(name, net, input_size=images.input_size, mean=images.mean, std=images.std,
                         always_resize=isotropic or images.fixed_input_size)
        self.isotropic = isotropic
        self._attentions = [m for m in net.modules() if getattr(m, FUSED, False)]
        depth = len(reductions)
        if isotropic and depth < NUM_MAPS:
            raise UserError(f"backbone {name}: has {depth} blocks, {NUM_MAPS} needed: choose another model")
        if isotropic:
            self.indices = [depth * (i + 1) // NUM_MAPS - 1 for i in range(NUM_MAPS)]
        else:
            self.indices = list(range(max(depth - NUM_MAPS, 0), depth))
        self.probe()

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        # On a CPU the backward pass of fused attention takes longer than that of its products one by one.
        fused = x.device.type != "cpu" or not (torch.is_grad_enabled() and x.requires_grad)
        for attention in self._attentions:
            setattr(attention, FUSED, fused)
        net = cast(TimmModel, self.net)
        return net.forward_intermediates(x, indices=self.indices, intermediates_only=True, output_fmt="NCHW")


class OwnBackbone(Backbone):
    """A network that the user trained; always at its own resolution."""

    def __init__(self, name: str, net: OwnNetwork):
        half = (0.5, 0.5, 0.5)              # Such networks take images in [-1, 1].
        super().__init__(name, net, input_size=net.input_resolution, always_resize=True, mean=half, std=half)
        self.sha256 = net.sha256
        self.probe()

    def _maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        return cast(OwnNetwork, self.net).maps(x)

#----------------------------------------------------------------------------

@torch.no_grad()
def warm_up_batch_norm(backbone: Backbone) -> bool:
    """The official construction-time step: one image of zeros through an EfficientNet in training mode.

    It was meant to read off channel counts, but it moves the running statistics of every BatchNorm once (momentum 0.1),
    and the published results were made with features of that network. Done for timm's EfficientNets and nothing else.

    Returns:
        Whether it was done: not for other networks, nor a second time.
    """
    if backbone.bn_warmed_up or not isinstance(backbone.net, timm.models.EfficientNet):
        return False
    backbone.bn_warmed_up = True
    backbone.net.train()
    backbone.net(next(backbone.net.parameters()).new_zeros(1, 3, BN_WARMUP_SIZE, BN_WARMUP_SIZE))
    backbone.net.eval()
    return True
