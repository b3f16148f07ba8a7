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
import difflib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub
import timm
import timm.models
import torch

from dnnlib import UserError
from dnnlib.download import Asset, find_or_download
from dnnlib.util import file_sha256
from torch_utils import checkpoint
from torch_utils.nested import first_nonfinite
from torch_utils.own_network import OwnNetwork, load_own_network, own_config
from training.feature_networks.backbones import Backbone, OwnBackbone, TimmBackbone

DEFAULT_HUB = "https://huggingface.co"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth")
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
    path, url = find_weights(name, weights)
    overlay = {"file": str(path), "custom_load": False}
    if path.suffix != ".safetensors":
        checkpoint.load_plain(path, mmap=True)      # Before torch.load, which unpacks and makes whatever a file claims.
    try:
        # The whole model, so that loading is strict: timm's features_only ignores missing tensors without a word.
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as err:
        raise UserError(f"{path}: does not hold the weights of {name} ({type(err).__name__}): delete it and fetch "
                        f"{url}") from err
    if (bad := first_nonfinite(net.state_dict())) is not None:
        raise UserError(f"{path}: its weights are not finite, e.g. {bad}: delete it and fetch {url}")
    return net.eval().requires_grad_(False), str(path), file_sha256(path)


@contextlib.contextmanager
def _random_stream(seed: int) -> Iterator[None]:
    """Weights from a stream of their own; the caller's random numbers go on untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)       # torch.manual_seed would set the GPUs' streams too.
        yield


def _known(model: str) -> str:
    """The name, if timm has a model of it."""
    if not timm.is_model(model.partition(".")[0]) or ":" in model:
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise UserError(f"unknown backbone {model!r}{hint}: take tf_efficientnet_lite0, "
                        "deit_base_distilled_patch16_224, another model of timm, NAME:random, or the path of a local "
                        "network (*.safetensors)")
    return model

#----------------------------------------------------------------------------
# Published weights.

def find_weights(name: str, weights: Sequence[str | os.PathLike[str]] = ()) -> tuple[Path, str]:
    """Path of the published weights of a timm model and the address they are published at.

    Looked for as <name>.safetensors or <name>.pth in `weights` and $STYLESAN_WEIGHTS, then in the Hugging Face cache,
    then in this project's cache, then downloaded into that. In a group of processes let one per node go first
    (`distributed.node_first` around whatever loads a network).
    """
    cfg = timm.models.get_pretrained_cfg(_known(name))
    hub_id, url = (None, None) if cfg is None else (cfg.hf_hub_id, cfg.url)
    if hub_id:
        url = f"{os.environ.get('HF_ENDPOINT') or DEFAULT_HUB}/{hub_id}/resolve/main/{HUB_FILES[0]}"
    if not isinstance(url, str) or not url:
        raise UserError(f"backbone {name}: timm publishes no weights for it: take {name}:random or another model")
    folders = [Path(folder) for folder in (*weights, os.environ.get("STYLESAN_WEIGHTS")) if folder]
    return _find_weights(name, hub_id, url, folders), url


def _find_weights(name: str, hub_id: str | None, url: str, folders: Sequence[Path]) -> Path:
    for folder in folders:
        for suffix in SUFFIXES:
            if (path := folder / f"{name}{suffix}").is_file():
                return path
    if hub_id:
        for filename in HUB_FILES:
            found = huggingface_hub.try_to_load_from_cache(hub_id, filename)
            if isinstance(found, str):
                return Path(found)
    # timm publishes no SHA-256; the one that is found is recorded in snapshots.
    return find_or_download(Asset(filename=f"{name}{SUFFIXES[0] if hub_id else SUFFIXES[1]}", url=url), folders)
