# SPDX-License-Identifier: Apache-2.0
"""Read pickles as data: nothing that a file names is imported, called or compiled.

The usual unpicklers call what the file tells them to call. This reader walks the same opcodes with a stack of its own
and only takes notes: a class or function becomes a `Symbol`, a call of one becomes a `Call` that holds its arguments
and what was to be put into the result. Real values are made for plain data alone: numbers, strings, containers, NumPy
arrays and scalars, and tensors, which stay views of the file until `TensorRecord.load` copies them.

Names outside a closed list (`torch_utils.pickle_names`) are refused, although they would not be run either: a snapshot
of a network has no use for them, so the file is not one. Pickles, `torch.save` files of both formats and the storages
inside pickles go through the same machine.
"""
import codecs
import contextlib
import io
import mmap
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dnnlib import UserError
from torch_utils.pickle_names import PYTHON2_NAMES, is_allowed, is_storage_class
from torch_utils.pickle_values import (
    MAKERS,
    STORAGE_DTYPES,
    Call,
    Limits,
    NumpyType,
    Refused,
    Storage,
    Symbol,
    TensorRecord,
    check_key,
    set_array_state,
)

VIEW_BYTES = 256                # Byte strings from this length on are views of the file, not copies.
TORCH_MAGIC = 0x1950a86a20f9469cfc6c    # First value of the older format of torch.save, which is a row of pickles.

#----------------------------------------------------------------------------
# The file's bytes.

class _Source:
    """Bytes with a position, readable by pickletools' argument readers. Short reads are for them to notice."""

    def __init__(self, data: memoryview):
        self.data, self.position = data, 0

    def view(self, count: int) -> memoryview:
        """Exactly `count` bytes, not copied."""
        if count > len(self.data) - self.position:
            raise ValueError(f"{count} bytes expected, the file ends before")
        self.position += count
        return self.data[self.position - count:self.position]

    def read(self, count: int) -> bytes:
        found = self.data[self.position:self.position + count].tobytes()
        self.position += len(found)
        return found

    def readline(self) -> bytes:
        # Text lines are names and numbers. A longer one comes back without its newline, which is an error downstream.
        chunk = bytes(self.data[self.position:self.position + 65536])
        return self.read(chunk.find(b"\n") + 1 or len(chunk))

#----------------------------------------------------------------------------
# The machine. Methods are named after pickle's opcodes; `pickletools` documents each.

_REFUSED = {
    "EXT1": "a class by its number in a registry", "EXT2": "a class by its number in a registry",
    "EXT4": "a class by its number in a registry", "NEXT_BUFFER": "data outside the file",
    "READONLY_BUFFER": "data outside the file",
}
_PUSHED = """INT BININT BININT1 BININT2 LONG LONG1 LONG4 STRING BINSTRING SHORT_BINSTRING SHORT_BINBYTES BINBYTES
    BINBYTES8 BYTEARRAY8 UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 FLOAT BINFLOAT""".split()


class _Machine:
    """Runs one pickle of `source` and returns the value it leaves."""

    def __init__(self, source: _Source, limits: Limits, allowed: Callable[[str, str], bool] = is_allowed,
                 persistent: Callable[[Any], Any] | None = None):
        self.source, self.limits, self.allowed, self.persistent = source, limits, allowed, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []        # Stacks below each MARK.
        self.memo: dict[int, Any] = {}
        self.symbols: dict[tuple[str, str], Symbol] = {}

    def run(self) -> Any:
        source, step = self.source, self.limits.step
        while True:
            step()
            name, reader, handler = _TABLE[source.read(1)]
            if name == "STOP":
                return self.stack.pop()
            if handler is None:
                raise Refused(f"asks for {_REFUSED[name]} (opcode {name}), which no network file needs")
            if reader is None:
                handler(self)
            else:
                handler(self, reader(source))

    # Stack and memo.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def op_NONE(self) -> None:
        self.stack.append(None)

    def op_NEWTRUE(self) -> None:
        self.stack.append(True)

    def op_NEWFALSE(self) -> None:
        self.stack.append(False)

    def op_PROTO(self, version: int) -> None:
        if version > 5:
            raise ValueError(f"protocol {version}")

    def op_FRAME(self, _length: int) -> None:
        """Frames only tell how much to read at once."""

    def op_POP(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def op_DUP(self) -> None:
        self.stack.append(self.stack[-1])

    def op_MARK(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    op_POP_MARK = pop_mark

    def op_PUT(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    op_BINPUT = op_LONG_BINPUT = op_PUT

    def op_MEMOIZE(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_GET(self, index: int) -> None:
        self.stack.append(self.memo[index])

    op_BINGET = op_LONG_BINGET = op_GET

    # Containers.

    def op_EMPTY_LIST(self) -> None:
        self.stack.append([])

    def op_EMPTY_TUPLE(self) -> None:
        self.stack.append(())

    def op_EMPTY_DICT(self) -> None:
        self.stack.append({})

    def op_EMPTY_SET(self) -> None:
        self.stack.append(set())

    def op_TUPLE(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def op_TUPLE1(self) -> None:
        self._tuple(1)

    def op_TUPLE2(self) -> None:
        self._tuple(2)

    def op_TUPLE3(self) -> None:
        self._tuple(3)

    def _tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("too few values for a tuple")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def op_LIST(self) -> None:
        items = self.pop_mark()
        self.stack.append(items)

    def op_DICT(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def op_FROZENSET(self) -> None:
        items = self.pop_mark()
        self.stack.append(frozenset(check_key(item) for item in items))

    def op_APPEND(self) -> None:
        self._extend([self.stack.pop()])

    def op_APPENDS(self) -> None:
        self._extend(self.pop_mark())

    op_ADDITEMS = op_APPENDS

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, set):
            target.update(check_key(item) for item in items)
        elif isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Call):
            target.elements.extend(items)
        else:
            raise TypeError(f"items for a {type(target).__name__}")

    def op_SETITEM(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def op_SETITEMS(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, dict):
            for key, value in pairs:
                target[check_key(key)] = value
        elif isinstance(target, Call):
            target.entries.extend(pairs)
        else:
            raise TypeError(f"entries for a {type(target).__name__}")

    # Names, calls and states: written down.

    def op_GLOBAL(self, names: tuple[str, str]) -> None:
        self.stack.append(self._symbol(*names))

    def op_STACK_GLOBAL(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self._symbol(module, name))

    def _symbol(self, module: Any, name: Any) -> Symbol:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is not a string")
        module = PYTHON2_NAMES.get(module, module)
        symbol = self.symbols.setdefault((module, name), Symbol(module, name))
        if not self.allowed(module, name):
            raise Refused(f"asks for {symbol}, which no network file needs")
        return symbol

    def op_REDUCE(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self._call(function, args)

    op_NEWOBJ = op_REDUCE

    def op_NEWOBJ_EX(self) -> None:
        kwargs, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if not isinstance(kwargs, dict):
            raise TypeError("keyword arguments that are no dict")
        self._call(function, args, kwargs)

    def op_INST(self, names: tuple[str, str]) -> None:
        args = tuple(self.pop_mark())
        self.op_GLOBAL(names)
        self._call(self.stack.pop(), args)

    def op_OBJ(self) -> None:
        function, *args = self.pop_mark()
        self._call(function, tuple(args))

    def _call(self, function: Any, args: Any, kwargs: dict[str, Any] | None = None) -> None:
        if not isinstance(args, tuple):
            raise TypeError("arguments that are no tuple")
        if not isinstance(function, Symbol | Call):
            raise TypeError(f"a call of a {type(function).__name__}")
        make = MAKERS.get((function.module, function.name)) if isinstance(function, Symbol) and not kwargs else None
        if make is not None:
            self.stack.append(make(self.limits, *args))
        elif isinstance(function, Symbol) and (function.module, function.name) == ("torch.storage", "_load_from_bytes"):
            self.stack.append(_read_storage(self.limits, *args))
        else:
            self.stack.append(Call(function, args, kwargs or {}))

    def op_BUILD(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Call):
            target.states.append(state)
        elif isinstance(target, np.ndarray):
            set_array_state(self.limits, target, state)
        elif isinstance(target, NumpyType):
            target.set_state(state)
        elif not isinstance(target, Symbol | dict | TensorRecord):  # Their attributes carry no data of networks.
            raise TypeError(f"a state for a {type(target).__name__}")

    def op_PERSID(self, name: str) -> None:
        self._persistent(name)

    def op_BINPERSID(self) -> None:
        self._persistent(self.stack.pop())

    def _persistent(self, name: Any) -> None:
        if self.persistent is None:
            raise Refused("asks for objects kept outside the file (persistent ids), which no network file needs")
        self.stack.append(self.persistent(name))


def _byte_string(length: str) -> Callable[[_Source], bytes | memoryview]:
    """Reader of a byte string after a length of this format: a view of the file if it is long."""
    width = struct.calcsize(length)

    def read_string(source: _Source) -> bytes | memoryview:
        (count,) = struct.unpack(length, source.view(width))
        view = source.view(count)
        return view if count >= VIEW_BYTES else view.tobytes()
    return read_string


def _line(source: _Source) -> str:
    line = source.readline()
    if not line.endswith(b"\n"):
        raise ValueError("a line without an end")
    return line[:-1].decode("utf-8")


def _two_lines(source: _Source) -> tuple[str, str]:
    return _line(source), _line(source)


def _quoted(source: _Source) -> str:
    """A string of protocol 0, as Python 2 wrote them."""
    line = _line(source).strip()
    # Unknown escapes would be kept with a warning; no writer makes them.
    if not re.fullmatch(r"""(['"])(?:[^\\]|\\[\\'"abfnrtvx0-7])*\1""", line):
        raise ValueError("a string without quotes")
    return codecs.escape_decode(line[1:-1].encode("latin1"))[0].decode("latin1")


_READERS = {"GLOBAL": _two_lines, "INST": _two_lines, "PERSID": _line, "STRING": _quoted,
            "SHORT_BINBYTES": _byte_string("<B"), "BINBYTES": _byte_string("<I"), "BINBYTES8": _byte_string("<Q"),
            "BYTEARRAY8": _byte_string("<Q")}
# Byte -> (name, reader of the argument or None, method or None).
_TABLE: dict[bytes, tuple[str, Callable[..., Any] | None, Callable[..., None] | None]] = {
    op.code.encode("latin1"): (
        op.name,
        _READERS.get(op.name) or (op.arg.reader if op.arg else None),
        _Machine.push if op.name in _PUSHED else getattr(_Machine, f"op_{op.name}", None))
    for op in pickletools.opcodes
}

#----------------------------------------------------------------------------
# torch.save: a zip archive, or (older) a row of pickles followed by the bytes of the storages.

class _Storages:
    """The storages that a torch.save file names by persistent ids, to be filled once their bytes are found."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.by_key: dict[str, list[Storage]] = {}

    def find(self, name: Any) -> Storage | Symbol | Call:
        """The object of a persistent id: ('storage', class, key, device, count[, None]), or, for a class that the
        older format keeps with its source text, ('module', class, file name, text); the text is left alone."""
        if isinstance(name, tuple) and len(name) == 4 and name[0] == "module" and isinstance(name[1], Symbol | Call):
            return name[1]
        tag, kind, key, _device, count, *rest = name
        if tag != "storage" or not isinstance(kind, Symbol) or not isinstance(key, str) or rest not in ([], [None]):
            raise Refused("asks for objects kept outside the file (persistent ids), which no network file needs")
        if not is_storage_class(kind.module, kind.name) or kind.name not in STORAGE_DTYPES:
            raise Refused(f"holds a tensor storage of unknown class {kind}")
        dtype = STORAGE_DTYPES[kind.name]
        if type(count) is not int or count < 0:
            raise ValueError("size of a storage")
        known = self.by_key.setdefault(key, [])
        nbytes = count * (dtype.itemsize if dtype else 1)
        for storage in known:
            if storage.dtype == dtype and storage.nbytes == nbytes:
                return storage
        known.append(Storage(dtype, nbytes, self.limits))
        return known[-1]


class _View(io.RawIOBase):
    """A file for `zipfile` over bytes that are in memory or mapped, without a copy of them."""

    def __init__(self, data: memoryview):
        self.data, self.position = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: len(self.data)}[whence]
        if start + offset < 0:
            raise ValueError("a position before the file")
        self.position = start + offset
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: Any) -> int:
        found = self.data[self.position:self.position + len(buffer)]
        buffer[:len(found)] = found
        self.position += len(found)
        return len(found)


def _member(data: memoryview, info: zipfile.ZipInfo, verify: bool) -> memoryview:
    """The bytes of an archive's member, where they lie. torch.save packs nothing, so nothing is unpacked."""
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise Refused("holds packed members, which torch.save does not write")
    source = _Source(data)
    source.position = info.header_offset
    header = source.view(30)
    if bytes(header[:4]) != b"PK\x03\x04":
        raise ValueError("a member without a header")
    source.view(sum(struct.unpack("<HH", header[26:30])))       # Its name once more, and further fields.
    found = source.view(info.file_size)
    if verify and zlib.crc32(found) != info.CRC:
        raise zipfile.BadZipFile(info.filename)
    return found


def _read_torch_zip(data: memoryview, limits: Limits, allowed: Callable[[str, str], bool], verify: bool = True) -> Any:
    storages = _Storages(limits)
    with zipfile.ZipFile(io.BufferedReader(_View(data))) as archive:
        files = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in files if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("an archive without a data.pkl")
    prefix = pickles[0].removesuffix("data.pkl")
    if prefix + "byteorder" in files and bytes(_member(data, files[prefix + "byteorder"], True)) != b"little":
        raise Refused("was written on a big-endian machine")
    root = _Machine(_Source(_member(data, files[pickles[0]], True)), limits, allowed, storages.find).run()
    for key, known in storages.by_key.items():
        view = _member(data, files[f"{prefix}data/{key}"], verify)
        for storage in known:
            storage.fill(view)
    return root


def _read_torch_legacy(source: _Source, limits: Limits, allowed: Callable[[str, str], bool]) -> Any:
    """What follows the magic number: version, system, the object, the keys of its storages, their bytes."""
    version, system = (_Machine(source, limits, allowed).run() for _ in range(2))
    if version != 1001 or not isinstance(system, dict) or "little_endian" not in system:
        raise ValueError("version of torch.save")
    if system["little_endian"] is not True:
        raise Refused("was written on a big-endian machine")
    storages = _Storages(limits)
    root = _Machine(source, limits, allowed, storages.find).run()
    keys = _Machine(source, limits, allowed).run()
    if not isinstance(keys, list) or set(keys) != set(storages.by_key):
        raise ValueError("keys of storages")
    for key in keys:
        (count,) = struct.unpack("<q", source.view(8))
        known = storages.by_key[key]
        view = source.view(count * (known[0].dtype.itemsize if known[0].dtype else 1))
        for storage in known:
            storage.fill(view)
    return root


def _read_any(data: memoryview, limits: Limits, allowed: Callable[[str, str], bool]) -> Any:
    """A torch.save file of either format, or one pickle."""
    if bytes(data[:4]) == b"PK\x03\x04":
        return _read_torch_zip(data, limits, allowed)
    source = _Source(data)
    first = _Machine(source, limits, allowed).run()
    if type(first) is int and first == TORCH_MAGIC:
        return _read_torch_legacy(source, limits, allowed)
    return first


def _read_storage(limits: Limits, payload: Any) -> Storage:
    """The storage inside the bytes that were to go to torch.storage._load_from_bytes. They may name storages only."""
    if not isinstance(payload, bytes | memoryview):
        raise TypeError("a storage that is no byte string")
    storage = _read_any(memoryview(payload), limits, is_storage_class)
    if not isinstance(storage, Storage):
        raise TypeError("a storage of another type")
    return storage

#----------------------------------------------------------------------------

@contextlib.contextmanager
def _errors_as_one_line(name: str, size: int) -> Iterator[None]:
    """What is wrong with a file, whatever went wrong while it was read. Raises UserError."""
    try:
        yield
    except Refused as err:
        raise UserError(f"{name}: {err}: nothing was run, and the file is not used. "
                        "Take one from a source you trust") from err
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EOFError, RuntimeError, MemoryError,
            struct.error, zipfile.BadZipFile) as err:
        raise UserError(f"{name}: damaged or cut off (size {size} bytes), or not a pickle at all: "
                        "copy it again from where it came") from err


def read(path: str | os.PathLike[str]) -> Any:
    """Read a pickle or a torch.save file without running anything from it.

    Returns:
        The object graph: plain values, `Symbol`, `Call`, `TensorRecord` and NumPy arrays. Objects of classes are
        calls; their attributes are in `Call.state`. Graphs may contain cycles, and long byte strings are memoryviews.

    Raises:
        UserError: no such file; damaged or cut off; asks for anything that a network file does not need.
    """
    data = _mapped(path)
    limits = Limits(str(path), len(data))
    with _errors_as_one_line(str(path), len(data)):
        return _read_any(data, limits, is_allowed)


def read_torch_zip(path: str | os.PathLike[str], verify: bool = True) -> Any:
    """The same for a file that torch.save wrote in its present format.

    Args:
        path: The file.
        verify: Compare the bytes of tensors with their checksums; else they are not touched before they are used.
    """
    data = _mapped(path, writable=not verify)
    limits = Limits(str(path), len(data))
    with _errors_as_one_line(str(path), len(data)):
        return _read_torch_zip(data, limits, is_allowed, verify)


def _mapped(path: str | os.PathLike[str], writable: bool = False) -> memoryview:
    """The bytes of a file, which come to memory as they are read. Writing to them changes a copy, not the file."""
    access = mmap.ACCESS_COPY if writable else mmap.ACCESS_READ
    try:
        with open(path, "rb") as f:
            is_empty = os.fstat(f.fileno()).st_size == 0        # Which cannot be mapped.
            return memoryview(b"" if is_empty else mmap.mmap(f.fileno(), 0, access=access))
    except (FileNotFoundError, IsADirectoryError) as err:
        raise UserError(f"{path}: no such file") from err
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror})") from err


def read_bytes(data: bytes, name: str) -> Any:
    """As `read`, for the content of a file; `name` is for messages."""
    limits = Limits(name, len(data))
    with _errors_as_one_line(name, len(data)):
        return _read_any(memoryview(data), limits, is_allowed)
