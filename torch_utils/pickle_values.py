# SPDX-License-Identifier: Apache-2.0
"""What `torch_utils.safe_pickle` makes of a file: notes of names and calls, and plain data rebuilt with checks.

Real values are made for numbers, strings, containers, NumPy arrays and scalars, and tensors. Everything else stays a
note: a `Symbol` for a class or function, a `Call` for what should have been called.
"""
import collections
import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch

from dnnlib import EasyDict, UserError

# A published snapshot has some 100,000 opcodes; a file of millions is there to fill the memory.
MAX_OPCODES = 5_000_000
# Copies made of the file's bytes (arrays, loaded tensors): several views may share bytes, but not without end.
COPIES_PER_BYTE, COPIES_EXTRA = 4, 64 << 20
OPCODE_BYTES = 128              # What one opcode, a byte of the file, leaves in memory: a set more, a tuple less.
MAX_DIMENSIONS = 16
MAX_KEY_PARTS = 64              # In a tuple used as a key: hashing deep ones would exhaust the interpreter's stack.

#----------------------------------------------------------------------------
# Limits.

class Refused(Exception):
    """The file asks for something that is never done; the message says what."""


class Limits:
    """What reading one file may cost."""

    def __init__(self, name: str, nbytes: int):
        self.name = name                # Name of the file, for messages.
        self.opcodes = 0
        self.copied = 0
        self.max_copied = COPIES_PER_BYTE * nbytes + COPIES_EXTRA
        self.max_opcodes = min(MAX_OPCODES, self.max_copied // OPCODE_BYTES)

    def step(self) -> None:
        """Count an opcode."""
        self.opcodes += 1
        if self.opcodes > self.max_opcodes:
            raise Refused(f"holds more than {self.max_opcodes} objects, which no network file of its size needs")

    def copy(self, nbytes: int) -> None:
        """Count a copy of `nbytes` bytes before it is made."""
        self.copied += nbytes
        if self.copied > self.max_copied:
            raise Refused("its arrays claim many times the data that the file holds")

#----------------------------------------------------------------------------
# Notes.

@dataclasses.dataclass(eq=False, slots=True)
class Symbol:
    """A class or function that the file names. It is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}"[:100])[1:-1]


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Call:
    """A call or a construction that was written down instead of being made."""

    function: Any               # A Symbol, or another Call that stands for a class or function.
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    states: list[Any] = dataclasses.field(default_factory=list)     # What was to go to __setstate__ or __dict__.
    elements: list[Any] = dataclasses.field(default_factory=list)   # What was to be appended or added.
    entries: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)    # What was to be set as [key] = value.

    @property
    def state(self) -> Any:
        """The last state, None if there is none."""
        return self.states[-1] if self.states else None

    def calls(self, module: str, name: str) -> bool:
        """Whether the function is `module.name`."""
        return isinstance(self.function, Symbol) and (self.function.module, self.function.name) == (module, name)


def check_key(key: Any) -> Any:
    """`key`, if it is plain enough to be hashed.

    Raises:
        TypeError: it is not.
    """
    parts, pending = 0, [key]
    while pending:
        part = pending.pop()
        parts += 1
        if isinstance(part, tuple) and parts <= MAX_KEY_PARTS:
            pending.extend(part[:MAX_KEY_PARTS + 1])
        elif parts > MAX_KEY_PARTS or not isinstance(
                part, str | bytes | memoryview | int | float | complex | np.generic | Symbol | Call | None):
            raise TypeError(f"a {type(part).__name__} as a key")
    return key

#----------------------------------------------------------------------------
# Tensors.

STORAGE_DTYPES: dict[str, torch.dtype | None] = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": None,
}


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Storage:
    """Bytes of one or more tensors."""

    dtype: torch.dtype | None   # None: untyped.
    nbytes: int                 # As declared; `fill` compares it with what is there.
    limits: Limits
    view: memoryview | None = None

    def fill(self, view: memoryview) -> None:
        """Give the storage its bytes."""
        if len(view) != self.nbytes:
            raise ValueError(f"a storage of {self.nbytes} bytes has {len(view)}")
        self.view = view


@dataclasses.dataclass(frozen=True, eq=False, slots=True, repr=False)
class TensorRecord:
    """A tensor whose values are still in the file."""

    storage: Storage
    dtype: torch.dtype
    offset: int                 # In elements, like `stride`.
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self, mapped: bool = False) -> torch.Tensor:
        """The tensor on the CPU: a contiguous copy.

        Args:
            mapped: Where the file's bytes can be written to, which changes nothing in the file, take them as they are.

        Raises:
            UserError: the data are missing, or the tensors of the file share bytes beyond measure.
        """
        limits, itemsize, count = self.storage.limits, self.dtype.itemsize, math.prod(self.shape)
        if count == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        if self.storage.view is None:
            raise UserError(f"{limits.name}: damaged or cut off: the data of a tensor are missing")
        span = _span(self.shape, self.stride)
        try:
            limits.copy((span + count) * itemsize)
        except Refused as err:
            raise UserError(f"{limits.name}: {err}") from None
        first = self.offset * itemsize
        raw = np.frombuffer(self.storage.view[first:first + span * itemsize], dtype=np.uint8)
        # Any byte but 0 and 1 in a bool tensor would be undefined behaviour.
        if self.dtype == torch.bool:
            return torch.from_numpy(raw != 0).as_strided(self.shape, self.stride).contiguous()
        if mapped and raw.flags.writeable and raw.ctypes.data % itemsize == 0:
            return torch.from_numpy(raw).view(self.dtype).as_strided(self.shape, self.stride)
        return torch.from_numpy(raw.copy()).view(self.dtype).as_strided(self.shape, self.stride).contiguous()


def _span(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements from the first to the last, both included."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _rebuild_tensor(_limits: Limits, storage: Any, offset: Any, shape: Any, stride: Any, _requires_grad: Any = None,
                    _hooks: Any = None, metadata: Any = None) -> TensorRecord:
    if metadata:
        raise Refused("holds a tensor whose values are to be conjugated or negated, which no network file needs")
    if not isinstance(storage, Storage) or storage.dtype is None:
        raise TypeError("a tensor without a typed storage")
    return _tensor(storage, storage.dtype, offset, shape, stride)


def _rebuild_tensor_v3(_limits: Limits, storage: Any, offset: Any, shape: Any, stride: Any, _requires_grad: Any,
                       _hooks: Any, dtype: Any, *_rest: Any) -> TensorRecord:
    found = getattr(torch, dtype.name, None) if isinstance(dtype, Symbol) and dtype.module == "torch" else None
    if not isinstance(storage, Storage) or not isinstance(found, torch.dtype):
        raise TypeError("a tensor without storage or type")
    return _tensor(storage, found, offset, shape, stride)


def _tensor(storage: Storage, dtype: torch.dtype, offset: Any, shape: Any, stride: Any) -> TensorRecord:
    if not isinstance(shape, tuple | list) or not isinstance(stride, tuple | list):
        raise TypeError("shape or stride of a tensor")
    shape, stride = tuple(shape), tuple(stride)
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise ValueError("dimensions of a tensor")
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in (offset, *shape, *stride)):
        raise ValueError("sizes of a tensor")
    if (span := _span(shape, stride)) and (offset + span) * dtype.itemsize > storage.nbytes:
        raise ValueError("a tensor that is larger than its storage")
    return TensorRecord(storage, dtype, offset, shape, stride)


def _rebuild_parameter(_limits: Limits, data: Any, *_rest: Any) -> TensorRecord:
    if not isinstance(data, TensorRecord):
        raise TypeError("a parameter that is no tensor")
    return data


def _rebuild_from_type(limits: Limits, function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Tensors with attributes, or of a subclass: their values alone."""
    make = MAKERS.get((function.module, function.name)) if isinstance(function, Symbol) else None
    if make is None or not isinstance(args, tuple):
        return Call(function, (kind, args, state), {})
    return make(limits, *args)

#----------------------------------------------------------------------------
# NumPy.

@dataclasses.dataclass(eq=False, slots=True)
class NumpyType:
    """A NumPy dtype. Its byte order arrives after it, as the object's state."""

    code: str
    order: Literal["<", ">", "=", "|"] = "="

    def set_state(self, state: Any) -> None:
        """Take the byte order out of what was to go to dtype.__setstate__."""
        if not isinstance(state, tuple) or state[1] not in ("<", ">", "=", "|"):
            raise ValueError("state of a dtype")
        self.order = state[1]

    def dtype(self) -> np.dtype:
        """The real type.

        Raises:
            Refused: elements of the type are objects, or are not known to be plain.
        """
        if re.fullmatch(r"O[48]?|object", self.code):
            raise Refused("holds a NumPy array of objects, which no network file needs")
        if not re.fullmatch(r"b1|[iu][1248]|f[248]|c(8|16)|[SU]\d{1,5}|[?bBhHiIlLqQefdFD]", self.code):
            raise Refused(f"holds a NumPy array of unknown type {self.code[:20]!a}")
        dtype = np.dtype(self.code)
        return dtype if self.order == "|" else dtype.newbyteorder(self.order)


def _numpy_dtype(_limits: Limits, code: Any, *_flags: Any) -> NumpyType:
    if not isinstance(code, str):
        raise TypeError("a dtype")
    return NumpyType(code)


def _plain_bytes(limits: Limits, data: Any) -> bytes:
    if isinstance(data, str):
        data = data.encode("latin1")        # The byte strings of Python 2 are read as text.
    if not isinstance(data, bytes | memoryview):
        raise TypeError("array data that are no bytes")
    limits.copy(2 * len(data))
    return bytes(data)


def _numpy_scalar(limits: Limits, kind: Any, data: Any = b"") -> np.generic:
    if not isinstance(kind, NumpyType):
        raise TypeError("a scalar without a type")
    dtype = kind.dtype()
    values = np.frombuffer(_plain_bytes(limits, data), dtype=dtype)
    if values.size != 1:
        raise ValueError("a scalar of several values")
    scalar: np.generic = values[0]
    return scalar


def _numpy_reconstruct(_limits: Limits, kind: Any, _shape: Any = None, _code: Any = None) -> np.ndarray:
    """An empty array: its content arrives as the object's state."""
    if not isinstance(kind, Symbol) or (kind.module, kind.name) != ("numpy", "ndarray"):
        raise TypeError("an array of a class of its own")
    return np.empty(0, dtype=np.uint8)


def set_array_state(limits: Limits, array: np.ndarray, state: Any) -> None:
    """Give an array what was to go to ndarray.__setstate__: (version, shape, dtype, is_fortran, bytes).

    Raises:
        Refused: its elements are objects.
        TypeError, ValueError: the parts do not fit together.
    """
    shape, kind, fortran, data = state[-4:]
    dtype, data = _array_parts(limits, shape, kind, data)
    content: Any = (1, shape, dtype, bool(fortran), data)       # NumPy's own annotation asks for its kind of bool.
    array.__setstate__(content)


def _array_parts(limits: Limits, shape: Any, kind: Any, data: Any) -> tuple[np.dtype, bytes]:
    """Type and bytes of an array, if both fit the shape."""
    if not isinstance(kind, NumpyType) or not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        raise TypeError("parts of an array")
    dtype, data = kind.dtype(), _plain_bytes(limits, data)
    if any(type(n) is not int or n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array whose size is not that of its data")
    return dtype, data


def _dill_array(limits: Limits, function: Any, args: Any, state: Any, _attributes: Any = None) -> np.ndarray:
    if not isinstance(function, Symbol) or function.name != "_reconstruct":
        raise TypeError("an array made by an unknown function")
    array = _numpy_reconstruct(limits, *args)
    set_array_state(limits, array, state)
    return array


def _numpy_frombuffer(limits: Limits, data: Any, kind: Any, shape: Any, order: Any, *_rest: Any) -> np.ndarray:
    dtype, data = _array_parts(limits, shape, kind, data)
    if order not in ("C", "F"):
        raise ValueError("order of an array")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)

#----------------------------------------------------------------------------
# Containers and strings.

def _items(limits: Limits, items: Any) -> list[Any] | tuple[Any, ...]:
    if not isinstance(items, list | tuple):
        raise TypeError("items of a container")
    limits.copy(64 * len(items))
    return items


def _make_set(limits: Limits, items: Any = ()) -> set[Any]:
    return {check_key(item) for item in _items(limits, items)}


def _make_dict(kind: type[dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    def make(limits: Limits, items: Any = ()) -> dict[Any, Any]:
        made = kind()
        for key, value in _items(limits, items):
            made[check_key(key)] = value
        return made
    return make


def _make_bytes(limits: Limits, data: Any = b"", encoding: Any = "latin1") -> bytes:
    """Bytes and byte arrays; older protocols write them as text."""
    if not isinstance(data, str):
        return _plain_bytes(limits, data)
    if encoding not in ("latin1", "latin-1"):
        raise TypeError("encoded bytes")
    limits.copy(len(data))
    return data.encode("latin1")


# (module, name) -> maker, called with the limits and the recorded arguments. Every other call stays a note.
MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _make_dict(collections.OrderedDict),
    ("dnnlib.util", "EasyDict"): _make_dict(EasyDict),
    ("builtins", "set"): _make_set,
    ("builtins", "frozenset"): lambda limits, items=(): frozenset(_make_set(limits, items)),
    ("builtins", "bytes"): _make_bytes,
    ("builtins", "bytearray"): _make_bytes,
    ("_codecs", "encode"): _make_bytes,
    ("torch", "Size"): lambda limits, items=(): tuple(_items(limits, items)),
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("numpy", "dtype"): _numpy_dtype,
    ("numpy.core.multiarray", "scalar"): _numpy_scalar,
    ("numpy._core.multiarray", "scalar"): _numpy_scalar,
    ("numpy.core.multiarray", "_reconstruct"): _numpy_reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _numpy_reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _numpy_frombuffer,
    ("numpy._core.numeric", "_frombuffer"): _numpy_frombuffer,
    ("dill._dill", "_create_array"): _dill_array,
    ("dill.dill", "_create_array"): _dill_array,
}
