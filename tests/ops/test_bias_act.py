# SPDX-License-Identifier: Apache-2.0
"""Bias and activation: the formulas, gradients, layouts, messages."""
import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from tests.closeness import rel_error
from tests.ops.cases import randn
from torch_utils.ops.bias_act import activation_funcs, bias_act

pytestmark = pytest.mark.numeric

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772

FORMULAS = {
    "linear": lambda v: v,
    "relu": lambda v: max(v, 0) * math.sqrt(2),
    "lrelu": lambda v: (v if v > 0 else 0.2 * v) * math.sqrt(2),
    "tanh": math.tanh,
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)),
    "elu": lambda v: v if v > 0 else math.expm1(v),
    "selu": lambda v: SELU_SCALE * (v if v > 0 else SELU_ALPHA * math.expm1(v)),
    "softplus": lambda v: math.log1p(math.exp(v)),
    "swish": lambda v: v / (1 + math.exp(-v)) * math.sqrt(2),
}
ACTS = pytest.mark.parametrize("act", list(activation_funcs))


@ACTS
def test_formula(act):
    x, b = randn(2, 3, 4, 5), randn(3, seed=1)
    want = (x + b[None, :, None, None]).apply_(FORMULAS[act])
    assert rel_error(bias_act(x, b, act=act), want) < 1e-14


@ACTS
@pytest.mark.parametrize("options", [{}, {"gain": 1.7, "clamp": 0.8, "alpha": 0.1}], ids=["plain", "gain-clamp"])
def test_gradients(act, options):
    x, b = randn(2, 3, 4).requires_grad_(), randn(3, seed=1).requires_grad_()
    def function(x, b):
        return bias_act(x, b, act=act, **options)
    assert gradcheck(function, (x, b))
    assert gradgradcheck(function, (x, b))


def test_dimensions_and_layouts():
    x = randn(2, 3, 4, 5)
    for dim in (0, 1, 2, 3, -1, -2):
        b = randn(x.shape[dim], seed=1)
        want = bias_act(x.movedim(dim, 1), b, act="swish").movedim(1, dim)
        assert torch.equal(bias_act(x, b, dim=dim, act="swish"), want)
    other = x.to(memory_format=torch.channels_last)
    assert torch.equal(bias_act(other, randn(3), act="lrelu"), bias_act(x, randn(3), act="lrelu"))
    assert bias_act(torch.zeros(0, 3), torch.zeros(3), act="lrelu").shape == (0, 3)


def test_the_input_stays_as_it_is():
    x = randn(2, 3)
    before = x.clone()
    bias_act(x, act="lrelu", clamp=0.1)
    assert torch.equal(x, before)


def test_type_of_the_result():
    assert bias_act(torch.ones(2, 3, dtype=torch.float16), torch.ones(3), act="lrelu").dtype == torch.float16


@pytest.mark.parametrize(("options", "message"), [
    ({"act": "gelu"}, "act='gelu': choose from linear, relu, lrelu"),
    ({"impl": "fast"}, "impl='fast'"),
    ({"impl": "matrix"}, "bias_act has only the forms ref"),
    ({"impl": "cuda"}, "bias_act was called with a tensor on cpu"),
    ({"b": torch.ones(4)}, r"b of shape \[4\].*takes \[3\]"),
    ({"b": torch.ones(3), "dim": 2}, "dim=2: x has 2 dimensions"),
    ({"clamp": -1}, "clamp=-1"),
])
def test_mistakes(options, message):
    with pytest.raises(ValueError, match=message):
        bias_act(torch.ones(2, 3), **options)
