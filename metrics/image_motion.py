# SPDX-License-Identifier: Apache-2.0
"""Shifting and rotating sampled images as well as their sampling allows, with a mask of the pixels that can be known.

Images [N, C, R, R]; the two numbers of a place are x (to the right) and y (down), in pixels. Interpolation is by the
Lanczos kernel `sinc(x) sinc(x / 3)`, a sinc (the ideal low-pass filter of the pixel grid) with a finite window.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

LOBES = 3                       # Half-width of the Lanczos window in pixels.
ROTATION_RADIUS = 2 * LOBES     # Half-width of the kernel of a rotation, which is two Lanczos kernels in a row.
TABLE_STEPS = 32                # Entries per pixel of the table of that kernel; between them it is interpolated.
TABLE_RADIUS = 8                # Pixels; both kernels in a row reach 3 + 3 * sqrt(2) of them.

Moved = tuple[torch.Tensor, torch.Tensor]       # Images [N, C, R, R], mask bool [N, R, R]

#----------------------------------------------------------------------------

def lanczos(x: torch.Tensor) -> torch.Tensor:
    """The kernel at any distances."""
    return torch.sinc(x) * torch.sinc(x / LOBES) * (x.abs() < LOBES)


def shift_whole(images: torch.Tensor, shifts: torch.Tensor) -> Moved:
    """Shift image n by the whole numbers of pixels `shifts[n]` (int64 [N, 2]). Known: what was in the image before."""
    corner = _places(images).round().long() - shifts.to(images.device)[:, :, None, None]
    return _sum_taps(images, corner, 1, lambda i, j: torch.ones([1, 1, 1], device=images.device))


def shift_lanczos(images: torch.Tensor, shifts: torch.Tensor) -> Moved:
    """Shift image n by `shifts[n]` pixels (float64 [N, 2]). Known: pixels whose whole kernel is inside the image."""
    base = torch.floor(-shifts)             # The content of a place comes from `base + rest` beside it.
    rest = -shifts - base                   # [N, 2] in [0, 1)
    taps = torch.arange(1 - LOBES, 1 + LOBES)
    weights = lanczos(taps - rest.unsqueeze(2))                             # [N, 2, 2 * LOBES]
    weights = (weights / weights.sum(dim=2, keepdim=True)).to(images.device, images.dtype)
    corner = _places(images).round().long() + (base.long() + 1 - LOBES).to(images.device)[:, :, None, None]

    def weight(i: int, j: int) -> torch.Tensor:
        return (weights[:, 0, i] * weights[:, 1, j])[:, None, None]
    return _sum_taps(images, corner, 2 * LOBES, weight)


def transform_filtered(images: torch.Tensor, matrices: torch.Tensor, kernels: torch.Tensor) -> Moved:
    """The content of place p comes from `matrices[n] @ p`, where the centre of the image is 0, through a kernel.

    Known: pixels whose whole kernel is inside the image.

    Args:
        images: [N, C, R, R].
        matrices: [N, 2, 2].
        kernels: Tables [N, 1, T, T] from `rotation_kernels`.
    """
    centre = (images.shape[3] - 1) / 2
    matrices = matrices.to(images.device, images.dtype)
    source = torch.einsum("nab,nbhw->nahw", matrices, _places(images) - centre) + centre    # [N, 2, H, W]
    corner = torch.floor(source).long() + 1 - ROTATION_RADIUS
    steps = torch.arange(2 * ROTATION_RADIUS, device=images.device)
    offsets = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=2)       # [i, j] -> i, j

    def weight(i: int, j: int) -> torch.Tensor:
        distance = source - corner - offsets[i, j][:, None, None]
        grid = distance.permute(0, 2, 3, 1) / ROTATION_RADIUS               # [N, H, W, 2], -1 to 1
        return F.grid_sample(kernels, grid, mode="bilinear", align_corners=True).squeeze(1)
    return _sum_taps(images, corner, 2 * ROTATION_RADIUS, weight)


def rotation_kernels(matrices: torch.Tensor) -> torch.Tensor:
    """Kernels that interpolate an image and keep of it what the pixel grid of the rotated image can hold.

    The spectrum of an image is a square. Rotated it stands on its corner, and the new grid cuts the corners off. So
    the kernel is the Lanczos kernel of one grid convolved with that of the other. `matrices` say where the content of a
    place of the new image comes from. The kernel for images of the new grid, which takes from them the same corners,
    is the mirror image `kernels.flip(2)`.

    Args:
        matrices: Rotations [N, 2, 2].

    Returns:
        Tables [N, 1, T, T] over y and x from -ROTATION_RADIUS to ROTATION_RADIUS; their integral is 1.
    """
    half = TABLE_RADIUS * TABLE_STEPS
    x = torch.arange(-half, half, device=matrices.device, dtype=matrices.dtype) / TABLE_STEPS
    places = torch.stack(torch.meshgrid(x, x, indexing="xy"))                               # [2, T', T']
    turned = torch.einsum("nba,bhw->nahw", matrices, places)        # By the inverse, which is the transpose.
    ours, other = lanczos(places).prod(dim=0), lanczos(turned).prod(dim=1)
    spectrum = torch.fft.rfft2(ours) * torch.fft.rfft2(other)
    kernel: torch.Tensor = torch.fft.irfft2(spectrum, s=other.shape[1:])    # Centred at 0: both factors were at `half`.
    kernel = torch.fft.fftshift(kernel, dim=(1, 2))
    kernel = kernel / kernel.sum(dim=(1, 2), keepdim=True) * TABLE_STEPS ** 2
    edge = half - ROTATION_RADIUS * TABLE_STEPS
    return kernel[:, edge : 1 - edge, edge : 1 - edge].unsqueeze(1)


def rotations(angles: torch.Tensor) -> torch.Tensor:
    """[N] in radians -> [N, 2, 2], from x towards y."""
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], dim=1).reshape(-1, 2, 2)

#----------------------------------------------------------------------------

def _places(images: torch.Tensor) -> torch.Tensor:
    """x and y of every pixel: [1, 2, H, W]."""
    x = torch.arange(images.shape[3], device=images.device, dtype=images.dtype)
    return torch.stack(torch.meshgrid(x, x, indexing="xy")).unsqueeze(0)


def _sum_taps(images: torch.Tensor, corner: torch.Tensor, taps: int,
              weight: Callable[[int, int], torch.Tensor]) -> Moved:
    """Weighted sums of squares of `taps` x `taps` pixels.

    Args:
        images: [N, C, R, R].
        corner: int64 [N, 2, R, R]: x and y of the first pixel of the square that belongs to a place.
        taps: Pixels of a square along an axis.
        weight: (x, y of a pixel in its square) -> weights that broadcast to [N, R, R].
    """
    size = images.shape[3]
    flat, total = images.flatten(2), torch.zeros_like(images)
    for j in range(taps):
        row = (corner[:, 1] + j).clamp(0, size - 1) * size
        for i in range(taps):
            index = (row + (corner[:, 0] + i).clamp(0, size - 1)).flatten(1).unsqueeze(1)   # [N, 1, R * R]
            pixels = flat.gather(2, index.expand(-1, flat.shape[1], -1)).reshape(images.shape)
            total += pixels * weight(i, j).unsqueeze(-3)
    inside = (corner >= 0) & (corner + taps <= size)
    return total, inside.all(dim=1)
