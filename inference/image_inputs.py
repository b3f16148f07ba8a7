# SPDX-License-Identifier: Apache-2.0
"""Images to be scored, whatever a user has them in: all that `dataset_tool.py` reads (`data_prep.sources`).

They are served as `metrics.sources` describes: uint8 batches with or without labels. What a path holds is found from
its content, not from its name.
"""
import os
import zipfile
from pathlib import Path

import numpy as np

from data_prep.sources import SourceOptions, is_named, open_source
from data_prep.sources.base import Source, class_counts, splits_in_words
from data_prep.sources.kinds import kind_of_file
from data_prep.sources.shards import is_pattern
from dnnlib import UserError
from dnnlib.util import list_some
from inference.image_files import DatasetSource as DatasetSource
from inference.image_files import source_of_files
from metrics.references import is_statistics

#----------------------------------------------------------------------------

def kind_of(path: str | os.PathLike[str]) -> str:
    """'statistics' (see `metrics.references`) or 'images'.

    Raises:
        UserError: nothing is there, or it is neither.
    """
    name = os.fspath(path)
    if os.path.isdir(path) or is_named(name) or is_pattern(name):
        return "images"
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file or folder: check the path")
    try:
        with open(path, "rb") as f:
            start = f.read(4)
        if is_statistics(path):
            return "statistics"
        if start == b"PK\x03\x04" and not zipfile.is_zipfile(path):
            raise UserError(f"{path}: a zip archive or .npz that is cut off: copy or make it again")
        kind = kind_of_file(Path(path))
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as err:
        raise UserError(f"{path}: a damaged zip archive or .npz ({err}): copy or make it again") from err
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror or err}): check the path and its permissions") from err
    if kind is None:
        raise UserError(f"{path}: neither a folder, a zip archive nor an .npz file, a tar archive, shards, a database "
                        "or stored statistics: name one of these")
    return "images"


def has_samples(path: str | os.PathLike[str]) -> bool:
    """Whether a file of statistics also holds images, as ADM's reference files do."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def _open_with_labels(name: str, options: SourceOptions) -> Source:
    """A source with its labels, if it has any. Raises UserError."""
    try:
        return open_source(name, options)
    except UserError as err:
        # The option is one of dataset_tool.py.
        raise UserError(str(err).replace(", or add --no-labels", "")) from err


def read_labels(path: str | os.PathLike[str], split: str | None = None,
                split_option: str = "--split") -> tuple[np.ndarray | None, list[str] | None]:
    """Labels int64 [N] of the images at `path`, and the names of the classes; None where there are none.

    Arguments as `open_images`. Images are not looked at.

    Raises:
        UserError: nothing there, no images in it, a split must be chosen, or the labels are broken.
    """
    found = _open_with_labels(os.fspath(path), SourceOptions(split=split, split_option=split_option, allow_gaps=True))
    found.store.close()
    return None if found.labels is None else np.array(found.labels, dtype=np.int64), found.classes


def open_images(path: str | os.PathLike[str], labels: bool = False, workers: int = 0, split: str | None = None,
                split_option: str = "--split") -> DatasetSource:
    """The images at `path`, whatever they lie in.

    Args:
        path: See `data_prep.sources.open_source`.
        labels: Read labels where there are any. Without it only their order is looked at.
        workers: Processes that decode.
        split: Which one to take of a source that has several.
        split_option: By which it is chosen.

    Raises:
        UserError: nothing there, no images in it, a split must be chosen, or labels that are wanted are broken.
    """
    name = os.fspath(path)
    options = SourceOptions(split=split, split_option=split_option, allow_gaps=True)
    try:
        found = _open_with_labels(name, options)
    except UserError:
        if labels:
            raise
        found = open_source(name, SourceOptions(False, split=split, split_option=split_option))
    served = np.array(found.labels, dtype=np.int64) if labels and found.labels is not None else None
    source = source_of_files(found, name, served, workers)
    source.understood = _understood(found)
    return source


def _understood(source: Source) -> str:
    """Splits and classes, for people."""
    parts = []
    if source.splits:
        parts.append(splits_in_words(source))
    counts = class_counts(source.labels, source.classes)
    if counts:
        parts.append(f"{len(counts)} classes: {list_some([f'{name} ({n})' for name, n in counts.items() if n], 5)}")
    if source.not_read:
        parts.append(f"not read: {list_some(source.not_read, 3)}")
    return "; ".join(parts)


def summary(source: DatasetSource) -> str:
    """What was found, in a few words: 'tar archive, 50000 images of 256x256 pixels, ordered by class'."""
    about = source.description
    order = ", ordered by class" if about.get("labels_sorted") else ""
    size = about["resolution"]
    return f"{about['format']}, {about['num_images']} images of {size}x{size} pixels{order}"
