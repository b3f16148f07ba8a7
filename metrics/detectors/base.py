# SPDX-License-Identifier: Apache-2.0
"""What a detector is: a frozen network with a name, the hash of its weights, and one call.

| key | what | from |
|---|---|---|
| pool | [N, D] features | every detector |
| spatial | [N, 2023] first seven channels of an inner map in the order H, W, C, as sFID is defined | inception |
| pool64, pool192, pool768 | [N, D] averages over earlier maps, which pytorch-fid calls its feature layers | inception |
| logits_unbiased | [N, 1008] class scores without the output bias, as the inception score is defined | inception |
| logits | [N, C] class scores of the user's own classes | local judges |
"""
import dataclasses
import functools
from collections.abc import Callable, Collection

import torch

from dnnlib import UserError
from dnnlib.download import Asset
from dnnlib.registry import Registry
from torch_utils import misc

Outputs = dict[str, torch.Tensor]
State = dict[str, torch.Tensor]

#----------------------------------------------------------------------------

class Detector:
    """A frozen network with a name and the hash of its weights."""

    def __init__(
        self,
        name: str,                                      # As results record it.
        sha256: str,                                    # Hash of the file of weights; else of the tensors.
        feature_dim: int,                               # D of 'pool'.
        outputs: tuple[str, ...],                       # Keys that `features` returns.
        forward: Callable[[torch.Tensor], Outputs],     # uint8 images on `device` -> these outputs.
        device: torch.device,                           # Where it computes.
        num_classes: int = 0,                           # C of 'logits'; 0 where there are none.
        class_names: list[str] | None = None,           # Names of the columns of 'logits', where known.
        dims: dict[str, int] | None = None,             # Width of further outputs.
        resize: str = "",                               # How images come to the network's size, for the record.
        verified: bool = True,                          # Whether `sha256` is one that this project vouches for.
    ):
        self.name = name
        self.sha256 = sha256
        self.feature_dim = feature_dim
        self.outputs = outputs
        self.device = device
        self.num_classes = num_classes
        self.class_names = class_names
        self.dims = {"pool": feature_dim, **(dims or {})}
        self.resize = resize
        self.verified = verified
        self._forward = forward
        self._finite: torch.Tensor | None = None        # Whether all features so far were; on `device`.

    @torch.no_grad()
    def features(self, images: torch.Tensor, keys: Collection[str] | None = None) -> Outputs:
        """uint8 [N, 3, H, W] -> float32 tensors on the detector's device (see the table above).

        Args:
            images: The images.
            keys: Names of the outputs that are needed; None: all.

        Raises:
            ValueError: not uint8, or not of that shape.
            UserError: the weights are broken (features are not finite); see `check`.
        """
        misc.assert_shape(images, [None, 3, None, None])
        if images.dtype != torch.uint8:
            raise ValueError(f"expected uint8 images, got {images.dtype}")
        with misc.full_precision():
            outputs = {key: x.float() for key, x in self._forward(images.to(self.device, non_blocking=True)).items()
                       if keys is None or key in keys}
        is_first = self._finite is None
        for x in outputs.values():
            finite = x.isfinite().all()
            self._finite = finite if self._finite is None else self._finite & finite
        if is_first or self.device.type == "cpu":
            self.check()                                # Elsewhere it would wait for the device at every batch.
        return outputs

    def check(self) -> None:
        """To be called after the last batch: on a GPU, `features` looks at its first answer only.

        Raises:
            UserError: features since the last check were not finite.
        """
        finite, self._finite = self._finite, torch.ones([], dtype=torch.bool, device=self.device)
        if finite is not None and not finite:
            raise UserError(f"--detector={self.name}: its features are not finite: its weights are damaged")


@dataclasses.dataclass(frozen=True)
class DetectorKind:
    """A registered detector: the file it needs and how it is built and asked."""

    asset: Asset | None                                                 # None: it has random weights only.
    feature_dim: int
    outputs: tuple[str, ...]
    make_net: Callable[[], torch.nn.Module]                             # Called on the meta device.
    forward: Callable[[torch.nn.Module, torch.Tensor], Outputs]
    dims: dict[str, int] = dataclasses.field(default_factory=dict)      # Width of outputs other than 'pool'.
    resize: str = ""                                                    # For the record.
    convert: Callable[[State], State] = dict                            # Names in the file -> names in the network.
    rebuild: Callable[[torch.nn.Module, torch.device], torch.nn.Module] | None = None
    #                                                   The loaded network -> what `forward` takes, for this device.


DETECTORS: Registry[DetectorKind] = Registry("detector")

#----------------------------------------------------------------------------

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@functools.lru_cache(maxsize=16)
def _per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """[1, 3, 1, 1]. Kept between calls, because copying numbers to a GPU waits for it."""
    with torch.inference_mode(False):       # The first caller's mode must not decide what later callers may do.
        return torch.tensor(values, device=device).reshape(1, -1, 1, 1)


def normalised(x: torch.Tensor, mean: tuple[float, ...] = IMAGENET_MEAN,
               std: tuple[float, ...] = IMAGENET_STD) -> torch.Tensor:
    """Float [N, 3, H, W] in 0..255 -> the same by mean and standard deviation of colours in [0, 1], here ImageNet's."""
    return (x / 255 - _per_channel(mean, x.device)) / _per_channel(std, x.device)
