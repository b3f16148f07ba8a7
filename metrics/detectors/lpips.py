# SPDX-License-Identifier: Apache-2.0
"""LPIPS, the learned perceptual distance of two images (Zhang et al. 2018), version 0.1 on VGG16."""
import functools
import hashlib

import torch

from dnnlib import UserError
from dnnlib.download import Asset, Found, find_asset
from dnnlib.util import file_sha256
from metrics.detectors.base import State, normalised
from metrics.detectors.loading import misfit, read_state, warn_unverified
from metrics.detectors.vgg import VGG16_FILE, make_vgg16
from torch_utils import distributed, misc

LPIPS_FILE = Asset(
    "weights-vgg16-lpips.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-vgg16-lpips.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868", size=7_289, other_names=("vgg.pth",),
    in_torch_hub=True)

NAME = "lpips-vgg16"
TAPS = {3: 64, 8: 128, 15: 256, 22: 512, 29: 512}   # Layers of VGG16 (relu1_2 ... relu5_3) and their channels.
EPSILON = 1e-10                                     # Keeps features that are all zero zero.

#----------------------------------------------------------------------------

class Lpips(torch.nn.Module):
    """The distance as a frozen network."""

    def __init__(self) -> None:
        super().__init__()
        self.features = make_vgg16().features[: max(TAPS) + 1]
        for i, channels in enumerate(TAPS.values()):
            self.register_buffer(f"weight{i}", torch.zeros(channels))
        self.sha256 = ""            # Hash of the two files of weights.
        self.verified = False       # Whether both are the published ones.

    @torch.no_grad()
    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Images in 0..255, any float values, [N, 3, H, W] each, at least 16 pixels wide -> distances float32 [N].

        At their own size, without resizing: squared differences of unit-length features, weighted per channel, averaged
        over the image and summed over five layers. For small changes of an image it is quadratic in them.
        """
        misc.assert_shape(first, [None, 3, None, None])
        with misc.full_precision():
            x = normalised(torch.cat([first, second]).float())
            return functools.reduce(torch.add, self._layer_distances(x))

    def unit_maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Features of five layers, of unit length per position: of images that were normalised as ImageNet's are.

        It can be differentiated. `weight0` to `weight4` belong to the layers.
        """
        maps: list[torch.Tensor] = []
        for layer, module in enumerate(self.features):
            x = module(x)
            if layer in TAPS:
                maps.append(x / (x.norm(dim=1, keepdim=True) + EPSILON))
        return maps

    def _layer_distances(self, x: torch.Tensor) -> list[torch.Tensor]:
        distances: list[torch.Tensor] = []
        for unit in self.unit_maps(x):
            a, b = unit.chunk(2)
            weight = getattr(self, f"weight{len(distances)}")[:, None, None]
            distances.append(((a - b).square() * weight).sum(dim=1).mean(dim=(1, 2)))
        return distances

#----------------------------------------------------------------------------

def require_lpips(weights_dir: str | None = None, offline: bool | None = None,
                  allow_unverified: bool = False) -> list[Found]:
    """Find (or fetch) the two files that LPIPS needs: of VGG16, and of its weights per channel.

    Raises:
        UserError: one is missing; the message says where to get it and where to put it.
    """
    folders = [weights_dir] if weights_dir else []
    return [find_asset(asset, folders, offline, allow_unverified) for asset in (VGG16_FILE, LPIPS_FILE)]


def load_lpips(device: torch.device, weights_dir: str | None = None, offline: bool | None = None,
               allow_unverified: bool = False) -> Lpips:
    """The distance with its published weights.

    Raises:
        UserError: missing or damaged file.
    """
    vgg16, heads = distributed.node_first(lambda: require_lpips(weights_dir, offline, allow_unverified))
    with torch.device("meta"):
        net = Lpips()
    features = {name: x for name, x in _read(vgg16).items() if name in net.state_dict()}
    weights = {name.replace("lin", "weight").removesuffix(".model.1.weight"): x.flatten()
               for name, x in _read(heads).items()}
    _check(features, net, "features.", vgg16)
    _check(weights, net, "weight", heads)
    net.load_state_dict({**features, **weights}, strict=True, assign=True)
    hashes = [found.sha256 or file_sha256(found.path) for found in (vgg16, heads)]
    for found, sha256 in zip((vgg16, heads), hashes, strict=True):
        warn_unverified(found, sha256, NAME)
    net.sha256 = hashlib.sha256("".join(hashes).encode()).hexdigest()
    net.verified = vgg16.verified and heads.verified
    return net.requires_grad_(False).eval().to(device)


def _read(found: Found) -> State:
    """Tensors of a file by name, in float32. Raises UserError."""
    state = read_state(found.path)
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{found.path}: holds no tensors by name: fetch it again")
    return {name: x.float() for name, x in state.items()}


def _check(state: State, net: torch.nn.Module, prefix: str, found: Found) -> None:
    """Refuse a file that does not hold just the tensors of `net` that begin with `prefix`. Raises UserError."""
    wanted = {name: x for name, x in net.state_dict().items() if name.startswith(prefix)}
    if problem := misfit(state, wanted):
        raise UserError(f"{found.path}: its tensors do not fit the network of {NAME} ({problem}): fetch it again")
