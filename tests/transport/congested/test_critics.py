"""Critics of the congested problem: measured with known solutions in place of trained ones, then trained ones."""
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.closeness import approx
from transport.common import critics
from transport.common.study import seeded
from transport.congested import critic_training, experiment, finite_sample, momentum, oracles, pairs
from transport.congested.critic_training import Recipe

pytestmark = pytest.mark.numeric

LINE, LINE_PAIR = oracles.line_gaussians(0, 1, 2, 1), pairs.gaussians([0.0], 1, [2.0], 1)
RADIAL, RADIAL_PAIR = oracles.radial_gaussians(2, 1, 2), pairs.gaussians([0.0, 0], 1, [0.0, 0], 2)


class Radial(torch.nn.Module):
    """u(|x|) of an exact solution, from a table: linear between 2000 radii."""

    def __init__(self, exact, lamb, sign=1):
        super().__init__()
        r = np.linspace(1e-6, exact.high, 2000)
        slope = sign * exact.slope(r, lamb)
        u = np.concatenate([[0], np.cumsum((slope[1:] + slope[:-1]) / 2 * np.diff(r))])
        self.step, self.u = float(r[1] - r[0]), torch.from_numpy(u).float()

    def forward(self, x):
        place = x.norm(dim=1) / self.step
        index = place.detach().long().clamp_max(len(self.u) - 2)
        return self.u[index].lerp(self.u[index + 1], place - index)


def test_measure_on_a_sphere():
    radius, lamb, dims = 2.0, 10.0, 7

    def draw(count, generator):
        x = torch.randn(count, dims, generator=generator)
        return radius * x / x.norm(dim=1, keepdim=True), torch.zeros(count, dims)
    best = 1 + radius / (2 * lamb)
    reached = critic_training.measure(lambda x: best * x.norm(dim=1), draw, Recipe(lamb), seeded(0, "m"),
                                      count=100, rounds=3)
    assert reached.gap == approx(best * radius, abs=1e-4)
    assert reached.penalty == approx(lamb * (best - 1) ** 2, abs=1e-4)
    assert reached.objective == approx(2.1, abs=1e-4)
    assert reached.norms == approx(best, abs=1e-4)
    for slope, penalty in ((0.5, 0), (1.5, 2.5)):       # Below 1 the two-sided penalty alone counts.
        for sides, expected in zip(critic_training.SIDES, (penalty, 2.5), strict=True):
            reached = critic_training.measure(lambda x, a=slope: a * x.norm(dim=1), draw, Recipe(lamb, sides),
                                              seeded(0, "m"), count=100, rounds=2)
            assert reached.penalty == approx(expected, abs=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_measure_and_flow_of_an_exact_critic(sign):
    critic = Radial(RADIAL, 1, sign)
    draw = RADIAL_PAIR if sign == 1 else lambda count, generator: RADIAL_PAIR(count, generator)[::-1]
    reached = critic_training.measure(critic, draw, Recipe(1), seeded(0, "m"), count=20_000, rounds=20)
    assert reached.objective == pytest.approx(RADIAL.value(1), abs=3 * reached.error)
    assert reached.penalty == pytest.approx(RADIAL.excess(1), abs=0.02)
    assert reached.error < 0.01
    assert reached.norms.min() >= 1 - 1e-4              # The flow is everywhere, so the slope is above 1 everywhere.
    assert reached.norms.mean() > 1.3
    density, edges = reached.histogram()
    assert density.sum() * (edges[1] - edges[0]) == approx(1)
    assert reached.summary()["objective"] == pytest.approx(reached.objective, abs=1e-4)

    found = momentum.field(critic, draw, 1, seeded(0, "f"), half_width=6, cells=60, samples=400_000)
    assert found.sigma.sum() * 0.2 ** 2 == pytest.approx(1, abs=0.01)
    r = np.hypot(*np.meshgrid(found.centres, found.centres, indexing="ij"))
    radial = (found.flow[..., 0] * found.centres[:, None] + found.flow[..., 1] * found.centres[None]) / r
    band = (r > 1) & (r < 3)
    flux = radial[band] * 2 * np.pi * r[band]           # The flux through a circle is F_x - F_y of the radius.
    expected = -sign * RADIAL.at(r[band])[0]
    assert flux.mean() == pytest.approx(expected.mean(), rel=0.01)
    assert np.abs(flux - expected).mean() < 0.1 * np.abs(expected).mean()     # A histogram has noise.
    assert found.shortfall < 0.1


def test_momentum():
    gradient = np.array([[3.0, 4], [0.3, 0.4], [0, 0], [0, -2]])
    flow = momentum.momentum(gradient, np.array([0.5, 0.5, 0.5, 0]), 10)
    assert flow == approx(np.array([[-24, -32], [0, 0], [0, 0], [0, 0]]))    # -2 * 10 * .5 * 4 * [.6, .8]


def test_pairs():
    generator = seeded(0, "p")
    x, y = pairs.resample(torch.arange(3.0)[:, None], torch.arange(3.0)[:, None])(2000, generator)
    counts = np.histogram2d(x[:, 0].numpy(), y[:, 0].numpy(), bins=3)[0]
    assert counts.min() > 150           # All pairs come, not only i with i.
    x, y = pairs.blobs()(5000, generator)
    assert x.std(dim=0).tolist() == pytest.approx([0.4, 0.4], abs=0.02)
    assert y[:, 0].abs().mean().item() == pytest.approx(1.5, abs=0.03)
    assert y[:, 0].mean().item() == pytest.approx(0, abs=0.1)
    x, y = pairs.ring()(5000, generator)
    assert y.norm(dim=1).mean().item() == pytest.approx(1.5, abs=0.03)
    assert x.mean(dim=0).tolist() == pytest.approx([-0.5, 0], abs=0.03)


def test_training_is_settled_by_its_seed():
    recipe = Recipe(1, steps=3, batch=16, width=8)
    places = torch.linspace(-1, 3, 5)[:, None]
    one, same, other = (critic_training.train(LINE_PAIR, recipe, seeded(seed, "t"))(places) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("draw", "recipe", "message"), [
    (LINE_PAIR, Recipe(0), "Lam 0"),
    (LINE_PAIR, Recipe(-1), "Lam -1"),
    (LINE_PAIR, Recipe(1, sides="no"), "sides no: choose from one-sided, two-sided"),
    (lambda n, g: (torch.zeros(n, 2), torch.zeros(n, 3)), Recipe(1), r"shapes \[2, 2\] and \[2, 3\]"),
    (lambda n, g: (torch.zeros(n, 2), torch.full([n, 2], torch.inf)), Recipe(1), "not finite"),
])
def test_mistakes(draw, recipe, message):
    with pytest.raises(UserError, match=message):
        critic_training.train(draw, recipe, seeded(0, "t"))


#----------------------------------------------------------------------------
# Trained critics. The longer trainings' numbers are in docs/transport.md.

def trained(draw, seed, **settings):
    recipe = Recipe(1, **{"steps": 400, **settings})
    critic = critic_training.train(draw, recipe, seeded(seed, "train"))
    return critic, critic_training.measure(critic, draw, recipe, seeded(seed, "measure"), count=10_000)


@pytest.mark.slow
@pytest.mark.parametrize("sides", critic_training.SIDES)
def test_trained_on_the_line(sides):
    critic, reached = trained(LINE_PAIR, 0, sides=sides)
    slope = lambda r: critics.gradient(critic, torch.from_numpy(r).float()[:, None])[:, 0].numpy().astype(np.float64)
    assert 0.995 * LINE.value(1) <= LINE.value_of(slope, 1) <= LINE.value(1)     # This has no noise.
    assert reached.objective == pytest.approx(3.0517, abs=3 * reached.error + 0.01)
    assert (reached.gap, reached.penalty) == pytest.approx((4.1034, 1.0517), abs=0.05)
    r = np.linspace(-0.5, 2.5, 13)
    assert slope(r) == pytest.approx(LINE.slope(r, 1), abs=0.08)
    m, sigma = LINE.at(r)
    assert momentum.momentum(slope(r)[:, None], sigma, 1)[:, 0] == pytest.approx(-m, abs=0.06)


@pytest.mark.slow
def test_trained_in_the_plane():
    _, reached = trained(RADIAL_PAIR, 0)
    assert 0.97 * RADIAL.value(1) <= reached.objective <= RADIAL.value(1) + 3 * reached.error
    assert reached.norms.mean() > 1


@pytest.mark.slow
def test_trained_on_three_points():
    x, y = torch.tensor(experiment.FEW_X), torch.tensor(experiment.FEW_Y)
    allowed = finite_sample.solve(x.numpy(), y.numpy(), 1).dual
    _, reached = trained(pairs.resample(x, y), 0, steps=600, rate=1e-2, batch=256)
    assert 0.9 * allowed <= reached.objective <= allowed + 3 * reached.error


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run of the command that only goes through all parts."""
    folder = tmp_path_factory.mktemp("congested")
    done = CliRunner().invoke(experiment.main, [
        "--quick", "--steps=3", "--rounds=2", "--rungs=2", "--count=200", "--sample=50", "--points=8", "--width=8",
        f"--outdir={folder}"])
    assert done.exit_code == 0, done.output
    return folder, json.loads(done.stdout.splitlines()[-1])


def test_command(tiny):
    folder, line = tiny
    assert line["study"] == "congested"
    assert [row["exact"] for row in line["line"]["critics"]] == [3.0517, 2.1052]
    assert [row["exact"] for row in line["radial"]["critics"]] == [1.9579, 1.3238]
    assert all(row["objective"] < row["exact"] + 0.2 for row in line["line"]["critics"])
    assert line["three_points"]["allowed"] == 3.7494
    assert [row["points"] for row in line["memory"]["samples"]] == [2, 8]
    for name in ("blobs", "ring"):
        assert 0 < line[name]["at_least"] < line[name]["at_most"]
        assert line[name]["w1_sample"] < line[name]["at_least"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "congested_gradient.png", "congested_momentum.png", "congested_values.png", "result.json"]


@pytest.mark.parametrize(("args", "message"), [
    (["--lamb-low=0"], "--lamb-low=0.0: must be above 0"),
    (["--lamb-low=5", "--lamb-high=5"], "--lamb-low=5.0: must be below --lamb-high=5.0"),
    (["--points=1"], "--points=1: must be at least 2"),
    (["--rungs=1"], "--rungs=1: must be at least 2"),
])
def test_mistakes_on_the_command_line(args, message):
    done = CliRunner().invoke(experiment.main, args)
    assert done.exit_code == 2
    assert message in done.stderr
