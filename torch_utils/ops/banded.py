# SPDX-License-Identifier: Apache-2.0
"""Resampling with a separable filter as a pair of matrix products.

Along one axis, "insert zeros, pad or crop, filter, keep every down-th sample" is linear: y = A x with a small banded
matrix A [out, in]. For both axes, Y = A_y X A_x^T. At the sizes of the networks here two dense products are several
times faster on a CPU than depthwise convolutions, forward and backward. The matrices are kept between calls.
"""
import dataclasses
import functools
import weakref
from collections.abc import Callable

import numpy as np
import torch

from torch_utils.ops.arguments import split_gain

MAX_AXIS = 192          # Longer axes have so thin a band that convolutions are faster (measured; same in both passes).
CACHED_MATRICES = 512   # A generator of 256 pixels needs about 70, one of 1024 pixels about 100.

#----------------------------------------------------------------------------
# Filters as hashable values.

@dataclasses.dataclass(frozen=True)
class Taps:
    """The content of a filter tensor."""

    shape: tuple[int, ...]      # [n] or [h, w].
    content: bytes              # float64, C order.

    def array(self) -> np.ndarray:
        return np.frombuffer(self.content).reshape(self.shape)


IDENTITY = Taps((1,), np.ones(1).tobytes())

# id of a filter -> (reference to it, its version and address when it was read, its content). Reading a filter on a GPU
# waits for the GPU, hence this memory. Entries leave with their tensors.
_read: dict[int, tuple[weakref.ref, tuple[int, int], Taps]] = {}


def read_taps(f: torch.Tensor | None) -> Taps:
    """The content of a filter, read anew only if the tensor is new or was written to since."""
    if f is None:
        return IDENTITY
    if f.is_inference():        # Has no version counter.
        return _copy_taps(f)
    key, state = id(f), (f._version, f.data_ptr())
    entry = _read.get(key)
    if entry is None or entry[0]() is not f or entry[1] != state:
        entry = (weakref.ref(f, lambda _: _read.pop(key, None)), state, _copy_taps(f))
        _read[key] = entry
    return entry[2]


def _copy_taps(f: torch.Tensor) -> Taps:
    return Taps(tuple(f.shape), f.detach().to(device="cpu", dtype=torch.float64).numpy().tobytes())


@functools.lru_cache(maxsize=CACHED_MATRICES)
def split_axes(taps: Taps, eps: float) -> tuple[Taps, Taps] | None:
    """The filters along x and y whose outer product is `taps`; None if there are none to within `eps`."""
    f = taps.array()
    if f.ndim == 1:
        return taps, taps
    u, s, vh = np.linalg.svd(f)
    if s[1:].sum() > eps * s[0]:
        return None
    root = np.sqrt(s[0])
    return Taps((f.shape[1],), (vh[0] * root).tobytes()), Taps((f.shape[0],), (u[:, 0] * root).tobytes())

#----------------------------------------------------------------------------
# One axis.

@dataclasses.dataclass(frozen=True)
class Axis:
    """What happens along one axis."""

    taps: Taps              # [n].
    size: int               # Samples in.
    up: int
    down: int
    pad: tuple[int, int]    # Before and after, in upsampled samples; negative crops.
    flip_filter: bool       # False: convolution; True: correlation.
    gain: float

    def is_scale(self) -> bool:
        """Whether nothing happens but a multiplication by `gain`."""
        return self.taps == IDENTITY and self.up == self.down == 1 and self.pad == (0, 0)


@functools.lru_cache(maxsize=CACHED_MATRICES)
def axis_matrix(axis: Axis, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix [out, in] of an axis. Shared between callers: not to be written to."""
    f = axis.taps.array()
    num_taps = len(f)
    f = (f if axis.flip_filter else f[::-1]) * axis.gain
    out = (axis.size * axis.up + sum(axis.pad) - num_taps) // axis.down + 1
    # Output o is the sum over taps k of f[k] * padded[o * down + k], and input i lies at padded[i * up + pad].
    k = np.arange(axis.size)[None, :] * axis.up + axis.pad[0] - np.arange(out)[:, None] * axis.down
    matrix = np.where((k >= 0) & (k < num_taps), f[k.clip(0, num_taps - 1)], 0)
    with torch.inference_mode(False):       # The first caller's mode must not decide what later callers may do.
        return torch.from_numpy(matrix).to(device=device, dtype=dtype)

#----------------------------------------------------------------------------
# Two axes.

def plan(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> tuple[Axis, Axis] | None:
    """The axes (x, y) of a resampling of x [N, C, H, W]; None where convolution is the better way."""
    if max(x.shape[2:]) > MAX_AXIS:
        return None
    # Half precision does not make a filter more separable than the single precision that filters are made in.
    taps = split_axes(read_taps(f), min(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps))
    if taps is None:
        return None
    gains = split_gain(gain)
    return (
        Axis(taps[0], x.shape[3], up[0], down[0], padding[:2], flip_filter, gains[0]),
        Axis(taps[1], x.shape[2], up[1], down[1], padding[2:], flip_filter, gains[1]),
    )


def resample(
    x: torch.Tensor,
    axes: tuple[Axis, Axis],
    then: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Apply the matrices of both axes to x [N, C, H, W].

    Args:
        x: Images.
        axes: From `plan`.
        then: A function of the values to finish with. It gets a fresh tensor (of any shape) and may overwrite it.

    Returns:
        [N, C, H', W'], contiguous unless nothing had to be done.
    """
    n, c, h, w = x.shape
    if axes[0].is_scale() and axes[1].is_scale():
        gain = axes[0].gain * axes[1].gain
        if gain != 1 or then is not None:
            x = x * gain
        return x if then is None else then(x)
    ax, ay = (axis_matrix(axis, x.dtype, x.device) for axis in axes)
    # The product over y is one small product per channel, the one over x a single large one. The former is the
    # slower, so it goes where rows are short: first when images grow, last when they shrink.
    ay = ay.expand(n * c, -1, -1)
    if ax.shape[0] >= w:
        x = torch.bmm(ay, x.reshape(n * c, h, w))       # [N*C, H', W]
        x = torch.mm(x.reshape(-1, w), ax.t())          # [N*C*H', W']
    else:
        x = torch.mm(x.reshape(-1, w), ax.t())          # [N*C*H, W']
        x = torch.bmm(ay, x.reshape(n * c, h, -1))      # [N*C, H', W']
    if then is not None:
        x = then(x)
    return x.reshape(n, c, ay.shape[1], ax.shape[0])
