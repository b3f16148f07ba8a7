# SPDX-License-Identifier: Apache-2.0
"""Measurements of a generator that test_generator_metrics.py makes in one process and, as a program, in two."""
import json
import sys

import torch

from metrics import latents
from metrics.equivariance import COMPARISONS, equivariance
from metrics.path_length import perceptual_path_length
from tests.metrics.generators import source, stem, tiny_distance
from torch_utils import distributed


def measure(path: str, device: torch.device) -> None:
    """Write the values to `path`."""
    latents.MAX_CHUNK = 2               # More chunks than processes, and a last one that is not full.
    samples = source(stem(False, 16, 6, c_dim=3), 5)
    values = {**equivariance(samples, list(COMPARISONS), device),
              "ppl": perceptual_path_length(samples, tiny_distance, device)}
    assert len(set(distributed.all_gather_object(json.dumps(values)))) == 1
    if distributed.rank() == 0:
        with open(path, "w", encoding="utf-8") as f:
            json.dump({"values": values, "processes": distributed.world_size()}, f)


if __name__ == "__main__":
    torch.set_num_threads(1)
    measure(sys.argv[1], distributed.init("cpu"))
    distributed.shutdown()
