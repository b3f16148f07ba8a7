# SPDX-License-Identifier: Apache-2.0
"""Where the search for latents begins: at the mean of a class, at the nearest of many samples, or at given latents."""
import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from inference.inversion.goals import Goal
from inference.sampling import class_means, map_latents
from torch_utils.misc import full_precision, random_state
from training.generator.synthesis import distances, require_finite, synthesize_ws
from training.networks_stylegan3 import Generator

NUM_SAMPLES = 10_000        # Of w, for its spread.
SAMPLE_SEED = 123           # Of these and of the samples that may be starts: the published one.


@dataclasses.dataclass(frozen=True)
class Start:
    """Where the search begins for N targets."""

    ws: torch.Tensor            # [N, num_ws, w_dim], on the CPU.
    labels: torch.Tensor        # int64 [N]: the classes; 0 if the generator has none.

#----------------------------------------------------------------------------

def default_count(classes: Sequence[int], class_given: bool) -> int:
    """How many latents are tried: of a class that was asked for its mean alone; else the means and as many samples."""
    return 1 if class_given else max(256, 2 * len(classes))


def candidates(G: Generator, classes: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` latents to begin with, w [count, w_dim], and their classes [count].

    They are the means of the classes, if all of them fit in, and samples of classes that are drawn evenly.
    """
    rng = random_state(SAMPLE_SEED)
    means = torch.tensor(list(classes) if len(classes) <= count else [], dtype=torch.int64)
    num_samples = count - len(means)
    z = torch.from_numpy(rng.randn(num_samples, G.z_dim)).float()
    labels = torch.from_numpy(np.asarray(classes)[rng.randint(0, len(classes), num_samples)]).to(torch.int64)
    samples = map_latents(G, z, labels) if num_samples else torch.empty(0, G.w_dim)
    return torch.cat([class_means(G, means), samples]), torch.cat([means, labels])


@torch.no_grad()
def nearest_start(G: Generator, goal: Goal, classes: Sequence[int], count: int) -> Start:
    """The nearest of `candidates` to each of the targets.

    Args:
        G: The generator.
        goal: The targets.
        classes: That are allowed; [0] if the generator has none.
        count: How many latents are tried.
    """
    w, labels = candidates(G, classes, count)
    found = torch.zeros(len(goal), dtype=torch.int64)
    if len(w) > 1:
        rows = []
        for part in w.split(len(goal)):             # As many at once as targets, to which memory was fitted.
            images = synthesize_ws(G, part[:, None].expand(-1, G.num_ws, -1), "fp32")
            require_finite(torch.isfinite(images).all())
            with full_precision():                  # One by one, because maps of networks are large.
                rows += [goal.distances(image[None]) for image in images]
        found = torch.stack(rows).argmin(dim=0).cpu()
    return Start(w[found, None].repeat(1, G.num_ws, 1), labels[found])


def given_start(G: Generator, ws: torch.Tensor, label: int | None) -> Start:
    """Given latents [N, num_ws, w_dim]. Without a class it is the one whose mean is nearest."""
    if label is not None or G.c_dim == 0:
        labels = torch.full([len(ws)], label or 0, dtype=torch.int64)
    else:
        labels = distances(ws.mean(dim=1), G.mapping.w_avg.cpu()).argmin(dim=1)
    return Start(ws, labels)


def spread(G: Generator, labels: torch.Tensor) -> torch.Tensor:
    """How far w is from its mean in each of the classes [N], as the root of the mean squared distance: [N]."""
    z = torch.from_numpy(random_state(SAMPLE_SEED).randn(NUM_SAMPLES, G.z_dim)).float()
    found = {}
    for label in set(labels.tolist()):
        w = map_latents(G, z, torch.full([NUM_SAMPLES], label))
        found[label] = (w - w.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    return torch.stack([found[label] for label in labels.tolist()])
