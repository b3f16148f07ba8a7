# SPDX-License-Identifier: Apache-2.0
"""Small classic sets that come as arrays: scikit-learn's digits, CIFAR-10 and CIFAR-100, MNIST and its relatives."""
import functools
import gzip
import math
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.sources.base import ArrayStore, Source
from data_prep.sources.tars import OpenTar
from dnnlib import UserError
from dnnlib.util import format_bytes, list_some

MAX_ARRAY_BYTES = 4 << 30
CIFAR_SIDE = 32

#----------------------------------------------------------------------------
# Digits.

def digits() -> Source:
    """The 1,797 handwritten digits of 8x8 pixels and 17 grays that come with scikit-learn. Raises UserError."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as err:
        raise UserError("--source=sklearn:digits needs scikit-learn: pip install scikit-learn") from err
    found = load_digits()
    store = ArrayStore("sklearn:digits", np.rint(found.images * (255 / 16)).astype(np.uint8))
    return Source(store, range(len(store.names)), found.target.tolist(), [str(i) for i in range(10)], "digits")

#----------------------------------------------------------------------------
# CIFAR: pickles of Python 2, read as data.

# File of the class names -> (key of the names, key of the labels, {split: files}).
CIFAR_KINDS: dict[str, tuple[str, str, dict[str, list[str]]]] = {
    "batches.meta": ("label_names", "labels",
                     {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}),
    "meta": ("fine_label_names", "fine_labels", {"train": ["train"], "test": ["test"]}),
}


def cifar_files(path: Path) -> dict[str, Callable[[], bytes]]:
    """What CIFAR's files hold, by file name, if this is its folder or its archive; else {}. Raises UserError."""
    if path.is_dir():
        folders = [path, *(path / name for name in ("cifar-10-batches-py", "cifar-100-python"))]
        for folder in folders:
            if any((folder / kind).is_file() for kind in CIFAR_KINDS):
                return {file.name: file.read_bytes for file in folder.iterdir() if file.is_file()}
        return {}
    if "cifar" not in path.name.lower():
        return {}
    tar = OpenTar(path)
    try:
        inside = {m.name.rpartition("/")[2]: m for m in tar.members() if m.size <= MAX_ARRAY_BYTES}
        if not any(kind in inside for kind in CIFAR_KINDS):
            return {}
        content = {name: tar.read(member) for name, member in inside.items()}
    finally:
        tar.close()
    return {name: functools.partial(bytes, data) for name, data in content.items()}


def _text(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _unpickle(path: Path, name: str, files: dict[str, Callable[[], bytes]]) -> dict[str, Any]:
    """One of CIFAR's dictionaries. Raises UserError."""
    # Here because it brings torch, which nothing else needs.
    from torch_utils import safe_pickle

    if name not in files:
        raise UserError(f"{path}: {name} is missing: unpack or download the whole archive again")
    content = safe_pickle.read_bytes(files[name](), f"{path}: {name}")
    if not isinstance(content, dict):
        raise UserError(f"{path}: {name}: not a file of CIFAR: download the archive again")
    return {_text(key): value for key, value in content.items()}


def cifar(path: Path, files: dict[str, Callable[[], bytes]], split: str) -> Source:
    """CIFAR-10 or CIFAR-100 (its fine labels) out of its Python files. Raises UserError."""
    kind = next(kind for kind in CIFAR_KINDS if kind in files)
    names_key, labels_key, splits = CIFAR_KINDS[kind]
    images, labels = [], []
    classes = _unpickle(path, kind, files).get(names_key)
    for name in splits[split]:
        batch = _unpickle(path, name, files)
        data, batch_labels = batch.get("data"), batch.get(labels_key)
        if (not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2
                or data.shape[1] != 3 * CIFAR_SIDE ** 2 or not isinstance(batch_labels, list)
                or len(batch_labels) != len(data)):
            raise UserError(f"{path}: {name}: not a file of CIFAR: download the archive again")
        images.append(data.reshape(-1, 3, CIFAR_SIDE, CIFAR_SIDE).transpose(0, 2, 3, 1))    # [N, H, W, 3]
        labels.extend(batch_labels)
    names = [_text(name) for name in classes] if isinstance(classes, list) else []
    wrong = [repr(v)[:40] for v in labels if type(v) is not int or not 0 <= v < len(names)]
    if wrong or not all(isinstance(name, str) for name in names) or not labels:
        raise UserError(f"{path}: {kind}: its {len(names)} class names do not fit the labels "
                        f"({list_some(wrong) or 'there are none'}): download the archive again")
    store = ArrayStore(path, np.concatenate(images))
    return Source(store, range(len(labels)), labels, names, "cifar")

#----------------------------------------------------------------------------
# MNIST and others in its format (Fashion-MNIST, KMNIST, EMNIST).

IDX_SPLITS = {"train": "train", "test": "t10k"}


def _idx_file(stem: Path) -> Path | None:
    """The file of this name, packed or not; some copies have a dot where others have a dash."""
    for name in (stem.name, stem.name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if stem.with_name(name + suffix).is_file():
                return stem.with_name(name + suffix)
    return None


def idx_images(path: Path, split: str) -> Path | None:
    """The file of images, if this is MNIST's folder or that file itself; else None."""
    if path.is_dir():
        for folder in (path, path / "MNIST" / "raw", path / "raw"):
            found = _idx_file(folder / f"{IDX_SPLITS[split]}-images-idx3-ubyte")
            if found is not None:
                return found
        return None
    return path if "idx3-ubyte" in path.name else None


def _read_idx(path: Path, dims: int) -> np.ndarray:
    """The uint8 array in an idx file. Raises UserError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
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


def mnist(path: Path) -> Source:
    """Images of an idx file, with the labels that lie beside it. Raises UserError."""
    images = _read_idx(path, 3)
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1").replace(".idx", "-idx")
    labels_path = _idx_file(path.with_name(stem))
    store = ArrayStore(path, images)
    if labels_path is None:
        return Source(store, range(len(images)), layout="mnist")
    labels = _read_idx(labels_path, 1).tolist()
    if len(labels) != len(images):
        raise UserError(f"{labels_path}: {len(labels)} labels for {len(images)} images: download both again")
    return Source(store, range(len(images)), labels, [str(i) for i in range(max(labels) + 1)], "mnist")
