# SPDX-License-Identifier: Apache-2.0
"""Perceptual path length (Karras et al. 2019, section 4.1; 2020, section 3.2): how much an image changes, as LPIPS
sees it, per step in the space of w.

The protocol `ppl2_wend`: steps of 1e-4 from the end point w of a path between two latents of one class; the whole
image, averaged down to 256 pixels, unrounded; the lowest and the highest percent of the distances left out.
"""
from collections.abc import Callable

import numpy as np
import torch

from metrics.feature_stats import Rows
from metrics.latents import LatentSource, chunk_size, questioned, synthesise, walk
from metrics.passes import on_rank0
from torch_utils import misc

EPSILON = 1e-4
RESOLUTION = 256                # Larger images are averaged down to it.
PERCENTILES = (1, 99)

Distance = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]     # Two [N, 3, R, R] in 0..255 -> [N]

#----------------------------------------------------------------------------

def perceptual_path_length(source: LatentSource, lpips: Distance, device: torch.device,
                           progress: str | None = None) -> float:
    """Mean distance per squared step, over all samples of a generator. All processes take part and get the value.

    It depends on neither batch size nor the number of processes.

    Args:
        source: The generator with its latents and classes.
        lpips: Perceptual distance (which is quadratic for small steps) of two batches of images.
        device: Where this process computes.
        progress: Title of a progress bar.

    Raises:
        UserError: the generator gives images that are not finite.
    """
    rows = Rows(source.num_images)
    with questioned(source.G):
        for positions in walk(source.num_images, chunk_size(source.G.img_resolution), progress):
            rows.append(positions, _distances(source, positions, lpips, device).cpu().double())
    distances = rows.gather(device)

    def value() -> float:
        assert distances is not None    # Process 0 has them.
        return trimmed_mean(distances.numpy())
    return on_rank0(value)


def _distances(source: LatentSource, positions: np.ndarray, lpips: Distance, device: torch.device) -> torch.Tensor:
    """LPIPS over a step, divided by its square: [N]."""
    G = source.G
    c = misc.one_hot(source.labels(positions).to(device), G.c_dim)
    start = G.mapping(source.latents(positions).to(device), c)                          # [N, num_ws, w_dim]
    end = G.mapping(source.latents(positions, stream="metric/z-other-end").to(device), c)
    images = synthesise(G, torch.cat([start, start.lerp(end, EPSILON)]))
    before, after = _as_pixels(images).chunk(2)
    return lpips(before, after) / EPSILON ** 2


def _as_pixels(images: torch.Tensor) -> torch.Tensor:
    """About [-1, 1] -> about [0, 255], neither rounded nor clipped; averaged over squares to 256 pixels if larger."""
    factor = images.shape[3] // RESOLUTION
    if factor > 1:
        images = torch.nn.functional.avg_pool2d(images, factor)
    return (images + 1) * (255 / 2)


def trimmed_mean(distances: np.ndarray) -> float:
    """Mean of the values [N] between the 1st and the 99th percentile, both included; between two values the first is
    taken as the lower, the other as the higher of them."""
    low = np.percentile(distances, PERCENTILES[0], method="lower")
    high = np.percentile(distances, PERCENTILES[1], method="higher")
    return float(distances[(distances >= low) & (distances <= high)].mean())
