# SPDX-License-Identifier: Apache-2.0
"""What an inversion leaves behind: latents with all that it takes to find them again, and pictures to compare."""
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dnnlib.util import atomic_file
from inference.sample_files import SHEET_PIXELS, Sheet, write_sheet
from torch_utils.images import save_image, to_uint8_sample

LATENTS_FILE, COMPARISON_FILE = "projected_w.npz", "comparison.png"
SHEET_ROWS = 40             # Of the picture that compares.


class Inverted(NamedTuple):
    """What was found for one picture."""

    target: str             # As it was named.
    sha256: str             # Of the target's file.
    label: int              # Class; 0 if the generator has none.
    start: torch.Tensor     # [num_ws, w_dim]
    ws: torch.Tensor        # [num_ws, w_dim]
    distance: float         # Of the picture that the latents give.
    mse: float              # Mean squared error of its pixels, in [-1, 1].


def save_latents(path: Path, found: Sequence[Inverted], settings: dict[str, Any]) -> None:
    """Write the latents of some pictures as .npz: `w`, float32 [N, num_ws, w_dim], and where they come from.

    Args:
        path: The file.
        found: The pictures.
        settings: Plain values that hold for all of them, each of which becomes an array; what is a dict, JSON.
    """
    arrays = {key: np.array(json.dumps(value) if isinstance(value, dict) else value)
              for key, value in settings.items()}
    arrays |= {"w": torch.stack([one.ws for one in found]).numpy(),
               "start": torch.stack([one.start for one in found]).numpy(),
               "class": np.array([one.label for one in found], dtype=np.int64),
               "target": np.array([one.target for one in found]),
               "target_sha256": np.array([one.sha256 for one in found]),
               "distance_left": np.array([one.distance for one in found]),
               "mse": np.array([one.mse for one in found])}
    with atomic_file(path) as f:
        np.savez(f, allow_pickle=False, **arrays)


def as_picture(image: torch.Tensor) -> torch.Tensor:
    """One image [3, R, R], about [-1, 1], as uint8 on the CPU, rounded as those of `gen_images`."""
    return to_uint8_sample(image).cpu()


def save_picture(path: Path, picture: torch.Tensor) -> None:
    """Write uint8 [3, R, R] as PNG."""
    save_image(path, picture.permute(1, 2, 0).numpy())

#----------------------------------------------------------------------------

class Comparison:
    """A picture with a row per target, as many as are asked for at most and as fit in."""

    def __init__(self, resolution: int, columns: int):
        self._row = Sheet(resolution, columns, 1)
        self._most = max(min(SHEET_ROWS, SHEET_PIXELS // (columns * self._row.cell ** 2)), 1)
        self._rows: list[Sequence[torch.Tensor]] = []
        self.left_out = 0               # Targets that have no row.

    def add(self, row: Sequence[torch.Tensor]) -> None:
        """A target's pictures uint8 [3, R, R]."""
        if len(self._rows) < self._most:
            self._rows.append(row)
        else:
            self.left_out += 1

    def save(self, path: Path) -> None:
        """Write it as PNG."""
        write_sheet(path, dataclasses.replace(self._row, groups=len(self._rows)),
                    (picture.permute(1, 2, 0).numpy() for row in self._rows for picture in row))
