# SPDX-License-Identifier: Apache-2.0
"""Phases of an iteration as data, and the one function that runs a phase."""
import dataclasses
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from torch_utils import distributed, misc
from training.config import OptimConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.networks_stylegan3 import Generator
from training.step.gradients import FlatGradients
from training.step.guard import GradientGuard
from training.step.micro_batch import MicroBatch


@dataclasses.dataclass(frozen=True)
class Phase:
    """One optimiser step: which loss, on which parameters, how often."""

    name: str                                           # Gmain, Greg or Dmain; its random streams have this name, too.
    module: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Adam
    interval: int                                       # It runs when the iteration number is a multiple of this.
    backward: Callable[[MicroBatch, int], None]         # (micro-batch, size of the global batch) -> adds gradients.
    backwards: int = 1                                  # Backward passes per micro-batch.
    is_active: Callable[[int], bool] = lambda cur_nimg: True
    before_step: Callable[[], None] = lambda: None
    after_step: Callable[[], None] = lambda: None
    uses_real_images: bool = False
    uses_noise: bool = False


class PhaseLosses(Protocol):
    """The methods of a loss that phases call; `training.loss.StyleSanLoss` has them. Backward passes add to `.grad`."""

    def generator_main(self, batch: MicroBatch, global_batch: int) -> None: ...

    def generator_path_length(self, batch: MicroBatch, global_batch: int) -> None: ...

    def discriminator_main(self, batch: MicroBatch, global_batch: int) -> None: ...

    def path_length_is_active(self, cur_nimg: int) -> bool: ...

    def end_path_length(self) -> None: ...

    def end_discriminator_main(self) -> None: ...


def lazy_adam(parameters: list[torch.nn.Parameter], lr: float, config: OptimConfig, interval: int) -> torch.optim.Adam:
    """Adam corrected for lazy regularisation (Karras et al. 2020, appendix B).

    The main phase and its regulariser share the moments, so lr and betas are scaled by k / (k + 1).
    """
    ratio = interval / (interval + 1)
    return torch.optim.Adam(parameters, lr=lr * ratio, betas=tuple(b ** ratio for b in config.betas), eps=config.eps,
                            fused=True)


def make_phases(G: Generator, D: ProjectedDiscriminator, loss: PhaseLosses, config: OptimConfig) -> list[Phase]:
    """Gmain, Greg (path lengths) and Dmain. The discriminator has no regulariser, but its interval corrects Adam."""
    G_parameters, D_parameters = G.trainable_parameters(), D.trainable_parameters()
    G_opt = lazy_adam(G_parameters, config.G_lr, config, config.G_reg_interval)
    D_opt = lazy_adam(D_parameters, config.D_lr, config, config.D_reg_interval)
    def after_discriminator() -> None:
        D.end_step()
        loss.end_discriminator_main()
        D.project_()

    return [
        Phase("Gmain", G, G_parameters, G_opt, 1, loss.generator_main, before_step=D.begin_step, after_step=D.end_step),
        Phase("Greg", G, G_parameters, G_opt, config.G_reg_interval, loss.generator_path_length,
              is_active=loss.path_length_is_active, after_step=loss.end_path_length, uses_noise=True),
        Phase("Dmain", D, D_parameters, D_opt, 1, loss.discriminator_main, backwards=2, before_step=D.begin_step,
              after_step=after_discriminator, uses_real_images=True),
    ]

#----------------------------------------------------------------------------

def run_phase(phase: Phase, batches: Iterable[MicroBatch], global_batch: int, guard: GradientGuard) -> None:
    """Accumulate gradients over micro-batches, add them over processes, step.

    Nothing is sent before the last micro-batch; during its backward pass messages start as soon as they are complete.
    A parameter that the loss does not reach has gradient 0, as officially.
    """
    phase.before_step()
    gradients = FlatGradients(phase.parameters)
    done = 0
    with misc.requires_grad(phase.module, phase.parameters):
        for batch in batches:
            done += len(batch.z) * distributed.world_size()
            if done >= global_batch:
                gradients.overlap(phase.backwards)
            phase.backward(batch, global_batch)
    flat = gradients.finish()
    guard.sanitize_(phase.name, flat)
    phase.optimizer.step()
    phase.optimizer.zero_grad(set_to_none=True)
    phase.after_step()
