# SPDX-License-Identifier: Apache-2.0
"""Resampling with a separable filter as a pair of matrix products.

Along one axis, "insert zeros, pad or crop, filter, keep every down-th sample" is linear: y = A x with a small banded
matrix A [out, in]. For both axes, Y = A_y X A_x^T. At the sizes of the networks here two dense products are several
times faster on a CPU than depthwise convolutions, forward and backward. The matrices are kept between calls.
"""
import dataclasses
import functools
import threading
import weakref

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops.arguments import filter_size, output_size, split_gain
from torch_utils.ops.descriptions import IDENTITY, AxisFilter, AxisRates, ResamplingFilter, Taps
from torch_utils.ops.reference import pad_or_crop, upfirdn2d_ref
from torch_utils.ops.tracing import untraced

# Room for matrices. A generator of 1024 pixels needs about 200 MiB, one of 256 a tenth of that.
CACHE_BYTES = 512 << 20

#----------------------------------------------------------------------------
# Filters as hashable values.

# id of a filter -> (reference to it, its version and address when it was read, its content). Reading a filter on a GPU
# waits for the GPU, hence this memory. Entries leave with their tensors.
_read: dict[int, "tuple[weakref.ref[torch.Tensor], tuple[int, int], Taps]"] = {}


@untraced
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
    return Taps(tuple(f.shape), f.detach().cpu().double().numpy().tobytes())


@untraced
@functools.lru_cache(maxsize=512)
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

class _MatrixCache:
    """The matrices that were used last, up to a number of bytes."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        # The oldest use comes first.
        self._items: dict[tuple[AxisFilter, torch.dtype, torch.device], torch.Tensor] = {}
        self._lock = threading.Lock()

    def get(self, axis: AxisFilter, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = axis, dtype, device
        with self._lock:
            matrix = self._items.pop(key, None)
            if matrix is None:
                matrix = _make_matrix(*key)
                self.num_bytes += matrix.nbytes
            self._items[key] = matrix
            while self.num_bytes > self.max_bytes and len(self._items) > 1:
                self.num_bytes -= self._items.pop(next(iter(self._items))).nbytes
        return matrix


_matrices = _MatrixCache(CACHE_BYTES)


@untraced
def axis_matrix(axis: AxisFilter, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The matrix [out, in] of an axis. Shared between callers: not to be written to."""
    return _matrices.get(axis, dtype, device)


def _make_matrix(axis: AxisFilter, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    f = axis.taps.array()
    num_taps = len(f)
    f = (f if axis.flip_filter else f[::-1]) * axis.gain
    # Output o is the sum over taps k of f[k] * padded[o * down + k], and input i lies at padded[i * up + pad].
    k = np.arange(axis.size)[None, :] * axis.up + axis.pad[0] - np.arange(axis.out_size)[:, None] * axis.down
    matrix = np.where((k >= 0) & (k < num_taps), f[k.clip(0, num_taps - 1)], 0)
    with torch.inference_mode(False):       # The first caller's mode must not decide what later callers may do.
        return torch.from_numpy(matrix).to(device=device, dtype=dtype)

#----------------------------------------------------------------------------
# Two axes.

@dataclasses.dataclass(frozen=True)
class MatrixResampler:
    """Upsample, filter and downsample stacks of planes by matrix products."""

    x: AxisFilter
    y: AxisFilter

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return self.y.out_size, self.x.out_size

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        """[n, H, W] -> [n, H', W'], differentiable. A fresh tensor unless nothing had to be done."""
        if self.x.is_scale() and self.y.is_scale():
            return _scale(planes, self.x.gain * self.y.gain)
        ax, ay = (axis_matrix(axis, planes.dtype, planes.device) for axis in (self.x, self.y))
        return _two_products(planes, ay, ax)

    def transpose(self, planes: torch.Tensor) -> torch.Tensor:
        """[n, H', W'] -> [n, H, W]: the gradient of `forward`."""
        if self.x.is_scale() and self.y.is_scale():
            return _scale(planes, self.x.gain * self.y.gain)
        ax, ay = (axis_matrix(axis, planes.dtype, planes.device) for axis in (self.x, self.y))
        return _two_products(planes, ay.t(), ax.t())


def _scale(planes: torch.Tensor, gain: float) -> torch.Tensor:
    return planes if gain == 1 else planes * gain


def _two_products(planes: torch.Tensor, ay: torch.Tensor, ax: torch.Tensor) -> torch.Tensor:
    """ay [H', H] @ planes [n, H, W] @ ax.T [W, W'] -> [n, H', W']."""
    n, h, w = planes.shape
    out_h, out_w = ay.shape[0], ax.shape[0]
    ay = ay.expand(n, -1, -1)
    # The product over y is a small one per plane, the one over x a single large one. The former is the slower, so it
    # goes where rows are short: first when planes grow, last when they shrink.
    if out_w >= w:
        planes = torch.bmm(ay, planes)                              # [n, H', W]
        planes = torch.mm(planes.reshape(n * out_h, w), ax.t())     # [n*H', W']
        return planes.view(n, out_h, out_w)
    planes = torch.mm(planes.reshape(n * h, w), ax.t())             # [n*H, W']
    return torch.bmm(ay, planes.view(n, h, out_w))                  # [n, H', W']


def _separable_eps(dtype: torch.dtype) -> float:
    """Half precision does not make a filter more separable than the single precision that filters are made in."""
    return min(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def plan_matrices(
    size: tuple[int, int],
    dtype: torch.dtype,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> MatrixResampler | None:
    """The matrix form for planes of size (height, width); None if the filter is not separable."""
    taps = split_axes(read_taps(f), _separable_eps(dtype))
    if taps is None:
        return None
    gains = split_gain(gain)
    return MatrixResampler(
        x=AxisFilter(taps[0], size[1], up[0], down[0], padding[:2], flip_filter, gains[0]),
        y=AxisFilter(taps[1], size[0], up[1], down[1], padding[2:], flip_filter, gains[1]),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ConvResampler:
    """The same by convolution, for filters that are not separable.

    Measured: at 12x12 taps a sum of the separable terms of such a filter takes four times as long.
    """

    size: tuple[int, int]       # (height, width) in.
    f: torch.Tensor | None
    up: tuple[int, int]
    down: tuple[int, int]
    padding: tuple[int, int, int, int]
    flip_filter: bool
    gain: float

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        fw, fh = filter_size(self.f)
        x0, x1, y0, y1 = self.padding
        return (output_size(self.size[0], fh, self.up[1], self.down[1], y0, y1),
                output_size(self.size[1], fw, self.up[0], self.down[0], x0, x1))

    def forward(self, planes: torch.Tensor) -> torch.Tensor:
        """[n, H, W] -> [n, H', W'], differentiable."""
        return upfirdn2d_ref(planes[None], self.f, self.up, self.down, self.padding, self.flip_filter, self.gain)[0]

    def transpose(self, planes: torch.Tensor) -> torch.Tensor:
        """[n, H', W'] -> [n, H, W]: the gradient of `forward`."""
        (fw, fh), (h, w), (out_h, out_w), (x0, _, y0, _) = filter_size(self.f), self.size, self.out_size, self.padding
        if self.up == (1, 1) and self.f is not None and self.f.ndim == 2:
            f = self.gain * self.f.to(planes)
            f = (f if self.flip_filter else f.flip([0, 1])).expand(planes.shape[0], 1, fh, fw)
            planes = F.conv_transpose2d(planes[None], f, stride=self.down[::-1], groups=planes.shape[0])
            x1, y1 = w + x0 - planes.shape[3], h + y0 - planes.shape[2]     # What is left to the size.
            return pad_or_crop(planes, (-x0, x1, -y0, y1))[0]
        # The same operation with the roles of the rates exchanged and the filter mirrored.
        padding = (fw - 1 - x0, w * self.up[0] - out_w * self.down[0] + x0 - self.up[0] + 1,
                   fh - 1 - y0, h * self.up[1] - out_h * self.down[1] + y0 - self.up[1] + 1)
        return upfirdn2d_ref(planes[None], self.f, self.down, self.up, padding, not self.flip_filter, self.gain)[0]


Resampler = MatrixResampler | ConvResampler


def plan(
    size: tuple[int, int],
    dtype: torch.dtype,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> Resampler:
    """The better way for planes of size (height, width)."""
    matrices = plan_matrices(size, dtype, f, up, down, padding, flip_filter, gain)
    return matrices or ConvResampler(size, f, up, down, padding, flip_filter, gain)

#----------------------------------------------------------------------------
# For native code.

def make_filter(
    taps: Taps,
    dtype: torch.dtype,
    size: tuple[int, int],
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> ResamplingFilter:
    """The native form for planes of size (height, width)."""
    axes = split_axes(taps, _separable_eps(dtype))
    gains = split_gain(gain)
    def values(f: np.ndarray, factor: float) -> tuple[float, ...]:
        return tuple((factor * (f if flip_filter else np.flip(f))).ravel().tolist())
    def axis(num_taps: int, i: int) -> AxisRates:
        pad = padding[2 * i : 2 * i + 2]
        return AxisRates(up[i], down[i], pad[0], num_taps, output_size(size[1 - i], num_taps, up[i], down[i], *pad))
    if axes is None:
        return ResamplingFilter(values(taps.array(), gain), (), axis(taps.shape[1], 0), axis(taps.shape[0], 1))
    return ResamplingFilter(values(axes[0].array(), gains[0]), values(axes[1].array(), gains[1]),
                         axis(axes[0].shape[0], 0), axis(axes[1].shape[0], 1))
