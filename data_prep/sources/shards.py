# SPDX-License-Identifier: Apache-2.0
"""Images in tar archives: one tar of folders, ImageNet's tar of tars, or the shards of a WebDataset."""
import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.base import NoMetadata, printable
from data_prep.sources.tars import Member, OpenTar
from dnnlib import UserError
from dnnlib.util import list_some, parse_json
from training.data.labels import METADATA_NAME, is_image_name, parse_metadata
from training.data.wrapping import metadata_folder, put_in_folder

MAX_SIDE_FILE = 1 << 20             # A .cls or .json beside an image is not larger.
MAX_METADATA = 1 << 30
LABEL_KEYS = ("label", "cls", "class", "class_id", "class_index", "class_name")
MAX_SHARDS = 1_000_000
RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}", re.ASCII)
WNID = re.compile(r"n\d{8}")


def folder_names(path: Path, files: Sequence[Path]) -> list[str]:
    """What stands for each file in the names of its images: its name, with its folder where names come twice."""
    stems = [file.name.partition(".tar")[0].removesuffix(".parquet") for file in files]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{file.parent.name}_{stem}" for file, stem in zip(files, stems, strict=True)]


class TarStore(NoMetadata):
    """The images in one or more tar archives, sorted by archive and name. Only one archive is open at a time.

    It can be pickled, and used after a fork.
    """

    def __init__(self, path: str | os.PathLike[str], tars: Sequence[Path], first: OpenTar | None = None):
        """Args:
            path: For messages.
            tars: The archives.
            first: The first of them, if it is open already; it is closed with this store.
        """
        self.path, self._tars = Path(path), list(tars)
        self._folders = folder_names(self.path, self._tars)
        self._metadata: dict[str, Any] = {}
        self.web_labels: dict[str, Any] = {}            # Image name -> value of its .cls or .json.
        self._open: tuple[int, OpenTar] | None = None if first is None else (0, first)
        found: dict[str, tuple[int, int, int]] = {}
        try:
            for number in range(len(self._tars)):
                self._index(number, found)
        except BaseException:
            self.close()
            raise
        if len(self._tars) > 1:
            self.close()
        self.names = sorted(found)
        self._entries = np.array([found[name] for name in self.names], dtype=np.int64).reshape(-1, 3)

    @property
    def metadata(self) -> dict[str, Any]:
        """The content of the dataset.json of a single archive."""
        return self._metadata

    def _prefix(self, number: int) -> str:
        """What comes before the names of an archive: class archives stand for folders, shards keep names apart."""
        stem = self._folders[number]
        return f"{stem}/" if len(self._tars) > 1 or WNID.fullmatch(stem) else ""

    def _index(self, number: int, found: dict[str, tuple[int, int, int]]) -> None:
        """Add the images of one archive, and the labels that lie beside them."""
        tar, prefix = self._tar(number), self._prefix(number)
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
        if len(self._tars) == 1:
            self._take_metadata(tar, side, [name.removeprefix(prefix) for name in sorted(images)], prefix)
        values: dict[str, Any] = {}
        for name in images:
            key = _key(name)
            if key in side:
                values[key] = self._side_value(tar, side.pop(key))
            if values.get(key) is not None:
                self.web_labels[name] = values[key]

    def _take_metadata(self, tar: OpenTar, side: dict[str, list[Member]], names: list[str], prefix: str) -> None:
        """The dataset.json of the archive, taken out of the files beside images."""
        found = {member.name: member for members in side.values() for member in members
                 if member.name.endswith(METADATA_NAME)}
        folder = metadata_folder(self.path, found, names)
        if folder is None:
            return
        member = found[folder + METADATA_NAME]
        side.pop(_key(prefix + member.name))
        if member.size > MAX_METADATA:
            raise UserError(f"{self.path}: {member.name}: of {member.size} bytes, which no labels need: make it again")
        self._metadata = put_in_folder(parse_metadata(f"{self.path}: {METADATA_NAME}", self._read(tar, member)),
                                       prefix + folder)

    def _side_value(self, tar: OpenTar, members: list[Member]) -> Any:
        """The label in the files beside an image, or None."""
        for member in sorted(members, key=lambda m: m.name):
            if member.size > MAX_SIDE_FILE:
                continue
            data = self._read(tar, member)
            if member.name.endswith(".cls"):
                return data.decode("utf-8", "replace").strip()
            try:
                content = parse_json(data)
            except ValueError as err:
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

    def first_tar(self) -> OpenTar:
        """The first archive, open."""
        return self._tar(0)

    def inner_names(self) -> list[str]:
        """Names as they say classes: without the names of shards, but with those of class archives."""
        if len(self._tars) == 1 or all(WNID.fullmatch(folder) for folder in self._folders):
            return list(self.names)
        return [name.partition("/")[2] for name in self.names]

    def where(self, index: int) -> str:
        number = int(self._entries[index, 0])
        return f"{self._tars[number]}: {printable(self.names[index].removeprefix(self._prefix(number)))}"

    def size(self, index: int) -> int:
        return int(self._entries[index, 2])

    def read(self, index: int) -> bytes:
        number, offset, size = self._entries[index].tolist()
        return self._tar(number).read(Member(self.names[index], offset, size))

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": None}

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


def _count(pattern: str) -> int:
    """How many names `_braces` gives. Raises UserError if a range runs backwards."""
    total = 1
    for first, last in RANGE.findall(pattern):
        if int(first) > int(last):
            raise UserError(f"{pattern}: the range {{{first}..{last}}} runs backwards: begin with the smaller number")
        total *= int(last) - int(first) + 1
    return total


def _braces(pattern: str) -> Iterator[str]:
    """'a-{000..002}.tar' -> a-000.tar, a-001.tar, a-002.tar, as WebDataset writes shards."""
    match = RANGE.search(pattern)
    if match is None:
        yield pattern
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _braces(pattern[:match.start()] + str(number).zfill(len(match[1])) + pattern[match.end():])


def is_pattern(source: str) -> bool:
    """Whether --source names several files: by wildcards or by a range in braces."""
    return not os.path.exists(source) and bool(re.search(rf"[*?]|{RANGE.pattern}", source))


def matching(source: str) -> list[Path]:
    """The files that a pattern names. Raises UserError if one is missing, there are none, or they are too many."""
    if RANGE.search(source):
        if (count := _count(source)) > MAX_SHARDS:
            raise UserError(f"{source}: names {count} files, and at most {MAX_SHARDS} are taken: correct the range")
        paths = [Path(p) for p in _braces(source)]
        missing = [str(p) for p in paths if not p.is_file()]
        if missing:
            raise UserError(f"{source}: {len(missing)} of {len(paths)} files are missing: "
                            f"{list_some(missing)}")
        return paths
    paths = [Path(p) for p in sorted(glob.glob(source)) if os.path.isfile(p)]
    if not paths:
        raise UserError(f"{source}: no file fits the pattern: check the path")
    return paths
