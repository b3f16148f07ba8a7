# SPDX-License-Identifier: Apache-2.0
"""Walks through nested values."""
import math

import torch

from torch_utils.nested import copy_to_cpu, first_nonfinite, leaves, map_leaves, tensor_bytes

VALUE = {"a": torch.ones(2), "b": [1, (torch.zeros(3, dtype=torch.uint8), None)], "c": {}}


def test_leaves_come_with_their_names_from_left_to_right():
    assert [name for name, _ in leaves(VALUE)] == ["a", "b.0", "b.1.0", "b.1.1"]
    assert [x for _, x in leaves({"x": [], "y": 5})] == [5]
    assert list(leaves("alone")) == [("", "alone")]


def test_the_nesting_stays():
    copied = copy_to_cpu(VALUE)
    assert torch.equal(copied["a"], VALUE["a"])
    assert copied["a"].data_ptr() != VALUE["a"].data_ptr()
    assert (type(copied["b"][1]), copied["c"]) == (tuple, {})
    assert map_leaves(str, {"a": [1, (2,)]}) == {"a": ["1", ("2",)]}
    assert tensor_bytes(VALUE) == 2 * 4 + 3


def test_the_first_that_is_not_finite():
    assert first_nonfinite(VALUE) is None
    bad = torch.tensor([1.0, math.nan])
    assert first_nonfinite({"ok": torch.ones(1), "x": [torch.ones(2), bad], "y": -bad / 0}) == "x.1"
    assert first_nonfinite([torch.full([2], 1e38), torch.ones(0)]) is None         # The sum of these overflows.
