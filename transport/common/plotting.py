# SPDX-License-Identifier: Apache-2.0
"""Figures of the studies: the only place of the package that knows matplotlib."""
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.util import atomic_file

PANEL = 3.6     # Inches per side of a panel.


def panels(rows: int, columns: int, width: float = PANEL, height: float = PANEL) -> tuple[Any, np.ndarray]:
    """(figure, axes [rows, columns]); sizes in inches per panel. No window is ever opened."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> Path:
    """Write a PNG whole or not at all; returns the path."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return path


def draw_points(axis: Any, points: np.ndarray, **style: Any) -> None:
    """Scatter [N, 2] as small dots on equal axes."""
    axis.scatter(points[:, 0], points[:, 1], **{"s": 3, "alpha": 0.5, "linewidths": 0, **style})
    axis.set_aspect("equal")


def draw_images(axis: Any, images: np.ndarray, columns: int) -> None:
    """uint8 [N, H, W, 3], [N, H, W, 1] or [N, H, W] as one sheet without ticks."""
    if images.ndim == 3:
        images = images[..., None]
    if images.shape[3] == 1:
        images = np.repeat(images, 3, axis=3)
    count, height, width, depth = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, depth), 255, dtype=np.uint8)
    sheet[:count] = images
    sheet = sheet.reshape(rows, columns, height, width, depth).swapaxes(1, 2)
    sheet = sheet.reshape(rows * height, columns * width, depth)
    axis.imshow(sheet, interpolation="nearest")
    axis.set_axis_off()
