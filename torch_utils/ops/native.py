# SPDX-License-Identifier: Apache-2.0
"""The compiled libraries: opened, and called through the C interface of csrc/abi.h.

Whether and when a library is used, and whether it may be trusted, is decided elsewhere (`dispatch`), and so is what
is computed: calls take plans (`descriptions`).
"""
import contextlib
import ctypes
import dataclasses
import functools
import math
import os
import struct
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence

import torch

from dnnlib.util import first_line
from torch_utils.ops import compilation, strips
from torch_utils.ops.descriptions import (
    ACTIVATE_AND_KEEP,
    AxisRates,
    BiasActPlan,
    LayerPlan,
    Packed,
    Plan,
    ResamplingFilter,
    ResamplingPlan,
    Strips,
)

MAX_COLUMN_STRIDE = 2**28 - 1   # From column to column fast programs count bytes in 32 bits.
LANES, CODES_PER_WORD = 16, 16  # As in lanes.h and formulas.h.
TYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

#----------------------------------------------------------------------------
# Libraries.

@dataclasses.dataclass(frozen=True)
class Loaded:
    """The functions of a library, or why there are none."""

    functions: dict[str, Callable[..., int]] | None
    reason: str = ""
    # On GPUs: the fast program for a kind of layer and a type, None if it cannot be had.
    fast: Callable[[Strips, torch.dtype], Callable[..., int] | None] | None = None


in_use: dict[str, Loaded] = {}      # Kind of device -> what calls run there: `dispatch.load` puts it in at first use.


def load(kind: str) -> Loaded:
    """The library for devices of that type, compiled if need be."""
    def functions() -> dict[str, Callable[..., int]]:
        target = compilation.cpu_target() if kind == "cpu" else compilation.cuda_target()
        return bind(compilation.library(target), with_stream=kind == "cuda")
    return _load(functions, "the library does not load: ")


def load_strips(family: str, dtype: torch.dtype) -> Loaded:
    """The fast programs of one family and type, by the kind of layer."""
    def functions() -> dict[str, Callable[..., int]]:
        names = [kind.name for kind in strips.KINDS.values() if kind.family == family]
        return bind_strips(compilation.library(compilation.strips_target(family, dtype)), names)
    return _load(functions, "")


def _load(functions: Callable[[], dict[str, Callable[..., int]]], told: str) -> Loaded:
    try:
        return Loaded(functions())
    except compilation.BuildError as error:
        return Loaded(None, str(error))
    except (OSError, AttributeError) as error:
        return Loaded(None, told + first_line(error))


def bind(path: str | os.PathLike[str], with_stream: bool) -> dict[str, Callable[..., int]]:
    """The functions of a library by name. On GPUs the last argument is the stream."""
    return _bind(path, {name: (name, with_stream) for name in _SIGNATURES})


def bind_strips(path: str | os.PathLike[str], names: Iterable[str]) -> dict[str, Callable[..., int]]:
    """The functions of a library of strips by the kind of layer; they are called as `filtered_lrelu` of a GPU is."""
    return _bind(path, {f"strips_{name}": ("filtered_lrelu", True) for name in names})


def _bind(path: str | os.PathLike[str], signatures: dict[str, tuple[str, bool]]) -> dict[str, Callable[..., int]]:
    library, functions = ctypes.CDLL(str(path)), {}
    for name, (signature, with_stream) in signatures.items():
        functions[name] = getattr(library, f"stylesan_{name}")
        functions[name].argtypes = (*_SIGNATURES[signature], *([ctypes.c_void_p] if with_stream else []))
        functions[name].restype = ctypes.c_int
    return {name.removeprefix("strips_"): function for name, function in functions.items()}

#----------------------------------------------------------------------------
# The structures of csrc/abi.h, as bytes. Every call packs its own: threads then share nothing that changes, and this is
# several times faster than filling in structures of ctypes. What all calls of a plan have in common is kept with it.

_ADDRESS = struct.Struct("P")
_IMAGES_END = struct.Struct("8q")       # After the address of images: n, c, h, w, strides of these.
_FILTER = struct.Struct("2P 12q")       # taps of x and y; of x, then of y: in, out, up, down, pad, taps.
_LAYER_START = struct.Struct("2d")      # After two filters: slope, clamp.
_LAYER_END = struct.Struct("8q i")      # After the address of the codes: the rest of them as images; mode.
_BIAS_ACT = struct.Struct("4P")         # x, b, g, out.
_BIAS_ACT_END = struct.Struct("3q 3d 2i")   # outer, channels, inner; alpha, gain, clamp; act, order.

_SIGNATURES = {     # After the type; structures are passed as addresses.
    "resample": (ctypes.c_int32, *[ctypes.c_void_p] * 3),           # x, y, filter.
    "filtered_lrelu": (ctypes.c_int32, *[ctypes.c_void_p] * 4),     # x, b, y, layer.
    "bias_act": (ctypes.c_int32, ctypes.c_void_p),
}
_MAX_TEMPLATES = 64     # So many are kept with a plan, which mostly meets images of one layout.
_FAILURES = {-1: "the compiler that built the library has no such type", -2: "the filters have too many taps",
             -3: "no tile of these rates fits into shared memory", -4: "there is no program of this kind for the layer",
             209: "the library was compiled for another kind of GPU, the one that this process used first "
                  "(CUDA_VISIBLE_DEVICES can show it GPUs of one kind)"}


# Held while what belongs to a plan is packed, never while operations run. If two threads packed the same, the arrays
# of the one would go while it calls native code with their addresses.
_packing = threading.Lock()


def _pack_filter(f: ResamplingFilter, size: tuple[int, int]) -> Packed:
    """A filter for images of that (height, width)."""
    def axis(rates: AxisRates, length: int) -> tuple[int, ...]:
        return length, rates.out, rates.up, rates.down, rates.pad, rates.taps
    arrays = tuple((ctypes.c_double * len(taps))(*taps) for taps in (f.taps_x, f.taps_y))
    addresses = (ctypes.addressof(array) if len(array) else 0 for array in arrays)
    return Packed(_FILTER.pack(*addresses, *axis(f.x, size[1]), *axis(f.y, size[0])), arrays)


def _pack_layer(plan: LayerPlan) -> Packed:
    """What all calls of a layer have in common."""
    up, down = _pack_filter(plan.up, plan.size), _pack_filter(plan.down, plan.up.out_size)
    start = up.content + down.content + _LAYER_START.pack(plan.slope, plan.clamp)
    return Packed(start, up.arrays + down.arrays)

#----------------------------------------------------------------------------
# Templates of calls. What a call does beside computing is most of its time where images are small, so whatever only
# depends on the shape and the layout of the images is worked out once.

class Template:
    """What all calls of a plan have in common for images of one shape, layout, type and device."""

    __slots__ = "codes", "function", "is_empty", "kind", "loaded", "size", "stride", "type", "x_end", "y_end"

    def __init__(self, x: torch.Tensor, plan: ResamplingPlan | LayerPlan, name: str):
        y = new_result(x, plan)
        self.kind, self.loaded, self.type = x.device.type, _loaded_for(x), TYPES[x.dtype]
        self.function = _function(self.loaded, name, x)
        self.size, self.stride, self.is_empty = y.shape, y.stride(), not y.numel()
        self.x_end, self.y_end = (_IMAGES_END.pack(*t.shape, *t.stride()) for t in (x, y))
        self.codes: tuple[tuple[int, ...], tuple[int, ...]] | None = None     # Their size and strides, once known.


def _template(x: torch.Tensor, plan: ResamplingPlan | LayerPlan, name: str) -> Template:
    key = x.shape, x.stride(), x.dtype, x.device
    found: Template | None = plan.templates.get(key)
    if found is None or found.loaded is not in_use.get(found.kind):
        found = Template(x, plan, name)
        _keep(plan, key, found)
    return found


def _keep(plan: Plan, key: Hashable, value: object) -> None:
    if len(plan.templates) >= _MAX_TEMPLATES:
        plan.templates.clear()
    plan.templates[key] = value


def _function(loaded: Loaded, name: str, x: torch.Tensor) -> Callable[..., int]:
    if loaded.functions is None:
        raise RuntimeError(f"no native code for {x.device}: {loaded.reason}")
    return _on_device(loaded.functions[name], x)


def _on_device(function: Callable[..., int], x: torch.Tensor) -> Callable[..., int]:
    """The function as it is called where x is. On GPUs it gets the stream that is the current one then."""
    return functools.partial(_call_on_gpu, function, x.device) if x.is_cuda else function


def _call_on_gpu(function: Callable[..., int], device: torch.device, *arguments: bytes | int | None) -> int:
    with contextlib.nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device):
        return function(*arguments, torch.cuda.current_stream().cuda_stream)

#----------------------------------------------------------------------------
# Calls. Tensors have to be on the same device and of one type.

def resample(x: torch.Tensor, plan: ResamplingPlan) -> torch.Tensor:
    """x [N, C, H, W], any strides -> [N, C, H', W']."""
    template = _template(x, plan, "resample")
    y = x.new_empty_strided(template.size, template.stride)
    if not template.is_empty:
        code = template.function(template.type, _ADDRESS.pack(x.data_ptr()) + template.x_end,
                                 _ADDRESS.pack(y.data_ptr()) + template.y_end, (plan.packed or _packed(plan)).content)
        if code:
            raise _failure("resample", x, code)
    return y


def filtered_lrelu(x: torch.Tensor, b: torch.Tensor | None, plan: LayerPlan, mode: int,
                   codes: torch.Tensor | None, template: Template | None = None) -> torch.Tensor:
    """y = down(activation(up(x + b))), or with mode READ_CODES y = down(derivative * up(x))."""
    template = template or _template(x, plan, "filtered_lrelu")
    y = x.new_empty_strided(template.size, template.stride)
    if template.is_empty:
        return y
    if codes is None:
        end = _NO_CODES[mode]
    elif codes.ndim == 4:
        end = _ADDRESS.pack(codes.data_ptr()) + _LAYER_END.pack(*codes.shape, *codes.stride(), mode)
    else:
        end = _ADDRESS.pack(codes.data_ptr()) + _CODES_OF_LANES[mode]
    function = template.function if template.loaded.fast is None else _fast_function(template, x, plan, mode)
    code = function(template.type, _ADDRESS.pack(x.data_ptr()) + template.x_end, None if b is None else b.data_ptr(),
                    _ADDRESS.pack(y.data_ptr()) + template.y_end, (plan.packed or _packed(plan)).content + end)
    if code:
        raise _failure("filtered_lrelu", x, code)
    return y


def filtered_lrelu_and_codes(x: torch.Tensor, b: torch.Tensor | None,
                             plan: LayerPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """y = down(activation(up(x + b))), and the codes of the slopes."""
    template = _template(x, plan, "filtered_lrelu")
    if template.codes is None:
        codes = new_codes(x, plan)
        template.codes = codes.shape, codes.stride()
    else:
        codes = x.new_empty_strided(*template.codes, dtype=torch.int32)
    return filtered_lrelu(x, b, plan, ACTIVATE_AND_KEEP, codes, template), codes


def _fast_function(template: Template, x: torch.Tensor, plan: LayerPlan, mode: int) -> Callable[..., int]:
    """The fast program for a layer on a GPU, or the general one. It is asked for anew: it may fail its check."""
    kind, find = plan.fast_kind(mode), template.loaded.fast
    if kind is not None and find is not None and x.stride(3) <= MAX_COLUMN_STRIDE:
        function = find(kind, x.dtype)
        if function is not None:
            return _on_device(function, x)
    return template.function


# The end of a layer's structure by mode: without codes, and after the address of codes whose layout C++ knows.
_CODES_OF_LANES = tuple(_LAYER_END.pack(*[0] * 8, mode) for mode in range(3))
_NO_CODES = tuple(_ADDRESS.pack(0) + end for end in _CODES_OF_LANES)


def _packed(plan: ResamplingPlan | LayerPlan) -> Packed:
    """What native code reads of a plan; kept with it."""
    with _packing:
        if plan.packed is None:
            plan.packed = (_pack_layer(plan) if isinstance(plan, LayerPlan) else
                           _pack_filter(plan.filter, plan.size))
        return plan.packed


def bias_act(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor | None, plan: BiasActPlan,
             order: int) -> torch.Tensor:
    """Derivative of that order at x + b, times g [like x, or None at order 0]; b [x.shape[dim]], contiguous."""
    key = x.shape, x.stride(), x.dtype, x.device, b is None, order
    end: bytes | None = plan.templates.get(key)
    if end is None:
        sizes = _sizes(x.shape, x.stride(), None if b is None else plan.dim)
        end = _BIAS_ACT_END.pack(*sizes, plan.alpha, plan.gain, plan.clamp, plan.act, order)
        _keep(plan, key, end)
    out = torch.empty_like(x)
    if out.numel():
        code = _function(_loaded_for(x), "bias_act", x)(TYPES[x.dtype], _BIAS_ACT.pack(
            x.data_ptr(), 0 if b is None else b.data_ptr(), 0 if g is None else g.data_ptr(), out.data_ptr()) + end)
        if code:
            raise _failure("bias_act", x, code)
    return out


def _failure(name: str, x: torch.Tensor, code: int) -> RuntimeError:
    return RuntimeError(f"{name} for {x.dtype} on {x.device}: {_FAILURES.get(code, f'CUDA error {code}')}; "
                        "STYLESAN_OPS=reference does without native code")

#----------------------------------------------------------------------------
# Layouts.

def dense(x: torch.Tensor) -> torch.Tensor:
    """x without gaps in memory, in its own layout if it has none."""
    if x.is_contiguous() or x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x if _memory_order(x.shape, x.stride()) is not None else x.contiguous()


def _memory_order(shape: Sequence[int], stride: Sequence[int]) -> list[int] | None:
    """Dimensions from the outermost to the innermost in memory; None if the tensor has gaps or overlaps."""
    order = sorted(range(len(shape)), key=lambda d: (stride[d], -d), reverse=True)
    order = [d for d in order if shape[d] != 1]
    expected = 1
    for d in reversed(order):
        if stride[d] != expected:
            return None
        expected *= shape[d]
    return order


def _sizes(shape: torch.Size, stride: tuple[int, ...], dim: int | None) -> tuple[int, int, int]:
    """Elements of a dense tensor outside of a dimension, along it and inside, in memory; all are inside of None."""
    order = _memory_order(shape, stride)
    assert order is not None, "the tensor is dense"
    if dim is None or dim not in order:     # A dimension of size 1 is nowhere.
        return 1, 1, math.prod(shape)
    at, sizes = order.index(dim), [shape[d] for d in order]
    return math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1:])


def new_result(x: torch.Tensor, plan: ResamplingPlan | LayerPlan) -> torch.Tensor:
    """Room for a result from x: channels last if x is, else contiguous. For real tensors and fakes."""
    shape = x.shape
    if shape[2:] != plan.size:
        raise ValueError(f"images of shape {list(shape)} met a plan for {plan.size[0]}x{plan.size[1]}")
    return new_beside(x, (*shape[:2], *plan.out_size), x.dtype)


def _codes_of_lanes(x: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    planes = -(-x.shape[0] * x.shape[1] // LANES) * LANES
    height, width = plan.up.out_size
    return x.new_empty(planes * height * -(-width // CODES_PER_WORD), dtype=torch.int32)


def _codes_of_channels(x: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    height, width = plan.up.out_size
    return new_beside(x, (*x.shape[:2], height, -(-width // CODES_PER_WORD)), torch.int32)


def new_beside(x: torch.Tensor, size: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """Room for what belongs to images x: channels last if x is, else contiguous."""
    if x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return x.new_empty(size, dtype=dtype)
    return torch.empty(size, dtype=dtype, device=x.device, memory_format=torch.channels_last)


# Processors go through blocks of planes. On GPUs neighbouring threads have neighbouring channels where x has them.
_CODES = {"cpu": _codes_of_lanes, "cuda": _codes_of_channels}


def new_codes(x: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """Room for the codes of the slopes between the filters of a layer for x: the only place that decides its shape."""
    return _CODES[x.device.type](x, plan)


def _loaded_for(x: torch.Tensor) -> Loaded:
    loaded = in_use.get(x.device.type)
    if loaded is None:
        raise RuntimeError(f"no native code for {x.device.type} is loaded: call an operation of torch_utils.ops first, "
                           "which loads and checks it")
    return loaded
