# SPDX-License-Identifier: Apache-2.0
"""Network snapshots and training states: dicts of tensors and plain values, complete in themselves.

A network snapshot holds G, G_ema and D with the settings to rebuild them, without frozen backbones (their names and
sha256 only). A training state adds the optimisers and counters that an exact resume needs.
"""
import dataclasses
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import checkpoint
from training.config import DiscriminatorConfig, GeneratorConfig, TrainConfig, from_dict, to_dict
from training.discriminators.projected import ProjectedDiscriminator
from training.loss import StyleSanLoss
from training.networks_stylegan3 import Generator
from training.phases import Phase

NETWORK_FORMAT = "stylesan-xl-network"
STATE_FORMAT = "stylesan-xl-training-state"
VERSION = 1

#----------------------------------------------------------------------------

def cpu_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's state dict, copied to the CPU."""
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def snapshot_name(cur_nimg: int) -> str:
    """'network-snapshot-000200.pkl' after 200,000 images; odd counts keep three digits of a kimg."""
    kimg, rest = divmod(cur_nimg, 1000)
    return f"network-snapshot-{kimg:06d}.pkl" if rest == 0 else f"network-snapshot-{kimg:06d}.{rest:03d}.pkl"


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

    COUNTERS = ("cur_nimg", "batch_idx", "cur_tick", "elapsed", "best_value", "best_nimg")

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """By network; phases of one network share theirs."""
        return {"G" if phase.module is self.G else "D": phase.optimizer for phase in self.phases}

    def network_snapshot(self, config: TrainConfig, class_names: list[str]) -> dict[str, Any]:
        """What `network-snapshot-<kimg>.pkl` holds."""
        progress = {name: getattr(self, name) for name in self.COUNTERS} | {"pl_mean": float(self.loss.pl_mean)}
        return {
            "format": NETWORK_FORMAT,
            "version": VERSION,
            "generator_config": to_dict(self.G.config),
            "G": cpu_state(self.G),
            "G_ema": cpu_state(self.G_ema),
            "discriminator_config": to_dict(self.D.config),
            "D": {name: value.cpu().clone() for name, value in self.D.own_state_dict().items()},
            "backbones": self.D.backbone_info(),
            "class_names": list(class_names),
            "progress": progress,
            "options": to_dict(config),
        }

    def save(self, path: Path) -> None:
        """Write the training state."""
        checkpoint.save(path, {
            "format": STATE_FORMAT,
            "version": VERSION,
            "G": self.G.state_dict(),
            "G_ema": self.G_ema.state_dict(),
            "D": self.D.own_state_dict(),
            "optimizers": {name: opt.state_dict() for name, opt in self.optimizers().items()},
            "pl_mean": self.loss.pl_mean,
            "counters": {name: getattr(self, name) for name in self.COUNTERS},
        })

    def load(self, path: Path) -> None:
        """Continue where `save` stopped."""
        content = checkpoint.load(path, STATE_FORMAT)
        self.G.load_state_dict(content["G"])
        self.G_ema.load_state_dict(content["G_ema"])
        self.D.load_own_state_dict(content["D"])
        for name, opt in self.optimizers().items():
            opt.load_state_dict(content["optimizers"][name])
        self.loss.pl_mean.copy_(content["pl_mean"])
        for name in self.COUNTERS:
            setattr(self, name, content["counters"][name])

    def start_from(self, snapshot: dict[str, Any], label: str) -> None:
        """Begin a new run with the weights of another (`--resume`): networks only, counters at zero.

        Raises:
            UserError: the networks have other shapes than this run's.
        """
        for name, module in (("G", self.G), ("G_ema", self.G_ema)):
            state = snapshot.get(name) or snapshot["G_ema"]
            own = module.state_dict()
            wrong = [key for key in own if key not in state or state[key].shape != own[key].shape]
            if wrong:
                raise UserError(f"--resume={label}: {len(wrong)} of {len(own)} tensors of {name} do not fit this run "
                                f"(first: {wrong[0]}): use the same --cfg, widths, layers, resolution and --cond")
            module.load_state_dict(state)
        if snapshot.get("D") is not None:
            theirs = from_dict(DiscriminatorConfig, snapshot["discriminator_config"])
            if theirs == self.D.config:
                self.D.load_own_state_dict(snapshot["D"])
