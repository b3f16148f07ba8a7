# SPDX-License-Identifier: Apache-2.0
"""Reading the training state of a run: the newest that is whole, the same on all processes."""
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import distributed
from training.run.folder import PREVIOUS_STATE_FILE, STATE_FILE, has_state
from training.run.formats import RunShape, read_state
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
        folder: Of the run.
        say: Takes lines for the log.
        shape: Of the run that is to continue, which the state must fit.

    Raises:
        UserError: there are states, and none of them can be continued.
    """
    content = _read(folder, say, shape) if distributed.rank() == 0 else None
    return content if distributed.world_size() == 1 else _share(content)


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
