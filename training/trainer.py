# SPDX-License-Identifier: Apache-2.0
"""Everything that changes while training, and one iteration of it (Sauer et al. 2022; Takida et al. 2024).

Whoever trains makes a `Trainer` of the run's settings and networks and calls `step`: the training loop, the
measurements of `--bench` and `--batch-gpu=auto`, and the benchmarks.
"""
import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from training.config import TrainConfig, to_dict
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks.classifier import Classifier
from training.loss import StyleSanLoss
from training.networks_stylegan3 import Generator
from training.step.ema import update_ema
from training.step.guard import GradientGuard
from training.step.micro_batch import MicroBatch
from training.step.phases import Phase, make_phases, run_phase


@dataclasses.dataclass
class Progress:
    """How far a stage is: the plain numbers of a training state."""

    cur_nimg: int = 0           # Images shown in this stage.
    batch_idx: int = 0          # Iterations done.
    cur_tick: int = 0
    elapsed: float = 0.0        # Seconds of training, over all restarts.
    best_value: float | None = None
    best_nimg: int | None = None
    best_metric: str | None = None      # Which metric `best_value` is of.
    bad_evals: int = 0          # Evaluations since then.
    tick_start_nimg: int = 0    # Where the current tick began: a state may be of any iteration.
    snapshot_due: bool = True   # The snapshot of this moment is not complete: a new run, or killed in its evaluation.


class Batches(Protocol):
    """What an iteration needs of its data; `training.step.batches.BatchSource` is one."""

    @property
    def batch(self) -> int:
        """Images of an iteration, over all processes."""

    def micro_batches(self, phase: Phase, cur_nimg: int) -> Iterator[MicroBatch]:
        """This process's share of the iteration that begins at image `cur_nimg`."""


class Trainer:
    """G, G_ema, D, classifier, loss, optimisers and counters of a run on this process's device.

    Args:
        config: Every setting.
        G: As the run begins with it, on the device. G_ema begins as its copy.
        D: The discriminator on the device, with its frozen part prepared.
        classifier: The network of the guidance, on the device; None without it (`TrainConfig.has_guidance`).
        device: Where this process computes.
        report: Takes names and values of statistics.
        real_distance: `training.dataset.real_pair_distance`, for the diversity term.
    """

    def __init__(self, config: TrainConfig, G: Generator, D: ProjectedDiscriminator, classifier: Classifier | None,
                 device: torch.device, report: Callable[[str, torch.Tensor], None] = lambda name, value: None,
                 real_distance: float = 0.0):
        self.config, self.device = config, device
        self.G, self.D, self.classifier = G, D, classifier
        self.G_ema = copy.deepcopy(G).eval()
        self.loss = StyleSanLoss(G, D, config.loss, device, classifier, report, config.precision, real_distance)
        self.phases = make_phases(G, D, self.loss, config.optim)
        self.guard = GradientGuard(config.batch, report)
        self.progress = Progress()
        self.forms: dict[str, str] = {}     # Which forms the operations take on a GPU: `training.run.forms`.

    #------------------------------------------------------------------------
    # One iteration.

    def step(self, batches: Batches, around: Callable[[str], contextlib.AbstractContextManager[None]] =
             lambda name: contextlib.nullcontext()) -> None:
        """Every phase that is due makes one optimiser step; then G_ema follows G.

        Args:
            batches: Where latents, classes and real images come from.
            around: Makes the context in which a phase of this name runs: a clock, an explanation of its errors.
        """
        progress = self.progress
        self.loss.set_progress(progress.cur_nimg)
        for phase in self.phases:
            if progress.batch_idx % phase.interval == 0 and phase.is_active(progress.cur_nimg):
                with around(phase.name):
                    run_phase(phase, batches.micro_batches(phase, progress.cur_nimg), batches.batch, self.guard)
        update_ema(self.G_ema, self.G, progress.cur_nimg, batches.batch, self.config.optim)
        progress.cur_nimg += batches.batch
        progress.batch_idx += 1

    def forget_step(self) -> None:
        """Drop what a step that failed half-way has left for its end."""
        self.loss.forget_step()
        for optimizer in self.optimizers().values():
            optimizer.zero_grad(set_to_none=True)

    def failed_phase(self) -> Phase | None:
        """A phase whose last steps all had gradients that were not finite; looked for once per `guard.LIMIT` steps."""
        if self.progress.batch_idx % self.guard.LIMIT != 0:
            return None
        name = self.guard.failed()
        return next((phase for phase in self.phases if phase.name == name), None)

    #------------------------------------------------------------------------
    # What an exact resume needs.

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By network; phases of one network share theirs."""
        return {"G" if phase.module is self.G else "D": phase.optimizer for phase in self.phases}

    def state_dict(self) -> dict[str, Any]:
        """Tensors that are in use, and plain values."""
        return {
            "G": self.G.state_dict(),
            "G_ema": self.G_ema.state_dict(),
            "D": self.D.own_state_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers().items()},
            "pl_mean": self.loss.pl_mean,
            "counters": dataclasses.asdict(self.progress),
            "forms": self.forms,
            # What a network snapshot needs on top.
            "generator_config": to_dict(self.G.config),
            "discriminator_config": to_dict(self.D.config),
            "backbones": self.D.backbone_info(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave. Learning rates and betas are those of this run's settings."""
        self.G.load_state_dict(state["G"])
        self.G_ema.load_state_dict(state["G_ema"])
        self.D.load_own_state_dict(state["D"])
        for name, opt in self.optimizers().items():
            settings = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
            saved = state["optimizers"][name]
            groups = [old | new for old, new in zip(saved["param_groups"], settings, strict=True)]
            opt.load_state_dict(saved | {"param_groups": groups})
        self.loss.pl_mean.copy_(state["pl_mean"])
        self.forms = dict(state.get("forms", {}))       # Older states have none.
        self.progress = Progress(**state["counters"])
