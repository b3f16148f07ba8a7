# SPDX-License-Identifier: Apache-2.0
"""Latents of pictures by optimisation: the projector of StyleGAN2 (Karras et al. 2020, appendix D), without its noise
maps, which these generators do not have. Several pictures are searched for at once; each takes the way that it takes
alone, because they share only the numbers that are drawn.
"""
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from dnnlib import UserError
from inference.inversion.goals import Goal
from inference.inversion.start import Start, spread
from torch_utils.misc import evaluating, full_precision, to_device
from training.data.randomness import CounterRNG
from training.networks_stylegan3 import Generator

SPACES = ("w", "w+")            # One w for all layers, or one for each.


class Step(NamedTuple):
    """What a step of an optimisation has seen, before it changed anything."""

    images: torch.Tensor        # [N, 3, R, R], about [-1, 1], on the device.
    distances: torch.Tensor     # [N], on the device.


Watch = Callable[[Step], None]


@dataclasses.dataclass(frozen=True)
class ProjectionSettings:
    """How latents are searched for. The defaults are the published ones; shares are of all steps."""

    steps: int = 1000
    space: str = "w"                # One of SPACES.
    seed: int = 42                  # Of the noise.
    learning_rate: float = 0.1      # At its peak.
    ramp_up: float = 0.05           # Share in which the learning rate rises in a line.
    ramp_down: float = 0.25         # Share in which it falls in a cosine.
    noise: float = 0.05             # Of w at the start, in units of the spread of w.
    noise_ramp: float = 0.75        # Share in which it falls to zero in a parabola.

    def learning_rate_at(self, t: float) -> float:
        """At time t, which goes from 0 to 1."""
        fall = min(1.0, (1 - t) / self.ramp_down)
        return self.learning_rate * (0.5 - 0.5 * math.cos(math.pi * fall)) * min(1.0, t / self.ramp_up)

    def noise_at(self, t: float) -> float:
        """Standard deviation of the noise at time t, in units of the spread of w."""
        return self.noise * max(0.0, 1 - t / self.noise_ramp) ** 2

#----------------------------------------------------------------------------

def project(G: Generator, goal: Goal, start: Start, settings: ProjectionSettings,
            watch: Watch | None = None) -> torch.Tensor:
    """Latents [N, num_ws, w_dim], on the CPU, of which the generator makes pictures like the targets.

    Args:
        G: The generator, whose parameters ask for no gradient.
        goal: The targets.
        start: Where the search begins.
        settings: How it goes on.
        watch: Is shown every step.

    Raises:
        UserError: the latents are no longer finite.
    """
    device, rng = goal.targets.device, CounterRNG(settings.seed)
    w = start.ws if settings.space == "w+" else start.ws[:, :1]
    w = w.to(device, copy=True).requires_grad_(True)
    scale = spread(G, start.labels).to(device)[:, None, None]
    adam = torch.optim.Adam([w], betas=(0.9, 0.999))
    with evaluating(G), full_precision():       # Also while gradients are computed, which happens within `backward`.
        for step in range(settings.steps):
            t = step / settings.steps
            noise = torch.from_numpy(rng.normal("inversion/noise", [step], w.shape[1:])) * settings.noise_at(t)
            ws = (w + to_device(noise, device) * scale).expand(-1, G.num_ws, -1)
            images = G.synthesis(ws, force_fp32=True)
            distances = goal.distances(images)
            adam.param_groups[0]["lr"] = settings.learning_rate_at(t)
            adam.zero_grad(set_to_none=True)
            distances.sum().backward()
            adam.step()
            if watch is not None:
                watch(Step(images.detach(), distances.detach()))
    found = w.detach().cpu().repeat(1, G.num_ws // w.shape[1], 1)
    if not found.isfinite().all():
        raise UserError("the search for latents went to values that are not finite: take another --distance, or begin "
                        "elsewhere (--class, --seed)")
    return found
