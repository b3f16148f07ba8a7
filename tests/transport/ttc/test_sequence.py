"""Trust the Critics on problems with closed forms."""
import math

import numpy as np
import pytest
import scipy.stats
import torch

from dnnlib import UserError
from tests.closeness import approx, assert_close
from transport.common import ot_exact
from transport.common.critics import w1_at_most
from transport.common.study import seeded
from transport.ttc.critic_sequence import FinishedCritic, MovedLaw, Training, fit, move, parse_schedule, push
from transport.ttc.denoising import regularise
from transport.ttc.image_critics import NormTaker, make_critic
from transport.ttc.laws import Normal, Table

pytestmark = pytest.mark.numeric


def norm(x):
    return x.flatten(1).norm(dim=1)


class Sphere:
    """Unit sphere."""

    shape = (3,)

    def draw(self, num, generator):
        x = torch.randn([num, 3], generator=generator)
        return x / x.norm(dim=1, keepdim=True)


class Origin(Sphere):
    """The origin alone."""

    def draw(self, num, generator):
        return torch.zeros(num, 3)


@pytest.mark.parametrize(("version", "theta", "expected"), [
    (1, 0.5, [1.00025000, 0.49968734, 0.24973444]),
    (2, 0.9, [1.00025, 0.09932735, 0.00992585]),
])
def test_sphere_to_origin_with_trained_critics(version, theta, expected):
    """a |x| is optimal for a = 1 + R / (2 Lam), its value is R + R^2 / (4 Lam). Tolerance: 1e-3 of the first R."""
    training = Training(version=version, theta=theta, iterations=300, batch=4, lr=2e-3)
    sequence = fit(Sphere(), Origin(), make_critic("norm", (3,)), [1] * len(expected), training)
    radius = 1.0
    for finished, value in zip(sequence, expected, strict=True):
        assert finished.estimates[0] == pytest.approx(value, abs=1e-3)
        assert finished.etas[0] == pytest.approx(theta * value, abs=1e-3)
        # Adam makes steps of about the learning rate near the optimum, too: some of them in a row are allowed.
        assert finished.critic.a.item() == pytest.approx(1 + radius / 2000, abs=6 * training.lr)
        assert w1_at_most(finished.estimates[0], 1000) == pytest.approx(radius, abs=1e-3)
        radius = abs(radius - finished.etas[0] * finished.critic.a.item())
    ends = push(sequence, Sphere().draw(10, seeded(0, "test"))).norm(dim=1)
    assert_close(ends, torch.full([10], radius), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("theta", "expected"), [                   # The recursion itself, without training.
    (0.5, [1.00025000, 0.49968734, 0.24973444, 0.12483994, 0.06241315]),
    (0.7, [1.00025, 0.29949733, 0.08979740, 0.02693456]),
    (0.9, [1.00025, 0.09932735, 0.00992585, 0.00099252]),
    (1.0, [1.00025, 0.00075013])])
def test_sphere_to_origin_with_optimal_critics(theta, expected):
    x = torch.nn.functional.normalize(Sphere().draw(5, seeded(0, "test")).double())      # On the sphere to 1e-16.
    for value in expected:
        radius = x.norm(dim=1).mean().item()
        estimate = radius + radius ** 2 / 4000
        assert estimate == pytest.approx(value, abs=6e-9)
        x = move(lambda x, a=1 + radius / 2000: a * norm(x), x, theta * estimate)


def potential_on_the_line(x, y):
    """A function with the slope of an optimal potential at every x [N, 1]; both samples of equal size."""
    order = x[:, 0].argsort()
    slope = torch.empty_like(x[:, 0])
    slope[order] = (x[order, 0] - y[:, 0].sort().values).sign()
    return lambda z: slope * z[:, 0]


@pytest.mark.parametrize(("low", "high", "theta", "expected", "tolerance"), [
    (3, 4, 0.5, [3, 1.5, 0.75, 0.375, 0.1875], 1e-6),
    (2, 5, 0.5, [3, 1.5, 0.78125, 0.5333], 1e-3),
    (2, 5, 0.9, [3, 0.545, 0.2951, 0.1690], 1e-3)])
def test_on_the_line_with_exact_potentials(low, high, theta, expected, tolerance):
    quantiles = ((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).unsqueeze(1)
    x, y = quantiles, low + (high - low) * quantiles
    for value in expected:
        w1 = scipy.stats.wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())
        assert w1 == pytest.approx(value, abs=tolerance)
        x = move(potential_on_the_line(x, y), x, theta * w1)


@pytest.mark.parametrize(("dim", "theta", "expected"), [
    (2, 1, [1.253314, 0.526621, 0.306605, 0.171644]), (2, 0.5, [1.253314, 0.704072, 0.476292, 0.335837]),
    (3072, 0.9, [55.421115, 5.542112, 0.728417, 0.420624]), (3072, 1, [55.421115, 0.564170, 0.341249])])
def test_normal_to_origin(dim, theta, expected):
    """Radii at the quantiles of the chi law, so that 1,000 samples are as good as millions."""
    radii = scipy.stats.chi.ppf((np.arange(1000) + 0.5) / 1000, dim)
    x = torch.nn.functional.normalize(Normal((dim,)).draw(1000, seeded(0, "test")).double(), dim=1)
    x = x * torch.from_numpy(radii).unsqueeze(1)
    for value in expected:
        distance = x.norm(dim=1).mean().item()
        assert distance == pytest.approx(value, rel=0.01)
        x = move(norm, x, theta * distance)


@pytest.mark.parametrize("theta", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("dim", [1, 2, 20])
def test_bounds_of_one_step(dim, theta):
    """W1 - eta <= W1' <= mean |d - eta|, with equality on the left where nothing overshoots."""
    rng = np.random.default_rng(dim)
    for x, y in ((rng.normal(size=[60, dim]), 2 * rng.normal(size=[60, dim])),
                 (rng.normal(size=[60, dim]), rng.normal(size=[60, dim]) + 20)):
        partner, distance = ot_exact.assignment(x, y)
        away = torch.from_numpy((x - y[partner]) / distance[:, None])
        eta = theta * distance.mean()
        moved = move(lambda z, away=away: (away * z).sum(dim=1), torch.from_numpy(x), eta).numpy()
        w1 = ot_exact.w1(moved, y)
        assert distance.mean() - eta - 1e-9 <= w1 <= np.abs(distance - eta).mean() + 1e-9
        if eta <= distance.min():
            assert w1 == approx((1 - theta) * distance.mean(), abs=1e-9)


def test_minimiser_of_adversarial_regularisation():
    y = torch.tensor([[5.0, 0, 0], [0, -3, 4], [2, 2, 1]], dtype=torch.float64)
    centre = torch.tensor([1.0, 0, 0], dtype=torch.float64)
    weight = 2.0
    exact = y - weight / 2 * (y - centre) / norm(y - centre).unsqueeze(1)
    torch.testing.assert_close(regularise(lambda x: norm(x - centre), y, weight), exact, atol=1e-6, rtol=0)
    early = regularise(lambda x: norm(x - centre), y, weight, steps=10)
    assert_close(early - exact, 0.9 ** 10 * (y - exact), rtol=1e-7, atol=1e-7)
    assert_close(move(lambda x: norm(x - centre), y, weight / 2), exact, rtol=1e-7, atol=1e-7)


def test_density_after_a_step():
    """Radii that do not overshoot keep the chi law, shifted by eta: p'(r) = p(r + eta)."""
    dim, eta = 3, 0.6
    x = Normal((dim,)).draw(200_000, seeded(0, "test"))
    moved = norm(move(norm, x, eta))[norm(x) > eta].numpy()
    edges = np.linspace(0, 3, 16)
    expected = np.diff(scipy.stats.chi.cdf(edges + eta, dim))
    np.testing.assert_allclose(np.histogram(moved, edges)[0] / len(x), expected, atol=3e-3)

#----------------------------------------------------------------------------

def test_gradients_of_earlier_steps_are_cut():
    critic = make_critic("mlp", (3,), 4)
    moved = MovedLaw(Sphere(), 0, 0, torch.device("cpu"))
    moved.add(critic, 0.5)
    x = moved.draw(4, seeded(0, "x"))
    assert not x.requires_grad
    assert x.grad_fn is None
    assert_close(x, move(critic, Sphere().draw(4, seeded(0, "x")), 0.5), rtol=1.3e-6, atol=1e-5)


def test_a_pool_moves_once():
    pool = MovedLaw(Sphere(), 20, 0, torch.device("cpu"))
    start = pool.pool
    pool.add(norm, 0.25)
    assert_close(pool.pool, 0.75 * start, rtol=1.3e-6, atol=1e-5)
    x = pool.draw(50, seeded(0, "x"))
    assert all((pool.pool == row).all(dim=1).any() for row in x)


def test_next_critic_starts_from_the_weights_of_the_last():
    training = Training(iterations=1, batch=4, lr=1e-2)
    sequence = fit(Sphere(), Origin(), make_critic("norm", (3,)), [1, 1], training)
    # With a new Adam the first step is the learning rate, whatever came before.
    assert abs(sequence[1].critic.a - sequence[0].critic.a).item() == pytest.approx(1e-2, rel=1e-3)
    assert not any(p.requires_grad for finished in sequence for p in finished.critic.parameters())


def test_no_step_against_a_negative_estimate():
    critic = NormTaker()
    with torch.no_grad():
        critic.a.fill_(-0.5)
    for version in (1, 2):
        sequence = fit(Sphere(), Origin(), critic, [1], Training(version=version, iterations=1, batch=4, lr=1e-6))
        assert sequence[0].estimates[0] == pytest.approx(-0.5, abs=1e-3)
        assert sequence[0].etas == (0.0,)
        x = Sphere().draw(3, seeded(0, "x"))
        assert torch.equal(push(sequence, x), x)


def test_version_2_estimates_before_each_step():
    training = Training(version=2, theta=0.5, iterations=300, batch=4, lr=3e-3)
    finished, = fit(Sphere(), Origin(), make_critic("norm", (3,)), [3], training)
    a = finished.critic.a.item()
    estimates, radius = [], 1.0
    for _ in range(3):
        estimates.append(a * radius - 1000 * (a - 1) ** 2)
        radius -= 0.5 * estimates[-1] * a
    assert finished.estimates == approx(estimates, abs=1e-5)
    assert finished.etas == approx([0.5 * value for value in estimates], abs=1e-5)


def test_schedule():
    assert parse_schedule("2x2, 3x1") == (2, 2, 1, 1, 1)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: Training(theta=1.0).check([1]), "--theta=1.0: version 1 moves by a share between 0 and 1"),
    (lambda: Training(theta=0.0).check([1]), "--theta=0.0: version 1"),
    (lambda: Training(version=2, theta=1.5).check([1]), "--theta=1.5: version 2 moves by a share above 0 and up to 1"),
    (lambda: Training(version=2, theta=0.0).check([1]), "--theta=0.0: version 2"),
    (lambda: Training(theta=math.nan).check([1]), "--theta=nan"),
    (lambda: Training().check([1, 2]), "--schedule has 2 steps per critic, but version 1 takes one"),
    *[(lambda text=text: parse_schedule(text), f"--schedule={text}: give critics x steps")
      for text in ("0x1", "4x0", "4", "", "4x1,", "-1x1")]])
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_divergence_is_an_error():
    training = Training(iterations=3, batch=4, lr=1e30)
    with pytest.raises(UserError, match=r"--lr=1e\+30: critic 1 diverged"):
        fit(Normal((2,)), Table(torch.ones(3, 2)), make_critic("mlp", (2,), 4), [1], training)


def test_push_is_the_composition():
    sequence = [FinishedCritic(NormTaker(), (1.0, 0.5), (0.2, 0.0)), FinishedCritic(NormTaker(), (0.5,), (0.1,))]
    x = Sphere().draw(300, seeded(0, "x"))
    by_hand = move(sequence[1].critic, move(sequence[0].critic, x, 0.2), 0.1)
    assert_close(push(sequence, x), by_hand, rtol=1.3e-6, atol=1e-5)
