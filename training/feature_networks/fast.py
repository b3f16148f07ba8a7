# SPDX-License-Identifier: Apache-2.0
"""Frozen feature networks made ready for a long run: same function, less time (docs/performance.md has the numbers)."""
import timm.models
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch.nn.utils.fusion import fuse_conv_bn_eval

from torch_utils import misc
from training.feature_networks.backbones import Backbone, is_isotropic
from training.feature_networks.within import Surroundings

# --feature-precision -> type of the large products inside frozen transformers; None: float32.
PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "tf32": None, "bf16": torch.bfloat16}

#----------------------------------------------------------------------------

def fold_batch_norm(net: torch.nn.Module) -> int:
    """Work each BatchNorm of timm's EfficientNets into the convolution before it; equal up to rounding.

    In eval mode a BatchNorm is a factor and a shift per channel. In these networks the order of modules is the order in
    which they run, so a BatchNorm behind a convolution belongs to it. Of other networks that is not known, so they are
    left as they are.

    Returns:
        How many were folded.
    """
    if not isinstance(net, timm.models.EfficientNet):
        return 0
    count = 0
    for parent in list(net.modules()):
        children = list(parent.named_children())
        for (conv_name, conv), (norm_name, norm) in zip(children, children[1:], strict=False):
            if isinstance(conv, torch.nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, torch.nn.Sequential(norm.drop, norm.act))
                count += 1
    return count


# Reduced precision is for transformers. They take nearly all of the time and are smooth. Convolutional networks with
# rectifiers take little of it, and there rounding switches units over, which turns gradients
# (benchmarks/results/feature_precision.md).

def surroundings_of(net: torch.nn.Module, precision: str, device: torch.device) -> Surroundings | None:
    """The switches that hold while a frozen network runs on this device, forward and backward; None: no others.

    Only NVIDIA's GPUs have TF32; elsewhere 'tf32' is 'fp32'.
    """
    return misc.tf32 if precision == "tf32" and device.type == "cuda" and is_isotropic(net) else None


def reduce_(backbone: Backbone, dtype: torch.dtype | None) -> None:
    """Let a frozen backbone compute its large products in this type; None: in the type of its weights."""
    if dtype is not None:
        # Autocast would convert the weights anew in every pass. Norms and the activations between blocks stay float32.
        for module in backbone.net.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.to(dtype)
    backbone.reduced_dtype = dtype


def optimize_frozen(backbone: Backbone, precision: str) -> None:
    """Change a frozen backbone in place: BatchNorm folded, channels last, and with reduced precision the large weights
    in that type. Statistics must have their final values (`warm_up_batch_norm`); tensors get other names.

    Args:
        backbone: On the device where it will run.
        precision: A key of PRECISIONS.
    """
    fold_batch_norm(backbone.net)
    if not backbone.isotropic:
        backbone.net.to(memory_format=torch.channels_last)
    reduce_(backbone, PRECISIONS[precision] if backbone.isotropic else None)
