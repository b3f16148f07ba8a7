"""Congested transport in one variable and on finite samples, against numbers that were computed independently."""
import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad

from dnnlib import UserError
from tests.closeness import approx, max_error
from transport.common.critics import w1_at_most
from transport.congested import finite_sample, oracles

pytestmark = pytest.mark.numeric

X = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]])
Y = np.array([[2.0, 0, 1], [0, 2, 1], [1, 1, 3]])
LINE = oracles.line_gaussians(0, 1, 2, 1)


def points(distance: float) -> oracles.Exact:
    """One point to one point at a distance, or a sphere of that radius to its centre; r runs from x to y."""
    return oracles.Exact(lambda r: -1.0 if 0 <= r <= distance else 0.0,
                         lambda r: 1 / distance if 0 <= r <= distance else 0.0, 0.0, distance)


def uniforms(shift: float) -> oracles.Exact:
    """U[0, 1] to U[shift, 1 + shift], shift > 0, whose densities have kinks."""
    def gap(r: float) -> float:
        return min(max(r - shift, 0.0), 1.0) - min(max(r, 0.0), 1.0)

    def density(r: float) -> float:
        def at(t: float) -> float:      # (1-t) x + t y is a trapezium over [t shift, 1 + t shift].
            short, long, s = min(t, 1 - t), max(t, 1 - t), r - t * shift
            return max(min(s, 1 - s, short), 0.0) / (short * long) if short > 0 else float(0 < s < 1)
        kinks = [0.5, r / shift, (r - 1) / shift, r / (1 + shift)] + ([] if shift == 1 else [(1 - r) / (1 - shift)])
        edges = [0.0, *sorted({kink for kink in kinks if 0 < kink < 1}), 1.0]
        return sum(quad(at, a, b, epsabs=1e-12, epsrel=1e-9)[0] for a, b in itertools.pairwise(edges))

    return oracles.Exact(gap, density, 0.0, 1 + shift, (1.0, shift))


@pytest.mark.parametrize(("exact", "w1", "congestion", "at_1", "at_10"), [
    pytest.param(points(2), 2, 4, 3, 2.1, id="sphere of radius 2"),
    pytest.param(points(1), 1, 1, 1.25, 1.025, id="sphere of radius 1"),
    pytest.param(LINE, 2, 4.206893, 3.051723, 2.105172, id="N(0,1) to N(2,1)"),
    pytest.param(oracles.line_gaussians(0, 1, 1, 1), 1, 1.089071, 1.272268, 1.027227, id="N(0,1) to N(1,1)"),
    pytest.param(oracles.line_gaussians(0, 1, 4, 1), 4, 16.260136, 8.065034, 4.406503, id="N(0,1) to N(4,1)"),
    pytest.param(oracles.line_gaussians(0, 1, 0, 2), .797885, 1.394885, 1.146606, .832757, id="N(0,1) to N(0,4)"),
    pytest.param(uniforms(0.5), 0.5, .272361, .568090, .506809, id="uniform shifted by 0.5"),
    pytest.param(uniforms(1), 1, 1.028261, 1.257065, 1.025707, id="uniform shifted by 1"),
    pytest.param(uniforms(2), 2, 4.016860, 3.004215, 2.100421, id="uniform shifted by 2"),
    pytest.param(oracles.radial_gaussians(2, 1, 2), 1.253314, 2.818176, 1.957858, 1.323769, id="normal, 2 features"),
    pytest.param(oracles.radial_gaussians(10, 1, 2), 3.084328, 14.897274, 6.808647, 3.456760, id="normal, 10 features"),
    pytest.param(oracles.circles(2, 1), 1, 1.536607, 1.384152, 1.038415, id="circles"),
])
def test_values(exact, w1, congestion, at_1, at_10):
    assert exact.w1 == pytest.approx(w1, abs=1e-5)
    assert exact.congestion == pytest.approx(congestion, abs=1e-5)
    assert exact.value(1) == pytest.approx(at_1, abs=1e-5)
    assert exact.value(10) == pytest.approx(at_10, abs=1e-5)
    # Two weights give W1 back; at finite weights P is above it.
    lamb = np.array([1.0, 10.0])
    value = np.array([exact.value(v) for v in lamb])
    assert oracles.extrapolate(lamb, value) == pytest.approx((w1, congestion), abs=1e-4)
    assert exact.w1 < exact.value(1000) < exact.value(10) < exact.value(1)


@pytest.mark.parametrize(("dims", "w1", "congestion", "at_1", "at_10", "at_1000"), [
    (100, 9.975032, 163.778, 50.9195, 14.069482, 10.015976),
    (784, 27.991073, 1325.285, 359.312, 61.123193, 28.322394),
])
def test_many_dimensions(dims, w1, congestion, at_1, at_10, at_1000):
    exact = oracles.radial_gaussians(dims, 1, 2)
    assert exact.w1 == pytest.approx(w1, abs=1e-5)
    assert exact.congestion == pytest.approx(congestion, abs=1e-3)      # The reference has no more digits.
    assert exact.value(1) == pytest.approx(at_1, abs=5e-4)
    assert exact.value(10) == pytest.approx(at_10, abs=1e-5)
    assert exact.value(1000) == pytest.approx(at_1000, abs=1e-5)


def test_few_dimensions_at_1000():
    assert oracles.radial_gaussians(2, 1, 2).value(1000) == pytest.approx(1.254019, abs=1e-5)
    assert oracles.radial_gaussians(10, 1, 2).value(1000) == pytest.approx(3.088052, abs=1e-5)


def test_densities():
    assert LINE.density(1) == pytest.approx(.413059, abs=1e-5)
    assert uniforms(0.5).density(0.75) == pytest.approx(2 * math.log(2), abs=1e-5)
    assert uniforms(1).density(1) == pytest.approx(2 * math.log(2), abs=1e-5)
    assert uniforms(2).density(1.5) == pytest.approx(.523247, abs=1e-5)
    assert oracles.circles(2, 1).density(1.5) == pytest.approx(.621458, abs=1e-5)
    for exact in (LINE, uniforms(0.5), oracles.radial_gaussians(10, 1, 2)):
        r = np.linspace(exact.low + 1e-9, exact.high, 401)
        assert np.trapezoid(exact.at(r)[1], r) == pytest.approx(1, abs=1e-3)


def test_gradients():
    assert np.abs(points(2).slope(np.array([0.5, 1.5]), 10)) == approx(1.1)
    places = np.array([1, 0, 2, -1, 3.0])
    assert np.abs(LINE.slope(places, 1)) == pytest.approx([1.8264, 2.0150, 2.0150, 2.4977, 2.4977], abs=1e-4)
    assert np.abs(LINE.slope(places, 10)) == pytest.approx([1.0826, 1.1015, 1.1015, 1.1498, 1.1498], abs=1e-4)
    assert (LINE.slope(places, 1) < 0).all()            # x is on the left, and the critic large on x.


@pytest.mark.parametrize("lamb", [1, 10])
def test_decomposition(lamb):
    r = np.linspace(LINE.low, LINE.high, 301)
    m, sigma = LINE.at(r)
    best = LINE.slope(r, lamb)
    gap = np.trapezoid(best * m, r)
    penalty = np.trapezoid(lamb * sigma * (np.abs(best) - 1) ** 2, r)
    assert penalty == pytest.approx(LINE.excess(lamb), abs=1e-6)
    assert gap == pytest.approx(LINE.w1 + 2 * LINE.excess(lamb), abs=1e-6)
    assert LINE.value_of(lambda r: best, lamb, points=301) == pytest.approx(LINE.value(lamb), abs=1e-6)
    if lamb == 1:
        assert (gap, penalty) == pytest.approx((4.1034, 1.0517), abs=1e-4)
    for other in (lambda r: 0.99 * best, lambda r: best + 0.05 * np.sin(r), np.zeros_like):
        assert LINE.value_of(other, lamb, points=301) < LINE.value(lamb)        # No critic reaches more.


def test_momentum():
    r = np.linspace(-3, 5, 41)
    m, sigma = LINE.at(r)
    for lamb in (0.5, 10):
        slope = LINE.slope(r, lamb)
        flow = -2 * lamb * sigma * np.clip(np.abs(slope) - 1, 0, None) * np.sign(slope)
        assert flow == approx(-m, abs=1e-12)
        assert (flow > 0).all()         # It goes from x, on the left, to y.


def test_swap():
    swapped = oracles.line_gaussians(2, 1, 0, 1)
    assert swapped.value(1) == approx(LINE.value(1), abs=1e-9)
    r = np.linspace(-2, 4, 13)
    assert swapped.slope(r, 1) == approx(-LINE.slope(r, 1), abs=1e-8)
    one, other = finite_sample.solve(X, Y, 10), finite_sample.solve(Y, X, 10)
    assert other.dual == approx(one.dual, abs=1e-10)
    assert other.flow.T == approx(one.flow, abs=1e-10)
    assert other.at_x - other.at_x[0] == approx(-(one.at_y - one.at_y[0]), abs=1e-9)


def test_dilation():
    wide = oracles.line_gaussians(0, 3, 6, 3)
    assert wide.w1 == approx(3 * LINE.w1, abs=1e-8)
    assert wide.excess(2) == approx(9 * LINE.excess(2), abs=1e-8)
    tripled = finite_sample.solve(3 * X, 3 * Y, 30)         # With s times the weight all of P is s times as large.
    assert tripled.dual == approx(3 * finite_sample.solve(X, Y, 10).dual, abs=1e-9)


@pytest.mark.parametrize(("lamb", "value"), [(0.1, 17.014076), (1, 3.749400), (10, 2.329631), (1000, 2.052101)])
def test_finite_sample(lamb, value):
    found = finite_sample.solve(X, Y, lamb)
    assert found.dual == pytest.approx(value, abs=1e-6)
    assert found.primal == approx(found.dual, abs=1e-8)
    assert max_error(found.balance, 0) < 1e-12
    assert found.w1 == pytest.approx(2.048351, abs=1e-6)
    assert found.lower <= found.dual <= found.upper + 1e-12
    if lamb == 10:
        expected = [[.073077, .073077, .187180], [.260257, 0, .073077], [0, .260257, .073077]]
        assert found.flow == pytest.approx(np.array(expected), abs=1e-6)


@pytest.mark.parametrize("lamb", [0.1, 10, 1000])
def test_finite_sample_at_random(lamb):
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=[40, 5]), 2 * rng.normal(size=[40, 5])
    found = finite_sample.solve(x, y, lamb)
    assert found.primal == approx(found.dual, abs=1e-8)
    assert max_error(found.balance, 0) < 1e-10
    assert found.lower <= found.dual <= found.upper + 1e-9
    assert found.w1 < found.dual


def test_bounds():
    # For one variable, W1^2 <= C <= E|x-y|^2; for the unit Gaussians two apart 4 <= 4.2069 <= 6.
    assert LINE.w1 ** 2 == pytest.approx(4, abs=1e-5)
    assert 4 <= LINE.congestion <= 6
    low, high = finite_sample.bounds(X, Y, 10)
    assert low == pytest.approx(2.1532, abs=1e-4)
    assert low <= 2.3296 <= high
    assert w1_at_most(LINE.value(1), 1) == pytest.approx(2.02578, abs=1e-5)
    assert w1_at_most(LINE.value(10), 10) == pytest.approx(2.00470, abs=1e-5)
    point = np.zeros([2, 3])                        # For two point masses both bounds are the value.
    assert finite_sample.bounds(point, point + [2, 0, 0], 10) == approx((2.1, 2.1))


@pytest.mark.parametrize(("call", "message"), [
    (lambda: LINE.value(0), "Lam 0: .* must be a number above 0"),
    (lambda: LINE.slope(np.zeros(1), -1.0), "Lam -1.0"),
    (lambda: LINE.value(math.nan), "Lam nan"),
    (lambda: finite_sample.solve(X, Y, 0), "Lam 0"),
    (lambda: finite_sample.solve(X[:1], Y[:1], 1), "1 point per sample: give two or more"),
    (lambda: finite_sample.solve(X, Y[:2], 1), r"shapes \[3, 3\] and \[2, 3\]"),
    (lambda: finite_sample.solve(X[:, 0], Y[:, 0], 1), "shapes"),
    (lambda: finite_sample.solve(X[:, :2], Y[:, :2], 1), "in 2 dimensions"),
    (lambda: finite_sample.solve(X[[0, 0, 1]], Y, 1), "repeated points"),
    (lambda: finite_sample.solve(X, X + [[0, 0, 0], [5, 0, 0], [0, 6, 0]], 1), "repeated points"),
    (lambda: finite_sample.solve(X * np.nan, Y, 1), "not finite"),
    (lambda: oracles.extrapolate(np.array([2.0, 2.0]), np.ones(2)), "two different weights"),
    (lambda: oracles.line_gaussians(0, 0, 1, 1), "std_x 0"),
    (lambda: oracles.circles(1, 2), "the first must be the larger"),
])
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()
