# SPDX-License-Identifier: Apache-2.0
"""Leaky ReLU at a higher sampling rate: bias, upsample, activate, downsample in one call."""
import dataclasses
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils.ops import dispatch, tune
from torch_utils.ops.arguments import check_images, filter_size, output_size, parse_padding
from torch_utils.ops.calls import Calls, plain
from torch_utils.ops.descriptions import ACTIVATE, BiasActPlan
from torch_utils.ops.native_forms import (
    LayerCall,
    filtered_lrelu_call,
    filtered_lrelu_general,
    filtered_lrelu_native,
    layer_plan,
)
from torch_utils.ops.reference import bias_act_ref, filtered_lrelu_ref
from torch_utils.ops.resampler import Resampler, plan

# up, down, padding, gain, slope, clamp and flip_filter, parsed.
Settings = tuple[int, int, tuple[int, int, int, int], float, float, float | None, bool]
MAX_LAYOUTS = 64        # So many layouts of one kind of call have their forms remembered.

#----------------------------------------------------------------------------

def filtered_lrelu(
    x: torch.Tensor,
    fu: torch.Tensor | None = None,
    fd: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    gain: float = math.sqrt(2),
    slope: float = 0.2,
    clamp: float | None = None,
    flip_filter: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """`downsample(clamp(gain * lrelu(upsample(x + b))))`, differentiable to any order in `x` and `b`.

    The layer of StyleGAN3 (Karras et al., NeurIPS 2021, section 3.2): the nonlinearity acts on a signal sampled finely
    enough that the frequencies which it adds do not alias.

    Args:
        x: [N, C, H, W], floating point.
        fu: Upsampling filter: [n] (separable), [h, w] or None (one tap of 1). Upsampling has gain up**2.
        fd: Downsampling filter, likewise.
        b: [C], cast to the type of `x`; None adds nothing.
        up: Upsampling factor.
        down: Downsampling factor.
        padding: With respect to the upsampled image: a number, (x, y) or (x0, x1, y0, y1); negative numbers crop.
        gain: Factor after the activation, above 0.
        slope: Slope of the negative part, at least 0.
        clamp: Bound of the magnitude after gain, before downsampling; None for no bound.
        flip_filter: False for convolution, True for correlation, with both filters.
        impl: See `dispatch.select`.

    Returns:
        [N, C, H', W'] of the type of `x`.

    Raises:
        ValueError: an argument does not fit, or a filter is larger than the images that it meets.
    """
    if torch.compiler.is_compiling():       # What is remembered between calls is no part of a graph.
        return _prepare(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter, impl)(x, fu, fd, b)
    settings = up, down, plain(padding), gain, slope, clamp, flip_filter, impl
    key = x.shape, x.dtype, x.device, None if b is None else b.shape, id(fu), id(fd), settings
    call = _calls.find(key) or _calls.keep(
        key, _prepare(x, fu, fd, b, up, down, padding, gain, slope, clamp, flip_filter, impl), x, (fu, fd), settings)
    return call(x, fu, fd, b)


_calls: Calls[LayerCall] = Calls()


def _prepare(x: torch.Tensor, fu: torch.Tensor | None, fd: torch.Tensor | None, b: torch.Tensor | None, up: int,
             down: int, padding: int | Sequence[int], gain: float, slope: float, clamp: float | None,
             flip_filter: bool, impl: str) -> LayerCall:
    """The arguments checked, the form chosen: the call for x and b of such shapes and types, and such filters."""
    if int(up) != up or up < 1 or int(down) != down or down < 1:
        raise ValueError(f"up={up!r}, down={down!r}: expected integers of at least 1")
    if not gain > 0 or not slope >= 0:
        raise ValueError(f"gain={gain}, slope={slope}: the gain must be above 0 and the slope at least 0")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp={clamp}: must be at least 0, or None")
    pad = parse_padding(padding)
    width, height = check_images(x, fu, (up, up), (1, 1), pad)
    taps = filter_size(fd)
    if min(output_size(width, taps[0], 1, down, 0, 0), output_size(height, taps[1], 1, down, 0, 0)) < 1:
        raise ValueError(f"padding={list(pad)}: the upsampled images of {height}x{width} are smaller than the "
                         f"downsampling filter of {taps[1]}x{taps[0]}")
    if b is not None and b.shape != x.shape[1:2]:
        raise ValueError(f"b of shape {list(b.shape)}: x of shape {list(x.shape)} takes [{x.shape[1]}]")
    function = dispatch.select("filtered_lrelu", impl, x.device)
    settings: Settings = int(up), int(down), pad, float(gain), float(slope), clamp, flip_filter
    if function is not filtered_lrelu_native:
        return lambda x, fu, fd, b: function(x, fu, fd, b, *settings)
    if impl == "auto" and x.device.type in tune.KINDS:
        return _Fastest(settings)
    return filtered_lrelu_call(x, fu, fd, *settings)


class _Fastest:
    """The form that is fastest on the device of x, which is found out at the first call of a shape and layout."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self._found: dict[Hashable, LayerCall] = {}

    def __call__(self, x: torch.Tensor, fu: torch.Tensor | None, fd: torch.Tensor | None,
                 b: torch.Tensor | None) -> torch.Tensor:
        key = x.stride(), torch.is_grad_enabled(), x.requires_grad, b is not None and b.requires_grad, \
            tune.current(x.device)
        call = self._found.get(key)
        if call is None:
            form = self._choose(x, fu, fd, b)
            if form in (filtered_lrelu_native, filtered_lrelu_general):
                call = filtered_lrelu_call(x, fu, fd, *self.settings, form is filtered_lrelu_general)
            else:
                call = lambda x, fu, fd, b: form(x, fu, fd, b, *self.settings)
            if len(self._found) >= MAX_LAYOUTS:
                self._found.clear()
            self._found[key] = call
        return call(x, fu, fd, b)

    def _choose(self, x: torch.Tensor, fu: torch.Tensor | None, fd: torch.Tensor | None,
                b: torch.Tensor | None) -> tune.Form:
        up, down, padding, *_ = self.settings
        facts = {"up": up, "down": down, "padding": padding, "up taps": None if fu is None else fu.shape,
                 "down taps": None if fd is None else fd.shape}
        return tune.fastest("filtered_lrelu", (x, b), facts, lambda: candidates(x, fu, fd, *self.settings),
                            lambda form, x, b: form(x, fu, fd, b, *self.settings))


def candidates(x: torch.Tensor, fu: torch.Tensor | None, fd: torch.Tensor | None,
               *settings: Any) -> dict[str, tune.Form]:
    """The forms among which the fastest is chosen, by name, the default first: programs of native code, matrices."""
    plan, kind = layer_plan(x, fu, fd, *settings), x.device.type
    forms: dict[str, tune.Form] = {kind: filtered_lrelu_native}
    if isinstance(plan, BiasActPlan):       # One pass over the values.
        return forms
    if plan.fast_kind(ACTIVATE) is not None and dispatch.load(kind).fast is not None:
        forms[f"{kind} general"] = filtered_lrelu_general
    return forms | {"matrix": filtered_lrelu_matrix}

#----------------------------------------------------------------------------

dispatch.implements("filtered_lrelu", "ref")(filtered_lrelu_ref)
dispatch.implements("filtered_lrelu", "cpu")(filtered_lrelu_native)
dispatch.implements("filtered_lrelu", "cuda")(filtered_lrelu_native)

#----------------------------------------------------------------------------
# The fast form. Between the two resamplings stand about five times as many values as at either end. They are made for a
# few planes at a time, so that they stay in the processor's cache, and are made again for the gradient instead of being
# kept: a layer remembers nothing but its input.

CHUNK_BYTES_CPU = 1 << 20       # Upsampled values at a time: what a core's cache holds.
CHUNK_BYTES_OTHER = 1 << 30     # Elsewhere: few launches, bounded memory.


@dispatch.implements("filtered_lrelu", "matrix")
def filtered_lrelu_matrix(
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
) -> torch.Tensor:
    """Matrix products (convolutions where those are better), fused over chunks of planes."""
    x = bias_act_ref(x, b)
    n, c, h, w = x.shape
    # The leaky ReLU lets positive factors through, so that its gain can be part of the upsampling.
    upsample = plan((h, w), x.dtype, fu, (up, up), (1, 1), padding, flip_filter, up**2 * gain)
    downsample = plan(upsample.out_size, x.dtype, fd, (1, 1), (down, down), (0, 0, 0, 0), flip_filter, 1.0)
    layer = _Layer(upsample, downsample, slope, math.inf if clamp is None else float(clamp))
    y: torch.Tensor = _LayerForward.apply(x.reshape(n * c, h, w), layer)
    return y.reshape(n, c, *downsample.out_size)


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Upsample, leaky ReLU, clamp and downsample planes [n, H, W] -> [n, H', W'], and the derivative of that."""

    upsample: Resampler
    downsample: Resampler
    slope: float
    clamp: float        # inf for none.

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(x.shape[0], *self.downsample.out_size)
        for part in self._chunks(x):
            y = F.leaky_relu(self.upsample.forward(x[part]), self.slope)
            if self.clamp < math.inf:
                y.clamp_(-self.clamp, self.clamp)
            out[part] = self.downsample.forward(y)
        return out

    def derivative(self, x: torch.Tensor, v: torch.Tensor, transposed: bool) -> torch.Tensor:
        """The derivative at x times v: [n, H, W] -> [n, H', W'], or its transpose, [n, H', W'] -> [n, H, W]."""
        out = v.new_empty(x.shape if transposed else (x.shape[0], *self.downsample.out_size))
        for part in self._chunks(x):
            y = self.upsample.forward(x[part])
            if transposed:
                out[part] = self.upsample.transpose(self._mask(y, self.downsample.transpose(v[part])))
            else:
                out[part] = self.downsample.forward(self._mask(y, self.upsample.forward(v[part])))
        return out

    def _mask(self, y: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """`v` times the derivative of the activation at the upsampled values `y`."""
        v = torch.ops.aten.leaky_relu_backward(v, y, self.slope, False)
        if self.clamp < math.inf:
            # A value -c/slope becomes -c.
            low = -self.clamp / self.slope if self.slope > 0 else -math.inf
            torch.ops.aten.hardtanh_backward.grad_input(v, y, low, self.clamp, grad_input=v)
        return v

    def _chunks(self, x: torch.Tensor) -> Iterator[slice]:
        height, width = self.upsample.out_size
        limit = CHUNK_BYTES_CPU if x.device.type == "cpu" else CHUNK_BYTES_OTHER
        size = max(limit // (height * width * x.element_size()), 1)
        for start in range(0, x.shape[0], size):
            yield slice(start, start + size)


# Within a piece of the activation the layer is linear: the derivative depends on x only through the piece that each
# value is in, and has no further derivative with respect to x.

class _LayerForward(torch.autograd.Function):
    """layer(x)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: _Layer) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        x, = ctx.saved_tensors
        return _LayerDerivative.apply(grad, x.detach(), ctx.layer, True), None


class _LayerDerivative(torch.autograd.Function):
    """The derivative of the layer at x times v, or its transpose: linear in v, and each the gradient of the other."""

    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, x: torch.Tensor, layer: _Layer, transposed: bool) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.transposed = layer, transposed
        return layer.derivative(x, v.contiguous(), transposed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, = ctx.saved_tensors
        return _LayerDerivative.apply(grad, x, ctx.layer, not ctx.transposed), None, None, None
