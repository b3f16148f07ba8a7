# SPDX-License-Identifier: Apache-2.0
"""A small convolutional classifier that users train on their own images: features without any download.

It serves as a backbone of the discriminator, as the network behind metrics, and as the classifier for guidance.
A file is a .safetensors with the configuration as JSON in its header; reading one runs no code.
"""
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dnnlib import UserError
from dnnlib.util import atomic_file, file_sha256, list_some
from torch_utils.images import from_uint8
from torch_utils.schema import (
    MAX_ITEMS,
    StoredShape,
    Unfit,
    check_finite,
    check_tensors,
    compare_shapes,
    exactly,
    items,
    nothing_or,
    plain,
    record,
    text,
    whole,
)
from torch_utils.weights import open_safetensors, read_header, safetensors_bytes

FORMAT = "stylesan-xl/local-network/1"
MAX_WIDTH, MAX_STAGES, MAX_RESOLUTION = 8192, 12, 4096
MAX_MAP = 1 << 24               # Elements of a map per image. A small file may ask for large ones.

#----------------------------------------------------------------------------

def own_config(num_classes: int, input_resolution: int = 32, widths: Sequence[int] = (16, 32, 64, 128),
                 class_names: Sequence[str] | None = None, in_channels: int = 3) -> dict[str, Any]:
    """A checked configuration: plain values that go to JSON and back."""
    widths = [int(width) for width in widths]
    names = [str(i) for i in range(num_classes)] if class_names is None else [str(name) for name in class_names]
    if num_classes < 1 or len(names) != num_classes:
        raise UserError(f"own network: {num_classes} classes with {len(names)} names: give one name per class")
    if not widths or min(widths) < 1:
        raise UserError(f"own network: widths {widths}: give one positive width per stage, such as 32,64,128")
    if input_resolution < 2 ** len(widths):
        raise UserError(f"own network: {len(widths)} stages halve {input_resolution} pixels to less than one: "
                        f"take a resolution of at least {2 ** len(widths)} or fewer widths")
    largest = max(width * (input_resolution / 2 ** (i + 1)) ** 2 for i, width in enumerate(widths))
    if len(widths) > MAX_STAGES or max(widths) > MAX_WIDTH or input_resolution > MAX_RESOLUTION or largest > MAX_MAP:
        raise UserError(f"own network: widths {list_some(widths)} at {input_resolution} pixels: give at most "
                        f"{MAX_STAGES} widths of at most {MAX_WIDTH}, at most {MAX_RESOLUTION} pixels, and at most "
                        f"{MAX_MAP} numbers in the map of a stage")
    return {"input_resolution": int(input_resolution), "widths": widths, "num_classes": int(num_classes),
            "class_names": names, "in_channels": int(in_channels)}


class OwnNetwork(torch.nn.Module):
    """Stages of convolution 3x3 with stride 2, BatchNorm, ReLU; mean over positions; linear classifier.

    Attributes:
        config: What `own_config` returns.
        metadata: Further plain values from the file's header.
        sha256: Hash of the file it was read from; None for a network that was not.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = own_config(**config)
        self.metadata: dict[str, Any] = {}
        self.sha256: str | None = None
        widths = self.config["widths"]
        stages = []
        for wide_in, wide_out in zip([self.config["in_channels"], *widths[:-1]], widths, strict=True):
            conv = torch.nn.Conv2d(wide_in, wide_out, kernel_size=3, stride=2, padding=1, bias=False)
            stages.append(torch.nn.Sequential(conv, torch.nn.BatchNorm2d(wide_out), torch.nn.ReLU()))
        self.stages = torch.nn.ModuleList(stages)
        self.classifier = torch.nn.Linear(widths[-1], self.config["num_classes"])

    @property
    def input_resolution(self) -> int:
        """Side of the images that `maps`, `embed` and `logits` take."""
        return int(self.config["input_resolution"])

    @property
    def embed_dim(self) -> int:
        """D of `embed`."""
        return int(self.config["widths"][-1])

    @property
    def num_classes(self) -> int:
        """Width of `logits`."""
        return int(self.config["num_classes"])

    @property
    def class_names(self) -> list[str]:
        """One per class."""
        return list(self.config["class_names"])

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, 3, H, W] -> float in [-1, 1], resized to the input resolution."""
        return self.prepare_float(from_uint8(images))

    def prepare_float(self, images: torch.Tensor) -> torch.Tensor:
        """float [N, 3, H, W] in [-1, 1] -> resized to the input resolution.

        Bilinear without antialiasing; differentiable.
        """
        size = (self.input_resolution, self.input_resolution)
        if images.shape[2:] == size:
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    def maps(self, x: torch.Tensor) -> list[torch.Tensor]:
        """One map per stage, shallowest first: [N, widths[i], R / 2^(i+1), R / 2^(i+1)], from prepared images."""
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of the last map over its positions, [N, D], from prepared images."""
        return self.maps(x)[-1].mean(dim=(2, 3))

    def embed_and_logits(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding [N, D] and logits [N, num_classes] with one pass over prepared images."""
        h = self.embed(x)
        return h, self.classifier(h)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[N, num_classes], from prepared images."""
        return self.embed_and_logits(x)[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.logits(x)

#----------------------------------------------------------------------------

def save_own_network(path: str | os.PathLike[str], net: OwnNetwork, metadata: dict[str, Any] | None = None) -> str:
    """Write a network, atomically. The same network and metadata give the same bytes.

    Args:
        path: File, by custom *.safetensors.
        net: The network.
        metadata: Further plain values for the header, such as where the data came from.

    Returns:
        SHA-256 of the file.
    """
    header = {"format": FORMAT, "config": net.config, "metadata": metadata or {}}
    with atomic_file(path) as f:
        f.write(safetensors_bytes(net.state_dict(), header))
    return file_sha256(path)


HEADER = record({
    "format": exactly(FORMAT),
    "config": record({"num_classes": whole(1, MAX_ITEMS), "input_resolution": whole(2, MAX_RESOLUTION),
                      "widths": items(whole(1, MAX_WIDTH), 1, MAX_STAGES)},
                     {"class_names": nothing_or(items(text)), "in_channels": whole(3, 3)}),
}, {"metadata": record({}, others=plain)})


def load_own_network(path: str | os.PathLike[str]) -> OwnNetwork:
    """Read a network: on the CPU, in eval mode, frozen.

    Raises:
        UserError: no such file; damaged; no network of this kind; not what its header says; weights that are not
            finite.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file: train one with python -m training.feature_networks.train")
    with open_safetensors(path) as file:
        header = read_header(path, file, FORMAT, "name a file that python -m training.feature_networks.train wrote")
        try:
            HEADER(header, "its header")
            with torch.device("meta"):
                net = OwnNetwork(header["config"])
            stored = {name: file.get_slice(name) for name in file.keys()}       # noqa: SIM118 (it is no dict)
            compare_shapes({name: StoredShape(tuple(part.get_shape())) for name, part in stored.items()}, "the file",
                           net.state_dict())
            state = {name: file.get_tensor(name) for name in stored}
            check_tensors(state, "its content", net.state_dict())
            check_finite(state)
        except (UserError, Unfit) as err:
            raise UserError(f"{path}: not a usable network of your own, because its configuration and its tensors "
                            f"do not agree: {err}: train it again") from err
    net = net.to_empty(device="cpu")
    net.load_state_dict(state)
    net.metadata = header.get("metadata", {})
    net.sha256 = file_sha256(path)
    return net.eval().requires_grad_(False)
