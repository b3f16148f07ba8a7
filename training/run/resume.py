# SPDX-License-Identifier: Apache-2.0
"""Reading the training state of a run: the newest that is whole, the same on all processes."""
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import checkpoint, distributed
from training.config import TrainConfig, to_dict
from training.run.folder import (
    CHANGEABLE,
    FREE,
    OPTIONS_KEY,
    PREVIOUS_STATE_FILE,
    STATE_FILE,
    Change,
    changes,
    has_state,
)
from training.run.snapshots import STATE_FORMAT


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a structure that is sent without its tensors."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def load_state(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The content of the state file in `folder`; None if the run has none.

    The first process reads and sends it to the others: they need not see the folder, and cannot read another state.

    Raises:
        UserError: there are states, and all of them are damaged.
    """
    content = _read(folder, say) if distributed.rank() == 0 else None
    return content if distributed.world_size() == 1 else _share(content)


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
        if not change.belongs_to((*FREE, *CHANGEABLE, "discriminator.backbones"))]
    old = state.get("backbones") or {}
    fatal += [Change("discriminator.backbones", sorted(old), sorted(backbones))] if set(old) != set(backbones) else []
    fatal += [Change(f"sha256 of {key}", old[key].get("sha256"), info["sha256"]) for key, info in backbones.items()
              if key in old and info["sha256"] != old[key].get("sha256")]
    if fatal:
        raise UserError(f"{folder / STATE_FILE}: was made with other settings than this run's: "
                        f"{'; '.join(map(str, fatal))}: bring back the state or the network that belongs here, or "
                        "start a new run with another --desc")


def _read(folder: Path, say: Callable[[str], None]) -> dict[str, Any] | None:
    if not has_state(folder):
        return None
    try:
        return checkpoint.load(folder / STATE_FILE, STATE_FORMAT, verify=True)
    except UserError as err:
        if not (folder / PREVIOUS_STATE_FILE).is_file():
            raise
        problem = str(err)
    content = checkpoint.load(folder / PREVIOUS_STATE_FILE, STATE_FORMAT, verify=True)
    say(f"WARNING: {problem}; using the one before it, {PREVIOUS_STATE_FILE}")
    return content


def _share(content: dict[str, Any] | None) -> dict[str, Any] | None:
    """Rank 0's nested dicts, lists and tensors, on all processes; tensors on the CPU."""
    tensors: list[torch.Tensor] = []
    skeleton = distributed.broadcast_object(_strip(content, tensors))
    slots = sorted(_slots(skeleton), key=lambda slot: slot.index)
    for slot in slots:
        mine = tensors[slot.index] if distributed.rank() == 0 else torch.empty(slot.shape, dtype=slot.dtype)
        received = distributed.broadcast(mine.to(distributed.device()).contiguous()).cpu()
        if distributed.rank() != 0:
            tensors.append(received)
    return _fill(skeleton, tensors)


def _strip(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return _Slot(len(tensors) - 1, tuple(value.shape), value.dtype)
    if isinstance(value, dict):
        return {key: _strip(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_strip(item, tensors) for item in value)
    return value


def _slots(value: Any) -> Iterator[_Slot]:
    if isinstance(value, _Slot):
        yield value
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for item in items:
        yield from _slots(item)


def _fill(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, _Slot):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _fill(item, tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_fill(item, tensors) for item in value)
    return value
