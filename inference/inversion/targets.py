# SPDX-License-Identifier: Apache-2.0
"""Pictures to be inverted: which there are, and how each becomes a square of the network's size."""
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.transforms import Size, center_crop
from dnnlib import UserError
from dnnlib.util import printable
from inference.inversion.results import COMPARISON_FILE, LATENTS_FILE
from training.data.images import decode
from training.data.stores import FolderStore, read_file

LONGEST_NAME = 100              # Of the folder with the results of a picture, in characters.


class _File:
    """A single file as `read_file` takes it."""

    def __init__(self, path: Path):
        self.path = path

    def size(self, index: int) -> int:
        """Bytes of the file. Raises OSError."""
        return self.path.stat().st_size

    def read(self, index: int) -> bytes:
        """Content of the file. Raises OSError."""
        return self.path.read_bytes()


@dataclasses.dataclass(frozen=True)
class Target:
    """A picture in a file."""

    name: str               # That of its results; no other target has it.
    path: Path
    where: str              # How messages name it.

    def load(self, resolution: int) -> "Picture":
        """The central square, resized by Lanczos' filter, as officially.

        Raises:
            UserError: it cannot be read or decoded.
        """
        try:
            data = read_file(_File(self.path), 0)
        except OSError as err:
            raise UserError(f"{self.where}: cannot be read ({err.strerror or err}): name another picture") from err
        try:
            image = decode(data).image
        except ValueError as err:
            raise UserError(f"{self.where}: cannot be decoded ({err}): name another picture") from err
        square = center_crop(image, Size(resolution, resolution))
        return Picture(torch.from_numpy(np.array(square)).permute(2, 0, 1), hashlib.sha256(data).hexdigest())


class Picture(NamedTuple):
    """What a target holds."""

    pixels: torch.Tensor    # uint8 [3, R, R]
    sha256: str             # Of the file's content.

#----------------------------------------------------------------------------

def list_targets(paths: Sequence[str], option: str = "--target") -> list[Target]:
    """The pictures that are files, and those in folders, however deep.

    Raises:
        UserError: nothing is there, or no picture, or what an earlier inversion has made of some.
    """
    found: list[Target] = []
    names = {COMPARISON_FILE, LATENTS_FILE}         # What lies beside the folders of the targets.
    for path in paths:
        place = Path(path)
        if not place.exists():
            raise UserError(f"{option}={path}: no such file or folder: check the path")
        if (place / LATENTS_FILE).is_file():
            raise UserError(f"{option}={path}: is a folder of results, as it has a {LATENTS_FILE}: name that file if "
                            "this option takes latents, or else a picture in the folder")
        inside = FolderStore(place).names if place.is_dir() else [""]
        if not inside:
            raise UserError(f"{option}={path}: no pictures in this folder: name another folder, or a picture")
        for name in inside:
            where = printable(f"{option}={path}: {name}" if name else f"{option}={path}")
            found.append(Target(_unique(Path(name or place.name), names), place / name, where))
    return found


def _unique(file: Path, taken: set[str]) -> str:
    """A name for the results of a file: its own without the suffix, folders in front, and a number if it is taken."""
    whole = "-".join([*file.parts[:-1], file.stem])[-LONGEST_NAME:].strip(". ") or "picture"
    name, number = whole, 1
    while name.casefold() in taken:         # Some disks take upper and lower case for the same.
        number += 1
        name = f"{whole}-{number}"
    taken.add(name.casefold())
    return name
