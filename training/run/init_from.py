# SPDX-License-Identifier: Apache-2.0
"""A new run that begins with another network's weights: `--init-from`, and `--resume`, which wants all of them to fit.

Tensors are matched by name and shape. Rows that belong to classes are matched by the classes' names. What follows from
the settings (filters, the user's transform) is this run's own. Counters start at zero, and with them the schedules
that depend on them: blur, the ramp-up of the averages, path lengths.
"""
import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch

from dnnlib import UserError
from dnnlib.classes import Classes, are_numbers, is_unnamed
from torch_utils import distributed
from training.config import TrainConfig
from training.networks_stylegan3 import Generator
from training.run.snapshots import Snapshot
from training.trainer import Trainer

DERIVED = re.compile(r".*\.(up_filter|down_filter|transform|num_batches_tracked)")      # Not taken from a file.
# Tensors with one row per class, in G and in the heads of D.
PER_CLASS = re.compile(r"mapping\.(embed\.weight|w_avg)|discriminators\..*\.embed\.\w+")

State = Mapping[str, torch.Tensor]

#----------------------------------------------------------------------------
# Classes.

@dataclasses.dataclass(frozen=True)
class ClassRows:
    """Which row of the file goes to which row of this run."""

    here: list[int]
    there: list[int]
    is_all: bool        # Every class of this run has its row.


def match_classes(here: Sequence[str], there: Sequence[str] | None, num_here: int, num_there: int) -> ClassRows:
    """Rows of equal classes.

    Where both sides have names, names decide, as `dnnlib.classes` compares them. Without names, classes are equal if
    there are as many of them; else none are. Numbers in order, which stand in for names in data sets without any, are
    no names, except beside other numbers.
    """
    known = Classes(there, num_there)
    named = [not is_unnamed(names) for names in (here, there)]
    if all(named) or any(named) and are_numbers(here) and known.are_numbers:
        pairs = [(i, j) for i, j in enumerate(known.find_all(here)) if j is not None]
    else:
        pairs = [(i, i) for i in range(num_here)] if num_here == num_there else []
    return ClassRows([i for i, _ in pairs], [j for _, j in pairs], len(pairs) == num_here)

#----------------------------------------------------------------------------
# One network.

@dataclasses.dataclass(frozen=True)
class Transfer:
    """What becomes of a tensor, counted in elements; names are those of state dicts."""

    name: str
    loaded: int = 0
    fresh: int = 0          # Re-initialised: here, but not in the file, or there in another shape.
    skipped: int = 0        # In the file, but not here, or not wanted.
    kept: int = 0           # Stays as --path_stem has it.
    shapes: tuple[list[int] | None, list[int] | None] = (None, None)       # Here, in the file.


def transfer(own: State, other: State, classes: ClassRows) -> tuple[dict[str, torch.Tensor], list[Transfer]]:
    """The state that `own` becomes, and what happened to each tensor. Works on the meta device, too.

    Args:
        own: State of the network that begins.
        other: State in the file.
        classes: Which rows of class tables belong together.
    """
    state, report = {}, []
    for name, value in own.items():
        state[name] = value
        if DERIVED.fullmatch(name):
            continue
        theirs = other.get(name)
        shapes = (list(value.shape), None if theirs is None else list(theirs.shape))
        if theirs is not None and _is_table(name, value) and value.ndim == theirs.ndim \
                and value.shape[1:] == theirs.shape[1:]:
            rows = len(classes.here)
            if rows:
                state[name] = value.clone()
                if not value.is_meta:
                    state[name][classes.here] = theirs[classes.there].to(value)
            width = value[0].numel()
            report.append(Transfer(name, rows * width, value.numel() - rows * width,
                                   theirs.numel() - rows * width, shapes=shapes))
        elif theirs is not None and theirs.shape == value.shape and not _is_table(name, value):
            state[name] = theirs
            report.append(Transfer(name, loaded=value.numel(), shapes=shapes))
        else:
            report.append(Transfer(name, fresh=value.numel(), skipped=0 if theirs is None else theirs.numel(),
                                   shapes=shapes))
    for name, theirs in other.items():
        if name not in own and not DERIVED.fullmatch(name):
            report.append(Transfer(name, skipped=theirs.numel(), shapes=(None, list(theirs.shape))))
    return state, report


def _is_table(name: str, value: torch.Tensor) -> bool:
    """Whether a tensor has a row per class. The mean of w of an unconditional network is one row without classes."""
    return bool(PER_CLASS.fullmatch(name)) and not (name == "mapping.w_avg" and value.ndim == 1)

#----------------------------------------------------------------------------
# The table.

def _group(name: str) -> str:
    """The module that a line of the table is about."""
    parts = name.split(".")
    if parts[0] == "discriminators":
        return ".".join(parts[:4])                  # discriminators.<backbone>.mini_discs.<i>
    if parts[0] == "feature_networks":
        return ".".join(parts[:3])                  # feature_networks.<backbone>.scratch
    return ".".join(parts[:2])                      # mapping.fc0, synthesis.L0_36_1024


def transfer_table(reports: dict[str, list[Transfer]]) -> str:
    """Loaded, skipped and re-initialised elements per network and module."""
    rows = [("network", "module", "loaded", "skipped", "re-initialised")]
    for network, report in reports.items():
        groups: dict[str, list[Transfer]] = {}
        for item in report:
            groups.setdefault(_group(item.name), []).append(item)
        for group, items in [*groups.items(), ("all", report)]:
            counts = [sum(getattr(item, field) for item in items) for field in ("loaded", "skipped", "fresh")]
            rows.append((network, group, f"{counts[0]:,}", f"{counts[1]:,}", f"{counts[2]:,}"))
        rows[-1] = (*rows[-1][:2], f"{rows[-1][2]} ({100 * loaded_share(report):.1f} %)", *rows[-1][3:])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if any(item.kept for report in reports.values() for item in report):
        lines.append("The frozen part stays as --path_stem has it: not all of it is in the file.")
    return "\n".join(lines)


def loaded_share(report: list[Transfer]) -> float:
    """Elements of this run's network that come from the file, 0 to 1."""
    loaded = sum(item.loaded for item in report)
    return loaded / max(loaded + sum(item.fresh + item.kept for item in report), 1)

#----------------------------------------------------------------------------
# Whole runs.

def check_generator(settings: TrainConfig, snapshot: Snapshot, class_names: Sequence[str]) -> str:
    """Before launch: the table of G_ema; nothing is allocated.

    Raises:
        UserError: as `start_from`.
    """
    config = settings.generator
    if config.c_dim > 0 and snapshot["generator_config"]["c_dim"] > 0:
        # Known when the class table is made: here it is as wide as the file's.
        config = dataclasses.replace(config, embed_dim=snapshot["generator_config"]["embed_dim"])
    with torch.device("meta"):
        G = Generator(config)
    classes = _classes(config.c_dim, snapshot, class_names)
    report = _check(transfer(G.state_dict(), snapshot["G_ema"], classes)[1], settings)
    if not _whole(report, G.frozen_prefixes()):
        report = _left_out(report, G.frozen_prefixes())
    return transfer_table({"G_ema": report})


def start_from(trainer: Trainer, snapshot: Snapshot, class_names: Sequence[str]) -> str:
    """Fill the networks of a new run from a snapshot of ours or an official one; returns the table for the log.

    The part that a super-resolution stage keeps frozen is taken whole, from the file's G_ema, or, where some of it does
    not fit, not at all: then it stays as --path_stem has it.

    Args:
        trainer: Networks and optimisers as drawn; counters stay at zero. The settings say whether `init_from` or
            `resume` asked for it.
        snapshot: `legacy.open_snapshot`.
        class_names: Names of this run's classes.

    Raises:
        UserError: nothing of G fits; with `resume`, not all of G fits.
    """
    classes = _classes(trainer.G.c_dim, snapshot, class_names)
    averaged, frozen = snapshot["G_ema"], trainer.G.frozen_prefixes()
    raw = {name: averaged.get(name, value) if name.startswith(frozen) else value
           for name, value in (snapshot.get("G") or averaged).items()}
    reports: dict[str, list[Transfer]] = {}
    for name, module, theirs in (("G", trainer.G, raw), ("G_ema", trainer.G_ema, averaged)):
        own = module.state_dict()
        new, report = transfer(own, theirs, classes)
        _check(report, trainer.config)
        if not _whole(report, frozen):
            new |= {key: value for key, value in own.items() if key.startswith(frozen)}
            report = _left_out(report, frozen)
        module.load_state_dict(new)
        reports[name] = report
    new, reports["D"] = transfer(trainer.D.own_state_dict(), snapshot.get("D") or {}, classes)
    trainer.D.load_own_state_dict(new)
    trainer.D.project_()
    for net in (trainer.G.state_dict(), trainer.G_ema.state_dict(), trainer.D.own_state_dict()):
        for tensor in net.values():
            distributed.broadcast(tensor)
    return transfer_table(reports)


def _whole(report: list[Transfer], prefixes: tuple[str, ...]) -> bool:
    """Whether everything below `prefixes` was found."""
    return not any(item.fresh for item in report if item.name.startswith(prefixes))


def _left_out(report: list[Transfer], prefixes: tuple[str, ...]) -> list[Transfer]:
    """The report when nothing below `prefixes` is taken, and all of that stays as it is."""
    return [Transfer(item.name, skipped=item.loaded + item.skipped, kept=item.loaded + item.fresh, shapes=item.shapes)
            if item.name.startswith(prefixes) else item for item in report]


def _classes(num_here: int, snapshot: Snapshot, names: Sequence[str]) -> ClassRows:
    return match_classes(names, snapshot.get("class_names"), num_here, snapshot["generator_config"]["c_dim"])


def _check(report: list[Transfer], settings: TrainConfig) -> list[Transfer]:
    """Refuse files of which nothing, or with `--resume` not everything, fits the generator. Returns the report."""
    option = f"--resume={settings.resume}" if settings.resume else f"--init-from={settings.init_from}"
    misfits = [item for item in report if item.fresh]
    # Biases of a few elements fit anything: what counts are weights.
    if misfits and not any(item.loaded and item.shapes[0] and len(item.shapes[0]) > 1 for item in report):
        raise UserError(f"{option}: 0 % of G's weights fit this run, e.g. {_explain(misfits[0])}: take a snapshot of "
                        "a network with this --cfg, these widths and layers, or leave the option out")
    if settings.resume and misfits:
        raise UserError(f"{option}: {len(misfits)} tensors of G do not fit this run, e.g. {_explain(misfits[0])}: "
                        "--init-from takes what fits; to continue a run, give its own command again without --resume")
    return report


def _explain(item: Transfer) -> str:
    """A tensor that does not fit, with the options that decide its shape."""
    here, there = item.shapes
    if item.name.startswith("mapping.embed") or item.name == "mapping.w_avg":
        cause = "--cond and the classes of --data"
    elif item.name.startswith("mapping."):
        cause = "--cond and --map-depth"
    else:
        cause = "--cfg, --cbase, --cmax, --syn_layers, --head_layers and the resolution"
    return f"{item.name} is {here} here and {'absent' if there is None else there} in the file ({cause} decide that)"
