# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its name, its settings, and whether the same command has been here before."""
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.classes import Classes
from dnnlib.util import append_text, atomic_write_text, normalized_name, parse_json
from torch_utils import checkpoint, distributed
from torch_utils.schema import Unfit, entries, items, nothing_or, plain, record, text, whole
from training.config import GeneratorConfig, TrainConfig, from_dict, present_names, to_dict
from training.data.inventory import Inventory, compare, inventory_fingerprint, read_inventory, write_inventory
from training.dataset import ImageDataset
from training.run.formats import STATE_FORMAT
from training.run.lock import RunLock, owner_of, refusal
from training.run.sources import FILES, Source, by_content, keep_networks, record_sources

OPTIONS_FILE = "training_options.json"
STATE_FILE = "training-state.pt"
PREVIOUS_STATE_FILE = "training-state-prev.pt"
BEST_FILE = "best_model.pkl"
RUN_INFO = "run"                # Key in the options file: what is known of the run beside its settings.

MOVED = "moved."                # Before the name of a setting: its file has another path and the same content.
DATA_CHANGED = "data_content"   # The data grew or were repaired.
OPTIONS_KEY = "options"         # A state keeps the settings that it was made with here, as in the options file.
STEM_KEY = "stem_generator"     # In what is known of a run: settings of its stem's generator, should the file go.
DATA_FILE = "data-files.json.gz"    # What the data consist of.
CLAIMS = 5                      # Attempts to take a run while other processes begin and end there.
FORBIDDEN = '<>:"/\\|?*'        # On some system or other, in the name of a folder.
MAX_NAME = 200                  # Bytes of a folder's name after its number; systems have 255.

# Settings that may differ between two starts of one run: reporting, saving, length, how the work is cut.
MAY_DIFFER = ("total_kimg", "kimg_per_tick", "snapshot_ticks", "metrics", "restart_every", "cudnn_benchmark", "saving",
              "batch_gpu", "data.workers", "data.path", "on_collapse", "wandb", "diagnose", "moved")
# Settings that change what is computed from here on, but not what there is: --continue-changed lets them.
MAY_CHANGE_IF_ASKED = ("batch", "precision", "feature_precision", "loss", "optim", "path_stem", "resume", "init_from",
                       "embedding", DATA_CHANGED)

# What is read of an options file, which people edit and disks damage. What was not known to older versions may be
# missing, and what settings hold is compared with the command's, whatever it is.
_GROUP = entries(plain)
_OPTIONS = record({"data": _GROUP, "generator": _GROUP}, others=plain, optional={
    "discriminator": _GROUP,
    RUN_INFO: record({}, {
        "starts": whole(), "world_size": whole(1), "data_fingerprint": nothing_or(text), "desc": nothing_or(text),
        "class_names": nothing_or(items(text)), "credit": text, "forms": entries(text), FILES: entries(entries(plain)),
        STEM_KEY: record({"generator_config": _GROUP}, {"class_names": nothing_or(items(text))}, others=plain),
    }, others=plain),
})

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
        if self.name == DATA_CHANGED and self.old == "":
            return f"data: {self.new}"
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


def run_description(parts: list[str], desc: str | None) -> str:
    """The name of a run's folder without its number.

    Args:
        parts: What the command is about.
        desc: What the user typed for --desc.

    Raises:
        UserError: it is not the name of one folder on every system.
    """
    if desc:
        strange = sorted({c for c in desc if c in FORBIDDEN or unicodedata.category(c)[0] == "C"})
        if strange:
            raise UserError(f"--desc={ascii(desc)[1:-1]}: has {ascii(strange[0])}, but it becomes part of one folder's "
                            f"name: --desc={_harmless(desc)} would do")
        if desc.strip(" .") != desc or ".." in desc:
            raise UserError(f"--desc={desc!r}: begins or ends with a space or a dot, or has two dots in a row: "
                            f"--desc={_harmless(desc)} would do")
    name = normalized_name("-".join(parts + ([desc] if desc else [])))
    too_long = len(name.encode()) - MAX_NAME
    if too_long > 0:
        what = f"--desc={desc[:20]}..." if desc else f"--data: the name {parts[-1][:20]}..."
        raise UserError(f"{what} is too long for a folder's name: leave out {too_long} bytes or more")
    return name


def _harmless(desc: str) -> str:
    kept = "".join("_" if c in FORBIDDEN or unicodedata.category(c)[0] == "C" else c for c in desc)
    return re.sub(r"\.\.+", ".", kept).strip(" .")[:40] or "mine"


def has_state(folder: Path) -> bool:
    """Whether a run can be continued."""
    return (folder / STATE_FILE).is_file() or (folder / PREVIOUS_STATE_FILE).is_file()


def read_options(folder: Path) -> dict[str, Any] | None:
    """The settings in a run's folder; None without readable ones."""
    try:
        options: dict[str, Any] = parse_json((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
        _OPTIONS(options, "")
    except (OSError, ValueError, Unfit):
        return None
    if "discriminator" in options:
        options["discriminator"] = present_names(options["discriminator"])
    return options


def recorded_options(folder: Path) -> dict[str, Any] | None:
    """The settings of a run with a state: of its options file, or, where that is missing or damaged, of its state.

    Raises:
        UserError: none of them can be read, so nobody knows what the run is.
    """
    options = read_options(folder)
    if options is not None or not has_state(folder):
        return options
    for name in (STATE_FILE, PREVIOUS_STATE_FILE):
        with contextlib.suppress(UserError, Unfit):
            options = checkpoint.load(folder / name, STATE_FORMAT, mmap=True).get(OPTIONS_KEY)
            _OPTIONS(options, "")
            return options
    raise UserError(f"{folder / OPTIONS_FILE}: missing or damaged, and the training state does not tell the settings "
                    "either: bring the file back, or, to start a new run, move that folder elsewhere or give another "
                    "--desc")


@dataclasses.dataclass(frozen=True)
class Given:
    """What a command brings along beside its settings."""

    info: dict[str, Any] = dataclasses.field(default_factory=dict)          # `run_info()` of this start.
    sources: dict[str, Source] = dataclasses.field(default_factory=dict)    # `find_sources` of its settings.
    inventory: Callable[[], Inventory] | None = None                        # Gives that of its data.


def find_run(outdir: Path, desc: str, config: TrainConfig, given: Given, continue_changed: bool = False) -> RunChoice:
    """The folder for this command below `outdir`. Nothing is created here.

    Folders are called NNNNN-<desc>. Of those whose description differs at most in processes and batch, or whose data
    have another name and the same content, the newest one with a state and with the same settings is continued, but
    for those that MAY_DIFFER; without one, the next number is taken, and the notes say what differs from the newest.

    Args:
        outdir: Where runs are.
        desc: `run_description` of this command, with '-gpus<N>-batch<N>'.
        config: Its settings.
        given: What else it brings along.
        continue_changed: Let settings of MAY_CHANGE_IF_ASKED differ, too.

    Raises:
        UserError: the run is in use by another process; `continue_changed`, but something else differs; settings of a
            run that this one may be are not readable.
    """
    found = []
    if outdir.is_dir():
        found = sorted(p for p in outdir.iterdir() if p.is_dir() and re.match(r"\d{5}-", p.name))
    allowed = MAY_DIFFER + (MAY_CHANGE_IF_ASKED if continue_changed else ())
    refused: tuple[str, ...] = ()
    for folder in reversed(found):
        is_namesake = description(folder.name) == description(desc)
        try:
            options = recorded_options(folder)
        except UserError:
            if is_namesake:
                raise
            continue
        owner = owner_of(folder)
        if options is None or not (is_namesake or _is_renamed(options, given.info)) or not (owner or has_state(folder)):
            if owner is not None and is_namesake:
                raise refusal(folder, owner)        # It has only begun.
            continue
        differing = _differing(folder, options, config, given)
        fatal = [change for change in differing if not change.belongs_to(allowed)]
        if not fatal and owner is not None:
            raise refusal(folder, owner)
        if not fatal:
            return RunChoice(folder, True, _continued(folder, differing, options.get(RUN_INFO) or {}, given.info))
        if is_namesake and continue_changed and owner is None:
            raise UserError(f"--continue-changed: {folder} cannot be continued by this command; what cannot change: "
                            f"{'; '.join(map(str, fatal))}: leave the option out to start a new run")
        if is_namesake:
            refused = refused or _refused(folder, fatal)
    number = 1 + max((int(p.name[:5]) for p in found), default=-1)
    return RunChoice(outdir / f"{number:05d}-{desc}", False, refused)


def _is_renamed(options: dict[str, Any], info: dict[str, Any]) -> bool:
    """Whether a run whose folder has another name may be the command's: the same data under another name."""
    known = options.get(RUN_INFO) or {}
    return (info.get("data_fingerprint") is not None and "desc" in known and known["desc"] == info.get("desc")
            and known.get("data_fingerprint") == info["data_fingerprint"])


def _differing(folder: Path, options: dict[str, Any], config: TrainConfig, given: Given) -> list[Change]:
    """All that differs between a run and a command. Files are compared by content."""
    records = (options.get(RUN_INFO) or {}).get(FILES) or {}
    old, new, moved = by_content(options, to_dict(config), records, given.sources)
    return [*changes(old, new), *(Change(MOVED + name, before, after) for name, before, after in moved),
            *_other_data(folder, options, config, given)]


def _other_data(folder: Path, options: dict[str, Any], config: TrainConfig, given: Given) -> list[Change]:
    """Data may move, grow or be repaired, but not become other data. Older versions knew folders by their path."""
    before, after = (options.get(RUN_INFO) or {}).get("class_names"), given.info.get("class_names")
    if before and after and not (len(before) == len(after)
                                 and Classes(before).find_all(after) == list(range(len(after)))):
        return [Change("class_names", before, after)]
    old = (options.get(RUN_INFO) or {}).get("data_fingerprint")
    new = given.info.get("data_fingerprint")
    if old is None or new is None:
        paths = options.get("data", {}).get("path"), config.data.path
        return [] if paths[0] == paths[1] else [Change("data_path", *paths)]
    if old == new:
        return []
    before = read_inventory(folder / DATA_FILE)
    if before is None or given.inventory is None:
        return [Change(DATA_CHANGED, old[:12], new[:12])]
    text, is_related = compare(before, given.inventory())
    if not text:
        return []                   # An archive of the same files as the folder, or the other way round.
    return [Change(DATA_CHANGED, "", text) if is_related else Change("data_fingerprint", old[:12], new[:12])]


def _continued(folder: Path, differing: list[Change], old: dict[str, Any], new: dict[str, Any]) -> tuple[str, ...]:
    shown = [change for change in differing if change.name != "data.path"]
    shown += [Change(name, old[name], new.get(name)) for name in ("world_size", "code", "torch", "device")
              if name in old and old[name] != new.get(name, old[name])]
    notes = [] if read_options(folder) is not None else [
        f"WARNING: {folder / OPTIONS_FILE} is missing or damaged: the settings are those in the training state"]
    return (*notes, *(f"changed since the last start: {change}" for change in shown))


def _refused(folder: Path, fatal: list[Change]) -> tuple[str, ...]:
    lines = [f"not continued: {folder}, because of other settings:", *(f"    {change}" for change in fatal)]
    if all(change.belongs_to(MAY_CHANGE_IF_ASKED) for change in fatal):
        lines.append("    --continue-changed continues it nevertheless")
    return tuple(lines)


def _known_stems(outdir: Path, desc: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """--path_stem as it was typed and settings of that stem, of each run that can go on without it, newest first."""
    for folder in sorted(outdir.iterdir(), reverse=True) if outdir.is_dir() else ():
        known = (read_options(folder) or {}).get(RUN_INFO) or {}
        typed = (known.get(FILES) or {}).get("path_stem", {}).get("typed")
        if has_state(folder) and known.get("desc") == desc and STEM_KEY in known and isinstance(typed, str):
            yield typed, known[STEM_KEY]


def known_stem(outdir: Path, desc: str | None, path_stem: str) -> dict[str, Any] | None:
    """Settings of the generator and classes of a stem that is gone, from the newest run that can go on without it.

    Args:
        outdir: Where runs are.
        desc: What the user typed for --desc.
        path_stem: What was typed for --path_stem, now and then.
    """
    return next((dict(stem) for typed, stem in _known_stems(outdir, desc) if typed == path_stem), None)


def typed_stem(outdir: Path, desc: str | None) -> str | None:
    """What was typed for --path_stem in the newest run that can go on without it; None without such a run."""
    return next((typed for typed, _ in _known_stems(outdir, desc)), None)


def claim_run(find: Callable[[], RunChoice]) -> tuple[RunChoice, RunLock]:
    """Choose a run and take it, so that what was chosen is still so.

    Args:
        find: `find_run` of this command.

    Raises:
        UserError: as `find`; another process was faster.
    """
    for _ in range(CLAIMS):
        choice = find()
        lock = RunLock(choice.folder)
        if choice.resumed == has_state(choice.folder):
            return dataclasses.replace(choice, notes=choice.notes + ((lock.note,) if lock.note else ())), lock
        lock.release()              # Another process has begun or ended there meanwhile: what it left counts.
    raise UserError(f"{choice.folder}: other processes keep beginning and ending there: start again when they are done")

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


def run_info(dataset: ImageDataset, device: str = "", desc: str | None = None) -> dict[str, Any]:
    """Code version, torch, processes, device, content of the data, classes, credit, what was typed as --desc."""
    fingerprint = dataset.fingerprint if os.path.isfile(dataset.path) else inventory_fingerprint(   # Not read whole.
        dataset.inventory(), dataset.xflip)
    return {"code": code_version(), "torch": torch.__version__, "world_size": distributed.world_size(),
            "device": device, "data_fingerprint": fingerprint, "desc": desc,
            "class_names": dataset.class_names, "credit": str(dataset.credit or "")}


def create_run(choice: RunChoice, config: TrainConfig, given: Given) -> None:
    """Make the folder and write the settings into it; count the start; the notes go into log.txt.

    Raises:
        UserError: the folder cannot be written.
    """
    folder = choice.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        old = (recorded_options(folder) or {}).get(RUN_INFO) or {}
        records = record_sources(given.sources, old.get(FILES) or {})
        keep_networks(folder, records)
        kept = {name: old[name] for name in ("forms", STEM_KEY) if name in old}
        info = kept | given.info | {"starts": int(old.get("starts", 0)) + 1, FILES: records}
        content = to_dict(config) | {RUN_INFO: info}
        if given.inventory is not None and not (
                (folder / DATA_FILE).is_file() and old.get("data_fingerprint") == info.get("data_fingerprint")):
            write_inventory(folder / DATA_FILE, given.inventory())
        atomic_write_text(folder / OPTIONS_FILE, json.dumps(content, indent=2) + "\n")
        append_text(folder / "log.txt", "".join(f"{note}\n" for note in choice.notes))
    except OSError as err:
        raise UserError(f"--outdir: cannot write to {folder} ({os.strerror(err.errno or 0)}): "
                        "name a folder that you may write to") from err


def settings_of_state(folder: Path) -> dict[str, Any]:
    """What a state holds of the settings in the options file: what must not change while it is used."""
    options = read_options(folder)
    if options is None:
        return {}
    def lasting(part: dict[str, Any], prefix: str) -> dict[str, Any]:
        return {name: lasting(value, f"{prefix}{name}.") if isinstance(value, dict) else value
                for name, value in part.items() if prefix + name not in MAY_DIFFER}
    known = {name: value for name, value in (options.get(RUN_INFO) or {}).items() if name != "starts"}
    return {OPTIONS_KEY: lasting(options, "") | {RUN_INFO: known}}


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
