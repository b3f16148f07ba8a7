# SPDX-License-Identifier: Apache-2.0
"""Reading the training state of a run: the newest that is whole, the same on all processes."""
import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import checkpoint, distributed
from torch_utils.nested import leaves, map_leaves
from training.config import GeneratorConfig, TrainConfig, to_dict
from training.run.folder import (
    MAY_CHANGE_IF_ASKED,
    MAY_DIFFER,
    OPTIONS_KEY,
    PREVIOUS_STATE_FILE,
    STATE_FILE,
    Change,
    changes,
    has_state,
)
from training.run.formats import STATE_FORMAT, RunShape, read_state
from training.run.snapshots import generator_config
from training.trainer import Progress, Trainer


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a structure that is sent without its tensors."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def load_state(folder: Path, say: Callable[[str], None], shape: RunShape | None = None) -> dict[str, Any] | None:
    """The content of the state file in `folder`; None if the run has none.

    The first process reads and sends it to the others: they need not see the folder, and cannot read another state.

    Args:
        folder: The run's folder.
        say: Takes lines for the log.
        shape: Shape of the run that is to continue, which the state must fit.

    Raises:
        UserError: there are states, and none of them can be continued.
    """
    content = _read(folder, say, shape) if distributed.rank() == 0 else None
    return content if distributed.world_size() == 1 else share(content)


def saved_generator(folder: Path) -> GeneratorConfig | None:
    """Settings of the generator in the newest state that can be read; None without one. All processes call this."""
    found = None
    for name in (STATE_FILE, PREVIOUS_STATE_FILE) if distributed.rank() == 0 else ():
        with contextlib.suppress(UserError, KeyError, TypeError):
            found = found or generator_config(checkpoint.load(folder / name, STATE_FORMAT, mmap=True))
    config: GeneratorConfig | None = distributed.broadcast_object(found)
    return config


def check_state(state: dict[str, Any], folder: Path, config: TrainConfig,
                backbones: dict[str, dict[str, str | None]]) -> None:
    """Compare what a state was made with with what it is loaded for: files can be exchanged after a run was chosen.

    Args:
        state: What `load_state` returned.
        folder: Where it was.
        config: Settings of this start.
        backbones: `backbone_info` of this start's discriminator.

    Raises:
        UserError: they cannot belong together.
    """
    options = state.get(OPTIONS_KEY)        # Older states have none.
    # Files are compared by content: of networks below, of what the run began with when it was chosen.
    fatal = [] if options is None else [
        change for change in changes(options, to_dict(config))
        if not change.belongs_to((*MAY_DIFFER, *MAY_CHANGE_IF_ASKED, "discriminator.backbones"))]
    old = state.get("backbones") or {}
    fatal += [Change("discriminator.backbones", sorted(old), sorted(backbones))] if set(old) != set(backbones) else []
    fatal += [Change(f"sha256 of {key}", old[key].get("sha256"), info["sha256"]) for key, info in backbones.items()
              if key in old and info["sha256"] != old[key].get("sha256")]
    if fatal:
        raise UserError(f"{folder / STATE_FILE}: was made with other settings than this run's: "
                        f"{'; '.join(map(str, fatal))}: bring back the state or the network that belongs here, or "
                        "start a new run with another --desc")


def run_shape(trainer: Trainer) -> RunShape:
    """What a file must fit to be continued by this trainer."""
    groups = {name: [group["params"] for group in opt.param_groups] for name, opt in trainer.optimizers().items()}
    networks = {"G": trainer.G.state_dict(), "G_ema": trainer.G_ema.state_dict(), "D": trainer.D.own_state_dict()}
    return RunShape(networks, groups, tuple(field.name for field in dataclasses.fields(Progress)))


def _read(folder: Path, say: Callable[[str], None], shape: RunShape | None) -> dict[str, Any] | None:
    if not has_state(folder):
        return None
    try:
        return read_state(folder / STATE_FILE, shape)
    except UserError as err:
        if not (folder / PREVIOUS_STATE_FILE).is_file():
            raise
        problem = str(err)
    content = read_state(folder / PREVIOUS_STATE_FILE, shape)
    say(f"WARNING: {problem}; using the one before it, {PREVIOUS_STATE_FILE}")
    return content


def share(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rank 0's nested dicts, lists and tensors, on all processes; tensors on the CPU."""
    tensors: list[torch.Tensor] = []

    def strip(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        tensors.append(value)
        return _Slot(len(tensors) - 1, tuple(value.shape), value.dtype)

    skeleton = distributed.broadcast_object(map_leaves(strip, content))
    for slot in (value for _, value in leaves(skeleton) if isinstance(value, _Slot)):
        mine = tensors[slot.index] if distributed.rank() == 0 else torch.empty(slot.shape, dtype=slot.dtype)
        received = distributed.broadcast(mine.to(distributed.device()).contiguous()).cpu()
        if distributed.rank() != 0:
            tensors.append(received)
    whole: dict[str, Any] | None = map_leaves(
        lambda value: tensors[value.index] if isinstance(value, _Slot) else value, skeleton)
    return whole
