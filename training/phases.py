# SPDX-License-Identifier: Apache-2.0
"""Phases of an iteration as data, and the one function that runs a phase."""
import dataclasses
from collections.abc import Callable, Iterable

import torch

from torch_utils import distributed, misc
from training.config import OptimConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.loss import MicroBatch, StyleSanLoss
from training.networks_stylegan3 import Generator


@dataclasses.dataclass(frozen=True)
class Phase:
    """One optimiser step: which loss, on which parameters, how often."""

    name: str                                           # Gmain, Greg or Dmain: also the name of its random streams.
    module: torch.nn.Module
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Adam
    interval: int                                       # Runs when the iteration number is a multiple of it.
    backward: Callable[[MicroBatch, int], None]         # (micro-batch, size of the global batch) -> adds gradients.
    is_active: Callable[[int], bool] = lambda cur_nimg: True
    after_step: Callable[[], None] = lambda: None
    uses_real_images: bool = False
    uses_noise: bool = False


def lazy_adam(parameters: list[torch.nn.Parameter], lr: float, config: OptimConfig, interval: int) -> torch.optim.Adam:
    """Adam corrected for lazy regularisation (Karras et al. 2020, appendix B).

    The main phase and its regulariser share the moments, so lr and betas are scaled by k / (k + 1).
    """
    ratio = interval / (interval + 1)
    return torch.optim.Adam(parameters, lr=lr * ratio, betas=tuple(b ** ratio for b in config.betas), eps=config.eps)


def make_phases(G: Generator, D: ProjectedDiscriminator, loss: StyleSanLoss, config: OptimConfig) -> list[Phase]:
    """Gmain, Greg (path lengths), Dmain. The discriminator's regulariser is empty, but its interval corrects Adam."""
    G_parameters, D_parameters = G.trainable_parameters(), D.trainable_parameters()
    G_opt = lazy_adam(G_parameters, config.G_lr, config, config.G_reg_interval)
    D_opt = lazy_adam(D_parameters, config.D_lr, config, config.D_reg_interval)
    return [
        Phase("Gmain", G, G_parameters, G_opt, 1, loss.generator_main),
        Phase("Greg", G, G_parameters, G_opt, config.G_reg_interval, loss.generator_path_length,
              is_active=loss.path_length_is_active, uses_noise=True),
        Phase("Dmain", D, D_parameters, D_opt, 1, loss.discriminator_main,
              after_step=D.project_, uses_real_images=True),
    ]

#----------------------------------------------------------------------------

class GradientGuard:
    """Counts non-finite gradient elements without waiting for the device.

    Officially they are replaced in silence (nan by 0, infinities by 1e5). Here they are replaced and counted, and the
    run stops once `limit` steps of a phase in a row had any.
    """

    def __init__(self, limit: int = 20):
        self.limit = limit
        self._in_a_row: dict[str, torch.Tensor] = {}
        self._total: dict[str, torch.Tensor] = {}

    def sanitize_(self, name: str, gradient: torch.Tensor) -> None:
        """Replace non-finite elements of a flat gradient in place; remember how many there were."""
        bad = (~torch.isfinite(gradient)).sum()
        zero = torch.zeros_like(bad)
        self._total[name] = self._total.get(name, zero) + bad
        self._in_a_row[name] = torch.where(bad > 0, self._in_a_row.get(name, zero) + 1, zero)
        gradient.nan_to_num_(nan=0, posinf=1e5, neginf=-1e5)

    def counts(self) -> dict[str, int]:
        """Non-finite elements per phase since the start. Waits for the device."""
        return {name: int(total) for name, total in self._total.items()}

    def check(self) -> None:
        """Raise when a phase's last `limit` steps all had non-finite gradients. Waits for the device."""
        for name, steps in self._in_a_row.items():
            if int(steps) >= self.limit:
                raise FloatingPointError(
                    f"phase {name}: gradients were not finite in the last {int(steps)} steps "
                    f"({int(self._total[name])} elements so far): resume from the last snapshot with a lower "
                    "--glr/--dlr or with --fp32=1")


def run_phase(phase: Phase, batches: Iterable[MicroBatch], global_batch: int, guard: GradientGuard) -> None:
    """Accumulate gradients over micro-batches, add them over processes, step.

    All gradients of the phase lie in one flat tensor, of which `.grad` are views: one message per phase, nothing
    copied. A parameter that the loss does not reach has gradient 0, as officially.
    """
    parameters = phase.parameters
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = grad.view(p.shape)
    with misc.requires_grad(phase.module, parameters):
        for batch in batches:
            phase.backward(batch, global_batch)
    distributed.all_reduce_sum(flat)
    guard.sanitize_(phase.name, flat)
    phase.optimizer.step()
    phase.optimizer.zero_grad(set_to_none=True)
    phase.after_step()
