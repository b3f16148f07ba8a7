# SPDX-License-Identifier: Apache-2.0
"""Statistics by name, against their definitions."""
import pytest
import torch

from torch_utils import distributed
from torch_utils.training_stats import Collector


def test_moments_over_several_reports():
    collector, parts = Collector(), [torch.randn(3, 4), torch.randn(5), torch.tensor(2.0)]
    for part in parts:
        collector.report("x", part)
    collector.report("y", 1.5)
    found, values = collector.update(), torch.cat([part.flatten() for part in parts]).double()
    assert (found["x"].num, found["y"].num) == (18, 1)
    assert found["x"].mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert found["x"].std == pytest.approx(float(values.std(correction=0)), rel=1e-9)
    assert (found["y"].mean, found["y"].std) == (1.5, 0)
    assert collector.update() == {}


def test_what_only_another_process_has_reported(monkeypatch):
    """Its names are in the table of every process."""
    collector = Collector()
    collector.report("mine", torch.ones(2))
    monkeypatch.setattr(distributed, "all_gather_object", lambda names: [names, ["theirs"]])
    monkeypatch.setattr(distributed, "all_reduce_sum",
                        lambda table: table + torch.tensor([[0.0, 0, 0], [4, 8, 20]], dtype=torch.float64))
    found = collector.update()
    assert (found["mine"].num, found["mine"].mean) == (2, 1)
    assert (found["theirs"].num, found["theirs"].mean, found["theirs"].std) == (4, 2, 1)
