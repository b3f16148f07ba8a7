# SPDX-License-Identifier: Apache-2.0
"""Images of a set as files: one for each image, one array file for all, or one picture that shows them."""
import dataclasses
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw

from dnnlib import UserError
from dnnlib.classes import Classes, are_names, whole_number
from dnnlib.util import atomic_file, format_bytes, normalized_name
from inference.samples import Samples
from torch_utils.images import save_image
from training.data.splits import find_splits

SHEET_CELL = 64             # Smaller images are enlarged to about this many pixels.
SHEET_PIXELS = 1 << 26      # Pictures have no more: Pillow warns of those a third larger, and readers here refuse them.
NAME_WIDTH = 96             # Room for class names, in pixels.
NAME_LENGTH = 14            # So many letters fit.

#----------------------------------------------------------------------------
# Single files.

def folder_names(class_names: Sequence[str] | None, c_dim: int) -> list[str]:
    """Folders of the classes: their names, or for all of them their numbers if one of the names is no good for that.

    A name is no good if some system cannot have it, if it hides the folder, if it differs from another one in upper
    and lower case only, or if readers of data sets would take the folders for splits such as train and test.
    """
    numbers = [str(i) for i in range(c_dim)]
    if not class_names or not are_names(list(class_names)):
        return numbers
    names = [normalized_name(name) for name in class_names]
    usable = all(re.fullmatch(r"[^./\\:*?\"<>|][^/\\:*?\"<>|]*", name) and name.isprintable()
                 and name == name.strip(" .") and len(os.fsencode(name)) <= 200 for name in names)
    distinct = len({name.casefold() for name in names}) == len(names)
    are_splits = find_splits([f"{name}/0.png" for name in names]) is not None and len(names) > 1
    return names if usable and distinct and not are_splits else numbers


def write_folder(outdir: str | os.PathLike[str], samples: Samples, images: Iterable[np.ndarray],
                 folders: Sequence[str] | None = None, prefix: str = "seed") -> None:
    """A file seed<NNNN>.png for each image.

    Args:
        outdir: The folder.
        samples: What the images are.
        images: uint8 [R, R, 3], one after the other.
        folders: The folder of each class inside of `outdir`; None: all images lie in `outdir`.
        prefix: What stands for "seed" where images have none.
    """
    for seed, label, image in zip(samples.seeds, samples.labels, images, strict=True):
        folder = Path(outdir) if folders is None else Path(outdir, folders[label])
        save_image(folder / f"{prefix}{seed:04d}.png", image)

#----------------------------------------------------------------------------
# One array file.

def class_numbers(class_names: Sequence[str] | None, c_dim: int) -> list[int]:
    """What stands for the classes in an array of labels: their numbers where numbers are their names, else indices."""
    classes = Classes(class_names, c_dim)
    found = [whole_number(name) for name in classes.names] if classes.are_numbers else [*range(c_dim)]
    return [number for number in found if number is not None]


def write_npz(path: str | os.PathLike[str], samples: Samples, images: Iterable[np.ndarray], resolution: int,
              numbers: Sequence[int] = ()) -> None:
    """All images in one .npz as ADM writes it: arr_0, uint8 [N, R, R, 3], and arr_1, the labels, int64 [N].

    Images go to the file as they come, so that they need no memory. The file appears when it is whole. It says nothing
    of the time, so the same images make the same file.

    Args:
        path: The file.
        samples: What the images are.
        images: uint8 [R, R, 3], one after the other.
        resolution: R.
        numbers: What stands for each class in arr_1; empty: there are no classes, and no arr_1.

    Raises:
        UserError: there is not enough room on the disk.
    """
    with atomic_file(path) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
        size, free = len(samples) * resolution ** 2 * 3, shutil.disk_usage(Path(path).parent).free
        if size > free:
            raise UserError(f"{path}: {len(samples)} images of {resolution} pixels take {format_bytes(size)}, and "
                            f"{format_bytes(free)} are free there: make room, give fewer --seeds, or name another "
                            "place")
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as stream:
            np.lib.format.write_array_header_1_0(stream, {
                "descr": "|u1", "fortran_order": False, "shape": (len(samples), resolution, resolution, 3)})
            for image, _ in zip(images, samples.seeds, strict=True):
                stream.write(np.ascontiguousarray(image).data)
        if numbers:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as stream:
                labels = np.array([numbers[label] for label in samples.labels], dtype=np.int64)
                np.lib.format.write_array(stream, labels)

#----------------------------------------------------------------------------
# Pictures.

@dataclasses.dataclass(frozen=True)
class Sheet:
    """A picture of many images: groups of equal size, each in one row, and one or more of them in a row.

    A grid without names is a sheet whose groups are its rows.
    """

    resolution: int                 # Of the images.
    per_group: int                  # Images in a group, side by side.
    groups: int
    groups_per_row: int = 1
    names: Sequence[str] = ()       # Of the groups, on the left of each; none: there is no room for names.

    @property
    def zoom(self) -> int:
        """Pixels become squares of so many pixels."""
        return max(round(SHEET_CELL / self.resolution), 1)

    @property
    def cell(self) -> int:
        """Pixels from one image to the next."""
        return self.resolution * self.zoom

    @property
    def rows(self) -> int:
        return -(-self.groups // self.groups_per_row)

    @property
    def columns(self) -> int:
        return min(self.groups_per_row, self.groups)

    @property
    def left(self) -> int:
        """Room for the name of a group, in pixels."""
        return NAME_WIDTH if self.names else 0

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the picture."""
        return self.columns * (self.left + self.per_group * self.cell), self.rows * self.cell

    @property
    def is_too_large(self) -> bool:
        """Whether it has more pixels than a picture should."""
        return math.prod(self.size) > SHEET_PIXELS

    @property
    def most_per_group(self) -> int:
        """How many images each group may have at most; none if there are too many groups."""
        return max((SHEET_PIXELS // (self.columns * self.size[1]) - self.left) // self.cell, 0)

    def draw(self, images: Iterable[np.ndarray]) -> PIL.Image.Image:
        """The picture of images uint8 [R, R, 3] that come group by group; places without images stay white."""
        picture = PIL.Image.new("RGB", self.size, "white")
        width = self.size[0] // self.columns            # Of a group.
        draw = PIL.ImageDraw.Draw(picture)
        for group, name in enumerate(self.names):
            row, column = divmod(group, self.groups_per_row)
            draw.text((column * width + 6, row * self.cell + self.cell // 2 - 6), name[:NAME_LENGTH], fill="black")
        for place, image in zip(self._places(width), images, strict=False):
            tile = PIL.Image.fromarray(image).resize((self.cell, self.cell), PIL.Image.Resampling.NEAREST)
            picture.paste(tile, place)
        return picture

    def _places(self, width: int) -> Iterator[tuple[int, int]]:
        """Corners of the images."""
        for group in range(self.groups):
            row, column = divmod(group, self.groups_per_row)
            for i in range(self.per_group):
                yield column * width + self.left + i * self.cell, row * self.cell


def write_sheet(path: str | os.PathLike[str], sheet: Sheet, images: Iterable[np.ndarray]) -> None:
    """Draw a sheet to a file, which is PNG whatever its name says. That it can be written shows before images are made.

    Args:
        path: The file.
        sheet: The form of the picture.
        images: uint8 [R, R, 3], group by group.
    """
    with atomic_file(path) as f:
        sheet.draw(images).save(f, format="PNG")
