# SPDX-License-Identifier: Apache-2.0
"""Latents of labelled pictures: those of a file, or those that an inversion finds for the pictures of a folder."""
from collections.abc import Sequence

import torch
import tqdm

from inference.inversion.distances import Distance
from inference.inversion.goals import Goal
from inference.inversion.projection import ProjectionSettings, project
from inference.inversion.start import default_count, nearest_start
from inference.inversion.targets import Target
from torch_utils.images import from_uint8
from training.generator.layer_schedule import largest_batch
from training.networks_stylegan3 import Generator


def has_latents(path: str) -> bool:
    """Whether a path names a file of latents; otherwise it names a picture or a folder of pictures."""
    return path.lower().endswith((".npz", ".npy"))


def invert(G: Generator, targets: Sequence[Target], distance: Distance, classes: Sequence[int],
           settings: ProjectionSettings, batch_size: int) -> torch.Tensor:
    """Latents of pictures, [N, num_ws, w_dim] on the CPU: those that run_inversion.py finds without tuning.

    Args:
        G: The generator.
        targets: The pictures.
        distance: What is made small.
        classes: Among whose latents the search begins; [0] if the generator has none.
        settings: How it goes on.
        batch_size: Pictures at once; the result does not depend on it.

    Raises:
        UserError: a picture cannot be read, or the search went astray.
    """
    device = next(G.parameters()).device
    batch_size = min(batch_size, largest_batch(G.config))
    found: list[torch.Tensor] = []
    batches = -(-len(targets) // batch_size)
    with tqdm.tqdm(total=batches * settings.steps, unit="step", disable=None) as bar:
        for first in range(0, len(targets), batch_size):
            pixels = torch.stack([target.load(G.img_resolution).pixels
                                  for target in targets[first:first + batch_size]])
            goal = Goal(from_uint8(pixels).to(device), distance)
            start = nearest_start(G, goal, classes, default_count(classes, class_given=False))
            found.append(project(G, goal, start, settings, lambda step: bar.update() and None))
    return torch.cat(found)
