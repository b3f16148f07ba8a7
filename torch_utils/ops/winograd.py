# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions on a processor with four times fewer multiplications, where no gradient is asked for.

Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016): an output tile
of 4x4 is worked out from 6x6 inputs at 36 points, and at each point the channels meet in a matrix product. Equal to the
convolution up to rounding: about 1.7e-6 of the result, where the direct form in float32 has 2e-7.
"""
import functools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

TILE = 4                                    # Outputs along an axis.
POINTS = (0.0, 0.7, -0.7, 1.4, -1.4)        # Infinity is one, too. No other set that was tried rounds less.
SIZE = TILE + 2                             # Inputs along an axis: one more than there are finite points.
CHUNK_TILES = 220                           # At a time: products want many, the cache few. Measured: 420 is slower.
MIN_CHANNELS, MIN_TILES = 128, 192          # Below, the transforms take what the products save: measured.

#----------------------------------------------------------------------------

def conv2d(x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    """`F.conv2d(x, weight, padding=padding)`, by tiles where that is faster.

    Args:
        x: [N, I, H, W].
        weight: [O, I, k, k].
        padding: Zeros on every side.
    """
    if _pays(x, weight, padding):
        return conv2d_tiles(x, weight, padding)
    return F.conv2d(x, weight, padding=padding)


def _pays(x: torch.Tensor, weight: torch.Tensor, padding: int) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != x.dtype or weight.shape[2:] != (3, 3):
        return False
    if torch.compiler.is_exporting():       # What is exported is the definition, and of any number of images.
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    rows, columns = (_num_tiles(size, padding) for size in x.shape[2:])
    return min(weight.shape[:2]) >= MIN_CHANNELS and x.shape[0] * rows * columns >= MIN_TILES


def _num_tiles(size: int, padding: int) -> int:
    """Along one axis."""
    return -(-(size + 2 * padding - 2) // TILE)

#----------------------------------------------------------------------------

def conv2d_tiles(x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    """The convolution of x [N, I, H, W] with weight [O, I, 3, 3], tile by tile. Has no gradient of its own."""
    n, i, h, w = x.shape
    o = weight.shape[0]
    height, width = h + 2 * padding - 2, w + 2 * padding - 2
    rows, columns = _num_tiles(h, padding), _num_tiles(w, padding)
    outputs, filters, inputs = (matrix.to(x.dtype) for matrix in _transforms())
    u = (filters @ weight.reshape(o * i, 9).t().contiguous()).view(-1, o, i)            # [36, O, I]
    y = x.new_empty(n, o, rows * TILE, columns * TILE)
    right = columns * TILE + 2 - w - padding
    for images, first, count in _chunks(n, rows, columns):
        above, below = first * TILE, (first + count) * TILE
        part = F.pad(x[images, :, max(above - padding, 0):below + 2 - padding],
                     (padding, right, max(padding - above, 0), max(below + 2 - padding - h, 0)))
        tiles = part.unfold(2, SIZE, TILE).unfold(3, SIZE, TILE).permute(4, 5, 1, 0, 2, 3)  # 6, 6, I, n, rows, columns
        v = (inputs @ tiles.reshape(SIZE**2, -1)).view(SIZE**2, i, -1)
        products = torch.bmm(u, v).view(SIZE**2, -1)                                    # [36, O * n * rows * columns]
        tiles = (outputs @ products).view(TILE, TILE, o, -1, count, columns).permute(3, 2, 4, 0, 5, 1)
        y[images, :, above:below].view(-1, o, count, TILE, columns, TILE).copy_(tiles)
    return y[:, :, :height, :width]


def _chunks(n: int, rows: int, columns: int) -> Iterator[tuple[slice, int, int]]:
    """(images, first row of tiles, number of rows): several whole images, or some rows of one, about equally many."""
    limit = max(CHUNK_TILES // columns, 1)                                              # Rows.
    size, step = max(limit // rows, 1), -(-rows // -(-rows // limit))
    for start in range(0, n, size):
        for first in range(0, rows, step):
            yield slice(start, min(start + size, n)), first, min(step, rows - first)


@functools.cache
def _transforms() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The matrices for outputs [16, 36], filters [36, 9] and inputs [36, 36]: both axes at once, float64.

    Along an axis a product of polynomials is taken at the points and interpolated (Toom and Cook); turned round, that
    is a correlation.
    """
    p = np.array(POINTS)
    outputs, filters, inputs = np.zeros((TILE, SIZE)), np.zeros((SIZE, 3)), np.zeros((SIZE, SIZE))
    for k, point in enumerate(p):
        others = np.delete(p, k)
        outputs[:, k] = point ** np.arange(TILE)
        filters[k] = point ** np.arange(3) / np.prod(point - others)
        inputs[k, :-1] = np.poly(others)[::-1]
    outputs[-1, -1] = filters[-1, -1] = 1
    inputs[-1] = np.poly(p)[::-1]
    with torch.inference_mode(False):
        of_outputs, of_filters, of_inputs = (torch.from_numpy(np.kron(m, m)) for m in (outputs, filters, inputs))
    return of_outputs, of_filters, of_inputs
