# SPDX-License-Identifier: Apache-2.0
"""The native operations as PyTorch sees them: types, shapes and layouts of results, and gradients.

A resampler's gradient is a resampler. The derivative of the filtered leaky ReLU is linear and built alike: filter,
multiply by the recorded slope, filter; so is the gradient of that. Both operations are therefore closed under
differentiation. Bias and activation have derivatives up to the second order; above, plain PyTorch takes over.
"""
import math
from collections.abc import Sequence
from typing import Any

import torch

from torch_utils.ops import dispatch, native
from torch_utils.ops.native import Kernel

DEVICES = ("cpu", "cuda")
ACTS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")    # As in formulas.h.
STRAIGHT = ACTS[:3]     # Made of straight lines: no second derivative.

#----------------------------------------------------------------------------
# Layouts. Real results and their fakes are made by the same functions.

def _new_images(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """For a result from x: channels last if x is, else contiguous."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.empty((x.shape[0], x.shape[1], height, width), dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last if last else torch.contiguous_format)


def _memory_order(x: torch.Tensor) -> list[int] | None:
    """Dimensions from the outermost to the innermost in memory; None if x has gaps or overlaps."""
    order = sorted(range(x.ndim), key=lambda d: (x.stride(d), -d), reverse=True)
    order = [d for d in order if x.shape[d] != 1]
    expected = 1
    for d in reversed(order):
        if x.stride(d) != expected:
            return None
        expected *= x.shape[d]
    return order


def _dense(x: torch.Tensor) -> torch.Tensor:
    return x if _memory_order(x) is not None else x.contiguous()


def _like(x: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    """x in the memory layout of another tensor of its shape."""
    return x if x.stride() == layout.stride() else torch.empty_like(layout).copy_(x)

#----------------------------------------------------------------------------
# Resampling.

@torch.library.custom_op("stylesan::resample", mutates_args=(), device_types=DEVICES)
def resample(x: torch.Tensor, taps_x: Sequence[float], taps_y: Sequence[float], axes: Sequence[int]) -> torch.Tensor:
    """x [N, C, H, W] -> [N, C, H', W']; see `Kernel.arguments`."""
    kernel = Kernel.from_arguments(taps_x, taps_y, axes)
    y = _new_images(x, kernel.y.out, kernel.x.out)
    if y.numel():
        native.resample(x, kernel, y)
    return y


@resample.register_fake
def _(x: torch.Tensor, taps_x: Sequence[float], taps_y: Sequence[float], axes: Sequence[int]) -> torch.Tensor:
    return _new_images(x, axes[9], axes[4])


def _keep_resample(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, *arguments = inputs
    ctx.transposed = Kernel.from_arguments(*arguments).transposed(x.shape[2], x.shape[3])


def _resample_gradient(ctx: Any, grad: torch.Tensor) -> tuple:
    return resample(grad, *ctx.transposed.arguments()), None, None, None


resample.register_autograd(_resample_gradient, setup_context=_keep_resample)

#----------------------------------------------------------------------------
# Filtered leaky ReLU.

@torch.library.custom_op("stylesan::filtered_lrelu", mutates_args=(), device_types=DEVICES)
def filtered_lrelu(
    x: torch.Tensor,
    b: torch.Tensor | None,
    up_x: Sequence[float],
    up_y: Sequence[float],
    up_axes: Sequence[int],
    down_x: Sequence[float],
    down_y: Sequence[float],
    down_axes: Sequence[int],
    slope: float,
    clamp: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(down(clamp(lrelu(up(x + b)))), codes of the slopes for the gradient: none unless `keep`)."""
    up, down = Kernel.from_arguments(up_x, up_y, up_axes), Kernel.from_arguments(down_x, down_y, down_axes)
    y = _new_images(x, down.y.out, down.x.out)
    codes = x.new_empty(_codes_size(x, up, keep), dtype=torch.int32)
    if y.numel():
        mode = native.ACTIVATE_AND_KEEP if keep else native.ACTIVATE
        native.filtered_lrelu(x, b, up, down, slope, clamp, mode, codes, y)
    return y, codes


def _codes_size(x: torch.Tensor, up: Kernel, keep: bool) -> int:
    return native.code_words(x.shape[0] * x.shape[1], up) if keep else 0


@filtered_lrelu.register_fake
def _(x: torch.Tensor, b: torch.Tensor | None, up_x: Sequence[float], up_y: Sequence[float], up_axes: Sequence[int],
      down_x: Sequence[float], down_y: Sequence[float], down_axes: Sequence[int], slope: float, clamp: float,
      keep: bool) -> tuple[torch.Tensor, torch.Tensor]:
    up = Kernel.from_arguments(up_x, up_y, up_axes)
    return _new_images(x, down_axes[9], down_axes[4]), x.new_empty(_codes_size(x, up, keep), dtype=torch.int32)


@torch.library.custom_op("stylesan::filtered_lrelu_slopes", mutates_args=(), device_types=DEVICES)
def filtered_lrelu_slopes(
    v: torch.Tensor,
    codes: torch.Tensor,
    up_x: Sequence[float],
    up_y: Sequence[float],
    up_axes: Sequence[int],
    down_x: Sequence[float],
    down_y: Sequence[float],
    down_axes: Sequence[int],
    slope: float,
) -> torch.Tensor:
    """down(slopes * up(v)), with the slopes that the codes stand for: linear in v."""
    up, down = Kernel.from_arguments(up_x, up_y, up_axes), Kernel.from_arguments(down_x, down_y, down_axes)
    y = _new_images(v, down.y.out, down.x.out)
    if y.numel():
        native.filtered_lrelu(v, None, up, down, slope, math.inf, native.READ_CODES, codes, y)
    return y


@filtered_lrelu_slopes.register_fake
def _(v: torch.Tensor, codes: torch.Tensor, up_x: Sequence[float], up_y: Sequence[float], up_axes: Sequence[int],
      down_x: Sequence[float], down_y: Sequence[float], down_axes: Sequence[int], slope: float) -> torch.Tensor:
    return _new_images(v, down_axes[9], down_axes[4])


def _transposed_layer(x: torch.Tensor, arguments: Sequence[Any]) -> tuple[Kernel, Kernel]:
    """The two filters of the gradient with respect to x."""
    up, down = Kernel.from_arguments(*arguments[:3]), Kernel.from_arguments(*arguments[3:6])
    return down.transposed(up.y.out, up.x.out), up.transposed(x.shape[2], x.shape[3])


def _keep_layer(ctx: Any, inputs: tuple, output: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, b, *arguments, slope, _, keep = inputs
    if (x.requires_grad or (b is not None and b.requires_grad)) and not keep:
        raise ValueError("stylesan::filtered_lrelu with keep=False has no gradient: pass keep=True")
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.kernels, ctx.slope = _transposed_layer(x, arguments), slope


def _layer_gradient(ctx: Any, grad: torch.Tensor, _: Any) -> tuple:
    up, down = ctx.kernels
    dx = filtered_lrelu_slopes(grad, ctx.saved_tensors[0], *up.arguments(), *down.arguments(), ctx.slope)
    db = dx.sum([0, 2, 3]) if ctx.needs_input_grad[1] else None
    return dx, db, *[None] * 9


def _keep_slopes(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    v, codes, *arguments, slope = inputs
    ctx.save_for_backward(codes)
    ctx.kernels, ctx.slope = _transposed_layer(v, arguments), slope


def _slopes_gradient(ctx: Any, grad: torch.Tensor) -> tuple:
    up, down = ctx.kernels
    codes, = ctx.saved_tensors
    return filtered_lrelu_slopes(grad, codes, *up.arguments(), *down.arguments(), ctx.slope), *[None] * 8


filtered_lrelu.register_autograd(_layer_gradient, setup_context=_keep_layer)
filtered_lrelu_slopes.register_autograd(_slopes_gradient, setup_context=_keep_slopes)

#----------------------------------------------------------------------------
# Bias and activation.

@torch.library.custom_op("stylesan::bias_act", mutates_args=(), device_types=DEVICES)
def bias_act(x: torch.Tensor, b: torch.Tensor | None, dim: int, act: int, alpha: float, gain: float,
             clamp: float) -> torch.Tensor:
    """clamp(gain * act(x + b)); `act` counts the activations of formulas.h."""
    return _run_bias_act(x, b, None, dim, act, alpha, gain, clamp, 0)


@torch.library.custom_op("stylesan::bias_act_derivative", mutates_args=(), device_types=DEVICES)
def bias_act_derivative(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor, dim: int, act: int, alpha: float,
                        gain: float, clamp: float, order: int) -> torch.Tensor:
    """g times the derivative of that order (1 or 2) of `bias_act` with respect to x, element by element."""
    return _run_bias_act(x, b, g, dim, act, alpha, gain, clamp, order)


def _run_bias_act(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor | None, dim: int, act: int, alpha: float,
                  gain: float, clamp: float, order: int) -> torch.Tensor:
    x = _dense(x)
    out = torch.empty_like(x)
    if out.numel():
        memory = _memory_order(x)
        at = memory.index(dim) if b is not None and dim in memory else None     # A dimension of size 1 is nowhere.
        sizes = [x.shape[d] for d in memory]
        if at is not None:
            shape = math.prod(sizes[:at]), sizes[at], math.prod(sizes[at + 1:])
        else:
            shape = 1, 1, x.numel()
        b = None if b is None else b.contiguous()
        native.bias_act(x, b, None if g is None else _like(g, x), shape, act, alpha, gain, clamp, order, out)
    return out


@bias_act.register_fake
def _(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(_dense(x))


@bias_act_derivative.register_fake
def _(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return torch.empty_like(_dense(x))


def _keep_bias_act(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, b, *ctx.settings = inputs
    ctx.save_for_backward(x, b)


def _bias_act_gradient(ctx: Any, grad: torch.Tensor) -> tuple:
    x, b = ctx.saved_tensors
    dx = bias_act_derivative(x, b, grad, *ctx.settings, 1)
    return dx, _along(dx, b, ctx.settings[0]), *[None] * 5


def _keep_derivative(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    x, b, g, *ctx.settings, ctx.order = inputs
    ctx.save_for_backward(x, b, g)


def _derivative_gradient(ctx: Any, grad: torch.Tensor) -> tuple:
    x, b, g = ctx.saved_tensors
    dg = bias_act_derivative(x, b, grad, *ctx.settings, ctx.order) if ctx.needs_input_grad[2] else None
    dx = None
    if (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]) and ACTS[ctx.settings[1]] not in STRAIGHT:
        if ctx.order == 1:
            dx = bias_act_derivative(x, b, grad * g, *ctx.settings, 2)
        else:
            dx = _third_derivative(x, b, grad * g, ctx.settings)
    return dx, None if dx is None else _along(dx, b, ctx.settings[0]), dg, *[None] * 6


def _third_derivative(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor, settings: list) -> torch.Tensor:
    """g times the third derivative, by plain PyTorch and therefore differentiable further."""
    dim, act, alpha, gain, clamp = settings
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = dispatch.select("bias_act", "ref", x.device)(x, b, dim, ACTS[act], alpha, gain, clamp)
        for _ in range(2):
            y, = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        return torch.autograd.grad(y, x, g, create_graph=further)[0]


def _along(dx: torch.Tensor, b: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    """The gradient of a bias."""
    if b is None:
        return None
    others = [d for d in range(dx.ndim) if d != dim]
    return dx.sum(others) if others else dx


bias_act.register_autograd(_bias_act_gradient, setup_context=_keep_bias_act)
bias_act_derivative.register_autograd(_derivative_gradient, setup_context=_keep_derivative)

#----------------------------------------------------------------------------

def check_size(op: str, *numels: int) -> None:
    """Raises ValueError for tensors with more elements than the native code can count."""
    if not native.is_small(*numels):
        raise ValueError(f"{op}: a tensor of {max(numels):,} elements; native operations take up to "
                         f"{native.MAX_ELEMENTS:,}: use smaller batches, or impl='ref'")
