# SPDX-License-Identifier: Apache-2.0
"""From the ws of pictures that are to be shown to the pictures, in batches, and to frames that hold several of them."""
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from torch_utils.images import image_grid, to_uint8_sample
from training.generator.layer_schedule import largest_batch
from training.generator.synthesis import require_finite, synthesize_ws
from training.networks_stylegan3 import Generator


class View(NamedTuple):
    """Some pictures. Of those that are made one after the other, all have styles or none do."""

    ws: torch.Tensor                        # [n, num_ws, w_dim]
    transforms: torch.Tensor                # [n, 3, 3]
    styles: torch.Tensor | None = None      # [n, sum of the network's `style_sizes`]: what is added to their styles.

    def part(self, pictures: slice) -> "View":
        """Some of them."""
        styles = None if self.styles is None else self.styles[pictures]
        return View(self.ws[pictures], self.transforms[pictures], styles)

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
        count += len(view.ws)
        if count >= batch_size:
            together = _joined(kept)
            whole = count - count % batch_size
            yield from (together.part(slice(first, first + batch_size)) for first in range(0, whole, batch_size))
            kept, count = [together.part(slice(whole, None))], count - whole
    if count:
        yield _joined(kept)


def _joined(views: Sequence[View]) -> View:
    styles = [view.styles for view in views if view.styles is not None]
    return View(torch.cat([view.ws for view in views]), torch.cat([view.transforms for view in views]),
                torch.cat(styles) if styles else None)


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
    for ws, transforms, styles in _batches(views, min(batch_size, largest_batch(G.config))):
        images = synthesize_ws(G, ws, precision, transforms, styles)
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
