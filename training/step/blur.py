# SPDX-License-Identifier: Apache-2.0
"""The blur that images get before the discriminator early in a stage (Sauer et al. 2022, section 3.2)."""
import math

import torch

from torch_utils.ops.upfirdn2d import filter2d


def blur_sigma(cur_nimg: int, init_sigma: float, fade_kimg: float) -> float:
    """Linear from `init_sigma` down to 0 over the first `fade_kimg` thousand images of the stage."""
    if fade_kimg <= 0:
        return 0.0
    return max(1 - cur_nimg / (fade_kimg * 1e3), 0) * init_sigma


def blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian `2^-(i/sigma)^2`, i in [-radius, radius], radius floor(3 sigma), normalised. Shape is kept."""
    radius = math.floor(sigma * 3)
    if radius == 0:
        return images
    # The filter is made on the CPU: from a GPU it would have to be read back, and sigma changes in every iteration.
    taps = torch.arange(-radius, radius + 1, dtype=images.dtype).div(sigma).square().neg().exp2()
    return filter2d(images, taps / taps.sum())
