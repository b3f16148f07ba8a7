# SPDX-License-Identifier: Apache-2.0
"""Tensors from and to 8-bit images. The two official roundings differ and each has its place."""
import io
import os

import numpy as np
import PIL.Image
import torch

from dnnlib.util import atomic_file


def from_uint8(images: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1], `x / 127.5 - 1`: what networks see of an image. Shape and device are kept."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8_nearest(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float -> uint8, rounded to the nearest, so that what `from_uint8` made comes back. Shape is kept."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_uint8_sample(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float -> uint8 as the official sample files: `(x + 1) * 127.5`, truncated. Shape is kept."""
    return ((images + 1) * 127.5).clamp(0, 255).to(torch.uint8)


def to_uint8_metric(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] float -> uint8 as the official metrics: `x * 127.5 + 128`, truncated. Shape is kept."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def png_bytes(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] (or [H, W]) as PNG."""
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, format="PNG", compress_level=1)
    return file.getvalue()


def save_image(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Write uint8 [H, W, 3] (or [H, W]) as PNG, atomically."""
    with atomic_file(path) as f:
        f.write(png_bytes(image))


def image_grid(images: torch.Tensor, columns: int) -> np.ndarray:
    """uint8 [N, 3, H, W], N a multiple of `columns` -> one uint8 picture [rows * H, columns * W, 3]."""
    n, c, h, w = images.shape
    grid = images.reshape(n // columns, columns, c, h, w).permute(0, 3, 1, 4, 2)    # [rows, H, columns, W, C]
    return grid.reshape(n // columns * h, columns * w, c).cpu().numpy()
