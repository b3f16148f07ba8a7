# SPDX-License-Identifier: Apache-2.0
"""Small classic sets that come as arrays: scikit-learn's digits, CIFAR-10 and CIFAR-100, MNIST and its relatives."""
import dataclasses
import functools
import gzip
import math
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.base import ArrayStore, Source, chain
from data_prep.sources.tars import OpenTar
from dnnlib import UserError
from dnnlib.util import format_bytes, list_some
from training.data.splits import choose, in_order, split_of_file

MAX_ARRAY_BYTES = 4 << 30
CIFAR_SIDE = 32

#----------------------------------------------------------------------------
# Digits.

def digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels and 17 grays that come with scikit-learn. Raises UserError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise UserError("sklearn:digits: needs scikit-learn: pip install scikit-learn") from err
    found = load_digits()
    store = ArrayStore("sklearn:digits", np.rint(found.images * (255 / 16)).astype(np.uint8))
    return Source(store, range(len(store.names)), found.target.tolist(), [str(i) for i in range(10)], "digits",
                  "scikit-learn's digits")

#----------------------------------------------------------------------------
# CIFAR: pickles of Python 2, read as data.

# File of the class names -> (key of the names, key of the labels, {split: files}).
CIFAR_KINDS: dict[str, tuple[str, str, dict[str, list[str]]]] = {
    "batches.meta": ("label_names", "labels",
                     {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}),
    "meta": ("fine_label_names", "fine_labels", {"train": ["train"], "test": ["test"]}),
}
CIFAR_NAMES = {name for kind, (_, _, splits) in CIFAR_KINDS.items() for name in (kind, *sum(splits.values(), []))}
Files = Mapping[str, Callable[[], bytes]]       # Name -> a function that reads the file.


def cifar_folder(names: Iterable[str]) -> str | None:
    """'cifar-10-batches-py/' or '': the folder among some files that holds what CIFAR's archives hold; else None."""
    found = set(names)
    for name in sorted(found):
        folder, slash, base = name.rpartition("/")
        # A file `meta` alone may be anything; a batch of images beside it shows that it is CIFAR's.
        if base in CIFAR_KINDS and any(folder + slash + batch in found for batches in CIFAR_KINDS[base][2].values()
                                       for batch in batches):
            return folder + slash
    return None


def cifar_in_tar(path: Path, tar: OpenTar) -> dict[str, Callable[[], bytes]]:
    """What CIFAR's files hold, by file name, if they lie in an open tar; else {}. Raises UserError."""
    inside = {member.name: member for member in tar.members()
              if member.size <= MAX_ARRAY_BYTES and member.name.rpartition("/")[2] in CIFAR_NAMES}
    folder = cifar_folder(inside)
    if folder is None:
        return {}
    return {name.removeprefix(folder): functools.partial(tar.read, member) for name, member in inside.items()
            if name.startswith(folder)}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _unpickle(path: Path, name: str, files: Files) -> dict[str, Any]:
    """One of CIFAR's dictionaries. Raises UserError."""
    # Here because it brings torch, which nothing else needs.
    from torch_utils import safe_pickle

    if name not in files:
        raise UserError(f"{path}: {name} is missing: unpack or download the whole archive again")
    content = safe_pickle.read_bytes(files[name](), f"{path}: {name}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: {name}: not a file of CIFAR: download the archive again")
    return {_text(key): value for key, value in content.items()}


def _cifar_batch(path: Path, name: str, files: Files, labels_key: str) -> tuple[np.ndarray, list[Any]]:
    """Images [N, H, W, 3] and labels of one file. Raises UserError."""
    batch = _unpickle(path, name, files)
    data, labels = batch.get("data"), batch.get(labels_key)
    if (not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2
            or data.shape[1] != 3 * CIFAR_SIDE ** 2 or not isinstance(labels, list) or len(labels) != len(data)):
        raise UserError(f"{path}: {name}: not a file of CIFAR: download the archive again")
    return data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1), labels


def cifar(path: Path, files: Files, split: str | None, option: str) -> Source:
    """CIFAR-10 or CIFAR-100 (its fine labels) out of its Python files. Raises UserError."""
    kind = next(kind for kind in CIFAR_KINDS if kind in files)
    names_key, labels_key, splits = CIFAR_KINDS[kind]
    # A file that is missing shows when it is read; a split of which nothing is there is none.
    counts = {key: sum(name in files for name in names) for key, names in splits.items()
              if any(name in files for name in names)}
    keys = choose(str(path), counts, split, option, unit="files")
    classes = _unpickle(path, kind, files).get(names_key)
    batches = [_cifar_batch(path, name, files, labels_key) for key in keys for name in splits[key]]
    labels = [label for _, some in batches for label in some]
    names = [_text(name) for name in classes] if isinstance(classes, list) else []
    wrong = [repr(v)[:40] for v in labels if type(v) is not int or not 0 <= v < len(names)]
    if wrong or not all(isinstance(name, str) for name in names) or not labels:
        raise UserError(f"{path}: {kind}: its {len(names)} class names do not fit the labels "
                        f"({list_some(wrong) or 'there are none'}): download the archive again")
    store = ArrayStore(path, np.concatenate([images for images, _ in batches]))
    return Source(store, range(len(labels)), labels, names, "cifar", f"CIFAR-{len(names)}", counts, "files",
                  tuple(keys))

#----------------------------------------------------------------------------
# MNIST and others in its format (Fashion-MNIST, KMNIST, EMNIST).

IDX_IMAGES, IDX_LABELS = bytes([0, 0, 8, 3]), bytes([0, 0, 8, 1])       # How such files begin.


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array in an idx file, packed or not. Raises UserError."""
    try:
        with open(path, "rb") as f:
            packed = f.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as f:
            head = f.read(4 + 4 * dims)
            if len(head) != 4 + 4 * dims or head[:4] != bytes([0, 0, 8, dims]):
                raise UserError(f"{path}: not an idx file of {dims} dimensions: download it again")
            shape = struct.unpack(f">{dims}I", head[4:])
            count = math.prod(shape)
            if count > MAX_ARRAY_BYTES:
                raise UserError(f"{path}: claims to hold {format_bytes(count)}: refused")
            data = f.read(count)
    except (EOFError, OSError, ValueError, zlib.error) as err:
        raise UserError(f"{path}: cannot be read ({err}): download it again") from err
    if len(data) != count or not count:
        raise UserError(f"{path}: holds {len(data)} bytes of {count}: download it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _labels_beside(images: Path, candidates: Sequence[Path], count: int) -> list[int] | None:
    """The labels of a file of images: of the same split, and called likewise if there are several. Raises UserError."""
    split = split_of_file(images.name)
    here = [path for path in candidates if path.parent == images.parent and split_of_file(path.name) == split]
    alike = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1").replace(".idx", "-idx")
    called = [path for path in here if path.name.removesuffix(".gz").replace(".idx", "-idx") == alike]
    found = called or here
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{images}: {list_some([path.name for path in found])} may be its labels: keep one of them")
    labels: list[int] = _read_idx(found[0], 1).tolist()
    if len(labels) != count:
        raise UserError(f"{found[0]}: {len(labels)} labels for {count} images: download both again")
    return labels


def _idx_source(path: Path, labels_files: Sequence[Path]) -> Source:
    images = _read_idx(path, 3)
    store = ArrayStore(path, images)
    labels = _labels_beside(path, labels_files, len(images))
    classes = None if labels is None else [str(i) for i in range(max(labels) + 1)]
    return Source(store, range(len(images)), labels, classes, "mnist", "idx")


def mnist(path: str, images: Sequence[Path], labels: Sequence[Path], split: str | None, option: str) -> Source:
    """Files of images in MNIST's format, with the labels that lie beside them. Raises UserError.

    Args:
        path: What the user named.
        images: idx files of three dimensions.
        labels: idx files of one dimension near them.
        split: Which to take.
        option: By which it is chosen.
    """
    groups: dict[str, list[Path]] = {}
    for file in images:
        groups.setdefault(split_of_file(file.name) or "", []).append(file)
    several = next((files for files in groups.values() if len(files) > 1), None)
    if several is not None:
        raise UserError(f"{path}: {list_some([file.name for file in several])} are several sets of images: name one of "
                        "the files")
    counts = {key: len(_read_idx(groups[key][0], 3)) for key in in_order(key for key in groups if key)}
    loose = [groups[""][0].name] if "" in groups and counts else []
    keys = choose(path, counts, split, option, loose=loose) or [""]
    parts = {key: _idx_source(groups[key][0], labels) for key in keys}
    return dataclasses.replace(chain(path, parts), splits=counts, chosen=tuple(keys) if counts else ())
