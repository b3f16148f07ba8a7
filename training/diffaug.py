# SPDX-License-Identifier: Apache-2.0
"""Differentiable augmentation (Zhao et al., NeurIPS 2020). Its random numbers are an argument, so that a run can be
repeated exactly and real and generated images can be treated alike or apart, as the caller wishes."""
from collections.abc import Callable, Sequence

import torch

from dnnlib import UserError

TRANSLATION_RATIO = 1 / 8       # Largest shift, as a share of the side.
CUTOUT_RATIO = 1 / 5            # Side of the square that is set to 0, as a share of the side.
NUM_UNIFORMS = 7                # Per image: brightness, saturation, contrast, shift y, x, cutout centre y, x.

#----------------------------------------------------------------------------

def _column(u: torch.Tensor, index: int) -> torch.Tensor:
    """One uniform per image, [N, 1, 1, 1]."""
    return u[:, index].reshape(-1, 1, 1, 1)


def _whole_number(u: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform in [0, 1) -> int64 uniform in 0 ... count - 1. (The product may round up to `count`.)"""
    return (u * count).floor().long().clamp_max(count - 1)


def _color(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Brightness + (u - 0.5); saturation x 2u about the grey image; contrast x (u + 0.5) about the mean."""
    x = x + (_column(u, 0) - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * (_column(u, 1) * 2) + grey
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return (x - mean) * (_column(u, 2) + 0.5) + mean


def _shift(x: torch.Tensor, offset: torch.Tensor, axis: int) -> torch.Tensor:
    """y[..., i, ...] = x[..., i + offset[n], ...] along axis 2 or 3, and 0 where that lies outside."""
    size = x.shape[axis]
    index = torch.arange(size, device=x.device) + offset.reshape(-1, 1)                 # [N, size]
    shape = (x.shape[0], 1, size, 1) if axis == 2 else (x.shape[0], 1, 1, size)
    inside = ((index >= 0) & (index < size)).reshape(shape)
    source = index.clamp(0, size - 1).reshape(shape).expand(x.shape)
    return torch.gather(x, axis, source) * inside.to(x.dtype)


def _translation(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Whole-pixel shifts, uniform up to 1/8 of the side each way, filled with 0."""
    for axis, column in ((2, 3), (3, 4)):
        largest = int(x.shape[axis] * TRANSLATION_RATIO + 0.5)
        x = _shift(x, _whole_number(u[:, column], 2 * largest + 1) - largest, axis)
    return x


def _cutout(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """A square of 1/5 of the side becomes 0; its centre is uniform over the image, so it may stick out."""
    hit = []
    for axis, column in ((2, 5), (3, 6)):
        size = x.shape[axis]
        side = int(size * CUTOUT_RATIO + 0.5)
        # An even square has its centre between two pixels, so it has one more place.
        first = _whole_number(u[:, column], size + 1 - side % 2) - side // 2
        position = torch.arange(size, device=x.device) - first.reshape(-1, 1)           # [N, size]
        hit.append((position >= 0) & (position < side))
    keep = ~(hit[0][:, None, :, None] & hit[1][:, None, None, :])
    return x * keep.to(x.dtype)


POLICIES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "color": _color, "translation": _translation, "cutout": _cutout,
}

#----------------------------------------------------------------------------

def diff_augment(images: torch.Tensor, policy: Sequence[str], u: torch.Tensor) -> torch.Tensor:
    """Augment each image by its own random numbers; differentiable with respect to the images.

    Args:
        images: [N, C, H, W] in [-1, 1].
        policy: Names out of color, translation, cutout, in the order in which they are applied; may be empty.
        u: [N, NUM_UNIFORMS] in [0, 1).

    Raises:
        UserError: unknown name in `policy`.
    """
    assert u.shape == (images.shape[0], NUM_UNIFORMS), f"uniforms {list(u.shape)} for images {list(images.shape)}"
    u = u.to(torch.promote_types(u.dtype, images.dtype))    # Factors and summands are as precise as the images.
    for name in policy:
        if name not in POLICIES:
            raise UserError(f"diffaug: unknown augmentation {name!r}: choose from {', '.join(POLICIES)}")
        images = POLICIES[name](images, u)
    return images
