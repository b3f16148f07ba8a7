# SPDX-License-Identifier: Apache-2.0
"""The compiled libraries: loaded at first use, called through a C interface.

$STYLESAN_OPS says whether they are used: 'auto' (the default: where they can be had), 'native' (or else an error) or
'reference' (never).
"""
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch

from dnnlib import UserError
from torch_utils.ops import build, strips

CHOICES = ("auto", "native", "reference")
MAX_ELEMENTS = 2**31 - 1        # Positions inside a tensor are 32-bit numbers on GPUs.
MAX_COLUMN_STRIDE = 2**28 - 1   # Of what fast programs read: from column to column they count bytes in 32 bits.
LANES, CODES_PER_WORD = 16, 16  # As in lanes.h and formulas.h.
MAX_PLANS = 1024                # Of an operation: those used last stay in memory, some kilobytes each.
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

#----------------------------------------------------------------------------
# Which library there is.

@dataclasses.dataclass(frozen=True)
class Loaded:
    """The functions of a library, or why there are none."""

    functions: dict[str, Callable[..., int]] | None
    reason: str = ""
    # On GPUs: the fast program for a kind of layer and a type, None if it cannot be had.
    fast: Callable[[strips.Strips, torch.dtype], Callable[..., int] | None] | None = None


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
            try:
                _loaded[kind] = _checked(kind, _loaded[kind])
            except BaseException:       # What has not passed the check is not kept.
                _loaded.pop(kind, None)
                raise
    loaded = _loaded[kind]
    if loaded.functions is None and choice() == "native":
        raise UserError(f"STYLESAN_OPS=native: no {kind} ops: {loaded.reason}: mend that, or unset STYLESAN_OPS")
    return loaded


def _load(kind: str) -> Loaded:
    try:
        path = build.library(build.cpu_target() if kind == "cpu" else build.cuda_target())
        return Loaded(bind(path, with_stream=kind == "cuda"), fast=_StripLibraries() if kind == "cuda" else None)
    except build.BuildError as error:
        return Loaded(None, str(error))
    except (OSError, AttributeError) as error:
        return Loaded(None, f"the library does not load: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _checked(kind: str, loaded: Loaded) -> Loaded:
    """The library if it computes what the definitions do on this machine, else why not."""
    if loaded.functions is None:
        return loaded
    from torch_utils.ops import self_check  # It uses the operations, which use this module.
    fault = _fault_or_error(lambda: self_check.find_fault(kind))
    return loaded if fault is None else Loaded(None, f"self-check failed: {fault}")


def _fault_or_error(check: Callable[[], str | None]) -> str | None:
    try:
        return check()
    except RuntimeError as error:
        return _first_line(error)


def bind(path: str | os.PathLike, with_stream: bool) -> dict[str, Callable[..., int]]:
    """The functions of a library by name. On GPUs the last argument is the stream."""
    return _bind(path, {name: (name, with_stream) for name in _SIGNATURES})


def bind_strips(path: str | os.PathLike, names: Iterable[str]) -> dict[str, Callable[..., int]]:
    """The functions of a library of strips by the kind of layer; they are called as `filtered_lrelu` of a GPU is."""
    return _bind(path, {f"strips_{name}": ("filtered_lrelu", True) for name in names})


def _bind(path: str | os.PathLike, signatures: dict[str, tuple[str, bool]]) -> dict[str, Callable[..., int]]:
    library, functions = ctypes.CDLL(str(path)), {}
    for name, (signature, with_stream) in signatures.items():
        functions[name] = getattr(library, f"stylesan_{name}")
        functions[name].argtypes = (*_SIGNATURES[signature], *([ctypes.c_void_p] if with_stream else []))
        functions[name].restype = ctypes.c_int
    return {name.removeprefix("strips_"): function for name, function in functions.items()}


class _StripLibraries:
    """The libraries of fast programs, compiled, loaded and checked when a layer first asks for one."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, torch.dtype], dict[str, Callable[..., int]]] = {}      # Empty: cannot be had.
        self._lock = threading.Lock()       # As above: not held while operations run.

    def __call__(self, kind: strips.Strips, dtype: torch.dtype) -> Callable[..., int] | None:
        key = kind.family, dtype
        if dtype not in strips.TYPES:
            return None
        found = self._found.get(key)
        if found is None:
            with self._lock:
                is_first = key not in self._found
                if is_first:
                    self._found[key] = self._load(*key)
                found = self._found[key]
            if is_first and found:
                found = self._found[key] = self._checked(found, *key)
        return found.get(kind.name)

    def _load(self, family: str, dtype: torch.dtype) -> dict[str, Callable[..., int]]:
        names = [kind.name for kind in strips.KINDS.values() if kind.family == family]
        try:
            return bind_strips(build.library(build.strips_target(family, dtype)), names)
        except (build.BuildError, OSError, AttributeError) as error:
            self._do_without(_first_line(error))
        return {}

    def _checked(self, found: dict[str, Callable[..., int]], family: str,
                 dtype: torch.dtype) -> dict[str, Callable[..., int]]:
        """The programs if they compute what the definitions do, else none."""
        from torch_utils.ops import self_check  # It uses the operations, which use this module.
        try:
            fault = _fault_or_error(lambda: self_check.find_fault_of_strips("cuda", family, dtype))
            if fault is not None:
                self._do_without(f"self-check failed: {fault}")
        except BaseException:       # What has not passed the check is not kept.
            self._found.pop((family, dtype), None)
            raise
        return found if fault is None else {}

    @staticmethod
    def _do_without(reason: str) -> None:
        """A layer is slower then, but right, so that this is no reason to do without all native code."""
        if choice() == "native":
            raise UserError(f"STYLESAN_OPS=native: no fast programs: {reason}: mend that, or unset STYLESAN_OPS")
        print(f"ops: the general program is used instead of fast ones ({reason})", file=sys.stderr, flush=True)


def describe(device: torch.device | str) -> str:
    """One line for the start of a run."""
    kind = torch.device(device).type
    loaded = load(kind)
    return f"ops: reference ({loaded.reason})" if loaded.functions is None else f"ops: {kind} native"

#----------------------------------------------------------------------------
# The structures of csrc/abi.h, as bytes. Every call packs its own: threads then share nothing that changes, and this is
# several times faster than filling in structures of ctypes.

_IMAGES = struct.Struct("P 8q")         # data; n, c, h, w, strides of these.
_FILTER = struct.Struct("2P 12q")       # taps of x and y; of x, then of y: in, out, up, down, pad, taps.
_LAYER_START = struct.Struct("2d")      # After two filters: slope, clamp.
_LAYER_END = struct.Struct("P 8q i")    # codes as images; mode.
_BIAS_ACT = struct.Struct("4P 3q 3d 2i")    # x, b, g, out; outer, channels, inner; alpha, gain, clamp; act, order.

_SIGNATURES = {     # After the type; structures are passed as addresses.
    "resample": (ctypes.c_int32, *[ctypes.c_void_p] * 3),           # x, y, filter.
    "filtered_lrelu": (ctypes.c_int32, *[ctypes.c_void_p] * 4),     # x, b, y, layer.
    "bias_act": (ctypes.c_int32, ctypes.c_void_p),
}
ACTIVATE, ACTIVATE_AND_KEEP, READ_CODES = range(3)
DEFAULT_PROGRAM, GENERAL_PROGRAM = range(2)
_NO_CODES = (0,) * 9
_FAILURES = {-1: "the compiler that built the library has no such type", -2: "the filters have too many taps",
             -3: "no tile of these rates fits into shared memory", -4: "there is no program of this kind for the layer",
             209: "the library was compiled for another kind of GPU, the one that this process used first "
                  "(CUDA_VISIBLE_DEVICES can show it GPUs of one kind)"}

#----------------------------------------------------------------------------
# A resampler as plain numbers.

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

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return self.y.out, self.x.out

    def transposed(self, size: tuple[int, int]) -> "Kernel":
        """The gradient: from results to images of that (height, width)."""
        return Kernel(self.taps_x[::-1], self.taps_y[::-1], self.x.transposed(size[1]), self.y.transposed(size[0]))

#----------------------------------------------------------------------------
# Plans.

_plans: "weakref.WeakValueDictionary[int, Plan]" = weakref.WeakValueDictionary()
_numbers = itertools.count(1)


class Plan:
    """What native code is told beside tensors. It is made once and does not change, so that threads share it.

    The operations of PyTorch take its number. Whoever uses the number later, as gradients do, has to hold the plan.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        _plans[self.number] = self


def plan_of(number: int) -> Plan:
    """The plan with this number."""
    plan = _plans.get(number)
    if plan is None:
        raise RuntimeError(f"plan {number} of a native operation does not exist any more: hold the plan itself for as "
                           "long as its number is used")
    return plan


class ResamplingPlan(Plan):
    """A kernel for images of `size` (height, width)."""

    def __init__(self, kernel: Kernel, size: tuple[int, int]):
        super().__init__()
        self.kernel, self.size, self.out_size = kernel, size, kernel.out_size
        self.packed, self._taps = _pack_kernel(kernel, size)

    @functools.cached_property
    def transposed(self) -> "ResamplingPlan":
        """The gradient."""
        return ResamplingPlan(self.kernel.transposed(self.size), self.out_size)


class LayerPlan(Plan):
    """Upsample images of `size` (height, width), activate and downsample.

    Args:
        variant: DEFAULT_PROGRAM is the fast one of a GPU where it has one; GENERAL_PROGRAM is not.
    """

    def __init__(self, up: Kernel, down: Kernel, size: tuple[int, int], slope: float, clamp: float,
                 variant: int = DEFAULT_PROGRAM):
        super().__init__()
        self.up, self.down, self.size, self.out_size = up, down, size, down.out_size
        self.slope, self.clamp, self.variant = slope, clamp, variant
        kind = None if variant == GENERAL_PROGRAM else strips.find(up, down)
        self._strips = tuple(kind if kind and strips.can_run(kind, down, slope, mode == READ_CODES) else None
                             for mode in (ACTIVATE, ACTIVATE_AND_KEEP, READ_CODES))
        (up_packed, self._up_taps), (down_packed, self._down_taps) = (
            _pack_kernel(up, size), _pack_kernel(down, up.out_size))
        self._packed = up_packed + down_packed + _LAYER_START.pack(slope, clamp)

    def fast_kind(self, mode: int) -> strips.Strips | None:
        """The kind of fast program for it, if there is one."""
        return self._strips[mode]

    def packed(self, mode: int, codes: torch.Tensor | None) -> bytes:
        """For one call."""
        if codes is None:
            place = _NO_CODES
        elif codes.ndim == 4:
            place = codes.data_ptr(), *codes.shape, *codes.stride()
        else:
            place = codes.data_ptr(), *_NO_CODES[1:]
        return self._packed + _LAYER_END.pack(*place, mode)

    @functools.cached_property
    def transposed(self) -> "LayerPlan":
        """The gradient, which multiplies by the recorded slopes where the layer activates."""
        return LayerPlan(self.down.transposed(self.up.out_size), self.up.transposed(self.size), self.out_size,
                         self.slope, self.clamp, self.variant)


class BiasActPlan(Plan):
    """The settings of an activation; `act` counts those of formulas.h, the bias runs along `dim`."""

    def __init__(self, dim: int, act: int, alpha: float, gain: float, clamp: float):
        super().__init__()
        self.dim, self.act, self.alpha, self.gain, self.clamp = dim, act, alpha, gain, clamp


def _pack_kernel(kernel: Kernel, size: tuple[int, int]) -> tuple[bytes, tuple[ctypes.Array, ctypes.Array]]:
    """(the filter structure, the arrays that it points to)."""
    def axis(a: Axis, length: int) -> tuple[int, ...]:
        return length, a.out, a.up, a.down, a.pad, a.taps
    arrays = tuple((ctypes.c_double * len(taps))(*taps) for taps in (kernel.taps_x, kernel.taps_y))
    addresses = (ctypes.addressof(array) if len(array) else 0 for array in arrays)
    return _FILTER.pack(*addresses, *axis(kernel.x, size[1]), *axis(kernel.y, size[0])), arrays

#----------------------------------------------------------------------------
# Calls. Tensors have to be on the same device and of one type; results are written into the last ones.

def resample(x: torch.Tensor, plan: ResamplingPlan, y: torch.Tensor) -> None:
    """x [N, C, H, W] -> y [N, C, H', W'], any strides."""
    _call("resample", _functions_for(x).functions["resample"], x, _images(x), _images(y), plan.packed)


def filtered_lrelu(x: torch.Tensor, b: torch.Tensor | None, plan: LayerPlan, mode: int, codes: torch.Tensor | None,
                   y: torch.Tensor) -> None:
    """y = down(activation(up(x + b))), or with mode READ_CODES y = down(derivative * up(x))."""
    _call("filtered_lrelu", _layer_function(x, plan, mode), x, _images(x), None if b is None else b.data_ptr(),
          _images(y), plan.packed(mode, codes))


def _layer_function(x: torch.Tensor, plan: LayerPlan, mode: int) -> Callable[..., int]:
    loaded = _functions_for(x)
    kind = plan.fast_kind(mode) if loaded.fast is not None else None
    if kind is not None and x.stride(3) <= MAX_COLUMN_STRIDE:
        function = loaded.fast(kind, x.dtype)
        if function is not None:
            return function
    return loaded.functions["filtered_lrelu"]


def bias_act(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor | None, sizes: tuple[int, int, int],
             plan: BiasActPlan, order: int, out: torch.Tensor) -> None:
    """Derivative of that order at x + b, times g. x, g and out share one dense layout of `sizes` (see abi.h)."""
    _call("bias_act", _functions_for(x).functions["bias_act"], x, _BIAS_ACT.pack(
        x.data_ptr(), 0 if b is None else b.data_ptr(), 0 if g is None else g.data_ptr(), out.data_ptr(), *sizes,
        plan.alpha, plan.gain, plan.clamp, plan.act, order))


def layer_variants(plan: LayerPlan, kind: str) -> Sequence[int]:
    """Programs of a kind of device for a layer, the default first: on a GPU the fastest is chosen (see `tune`)."""
    if load(kind).fast is None or plan.fast_kind(ACTIVATE) is None:
        return (DEFAULT_PROGRAM,)
    return DEFAULT_PROGRAM, GENERAL_PROGRAM


def _codes_of_lanes(x: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    planes = -(-x.shape[0] * x.shape[1] // LANES) * LANES
    height, width = plan.up.out_size
    return x.new_empty(planes * height * -(-width // CODES_PER_WORD), dtype=torch.int32)


def _codes_of_channels(x: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    height, width = plan.up.out_size
    size = *x.shape[:2], height, -(-width // CODES_PER_WORD)
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.new_empty(size, dtype=torch.int32)
    return torch.empty(size, dtype=torch.int32, device=x.device, memory_format=torch.channels_last)


# Processors go through blocks of planes. On GPUs neighbouring threads have neighbouring channels where x has them.
_CODES = {"cpu": _codes_of_lanes, "cuda": _codes_of_channels}


def new_codes(x: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Room for the codes of the slopes between the filters of a layer for x: the only place that decides its shape."""
    return _CODES[x.device.type](x, plan)


def _functions_for(x: torch.Tensor) -> Loaded:
    kind = x.device.type
    return _loaded.get(kind) or load(kind)


def _call(name: str, function: Callable[..., int], x: torch.Tensor, *arguments: bytes | int | None) -> None:
    device = x.device
    if device.type == "cuda":
        with contextlib.nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device):
            code = function(TYPES[x.dtype], *arguments, torch.cuda.current_stream().cuda_stream)
    else:
        code = function(TYPES[x.dtype], *arguments)
    if code:
        raise RuntimeError(f"{name} for {x.dtype} on {x.device}: {_FAILURES.get(code, f'CUDA error {code}')}; "
                           "STYLESAN_OPS=reference does without native code")


def _images(x: torch.Tensor) -> bytes:
    return _IMAGES.pack(x.data_ptr(), *x.shape, *x.stride())


def is_small(*numels: int) -> bool:
    """Whether tensors of so many elements can be handled."""
    return max(numels, default=0) <= MAX_ELEMENTS
