# SPDX-License-Identifier: Apache-2.0
"""Distances of pictures by name, all of which are squared distances of features and can be differentiated.

| name | what |
|---|---|
| `lpips` | LPIPS on VGG16 (Zhang et al. 2018); its two files of weights are downloaded if they are not there |
| `timm:NAME` | feature maps of a network of timm with published weights |
| `FILE.safetensors` | feature maps of a network of your own (`training.feature_networks.train`) |
| `pixels` | the mean squared error of pixels in [-1, 1] |

Networks other than VGG16 come without weights per channel, so their maps count alike: at each position features have
unit length, and the squared differences are averaged over positions and maps.
"""
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from dnnlib import UserError
from dnnlib.download import locate
from metrics.detectors.base import normalised
from metrics.detectors.lpips import LPIPS_FILE, Lpips, load_lpips
from metrics.detectors.vgg import VGG16_FILE
from torch_utils.published import locate_weights
from training.feature_networks.backbones import Backbone
from training.feature_networks.registry import load_backbone

LARGEST = 256               # Larger pictures are averaged down to it before a network sees them, as officially.
LPIPS_SMALLEST = 16         # VGG16 halves pictures four times.
EPSILON = 1e-8              # Keeps the gradient finite where all features are zero.
PRETRAINED = "tf_efficientnet_lite0"        # Looked for if LPIPS is not at hand: a package of the index has it.

Maps = list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Distance:
    """A distance of two batches of pictures."""

    name: str
    source: str                                     # Where the weights come from; "" if there are none.
    sha256: str | None                              # Of the weights.
    maps: Callable[[torch.Tensor], Maps]            # Of pictures in [-1, 1]: what is compared, scaled.

    def between(self, first: Maps, second: Maps) -> torch.Tensor:
        """Distances [N] of maps of N pictures each."""
        parts = [(a - b).square().flatten(1).sum(dim=1) for a, b in zip(first, second, strict=True)]
        return functools.reduce(torch.add, parts)

#----------------------------------------------------------------------------

def default_distance() -> str:
    """The name of the best distance that needs no network: its files are on this machine."""
    if all(locate(asset) is not None for asset in (VGG16_FILE, LPIPS_FILE)):
        return "lpips"
    return f"timm:{PRETRAINED}" if locate_weights(PRETRAINED) is not None else "pixels"


def make_distance(name: str, resolution: int, device: torch.device) -> Distance:
    """The distance of this name (see the table above) for pictures of this size.

    Raises:
        UserError: there is no such distance; its weights cannot be had or do not fit; the pictures are too small.
    """
    if name == "pixels":
        return Distance(name, "", None, _pixel_maps)
    if name == "lpips":
        if resolution < LPIPS_SMALLEST:
            raise UserError(f"--distance=lpips: needs pictures of {LPIPS_SMALLEST} pixels or more, and the network's "
                            f"have {resolution}: take --distance=pixels")
        lpips = load_lpips(device)
        return Distance(name, "VGG16 and LPIPS 0.1", lpips.sha256, functools.partial(_lpips_maps, lpips))
    if not name.startswith(("timm:", "local:")) and not name.endswith(".safetensors"):
        raise UserError(f"--distance={name}: no distance of this name: take lpips, timm:NAME with a network of timm, "
                        "the file (.safetensors) of a network of your own, or pixels")
    backbone = load_backbone(name.removeprefix("timm:")).to(device)
    return Distance(name, backbone.source, backbone.sha256, functools.partial(_backbone_maps, backbone))


def shrunk(images: torch.Tensor) -> torch.Tensor:
    """Pictures of at most LARGEST pixels: larger ones averaged over areas."""
    return F.interpolate(images, size=LARGEST, mode="area") if images.shape[-1] > LARGEST else images


def _pixel_maps(images: torch.Tensor) -> Maps:
    return [images / math.sqrt(images[0].numel())]


def _lpips_maps(lpips: Lpips, images: torch.Tensor) -> Maps:
    pixels = (shrunk(images.float()) + 1) * (255 / 2)
    units = lpips.unit_maps(normalised(pixels))
    weights: Sequence[torch.Tensor] = [getattr(lpips, f"weight{i}") for i in range(len(units))]
    return [unit * (weight[:, None, None] / unit[0, 0].numel()).sqrt()
            for unit, weight in zip(units, weights, strict=True)]


def _backbone_maps(backbone: Backbone, images: torch.Tensor) -> Maps:
    maps = backbone.maps(backbone.preprocess(shrunk(images)))
    units = [x * (x.square().sum(dim=1, keepdim=True) + EPSILON).rsqrt() for x in maps]
    return [unit / math.sqrt(unit[0, 0].numel() * len(units)) for unit in units]
