# SPDX-License-Identifier: Apache-2.0
"""Resampling: against SciPy, the two forms against each other, gradients, layouts, messages."""
import numpy as np
import pytest
import scipy.signal
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.closeness import rel_error
from tests.ops.cases import FORMS, bound, filters, randn, random_options
from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

pytestmark = pytest.mark.numeric

NUM_RANDOM = 60

#----------------------------------------------------------------------------
# Against SciPy.

@FORMS
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 3), (4, 2), (3, 5)])
def test_one_axis_is_scipy_upfirdn(impl, up, down):
    x, f = randn(1, 1, 1, 19), randn(1, 8, seed=1)
    want = scipy.signal.upfirdn(f[0].numpy(), x[0, 0, 0].numpy(), up, down)
    # SciPy puts no zeros behind the last sample and goes on while any tap meets the signal.
    y = upfirdn2d(x, f, up=(up, 1), down=(down, 1), padding=(7, 7 - (up - 1), 0, 0), impl=impl)
    assert rel_error(y[0, 0, 0], want) < 1e-12


def oracle(x, f, up, down, padding, flip_filter, gain):
    """The four steps with NumPy, and SciPy's two-dimensional convolution."""
    (n, c, h, w), (x0, x1, y0, y1) = x.shape, padding
    f = np.ones((1, 1)) if f is None else f.numpy()
    f = np.outer(f, f) if f.ndim == 1 else f
    z = np.zeros((n, c, h * up[1], w * up[0]))
    z[:, :, :: up[1], :: up[0]] = x.numpy()
    z = np.pad(z, [(0, 0), (0, 0), (max(y0, 0), max(y1, 0)), (max(x0, 0), max(x1, 0))])
    z = z[:, :, max(-y0, 0) : z.shape[2] - max(-y1, 0), max(-x0, 0) : z.shape[3] - max(-x1, 0)]
    f = f[::-1, ::-1] if flip_filter else f
    y = [[scipy.signal.convolve2d(plane, f, mode="valid") for plane in image] for image in z]
    return gain * np.array(y)[:, :, :: down[1], :: down[0]]


@FORMS
@pytest.mark.parametrize("name", ["1d", "2d", "rank1", "none"])
def test_random_options_against_scipy(impl, name):
    f = filters()[name]
    taps = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    rng = np.random.default_rng(0)
    for i in range(NUM_RANDOM):
        h, w = rng.integers(3, 14, 2).tolist()
        x, options = randn(2, 2, h, w, seed=i), random_options(rng, (h, w), taps)
        error = rel_error(upfirdn2d(x, f, **options, impl=impl), oracle(x, f, **options))
        assert error < 1e-12, (h, w, options)

#----------------------------------------------------------------------------
# The forms against each other.

@pytest.mark.parametrize("name", ["1d", "2d", "rank1", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_matrix_is_ref(name, dtype):
    assert_form_is_ref("matrix", name, dtype, NUM_RANDOM)


def assert_form_is_ref(impl, name, dtype, count):
    """Value and gradient of a form in `dtype` against the reference in float64, on the same numbers."""
    f = filters(torch.float32)[name]
    taps = (1, 1) if f is None else (f.shape[0], f.shape[-1])
    rng = np.random.default_rng(1)
    for i in range(count):
        h, w = rng.integers(3, 40, 2).tolist()
        options = random_options(rng, (h, w), taps)
        found = []
        for kind, form in ((dtype, impl), (torch.float64, "ref")):
            x = randn(2, 3, h, w, seed=i, dtype=dtype).to(kind).requires_grad_()
            y = upfirdn2d(x, f, **options, impl=form)
            dy = randn(*y.shape, seed=i + 1, dtype=dtype).to(kind)
            found.append([y, torch.autograd.grad(y, x, dy)[0]])
        for a, want in zip(*found, strict=True):
            assert a.dtype == dtype
            # Where the images see nothing but the zeros of the padding, both are 0.
            assert rel_error(a, want) < bound(dtype, f) or not (a.any() or want.any()), (h, w, options)


@pytest.mark.parametrize("impl", ["ref", "matrix", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(impl, dtype):
    x, f = randn(2, 3, 12, 12, dtype=dtype), setup_filter([1, 3, 5, 7, 7, 5, 3, 1])
    y = upfirdn2d(x, f, up=2, padding=(4, 3), gain=4, impl=impl)
    want = upfirdn2d(x.double(), f, up=2, padding=(4, 3), gain=4, impl="ref")
    assert y.dtype == dtype
    assert rel_error(y.float(), want) < 4 * torch.finfo(dtype).eps

#----------------------------------------------------------------------------
# Gradients.

@FORMS
@pytest.mark.parametrize("name", ["1d", "2d", "none"])
@pytest.mark.parametrize(("up", "down", "padding"), [
    (1, 1, 3), (2, 1, (6, 5, 6, 5)), (1, 2, (5, 5, 4, 6)), ((2, 3), (3, 1), (-2, 5, 7, -1))])
def test_gradients(impl, name, up, down, padding):
    f = filters()[name]
    x = randn(1, 2, 4, 3).requires_grad_()
    def function(x):
        return upfirdn2d(x, f, up=up, down=down, padding=padding, gain=1.3, impl=impl)
    assert gradcheck(function, x)
    assert gradgradcheck(function, x)

#----------------------------------------------------------------------------
# Layouts and empty batches.

@FORMS
@pytest.mark.parametrize("name", ["1d", "2d"])
def test_layouts(impl, name):
    x, f = randn(2, 3, 9, 11), filters()[name]
    want = upfirdn2d(x, f, up=2, padding=5, impl=impl)
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT, x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(other, x)
        assert rel_error(upfirdn2d(other, f, up=2, padding=5, impl=impl), want) < 1e-14


@FORMS
@pytest.mark.parametrize("name", ["1d", "2d", "none"])
def test_empty_batch(impl, name):
    x, f = torch.zeros(0, 3, 9, 11, requires_grad=True), filters(torch.float32)[name]
    y = upfirdn2d(x, f, up=2, padding=4, impl=impl)
    assert y.shape == (0, *upfirdn2d(torch.zeros(1, 3, 9, 11), f, up=2, padding=4, impl=impl).shape[1:])
    y.sum().backward()
    assert x.grad.shape == x.shape

#----------------------------------------------------------------------------
# The helpers keep images in place.

@FORMS
def test_helpers_keep_a_linear_ramp(impl):
    f = setup_filter([1, 3, 3, 1])
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    inner = slice(4, -4)
    assert rel_error(filter2d(ramp, setup_filter([1, 2, 1]), impl=impl)[..., inner, inner],
                     ramp[..., inner, inner]) < 1e-6
    # Pixels are areas: the halves of a pixel lie a quarter to its left and right, the middle of two half-way between.
    fine, coarse = upsample2d(ramp, f, impl=impl), downsample2d(ramp, f, impl=impl)
    assert rel_error(fine[0, 0, 16, 8:-8], (torch.arange(32.0) / 2 - 0.25)[8:-8]) < 1e-6
    assert rel_error(coarse[0, 0, 4, 2:-2], (torch.arange(8.0) * 2 + 0.5)[2:-2]) < 1e-6


def test_setup_filter():
    f = torch.arange(1.0, 9.0)
    assert setup_filter(f).shape == (8,)
    assert setup_filter(f[:7]).shape == (7, 7)
    assert setup_filter(f[:7], separable=True).shape == (7,)
    assert setup_filter(f, separable=False).shape == (8, 8)
    assert torch.equal(setup_filter(f, normalize=False, flip_filter=True, gain=4), 2 * f.flip(0))
    assert setup_filter(None).tolist() == [[1]]
    assert f.tolist() == list(range(1, 9))

#----------------------------------------------------------------------------
# Mistakes.

@pytest.mark.parametrize(("options", "message"), [
    ({"impl": "fast"}, "impl='fast': choose from auto, ref"),
    ({"impl": "cuda"}, "impl='cuda': upfirdn2d was called with a tensor on cpu"),
    ({"up": 0}, "up=0"),
    ({"up": 1.5}, "up=1.5"),
    ({"down": (1, 2, 3)}, r"down=\(1, 2, 3\)"),
    ({"padding": (1, 2, 3)}, r"padding=\(1, 2, 3\)"),
    ({"padding": "3"}, "padding='3'"),
    ({"padding": -3}, r"padding=\[-3, -3, -3, -3\].*6x5.*smaller than the filter of 2x2"),
    ({"f": torch.ones(2, 2, 2)}, r"filter \[2, 2, 2\]"),
    ({"f": torch.ones(2, dtype=torch.int64)}, "floating-point taps"),
    ({"f": torch.ones(2, requires_grad=True)}, "filters are constants"),
    ({"x": torch.ones(3, 6, 5)}, r"x \[3, 6, 5\]"),
    ({"x": torch.ones(1, 3, 6, 5, dtype=torch.uint8)}, "torch.uint8: expected floating-point images"),
])
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        upfirdn2d(**{"x": torch.ones(1, 3, 6, 5), "f": torch.ones(2), **options})


def test_setup_filter_mistakes():
    with pytest.raises(ValueError, match=r"filter \[1, 1, 1\]"):
        setup_filter([[[1]]])
    with pytest.raises(ValueError, match="separable=True"):
        setup_filter([[1, 2], [3, 4]], separable=True)
