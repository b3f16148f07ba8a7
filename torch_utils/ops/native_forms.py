# SPDX-License-Identifier: Apache-2.0
"""The native forms of the operations: a plan for each kind of call, which is made once, and the call.

They take the arguments of the definitions (`reference`), so that one can stand for the other.
"""
import functools
import math
from collections.abc import Callable

import torch

from torch_utils.ops import operations, strips
from torch_utils.ops.descriptions import ACTS, IDENTITY, BiasActPlan, LayerPlan, ResamplingPlan, Taps
from torch_utils.ops.resampler import make_filter, read_taps
from torch_utils.ops.tracing import untraced

MAX_ELEMENTS = 2**31 - 1        # Positions inside a tensor are 32-bit numbers on GPUs.
MAX_PLANS = 1024                # The plans of an operation that were used last stay in memory, some kilobytes each.
FAST_KINDS = tuple(strips.KINDS.values())

# What is left of a call when all but the tensors is settled: functions of (x, b), (x, f) and (x, fu, fd, b).
BiasActCall = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
ResamplingCall = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
LayerCall = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def _check_size(op: str, *numels: int) -> None:
    """Raises ValueError for tensors with more elements than native code can count."""
    if max(numels) > MAX_ELEMENTS:
        raise ValueError(f"{op}: a tensor of {max(numels):,} elements; native operations take up to "
                         f"{MAX_ELEMENTS:,}: use smaller batches, or impl='ref'")

#----------------------------------------------------------------------------

def bias_act_native(
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> torch.Tensor:
    """One pass over the values."""
    return bias_act_call(x, dim, act, alpha, gain, clamp)(x, b)


def bias_act_call(x: torch.Tensor, dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> BiasActCall:
    """The same for tensors of the shape of x: a function of x and b."""
    _check_size("bias_act", x.numel())
    plan = _bias_act_plan(dim % max(x.ndim, 1), act, alpha, gain, clamp)
    return lambda x, b: operations.bias_act(x, b if b is None or b.dtype == x.dtype else b.to(x.dtype), plan)


@untraced
@functools.lru_cache(maxsize=MAX_PLANS)
def _bias_act_plan(dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> BiasActPlan:
    return BiasActPlan(dim, ACTS.index(act), alpha, gain, math.inf if clamp is None else float(clamp))

#----------------------------------------------------------------------------

def upfirdn2d_native(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    """Polyphase filters in one pass over the images."""
    return upfirdn2d_call(x, f, up, down, padding, flip_filter, gain)(x, f)


def upfirdn2d_call(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> ResamplingCall:
    """The same for tensors of the shape and type of x: a function of x and of f with its present content."""
    plan = _resampling_plan(x.shape, x.dtype, read_taps(f), up, down, padding, flip_filter, gain)
    return lambda x, f: operations.resample(x, plan)


@untraced
@functools.lru_cache(maxsize=MAX_PLANS)
def _resampling_plan(
    shape: torch.Size,
    dtype: torch.dtype,
    taps: Taps,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> ResamplingPlan:
    n, c, *size = shape
    height, width = size
    f = make_filter(taps, dtype, (height, width), up, down, padding, flip_filter, gain)
    _check_size("upfirdn2d", math.prod(shape), n * c * math.prod(f.out_size))
    return ResamplingPlan(f, (height, width))

#----------------------------------------------------------------------------

def filtered_lrelu_native(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    b: torch.Tensor | None,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
    general: bool = False,
) -> torch.Tensor:
    """Row by row: nothing of the upsampled size is stored but two bits per value, and these only for a gradient.

    Args:
        general: Take the program for all rates also where a GPU has a fast one for those of the layer.
    """
    return filtered_lrelu_call(x, fu, fd, up, down, padding, gain, slope, clamp, flip_filter, general)(x, fu, fd, b)


filtered_lrelu_general = functools.partial(filtered_lrelu_native, general=True)


def filtered_lrelu_call(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
    general: bool = False,
) -> LayerCall:
    """The same for tensors of the shape and type of x: a function of x, b and filters with their present contents."""
    plan = layer_plan(x, fu, fd, up, down, padding, gain, slope, clamp, flip_filter, general)
    dtype = x.dtype
    run: Callable[..., torch.Tensor] = (operations.bias_act if isinstance(plan, BiasActPlan) else
                                        operations.filtered_lrelu)

    def call(x: torch.Tensor, fu: torch.Tensor | None, fd: torch.Tensor | None,
             b: torch.Tensor | None) -> torch.Tensor:
        if b is not None and (b.dtype != dtype or not b.is_contiguous()):
            b = b.to(dtype).contiguous()
        return run(x, b, plan)

    return call


def layer_plan(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
    general: bool = False,
) -> LayerPlan | BiasActPlan:
    """The plan of such a call. Without filters the layer is an activation."""
    return _layer_plan(x.shape, x.dtype, read_taps(fu), read_taps(fd), up, down, padding, gain, slope, clamp,
                       flip_filter, general)


@untraced
@functools.lru_cache(maxsize=MAX_PLANS)
def _layer_plan(
    shape: torch.Size,
    dtype: torch.dtype,
    up_taps: Taps,
    down_taps: Taps,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
    general: bool,
) -> LayerPlan | BiasActPlan:
    if up == down == 1 and not any(padding) and up_taps == down_taps == IDENTITY:
        _check_size("bias_act", math.prod(shape))
        return _bias_act_plan(1, "lrelu", slope, gain, clamp)
    n, c, *size = shape
    height, width = size
    upsample = make_filter(up_taps, dtype, (height, width), (up, up), (1, 1), padding, flip_filter, up**2 * gain)
    downsample = make_filter(down_taps, dtype, upsample.out_size, (1, 1), (down, down), (0, 0, 0, 0), flip_filter, 1.0)
    _check_size("filtered_lrelu", math.prod(shape), n * c * math.prod(downsample.out_size))
    return LayerPlan(upsample, downsample, (height, width), slope, math.inf if clamp is None else float(clamp),
                     () if general else FAST_KINDS)
