# SPDX-License-Identifier: Apache-2.0
"""The operations against the recorded numbers of the official implementation."""
import pytest
import torch

from tests.closeness import rel_error
from tests.ops.cases import FORMS, needs_compiler
from tests.parity import load_json, load_npz
from torch_utils.ops import upfirdn2d as up2
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu

pytestmark = pytest.mark.numeric

TOLERANCE = 1e-5
CASES = load_json("ops.json")
RESAMPLERS = {"upfirdn2d": up2.upfirdn2d, "filter2d": up2.filter2d, "upsample2d": up2.upsample2d,
              "downsample2d": up2.downsample2d}


@pytest.fixture(scope="module")
def arrays():
    return load_npz("ops.npz")


def cases(*ops):
    """pytest parameters for the recorded cases of some operations."""
    found = [case for case in CASES if case["op"] in ops]
    return pytest.mark.parametrize("case", found, ids=[f"{case['op']}-{case['case']}" for case in found])


def recorded(arrays, case):
    """The arrays of one case as tensors; an empty one stands for None."""
    prefix = f"{case['op']}/{case['case']}/"
    found = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
    return {key: torch.from_numpy(value) if value.size else None for key, value in found.items()}


def options(case, *without):
    return {key: value for key, value in case.items() if key not in ("op", "case", "shape", *without)}


def check(result, inputs, want):
    """Compare an output, and the gradients where they were recorded."""
    assert rel_error(result, want["y"]) < TOLERANCE
    if want.get("dy") is not None:
        names = [name for name in inputs if inputs[name] is not None]
        grads = torch.autograd.grad(result, [inputs[name] for name in names], want["dy"])
        for name, grad in zip(names, grads, strict=True):
            assert rel_error(grad, want[f"d{name}"]) < TOLERANCE, name


def leaf(tensor):
    return None if tensor is None else tensor.clone().requires_grad_()


@cases("upfirdn2d", "filter2d", "upsample2d", "downsample2d")
@FORMS
def test_resampling(arrays, case, impl):
    want = recorded(arrays, case)
    x = leaf(want["x"])
    result = RESAMPLERS[case["op"]](x, want["f"], **options(case, "f"), impl=impl)
    check(result, {"x": x}, want)


@cases("setup_filter")
def test_setup_filter(arrays, case):
    want = recorded(arrays, case)["f"]
    assert rel_error(up2.setup_filter(**options(case)), want) < 1e-7


@cases("bias_act")
@pytest.mark.parametrize("impl", ["ref", pytest.param("cpu", marks=needs_compiler)])
def test_bias_act(arrays, case, impl):
    want = recorded(arrays, case)
    x, b = leaf(want["x"]), leaf(want["b"])
    check(bias_act(x, b, **options(case, "b"), impl=impl), {"x": x, "b": b}, want)


@cases("filtered_lrelu")
@FORMS
def test_filtered_lrelu(arrays, case, impl):
    want = recorded(arrays, case)
    x, b = leaf(want["x"]), leaf(want["b"])
    result = filtered_lrelu(x, want["fu"], want["fd"], b, **options(case, "fu", "fd"), impl=impl)
    check(result, {"x": x, "b": b}, want)
