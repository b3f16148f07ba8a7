# SPDX-License-Identifier: Apache-2.0
"""Images in databases: LSUN's lmdb and the Parquet files of Hugging Face. Both need an optional package.

These two formats are parsed by libraries in C and C++ that do not promise to withstand files made to attack them; use
them with files from a source you trust.
"""
import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import labels
from data_prep.sources.base import NoMetadata, Source
from data_prep.sources.shards import folder_names
from dnnlib import UserError
from dnnlib.util import list_some, parse_json
from training.data.splits import choose, in_order

IMAGE_COLUMNS = ("image", "img", "images", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes", "picture")
SPLIT_COLUMN = "split"
CLASS_COLUMNS = ("label", "labels", "fine_label", "class", "cls", "class_id", "category")


def _need(package: str, source: str | os.PathLike[str]) -> Any:
    """An optional package. Raises UserError that tells how to install it."""
    try:
        if package == "lmdb":
            import lmdb
            return lmdb
        import pyarrow.parquet
        return pyarrow.parquet
    except ImportError as err:
        raise UserError(f"{source}: needs the package {package}: pip install {package}") from err

#----------------------------------------------------------------------------
# LSUN.

class LmdbStore(NoMetadata):
    """The values of an lmdb database, image files, sorted by key. It can be pickled, and used after a fork."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._env: tuple[int, Any] | None = None        # The process that opened it, and the database.
        lmdb = _need("lmdb", path)
        try:
            with self._environment().begin(buffers=True) as view:
                self._keys = [bytes(key) for key, _value in view.cursor()]
        except lmdb.Error as err:
            raise UserError(f"{path}: cannot be read as an lmdb database ({err}): copy it again") from err
        self.names = [key.decode("ascii") if key.isascii() else key.hex() for key in self._keys]

    def _environment(self) -> Any:
        if self._env is None or self._env[0] != os.getpid():        # Another process must not use it.
            env = _need("lmdb", self.path).open(str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False,
                                                readahead=False, max_readers=1)
            self._env = (os.getpid(), env)
        return self._env[1]

    def _value(self, index: int) -> bytes:
        lmdb = _need("lmdb", self.path)
        try:
            with self._environment().begin() as view:
                value = view.get(self._keys[index])
        except lmdb.Error as err:
            raise OSError(f"the database is damaged ({err})") from err
        if value is None:
            raise OSError("the database has changed: the key is gone")
        return bytes(value)

    def where(self, index: int) -> str:
        return f"{self.path}: {self.names[index]}"

    def size(self, index: int) -> int:
        return len(self._value(index))

    def read(self, index: int) -> bytes:
        return self._value(index)

    def close(self) -> None:
        if self._env is not None and self._env[0] == os.getpid():
            self._env[1].close()
        self._env = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_env": None}


def lsun(path: Path) -> Source:
    """The images of an lmdb database, without labels. Raises UserError."""
    store = LmdbStore(path)
    if not store.names:
        raise UserError(f"{path}: the database is empty: copy it again")
    return Source(store, range(len(store.names)), layout="lmdb", kind="lmdb database")

#----------------------------------------------------------------------------
# Parquet.

class ParquetStore(NoMetadata):
    """The images in a column of Parquet files, in the order of files and rows. One row group is in memory at a time.

    It can be pickled, and used after a fork.
    """

    def __init__(self, path: str | os.PathLike[str], files: Sequence[Path]):
        self.path, self._files = Path(path), list(files)
        _need("pyarrow", path)
        self.values: list[Any] = []                 # What the column of labels holds.
        self.splits: list[Any] = []                 # What the column of splits holds, if there is one.
        self.classes: list[str] | None = None
        self.column = ""
        self.label_column: str | None = None
        self._split_column: str | None = None
        self._group: tuple[int, int, list[Any]] | None = None
        self.names: list[str] = []
        entries: list[tuple[int, int, int]] = []    # File, row group and row in it.
        folders = folder_names(self.path, self._files)
        for number, file in enumerate(self._files):
            for group, rows in enumerate(self._index(file)):
                entries.extend((number, group, row) for row in range(rows))
            known = len(self.names)
            self.names.extend(f"{folders[number]}/{i:08d}.png" for i in range(len(entries) - known))
        self._entries = np.array(entries, dtype=np.int64).reshape(-1, 3)

    def _index(self, file: Path) -> list[int]:
        """Rows of every row group; takes the labels with it."""
        import pyarrow
        with _open_parquet(file) as table:
            schema = table.schema_arrow
            if not self.column:
                self.column = _image_column(file, schema)
                self.label_column = next((name for name in CLASS_COLUMNS if name in schema.names), None)
                self.classes = _class_names(schema, self.label_column)
                self._split_column = _split_column(file, schema)
            columns = [name for name in (self.column, self.label_column, self._split_column) if name is not None]
            if missing := [name for name in columns if name not in schema.names]:
                raise UserError(f"{file}: has no column {list_some(missing)}, unlike {self._files[0]}: "
                                f"use files of one data set")
            try:
                for name, values in ((self.label_column, self.values), (self._split_column, self.splits)):
                    if name is not None:
                        values.extend(table.read(columns=[name])[name].to_pylist())
            except (pyarrow.ArrowException, OSError, ValueError) as err:
                raise UserError(f"{file}: cannot be read as Parquet ({_line(err)}): copy it again") from err
            return [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]

    def _value(self, index: int) -> bytes:
        import pyarrow
        number, group, row = self._entries[index].tolist()
        if self._group is None or self._group[:2] != (number, group):
            try:
                with _open_parquet(self._files[number]) as table:
                    self._group = (number, group, self._column(table, group))
            except (pyarrow.ArrowException, UserError, ValueError) as err:
                raise OSError(f"the file is damaged ({_line(err)})") from err
        value = self._group[2][row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise OSError("the row holds no image" if data is None else "the row names a file instead of an image")
        return data

    def _column(self, table: Any, group: int) -> Any:
        # Without threads, which a process that came by a fork does not have.
        return table.read_row_group(group, columns=[self.column], use_threads=False)[self.column]

    def where(self, index: int) -> str:
        number = int(self._entries[index, 0])
        return f"{self._files[number]}: row {int(self.names[index][-12:-4])}"

    def size(self, index: int) -> int:
        return len(self._value(index))

    def read(self, index: int) -> bytes:
        return self._value(index)

    def close(self) -> None:
        self._group = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_group": None}


def _line(err: Exception) -> str:
    return " ".join(str(err).split())[:200]


def _image_column(file: Path, schema: Any) -> str:
    """The column that holds images: a struct with bytes, or bytes under a telling name. Raises UserError."""
    import pyarrow
    for field in schema:
        if pyarrow.types.is_struct(field.type) and "bytes" in [inner.name for inner in field.type]:
            return str(field.name)
    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
                return name
    raise UserError(f"{file}: no column of images among {list_some(schema.names)}: one must hold bytes and be called "
                    f"{list_some(list(IMAGE_COLUMNS), 3)}")


def _split_column(file: Path, schema: Any) -> str | None:
    """The column that says which split a row belongs to, by its name. Raises UserError: it holds no single values."""
    import pyarrow
    if SPLIT_COLUMN not in schema.names:
        return None
    kind = schema.field(SPLIT_COLUMN).type
    if pyarrow.types.is_nested(kind):
        raise UserError(f"{file}: the column '{SPLIT_COLUMN}' holds {kind}, where each row's split is looked for: give "
                        "it a word or number per row, or another name")
    return SPLIT_COLUMN


def _split_name(value: Any) -> str:
    """What a row's split is called; "" if it has none."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return "" if value is None else str(value).strip().lower()


def _class_names(schema: Any, column: str | None) -> list[str] | None:
    """The names that Hugging Face keeps beside the table."""
    try:
        features = parse_json(schema.metadata[b"huggingface"])["info"]["features"]
        names = features[column]["names"]
    except (TypeError, KeyError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


def parquet(path: str | os.PathLike[str], files: Sequence[Path], use_labels: bool, allow_gaps: bool,
            split: str | None, option: str) -> Source:
    """The images and labels of Parquet files, of those rows that a column calls the wanted split. Raises UserError."""
    store = ParquetStore(path, files)
    if not store.names:
        raise UserError(f"{path}: no rows in it: copy it again")
    rows: Sequence[int] = range(len(store.names))
    counts: dict[str, int] = {}
    chosen: list[str] = []
    keys = [_split_name(value) for value in store.splits]
    if any(keys):
        found = collections.Counter(key for key in keys if key)
        counts = {key: found[key] for key in in_order(found)}
        loose = [store.where(i) for i, key in enumerate(keys) if not key]
        chosen = choose(str(path), counts, split, option, loose=loose)
        rows = [i for i, key in enumerate(keys) if key in chosen]
    source = Source(store, rows, layout="parquet", kind="Parquet", splits=counts, chosen=tuple(chosen))
    if store.label_column is None or not use_labels:
        return source
    values, classes = _labels_of_rows(f"{path}: column {store.label_column}", store, rows, allow_gaps)
    return dataclasses.replace(source, labels=values, classes=classes)


def _labels_of_rows(where: str, store: ParquetStore, rows: Sequence[int],
                    allow_gaps: bool) -> tuple[list[int], list[str] | None]:
    """Labels of some rows, and the classes, which are those of all rows. Raises UserError."""
    def of(some: Sequence[int]) -> tuple[list[int], list[str] | None]:
        return labels.encode(where, [store.names[i] for i in some], [store.values[i] for i in some], store.classes,
                             allow_gaps)

    if len(rows) == len(store.names):
        return of(rows)
    try:
        everything, classes = of(range(len(store.names)))
    except UserError:           # Another split has no labels, as test sets often have none.
        return of(rows)
    return [everything[i] for i in rows], classes or [str(i) for i in range(max(everything) + 1)]


def _open_parquet(file: Path) -> Any:
    """A Parquet file, open. Raises UserError."""
    parquet = _need("pyarrow", file)
    import pyarrow
    try:
        return parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError, ValueError) as err:
        raise UserError(f"{file}: cannot be read as Parquet ({_line(err)}): copy it again") from err


def num_rows(file: Path) -> int:
    """Rows of a Parquet file. Raises UserError."""
    with _open_parquet(file) as table:
        return int(table.metadata.num_rows)
