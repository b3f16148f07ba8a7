# SPDX-License-Identifier: Apache-2.0
"""Names inside a data set, and its dataset.json = {"labels": [["00000/img00000000.png", 6], ...], "classes": [...]}."""
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeVar

import numpy as np

from dnnlib import UserError
from dnnlib.classes import are_names, number_names, single, whole_number, with_several
from dnnlib.util import list_some, normalized_name, parse_json, unique_keys

IMAGE_SUFFIXES = (".apng", ".avif", ".bmp", ".dib", ".gif", ".j2k", ".jfif", ".jif", ".jp2", ".jpe", ".jpeg", ".jpg",
                  ".mpo", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tga", ".tif", ".tiff", ".webp")
METADATA_NAME = "dataset.json"
MAX_CLASSES = 1_000_000
Item = TypeVar("Item")
# A name that needs no cleaning: its parts are not empty, do not begin with a dot and have no odd characters.
PLAIN_NAME = re.compile(r"[^./\\:\0][^/\\:\0]*(?:/[^./\\:\0][^/\\:\0]*)*").fullmatch

#----------------------------------------------------------------------------
# Names.

def clean_name(name: str) -> str:
    """A file name inside a data set with forward slashes and without '.' parts.

    Raises:
        ValueError: the name is absolute or leads out of the data set.
    """
    if PLAIN_NAME(name):        # There may be millions of names.
        return name
    clean = name.replace("\\", "/")
    if clean.startswith("/") or re.match(r"[A-Za-z]:", clean) or ".." in clean.split("/"):
        raise ValueError(f"the file name {name!r} leads out of the data set")
    return posixpath.normpath(clean)


def is_image_name(name: str) -> bool:
    """True for names that end like an image and are not hidden (as macOS leaves them in archives)."""
    if not name.lower().endswith(IMAGE_SUFFIXES):
        return False
    return not (name.startswith(".") or "/." in name or "__MACOSX" in name.split("/"))

#----------------------------------------------------------------------------
# Labels.

class LabelledStore(Protocol):
    """What is asked of a folder or an archive here."""

    @property
    def path(self) -> str | os.PathLike[str]:
        """Where it lies, for messages."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the images, sorted."""

    @property
    def labels(self) -> np.ndarray | None:
        """int [len(names)] if the labels are known to be right."""

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes of `labels`, if there are any."""

    @property
    def metadata(self) -> dict[str, object]:
        """The content of dataset.json."""


def json_object(where: str | os.PathLike[str], data: bytes, remedy: str) -> dict[str, object]:
    """The object in a JSON file inside a data set. Raises UserError if it is none."""
    try:
        content = parse_json(data, unique_keys)
    except ValueError as err:
        raise UserError(f"{where}: not valid JSON ({err}): {remedy}") from err
    if not isinstance(content, dict):
        raise UserError(f"{where}: must be an object: {remedy}")
    return content


def parse_metadata(where: str | os.PathLike[str], data: bytes) -> dict[str, object]:
    """The object in a dataset.json. Raises UserError if it is no JSON object."""
    return json_object(where, data, 'make it again, such as {"labels": [["0.png", 6]]}')


def label_table(store: LabelledStore) -> dict[str, int] | None:
    """File name -> label as dataset.json lists them, or None when it lists none.

    Raises:
        UserError: entries are not pairs of a name inside the data set and a class index, or contradict others; the
            first five are listed.
    """
    entries = store.metadata.get("labels")
    if not entries:
        return None
    where = f"{store.path}: {METADATA_NAME}"
    if not isinstance(entries, list):
        raise UserError(f'{where}: "labels" must be a list such as [["0.png", 6], ...]')
    wrong = [e for e in entries if not (isinstance(e, list) and len(e) == 2 and isinstance(e[0], str))]
    if wrong:
        raise UserError(f'{where}: the entry {_some(wrong, repr)} in "labels" must look like '
                        '["00000/img00000000.png", 6]')
    several = [e for e in entries if type(e[1]) is not int and with_several([single(e[1])])]
    if several:
        raise UserError(f"{where}: the label {_some(several, lambda e: f'{e[1]!r} of {e[0]}')} holds more than one "
                        "value: several labels per image are not supported: keep one for each image")
    pairs: list[tuple[str, object]] = [(e[0], e[1] if type(e[1]) is int else _number(e[1])) for e in entries]
    right = [(name, label) for name, label in pairs if type(label) is int and 0 <= label < MAX_CLASSES]
    if len(right) < len(pairs):
        odd = [(name, label) for name, label in pairs if type(label) is not int or not 0 <= label < MAX_CLASSES]
        raise UserError(f"{where}: the label {_some(odd, lambda pair: f'{pair[1]!r} of {pair[0]}')} must be a whole "
                        f"number from 0 to {MAX_CLASSES - 1}, the index of a class")
    return _table(where, right)


def _number(label: object) -> object:
    """The whole number that a label is; what is none stays."""
    number = whole_number(single(label))
    return label if number is None else number


def _some(items: Sequence[Item], describe: Callable[[Item], str]) -> str:
    """The first of `items` in words, or the first five of several."""
    return list_some([describe(item)[:200] for item in items])


def _table(where: str, entries: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Entries of the right form as a table by clean names."""
    table: dict[str, int] = {}
    outside, contradictions = [], []
    for name, label in entries:
        try:
            clean = clean_name(name)
        except ValueError as err:
            outside.append(str(err))
            continue
        if table.setdefault(clean, label) != label:
            contradictions.append(f"{clean} has two labels, {table[clean]} and {label}")
    if outside:
        raise UserError(f"{where}: {list_some(outside)}: name files relative to the data set")
    if contradictions:
        raise UserError(f"{where}: {list_some(contradictions)}: keep one")
    return table


def class_list(store: LabelledStore) -> list[str] | None:
    """Class names that dataset.json lists, or None. Raises UserError if it is no list of different names."""
    classes = store.metadata.get("classes")
    if classes is None:
        return None
    if not are_names(classes):
        raise UserError(f'{store.path}: {METADATA_NAME}: "classes" must be a list of names, which are text')
    if len({normalized_name(name) for name in classes}) != len(classes):
        raise UserError(f'{store.path}: {METADATA_NAME}: "classes" lists a name twice: names must differ')
    return classes


def labels_of(store: LabelledStore, table: dict[str, int]) -> np.ndarray:
    """Label of every image, int64 [len(store.names)].

    Raises:
        UserError: some images have no label, or a label has no name in "classes".
    """
    names = store.names
    if any(name not in table for name in names):        # File systems may have written names in another form.
        table = {normalized_name(name): label for name, label in table.items()}
        names = [normalized_name(name) for name in names]
    missing = [name for name in names if name not in table]
    if missing:
        raise UserError(f"{store.path}: {METADATA_NAME} gives no label for {len(missing)} of {len(store.names)} "
                        f"images: {list_some(missing)}: add them to \"labels\" or take the files away")
    labels = np.array([table[name] for name in names], dtype=np.int64)
    classes = class_list(store)
    wrong = np.flatnonzero(labels >= (MAX_CLASSES if classes is None else len(classes)))
    if classes is not None and len(wrong):
        found = [f"{labels[i]} of {store.names[i]}" for i in wrong[:6]]
        raise UserError(f'{store.path}: {METADATA_NAME}: the label {list_some(found[:5])} has no name '
                        f'({len(wrong)} images): "classes" lists {len(classes)}')
    return labels


def _check_gaps(store: LabelledStore, labels: np.ndarray) -> None:
    """Classes to learn without names must be numbered in a row: a forgotten one would be learnt from nothing."""
    empty = np.flatnonzero(np.bincount(labels) == 0).tolist()
    if empty:
        raise UserError(f'{store.path}: {METADATA_NAME}: labels go up to {labels.max()}, but no image has the label '
                        f'{list_some(empty)}: number classes from 0 without gaps, or name all of them in "classes", as '
                        'dataset_tool.py --allow-gaps does')


def read_labels(store: LabelledStore) -> tuple[np.ndarray, list[str]] | None:
    """Label of every image, integers [len(store.names)], and the names of the classes; None without labels.

    Raises:
        UserError: see `label_table`, `labels_of`, `class_list`; labels without names leave gaps.
    """
    labels, classes = store.labels, store.classes
    if labels is None:
        table = label_table(store)
        if table is None:
            return None
        labels, classes = labels_of(store, table), class_list(store)
    if not classes:
        _check_gaps(store, labels)
    return labels, classes or [str(i) for i in range(int(labels.max()) + 1)]

#----------------------------------------------------------------------------

def array_labels(where: str, array: np.ndarray, num: int) -> tuple[np.ndarray, list[str] | None]:
    """Labels in an array, int64 [num], and the names of the classes if they were names.

    Args:
        where: What the array is, for messages: 'samples.npz: arr_1'.
        array: Whole numbers of any type, or text, [num] or [num, 1]; or one-hot rows [num, C].
        num: How many images there are.

    Raises:
        UserError: it is none of these.
    """
    said = f"{where} is {array.dtype} {list(array.shape)}"
    if array.shape == (num, 1):
        array = array[:, 0]
    if array.dtype.kind in "US" and array.shape == (num,):
        texts = [str(x) for x in (np.char.decode(array, "utf-8", "replace") if array.dtype.kind == "S" else array)]
        if any(whole_number(text) is None for text in texts):
            labels, names = number_names(where, texts)
            return np.array(labels, dtype=np.int64), names
        array = np.array([whole_number(text) for text in texts], dtype=np.int64)
    if array.dtype.kind in "biuf" and array.ndim == 2 and len(array) == num and array.shape[1] > 1:
        return _of_one_hot(said, array), None
    if array.dtype.kind not in "iuf" or array.shape != (num,):
        raise UserError(f"{said}, but labels of {num} images must be whole numbers [{num}] or one-hot rows [{num}, "
                        "classes]: save them so")
    wrong = array[~((array >= 0) & (array < MAX_CLASSES) & (array == np.floor(array)))]
    if len(wrong):
        raise UserError(f"{said}: {len(wrong)} labels are no class: {list_some(wrong.tolist())}: a label is a whole "
                        f"number from 0 to {MAX_CLASSES - 1}")
    return array.astype(np.int64), None


def _of_one_hot(said: str, rows: np.ndarray) -> np.ndarray:
    """Labels of one-hot rows. Raises UserError if there is another row among them."""
    wrong = np.flatnonzero(~((rows == 0) | (rows == 1)).all(axis=1) | (np.count_nonzero(rows, axis=1) != 1))
    if len(wrong):
        raise UserError(f"{said}, but {len(wrong)} of its rows are not one-hot: {list_some(wrong.tolist())}: a row "
                        "must be zeros with a single one, because several labels per image are not supported")
    labels: np.ndarray = rows.argmax(axis=1).astype(np.int64)
    return labels

#----------------------------------------------------------------------------

def fingerprints(files: Iterable[tuple[str, int, int]], metadata: dict[str, object]) -> tuple[str, str]:
    """SHA-256 of (name, size, CRC-32) of files, labels and classes: as they are, and mirrored. 64 hex digits each."""
    digest = hashlib.sha256()
    chunk: list[str] = []
    for file in files:
        chunk.append(repr(file))
        if len(chunk) == 1 << 14:
            digest.update("".join(chunk).encode())
            chunk.clear()
    digest.update("".join(chunk).encode())
    described = {"labels": metadata.get("labels") or None, "classes": metadata.get("classes")}
    digest.update(json.dumps(described, sort_keys=True)[:-1].encode())
    mirrored = digest.copy()
    digest.update(b', "xflip": false}')
    mirrored.update(b', "xflip": true}')
    return digest.hexdigest(), mirrored.hexdigest()
