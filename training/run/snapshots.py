# SPDX-License-Identifier: Apache-2.0
"""Network snapshots and training states: dicts of tensors and plain values, complete in themselves.

A network snapshot holds G, G_ema and D with the settings to rebuild them, without frozen backbones (their names and
sha256 only). A training state adds the optimisers and counters that an exact resume needs.
"""
import dataclasses
from typing import Any

import torch

from dnnlib import UserError
from training.config import GeneratorConfig, TrainConfig, from_dict, to_dict
from training.discriminators.projected import ProjectedDiscriminator
from training.loss import StyleSanLoss
from training.networks_stylegan3 import Generator
from training.run.formats import NETWORK_FORMAT as NETWORK_FORMAT
from training.run.formats import STATE_FORMAT as STATE_FORMAT
from training.run.formats import VERSION as VERSION
from training.run.formats import RunShape
from training.step.phases import Phase

#----------------------------------------------------------------------------

def snapshot_name(cur_nimg: int) -> str:
    """'network-snapshot-000200.pkl' after 200,000 images; odd counts keep three digits of a kimg."""
    kimg, rest = divmod(cur_nimg, 1000)
    return f"network-snapshot-{kimg:06d}.pkl" if rest == 0 else f"network-snapshot-{kimg:06d}.{rest:03d}.pkl"


def network_snapshot(state: dict[str, Any], config: TrainConfig, class_names: list[str],
                     score: dict[str, Any] | None) -> dict[str, Any]:
    """What `network-snapshot-<kimg>.pkl` holds.

    Args:
        state: `TrainingState.content()`.
        config: Settings of the run.
        class_names: One per class.
        score: Metric and value that decide which snapshot is the best; None without metrics.
    """
    return {
        "format": NETWORK_FORMAT,
        "version": VERSION,
        "generator_config": state["generator_config"],
        "G": state["G"],
        "G_ema": state["G_ema"],
        "discriminator_config": state["discriminator_config"],
        "D": state["D"],
        "backbones": state["backbones"],
        "class_names": list(class_names),
        "progress": state["counters"] | {"pl_mean": float(state["pl_mean"])},
        "score": score,
        "options": to_dict(config),
    }


def generator_config(snapshot: dict[str, Any]) -> GeneratorConfig:
    """Settings of the generator in a snapshot."""
    return from_dict(GeneratorConfig, snapshot["generator_config"])


def build_generator(snapshot: dict[str, Any], which: str = "G_ema") -> Generator:
    """The generator `which` ('G_ema' or 'G') of a snapshot, on the CPU."""
    state = snapshot.get(which) or snapshot["G_ema"]
    G = Generator(generator_config(snapshot))
    try:
        G.load_state_dict(state)
    except RuntimeError as err:
        raise UserError(f"the snapshot's {which} does not fit its own settings: {err}") from err
    return G

def run_shape(state: "TrainingState") -> RunShape:
    """What a file must fit to be continued by this state."""
    groups = {name: [group["params"] for group in opt.param_groups] for name, opt in state.optimizers().items()}
    networks = {"G": state.G.state_dict(), "G_ema": state.G_ema.state_dict(), "D": state.D.own_state_dict()}
    return RunShape(networks, groups, tuple(state.counters()))

#----------------------------------------------------------------------------

@dataclasses.dataclass
class TrainingState:
    """Everything that changes while training."""

    G: Generator
    G_ema: Generator
    D: ProjectedDiscriminator
    loss: StyleSanLoss
    phases: list[Phase]
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
    forms: dict[str, str] = dataclasses.field(default_factory=dict)     # Of operations on a GPU: `training.run.forms`.

    COUNTERS = ("cur_nimg", "batch_idx", "cur_tick", "elapsed", "best_value", "best_nimg", "best_metric", "bad_evals",
                "tick_start_nimg", "snapshot_due")

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By network; phases of one network share theirs."""
        return {"G" if phase.module is self.G else "D": phase.optimizer for phase in self.phases}

    def counters(self) -> dict[str, Any]:
        """The plain numbers of the state."""
        return {name: getattr(self, name) for name in self.COUNTERS}

    def content(self) -> dict[str, Any]:
        """What a state file holds, with the tensors that are in use."""
        return {
            "format": STATE_FORMAT,
            "version": VERSION,
            "G": self.G.state_dict(),
            "G_ema": self.G_ema.state_dict(),
            "D": self.D.own_state_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers().items()},
            "pl_mean": self.loss.pl_mean,
            "counters": self.counters(),
            "forms": self.forms,
            # What a network snapshot needs on top.
            "generator_config": to_dict(self.G.config),
            "discriminator_config": to_dict(self.D.config),
            "backbones": self.D.backbone_info(),
        }

    def load_content(self, content: dict[str, Any]) -> None:
        """Continue from a state file. Learning rates and betas are those of this run's settings."""
        self.G.load_state_dict(content["G"])
        self.G_ema.load_state_dict(content["G_ema"])
        self.D.load_own_state_dict(content["D"])
        for name, opt in self.optimizers().items():
            settings = [{key: value for key, value in group.items() if key != "params"} for group in opt.param_groups]
            saved = content["optimizers"][name]
            groups = [old | new for old, new in zip(saved["param_groups"], settings, strict=True)]
            opt.load_state_dict(saved | {"param_groups": groups})
        self.loss.pl_mean.copy_(content["pl_mean"])
        self.forms = dict(content.get("forms", {}))     # Older states have none.
        for name, value in content["counters"].items():
            setattr(self, name, value)
