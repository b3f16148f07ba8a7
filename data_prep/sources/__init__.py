# SPDX-License-Identifier: Apache-2.0
"""The one reader of sources of images: what a folder or file is, is told from its content.

`dataset_tool.py --source` and the images of `calc_metrics.py` are opened here. A source that has splits (train, val,
test) is never taken whole unasked: one must be chosen.
"""
import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from data_prep import labels
from data_prep.sources import arrays, numpy_files, openmoji, shards, tables
from data_prep.sources.base import Source, chain, printable
from data_prep.sources.kinds import KINDS, is_image_file, is_worth_a_word, kind_of_file, may_be_data
from dnnlib import UserError
from dnnlib.util import list_some
from training.data.credit import credit_of
from training.data.labels import IMAGE_SUFFIXES, METADATA_NAME, is_image_name
from training.data.splits import Splits, choose, find_splits, in_order, split_of_file
from training.data.stores import FolderStore, ZipStore
from training.data.zip_directory import read_directory

MAX_LOOKED_AT = 200             # Files without images in a folder whose first bytes are looked at.
WNID_FOLDER = re.compile(r"n\d{8}/").match
# Folders that only hold a thousand files each and are no classes: of official data sets, and of EDM2's samples.
NUMBERED = (re.compile(r"(.*/)?\d{5}/img\d{8}\.\w+"), re.compile(r"(.*/)?(\d{3})000/\2\d{3}\.\w+"))


# Sources that are no files: installed packages hold them.
NAMED: dict[str, Callable[[], Source]] = {"sklearn:digits": arrays.digits, openmoji.NAME: openmoji.openmoji}


def is_named(path: str) -> bool:
    """Whether a path means a source of that name instead of a file or folder."""
    return path in NAMED or path.startswith("sklearn:")


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How a source is to be read."""

    use_labels: bool = True
    label_file: str | None = None       # CSV or JSON; takes the place of the source's own labels.
    split: str | None = None            # 'train', 'val', 'test' or 'all'; None: there must be no choice.
    allow_gaps: bool = False            # Accept class indices without images.
    split_option: str = "--split"       # What messages call the option for `split`.

    @property
    def own_labels(self) -> bool:
        """Whether the source is asked for its labels."""
        return self.use_labels and self.label_file is None


def open_source(path: str, options: SourceOptions | None = None) -> Source:
    """List the images and labels of a source.

    Args:
        path: A folder, an archive, a pattern of shards, or one of NAMED.
        options: See SourceOptions.

    Raises:
        UserError: nothing usable is there, its labels are not as they must be, or a split must be chosen.
    """
    options = options or SourceOptions()
    try:
        source = _open(path, options)
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror or err}): check the path and its permissions") from err
    if not source.splits:
        choose(path, {}, options.split, options.split_option)       # Says that there are none.
    if not options.use_labels:
        return dataclasses.replace(source, labels=None, classes=None)
    if options.label_file is not None:
        names = [source.store.names[i] for i in source.indices]
        found, classes = labels.from_file(options.label_file, names, options.allow_gaps)
        return dataclasses.replace(source, labels=found, classes=classes,
                                   layout="imagenet" if source.is_imagenet else "label file")
    return source

#----------------------------------------------------------------------------

def _open(path: str, options: SourceOptions) -> Source:
    if is_named(path):
        if path not in NAMED:
            raise UserError(f"{path}: unknown: choose {' or '.join(NAMED)}, a folder or an archive")
        if os.path.lexists(path):
            raise UserError(f"{path}: may be the source of that name, or the file or folder that is here: write "
                            f"{os.path.join(os.curdir, path)} for what is here, or work in another folder")
        return NAMED[path]()
    if shards.is_pattern(path):
        return _open_matching(path, options)
    place = Path(path)
    if not place.exists():
        raise UserError(f"{path}: no such folder, archive or pattern: check the path")
    if place.is_dir():
        return _open_folder(path, place, options)
    kind = kind_of_file(place)
    if kind is None or kind == "idx labels":
        what = "one image" if is_image_file(place) else "a file of labels" if kind else "nothing that holds images"
        raise UserError(f"{path}: is {what}: name a folder or archive of images, shards, an array, or a database")
    if kind == "idx":
        return _open_idx(path, [place], _siblings(place), options)
    return _open_kind(path, kind, [place], options)


def _siblings(place: Path) -> list[Path]:
    """The files of labels beside an idx file."""
    beside = [file for file in sorted(place.parent.iterdir()) if file.is_file() and not may_be_image(file)]
    return [file for file in beside[:MAX_LOOKED_AT] if _kind_or_none(file) == "idx labels"]


def may_be_image(file: Path) -> bool:
    """Whether a file need not be looked at, because its name is that of an image or hidden."""
    return is_image_file(file) or file.name.startswith(".")


def _kind_or_none(file: Path) -> str | None:
    """The kind of a file; None also for what is not read."""
    try:
        return kind_of_file(file)
    except (OSError, UserError):
        return None


def _open_matching(path: str, options: SourceOptions) -> Source:
    files = shards.matching(path)
    kinds = {file: kind_of_file(file) for file in files}
    known = sorted({str(kind) for kind in kinds.values()})
    if len(known) > 1 or known[0] not in KINDS:
        odd = next(file for file, kind in kinds.items() if kind not in KINDS or kind != kinds[files[0]])
        raise UserError(f"{path}: {odd} is no tar archive or Parquet file like the others: name files of one kind")
    return _open_files(path, known[0], files, options)


def _open_folder(path: str, place: Path, options: SourceOptions) -> Source:
    """A folder of images, or one of files that hold images."""
    store = FolderStore(path)
    others = store.other_files
    folder = arrays.cifar_folder(others)
    rows = [] if folder is None else [folder + next(kind for kind in arrays.CIFAR_KINDS if folder + kind in others)]
    if folder is not None and not store.names:
        batches = {name.removeprefix(folder): (place / name).read_bytes for name in others if name.startswith(folder)}
        return arrays.cifar(place / folder, batches, options.split, options.split_option)
    if store.names:
        data = [name for name in others if is_worth_a_word(name)]
        rows += [name for name in data if _kind_or_none(place / name) in ("parquet", "lmdb")]
        if rows:
            raise UserError(f"{path}: holds {len(store.names)} images ({store.names[0]}, ...) and "
                            f"{list_some(rows, 3)}: name what is to be read, such as '{path}/*.parquet' or a folder of "
                            "images")
        source = _with_labels(store, path, "folder", options)
        return dataclasses.replace(source, not_read=tuple(data))
    found: dict[str, list[Path]] = {}
    for name in others[:MAX_LOOKED_AT] + [name for name in others[MAX_LOOKED_AT:] if may_be_data(name)]:
        kind = kind_of_file(place / name) if may_be_data(name) else _kind_or_none(place / name)
        if kind is not None:
            found.setdefault(kind, []).append(place / name)
    idx_labels = found.pop("idx labels", [])
    if not found:
        raise _no_images(path)
    if len(found) > 1:
        held = [f"{len(files)} {KINDS[kind]} ({files[0].name}, ...)" for kind, files in found.items()]
        raise UserError(f"{path}: holds {' and '.join(held)}: name the files of one kind")
    (kind, files), = found.items()
    if kind == "idx":
        return _open_idx(path, files, idx_labels, options)
    return _open_files(path, kind, files, options)


def _no_images(path: str | os.PathLike[str]) -> UserError:
    return UserError(f"{path}: no images in it: files must end in {', '.join(IMAGE_SUFFIXES)}")


def _open_idx(path: str, images: list[Path], found: list[Path], options: SourceOptions) -> Source:
    return arrays.mnist(path, images, found if options.own_labels else [], options.split, options.split_option)

#----------------------------------------------------------------------------
# Files that hold images: archives, shards, arrays, databases.

def _open_files(path: str, kind: str, files: list[Path], options: SourceOptions) -> Source:
    """Several files of one kind, whose names may say splits."""
    groups: dict[str, list[Path]] = {}
    top = Path(path)
    for file in files:
        name = file.relative_to(top).as_posix() if file.is_relative_to(top) else file.name
        name = name.removesuffix("/data.mdb")
        groups.setdefault(split_of_file(name) or "", []).append(file)
    keys, unit = in_order(key for key in groups if key), "files"
    counts = {key: len(groups[key]) for key in keys}
    if kind == "parquet" and len(groups) > 1:
        counts, unit = {key: sum(map(tables.num_rows, groups[key])) for key in keys}, "images"
    loose = [file.name for file in groups.get("", [])] if counts else []
    if kind == "parquet" and not keys:
        return _open_kind(path, kind, files, options)       # A column may say them.
    if len(files) == 1 and options.split is not None and (not keys or options.split.lower() != keys[0]):
        return _open_kind(path, kind, files, options)       # The splits may lie inside of it.
    chosen = choose(path, counts, options.split, options.split_option, unit, loose)
    if not chosen:
        return _open_kind(path, kind, files, options)
    # A column may say it again for rows; of other files names alone say it.
    inside = options if len(files) == 1 or kind == "parquet" else dataclasses.replace(options, split=None)
    if kind in ("tar", "parquet"):
        source = _open_kind(path, kind, [file for key in chosen for file in groups[key]], inside)
    else:
        source = chain(path, {key: _open_kind(path, kind, groups[key], inside) for key in chosen})
    if source.splits:
        return source
    return dataclasses.replace(source, splits=counts, split_unit=unit, chosen=tuple(chosen))


def _open_kind(path: str, kind: str, files: list[Path], options: SourceOptions) -> Source:
    """Files of one kind and one split."""
    if kind == "parquet":
        return tables.parquet(path, files, options.own_labels, options.allow_gaps, options.split,
                              options.split_option)
    if kind == "tar":
        return _open_tars(path, files, options)
    if len(files) > 1:
        raise UserError(f"{path}: holds {len(files)} {KINDS[kind]} ({list_some([file.name for file in files], 3)}): "
                        f"name one of them")
    file = files[0]
    if kind == "npz":
        return numpy_files.npz(file, options.own_labels, options.allow_gaps, options.split, options.split_option)
    if kind == "npy":
        return numpy_files.npy(file)
    if kind == "lmdb":
        return tables.lsun(file.parent if file.name == "data.mdb" else file)
    return _open_zip(path, file, options)


def _open_zip(path: str, file: Path, options: SourceOptions) -> Source:
    store = ZipStore(file)          # Says what is wrong with a damaged archive.
    with open(file, "rb") as f:
        others = [name for name in read_directory(f).names if not is_image_name(name) and is_worth_a_word(name)]
    source = _with_labels(store, path, "zip archive", options)
    return dataclasses.replace(source, not_read=tuple(sorted(others)))


def _open_tars(path: str, files: list[Path], options: SourceOptions) -> Source:
    store = shards.TarStore(path, files)
    if not store.names and len(files) == 1:
        inside = arrays.cifar_in_tar(files[0], store.first_tar())
        try:
            if inside:
                return arrays.cifar(files[0], inside, options.split, options.split_option)
        finally:
            store.close()
    kind = "tar archive" if len(files) == 1 else f"{len(files)} tar archives"
    return _with_labels(store, path, kind, options)

#----------------------------------------------------------------------------
# Files in folders.

def _with_labels(store: FolderStore | ZipStore | shards.TarStore, path: str, kind: str,
                 options: SourceOptions) -> Source:
    """The images of a split, with labels from dataset.json, from the files of a WebDataset, or from sub-folders."""
    if not store.names:
        raise _no_images(store.path)
    indices: Sequence[int] = range(len(store.names))
    inner = store.inner_names() if isinstance(store, shards.TarStore) else list(store.names)
    splits, chosen = find_splits(inner), []
    if splits is not None:
        beside = [inner[i] for i in splits.loose]
        chosen = choose(path, splits.counts, options.split, options.split_option, loose=beside)
        indices = [i for i in indices if splits.keys[i] in chosen]
        inner = splits.inner
    source = Source(store, indices, kind=kind, splits=splits.counts if splits else {}, chosen=tuple(chosen))
    names = [inner[i] for i in indices]
    found: tuple[list[int] | None, list[str] | None] = (None, None)
    if store.metadata:
        if options.own_labels:
            found = labels.from_metadata(f"{path}: {METADATA_NAME}", store.metadata, [store.names[i] for i in indices],
                                         options.allow_gaps)
        return dataclasses.replace(source, labels=found[0], classes=found[1], layout=METADATA_NAME,
                                   credit=credit_of(f"{path}: {METADATA_NAME}", store.metadata))
    values = shards.web_values(store) if isinstance(store, shards.TarStore) else None
    if values is not None:
        if options.own_labels:
            found = labels.encode(path, [store.names[i] for i in indices], [values[i] for i in indices], None,
                                  options.allow_gaps)
        return dataclasses.replace(source, labels=found[0], classes=found[1], layout="webdataset",
                                   kind="WebDataset shards")
    is_imagenet = all(WNID_FOLDER(name) for name in names)
    numbered = any(all(pattern.fullmatch(name) for name in names) for pattern in NUMBERED)
    if options.own_labels and not numbered:
        found = _folder_labels(path, inner, indices, splits)
    layout = "imagenet" if is_imagenet else "images" if found[0] is None else "folders"
    return dataclasses.replace(source, labels=found[0], classes=found[1], layout=layout)


def _folder_labels(path: str, inner: Sequence[str], indices: Sequence[int],
                   splits: Splits | None) -> tuple[list[int] | None, list[str] | None]:
    """Labels of some images by sub-folder. The classes are those of all splits, whatever is taken. Raises UserError."""
    names = [printable(name) for name in inner]
    if splits is not None and len(splits.counts) > 1:
        everything = [i for i, key in enumerate(splits.keys) if key]
        try:
            found, classes = labels.from_folders(path, [names[i] for i in everything])
        except UserError:               # Another split has no folders of classes.
            found = None
        if found is not None:
            of_image = dict(zip(everything, found, strict=True))
            return [of_image[i] for i in indices], classes
    return labels.from_folders(path, [names[i] for i in indices])

#----------------------------------------------------------------------------

def source_stamp(path: str) -> list[int]:
    """Size and time of a source that is one file: what has changed cannot be continued."""
    if path == openmoji.NAME:
        path = os.fspath(openmoji.find_package().font)
    if os.path.isfile(path):
        stat = os.stat(path)
        return [stat.st_size, stat.st_mtime_ns]
    return []
