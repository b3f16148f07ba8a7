# SPDX-License-Identifier: Apache-2.0
"""Upsample, filter and downsample batches of images in one call (zero-insert, pad, FIR, decimate)."""
from collections.abc import Sequence
from typing import Any

import torch

from torch_utils.ops import dispatch
from torch_utils.ops.arguments import check_images, describe_tensor, filter_size, parse_padding, parse_rate
from torch_utils.ops.calls import Calls, plain
from torch_utils.ops.native_forms import ResamplingCall, upfirdn2d_call, upfirdn2d_native
from torch_utils.ops.reference import upfirdn2d_ref
from torch_utils.ops.resampler import plan_matrices

MIN_SEPARABLE_TAPS = 8      # Shorter 1-D filters become 2-D ones: official checkpoints hold them so.

#----------------------------------------------------------------------------

def setup_filter(
    f: torch.Tensor | Sequence[Any] | float | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Make a filter for the functions below.

    Args:
        f: Taps: [n], [h, w], a number (one tap), or None (the identity).
        device: Where the result lies.
        normalize: Scale the taps to sum 1, so that a constant image stays the same.
        flip_filter: Mirror the taps along every axis.
        gain: Overall factor for the image (each axis of a separable filter takes its root).
        separable: Keep a 1-D filter as it is, to be applied along both axes; False makes it 2-D.
            None keeps it from 8 taps on.

    Returns:
        float32 tensor [n] (separable) or [h, w].
    """
    f = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    if f.ndim > 2 or f.numel() == 0:
        raise ValueError(f"filter {describe_tensor(f)}: expected a number, [n] or [h, w] with at least one tap")
    if f.ndim == 0:
        f = f[None]
    if separable is None:
        separable = f.ndim == 1 and f.numel() >= MIN_SEPARABLE_TAPS
    if separable and f.ndim != 1:
        raise ValueError(f"separable=True: needs a filter of shape [n], got {list(f.shape)}")
    if f.ndim == 1 and not separable:
        f = torch.outer(f, f)
    if normalize:
        f = f / f.sum()
    if flip_filter:
        f = f.flip(list(range(f.ndim)))
    return (f * float(gain ** (f.ndim / 2))).to(device=device)

#----------------------------------------------------------------------------

def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Upsample, pad or crop, filter and downsample every channel of a batch, differentiable to any order in `x`.

    1. Insert `up - 1` zeros after every sample. 2. Pad with zeros, or crop where `padding` is negative.
    3. Convolve with `f`, keeping the outputs for which every tap lies inside. 4. Keep every `down`-th sample.

    Args:
        x: [N, C, H, W], floating point.
        f: [n] (the same taps along both axes), [h, w], or None (one tap of 1). No gradient passes into it.
        up: Factor, or (x, y).
        down: Factor, or (x, y).
        padding: With respect to the upsampled image: a number, (x, y) or (x0, x1, y0, y1).
        flip_filter: False for convolution, True for correlation.
        gain: Factor of the result.
        impl: See `dispatch.select`.

    Returns:
        [N, C, (H*up + y0 + y1 - h) // down + 1, the same for W], of the type of `x`.

    Raises:
        ValueError: an argument does not fit, or the filter is larger than the padded image.
    """
    if torch.compiler.is_compiling():       # What is remembered between calls is no part of a graph.
        return _prepare(x, f, up, down, padding, flip_filter, gain, impl)(x, f)
    settings = plain(up), plain(down), plain(padding), flip_filter, gain, impl
    key = x.shape, x.dtype, x.device, id(f), settings
    call = _calls.find(key) or _calls.keep(key, _prepare(x, f, up, down, padding, flip_filter, gain, impl), x, (f,),
                                           settings)
    return call(x, f)


_calls: Calls[ResamplingCall] = Calls()


def _prepare(x: torch.Tensor, f: torch.Tensor | None, up: int | Sequence[int], down: int | Sequence[int],
             padding: int | Sequence[int], flip_filter: bool, gain: float, impl: str) -> ResamplingCall:
    """The arguments checked, the form chosen: the call for x of such a shape and type, and f of such a content."""
    up_xy, down_xy, pad = parse_rate(up, "up"), parse_rate(down, "down"), parse_padding(padding)
    check_images(x, f, up_xy, down_xy, pad)
    settings = up_xy, down_xy, pad, flip_filter, float(gain)
    function = dispatch.select("upfirdn2d", impl, x.device)
    if function is upfirdn2d_native:
        return upfirdn2d_call(x, f, *settings)
    return lambda x, f: function(x, f, *settings)

#----------------------------------------------------------------------------

dispatch.implements("upfirdn2d", "ref")(upfirdn2d_ref)
dispatch.implements("upfirdn2d", "cpu")(upfirdn2d_native)
dispatch.implements("upfirdn2d", "cuda")(upfirdn2d_native)


@dispatch.implements("upfirdn2d", "matrix")
def upfirdn2d_matrix(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    """Matrix products where the filter is separable and the images are not large, else the definition."""
    n, c, h, w = x.shape
    resampler = plan_matrices((h, w), x.dtype, f, up, down, padding, flip_filter, gain)
    if resampler is None:
        return upfirdn2d_ref(x, f, up, down, padding, flip_filter, gain)
    return resampler.forward(x.reshape(n * c, h, w)).reshape(n, c, *resampler.out_size)

#----------------------------------------------------------------------------
# The same with padding that keeps images aligned. `padding` comes on top of it.

def filter2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Filter images and keep their size. See `upfirdn2d` for the arguments.

    Returns:
        [N, C, H, W], larger by `padding`.
    """
    fw, fh = filter_size(f)
    x0, x1, y0, y1 = parse_padding(padding)
    pad = [x0 + fw // 2, x1 + (fw - 1) // 2, y0 + fh // 2, y1 + (fh - 1) // 2]
    return upfirdn2d(x, f, padding=pad, flip_filter=flip_filter, gain=gain, impl=impl)


def upsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Enlarge images by `up`, keeping their brightness. See `upfirdn2d` for the arguments.

    Returns:
        [N, C, H*up, W*up], larger by `padding`.
    """
    fw, fh = filter_size(f)
    ux, uy = parse_rate(up, "up")
    x0, x1, y0, y1 = parse_padding(padding)
    pad = [x0 + (fw + ux - 1) // 2, x1 + (fw - ux) // 2, y0 + (fh + uy - 1) // 2, y1 + (fh - uy) // 2]
    return upfirdn2d(x, f, up=up, padding=pad, flip_filter=flip_filter, gain=gain * ux * uy, impl=impl)


def downsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
    impl: str = "auto",
) -> torch.Tensor:
    """Shrink images by `down`. See `upfirdn2d` for the arguments.

    Returns:
        [N, C, H/down, W/down], larger by `padding` / `down`.
    """
    fw, fh = filter_size(f)
    dx, dy = parse_rate(down, "down")
    x0, x1, y0, y1 = parse_padding(padding)
    pad = [x0 + (fw - dx + 1) // 2, x1 + (fw - dx) // 2, y0 + (fh - dy + 1) // 2, y1 + (fh - dy) // 2]
    return upfirdn2d(x, f, down=down, padding=pad, flip_filter=flip_filter, gain=gain, impl=impl)
