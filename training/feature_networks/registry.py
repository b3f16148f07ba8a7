# SPDX-License-Identifier: Apache-2.0
"""Backbones by name, and where their weights come from.

| name | what |
|---|---|
| `tf_efficientnet_lite0`, `deit_base_distilled_patch16_224`, any other of timm | published weights |
| `<any of timm>:random`, `<any of timm>:random:<seed>` | random weights, no file needed |
| `<path>.safetensors`, `local:<path>.safetensors` | a network of your own (`training.feature_networks.train`) |
| `local:random`, `local:random:<seed>` | a network of your own with random weights |
"""
import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import timm
import torch

from dnnlib import UserError
from torch_utils.own_network import OwnNetwork, load_own_network, own_config
from torch_utils.published import is_model, load_published, similar_models
from training.feature_networks.backbones import Backbone, OwnBackbone, TimmBackbone

RANDOM_NAME = re.compile(r"(?P<model>[^:]+):random(?::(?P<seed>\d+))?")

#----------------------------------------------------------------------------

def load_backbone(name: str, weights: Sequence[str | os.PathLike[str]] = ()) -> Backbone:
    """A frozen backbone on the CPU.

    Args:
        name: See the table above.
        weights: Folders to look for published weights in, before $STYLESAN_WEIGHTS and the caches.

    Raises:
        UserError: unknown name; weights that cannot be had; weights that do not fit the model.
    """
    if name.endswith(".safetensors"):
        path = Path(name.removeprefix("local:"))
        backbone: Backbone = OwnBackbone(name, load_own_network(path))
        backbone.source = os.fspath(path.resolve())
        return backbone
    net, source, sha256 = load_network(name, weights)
    backbone = OwnBackbone(name, net) if isinstance(net, OwnNetwork) else TimmBackbone(name, net)
    backbone.source, backbone.sha256 = source, sha256
    return backbone


def load_network(name: str, weights: Sequence[str | os.PathLike[str]] = ()) -> tuple[torch.nn.Module, str, str | None]:
    """The bare network behind a name of the table but for paths, in eval mode and frozen.

    Returns:
        Network, source of its weights, SHA-256 of the weights file (None for random weights).
    """
    if match := RANDOM_NAME.fullmatch(name):
        seed = int(match["seed"] or 0)
        with _random_stream(seed):
            if match["model"] == "local":
                net: torch.nn.Module = OwnNetwork(own_config(num_classes=10))
            else:
                net = timm.create_model(_known(match["model"]), pretrained=False)
        return net.eval().requires_grad_(False), f"random weights, seed {seed}", None
    found = load_published(_known(name), weights)
    return found.net, str(found.path), found.sha256


@contextlib.contextmanager
def _random_stream(seed: int) -> Iterator[None]:
    """Weights from a stream of their own; the caller's random numbers go on untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)       # torch.manual_seed would set the GPUs' streams too.
        yield


def _known(model: str) -> str:
    """The name, if timm has a model of it."""
    if not is_model(model):
        raise UserError(f"unknown backbone {model!r}{similar_models(model)}: take tf_efficientnet_lite0, "
                        "deit_base_distilled_patch16_224, another model of timm, NAME:random, or the path of a local "
                        "network (*.safetensors)")
    return model
