# SPDX-License-Identifier: Apache-2.0
"""Whether a run lets cuDNN choose its convolution algorithms by timing them."""
import torch

from training.config import TrainConfig

AUTOTUNE_ITERATIONS = 500   # A run with fewer of them to go takes longer to choose algorithms than it gains by them.


def autotunes(config: TrainConfig, cur_nimg: int, device: torch.device) -> bool:
    """Whether convolution algorithms are chosen by timing them, once per shape (cudnn.benchmark)."""
    iterations = (config.total_kimg * 1000 - cur_nimg) / config.batch
    return config.cudnn_benchmark and device.type == "cuda" and iterations >= AUTOTUNE_ITERATIONS
