"""Trained generators with a one-dimensional latent against the bound, and the study's command."""
import dataclasses
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.closeness import assert_close
from tests.transport.latent1d.speeds import lipschitz
from transport.common.study import seeded
from transport.latent1d import experiment, line_generators
from transport.latent1d.cases import solve, train
from transport.latent1d.curves import optimal_curve
from transport.latent1d.line_generators import LineGenerator, Training
from transport.latent1d.point_sets import KNOWN

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("field", line_generators.FIELDS)
def test_never_faster_than_allowed(field):
    model = LineGenerator(Training(speed=3.5, field=field, cells=32), np.zeros(2), seeded(0, "t"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(30)
    assert 3 < lipschitz(model.curve()) <= 3.5 * (1 + 1e-9)
    places = model.middles().detach().double().numpy()
    assert_close(places, model.curve().grid(32), atol=1e-4, rtol=1e-7)


@pytest.mark.parametrize(("name", "tight"), [("triangle", 1.15), ("star", 1.4)])
def test_trained_on_exact_transport(name, tight):
    case = solve(KNOWN[name])
    training = Training(speed=1.5 * case.walk.threshold, steps=300, cells=96)
    random = train(case, training, seed=0, number=0)
    assert 0.98 <= random.ratio < tight
    assert lipschitz(random.curve) <= training.speed * (1 + 1e-9)


def test_training_finds_nothing_below_the_optimum():            # Not even in the plane.
    case = solve(KNOWN["eight"])
    training = Training(speed=case.walk.threshold, steps=100, cells=160, slow=0, lr=0.0125)
    start = optimal_curve(case.points, case.walk, training.speed)
    after = train(case, training, seed=0, number=0, start=start)
    assert 0.98 <= after.ratio < 1.02


@pytest.mark.slow
@pytest.mark.parametrize("field", line_generators.FIELDS)
def test_trained_against_a_critic(field):                       # A WGAN comes nearer and never goes below the bound.
    case = solve(KNOWN["triangle"])
    training = Training(speed=2 * case.walk.threshold, field=field, loss="critic", steps=150, cells=48)
    short, long = (train(case, dataclasses.replace(training, steps=steps), seed=0, number=0) for steps in (1, 150))
    assert 0.98 <= long.ratio < short.ratio
    assert (long.field, long.loss, long.start) == (field, "critic", "random")


def test_same_seed_same_curve():
    training = Training(speed=6, loss="critic", steps=3, cells=16)
    first, same, other = (line_generators.train(KNOWN["triangle"], training, seeded(s, "t")).places for s in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("changes", "message"), [
    ({"speed": 0}, "a Lipschitz constant of 0: must be above 0"),
    ({"field": "sound"}, "sound: choose from table, network"),
    ({"loss": "l2"}, "l2: choose from transport, critic"),
])
def test_mistakes(changes, message):
    training = dataclasses.replace(Training(speed=1, steps=1), **changes)
    with pytest.raises(UserError, match=message):
        line_generators.train(KNOWN["star"], training, seeded(0, "t"))


def test_a_network_starts_at_random():
    case = solve(KNOWN["star"])
    start = optimal_curve(case.points, case.walk, 8)
    with pytest.raises(UserError, match="field=table"):
        line_generators.train(case.points, Training(speed=8, field="network"), seeded(0, "t"), start=start)

#----------------------------------------------------------------------------

SMALL = ["--steps=2", "--cells=24", "--starts=1", "--largest=16", "--draws=2", "--gap=0.1"]


@pytest.mark.slow
def test_command(tmp_path):
    (tmp_path / "points.csv").write_text("0\n1\n3\n")
    done = CliRunner().invoke(experiment.main, [*SMALL, f"--points={tmp_path}/points.csv", f"--outdir={tmp_path}/out"])
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert (line["points"], line["dims"], line["c"], line["k_threshold"]) == (3, 1, 5, 4.5)
    assert line["optimal_over_bound"] == pytest.approx(1, abs=1e-3)
    assert line["w1_median"] == pytest.approx(1)
    assert line["ratio_table_transport"] >= 0.98
    for name in ("latent1d", "latent1d_rates", "latent1d_curves"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(("args", "message"), [
    (["--speed=0"], "--speed=0.0: must be above 0"),
    (["--points=points.txt"], "--points=points.txt: give a .npy or a .csv file"),
    (["--largest=1000"], "--largest=1000: must be at most"),
])
def test_command_mistakes(args, message):
    done = CliRunner().invoke(experiment.main, [*SMALL, *args])
    assert done.exit_code == 2
    assert message in done.stderr
