# SPDX-License-Identifier: Apache-2.0
"""Pivotal tuning (Roich et al. 2021): a copy of the generator is trained until it makes one picture of given latents,
while near them it goes on making what the original makes."""
import copy
import dataclasses
import math

import torch

from dnnlib import UserError
from inference.inversion.goals import Goal
from inference.inversion.projection import Step, Watch
from torch_utils.misc import evaluating, full_precision, one_hot, requires_grad, to_device
from torch_utils.nested import first_nonfinite
from training.data.randomness import CounterRNG
from training.networks_stylegan3 import Generator


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """How the copy is trained. The defaults are the published ones."""

    steps: int = 350
    seed: int = 42                  # Of the latents at which the copy is compared with the original.
    learning_rate: float = 3e-4
    locality: float = 10.0          # Weight of that comparison.
    locality_psi: float = 0.5       # Truncation of these latents.
    locality_step: float = 30.0     # How far from the pivot they are, for a w of 512 numbers.

#----------------------------------------------------------------------------

def neighbour(G: Generator, pivot: torch.Tensor, label: int, settings: TuningSettings, step: int) -> torch.Tensor:
    """Latents [1, num_ws, w_dim] that lie in a random direction from the pivot [1, num_ws, w_dim], on its device.

    Networks of smaller w get a smaller distance: the length of a w grows with the root of its size.
    """
    z = torch.from_numpy(CounterRNG(settings.seed).normal("inversion/locality", [step], (G.z_dim,)))
    c = one_hot(torch.tensor([label]), G.c_dim)
    ws = G.mapping(to_device(z, pivot.device), to_device(c, pivot.device), truncation_psi=settings.locality_psi)
    direction = ws - pivot
    length = settings.locality_step * math.sqrt(G.w_dim / 512)
    near: torch.Tensor = pivot + direction * (length / direction.norm(dim=2, keepdim=True).clamp(min=1e-8))
    return near


def tune(G: Generator, goal: Goal, ws: torch.Tensor, label: int, settings: TuningSettings,
         watch: Watch | None = None) -> Generator:
    """A copy of the generator whose synthesis network was trained to make the one target of the latents.

    The loss is the mean squared error of pixels in 0..255, plus the distance of the pictures, plus the weighted
    distance to what the original makes of a neighbour of the latents.

    Args:
        G: The original, which is not changed.
        goal: The target.
        ws: [1, num_ws, w_dim], the pivot.
        label: Class of the neighbours.
        settings: How it is trained.
        watch: Is shown every step.

    Raises:
        UserError: the weights are no longer finite.
    """
    pivot = to_device(ws, goal.targets.device)
    tuned = copy.deepcopy(G)
    weights = list(tuned.synthesis.parameters())
    adam = torch.optim.Adam(weights, lr=settings.learning_rate, betas=(0.9, 0.999))
    with evaluating(G, tuned), full_precision(), requires_grad(tuned, weights):
        for step in range(settings.steps):
            adam.zero_grad(set_to_none=True)
            images = tuned.synthesis(pivot, force_fp32=True)
            distances = goal.distances(images)
            (goal.squared_errors(images) * (255 / 2) ** 2 + distances).sum().backward()
            with torch.no_grad():
                near = neighbour(G, pivot, label, settings, step)
                before = goal.distance.maps(G.synthesis(near, force_fp32=True))
            after = goal.distance.maps(tuned.synthesis(near, force_fp32=True))
            strayed = goal.distance.between(after, before).sum()
            (settings.locality * strayed).backward()            # Apart, which halves the memory.
            adam.step()
            if watch is not None:
                watch(Step(images.detach(), distances.detach()))
    if (bad := first_nonfinite(tuned.state_dict())) is not None:
        raise UserError(f"--run-pti: {bad} of the tuned generator is not finite: take another --distance")
    return tuned
