# SPDX-License-Identifier: Apache-2.0
"""Snapshots and training states of our own as schemas, and the functions that read them. Every reader uses these.

A file that is not what its schema says is refused with one line. What a key holds beside the listed ones must be plain
values or tensors: later versions may add some.
"""
import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from torch_utils import checkpoint
from torch_utils.schema import (
    COUNTERS,
    FLOATS,
    Check,
    Unfit,
    check_finite,
    check_tensors,
    entries,
    exactly,
    flag,
    items,
    nothing_or,
    number,
    plain,
    record,
    settings_of,
    shown,
    text,
    whole,
)
from training.config import DiscriminatorConfig, present_names
from training.generator.fitting import MAX_SIZE, check_generator_state

NETWORK_FORMAT = "stylesan-xl-network"
STATE_FORMAT = "stylesan-xl-training-state"
VERSION = 1
DAMAGED = "copy it again, or take an earlier snapshot of the run"

#----------------------------------------------------------------------------
# Schemas.

def _tensor(value: Any, place: str) -> None:
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOATS + COUNTERS:
        raise Unfit(f"{place} is {shown(value)}, but must be a tensor of numbers")


def _anything(value: Any, place: str) -> None:
    """What a later version may write: the reader has refused everything but tensors and plain values."""


def _one_number(value: Any, place: str) -> None:
    _tensor(value, place)
    if value.ndim or not value.is_floating_point():
        raise Unfit(f"{place} is {shown(value)}, but must be a tensor of one number")


_BACKBONES = entries(record({"name": text}, dict.fromkeys(("source", "sha256"), nothing_or(text)), others=plain))
_TENSORS = entries(_tensor)
_DISCRIMINATOR = settings_of(DiscriminatorConfig, dict.fromkeys(
    ("img_resolution", "cmap_dim", "proj_channels", "max_channels"), whole(1, MAX_SIZE)) | {
    "backbones": items(text, 1, 100), "c_dim": whole(0, MAX_SIZE), "seed": whole(-2 ** 63, 2 ** 64),
    "ghost_batch": whole(0, MAX_SIZE), "feature_size": whole(0, MAX_SIZE)})

SNAPSHOT = record({
    "format": exactly(NETWORK_FORMAT),
    "generator_config": _anything,              # `training.generator.fitting` checks it together with the tensors.
    "G_ema": _TENSORS,
}, {
    "version": whole(1, VERSION),
    "G": nothing_or(_TENSORS),
    "D": nothing_or(_TENSORS),
    "discriminator_config": nothing_or(_DISCRIMINATOR),
    "backbones": _BACKBONES,
    "class_names": nothing_or(items(text)),
    "progress": nothing_or(entries(plain)),
    # Not finite where the metric was not: such a score wins against none.
    "score": nothing_or(record({"metric": text, "value": plain})),
    "options": nothing_or(entries(plain)),
    "notes": nothing_or(items(text)),
    "source": nothing_or(text),
    "training_set_kwargs": nothing_or(entries(plain)),
}, others=_anything)

_COUNT = whole()
_COUNTS: dict[str, Check] = {"cur_nimg": _COUNT, "batch_idx": _COUNT, "cur_tick": _COUNT, "elapsed": number(0)}
_MORE_COUNTS: dict[str, Check] = {
    "best_value": nothing_or(plain), "best_nimg": nothing_or(_COUNT), "best_metric": nothing_or(text),
    "bad_evals": _COUNT, "tick_start_nimg": _COUNT, "snapshot_due": flag}
_OPTIMIZER = record({
    "state": entries(record({"step": _tensor, "exp_avg": _tensor, "exp_avg_sq": _tensor}, others=_anything), key=int),
    "param_groups": items(record({"params": items(whole())}, others=plain), 1, 100),
})

STATE = record({
    "format": exactly(STATE_FORMAT),
    "generator_config": _anything,
    "discriminator_config": _DISCRIMINATOR,
    "G": _TENSORS,
    "G_ema": _TENSORS,
    "D": _TENSORS,
    "optimizers": record({"G": _OPTIMIZER, "D": _OPTIMIZER}),
    "pl_mean": _one_number,
    "counters": record(_COUNTS, _MORE_COUNTS, others=plain),
}, {
    "version": whole(1, VERSION),
    "forms": entries(text),
    "backbones": _BACKBONES,
}, others=_anything)

#----------------------------------------------------------------------------
# Snapshots.

def check_snapshot(content: dict[str, Any]) -> None:
    """Refuse a network snapshot whose networks cannot be built of it.

    Raises:
        Unfit: keys, types or sizes are wrong; tensors do not fit the settings; something is not finite.
    """
    SNAPSHOT(content, "")
    generators = {name: content[name] for name in ("G_ema", "G") if content.get(name) is not None}
    config = check_generator_state(content["generator_config"], generators)
    if content.get("D") is not None:
        check_tensors(content["D"], "D")
    names = content.get("class_names")
    if names and config.c_dim and len(names) != config.c_dim:
        raise Unfit(f"class_names has {len(names)} names for {config.c_dim} classes")
    check_finite(content)


def _with_present_names(content: dict[str, Any]) -> dict[str, Any]:
    """What was read, with the settings of D under the names of now."""
    if "discriminator_config" in content:
        content["discriminator_config"] = present_names(content["discriminator_config"])
    return content


def read_snapshot(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """A network snapshot of ours, on the CPU, checked.

    Args:
        path: The file.
        mmap: Read D's tensors only when they are used.

    Raises:
        UserError: as `checkpoint.load`; it is not what a snapshot is.
    """
    content = _with_present_names(checkpoint.load(path, NETWORK_FORMAT, mmap))
    try:
        check_snapshot(content)
    except Unfit as err:
        raise UserError(f"{path}: not a usable snapshot: {err}: {DAMAGED}") from err
    return content


def read_score(path: Path) -> dict[str, Any] | None:
    """The score in a snapshot, of which nothing else is looked at.

    Raises:
        UserError: the file is damaged, or its score is none.
    """
    content = checkpoint.load(path, NETWORK_FORMAT, mmap=True)
    try:
        record({}, {"score": nothing_or(record({"metric": text, "value": number()}))}, others=_anything)(content, "")
    except Unfit as err:
        raise UserError(f"{path}: not a usable snapshot: {err}: {DAMAGED}") from err
    score: dict[str, Any] | None = content.get("score")
    return score

#----------------------------------------------------------------------------
# Training states.

@dataclasses.dataclass(frozen=True)
class RunShape:
    """What a training state must fit: the networks and optimisers of the run that continues."""

    networks: Mapping[str, Mapping[str, torch.Tensor]]              # G, G_ema, D -> tensors by name.
    parameters: Mapping[str, list[list[torch.Tensor]]]              # G, D -> those of each group of the optimiser.
    counters: Iterable[str]


def check_state(content: dict[str, Any], shape: RunShape | None = None) -> None:
    """Refuse a training state that cannot be continued exactly.

    Args:
        content: What was read.
        shape: Shape of the run that is to continue; None: what the state says of itself counts.

    Raises:
        Unfit: something is missing, of another type or shape, or not finite.
    """
    STATE(content, "")
    check_generator_state(content["generator_config"], {name: content[name] for name in ("G", "G_ema")})
    check_tensors(content["D"], "D")
    for name, optimizer in content["optimizers"].items():
        _check_optimizer(optimizer, f"optimizers.{name}", None if shape is None else shape.parameters[name])
    if shape is not None:
        for name, tensors in shape.networks.items():
            check_tensors(content[name], name, tensors, exact=True)
        if unknown := [name for name in content["counters"] if name not in shape.counters]:
            raise Unfit(f"counters has unknown entries: {shown(unknown[0])}")
    check_finite(content)


def _check_optimizer(content: dict[str, Any], place: str, groups: list[list[torch.Tensor]] | None) -> None:
    numbers = [i for group in content["param_groups"] for i in group["params"]]
    if numbers != list(range(len(numbers))):
        raise Unfit(f"{place}.param_groups does not number the parameters in order")
    if unknown := sorted(content["state"].keys() - set(numbers)):
        raise Unfit(f"{place}.state has an entry for parameter {unknown[0]}, of {len(numbers)}")
    for i, moments in content["state"].items():
        if moments["exp_avg"].shape != moments["exp_avg_sq"].shape or moments["step"].numel() != 1:
            raise Unfit(f"{place}.state.{i} is not that of one parameter")
    if groups is None:
        return
    if [len(group["params"]) for group in content["param_groups"]] != [len(group) for group in groups]:
        raise Unfit(f"{place} is of {len(numbers)} parameters, the run has {sum(map(len, groups))}")
    for i, parameter in enumerate(parameter for group in groups for parameter in group):
        if i in content["state"] and (shape := content["state"][i]["exp_avg"].shape) != parameter.shape:
            raise Unfit(f"{place}.state.{i} is {list(shape)}, but its parameter is {list(parameter.shape)}")


def read_state(path: Path, shape: RunShape | None = None) -> dict[str, Any]:
    """A training state, on the CPU, checked.

    Raises:
        UserError: as `checkpoint.load`; it cannot be continued.
    """
    content = _with_present_names(checkpoint.load(path, STATE_FORMAT))
    try:
        check_state(content, shape)
    except Unfit as err:
        raise UserError(f"{path}: not a usable training state: {err}: delete it, or begin a new run with the weights "
                        "of a snapshot (--init-from)") from err
    return content
