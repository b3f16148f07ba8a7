# SPDX-License-Identifier: Apache-2.0
"""Images in tar archives: one tar of folders, ImageNet's tar of tars, or the shards of a WebDataset."""
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.tars import Member, OpenTar, is_tar_name
from dnnlib import UserError
from dnnlib.util import list_some
from training.data.labels import METADATA_NAME, is_image_name, parse_metadata

MAX_SIDE_FILE = 1 << 20             # Of a .cls or .json beside an image.
MAX_METADATA = 1 << 30
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index", "class_name")
WNID = re.compile(r"n\d{8}")


class TarStore:
    """The images in one or more tar archives, sorted by archive and name. Only one archive is open at a time."""

    def __init__(self, path: str | os.PathLike[str], tars: Sequence[Path]):
        self.path, self._tars = Path(path), list(tars)
        self.metadata: dict[str, Any] = {}
        self.web_labels: dict[str, Any] = {}            # Image name -> value of its .cls or .json.
        self._open: tuple[int, OpenTar] | None = None
        found: dict[str, tuple[int, int, int]] = {}
        try:
            for number in range(len(self._tars)):
                self._index(number, found)
        finally:
            self.close()
        self.names = sorted(found)
        self._entries = np.array([found[name] for name in self.names], dtype=np.int64).reshape(-1, 3)

    def _prefix(self, tar: Path) -> str:
        """What comes before the names of an archive: class archives stand for folders, shards keep names apart."""
        stem = tar.name.split(".tar")[0]
        return f"{stem}/" if len(self._tars) > 1 or WNID.fullmatch(stem) else ""

    def _index(self, number: int, found: dict[str, tuple[int, int, int]]) -> None:
        """Add the images of one archive, and the labels that lie beside them."""
        tar, prefix = self._tar(number), self._prefix(self._tars[number])
        side: dict[str, list[Member]] = {}
        images: list[str] = []
        for member in tar.members():
            name = prefix + member.name
            if name.endswith((".cls", ".json")):
                side.setdefault(_key(name), []).append(member)
            if not is_image_name(name):
                continue
            if name in found:
                raise UserError(f"{self._tars[number]}: holds {member.name} twice: make the archive again")
            found[name] = (number, member.offset, member.size)
            images.append(name)
        for member in side.pop(_key(prefix + METADATA_NAME), []):
            if member.name == METADATA_NAME and len(self._tars) == 1 and member.size <= MAX_METADATA:
                self.metadata = parse_metadata(f"{self.path}: {METADATA_NAME}", self._read(tar, member))
        values: dict[str, Any] = {}
        for name in images:
            key = _key(name)
            if key in side:
                values[key] = self._side_value(tar, side.pop(key))
            if values.get(key) is not None:
                self.web_labels[name] = values[key]

    def _side_value(self, tar: OpenTar, members: list[Member]) -> Any:
        """The label in the files beside an image, or None."""
        for member in sorted(members, key=lambda m: m.name):
            if member.size > MAX_SIDE_FILE:
                continue
            data = self._read(tar, member)
            if member.name.endswith(".cls"):
                return data.decode("utf-8", "replace").strip()
            try:
                content = json.loads(data)
            except (ValueError, RecursionError) as err:
                raise UserError(f"{tar.path}: {member.name}: not valid JSON ({err}): make the archive again") from err
            values = [content[key] for key in LABEL_KEYS if key in content] if isinstance(content, dict) else [content]
            if values:
                return values[0]
        return None

    def _read(self, tar: OpenTar, member: Member) -> bytes:
        try:
            return tar.read(member)
        except OSError as err:
            raise UserError(f"{tar.path}: {member.name}: {err.strerror or err}") from err

    def _tar(self, number: int) -> OpenTar:
        if self._open is None or self._open[0] != number:
            self.close()
            self._open = (number, OpenTar(self._tars[number]))
        return self._open[1]

    def inner_names(self) -> list[str]:
        """Names as they say classes: without the names of shards, but with those of class archives."""
        if len(self._tars) == 1 or all(WNID.fullmatch(t.name.split(".tar")[0]) for t in self._tars):
            return list(self.names)
        return [name.partition("/")[2] for name in self.names]

    def where(self, index: int) -> str:
        tar = self._tars[int(self._entries[index, 0])]
        return f"{tar}: {self.names[index].removeprefix(self._prefix(tar))}"

    def size(self, index: int) -> int:
        return int(self._entries[index, 2])

    def read(self, index: int) -> bytes:
        number, offset, size = self._entries[index].tolist()
        return self._tar(number).read(Member(self.names[index], offset, size))

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __del__(self) -> None:
        if getattr(self, "_open", None) is not None:
            self.close()


def _key(name: str) -> str:
    """What the files of one WebDataset sample have in common: the path up to the first dot of the file name."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".")[0]


def web_values(store: TarStore) -> list[Any] | None:
    """The label value beside every image, None where there is none; None if no image has any."""
    return [store.web_labels.get(name) for name in store.names] if store.web_labels else None


def tar_paths(path: Path) -> list[Path]:
    """The tar archives in a folder that holds no images of its own; [] if it is no such folder."""
    with os.scandir(path) as entries:
        files = sorted(entry.name for entry in entries if entry.is_file())
    if any(is_image_name(name) for name in files):
        return []
    return [path / name for name in files if is_tar_name(name) and not name.startswith(".")]


def _braces(pattern: str) -> Iterator[str]:
    """'a-{000..002}.tar' -> a-000.tar, a-001.tar, a-002.tar, as WebDataset writes shards."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _braces(pattern[:match.start()] + str(number).zfill(len(match[1])) + pattern[match.end():])


def is_pattern(source: str) -> bool:
    """Whether --source names several files: by wildcards or by a range in braces."""
    return not os.path.exists(source) and bool(re.search(r"[*?]|\{\d+\.\.\d+\}", source))


def matching(source: str) -> list[Path]:
    """The files that a pattern names. Raises UserError if one is missing or there are none."""
    if "{" in source:
        paths = [Path(p) for p in _braces(source)]
        missing = [str(p) for p in paths if not p.is_file()]
        if missing:
            raise UserError(f"--source={source}: {len(missing)} of {len(paths)} files are missing: "
                            f"{list_some(missing)}")
        return paths
    paths = [Path(p) for p in sorted(glob.glob(source)) if os.path.isfile(p)]
    if not paths:
        raise UserError(f"--source={source}: no file fits the pattern: check the path")
    return paths
