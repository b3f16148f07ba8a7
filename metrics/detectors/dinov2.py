# SPDX-License-Identifier: Apache-2.0
"""DINOv2 ViT-L/14, for FD-DINOv2: timm's network with the published weights, used as torch.hub's code uses them.

The published table of positions has 37 x 37 entries (518 pixels). For 224 pixels torch.hub's code samples it with the
scale (16 + 0.1) / 37, timm's with 16 / 37, which moves features by 2 percent. Metrics are published with the former,
so the table is sampled that way once, when the weights are read.
"""
import math
from typing import Any

import torch

from dnnlib.download import Asset
from metrics.detectors.base import DETECTORS, DetectorKind, Outputs, State, normalised
from metrics.detectors.resizes import pil_uint8

DINOV2_FILE = Asset(
    "dinov2_vitl14_pretrain.pth",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428", size=1_217_586_395, in_torch_hub=True)

SIZE, PATCH = 224, 14
GRID = SIZE // PATCH                # 16
INTERPOLATE_OFFSET = 0.1            # The value in the official code.

#----------------------------------------------------------------------------

def make_dinov2(model: str = "vit_large_patch14_dinov2", **overrides: Any) -> torch.nn.Module:
    """timm's network without weights, for 224 pixels. Tests override its depth and width."""
    import timm
    return timm.create_model(model, pretrained=False, img_size=SIZE, num_classes=0, **overrides)


def from_hub_layout(state: State) -> State:
    """Tensors of torch.hub's file -> tensors of timm's network for 224 pixels.

    The names agree but for `mask_token`, which only training uses.
    """
    state = {name: x for name, x in state.items() if name != "mask_token"}
    if "pos_embed" in state and state["pos_embed"].ndim == 3:
        state["pos_embed"] = hub_position_table(state["pos_embed"])
    return state


def hub_position_table(table: torch.Tensor, grid: int = GRID) -> torch.Tensor:
    """Positions [1, 1 + M * M, D] of the published grid -> [1, 1 + grid * grid, D], float32.

    The class token's stays. torch.hub's code hands `interpolate` the scale, not the size, and adds 0.1 to the size
    against rounding down, so the places that are sampled shift as well.
    """
    side = math.isqrt(table.shape[1] - 1)
    if side == grid or 1 + side * side != table.shape[1]:       # The latter will not fit the network.
        return table
    patches = table[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    scale = (grid + INTERPOLATE_OFFSET) / side
    patches = torch.nn.functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=False)
    return torch.cat([table[:, :1].float(), patches.permute(0, 2, 3, 1).reshape(1, grid * grid, -1)], dim=1)


def _forward(net: torch.nn.Module, images: torch.Tensor) -> Outputs:
    """The class token after the last normalisation; images resized as EDM2's and dgm-eval's 'pil' mode."""
    x = pil_uint8(images, SIZE).float()
    return {"pool": net.forward_features(normalised(x))[:, 0]}


DETECTORS.register("dinov2-vitl14")(
    DetectorKind(DINOV2_FILE, 1024, ("pool",), make_dinov2, _forward, resize=f"pil_bicubic_uint8_{SIZE}",
                 convert=from_hub_layout))
