# SPDX-License-Identifier: Apache-2.0
"""Where gradients stop being finite: the search for it, and a whole run with an injected fault."""
import json

import pytest
import torch

import training.trainer
from legacy import open_snapshot
from tests.training.test_loop import only_run
from tests.training.watch.test_health import run
from training.run.snapshots import snapshot_name
from training.step.guard import GradientGuard
from training.step.phases import Phase
from training.watch.health import EXIT_NONFINITE
from training.watch.nonfinite import ForwardWatch, is_finite, last_good_snapshot, parameter_at

NAN, INF = float("nan"), float("inf")


class Net(torch.nn.Module):
    """Its layers run in another order than they are registered in."""

    def __init__(self):
        super().__init__()
        self.last = torch.nn.Linear(3, 2)
        self.first = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())

    def forward(self, x):
        return {"out": [self.last(self.first(x))]}


def test_first_layer_that_is_not_finite_is_found():
    net = Net()
    names = [name for name, _ in net.named_parameters()]
    with ForwardWatch({"net": net}) as watch:
        net(torch.zeros(1, 2))
    assert watch.first_bad is None
    assert watch.in_forward_order([f"net.{n}" for n in names])[0] == "net.first.0.weight"
    net.last.bias.data[0] = NAN
    with ForwardWatch({"net": net}) as watch:
        net(torch.zeros(1, 2))
    assert watch.first_bad == "net.last"
    net.first[0].weight.data[0] = INF
    with ForwardWatch({"net": net}) as watch:
        net(torch.ones(1, 2))
    assert watch.first_bad == "net.first.0"
    with ForwardWatch({"net": net}) as watch:
        pass
    net(torch.ones(1, 2))
    assert not watch.order                      # Hooks are gone after the block.


def test_name_of_an_element():
    net = Net()
    phase = Phase("Gmain", net, list(net.parameters()), None, 1, None)
    assert [parameter_at(phase, i) for i in (0, 6, 8, 13)] == ["last.weight", "last.bias", "first.0.weight",
                                                               "first.0.weight"]
    assert parameter_at(phase, None) is None


def test_is_finite_looks_into_everything():
    assert is_finite({"a": [torch.ones(2), (torch.tensor(3),)], "b": "text"})
    assert not is_finite({"a": [torch.ones(2), (torch.tensor(INF),)]})

#----------------------------------------------------------------------------
# Whole runs.

@pytest.mark.slow
@pytest.mark.parametrize("notices", ["weights", "gradients"])
def test_injected_nan_stops_the_run_and_names_the_layer(data16, tmp_path, monkeypatch, reports, notices):
    """From the third iteration on a layer of G makes NaN. The end of a tick notices the weight, which would be saved
    there; within a tick the gradients show it."""
    monkeypatch.setattr(GradientGuard, "LIMIT", 3)
    make_phases, seen = training.trainer.make_phases, []

    def poisoned_phases(G, *args):
        phases = make_phases(G, *args)
        backward = phases[0].backward

        def poisoned(batch, global_batch):
            seen.append(batch)
            if len(seen) == 3:
                G.synthesis.L1_20_16.weight.data[0] = NAN
            backward(batch, global_batch)

        object.__setattr__(phases[0], "backward", poisoned)
        return phases

    monkeypatch.setattr(training.trainer, "make_phases", poisoned_phases)
    tick = {"weights": "0.016", "gradients": "0.4"}[notices]
    result = run(tmp_path, data16, "--kimg=0.8", f"--tick={tick}", "--snap=1")
    assert result.exit_code == EXIT_NONFINITE == 4
    assert len(seen) <= 3 + 2 * 3                               # It is noticed within two limits and one more look.
    folder = only_run(tmp_path)
    (path,) = folder.glob("nonfinite-*.json")
    dump = json.loads(path.read_text())
    assert dump["phase"] == "Gmain"
    assert dump["not_finite_in_the_state"] == (None if notices == "gradients" else "G.synthesis.L1_20_16.weight")
    assert dump["steps_in_a_row"] >= {"weights": 1, "gradients": 3}[notices]
    assert dump["first_bad_layer"] == "G.synthesis.L1_20_16"
    assert dump["first_bad_gradient"].startswith("G.mapping.")  # What runs first gets its gradient through the layer.
    assert dump["first_bad_gradient_of_the_last_step"] is not None
    assert dump["bad_weights"][0] == "G.synthesis.L1_20_16.weight"
    assert dump["nonfinite_elements"]["Gmain"] > 0
    for text in ("STOPPED", "Gmain", "G.synthesis.L1_20_16", dump["last_good_snapshot"], path.name):
        assert text in result.output
    assert path.name in (folder / "report.html").read_text()
    # Bad networks were not saved, although ticks with --snap=1 came by.
    saved = {"weights": [0, 16], "gradients": [0]}[notices]
    assert {p.name for p in folder.glob("network-snapshot-*.pkl")} == set(map(snapshot_name, saved))
    assert dump["last_good_snapshot"] == snapshot_name(saved[-1])
    for name in (dump["last_good_snapshot"], "best_model.pkl"):
        snapshot = open_snapshot(folder / name)
        assert is_finite([snapshot["G"], snapshot["G_ema"], snapshot["D"]])
        assert snapshot["progress"]["cur_nimg"] == saved[-1]


@pytest.mark.slow
def test_last_good_snapshot_is_readable_and_finite(data16, tmp_path):
    assert run(tmp_path, data16, "--kimg=0.008").exit_code == 0
    folder = only_run(tmp_path)
    good = folder / snapshot_name(8)
    content = torch.load(good, weights_only=True)
    content["G_ema"]["mapping.fc0.weight"][0] = NAN
    torch.save(content, folder / snapshot_name(1200))
    (folder / snapshot_name(20_000)).write_bytes(good.read_bytes()[:1000])
    assert last_good_snapshot(folder) == good.name
