# SPDX-License-Identifier: Apache-2.0
"""Which form runs, and the matrices that are kept between calls."""
import gc

import pytest
import torch

from dnnlib import UserError
from tests.closeness import assert_close
from tests.ops.cases import randn
from torch_utils.ops import dispatch, native, resampler
from torch_utils.ops.descriptions import IDENTITY, AxisFilter
from torch_utils.ops.filtered_lrelu import (
    filtered_lrelu,
    filtered_lrelu_matrix,
    filtered_lrelu_native,
    filtered_lrelu_ref,
)
from torch_utils.ops.upfirdn2d import upfirdn2d

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def loaded(monkeypatch):
    """What came of loading the libraries, to be changed."""
    monkeypatch.delenv("STYLESAN_OPS", raising=False)
    monkeypatch.setattr(native, "in_use", {kind: native.Loaded(None, "no compiler") for kind in ("cpu", "cuda")})
    return native.in_use


def test_select_without_native(loaded):
    assert dispatch.select("filtered_lrelu", "ref", CPU) is filtered_lrelu_ref
    assert dispatch.select("filtered_lrelu", "auto", CPU) is filtered_lrelu_matrix
    assert dispatch.select("filtered_lrelu", "auto", CUDA) is filtered_lrelu_matrix
    assert dispatch.describe(CPU) == dispatch.describe(CUDA) == "ops: reference (no compiler)"
    assert dispatch.describe("mps") == "ops: reference (no native code for mps)"
    with pytest.raises(ValueError, match=r"impl='cpu': no native cpu ops \(no compiler\): use impl='auto'"):
        dispatch.select("filtered_lrelu", "cpu", CPU)


def test_select_native(loaded):
    loaded["cuda"] = native.Loaded({})
    assert dispatch.select("filtered_lrelu", "auto", CUDA) is filtered_lrelu_native
    assert dispatch.select("filtered_lrelu", "cuda", CUDA) is filtered_lrelu_native
    assert dispatch.select("filtered_lrelu", "auto", CPU) is filtered_lrelu_matrix
    assert dispatch.describe(CUDA) == "ops: cuda native"
    loaded["cpu"] = native.Loaded({})
    assert dispatch.select("filtered_lrelu", "auto", CPU) is filtered_lrelu_native
    assert dispatch.describe(CPU) == "ops: cpu native"
    with pytest.raises(ValueError, match="impl='cuda': filtered_lrelu was called with a tensor on cpu"):
        dispatch.select("filtered_lrelu", "cuda", CPU)


def test_the_environment_decides(loaded, monkeypatch):
    loaded["cpu"] = native.Loaded({})
    monkeypatch.setenv("STYLESAN_OPS", "reference")
    assert dispatch.select("filtered_lrelu", "auto", CPU) is filtered_lrelu_matrix
    assert dispatch.describe(CPU) == "ops: reference (STYLESAN_OPS=reference)"
    monkeypatch.setenv("STYLESAN_OPS", "native")
    assert dispatch.select("filtered_lrelu", "auto", CPU) is filtered_lrelu_native
    with pytest.raises(UserError, match="STYLESAN_OPS=native: no cuda ops: no compiler: mend that, or unset"):
        dispatch.describe(CUDA)
    monkeypatch.setenv("STYLESAN_OPS", "fast")
    with pytest.raises(UserError, match="STYLESAN_OPS=fast: choose from auto, native, reference"):
        dispatch.describe(CPU)


def test_forms_have_one_implementation_each():
    with pytest.raises(ValueError, match="already"):
        dispatch.implements("filtered_lrelu", "ref")(print)
    with pytest.raises(ValueError, match="form 'best'"):
        dispatch.implements("filtered_lrelu", "best")(print)

#----------------------------------------------------------------------------

@pytest.mark.numeric
def test_a_changed_filter_is_read_anew():
    x, f = randn(1, 1, 9, 9), randn(8, seed=1)
    first = upfirdn2d(x, f, impl="matrix")
    f.mul_(2)
    assert_close(upfirdn2d(x, f, impl="matrix"), 4 * first, rtol=1e-5, atol=1e-8)
    f.data = f.data.clone().div_(2)
    assert_close(upfirdn2d(x, f, impl="matrix"), first, rtol=1e-5, atol=1e-8)


def test_filters_are_forgotten_with_their_tensors():
    x = randn(1, 1, 9, 9)
    before = set(resampler._read)
    f = randn(8, seed=1)
    upfirdn2d(x, f, impl="matrix")
    assert set(resampler._read) - before == {id(f)}
    del f
    gc.collect()
    assert set(resampler._read) <= before


def test_matrices_made_in_inference_mode_serve_in_training():
    x, f = randn(1, 1, 15, 15), randn(8, seed=5)
    with torch.inference_mode():
        upfirdn2d(x, f, impl="matrix")
        filtered_lrelu(x, f.clone(), f, impl="matrix")
    x.requires_grad_()
    (upfirdn2d(x, f, impl="matrix").sum() + filtered_lrelu(x, f, f, impl="matrix").sum()).backward()
    assert x.grad is not None


def test_the_cache_is_bounded():
    cache = resampler._MatrixCache(max_bytes=4 * 10 * 10 * 8)
    axes = [AxisFilter(IDENTITY, 10, 1, 1, (0, 0), False, float(gain)) for gain in range(6)]
    for axis in axes:
        cache.get(axis, torch.float64, CPU)
    assert list(key[0] for key in cache._items) == axes[2:]
    kept = cache.get(axes[2], torch.float64, CPU)
    cache.get(axes[0], torch.float64, CPU)
    assert cache.get(axes[2], torch.float64, CPU) is kept
    assert cache.num_bytes == sum(matrix.nbytes for matrix in cache._items.values()) <= cache.max_bytes


@pytest.mark.numeric
def test_both_transposes():
    """<forward(x), y> = <x, transpose(y)> for every kind of resampler."""
    for f in (randn(7), randn(4, 5), None):
        for up, down, padding in [((1, 1), (2, 3), (2, -1, 4, 3)), ((2, 3), (1, 1), (5, 4, -2, 7)),
                                  ((3, 2), (2, 3), (5, 4, -3, 8)), ((1, 1), (3, 2), (-2, 5, 1, 1))]:
            args = (9, 11), torch.float64, f, up, down, padding, False, 1.3
            kinds = [resampler.plan(*args), resampler.ConvResampler((9, 11), *args[2:])]
            for kind in kinds:
                x = randn(6, 9, 11, seed=1)
                y = randn(6, *kind.out_size, seed=2)
                assert kind.forward(x).shape == y.shape
                assert_close((kind.forward(x) * y).sum(), (x * kind.transpose(y)).sum(), rtol=1e-10, atol=1e-8)
