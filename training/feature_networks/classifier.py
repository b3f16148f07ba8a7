# SPDX-License-Identifier: Apache-2.0
"""The frozen classifier behind guidance (StyleGAN-XL, Sauer et al., SIGGRAPH 2022, section 3.4).

Its cross entropy on generated images draws them towards the class that was asked for.
"""
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F

from dnnlib import UserError
from dnnlib.classes import Classes, match
from torch_utils.own_network import OwnNetwork, load_own_network
from torch_utils.published import trained_with
from training.feature_networks.backbones import standardized
from training.feature_networks.fast import surroundings_of
from training.feature_networks.registry import load_network
from training.feature_networks.within import Surroundings, run_within

#----------------------------------------------------------------------------

class Classifier(torch.nn.Module):
    """Images in [-1, 1] -> logits. Frozen and always in eval mode.

    Attributes:
        net: The network itself.
        num_classes: Width of the logits.
        source: Where the weights came from.
        sha256: SHA-256 of the weights file; None for random weights.
        surroundings: See `training.feature_networks.fast`.
    """

    def __init__(self, net: torch.nn.Module, source: str = "given", sha256: str | None = None,
                 columns: Sequence[int] | None = None):
        """Args:
            net: The network.
            source, sha256: See above.
            columns: For each class of the data the network's; None: as they are.
        """
        super().__init__()
        self.columns: torch.Tensor | None
        self.register_buffer("columns", None if columns is None else torch.tensor(columns), persistent=False)
        self.net = net.requires_grad_(False)
        self.num_classes = cast(int, net.num_classes)
        self.source, self.sha256 = source, sha256
        self.surroundings: Surroundings | None = None
        if not isinstance(net, OwnNetwork):
            self.images = trained_with(net)
        self.train(False)

    def train(self, mode: bool = True) -> "Classifier":
        """Stay in eval mode."""
        return super().train(False)

    def optimize_frozen_(self, precision: str) -> "Classifier":
        """Prepare it, on the device where it is, for a run with this --feature-precision. bf16 does not concern it."""
        self.surroundings = surroundings_of(self.net, precision, next(self.net.parameters()).device)
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [N, num_classes] of images [N, 3, R, R] in [-1, 1]; gradients pass through to the images."""
        if self.surroundings is None:
            return self._logits(images)
        return run_within(self.surroundings, lambda x: (self._logits(x),), images)[0]

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        if isinstance(self.net, OwnNetwork):
            logits = self.net.logits(self.net.prepare_float(images))
            return logits if self.columns is None else logits[:, self.columns]
        x = standardized(images, self.images.mean, self.images.std, self.net)
        x = F.interpolate(x, size=self.images.input_size, mode="bilinear", align_corners=False)
        found: torch.Tensor = self.net(x)
        return found

#----------------------------------------------------------------------------

def load_classifier(name: str, c_dim: int | None = None, class_names: Sequence[str] | None = None,
                    weights: Sequence[str | os.PathLike[str]] = ()) -> Classifier:
    """A classifier on the CPU.

    Args:
        name: A model of timm (published weights), NAME:random[:SEED], or the path of a network of
            your own (*.safetensors).
        c_dim: Classes of the data, checked against the classifier's; None for no check.
        class_names: Their names, by which those of a network of your own are found; None: they are numbered alike.
        weights: Folders with published weights, looked into first.

    Raises:
        UserError: unknown name; weights that cannot be had or do not fit; other classes than the data's.
    """
    if name.endswith(".safetensors"):
        path = Path(name.removeprefix("local:"))
        local = load_own_network(path)
        columns = None
        if class_names is not None:
            found = match("--data", Classes(class_names), f"--classifier={name}", Classes(local.class_names),
                          "train it on this data set")
            columns = None if found.is_same_order else found.indices
        classifier = Classifier(local, os.fspath(path.resolve()), local.sha256, columns)
    else:
        classifier = Classifier(*load_network(name, weights))
    if c_dim is not None and classifier.num_classes != c_dim:
        raise UserError(f"--classifier={name}: knows {classifier.num_classes} classes, but the data has {c_dim}: train "
                        "one with python -m training.feature_networks.train, or set --cls_weight=0")
    return classifier
