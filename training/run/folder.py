# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its name, its settings, and whether the same command has been here before."""
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.classes import Classes
from dnnlib.util import append_text, atomic_write_text, normalized_name
from torch_utils import distributed
from training.config import GeneratorConfig, TrainConfig, from_dict, present_names, to_dict
from training.dataset import ImageDataset

OPTIONS_FILE = "training_options.json"
STATE_FILE = "training-state.pt"
PREVIOUS_STATE_FILE = "training-state-prev.pt"
BEST_FILE = "best_model.pkl"
RUN_INFO = "run"                # Key in the options file: what is known of the run beside its settings.

# Settings that may differ between two starts of one run: reporting, saving, length, how the work is cut.
FREE = ("total_kimg", "kimg_per_tick", "snapshot_ticks", "metrics", "restart_every", "cudnn_benchmark", "saving",
        "batch_gpu", "data.workers", "data.path", "on_collapse", "wandb", "diagnose")
# Settings that change what is computed from here on, but not what there is: --continue-changed lets them.
CHANGEABLE = ("batch", "precision", "feature_precision", "loss", "optim")

#----------------------------------------------------------------------------
# Comparing settings.

def flatten(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'optim.G_lr': 0.0025, ...}; lists remain values."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


@dataclasses.dataclass(frozen=True)
class Change:
    """A setting with other values in an old run and in this command."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.old)} -> {_short(self.new)}"

    def belongs_to(self, names: tuple[str, ...]) -> bool:
        """Whether it is one of the settings, or in one of the groups, of these names."""
        return any(self.name == name or self.name.startswith(name + ".") for name in names)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """All settings that differ. One that an older version did not write counts as its default."""
    old, new = _layers_by_meaning(old), _layers_by_meaning(new)
    defaults = {f"{group}.{f.name}" if group else f.name: f.default
                for group, kind in [("", TrainConfig), *((f.name, f.type) for f in dataclasses.fields(TrainConfig)
                                                         if dataclasses.is_dataclass(f.type))]
                for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    before, after = (flatten(json.loads(json.dumps(o))) for o in (old, new))
    before, after = ({k: v for k, v in o.items() if not k.startswith(RUN_INFO + ".")} for o in (before, after))
    for name in after:
        if name not in before and name in defaults:
            before[name] = json.loads(json.dumps(defaults[name]))
    names = [*after, *(name for name in before if name not in after)]
    return [Change(n, before.get(n), after.get(n)) for n in names if before.get(n) != after.get(n)]

def _layers_by_meaning(options: dict[str, Any]) -> dict[str, Any]:
    """What the precision of a run does to its layers, apart from the layers: it may change where precision may."""
    try:
        generator = to_dict(from_dict(GeneratorConfig, options["generator"]))
    except (KeyError, TypeError, ValueError, UserError):    # What is no generator is compared as it is.
        return options
    names = ("use_fp16", "is_clamped")
    layers = generator["layers"]
    precision = [[layer[name] for name in names] for layer in layers]
    generator["layers"] = [{k: v for k, v in layer.items() if k not in names} for layer in layers]
    return options | {"generator": generator, "precision.layers": precision}

#----------------------------------------------------------------------------
# Finding a run.

@dataclasses.dataclass(frozen=True)
class RunChoice:
    """Where a command trains."""

    folder: Path
    resumed: bool                   # Whether it continues the run that is there.
    notes: tuple[str, ...] = ()     # What the user should know about it.


def description(name: str) -> str:
    """A folder's or run's description without its number, processes and batch, which may differ."""
    return re.sub(r"-gpus\d+-batch\d+", "", re.sub(r"^\d{5}-", "", normalized_name(name)), count=1)


def has_state(folder: Path) -> bool:
    """Whether a run can be continued."""
    return (folder / STATE_FILE).is_file() or (folder / PREVIOUS_STATE_FILE).is_file()


def read_options(folder: Path) -> dict[str, Any] | None:
    """The settings in a run's folder; None without readable ones."""
    try:
        options = json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(options, dict):
        return None
    if "discriminator" in options:
        options["discriminator"] = present_names(options["discriminator"])
    return options


def find_run(outdir: Path, desc: str, config: TrainConfig, info: dict[str, Any] | None = None,
             continue_changed: bool = False) -> RunChoice:
    """The folder for this command below `outdir`. Nothing is created here.

    Folders are called NNNNN-<desc>. Of those whose description differs at most in processes and batch, the newest one
    with a state and with the same settings is continued, FREE ones apart; without one, the next number is taken, and
    the notes say what differs from the newest.

    Args:
        outdir: Where runs are.
        desc: Description of this command, with '-gpus<N>-batch<N>'.
        config: Its settings.
        info: `run_info()` of this start.
        continue_changed: Let CHANGEABLE settings differ, too.

    Raises:
        UserError: `continue_changed`, but something else differs.
    """
    found = []
    if outdir.is_dir():
        found = sorted(p for p in outdir.iterdir() if p.is_dir() and re.match(r"\d{5}-", p.name))
    info, allowed = info or {}, FREE + (CHANGEABLE if continue_changed else ())
    refused: tuple[str, ...] = ()
    for folder in reversed([p for p in found if description(p.name) == description(desc)]):
        options = read_options(folder) if has_state(folder) else None
        if options is None:
            continue
        differing = changes(options, to_dict(config)) + _other_data(options, config, info)
        fatal = [change for change in differing if not change.belongs_to(allowed)]
        if not fatal:
            return RunChoice(folder, True, _continued(differing, options.get(RUN_INFO, {}), info))
        if continue_changed:
            raise UserError(f"--continue-changed: {folder} cannot be continued by this command; what cannot change: "
                            f"{'; '.join(map(str, fatal))}: leave the option out to start a new run")
        refused = refused or _refused(folder, fatal)
    number = 1 + max((int(p.name[:5]) for p in found), default=-1)
    return RunChoice(outdir / f"{number:05d}-{desc}", False, refused)


def _other_data(options: dict[str, Any], config: TrainConfig, info: dict[str, Any]) -> list[Change]:
    """Data may move, but not become other data. Folders have no fingerprint: there the path and the classes count."""
    before, after = options.get(RUN_INFO, {}).get("class_names"), info.get("class_names")
    if before and after and not (len(before) == len(after)
                                 and Classes(before).find_all(after) == list(range(len(after)))):
        return [Change("class_names", before, after)]
    old, new = options.get(RUN_INFO, {}).get("data_fingerprint"), info.get("data_fingerprint")
    if old is not None and new is not None:
        return [] if old == new else [Change("data_fingerprint", old[:12], new[:12])]
    paths = options.get("data", {}).get("path"), config.data.path
    return [] if paths[0] == paths[1] else [Change("data_path", *paths)]


def _continued(differing: list[Change], old: dict[str, Any], new: dict[str, Any]) -> tuple[str, ...]:
    shown = [change for change in differing if change.name != "data.path"]
    shown += [Change(name, old[name], new.get(name)) for name in ("world_size", "code", "torch", "device")
              if name in old and old[name] != new.get(name, old[name])]
    return tuple(f"changed since the last start: {change}" for change in shown)


def _refused(folder: Path, fatal: list[Change]) -> tuple[str, ...]:
    lines = [f"not continued: {folder}, because of other settings:", *(f"    {change}" for change in fatal)]
    if all(change.belongs_to(CHANGEABLE) for change in fatal):
        lines.append("    --continue-changed continues it nevertheless")
    return tuple(lines)

#----------------------------------------------------------------------------
# What is known of a run beside its settings.

@functools.cache
def code_version() -> str:
    """Twelve hex digits of the sources that training runs: equal on two machines with the same code."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for folder in ("dnnlib", "torch_utils", "training"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def run_info(dataset: ImageDataset, device: str = "") -> dict[str, Any]:
    """Code version, torch, processes, device, content of the data (None for a folder: it would be read whole), classes.
    """
    fingerprint = dataset.fingerprint if os.path.isfile(dataset.path) else None
    return {"code": code_version(), "torch": torch.__version__, "world_size": distributed.world_size(),
            "device": device, "data_fingerprint": fingerprint, "class_names": dataset.class_names}


def create_run(choice: RunChoice, config: TrainConfig, info: Mapping[str, Any]) -> None:
    """Make the folder and write the settings into it; count the start; the notes go into log.txt.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = choice.folder
    starts = run_start(folder) + 1
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        content = to_dict(config) | {RUN_INFO: {**info, "starts": starts}}
        atomic_write_text(folder / OPTIONS_FILE, json.dumps(content, indent=2) + "\n")
        append_text(folder / "log.txt", "".join(f"{note}\n" for note in choice.notes))
    except OSError as err:
        raise UserError(f"--outdir: cannot write to {folder} ({os.strerror(err.errno or 0)}): "
                        "name a folder that you may write to") from err


def add_run_info(folder: Path, **facts: Any) -> None:
    """Write what became known of a run after its start beside what `run_info` said."""
    options = read_options(folder)
    if options is not None:
        options[RUN_INFO] = options.get(RUN_INFO, {}) | facts
        atomic_write_text(folder / OPTIONS_FILE, json.dumps(options, indent=2) + "\n")


def run_start(folder: Path) -> int:
    """How often the run was started, this time included; 0 without a run."""
    return int(((read_options(folder) or {}).get(RUN_INFO) or {}).get("starts", 0))


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process left."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
