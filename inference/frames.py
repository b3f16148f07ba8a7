# SPDX-License-Identifier: Apache-2.0
"""From the ws of pictures that are to be shown to the pictures, in batches, and to frames that hold several of them."""
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from torch_utils.images import image_grid, to_uint8_sample
from training.generator.layer_schedule import largest_batch
from training.generator.synthesis import require_finite, synthesize_ws
from training.networks_stylegan3 import Generator

View = tuple[torch.Tensor, torch.Tensor]        # ws [n, num_ws, w_dim] and transforms [n, 3, 3] of some pictures.

#----------------------------------------------------------------------------

def make_transform(translate: tuple[float, float], angle: float) -> torch.Tensor:
    """What the synthesis input wants: the inverse of a rotation by `angle` degrees, then a shift in image widths."""
    s, c = math.sin(math.radians(angle)), math.cos(math.radians(angle))
    forward = np.array([[c, s, translate[0]], [-s, c, translate[1]], [0, 0, 1]])
    return torch.from_numpy(np.linalg.inv(forward)).float()


def _batches(views: Iterable[View], batch_size: int) -> Iterator[View]:
    """The same pictures in batches of one size; the last one may be smaller."""
    kept: list[View] = []
    count = 0
    for view in views:
        kept.append(view)
        count += len(view[0])
        if count >= batch_size:
            ws, transforms = (torch.cat(parts) for parts in zip(*kept, strict=True))
            whole = count - count % batch_size
            yield from zip(ws[:whole].split(batch_size), transforms[:whole].split(batch_size), strict=True)
            kept, count = [(ws[whole:], transforms[whole:])], count - whole
    if count:
        ws, transforms = (torch.cat(parts) for parts in zip(*kept, strict=True))
        yield ws, transforms


def pictures(G: Generator, views: Iterable[View], batch_size: int, precision: str = "auto") -> Iterator[torch.Tensor]:
    """Pictures uint8 [3, R, R] on the CPU, one by one, rounded as those of `gen_images`.

    Args:
        G: The generator.
        views: What is asked for as it is needed.
        batch_size: Pictures that are made at once; large ones come in smaller batches. They do not depend on it, but
            for the rounding of sums: one of 255 levels.
        precision: A key of `PRECISIONS`.

    Raises:
        UserError: an image has non-finite values.
    """
    for ws, transforms in _batches(views, min(batch_size, largest_batch(G.config))):
        images = synthesize_ws(G, ws, precision, transforms)
        require_finite(torch.isfinite(images).all())
        yield from to_uint8_sample(images).cpu()


def tiled(cells: Iterable[torch.Tensor], columns: int, rows: int, zoom: int = 1,
          first_is_empty: bool = False) -> Iterator[np.ndarray]:
    """Frames uint8 [rows * R * zoom, columns * R * zoom, 3] of pictures [3, R, R] that come row by row.

    Args:
        cells: Pictures of the first frame, then those of the second one and so on.
        columns: Pictures side by side.
        rows: Pictures one below the other.
        zoom: Pixels become squares of so many pixels.
        first_is_empty: The place at the top left stays black, and no picture comes for it.
    """
    frame: list[torch.Tensor] = []
    for cell in cells:
        if first_is_empty and not frame:
            frame.append(torch.zeros_like(cell))
        frame.append(cell)
        if len(frame) == columns * rows:
            yield image_grid(torch.stack(frame), columns).repeat(zoom, axis=0).repeat(zoom, axis=1)
            frame = []
