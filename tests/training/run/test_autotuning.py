# SPDX-License-Identifier: Apache-2.0
"""Which runs choose their convolution algorithms by timing them."""
import dataclasses

import torch

from tests.training.run.test_batch_size import settings
from training.generator.layer_schedule import stem_config
from training.run.autotuning import AUTOTUNE_ITERATIONS, autotunes

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_algorithms_are_chosen_in_long_runs_on_gpus_only():
    config = settings(stem_config(16, 4, 64, 8, 2, c_dim=3, w_dim=16, embed_dim=8))
    config = dataclasses.replace(config, total_kimg=AUTOTUNE_ITERATIONS * config.batch / 1000)
    assert autotunes(config, 0, GPU)
    assert not autotunes(config, config.batch, GPU)         # One iteration less to go.
    assert not autotunes(config, 0, CPU)
    assert not autotunes(dataclasses.replace(config, cudnn_benchmark=False), 0, GPU)
