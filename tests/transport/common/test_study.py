"""The command line that all studies share, exact transport, and the critic's parts."""
import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.closeness import approx, assert_close
from transport.common import critics, ot_exact, plotting
from transport.common.study import option, seeded, study_command


@dataclasses.dataclass(frozen=True)
class Config:
    """Counts."""

    steps: int = option(100, "Steps", min=1)
    theta: float = option(0.5, "Share of the way", min=0, max=1, open_min=True, open_max=True)
    loss: str = option("hinge", "Loss", choices=("hinge", "wasserstein"))
    device: str = option("auto", "Where to compute")
    source: str | None = option(None, "A file")

    def quick(self):
        return dataclasses.replace(self, steps=3)


@dataclasses.dataclass(frozen=True)
class Result:
    config: Config

    def headline(self):
        return {"steps": self.config.steps, "theta": self.config.theta, "device": self.config.device}


def draw(result, folder):
    figure, axes = plotting.panels(1, 2)
    plotting.draw_points(axes[0, 0], np.zeros([3, 2]))
    plotting.draw_images(axes[0, 1], np.zeros([3, 4, 4], dtype=np.uint8), columns=2)
    return [plotting.save(figure, folder / "points.png")]


def call(*args):
    return CliRunner().invoke(study_command("counting", Config, Result, draw), args)


def test_command(tmp_path):
    done = call("--theta=0.25", "--device=cpu", "--quick", f"--outdir={tmp_path}/out")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert line == {"study": "counting", "steps": 3, "theta": 0.25, "device": "cpu"}
    record = json.loads((tmp_path / "out/result.json").read_text())
    assert record["config"]["loss"] == "hinge"
    assert record["steps"] == 3
    assert (tmp_path / "out/points.png").stat().st_size > 1000
    assert json.loads(call("--steps=7", "--quick", "--device=cpu").stdout)["steps"] == 7
    assert "Steps  [default: 100; x>=1]" in call("--help").stdout


@pytest.mark.parametrize(("args", "message"), [
    (["--theta=1"], "--theta=1.0: must be below 1"),
    (["--theta=0"], "--theta=0.0: must be above 0"),
    (["--theta=nan"], "nan is not a finite number"),
    (["--steps=0"], "--steps=0: must be at least 1"),
    (["--loss=l2"], "Invalid value for '--loss'"),
])
def test_mistakes(args, message):
    done = call(*args)
    assert done.exit_code == 2
    assert message in done.stderr


def test_streams():
    draws = [torch.rand(3, generator=seeded(seed, stream)) for seed, stream in ((0, "z"), (0, "z"), (1, "z"), (0, "t"))]
    assert torch.equal(draws[0], draws[1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])


@pytest.mark.numeric
def test_w1():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=[40, 1]), rng.normal(size=[40, 1]) + 1
    assert ot_exact.w1(x, y) == approx(scipy.stats.wasserstein_distance(x[:, 0], y[:, 0]), abs=1e-12)
    partner, distance = ot_exact.assignment(np.array([[0.0, 0], [4, 0]]), np.array([[4.0, 3], [0, 1]]))
    assert partner.tolist() == [1, 0]
    assert distance.tolist() == [1, 3]
    with pytest.raises(UserError, match="two of one shape"):
        ot_exact.w1(x, y[:3])


@pytest.mark.numeric
def test_critic():
    x = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    assert_close(critics.gradient(lambda x: 2 * x.norm(dim=1), x), 2 * x / x.norm(dim=1, keepdim=True),
                 rtol=1.3e-6, atol=1e-5)
    for factor, one, two in ((2, 1, 1), (0.5, 0, 0.25)):
        def cone(x, factor=factor):
            return factor * x.norm(dim=1)
        assert critics.penalty(cone, x).item() == approx(one, abs=1e-6)
        assert critics.penalty(cone, x, two_sided=True).item() == approx(two, abs=1e-6)
    z = critics.between(torch.zeros(1000, 2), torch.ones(1000, 2), seeded(0, "t"))
    assert torch.equal(z[:, 0], z[:, 1])        # One t per sample, not per number.
    assert z.mean().item() == pytest.approx(0.5, abs=0.03)
    net = critics.MLP(2)
    assert net(x).shape == (2,)
    assert critics.MLP(2, out_features=5)(x).shape == (2, 5)
    assert math.isfinite(critics.penalty(net, x).item())


@pytest.mark.numeric
def test_largest_distance_for_a_critics_value():
    """P = W1 + W1^2 / (4 Lam) where all pairs are equally far apart, so that the bound is W1."""
    assert critics.w1_at_most(30 + 900 / 40, 10) == approx(30, abs=1e-9)
    assert critics.w1_at_most(-1, 10) == 0
    with pytest.raises(UserError, match="Lam 0: the weight of the penalty"):
        critics.w1_at_most(1, 0)
