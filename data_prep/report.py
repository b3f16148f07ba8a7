# SPDX-License-Identifier: Apache-2.0
"""What became of a source: `report.json` inside the data set."""
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import PIL
import PIL.features

from data_prep.journal import Level, Progress, last_link
from data_prep.sinks import image_name
from data_prep.sources.base import Source, class_counts, printable, splits_in_words
from dnnlib.util import list_some
from dnnlib.util import printable as one_line
from training.data.credit import CREDIT_KEY
from training.data.report import REPORT_NAME

LABELS_FROM = {"folders": "one sub-folder per class", "imagenet": "ImageNet's folders", "dataset.json": "labels in "
               "dataset.json", "label file": "labels from --labels"}       # Layouts that are worth words.
SHOWN_CLASSES = 20


def library_versions() -> dict[str, str]:
    """Versions of what pixels depend on."""
    names = ("jpg", "webp", "zlib", "avif", "libtiff", "jpg_2000", "freetype2", "raqm")
    codecs = {name: PIL.features.version(name) for name in names}
    return {"python": platform.python_version(), "pillow": PIL.__version__,
            **{name: version for name, version in codecs.items() if version}}


@dataclasses.dataclass
class Report:
    """It names no paths of the machine, so equal sources give equal reports wherever they lie."""

    layout: str                             # How the labels were found.
    transform: str | None
    resolution: int
    shown: str                              # Size of what is shown: differs from the resolution if there are bars.
    num_images: int
    num_classes: int
    images_per_class: dict[str, int]
    empty_classes: list[str]
    conversions: dict[str, int]             # What was done, to how many images.
    dropped_grayscale: int
    skipped: list[dict[str, str]]           # {"file": name in the source, "reason": ...}
    content_sha256: str                     # Covers pixels, labels and names of classes, in order.
    versions: dict[str, str]
    credit: dict[str, str] | None = None    # Who is to be named, as in dataset.json.

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)


def understood(path: str, source: Source) -> list[str]:
    """What a source was taken for, for people: layout, splits, classes."""
    labels = LABELS_FROM.get(source.layout, "")
    lines = [f"{printable(path)}: {source.kind}{', ' + labels if labels and source.labels is not None else ''}: "
             f"{len(source.indices)} images"]
    if source.splits:
        lines.append(f"  {splits_in_words(source)}")
    counts = class_counts(source.labels, source.classes)
    lines.append(f"  {len(counts)} classes: {_in_words(counts)}" if counts else "  no labels")
    if source.credit is not None:
        lines.append(f"  {source.credit}")
    if source.not_read:
        lines.append(f"  not read: {list_some(source.not_read)}")
    return lines


def _in_words(counts: dict[str, int]) -> str:
    """'0 = cat (50), 1 = dog (50)': index, name and number of images of each class."""
    return list_some([f"{i if name == str(i) else f'{i} = {one_line(name)}'} ({count})"
                      for i, (name, count) in enumerate(counts.items())], SHOWN_CLASSES)


def make_report(source: Source, written: list[int], level: Level, progress: Progress, transform: str | None,
                shown: str) -> Report:
    """The report of one size; `written` are the places in the source that became images."""
    labels = source.labels
    counts = {} if labels is None else class_counts([labels[place] for place in written],
                                                    source.classes or [str(i) for i in range(max(labels) + 1)])
    conversions = dict(sorted(progress.conversions.items()))
    if level.enlarged:
        conversions["enlarged"] = level.enlarged
    return Report(
        layout=source.layout, transform=transform, resolution=level.resolution or 0,
        shown=shown or str(level.resolution), num_images=progress.written, num_classes=len(counts),
        images_per_class=counts, empty_classes=[name for name, count in counts.items() if not count],
        conversions=conversions, dropped_grayscale=len(progress.dropped),
        skipped=[{"file": printable(source.store.names[source.indices[place]]), "reason": reason}
                 for place, reason in progress.skipped],
        content_sha256=last_link(level.chain, source.classes), versions=library_versions(),
        credit=dataclasses.asdict(source.credit) if source.credit is not None else None)


def make_metadata(source: Source, progress: Progress) -> str:
    """The content of dataset.json."""
    found: dict[str, Any] = {"labels": None}
    if source.labels is not None:
        found["labels"] = [[image_name(i), source.labels[place]] for i, place in enumerate(progress.places())]
    if source.classes is not None:
        found["classes"] = source.classes
    if source.credit is not None:
        found[CREDIT_KEY] = dataclasses.asdict(source.credit)
    if progress.shapes:
        found["source_sizes"] = progress.shapes
    return json.dumps(found)


def describe(report: Report, dest: Path, where: list[str]) -> list[str]:
    """The report for people, line by line; `where` names the skipped files in full."""
    labels = f"{report.num_classes} classes" if report.num_classes else "no labels"
    lines = [f"{dest}: {report.num_images} images of {report.resolution}x{report.resolution} pixels, {labels}"]
    if report.images_per_class:
        lines.append(f"  classes with their numbers of images: {_in_words(report.images_per_class)}")
    lines += [f"  {count} images: {what}" for what, count in report.conversions.items()]
    if report.dropped_grayscale:
        official = ", as the official ImageNet set does" if report.layout == "imagenet" else ""
        lines.append(f"  {report.dropped_grayscale} grayscale files left out{official}")
    if report.empty_classes:
        lines.append(f"  {len(report.empty_classes)} classes have no images: {list_some(report.empty_classes)}")
    if report.skipped:
        lines.append(f"  {len(report.skipped)} files skipped:")
        lines += [f"    {name}: {item['reason']}" for name, item in zip(where, report.skipped[:5], strict=False)]
        lines.append(f"  All of them are listed in {REPORT_NAME} inside {dest}")
    return lines
