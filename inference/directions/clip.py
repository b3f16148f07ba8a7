# SPDX-License-Identifier: Apache-2.0
"""CLIP (Radford et al. 2021): texts and pictures in one space. The networks are those of open_clip, by its names.

| name | weights |
|---|---|
| `ViT-B-32-quickgelu` | those of OpenAI, or the only ones that are published |
| `ViT-B-32:laion2b_s34b_b79k` | those of this name in open_clip's list |
| `ViT-B-32:random` | none: the values that open_clip draws, which are good for tests |

Weights are files of other people: they are read as data, and looked for where those of timm are
(`torch_utils.published`).
"""
import dataclasses
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dnnlib import UserError
from dnnlib.download import Asset, find_asset
from dnnlib.util import file_sha256, list_some
from torch_utils.misc import to_device
from torch_utils.published import hub_address, locate_file
from torch_utils.schema import Unfit, compare_shapes
from torch_utils.weights import read_weights

DEFAULT = "ViT-B-32-quickgelu"          # What the published method takes, with OpenAI's weights.
FIRST_CHOICE = "openai"                 # Of the weights of a network.
RANDOM = "random"                       # In place of the name of weights.
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
INTERPOLATIONS = ("bicubic", "bilinear")

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Clip:
    """A pair of networks for pictures and texts. Gradients go through the first one, to the pictures."""

    name: str                           # NAME:WEIGHTS, or NAME alone with weights of a file.
    source: str                         # Where the weights come from, in words.
    sha256: str | None                  # Of their file.
    device: torch.device
    size: tuple[int, int]               # Height and width of the pictures that the network takes.
    mean: tuple[float, ...]             # Per channel, of pictures in [0, 1].
    std: tuple[float, ...]
    interpolation: str                  # How pictures come to that size.
    context_length: int                 # Tokens in a text at most, with one for its beginning and one for its end.
    encode_image: Callable[..., torch.Tensor]
    encode_text: Callable[..., torch.Tensor]
    tokenizer: Any                      # Of open_clip.

    def embed_images(self, images: torch.Tensor) -> torch.Tensor:
        """Unit vectors [N, D] of pictures [N, 3, R, R] in [-1, 1]; what is beyond is not seen, as in a file."""
        x = (images.clamp(-1, 1) + 1) / 2
        if x.shape[2:] != self.size:
            x = F.interpolate(x, size=self.size, mode=self.interpolation, antialias=True, align_corners=False)
        mean, std = (to_device(torch.tensor(values), x.device)[:, None, None] for values in (self.mean, self.std))
        return self.encode_image((x - mean) / std, normalize=True)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [N, D] of texts. Raises UserError: one is too long."""
        for text in texts:
            if (count := len(self.tokenizer.encode(text)) + 2) > self.context_length:
                raise UserError(f"--prompt: {text[:40]!r}... has {count} tokens, and {self.name} reads "
                                f"{self.context_length}: give a shorter text")
        return self.encode_text(to_device(self.tokenizer(list(texts)), self.device), normalize=True)

#----------------------------------------------------------------------------

def load_clip(name: str, weights: str | None, device: torch.device) -> Clip:
    """A network of open_clip by its name (see the table above), frozen. Random numbers elsewhere are not disturbed.

    Args:
        name: NAME or NAME:WEIGHTS.
        weights: A file of weights, .safetensors or a state dict of torch.save; None: the published ones, found on this
            machine or downloaded.
        device: Where it computes.

    Raises:
        UserError: open_clip is not installed, or does not have this network; its weights cannot be had or do not fit.
    """
    try:
        import open_clip
    except ImportError as err:
        raise UserError("directions by text need the package open_clip_torch: pip install open_clip_torch") from err
    model, _, tag = name.partition(":")
    config = _config(open_clip, name, model)
    tag = _weights_name(open_clip, model, tag, weights)
    published = open_clip.get_pretrained_cfg(model, tag) or {}
    if weights is None and tag != RANDOM and bool(published.get("quick_gelu")) != bool(config.get("quick_gelu")):
        other = f"{model}-quickgelu" if published.get("quick_gelu") else model.removesuffix("-quickgelu")
        raise UserError(f"--clip={name}: the weights {tag} belong to the network with the other GELU: take "
                        f"{other}:{tag}")
    path = None if weights is None else Path(weights)
    if path is None and tag != RANDOM:
        path = find_weights(model, tag, published)
    with torch.random.fork_rng(devices=[]):
        make = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
        net: Any = make(**config)
    if path is not None:
        _load(net, path, name)
    net = net.eval().requires_grad_(False).to(device)
    side = config["vision_cfg"].get("image_size", 224)
    interpolation = published.get("interpolation", INTERPOLATIONS[0])
    return Clip(
        name=f"{model}:{tag}" if weights is None else model, source=str(path or "random weights"),
        sha256=None if path is None else file_sha256(path), device=device,
        size=(side, side) if isinstance(side, int) else (side[0], side[1]),
        mean=tuple(published.get("mean", open_clip.OPENAI_DATASET_MEAN)),
        std=tuple(published.get("std", open_clip.OPENAI_DATASET_STD)),
        interpolation=interpolation if interpolation in INTERPOLATIONS else INTERPOLATIONS[0],
        context_length=net.context_length, encode_image=net.encode_image, encode_text=net.encode_text,
        tokenizer=open_clip.get_tokenizer(model))


def _config(open_clip: Any, name: str, model: str) -> dict[str, Any]:
    """What makes a network. Raises UserError: open_clip has none of this name, or it would ask a hub for parts."""
    known = open_clip.list_models()
    if model not in known:
        close = difflib.get_close_matches(model, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {list_some(known, 10)}"
        raise UserError(f"--clip={name}: open_clip has no network of this name: {hint}")
    config: dict[str, Any] = open_clip.get_model_config(model)
    text = config["text_cfg"]
    if text.get("hf_model_name") or text.get("hf_tokenizer_name") or "multimodal_cfg" in config:
        raise UserError(f"--clip={name}: parts of this network are not open_clip's own, and it has no use without "
                        f"them: take another one, such as {DEFAULT}")
    return config


def _weights_name(open_clip: Any, model: str, tag: str, weights: str | None) -> str:
    """The name of the weights; "" for those of a file that says all by itself. Raises UserError: there are none."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag == RANDOM and weights is not None:
        raise UserError(f"--clip={model}:{tag}: has no use for --clip-weights: leave one of the two out")
    if tag == RANDOM or tag in tags:
        return tag
    if tag:
        raise UserError(f"--clip={model}:{tag}: there are no weights of this name for it, but {list_some(tags, 10)}: "
                        f"take one of these, or give a file by --clip-weights")
    if FIRST_CHOICE in tags or len(tags) == 1:
        return FIRST_CHOICE if FIRST_CHOICE in tags else str(tags[0])
    if tags:
        raise UserError(f"--clip={model}: has several weights, {list_some(tags, 10)}: name those that you mean, such "
                        f"as {model}:{tags[0]}")
    if weights is None:
        raise UserError(f"--clip={model}: nobody publishes weights for it: give a file by --clip-weights, or take "
                        f"another network, such as {DEFAULT}")
    return ""


def find_weights(model: str, tag: str, published: dict[str, Any]) -> Path:
    """The file of published weights: on this machine, or downloaded.

    It may be called <model>.<tag>.safetensors or .pth in $STYLESAN_WEIGHTS.

    Raises:
        UserError: it cannot be had.
    """
    hub_id, _, file = published.get("hf_hub", "").rpartition("/")
    files = (file,) if file else HUB_FILES
    url = hub_address(hub_id, files[0]) if hub_id else published["url"]
    asset = Asset(filename=f"{model}.{tag}{Path(url).suffix}", url=url, options="or the file by --clip-weights")
    return locate_file(asset, hub_id or None, files, [f"{model}.{tag}"]) or find_asset(asset).path


def _load(net: torch.nn.Module, path: Path, name: str) -> None:
    """Give a network its weights. Raises UserError: they are not its own."""
    try:
        state = read_weights(path)
    except UserError as err:
        if not path.is_file():
            raise
        raise UserError(f"{err}. Of CLIP a .safetensors such as {HUB_FILES[0]} is taken, or a plain state dict of "
                        "torch.save; the files of OpenAI's own program hold code") from err
    try:
        compare_shapes(state, "its content", net.state_dict())
    except Unfit as err:
        raise UserError(f"{path}: does not hold the weights of {name} ({err}): give the file {HUB_FILES[0]} that "
                        "belongs to it, or name another network by --clip") from err
    net.load_state_dict(state, strict=True)
