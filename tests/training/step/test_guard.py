# SPDX-License-Identifier: Apache-2.0
"""Non-finite gradients: what replaces them, and what is counted."""
import torch

from torch_utils.training_stats import Collector
from training.step.guard import GradientGuard

NAN, INF = float("nan"), float("inf")


def test_nonfinite_gradients_are_counted_and_replaced(monkeypatch):
    monkeypatch.setattr(GradientGuard, "LIMIT", 3)
    collector = Collector()
    guard = GradientGuard(8, collector.report)
    for _ in range(2):
        guard.sanitize_("Gmain", torch.tensor([1.0, NAN, INF]))
        guard.sanitize_("Dmain", torch.tensor([3.0, 4.0]))
    assert guard.failed() is None
    assert not guard.is_clean()
    assert guard.counts() == {"Gmain": 4, "Dmain": 0}
    assert guard.first_element("Gmain") == 1
    assert guard.first_element("Dmain") is None
    assert collector.update()["Gradients/Dmain"].mean == 5
    grad = torch.tensor([NAN, -INF])
    guard.sanitize_("Gmain", grad)
    assert grad.tolist() == [0.0, -1e5]
    assert guard.failed() == "Gmain"
    guard.sanitize_("Gmain", torch.ones(2))     # A good step ends the row.
    assert guard.failed() is None
    assert guard.is_clean()
