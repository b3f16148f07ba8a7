# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the generator."""
import torch

from training.config import OptimConfig
from training.networks_stylegan3 import Generator


@torch.no_grad()
def update_ema(G_ema: Generator, G: Generator, cur_nimg: int, batch: int, config: OptimConfig) -> None:
    """Move the trained parameters of G_ema towards those of G; copy the buffers that training changes.

    What a super-resolution stage keeps frozen is equal in both and stays so: averaging it would change nothing.

    The half-life is `ema_kimg` thousand images, early on at most the share `ema_rampup` of the images seen before this
    iteration, so the first iteration copies.
    """
    half_life = config.ema_kimg * 1000
    if config.ema_rampup is not None:
        half_life = min(half_life, cur_nimg * config.ema_rampup)
    decay = 0.5 ** (batch / max(half_life, 1e-8))
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
    move(G_ema.trainable_parameters(), G.trainable_parameters(), None)
    for old, new in zip(G_ema.moving_buffers(), G.moving_buffers(), strict=True):
        old.copy_(new)
