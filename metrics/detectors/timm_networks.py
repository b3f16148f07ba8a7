# SPDX-License-Identifier: Apache-2.0
"""Any network that timm publishes weights for as a detector: `timm:NAME`, for Frechet distances of one's own choice.

Images come to the network as it was trained: resized to its size by PIL's 8-bit resize with its own interpolation, and
standardised by its own mean and deviation. Nothing is cropped, because every pixel of a generated image counts.
Features are what the network's classifier sees: the pooled last map, or what else the network puts there.
"""
import re
from pathlib import Path
from typing import Any, cast

import torch

from dnnlib import UserError
from dnnlib.download import Asset
from metrics.detectors.base import Detector, Outputs, normalised
from metrics.detectors.random_weights import RANDOM_SUFFIX, hash_state, random_state
from metrics.detectors.resizes import PIL_FILTERS, pil_uint8
from torch_utils import distributed

PREFIX = "timm:"

#----------------------------------------------------------------------------

def model_of(spec: str) -> str | None:
    """The model that `timm:MODEL` or `timm:MODEL:random` means; None for other detectors. Raises UserError: unknown."""
    if not spec.startswith(PREFIX):
        return None
    from torch_utils.published import is_model, similar_models  # Imports timm, which takes a second.
    name = spec.removeprefix(PREFIX).removesuffix(RANDOM_SUFFIX)
    if not is_model(name):
        raise UserError(f"--detector={spec}: timm has no model {name!r}{similar_models(name)}: name one that it has, "
                        f"such as {PREFIX}tf_efficientnet_lite2")
    return name


def label_of(spec: str) -> str:
    """The detector in the name of a metric that leaves it open, such as fd: letters that names of files may have."""
    name = spec.removeprefix(PREFIX)
    if name.endswith(".safetensors"):
        name = Path(name).stem
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name)


def find_timm_weights(spec: str, weights_dir: str | None, offline: bool | None) -> Path | None:
    """The file of weights, which may be fetched for it; None for random ones. Raises UserError: it cannot be had."""
    from torch_utils.published import find_weights
    model = model_of(spec)
    if model is None or spec.endswith(RANDOM_SUFFIX):
        return None
    return find_weights(model, [weights_dir] if weights_dir else [], offline).path


def timm_asset(spec: str) -> Asset | None:
    """What is to be fetched for this detector: nothing if its weights are on this machine or random."""
    from torch_utils.published import locate_weights, published_asset
    model = model_of(spec)
    if model is None or spec.endswith(RANDOM_SUFFIX) or locate_weights(model) is not None:
        return None
    return published_asset(model)[0]

#----------------------------------------------------------------------------

def load_timm(spec: str, device: torch.device, weights_dir: str | None, offline: bool | None) -> Detector:
    """The detector. Raises UserError: the weights cannot be had, or the model is of no use as a detector."""
    from torch_utils.published import load_published, make_model, trained_with
    model = model_of(spec)
    assert model is not None, "load_detector has seen it"
    if spec.endswith(RANDOM_SUFFIX):
        net, sha256 = make_model(model), None
    else:
        found = distributed.node_first(lambda: load_published(model, [weights_dir] if weights_dir else [], offline))
        net, sha256 = found.net, found.sha256
    images = trained_with(net)
    if len(images.mean) != 3 or images.interpolation not in PIL_FILTERS:
        raise UserError(f"--detector={spec}: it takes images of {len(images.mean)} channels that come to their size by "
                        f"'{images.interpolation}': name a model for colour images and {' or '.join(PIL_FILTERS)}")
    return _as_detector(spec, net, sha256, device)


def _as_detector(spec: str, net: torch.nn.Module, sha256: str | None, device: torch.device) -> Detector:
    from torch_utils.published import trained_with
    if sha256 is None:
        state = random_state(net)
        net.load_state_dict(state)
        sha256 = hash_state(state)
    images = trained_with(net)
    network = cast(Any, net.requires_grad_(False).eval().to(device))

    def forward(x: torch.Tensor) -> Outputs:
        x = pil_uint8(x, images.input_size, images.interpolation).float()
        maps = network.forward_features(normalised(x, images.mean, images.std))
        return {"pool": network.forward_head(maps, pre_logits=True)}

    try:
        with torch.no_grad():
            shape = forward(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device=device))["pool"].shape
    except (AttributeError, TypeError) as err:
        raise UserError(f"--detector={spec}: this model of timm does not give features before its classifier: choose "
                        "another model") from err
    if len(shape) != 2:
        raise UserError(f"--detector={spec}: this model of timm gives features of shape {list(shape)} instead of one "
                        "row per image: choose another model")
    return Detector(spec, sha256, shape[1], ("pool",), forward, device,
                    resize=f"pil_{images.interpolation}_uint8_{images.input_size}")
