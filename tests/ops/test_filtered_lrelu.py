# SPDX-License-Identifier: Apache-2.0
"""Filtered leaky ReLU: its parts, the two forms against each other, gradients, layouts, messages."""
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import torch_utils.ops.filtered_lrelu as module
from tests.closeness import l2_error, rel_error
from tests.ops.cases import FORMS, bound, filters, randn, random_layers
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import upfirdn2d

pytestmark = pytest.mark.numeric

# fu, fd, up, down, padding, gain, slope, clamp, flip_filter.
OPTIONS = [
    ("1d", "1d", 2, 2, (7, 6, 7, 6), math.sqrt(2), 0.2, None, False),
    ("1d", "1d", 4, 2, (9, 8, 7, 10), math.sqrt(2), 0.2, 0.6, True),
    ("1d", "2d", 2, 2, (7, 6, 7, 6), 1.0, 0.1, 0.5, False),
    ("2d", "1d", 2, 1, (6, 7, 9, 8), 1.3, 0.0, 8.0, True),
    ("rank1", "none", 3, 2, (2, -2, -1, 3), 1.3, 0.2, None, False),
    ("1d", "1d", 4, 2, (-1, -2, -3, 0), 1.3, 0.2, 1.0, False),
    ("none", "none", 1, 1, 0, 1.0, 1.0, 0.7, False),
    ("none", "none", 1, 1, 0, 2.0, 0.2, None, False),
]
NAMES = ("up", "down", "padding", "gain", "slope", "clamp", "flip_filter")


def settings(options, dtype=torch.float64):
    taps = filters(dtype)
    return {"fu": taps[options[0]], "fd": taps[options[1]], **dict(zip(NAMES, options[2:], strict=True))}


@FORMS
def test_is_the_sum_of_its_parts(impl):
    x, b, fu, fd = randn(2, 3, 6, 5), randn(3, seed=1), randn(7, seed=2), randn(4, 5, seed=3)
    y = upfirdn2d(x + b[:, None, None], fu, up=2, padding=(7, 6, 5, 4), gain=4, impl="ref")
    y = (torch.where(y > 0, y, 0.1 * y) * 1.5).clamp(-0.9, 0.9)
    want = upfirdn2d(y, fd, down=2, impl="ref")
    result = filtered_lrelu(x, fu, fd, b, up=2, down=2, padding=(7, 6, 5, 4), gain=1.5, slope=0.1, clamp=0.9, impl=impl)
    assert rel_error(result, want) < 1e-12


def grads(y, inputs, dy):
    """First gradients, and the gradients of a sum of them with respect to dy (the second order)."""
    dy = dy.requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=True)
    probes = [randn(*g.shape, seed=7 + i, dtype=g.dtype) for i, g in enumerate(first)]
    second = torch.autograd.grad(sum((g * p).sum() for g, p in zip(first, probes, strict=True)), dy)
    return [*first, *second]


def assert_form_is_ref(impl, options, dtype, shape):
    """Value, gradients and second order of a form in `dtype` against the reference in float64, on the same numbers."""
    found = []
    for kind, form in ((dtype, impl), (torch.float64, "ref")):
        x, b = (randn(*size, seed=seed, dtype=dtype).to(kind).requires_grad_()
                for seed, size in enumerate((shape, shape[1:2])))
        taps = settings(options, dtype)
        y = filtered_lrelu(x, b=b, **{k: v.to(kind) if torch.is_tensor(v) else v for k, v in taps.items()}, impl=form)
        found.append([y, *grads(y, [x, b], randn(*y.shape, seed=3, dtype=dtype).to(kind))])
    for a, want in zip(*found, strict=True):
        assert a.dtype == dtype
        # The sums for b are long.
        assert rel_error(a, want) < bound(dtype, taps["fu"], taps["fd"]) * (1 if want.ndim == 4 else 4)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_bytes", [1, 5000, 1 << 20])
def test_matrix_is_ref(monkeypatch, options, dtype, chunk_bytes):
    monkeypatch.setattr(module, "CHUNK_BYTES_CPU", chunk_bytes)
    assert_form_is_ref("matrix", options, dtype, (3, 5, 9, 8))


def test_matrix_is_ref_for_random_options():
    for x, options in random_layers(40):
        a, want = (filtered_lrelu(x, **options, impl=impl) for impl in ("matrix", "ref"))
        assert rel_error(a, want) < 1e-12, options


@FORMS
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients(impl, options):
    x, b = randn(1, 2, 5, 4).requires_grad_(), randn(2, seed=1).requires_grad_()
    def function(x, b):
        return filtered_lrelu(x, b=b, **settings(options), impl=impl)
    assert gradcheck(function, (x, b))
    assert gradgradcheck(function, (x, b))


def test_third_order():
    x, fu = randn(1, 2, 5, 4).requires_grad_(), randn(7, seed=1)
    def energy(impl):
        y = filtered_lrelu(x.tanh(), fu, fu, up=2, down=2, padding=6, clamp=0.7, impl=impl).square().sum()
        for _ in range(3):
            y = torch.autograd.grad(y, x, create_graph=True)[0].square().sum()
        return y
    assert rel_error(energy("matrix"), energy("ref")) < 1e-9


@FORMS
def test_layouts_and_empty_batch(impl):
    x, options = randn(2, 3, 9, 11), settings(OPTIONS[2])
    want = filtered_lrelu(x, **options, impl=impl)
    for other in (x.to(memory_format=torch.channels_last), x.mT.contiguous().mT):
        assert rel_error(filtered_lrelu(other, **options, impl=impl), want) < 1e-14
    empty = torch.zeros(0, 3, 9, 11, dtype=torch.float64, requires_grad=True)
    y = filtered_lrelu(empty, **options, impl=impl)
    assert y.shape == (0, *want.shape[1:])
    y.sum().backward()
    assert empty.grad.shape == empty.shape


@FORMS
def test_the_input_stays_as_it_is(impl):
    x = randn(2, 3, 4, 4)
    before = x.clone()
    for options in OPTIONS[-2:]:
        filtered_lrelu(x, **settings(options), impl=impl)
        assert torch.equal(x, before)


@FORMS
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]])
def test_half_precision(impl, options):
    x, b = randn(2, 3, 12, 12, dtype=torch.float16).requires_grad_(), randn(3, seed=1, dtype=torch.float32)
    options = settings(options, torch.float32)
    y = filtered_lrelu(x, b=b, **options, impl=impl)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.float16
    # The reference keeps up to ten intermediate results in half precision, each rounded by at most 2^-11. The input is
    # noise, so filters let these errors pass as they do the signal.
    assert l2_error(y.float(), filtered_lrelu(x.double(), b=b.double(), **options, impl="ref")) < 10 * 2 ** -11


@pytest.mark.parametrize(("options", "message"), [
    ({"impl": "fast"}, "impl='fast'"),
    ({"impl": "cuda"}, "filtered_lrelu was called with a tensor on cpu"),
    ({"up": 0}, "up=0"),
    ({"down": 1.5}, "down=1.5"),
    ({"padding": (1, 2, 3)}, "padding="),
    ({"padding": -4}, "smaller than the filter of 1x1"),
    ({"fd": torch.ones(7)}, r"images of 6x5 are smaller than the downsampling filter of 7x7"),
    ({"gain": 0}, "gain=0"),
    ({"slope": -0.1}, "slope=-0.1"),
    ({"clamp": -1}, "clamp=-1"),
    ({"b": torch.ones(4)}, r"b of shape \[4\]"),
])
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        filtered_lrelu(torch.ones(1, 3, 6, 5), **options)
