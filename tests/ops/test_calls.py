# SPDX-License-Identifier: Apache-2.0
"""What is remembered of a call holds for calls like it, and only for these."""
import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.ops.cases import FORMS, randn
from torch_utils.ops import calls, filtered_lrelu, upfirdn2d
from torch_utils.ops.bias_act import bias_act


@FORMS
def test_a_filter_that_was_written_to_counts_anew(impl):
    x, f = randn(1, 2, 9, 9), randn(4, seed=1)
    first = upfirdn2d.upfirdn2d(x, f, padding=2, impl=impl)
    assert torch.equal(upfirdn2d.upfirdn2d(x, f, padding=2, impl=impl), first)
    f.mul_(2)                               # Twice along each axis.
    assert torch.equal(upfirdn2d.upfirdn2d(x, f, padding=2, impl=impl), 4 * first)
    f.data = f.data / 2
    assert torch.equal(upfirdn2d.upfirdn2d(x, f, padding=2, impl=impl), first)


@FORMS
def test_settings_that_cannot_be_looked_up(impl):
    """Arrays and tensors are taken as before, and may change between two calls."""
    x, gain, f = randn(1, 2, 9, 9), torch.tensor(1.5), randn(4, seed=1)
    want = [filtered_lrelu.filtered_lrelu(x, f, f, padding=[3, 2, 3, 1], gain=g, impl=impl) for g in (1.5, 3.0)]
    for y in want:
        found = filtered_lrelu.filtered_lrelu(x, f, f, padding=np.array([3, 2, 3, 1]), gain=gain, impl=impl)
        assert torch.equal(found, y)
        gain.mul_(2)


def test_mistakes_are_found_in_every_call():
    x, b = randn(1, 2, 9, 9), randn(2)
    filtered_lrelu.filtered_lrelu(x, b=b)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"b of shape \[3\]"):
            filtered_lrelu.filtered_lrelu(x, b=randn(3))
        with pytest.raises(ValueError, match="act='none'"):
            bias_act(x, act="none")
    assert filtered_lrelu.filtered_lrelu(x, b=b.float()).dtype == x.dtype


def test_the_environment_counts_in_every_call(monkeypatch):
    x = randn(1, 2, 9, 9)
    bias_act(x, act="lrelu")
    monkeypatch.setenv("STYLESAN_OPS", "fast")
    with pytest.raises(UserError, match="STYLESAN_OPS=fast"):
        bias_act(x, act="lrelu")
    monkeypatch.delenv("STYLESAN_OPS")
    bias_act(x, act="lrelu")


def test_few_calls_are_remembered(monkeypatch):
    monkeypatch.setattr(calls, "MAX_CALLS", 4)
    x, f, remembered = randn(1, 2, 9, 9), randn(4, seed=1), calls.Calls()
    monkeypatch.setattr(upfirdn2d, "_calls", remembered)
    for gain in range(10):
        for _ in range(2):
            upfirdn2d.upfirdn2d(x, f, padding=2, gain=gain)
        assert 1 <= len(remembered._entries) <= 4
