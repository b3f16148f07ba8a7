# SPDX-License-Identifier: Apache-2.0
"""The compiled libraries: loaded at first use, called through a C interface.

$STYLESAN_OPS says whether they are used: 'auto' (the default: where they can be had), 'native' (or else an error) or
'reference' (never).
"""
import ctypes
import dataclasses
import os
import threading
from collections.abc import Callable, Sequence

import torch

from dnnlib import UserError
from torch_utils.ops import build

CHOICES = ("auto", "native", "reference")
MAX_ELEMENTS = 2**31 - 1        # Positions inside a tensor are 32-bit numbers on GPUs.
LANES, CODES_PER_WORD = 16, 16  # As in lanes.h and formulas.h.
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

#----------------------------------------------------------------------------
# Which library there is.

@dataclasses.dataclass(frozen=True)
class Loaded:
    """The functions of a library, or why there are none."""

    functions: dict[str, Callable[..., int]] | None
    reason: str = ""


_loaded: dict[str, Loaded] = {}     # Kind -> what came of loading it; filled at first use.
# Held while a library is compiled and opened, and never while operations run: on GPUs autograd runs the backward pass
# of the self-check in a thread of its own, which asks for the library, too, and would wait for ever.
_lock = threading.Lock()


def choice() -> str:
    """The value of $STYLESAN_OPS."""
    value = os.environ.get("STYLESAN_OPS") or "auto"
    if value not in CHOICES:
        raise UserError(f"STYLESAN_OPS={value}: choose from {', '.join(CHOICES)}")
    return value


def load(kind: str) -> Loaded:
    """The library for devices of that type, compiled if need be; tried once per process.

    The first caller checks it. While that runs, some milliseconds, other threads get the library unchecked.

    Raises:
        UserError: STYLESAN_OPS=native and there is none.
    """
    if choice() == "reference":
        return Loaded(None, "STYLESAN_OPS=reference")
    if kind not in build.KINDS:
        return Loaded(None, f"no native code for {kind}")
    if kind not in _loaded:
        with _lock:
            is_first = kind not in _loaded
            if is_first:
                _loaded[kind] = _load(kind)
        if is_first:
            _loaded[kind] = _checked(kind, _loaded[kind])
    loaded = _loaded[kind]
    if loaded.functions is None and choice() == "native":
        raise UserError(f"STYLESAN_OPS=native: no {kind} ops: {loaded.reason}: mend that, or unset STYLESAN_OPS")
    return loaded


def _load(kind: str) -> Loaded:
    try:
        path = build.library(build.cpu_target() if kind == "cpu" else build.cuda_target())
        return Loaded(bind(path, with_stream=kind == "cuda"))
    except build.BuildError as error:
        return Loaded(None, str(error))
    except (OSError, AttributeError) as error:
        return Loaded(None, f"the library does not load: {str(error).splitlines()[0]}")


def _checked(kind: str, loaded: Loaded) -> Loaded:
    """The library if it computes what the definitions do on this machine, else why not."""
    if loaded.functions is None:
        return loaded
    from torch_utils.ops import self_check  # It uses the operations, which use this module.
    try:
        fault = self_check.find_fault(kind)
    except RuntimeError as error:
        fault = str(error).splitlines()[0]
    return loaded if fault is None else Loaded(None, f"self-check failed: {fault}")


def bind(path: str | os.PathLike, with_stream: bool) -> dict[str, Callable[..., int]]:
    """The functions of a library by name. On GPUs the last argument is the stream."""
    library, functions = ctypes.CDLL(str(path)), {}
    for name, types in _SIGNATURES.items():
        functions[name] = getattr(library, f"stylesan_{name}")
        functions[name].argtypes = (*types, ctypes.c_void_p) if with_stream else types
        functions[name].restype = ctypes.c_int
    return functions


def describe(device: torch.device | str) -> str:
    """One line for the start of a run."""
    kind = torch.device(device).type
    loaded = load(kind)
    return f"ops: reference ({loaded.reason})" if loaded.functions is None else f"ops: {kind} native"

#----------------------------------------------------------------------------
# The structures of csrc/abi.h.

class _Images(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in "n c h w stride_n stride_c stride_h stride_w".split())]


class _Axis(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in "in out up down pad taps".split()]


class _Filter(ctypes.Structure):
    _fields_ = [("taps_x", ctypes.c_void_p), ("taps_y", ctypes.c_void_p), ("x", _Axis), ("y", _Axis)]


class _Layer(ctypes.Structure):
    _fields_ = [("up", _Filter), ("down", _Filter), ("slope", ctypes.c_double), ("clamp", ctypes.c_double),
                ("codes", ctypes.c_void_p), ("mode", ctypes.c_int32)]


class _BiasAct(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("x", "b", "g", "out")),
                *((name, ctypes.c_int64) for name in ("outer", "channels", "inner")),
                *((name, ctypes.c_double) for name in ("alpha", "gain", "clamp")),
                ("act", ctypes.c_int32), ("order", ctypes.c_int32)]


_SIGNATURES = {
    "resample": (ctypes.c_int32, ctypes.POINTER(_Images), ctypes.POINTER(_Images), ctypes.POINTER(_Filter)),
    "filtered_lrelu": (ctypes.c_int32, ctypes.POINTER(_Images), ctypes.c_void_p, ctypes.POINTER(_Images),
                       ctypes.POINTER(_Layer)),
    "bias_act": (ctypes.c_int32, ctypes.POINTER(_BiasAct)),
}
ACTIVATE, ACTIVATE_AND_KEEP, READ_CODES = range(3)
_FAILURES = {-1: "the compiler that built the library has no such type", -2: "the filters have too many taps",
             -3: "no tile of these rates fits into shared memory"}

#----------------------------------------------------------------------------
# A resampler as plain numbers: what an operation of PyTorch can take as arguments.

@dataclasses.dataclass(frozen=True)
class Axis:
    """out[o] = sum over i of f[i * up + pad - o * down] in[i], where f is 0 outside its taps."""

    up: int
    down: int
    pad: int
    taps: int
    out: int

    def transposed(self, size: int) -> "Axis":
        """The same weights from outputs to `size` inputs, for mirrored taps."""
        return Axis(self.down, self.up, self.taps - 1 - self.pad, self.taps, size)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A filter with its rates. Without `taps_y` it is not separable and `taps_x` holds [y.taps, x.taps]."""

    taps_x: tuple[float, ...]
    taps_y: tuple[float, ...]
    x: Axis
    y: Axis

    def transposed(self, height: int, width: int) -> "Kernel":
        """The gradient: from results to images of that size."""
        return Kernel(self.taps_x[::-1], self.taps_y[::-1], self.x.transposed(width), self.y.transposed(height))

    def arguments(self) -> tuple[list[float], list[float], list[int]]:
        """(taps_x, taps_y, axes) for an operation."""
        return list(self.taps_x), list(self.taps_y), [*dataclasses.astuple(self.x), *dataclasses.astuple(self.y)]

    @staticmethod
    def from_arguments(taps_x: Sequence[float], taps_y: Sequence[float], axes: Sequence[int]) -> "Kernel":
        return Kernel(tuple(taps_x), tuple(taps_y), Axis(*axes[:5]), Axis(*axes[5:]))

#----------------------------------------------------------------------------
# Calls. Tensors have to be on the same device and of one type; results are written into the last ones.

def resample(x: torch.Tensor, kernel: Kernel, y: torch.Tensor) -> None:
    """x [N, C, H, W] -> y [N, C, H', W'], any strides."""
    _call("resample", x, _images(x), _images(y), _filter(kernel, x.shape[2], x.shape[3]))


def filtered_lrelu(x: torch.Tensor, b: torch.Tensor | None, up: Kernel, down: Kernel, slope: float, clamp: float,
                   mode: int, codes: torch.Tensor, y: torch.Tensor) -> None:
    """y = down(activation(up(x + b))), or with mode READ_CODES y = down(derivative * up(x))."""
    layer = _Layer(_filter(up, x.shape[2], x.shape[3]), _filter(down, up.y.out, up.x.out), slope, clamp,
                   codes.data_ptr() if codes.numel() else None, mode)
    _call("filtered_lrelu", x, _images(x), None if b is None else b.data_ptr(), _images(y), layer)


def bias_act(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor | None, sizes: tuple[int, int, int], act: int,
             alpha: float, gain: float, clamp: float, order: int, out: torch.Tensor) -> None:
    """Derivative of that order at x + b, times g. x, g and out share one dense layout of `sizes` (see abi.h)."""
    pointers = [None if t is None else t.data_ptr() for t in (x, b, g, out)]
    _call("bias_act", x, _BiasAct(*pointers, *sizes, alpha, gain, clamp, act, order))


def code_words(planes: int, up: Kernel) -> int:
    """Number of int32 that hold the codes of that many planes."""
    return -(-planes // LANES) * LANES * up.y.out * -(-up.x.out // CODES_PER_WORD)


def _call(name: str, x: torch.Tensor, *arguments: object) -> None:
    function = load(x.device.type).functions[name]
    places = [ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in arguments]
    if x.device.type == "cuda":
        with torch.cuda.device(x.device):
            code = function(TYPES[x.dtype], *places, torch.cuda.current_stream().cuda_stream)
    else:
        code = function(TYPES[x.dtype], *places)
    if code:
        raise RuntimeError(f"{name} for {x.dtype} on {x.device}: {_FAILURES.get(code, f'CUDA error {code}')}; "
                           "STYLESAN_OPS=reference does without native code")


def _images(x: torch.Tensor) -> _Images:
    return _Images(x.data_ptr(), *x.shape, *x.stride())


def _filter(kernel: Kernel, height: int, width: int) -> _Filter:
    def axis(a: Axis, size: int) -> _Axis:
        return _Axis(size, a.out, a.up, a.down, a.pad, a.taps)
    taps_x, taps_y = (ctypes.cast(_doubles(taps), ctypes.c_void_p) if taps else None
                      for taps in (kernel.taps_x, kernel.taps_y))
    found = _Filter(taps_x, taps_y, axis(kernel.x, width), axis(kernel.y, height))
    found.keep = taps_x, taps_y     # The arrays live as long as the structure.
    return found


def _doubles(values: tuple[float, ...]) -> ctypes.Array:
    return (ctypes.c_double * len(values))(*values)


def is_small(*numels: int) -> bool:
    """Whether tensors of so many elements can be handled."""
    return max(numels, default=0) <= MAX_ELEMENTS

