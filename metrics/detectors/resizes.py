# SPDX-License-Identifier: Apache-2.0
"""How images come to the size of a network. Every choice here moves a metric, so each has a name that results record.

| name | what | who |
|---|---|---|
| tf1_bilinear | TF1's bilinear: no half-pixel shift, no antialiasing | the 2015 graph, ADM, StyleGAN, torch-fidelity |
| pytorch_fid_bilinear | bilinear with half-pixel shift, no antialiasing | pytorch-fid |
| pil_bicubic_float | PIL's antialiased bicubic on float32 channels, then clipped to 0..255, not rounded | clean-fid |
| pil_bicubic_uint8 | PIL's antialiased bicubic on 8-bit images, rounded after either direction | EDM2, dgm-eval |
| pil_bilinear_uint8 | the same with PIL's bilinear | models of timm that were trained so |
"""
import functools
from collections.abc import Callable

import numpy as np
import torch

PIL_BITS = 22           # Fixed-point digits of PIL's weights for 8-bit images.
FLOAT64_IMAGES = 8      # At a time: 64 images of 1024 pixels would take 1.6 GB.

#----------------------------------------------------------------------------

def tf1_bilinear(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32 [N, C, size, size] in 0..255."""
    x = images.float()
    below, above, share = _tf1_taps(images.shape[2], size, images.device)
    x = torch.lerp(x[:, :, below], x[:, :, above], share[:, None])
    return x @ _tf1_weights(images.shape[3], size, images.device).T     # Faster than picking columns.


@functools.lru_cache(maxsize=16)
def _tf1_taps(size: int, new_size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per new pixel: its two neighbours and the share of the second. Positions are rounded to float32, as TF1 does."""
    positions = torch.arange(new_size, dtype=torch.float32) * torch.tensor(size / new_size, dtype=torch.float32)
    below = positions.floor().long()
    above = (below + 1).clamp(max=size - 1)
    return below.to(device), above.to(device), (positions - below).to(device)


@functools.lru_cache(maxsize=16)
def _tf1_weights(size: int, new_size: int, device: torch.device) -> torch.Tensor:
    """The same as a matrix [new_size, size]."""
    below, above, share = _tf1_taps(size, new_size, torch.device("cpu"))
    rows = torch.arange(new_size)
    weights = torch.zeros(new_size, size)
    weights[rows, below] += 1 - share
    weights[rows, above] += share
    return weights.to(device)


def pytorch_fid_bilinear(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32 [N, C, size, size] in 0..1."""
    return torch.nn.functional.interpolate(images.float() / 255, size=(size, size), mode="bilinear",
                                           align_corners=False)


def pil_bicubic_float(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [N, C, H, W] -> float32 [N, C, size, size] in 0..255, within 1e-4 of PIL's resize of mode 'F' images."""
    height, width = images.shape[2:]
    x: torch.Tensor = images.float() @ _float_weights(width, size, images.device).T     # PIL, too, begins with rows.
    x = _float_weights(height, size, images.device) @ x
    return x.clamp(0, 255)


def pil_uint8(images: torch.Tensor, size: int, interpolation: str = "bicubic") -> torch.Tensor:
    """uint8 [N, C, H, W] -> uint8 [N, C, size, size], equal to PIL's resize of 8-bit images.

    PIL sums integers: weights of 22 binary digits times pixels. Sums stay below 2^53, so float64 holds them exactly.

    Args:
        images: The images.
        size: New side.
        interpolation: A name in `PIL_FILTERS`.
    """
    device = torch.device("cpu") if images.device.type == "mps" else images.device      # MPS has no float64.
    parts = []
    for part in images.split(FLOAT64_IMAGES):
        rows = _integer_rows(part.to(device).double(), size, interpolation)     # Along the width first, as PIL does.
        parts.append(_integer_rows(rows.mT, size, interpolation).mT.to(images.device, torch.uint8))
    return torch.cat(parts)


def _integer_rows(x: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """Whole numbers 0..255 [N, C, H, W] -> [N, C, H, size], in float64."""
    if x.shape[3] == size:
        return x        # PIL leaves a direction alone that keeps its size.
    sums = x @ _integer_weights(x.shape[3], size, x.device, interpolation).T
    return ((sums + (1 << (PIL_BITS - 1))) / (1 << PIL_BITS)).floor().clamp(0, 255)

#----------------------------------------------------------------------------

def _cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys 1981, "Cubic convolution interpolation for digital image processing", eq. 4 (general a)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _triangle(x: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.maximum(1 - np.abs(x), 0.0)
    return weights


# PIL's kernels by name: half of the width, and the function.
PIL_FILTERS: dict[str, tuple[float, Callable[[np.ndarray], np.ndarray]]] = {
    "bicubic": (2.0, _cubic), "bilinear": (1.0, _triangle)}


@functools.lru_cache(maxsize=16)
def pil_weights(size: int, new_size: int, interpolation: str = "bicubic") -> np.ndarray:
    """Weights [new_size, size] of PIL's resize along one direction, float64.

    The kernel is stretched when the image shrinks, and taken over the pixels within its support; rows sum to one.
    """
    support, kernel = PIL_FILTERS[interpolation]
    scale = size / new_size
    stretch = max(scale, 1.0)
    weights = np.zeros([new_size, size])
    for row in range(new_size):
        centre = (row + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), size)
        taps = kernel((np.arange(first, last) - centre + 0.5) / stretch)
        weights[row, first:last] = taps / taps.sum()
    return weights


@functools.lru_cache(maxsize=16)
def _float_weights(size: int, new_size: int, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(pil_weights(size, new_size)).float().to(device)


@functools.lru_cache(maxsize=16)
def _integer_weights(size: int, new_size: int, device: torch.device, interpolation: str) -> torch.Tensor:
    """In units of 2^-PIL_BITS, rounded half away from zero, as C casts; float64."""
    scaled = pil_weights(size, new_size, interpolation) * 2 ** PIL_BITS
    return torch.from_numpy(np.trunc(scaled + np.copysign(0.5, scaled))).to(device)
