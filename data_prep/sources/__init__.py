# SPDX-License-Identifier: Apache-2.0
"""Sources of images by path: what a folder or file is, is told from its content."""
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

from data_prep import labels
from data_prep.sources import arrays, shards, tables
from data_prep.sources.base import FolderFiles, ImageStore, Source, ZipFiles, printable
from data_prep.sources.tars import is_tar
from dnnlib import UserError
from training.data.labels import IMAGE_SUFFIXES, METADATA_NAME

IMAGENET_FOLDERS = ("ILSVRC/Data/CLS-LOC/train/", "Data/CLS-LOC/train/", "train/", "")


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How a source is to be read."""

    use_labels: bool = True
    label_file: str | None = None       # CSV or JSON; takes the place of the source's own labels.
    split: str | None = None            # 'train' or 'test', for CIFAR and MNIST; None is 'train'.
    allow_gaps: bool = False            # Accept class indices without images.


def open_source(path: str, options: SourceOptions | None = None) -> Source:
    """List the images and labels of a source.

    Args:
        path: A folder, an archive, a pattern of shards, or 'sklearn:digits'.
        options: See SourceOptions.

    Raises:
        UserError: nothing usable is there, or its labels are not as they must be.
    """
    options = options or SourceOptions()
    try:
        source = _open(path, options)
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror or err}): check the path and its permissions") from err
    if options.split is not None and source.layout not in ("cifar", "mnist"):
        raise UserError(f"--split={options.split}: only CIFAR and MNIST have splits here: name the folder or file of "
                        f"the split in --source")
    if not options.use_labels:
        return dataclasses.replace(source, labels=None, classes=None)
    if options.label_file is not None:
        names = [source.store.names[i] for i in source.indices]
        found, classes = labels.from_file(options.label_file, names, options.allow_gaps)
        return dataclasses.replace(source, labels=found, classes=classes,
                                   layout="imagenet" if source.is_imagenet else "label file")
    return source


def _open(path: str, options: SourceOptions) -> Source:
    if path.startswith("sklearn:"):
        if path != "sklearn:digits":
            raise UserError(f"--source={path}: unknown: choose sklearn:digits, a folder or an archive")
        return arrays.digits()
    if shards.is_pattern(path):
        return _open_files(path, shards.matching(path), options)
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such folder, archive or pattern: check the path")
    images = arrays.idx_images(place, options.split or "train")
    if images is not None:
        return arrays.mnist(images)
    if place.is_dir():
        return _open_folder(path, place, options)
    if place.name.lower().endswith((".parquet", ".tar")) or is_tar(place):
        return _open_files(path, [place], options)
    return _with_labels(ZipFiles(path), path, options)


def _open_folder(path: str, place: Path, options: SourceOptions) -> Source:
    cifar = arrays.cifar_files(place)
    if cifar:
        return arrays.cifar(place, cifar, options.split or "train")
    if (place / "data.mdb").is_file():
        return tables.lsun(place)
    parquet = sorted(place.glob("*.parquet"))
    if parquet:
        return tables.parquet(path, parquet, _own_labels(options), options.allow_gaps)
    tars = shards.tar_paths(place)
    if tars:
        return _open_files(path, tars, options)
    return _with_labels(FolderFiles(path), path, options)


def _open_files(path: str, files: Sequence[Path], options: SourceOptions) -> Source:
    """Tar archives, or Parquet files."""
    if all(file.name.lower().endswith(".parquet") for file in files):
        return tables.parquet(path, files, _own_labels(options), options.allow_gaps)
    other = [str(file) for file in files if not is_tar(file)]
    if other:
        raise UserError(f"--source={path}: {other[0]} is no tar archive: name archives of one kind")
    if len(files) == 1 and (cifar := arrays.cifar_files(files[0])):
        return arrays.cifar(files[0], cifar, options.split or "train")
    store = shards.TarStore(path, files)
    values = shards.web_values(store)
    if values is not None and not store.metadata:
        _need_images(store)
        found: tuple[list[int] | None, list[str] | None] = (None, None)
        if _own_labels(options):
            found = labels.encode(path, store.names, values, None, options.allow_gaps)
        return Source(store, range(len(store.names)), *found, "webdataset")
    return _with_labels(store, path, options)


def _own_labels(options: SourceOptions) -> bool:
    return options.use_labels and options.label_file is None


def _need_images(store: ImageStore) -> None:
    if not store.names:
        raise UserError(f"{store.path}: no images in it: files must end in {', '.join(IMAGE_SUFFIXES)}")


def _with_labels(store: FolderFiles | ZipFiles | shards.TarStore, path: str, options: SourceOptions) -> Source:
    """Labels from dataset.json, else from ImageNet's layout, else from sub-folders."""
    _need_images(store)
    indices: Sequence[int] = range(len(store.names))
    inner = store.inner_names() if isinstance(store, shards.TarStore) else list(store.names)
    found: tuple[list[int] | None, list[str] | None] = (None, None)
    if store.metadata:
        if _own_labels(options):
            found = labels.from_metadata(f"{path}: {METADATA_NAME}", store.metadata, store.names, options.allow_gaps)
        return Source(store, indices, *found, METADATA_NAME)
    prefix = imagenet_prefix(inner)
    if prefix is not None:
        indices = [i for i in indices if inner[i].startswith(prefix)]
    if _own_labels(options):
        found = labels.from_folders(path, [printable(inner[i][len(prefix or ""):]) for i in indices])
    layout = "imagenet" if prefix is not None else "images" if found[0] is None else "folders"
    return Source(store, indices, *found, layout)


def imagenet_prefix(names: Sequence[str]) -> str | None:
    """The leading folders of ImageNet's training images ('n01440764/x.JPEG'), or None if this is not ImageNet."""
    for prefix in IMAGENET_FOLDERS:
        inside = [name for name in names if name.startswith(prefix)]
        if inside and all(re.match(r"n\d{8}/", name[len(prefix):]) for name in inside):
            return prefix
    return None


def source_stamp(path: str) -> list[int]:
    """Size and time of a source that is one file: what has changed cannot be continued."""
    if os.path.isfile(path):
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    return []
