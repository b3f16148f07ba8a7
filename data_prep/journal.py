# SPDX-License-Identifier: Apache-2.0
"""What a conversion has done so far, so that it can go on after it was broken off at any moment.

One line of JSON per block of images, written after the images are on the disk; a line that was cut off does not count.
The first line says which run it is: source, options and library versions must be the same to go on.
"""
import array
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dnnlib import UserError
from dnnlib.util import parse_json

FIRST_LINK = hashlib.sha256(b"stylesan-xl images").hexdigest()


@dataclasses.dataclass
class Level:
    """Progress of one size."""

    resolution: int | None = None       # None until the first image is known.
    chain: str = FIRST_LINK             # SHA-256 of the one before and the pixels of the last image.
    mark: int = 0                       # End of what is safe in the sink.
    enlarged: int = 0
    sizes: "array.array[int]" = dataclasses.field(default_factory=lambda: array.array("Q"))
    crcs: "array.array[int]" = dataclasses.field(default_factory=lambda: array.array("L"))


@dataclasses.dataclass
class Progress:
    """Progress of the whole run."""

    levels: list[Level]
    done: int = 0                       # Files of the source looked at.
    written: int = 0
    first: str = ""                     # The file that the first image came from.
    conversions: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped: list[int] = dataclasses.field(default_factory=list)                # Places in the source.
    skipped: list[tuple[int, str]] = dataclasses.field(default_factory=list)    # Places and reasons.
    shapes: list[list[int]] = dataclasses.field(default_factory=list)   # Those of the source images, where asked for.
    sealed: bool = False                # Everything is written; only names are to be given.

    def line(self, before: "Counts") -> dict[str, Any]:
        """What has been added since `before`, as one line of the journal."""
        return {
            "done": self.done, "written": self.written, "first": self.first, "conversions": self.conversions,
            "dropped": self.dropped[before.dropped:], "skipped": self.skipped[before.skipped:], "sealed": self.sealed,
            "shapes": self.shapes[before.written:],
            "levels": [{"resolution": level.resolution, "chain": level.chain, "mark": level.mark,
                        "enlarged": level.enlarged, "sizes": level.sizes[before.written:].tolist(),
                        "crcs": level.crcs[before.written:].tolist()} for level in self.levels],
        }

    def add(self, line: dict[str, Any]) -> None:
        """Take over a line of the journal."""
        self.done, self.written, self.first = line["done"], line["written"], line["first"]
        self.conversions, self.sealed = line["conversions"], line["sealed"]
        self.dropped += line["dropped"]
        self.shapes += line["shapes"]
        self.skipped += [(place, reason) for place, reason in line["skipped"]]
        for level, told in zip(self.levels, line["levels"], strict=True):
            level.resolution, level.chain, level.mark = told["resolution"], told["chain"], told["mark"]
            level.enlarged = told["enlarged"]
            level.sizes.extend(told["sizes"])
            level.crcs.extend(told["crcs"])

    def places(self) -> list[int]:
        """Places in the source that became images."""
        absent = {*self.dropped, *(place for place, _reason in self.skipped)}
        return [place for place in range(self.done) if place not in absent]

    def counts(self) -> "Counts":
        return Counts(self.written, len(self.dropped), len(self.skipped))


@dataclasses.dataclass(frozen=True)
class Counts:
    """How much of a Progress is in the journal already."""

    written: int = 0
    dropped: int = 0
    skipped: int = 0


def next_link(chain: str, digest: bytes, label: int | None) -> str:
    """The hash of all images so far, of the hash before, an image's pixel digest and its label."""
    return hashlib.sha256(f"{chain} {digest.hex()} {label}".encode()).hexdigest()


def last_link(chain: str, classes: list[str] | None) -> str:
    """The hash of a data set: of the last link and the names of the classes."""
    return hashlib.sha256(f"{chain} {json.dumps(classes)}".encode()).hexdigest()

#----------------------------------------------------------------------------

class Journal:
    """The file. It is locked while it is open: two runs cannot build the same data set at once."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self._file, self._told, self._end = path, file, Counts(), 0

    def commit(self, progress: Progress) -> None:
        """Append what has been done since the last commit. Raises OSError."""
        self._append(progress.line(self._told))
        self._told = progress.counts()

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def begin(self, key: dict[str, Any]) -> None:
        """Start anew. Raises OSError."""
        self._file.seek(0)
        self._file.truncate()
        self._append(key)

    def read(self, num_levels: int) -> tuple[dict[str, Any] | None, Progress]:
        """The key of the run that the journal belongs to, None if there is none, and how far it came."""
        progress = Progress([Level() for _ in range(num_levels)])
        self._file.seek(0)
        key, end = None, 0
        for line in self._file:
            try:
                content = parse_json(line) if line.endswith(b"\n") else None
                if key is None:
                    key = content
                elif content is not None:
                    progress.add(content)
            except (ValueError, TypeError, KeyError, OverflowError):
                break
            if content is None:
                break
            end += len(line)
        self._end, self._told = end, progress.counts()
        return key, progress

    def go_on(self) -> None:
        """Continue the run that was read, without the line that was cut off. Raises OSError."""
        self._file.truncate(self._end)

    def remove(self) -> None:
        """The run is over."""
        self.path.unlink(missing_ok=True)


def journal_path(dest: Path) -> Path:
    return dest.with_name(f".{dest.name}.journal")


@contextlib.contextmanager
def open_journal(dest: Path) -> Iterator[Journal]:
    """The journal of a data set, made if there is none. Raises OSError; UserError if another run has it."""
    path = journal_path(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:         # Windows: two runs at once are the user's care.
            pass
        except BlockingIOError as err:
            raise UserError(f"--dest={dest}: another run is making it right now: wait for it, or end it") from err
        yield Journal(path, file)
