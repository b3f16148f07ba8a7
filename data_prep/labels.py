# SPDX-License-Identifier: Apache-2.0
"""Class labels of a source: from a dataset.json, from a CSV or JSON file, from sub-folders.

What is wrong with labels is usually wrong with many of them, so every message lists the first five and the count.
"""
import collections
import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from dnnlib import UserError
from dnnlib.classes import Classes, are_names, is_fraction, number_names, single, whole_number, with_several
from dnnlib.util import format_bytes, list_some, normalized_name, parse_json, unique_keys
from training.data.labels import MAX_CLASSES, clean_name

MAX_LABEL_FILE = 1 << 30
NAME_COLUMNS = ("file_name", "filename", "file", "path", "image", "image_id", "name", "id")
DELIMITERS = ("\t", ";", ",")
LABEL_COLUMNS = ("label", "class", "class_id", "category", "target", "labels", "breed", "species")

#----------------------------------------------------------------------------
# Values to class indices.

def encode(where: str, names: Sequence[str], values: Sequence[Any], classes: list[str] | None = None,
           allow_gaps: bool = False) -> tuple[list[int], list[str] | None]:
    """Label values of images as class indices, and the names of the classes if there are any.

    Args:
        where: What the labels come from, for messages.
        names: The images.
        values: For each a class index, as a number or as text, a class name, or None if it has no label.
        classes: Names by index, if given beside the labels. Then a value may also be one of them.
        allow_gaps: Accept indices that no image has.

    Raises:
        UserError: some images have no label or several, a label is neither index nor name, or an index in between is
            unused.
    """
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        raise UserError(f"{where}: no label for {len(missing)} of {len(names)} images: {list_some(missing)}: "
                        f"add them, take the files away, or add --no-labels")
    values = [single(value) for value in values]
    refuse_several(where, values)
    if classes is None and any(isinstance(value, str) and _is_word(value) for value in values):
        odd = [f"{n} ({v!r})" for n, v in zip(names, values, strict=True) if not (isinstance(v, str) and _is_word(v))]
        if odd:
            raise UserError(f"{where}: {len(odd)} of {len(names)} labels are no class names, but others are: "
                            f"{list_some(odd)}: use names or indices for all")
        return number_names(where, values)
    labels: list[Any] = _indices(values, classes)
    top = len(classes) if classes is not None else MAX_CLASSES
    wrong = [f"{n} ({value!r})" for n, value, label in zip(names, values, labels, strict=True)
             if label is None or not 0 <= label < top]
    if wrong:
        known = f"from 0 to {top - 1}" + (" or one of the class names" if classes is not None else "")
        raise UserError(f"{where}: {len(wrong)} labels are wrong: {list_some(wrong)}: "
                        f"a label is the index of a class, a whole number {known}: correct them, or add --no-labels")
    if classes is None and (gaps := unused(labels)):
        if not allow_gaps:
            raise UserError(f"{where}: labels go up to {max(labels)}, but {len(gaps)} classes have no images: "
                            f"{list_some(gaps)}: number classes from 0 without gaps, name all of them in \"classes\", "
                            f"or add --allow-gaps")
        classes = [str(i) for i in range(max(labels) + 1)]      # Named, an empty class is no mistake.
    return labels, classes


def _is_word(text: str) -> bool:
    return whole_number(text) is None and not is_fraction(text)


def _indices(values: Sequence[Any], classes: list[str] | None) -> list[int | None]:
    """Class indices; None for what is no class."""
    meant: Callable[[Any], int | None] = whole_number if classes is None else Classes(classes).index
    return [value if type(value) is int else meant(value) for value in values]


def refuse_several(where: str, values: Iterable[Any]) -> None:
    """Raises UserError if an image has more than one label."""
    several = [repr(value)[:80] for value in with_several(values)]
    if several:
        raise UserError(f"{where}: {len(several)} labels hold more than one value: {list_some(several)}: several "
                        f"labels per image are not supported: keep one for each image, for example in a file for "
                        f"--labels, or add --no-labels")


def unused(labels: Iterable[int]) -> list[int]:
    """Class indices below the largest that no image has."""
    used = set(labels)
    return [i for i in range(max(used)) if i not in used]

#----------------------------------------------------------------------------
# Files of labels.

def _clean_names(where: str, names: Sequence[str]) -> list[str]:
    """Names in labels, with forward slashes and composed letters. Raises UserError for those that lead elsewhere."""
    clean, bad = [], []
    for name in names:
        try:
            clean.append(normalized_name(clean_name(name)))
        except ValueError:
            bad.append(name)
    if bad:
        raise UserError(f"{where}: {len(bad)} names lead out of the data set: {list_some(bad)}: "
                        f"name files relative to the data set")
    return clean


def table(where: str, entries: Any) -> dict[str, Any]:
    """Name -> value of a list such as [["0.png", 6], ...]. Raises UserError."""
    if not isinstance(entries, list):
        raise UserError(f'{where}: "labels" must be a list such as [["0.png", 6], ...]')
    refuse_several(where, (single(e[1]) for e in entries if isinstance(e, list) and len(e) == 2))
    entries = [[e[0], single(e[1])] if isinstance(e, list) and len(e) == 2 else e for e in entries]
    odd = [repr(e)[:80] for e in entries if not (isinstance(e, list) and len(e) == 2 and isinstance(e[0], str)
                                                  and isinstance(e[1], int | float | str))]
    if odd:
        raise UserError(f'{where}: {len(odd)} entries in "labels" are wrong: {list_some(odd)}: they must look like '
                        f'["00000/img00000000.png", 6]')
    found: dict[str, Any] = {}
    twice = []
    for name, value in zip(_clean_names(where, [e[0] for e in entries]), (e[1] for e in entries), strict=True):
        if name in found and found[name] != value:
            twice.append(f"{name} ({found[name]!r} and {value!r})")
        found.setdefault(name, value)
    if twice:
        raise UserError(f"{where}: {len(twice)} files have two labels: {list_some(twice)}: keep one of each")
    return found


def class_names(where: str, classes: Any) -> list[str] | None:
    """The names in "classes". Raises UserError if it is no list of different names."""
    if classes is None:
        return None
    if not classes or not are_names(classes):
        raise UserError(f'{where}: "classes" must be a list of names, which are text')
    if len({normalized_name(name) for name in classes}) != len(classes):
        raise UserError(f'{where}: "classes" lists a name twice: names must differ')
    return classes


def from_metadata(where: str, metadata: dict[str, Any], names: Sequence[str],
                  allow_gaps: bool = False) -> tuple[list[int] | None, list[str] | None]:
    """Labels and class names as a dataset.json lists them; (None, None) if it lists none. Raises UserError."""
    if not metadata.get("labels"):
        return None, None
    entries, classes = table(where, metadata["labels"]), class_names(where, metadata.get("classes"))
    return encode(where, names, [entries.get(normalized_name(name)) for name in names], classes, allow_gaps)


def _number_or_name(text: str) -> int | str:
    number = whole_number(text)
    return text.strip() if number is None else number


def _columns(heads: Sequence[str]) -> tuple[int | None, int | None]:
    """Which columns hold file and label, by the names in the first line."""
    heads = [head.strip().lower().lstrip("\ufeff") for head in heads]
    return (next((heads.index(c) for c in NAME_COLUMNS if c in heads), None),
            next((heads.index(c) for c in LABEL_COLUMNS if c in heads), None))


def _csv_rows(text: str) -> list[list[str]]:
    """Rows of a table whose columns are parted by tabs, semicolons or commas: whichever makes a table of it."""
    text = text.lstrip("\r\n")
    first = text.partition("\n")[0]
    rows: list[list[str]] = [[line] for line in text.splitlines() if line.strip()]
    for delimiter in DELIMITERS:
        if delimiter in first:
            rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
            if None not in _columns(rows[0]) or {len(row) for row in rows} == {2}:
                break
    return rows


def _csv_entries(where: str, text: str) -> list[list[Any]]:
    """Rows of two columns, or of a table whose first line names the columns. Raises UserError."""
    rows = _csv_rows(text)
    if not rows:
        raise UserError(f"{where}: is empty: it must hold lines such as cat/1.png,3")
    name_at, label_at = _columns(rows[0])
    width = len(rows[0])
    if name_at is not None and label_at is not None:
        rows = rows[1:]
    elif width == 2:
        name_at, label_at = 0, 1
    else:
        raise UserError(f"{where}: {width} columns, and none are called {NAME_COLUMNS[0]} and "
                        f"{LABEL_COLUMNS[0]}: name them so in the first line, or keep two: file and label (several "
                        f"labels per image are not supported)")
    short = [",".join(row)[:80] for row in rows if len(row) <= max(name_at, label_at) or not row[label_at].strip()]
    if short:
        raise UserError(f"{where}: {len(short)} lines have no label: {list_some(short)}: complete or remove them")
    long = [",".join(row)[:80] for row in rows if any(cell.strip() for cell in row[width:])]
    if long:
        raise UserError(f"{where}: {len(long)} lines have more values than the first, which has {width}: "
                        f"{list_some(long)}: several labels per image are not supported: keep one, and put names with "
                        f"commas in quotes")
    return [[row[name_at].strip(), _number_or_name(row[label_at])] for row in rows]


def read_label_file(path: str) -> tuple[dict[str, Any], list[str] | None]:
    """Name -> value, and class names if listed, from a .csv, .tsv, .txt or .json file.

    JSON is {"labels": [[name, label], ...], "classes": [...]}, a list of such pairs, or {name: label, ...}.

    Raises:
        UserError: no such file, or its content is not as described.
    """
    where = f"--labels={path}"
    try:
        if Path(path).stat().st_size > MAX_LABEL_FILE:
            raise UserError(f"{where}: larger than {format_bytes(MAX_LABEL_FILE)}: not a file of labels")
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as err:
        raise UserError(f"{where}: cannot be read ({err.strerror}): check the path") from err
    except UnicodeDecodeError as err:
        raise UserError(f"{where}: not a text file in UTF-8: save it again with this encoding (a spreadsheet calls it "
                        '"CSV UTF-8"), or as JSON') from err
    if not path.lower().endswith(".json"):
        try:
            return table(where, _csv_entries(where, text)), None
        except csv.Error as err:
            raise UserError(f"{where}: not valid CSV ({err}): save it again") from err
    try:
        content = parse_json(text, unique_keys)
    except ValueError as err:
        raise UserError(f"{where}: not valid JSON ({err}): save it again") from err
    if isinstance(content, dict) and "labels" not in content:
        content = {"labels": [[name, value] for name, value in content.items()]}
    if isinstance(content, list):
        content = {"labels": content}
    if not isinstance(content, dict) or not content["labels"]:
        raise UserError(f'{where}: lists no labels: it must look like {{"labels": [["cat/1.png", 0], ...]}}')
    return table(where, content["labels"]), class_names(where, content.get("classes"))


def _forms(name: str) -> list[str]:
    """How a label file may call an image, most exact first."""
    name = normalized_name(name)
    base = name.rpartition("/")[2]
    return [name, name.rpartition(".")[0], base, base.rpartition(".")[0]]


def from_file(path: str, names: Sequence[str], allow_gaps: bool = False) -> tuple[list[int], list[str] | None]:
    """Labels of images out of a label file, which may name them by path or by file name, with or without suffix.

    Labels of files that are not in the source do not matter. Raises UserError.
    """
    entries, classes = read_label_file(path)
    for form in range(4):
        keys = [_forms(name)[form] for name in names]
        if any(key in entries for key in keys):
            break
    else:
        raise UserError(f"--labels={path}: names none of the images: it lists {list_some(list(entries))}, the source "
                        f"holds {list_some(list(names))}: use paths relative to the source")
    if len(set(keys)) != len(keys):
        counts = collections.Counter(keys)
        twice = [key for key, count in counts.items() if count > 1 and key in entries]
        if twice:
            raise UserError(f"--labels={path}: {len(twice)} names fit several images: {list_some(twice)}: "
                            f"use paths relative to the source")
    return encode(f"--labels={path}", names, [entries.get(key) for key in keys], classes, allow_gaps)

#----------------------------------------------------------------------------
# Sub-folders.

def from_folders(where: str, names: Sequence[str]) -> tuple[list[int] | None, list[str] | None]:
    """Labels by sub-folder: the folder names are the classes, numbers in the order of numbers.

    A folder that wraps everything else does not count. No labels when there are no sub-folders or when they are
    those of the official format, which only keep folders small. Raises UserError if only some are in a folder.
    """
    if all(re.fullmatch(r"\d{5}/img\d{8}\.\w+", name) for name in names):
        return None, None
    parts = [name.split("/") for name in names]
    while len({p[0] for p in parts}) == 1 and min(len(p) for p in parts) > 2:
        parts = [p[1:] for p in parts]
    loose = [name for name, p in zip(names, parts, strict=True) if len(p) == 1]
    if len(loose) == len(names):
        return None, None
    if loose:
        raise UserError(f"{where}: sub-folders are classes, but {len(loose)} of {len(names)} images are in none: "
                        f"{list_some(loose)}: move them into one, or add --no-labels")
    return number_names(where, [p[0] for p in parts])
