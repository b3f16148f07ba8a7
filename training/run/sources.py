# SPDX-License-Identifier: Apache-2.0
"""Files that a run begins with: stem, start, class table, networks of the user's own.

A path is not an identity. A file is known by its SHA-256, so it may move; and once a run has a state it may be deleted:
the state holds what came from it. Of networks that training goes on to use, the run's folder keeps a copy.
"""
import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dnnlib import UserError
from dnnlib.util import atomic_file, file_sha256
from training.config import TrainConfig

FILES = "files"                 # Key of what is recorded, in what is known of a run.
NETWORKS_FOLDER = "networks"    # In the run's folder.
SNAPSHOTS = ("path_stem", "resume", "init_from")
NETWORK = re.compile(r"discriminator\.backbones\.(\d+)|loss\.cls_model")    # Settings whose file is used all the time.

Record = dict[str, Any]         # typed, file, size, mtime_ns, name, sha256

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Source:
    """A setting that names a file."""

    typed: str
    file: Path | None           # Where it is; None if it is nowhere.

    def is_same(self, old: Record) -> bool:
        """Whether it is what a run began with. Where there is nothing to read any more, the name decides."""
        if self.file is None:
            return self.typed == old.get("typed")
        if old.get("file") == os.fspath(self.file) and self._stamp() == (old.get("size"), old.get("mtime_ns")):
            return True
        return file_sha256(self.file) == old.get("sha256")

    def record(self, old: Record | None = None) -> Record:
        """What is written down of it. `old`: what was written of the same content before."""
        if self.file is None:
            return dict(old or {"typed": self.typed})
        size, mtime_ns = self._stamp()
        known = old is not None and (old.get("file"), old.get("size"), old.get("mtime_ns")) == (
            os.fspath(self.file), size, mtime_ns)
        return {"typed": self.typed, "file": os.fspath(self.file), "size": size, "mtime_ns": mtime_ns,
                "name": (old or {}).get("name", self.file.name),    # The first, after which D's tensors are called.
                "sha256": old["sha256"] if old is not None and known else file_sha256(self.file)}

    def _stamp(self) -> tuple[int, int]:
        assert self.file is not None        # Both callers have looked.
        stat = self.file.stat()
        return stat.st_size, stat.st_mtime_ns


def find_sources(config: TrainConfig, find_snapshot: Callable[[str], Path]) -> dict[str, Source]:
    """Settings that name files, by their dotted names.

    Args:
        config: Settings as typed.
        find_snapshot: The file of a snapshot that may be named by its folder; raises UserError if there is none.
    """
    found: dict[str, Source] = {}
    for name in SNAPSHOTS:
        if (typed := getattr(config, name)) is not None:
            try:
                found[name] = Source(typed, find_snapshot(typed).resolve())
            except UserError:
                found[name] = Source(typed, None)
    if Path(config.embedding).suffix:       # Files have one, the names of what is made have none.
        found["embedding"] = _plain(config.embedding)
    if config.loss.cls_weight > 0 and config.loss.cls_model.endswith(".safetensors"):
        found["loss.cls_model"] = _plain(config.loss.cls_model)
    for i, name in enumerate(config.discriminator.backbones):
        if name.endswith(".safetensors"):
            found[f"discriminator.backbones.{i}"] = _plain(name)
    return found


def _plain(typed: str) -> Source:
    path = Path(typed.removeprefix("local:"))
    return Source(typed, path.resolve() if path.is_file() else None)

#----------------------------------------------------------------------------
# Settings that name files, compared by content.

def get_setting(options: dict[str, Any], name: str) -> Any:
    """The value of a dotted name, where a number counts in a list; None where there is none."""
    value: Any = options
    for part in name.split("."):
        try:
            value = value[int(part)] if isinstance(value, list | tuple) else value[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return value


def with_setting(options: dict[str, Any], name: str, value: Any) -> dict[str, Any]:
    """A copy with another value of a dotted name."""
    def replaced(part: Any, path: list[str]) -> Any:
        if not path:
            return value
        if isinstance(part, list | tuple):
            return [replaced(item, path[1:]) if i == int(path[0]) else item for i, item in enumerate(part)]
        return part | {path[0]: replaced(part.get(path[0]), path[1:])}
    return dict(replaced(options, name.split(".")))


def by_content(old: dict[str, Any], new: dict[str, Any], records: dict[str, Record],
               sources: dict[str, Source]) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str, str]]]:
    """Settings of a run and of a command in which files are equal if their content is, and differ if that differs.

    Args:
        old, new: Settings of the run and of the command.
        records: What the run wrote down of its files.
        sources: Of the command.

    Returns:
        Both settings, and (setting, old path, new path) of files that moved.
    """
    moved = []
    for name, source in sources.items():
        record = records.get(name)
        if record is None or get_setting(old, name) is None:
            continue                # An older version wrote nothing down: the path counts.
        if source.is_same(record):
            if record.get("typed") != source.typed:
                moved.append((name, str(record.get("typed")), source.typed))
            old = with_setting(old, name, source.typed)
        else:
            old = with_setting(old, name, f"{record.get('typed')} (sha256 {str(record.get('sha256'))[:12]})")
            shown = "no such file" if source.file is None else f"sha256 {file_sha256(source.file)[:12]}"
            new = with_setting(new, name, f"{source.typed} ({shown})")
    return old, new, moved


def record_sources(sources: dict[str, Source], before: dict[str, Record]) -> dict[str, Record]:
    """What a run writes down of its files. `before`: what it wrote when it was started the last time."""
    return {name: source.record(before.get(name)) for name, source in sources.items()}

#----------------------------------------------------------------------------
# Copies.

def _copy_of(folder: Path, record: Record) -> Path:
    return folder / NETWORKS_FOLDER / str(record["sha256"])[:16] / str(record["name"])


def keep_networks(folder: Path, records: dict[str, Record]) -> None:
    """Keep networks that are used all the time in the run's folder."""
    for name, record in records.items():
        if NETWORK.fullmatch(name) and "sha256" in record and Path(record["file"]).is_file():
            copy = _copy_of(folder, record)
            if not copy.is_file():
                with atomic_file(copy) as f:        # No link: a file may be written over in place.
                    f.write(Path(record["file"]).read_bytes())


def with_kept_networks(config: TrainConfig, folder: Path, records: dict[str, Record],
                       sources: dict[str, Source]) -> TrainConfig:
    """Settings for a run that goes on: networks that are gone, or are called otherwise, are those in its folder."""
    backbones, cls_model = list(config.discriminator.backbones), config.loss.cls_model
    for name, source in sources.items():
        match, record = NETWORK.fullmatch(name), records.get(name)
        if match is None or record is None or not {"name", "sha256"} <= set(record):
            continue
        copy = _copy_of(folder, record)
        if copy.is_file() and (source.file is None or source.file.name != record["name"]):
            if match[1] is None:
                cls_model = os.fspath(copy)
            else:
                backbones[int(match[1])] = os.fspath(copy)
    return dataclasses.replace(
        config, discriminator=dataclasses.replace(config.discriminator, backbones=tuple(backbones)),
        loss=dataclasses.replace(config.loss, cls_model=cls_model))
