# SPDX-License-Identifier: Apache-2.0
"""Leaky ReLU at a higher sampling rate: bias, upsample, activate, downsample in one call."""
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils.ops import dispatch
from torch_utils.ops.arguments import check_images, filter_size, output_size, parse_padding
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.upfirdn2d import upfirdn2d_matrix, upfirdn2d_ref

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
    if b is not None and list(b.shape) != [x.shape[1]]:
        raise ValueError(f"b of shape {list(b.shape)}: x of shape {list(x.shape)} takes [{x.shape[1]}]")
    function = dispatch.select("filtered_lrelu", impl, x.device)
    return function(x, fu, fd, b, int(up), int(down), pad, float(gain), float(slope), clamp, flip_filter)

#----------------------------------------------------------------------------

@dispatch.implements("filtered_lrelu", "ref")
def filtered_lrelu_ref(
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
    """The definition, step by step."""
    x = bias_act(x, b, impl="ref")
    x = upfirdn2d_ref(x, fu, (up, up), (1, 1), padding, flip_filter, float(up**2))
    x = bias_act(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp, impl="ref")
    return upfirdn2d_ref(x, fd, (1, 1), (down, down), (0, 0, 0, 0), flip_filter, 1.0)

#----------------------------------------------------------------------------

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
    """Four matrix products and, between them, one pass over the upsampled values, of which one copy is kept.

    The leaky ReLU lets positive factors through, so `gain` is part of the upsampling filter.
    """
    x = bias_act(x, b, impl="ref")
    x = upfirdn2d_matrix(x, fu, (up, up), (1, 1), padding, flip_filter, up**2 * gain,
                         then=lambda v: _LeakyClamp.apply(v, slope, clamp))
    return upfirdn2d_matrix(x, fd, (1, 1), (down, down), (0, 0, 0, 0), flip_filter, 1.0)


class _LeakyClamp(torch.autograd.Function):
    """Leaky ReLU and clamp, in place, with a gradient of any order from the result alone.

    The result tells the piece that an element is in, as the slope is not negative; within a piece the function is
    linear, so the gradient depends on the input in no other way.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, slope: float, clamp: float | None) -> torch.Tensor:
        if slope != 1:
            F.leaky_relu_(x, slope)
        if clamp is not None:
            x.clamp_(-clamp, clamp)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.slope, ctx.clamp = slope, clamp
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        y, = ctx.saved_tensors
        return _LeakyClampGrad.apply(grad, y.detach(), ctx.slope, ctx.clamp), None, None


class _LeakyClampGrad(torch.autograd.Function):
    """The gradient of `_LeakyClamp`: linear in its first argument, and its own transpose."""

    @staticmethod
    def forward(ctx: Any, grad: torch.Tensor, y: torch.Tensor, slope: float, clamp: float | None) -> torch.Tensor:
        ctx.save_for_backward(y)
        ctx.slope, ctx.clamp = slope, clamp
        grad = torch.ops.aten.leaky_relu_backward(grad, y, slope, True)
        if clamp is not None:
            torch.ops.aten.hardtanh_backward.grad_input(grad, y, -clamp, clamp, grad_input=grad)
        return grad

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        y, = ctx.saved_tensors
        return _LeakyClampGrad.apply(grad, y, ctx.slope, ctx.clamp), None, None, None
