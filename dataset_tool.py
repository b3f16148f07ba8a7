# SPDX-License-Identifier: Apache-2.0
"""Make a data set for training from a folder, a zip archive, ImageNet or scikit-learn's digits."""
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import click
import numpy as np
import PIL.Image
import tqdm

import dnnlib.cli
from dnnlib import UserError
from dnnlib.util import atomic_file, atomic_write_text, list_some
from training.image_sources import (
    METADATA_NAME,
    Fit,
    FolderStore,
    Outcome,
    ZipStore,
    class_list,
    convert,
    encode_png,
    label_table,
    labels_of,
    open_store,
)

MIN_RESOLUTION = 4
BLOCK_PER_WORKER = 64       # Images handed to a worker process at a time.
IMAGENET_FOLDERS = ("ILSVRC/Data/CLS-LOC/train/", "Data/CLS-LOC/train/", "train/", "")

#----------------------------------------------------------------------------
# Where images come from.

class ImageStore(Protocol):
    """Files by index, as in training.image_sources."""

    path: Path
    names: list[str]

    def where(self, index: int) -> str: ...
    def read(self, index: int) -> bytes: ...
    def close(self) -> None: ...


class DigitsStore:
    """The 1,797 handwritten digits of 8x8 pixels and 17 grays that come with scikit-learn."""

    def __init__(self):
        try:
            from sklearn.datasets import load_digits
        except ImportError as err:
            raise UserError("--source=sklearn:digits needs scikit-learn: pip install scikit-learn") from err
        digits = load_digits()
        self.path = Path("sklearn:digits")
        self.names = [f"{i:04d}.png" for i in range(len(digits.images))]
        self.labels: list[int] = digits.target.tolist()
        self._images = np.rint(digits.images * (255 / 16)).astype(np.uint8)

    def where(self, index: int) -> str:
        return f"{self.path}: {self.names[index]}"

    def read(self, index: int) -> bytes:
        return encode_png(PIL.Image.fromarray(self._images[index]))

    def close(self) -> None:
        """Nothing is held open."""


@dataclasses.dataclass(frozen=True)
class Source:
    """The images to convert."""

    store: ImageStore
    indices: list[int]                      # Which of store.names, in order.
    labels: list[int] | None = None         # For each of them.
    classes: list[str] | None = None
    layout: str = "images"                  # How the labels were found; goes to the report.
    drop_grayscale: bool = False            # As the official ImageNet set does.


def open_source(path: str, use_labels: bool = True) -> Source:
    """List the images and labels of a folder, an archive or 'sklearn:digits'.

    Labels come from dataset.json, else from ImageNet's layout, else from sub-folders.

    Raises:
        UserError: nothing usable is there, or only some images have labels.
    """
    if path.startswith("sklearn:"):
        if path != "sklearn:digits":
            raise UserError(f"--source={path}: unknown: choose sklearn:digits, a folder or a zip archive")
        digits = DigitsStore()
        return Source(digits, list(range(len(digits.names))), digits.labels if use_labels else None,
                      [str(i) for i in range(10)] if use_labels else None, "digits")
    store = open_store(path)
    indices = list(range(len(store.names)))
    if store.metadata:
        table = label_table(store) if use_labels else None
        labels = None if table is None else labels_of(store, table).tolist()
        return Source(store, indices, labels, None if labels is None else class_list(store), METADATA_NAME)
    prefix = imagenet_prefix(store.names)
    if prefix is not None:
        indices = [i for i in indices if store.names[i].startswith(prefix)]
    labels, classes = folder_labels(store, indices, prefix or "") if use_labels else (None, None)
    layout = "imagenet" if prefix is not None else "images" if labels is None else "folders"
    return Source(store, indices, labels, classes, layout, drop_grayscale=prefix is not None)


def imagenet_prefix(names: list[str]) -> str | None:
    """The leading folders of ImageNet's training images ('n01440764/x.JPEG'), or None if this is not ImageNet."""
    for prefix in IMAGENET_FOLDERS:
        inside = [name for name in names if name.startswith(prefix)]
        if inside and all(re.match(r"n\d{8}/", name[len(prefix):]) for name in inside):
            return prefix
    return None


def folder_labels(store: FolderStore | ZipStore, indices: list[int],
                  prefix: str) -> tuple[list[int] | None, list[str] | None]:
    """Labels by sub-folder: the sorted folder names are the classes.

    A folder that wraps everything else does not count. No labels when there are no sub-folders or when they are
    those of the official format, which only keep folders small.
    """
    names = [store.names[i][len(prefix):] for i in indices]
    if all(re.fullmatch(r"\d{5}/img\d{8}\.\w+", name) for name in names):
        return None, None
    parts = [name.split("/") for name in names]
    while len({p[0] for p in parts}) == 1 and min(len(p) for p in parts) > 2:
        parts = [p[1:] for p in parts]
    loose = [name for name, p in zip(names, parts, strict=True) if len(p) == 1]
    if len(loose) == len(names):
        return None, None
    if loose:
        raise UserError(f"{store.path}: sub-folders are classes, but {len(loose)} of {len(names)} images are in none: "
                        f"{list_some(loose)}: move them into one, or add --no-labels")
    classes = sorted({p[0] for p in parts})
    index = {name: i for i, name in enumerate(classes)}
    return [index[p[0]] for p in parts], classes

#----------------------------------------------------------------------------
# Converting them.

def _read(store: ImageStore, index: int) -> bytes | str:
    try:
        return store.read(index)
    except OSError as err:
        return err.strerror or str(err)


def outcomes(source: Source, fit: Fit, workers: int) -> Iterator[Outcome]:
    """One outcome per image, in order; the same for any number of worker processes."""
    store = source.store
    if workers == 1:
        for index in source.indices:
            yield convert(fit, store.where(index), _read(store, index))
        return
    # Files are read here and only decoded there. One block is being decoded while the one before it is written.
    size = BLOCK_PER_WORKER * workers
    executor = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        pending: Iterable[Outcome] = ()
        for start in range(0, len(source.indices), size):
            block = source.indices[start:start + size]
            following = executor.map(functools.partial(convert, fit), [store.where(i) for i in block],
                                     [_read(store, i) for i in block], chunksize=8)
            yield from pending
            pending = following
        yield from pending
    finally:
        executor.shutdown(cancel_futures=True)

#----------------------------------------------------------------------------
# Where they go. Both writers show nothing under the final name before everything is written.

class ZipWriter:
    """Writes members of an archive: not compressed, and with one date, so that equal images make equal archives."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive

    def write(self, name: str, data: bytes) -> None:
        info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
        info.create_system = 3
        info.external_attr = 0o644 << 16
        self.archive.writestr(info, data)


class FolderWriter:
    """Writes files below a folder."""

    def __init__(self, root: Path):
        self.root = root

    def write(self, name: str, data: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


@contextlib.contextmanager
def open_dest(dest: Path) -> Iterator[ZipWriter | FolderWriter]:
    """A writer for a new archive or folder; it takes the place of an old one when the block ends without an error."""
    if is_archive(dest):
        with atomic_file(dest) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
            yield ZipWriter(archive)
        return
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.", suffix=".tmp") as temp:
        new, old = Path(temp) / "new", Path(temp) / "old"
        new.mkdir()
        yield FolderWriter(new)
        if dest.exists():
            os.rename(dest, old)
        os.rename(new, dest)


def is_archive(dest: Path) -> bool:
    return dest.suffix.lower() == ".zip"


def check_dest(source: str, dest: Path, overwrite: bool) -> None:
    """Refuse a destination that would do harm. Raises UserError."""
    origin, target = Path(source).resolve(), dest.resolve()
    if target == origin or target in origin.parents:
        raise UserError(f"--dest={dest}: would replace --source={source}: choose another place")
    if dest.suffix.lower() in (".tar", ".gz", ".tgz", ".7z", ".rar", ".npz", ".json"):
        raise UserError(f"--dest={dest}: name a .zip archive or a folder")
    if not dest.exists() or (dest.is_dir() and not is_archive(dest) and not any(dest.iterdir())):
        return
    if dest.is_dir() == is_archive(dest):
        raise UserError(f"--dest={dest}: is a {'folder' if dest.is_dir() else 'file'}: choose another name")
    if not overwrite:
        raise UserError(f"--dest={dest}: exists already: choose another name or add --overwrite")
    if dest.is_dir() and not (dest / METADATA_NAME).is_file():
        raise UserError(f"--dest={dest}: is not a data set (it has no {METADATA_NAME}), so --overwrite leaves it "
                        f"alone: choose another name")

#----------------------------------------------------------------------------
# The whole data set.

@dataclasses.dataclass
class Report:
    """What became of the source; saved as '<dest>.report.json'."""

    source: str
    dest: str
    layout: str
    transform: str | None
    resolution: int | None = None
    num_images: int = 0
    num_classes: int = 0
    dropped_grayscale: int = 0
    conversions: dict[str, int] = dataclasses.field(default_factory=dict)       # What was done, to how many images.
    empty_classes: list[str] = dataclasses.field(default_factory=list)
    skipped: list[dict[str, str]] = dataclasses.field(default_factory=list)     # {"file": ..., "reason": ...}


def make_dataset(
    source: str,                        # Folder, archive or 'sklearn:digits'.
    dest: str | os.PathLike,            # Archive (.zip) or folder.
    resolution: int | None = None,      # Width and height; None keeps them.
    transform: str | None = None,       # 'center-crop' or None.
    max_images: int | None = None,      # Stop after this many images.
    strict: bool = False,               # Stop at the first unreadable file.
    overwrite: bool = False,            # Replace `dest`.
    use_labels: bool = True,            # Write labels if there are any.
    workers: int = 1,                   # Processes; the result does not depend on it.
) -> Report:
    """Convert a source into the official format; returns the report, which is saved beside `dest`.

    Raises:
        UserError: the source cannot be used, `dest` cannot be written, or an image does not fit the options.
    """
    dest = Path(dest)
    check_resolution(resolution, transform)
    check_dest(source, dest, overwrite)
    origin = open_source(source, use_labels)
    report = Report(source, str(dest), origin.layout, transform, resolution)
    fit = Fit(resolution, transform == "center-crop", origin.drop_grayscale)
    try:
        with open_dest(dest) as writer, contextlib.closing(origin.store):
            labels = write_images(origin, fit, writer, report, max_images, strict, workers)
            writer.write(METADATA_NAME, json.dumps(metadata_of(labels, origin.classes)).encode())
            count_classes(report, labels, origin.classes)
        atomic_write_text(report_path(dest), json.dumps(dataclasses.asdict(report), indent=1))
    except OSError as err:
        raise UserError(f"--dest={dest}: cannot be written ({err.strerror or err}): choose another place") from err
    return report


def check_resolution(resolution: int | None, transform: str | None) -> None:
    """Refuse sizes that training cannot use. Raises UserError."""
    if resolution is None:
        if transform is not None:
            raise UserError(f"--transform={transform}: needs a size: add --resolution=N")
    elif not is_usable(resolution):
        raise UserError(f"--resolution={resolution}: must be a power of two such as {nearest_usable(resolution)}")


def is_usable(resolution: int) -> bool:
    return resolution >= MIN_RESOLUTION and resolution & (resolution - 1) == 0


def nearest_usable(resolution: int) -> int:
    """The next smaller power of two that is large enough."""
    return max(1 << (resolution.bit_length() - 1), MIN_RESOLUTION)


def write_images(source: Source, fit: Fit, writer: ZipWriter | FolderWriter, report: Report,
                 max_images: int | None, strict: bool, workers: int) -> list[tuple[str, int | None]]:
    """Convert and write; fills the report. Returns (name, label) of the written images."""
    written: list[tuple[str, int | None]] = []
    first = ""
    labels = source.labels or [None] * len(source.indices)
    with contextlib.closing(outcomes(source, fit, workers)) as steps:
        progress = tqdm.tqdm(steps, total=len(source.indices), unit="images", disable=None)
        for index, label, outcome in zip(source.indices, labels, progress, strict=True):
            where = source.store.where(index)
            if outcome.png is None:
                note_missing(report, where, outcome, strict)
                continue
            if not written:
                first, report.resolution = where, outcome.size[0]
                check_first(where, outcome.size[0])
            elif outcome.size[0] != report.resolution:
                raise UserError(f"{where}: {outcome.size[0]}x{outcome.size[1]} pixels, but {first} has "
                                f"{report.resolution}x{report.resolution}: add --resolution=N to resize square images, "
                                f"and --transform=center-crop for others")
            name = f"{len(written) // 1000:05d}/img{len(written):08d}.png"
            writer.write(name, outcome.png)
            written.append((name, label))
            for note in outcome.notes:
                report.conversions[note] = report.conversions.get(note, 0) + 1
            if len(written) == max_images:
                break
    if not written:
        reasons = [f"{s['file']} ({s['reason']})" for s in report.skipped]
        raise UserError(f"--source={report.source}: no image could be converted: "
                        f"{list_some(reasons) or 'all are grayscale'}: nothing was written")
    report.num_images = len(written)
    return written


def note_missing(report: Report, where: str, outcome: Outcome, strict: bool) -> None:
    """Count or list a file that gave no image. Raises UserError if that is not allowed."""
    if outcome.dropped:
        report.dropped_grayscale += 1
        return
    if strict:
        raise UserError(f"{where}: cannot be converted ({outcome.reason}): mend or remove it, or leave out --strict")
    report.skipped.append({"file": where, "reason": outcome.reason})


def check_first(where: str, resolution: int) -> None:
    """The size of the first image is that of the data set. Raises UserError."""
    if not is_usable(resolution):
        raise UserError(f"{where}: {resolution}x{resolution} pixels, but the size must be a power of two: "
                        f"add --resolution={nearest_usable(resolution)}")


def metadata_of(written: list[tuple[str, int | None]], classes: list[str] | None) -> dict[str, Any]:
    """The content of dataset.json."""
    if written[0][1] is None:
        return {"labels": None}
    labels = {"labels": [[name, label] for name, label in written]}
    return labels if classes is None else {**labels, "classes": classes}


def count_classes(report: Report, written: list[tuple[str, int | None]], classes: list[str] | None) -> None:
    """Fill the report's numbers about classes."""
    used = {label for _name, label in written if label is not None}
    if used:
        names = classes or [str(i) for i in range(max(used) + 1)]
        report.num_classes = len(names)
        report.empty_classes = [name for i, name in enumerate(names) if i not in used]


def report_path(dest: Path) -> Path:
    return dest.with_name(dest.name + ".report.json")


def print_report(report: Report) -> None:
    """The report for people."""
    labels = f"{report.num_classes} classes" if report.num_classes else "no labels"
    click.echo(f"{report.dest}: {report.num_images} images of {report.resolution}x{report.resolution} pixels, {labels}")
    for what, count in sorted(report.conversions.items()):
        click.echo(f"  {count} images: {what}")
    if report.dropped_grayscale:
        click.echo(f"  {report.dropped_grayscale} grayscale files left out, as the official ImageNet set does")
    if report.empty_classes:
        click.echo(f"  {len(report.empty_classes)} classes have no images: {list_some(report.empty_classes)}")
    if report.skipped:
        click.echo(f"  {len(report.skipped)} files skipped:")
        for item in report.skipped[:5]:
            click.echo(f"    {item['file']}: {item['reason']}")
        click.echo(f"  All of them are listed in {report_path(Path(report.dest))}")

#----------------------------------------------------------------------------

@click.command(cls=dnnlib.cli.Command)
@click.option("--source", metavar="PATH", required=True,
              help="Folder or zip archive of images, ImageNet's root folder, or sklearn:digits")
@click.option("--dest", metavar="PATH", required=True, help="Archive (ending in .zip) or folder to make")
@click.option("--resolution", type=dnnlib.cli.Resolution(), default=None,
              help="Width and height of the result, a power of two  [default: as the source]")
@click.option("--transform", type=click.Choice(["center-crop"]), default=None,
              help="How to make images square  [default: they must be square]")
@click.option("--max-images", metavar="INT", type=click.IntRange(min=1), default=None,
              help="Stop after this many images, in the order of the file names  [default: all]")
@click.option("--strict", is_flag=True, help="Stop at the first unreadable file instead of skipping it")
@click.option("--overwrite", is_flag=True, help="Replace the data set at --dest")
@click.option("--no-labels", is_flag=True, help="Write no labels, whatever the source has")
@click.option("--workers", metavar="INT", type=click.IntRange(min=1), default=1, show_default=True,
              help="Processes; the result does not depend on it")
def main(source: str, dest: str, resolution: int | None, transform: str | None, max_images: int | None,
         strict: bool, overwrite: bool, no_labels: bool, workers: int) -> None:
    """Make a data set for training: square RGB images of one size and their labels.

    Labels come from dataset.json in the source, else from its sub-folders: one class per sub-folder, in the order of
    their names. ImageNet is recognised by folders such as n01440764, directly in the source, in train/ or in
    ILSVRC/Data/CLS-LOC/train/. Files that cannot be read are skipped and listed in DEST.report.json.

    \b
    Examples:
      # One folder per class, cropped to squares of 64 pixels.
      python dataset_tool.py --source=photos --dest=photos64.zip --transform=center-crop --resolution=64
      # The 1,797 digits of scikit-learn: nothing to download.
      python dataset_tool.py --source=sklearn:digits --dest=digits32.zip --resolution=32
    """
    print_report(make_dataset(source, dest, resolution, transform, max_images, strict, overwrite,
                              use_labels=not no_labels, workers=workers))


if __name__ == "__main__":
    main()
