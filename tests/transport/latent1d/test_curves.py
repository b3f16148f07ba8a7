"""Optimal curves and their exact W1; the regime below the threshold."""
import numpy as np
import pytest

from dnnlib import UserError
from tests.closeness import approx, assert_close
from tests.transport.latent1d.speeds import lipschitz
from transport.common import ot_exact
from transport.latent1d import curves, point_sets, semidiscrete, walks
from transport.latent1d.point_sets import KNOWN

pytestmark = pytest.mark.numeric


def built(points, walk, speed, cells):
    curve = curves.optimal_curve(points, walk, speed)
    assert lipschitz(curve) == approx(speed, rel=1e-9)
    return semidiscrete.transport(curve.grid(cells), points).value


# W1 of the built curves by exact transport.
@pytest.mark.parametrize(("name", "speed", "cells", "expected", "tolerance"), [
    ("star", 8, 1200, 0.125000, 1e-4), ("star", 12, 1200, 0.083333, 1e-4), ("star", 20, 1200, 0.050000, 1e-4),
    ("triangle", 3, 1200, 0.166667, 1e-6),
    ("eight", 5, 1600, 0.047000, 1e-4), ("eight", 10, 1600, 0.023498, 1e-5),
])
def test_optimal_curves(name, speed, cells, expected, tolerance):
    walk = walks.shortest_walk(KNOWN[name])
    assert built(KNOWN[name], walk, speed, cells) == pytest.approx(expected, abs=tolerance)
    assert curves.bound(walk, speed) == pytest.approx(expected, abs=2e-5)


def test_curves_of_permutations():
    """Their W1 is less than c / (4 K), but more than that of the walk."""
    once = walks.shortest_permutation(KNOWN["star"])
    for speed, expected in ((8, 0.153531), (12, 0.102353), (20, 0.061412)):
        w1 = built(KNOWN["star"], once, speed, 1200)
        assert w1 == pytest.approx(expected, abs=1e-4)
        assert 4 / (4 * speed) < w1 < curves.bound(once, speed)


def test_every_point_gets_its_share():
    points = KNOWN["bent"]
    walk = walks.shortest_walk(points)
    for factor in (1, 1.7):
        curve = curves.optimal_curve(points, walk, factor * walk.threshold)
        assert curve.times[0] == 0
        assert curve.times[-1] == 1
        assert (np.diff(curve.times) >= 0).all()
        nearest = np.linalg.norm(curve.grid(4000)[:, None] - points, axis=2).argmin(axis=1)
        np.testing.assert_allclose(np.bincount(nearest) / 4000, 0.25, atol=1e-3)


def test_scaling_and_slope():
    points = KNOWN["eight"]
    walk, scaled = walks.shortest_walk(points), walks.shortest_walk(2.5 * points)
    assert built(2.5 * points, scaled, 2.5 * 6, 800) == approx(2.5 * built(points, walk, 6, 800), rel=1e-9)
    values = [built(points, walk, speed, 1600) for speed in (5, 10, 20, 40)]
    assert np.polyfit(np.log([5, 10, 20, 40]), np.log(values), 1)[0] == pytest.approx(-1, abs=0.005)


def by_assignment(places, points):
    """W1, with every point copied so often that there are as many as places."""
    return ot_exact.w1(places, np.repeat(points, len(places) // len(points), axis=0))


def semi_dual(places, points, potentials):
    """Kantorovich's dual and a supergradient [n]: mean_j min_i (|places_j - points_i| - v_i) + mean_i v_i.

    It is concave in v and never more than W1. The gradient is 1 / n less the mass of the point's Laguerre cell.
    """
    excess = semidiscrete.distances(places, points) - potentials
    mass = np.bincount(excess.argmin(axis=1), minlength=len(points)) / len(places)
    return float(excess.min(axis=1).mean() + potentials.mean()), 1 / len(points) - mass


def test_transport_and_assignment_agree():
    """On random curves."""
    rng = np.random.default_rng(0)
    for dims, n in ((1, 3), (2, 5), (3, 8)):
        points = point_sets.uniform(n, dims, rng)
        curve = curves.Curve(np.linspace(0, 1, 7), rng.normal(size=[7, dims]))
        places = curve.grid(40 * n)
        found = semidiscrete.transport(places, points)
        assert found.value == approx(by_assignment(places, points), abs=1e-8)
        assert_close(found.plan.sum(axis=0), np.full(n, 1 / n), atol=1e-12, rtol=1e-7)


def test_dual_is_concave_and_never_too_large():
    rng = np.random.default_rng(1)
    points, places = rng.normal(size=[6, 2]), rng.normal(size=[120, 2])
    w1 = semidiscrete.transport(places, points).value
    first, second = rng.normal(size=[2, 6])
    (a, slope), (b, _) = (semi_dual(places, points, v) for v in (first, second))
    assert max(a, b) <= w1 + 1e-12
    assert b <= a + slope @ (second - first) + 1e-12            # The slope is a supergradient.
    assert semi_dual(places, points, (first + second) / 2)[0] >= (a + b) / 2 - 1e-12

#----------------------------------------------------------------------------
# Below the threshold.

@pytest.mark.parametrize(("speed", "expected"), [(0.25, 0.4375), (0.5, 0.375), (1, 0.25), (2, 0.125), (4, 0.0625)])
def test_two_points(speed, expected):
    """At a distance l the least W1 is l^2 / (4 K) from K = l on, and l / 2 - K / 4 below."""
    value, _ = semidiscrete.line_optimum(np.array([[0.0], [1]]), speed, cells=400)
    assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("points", "speed", "expected"), [
    ((0, 1, 3), 1, 0.805556), ((0, 1, 3), 2, 0.611111), ((0, 1, 3), 3, 0.444444), ((0, 1, 3), 4, 0.315972),
    ((0, 1, 3), 4.5, 0.277778), ((0, 1, 3), 5, 0.25), ((0, 1, 3), 10, 0.125),
    ((0, 1, 2, 4), 4, 0.4), ((0, 1, 2, 4), 6, 0.25), ((0, 1, 2, 4), 8, 0.1875),
])
def test_linear_programme(points, speed, expected):
    points = np.array(points, dtype=np.float64)[:, None]
    value, curve = semidiscrete.line_optimum(points, speed, cells=480)
    assert value == pytest.approx(expected, abs=1e-4)
    assert (np.diff(curve) > -1e-9).all()
    assert (np.diff(curve) < speed / len(curve) + 1e-9).all()
    walk = walks.shortest_walk(points)
    if speed >= walk.threshold:
        assert curves.bound(walk, speed) == pytest.approx(expected, abs=1e-4)
    else:
        assert abs(curves.bound(walk, speed) - expected) > 1e-3


def test_slow_curves_end_at_the_geometric_median():
    place, distance = semidiscrete.geometric_median(np.array([[0.0], [1], [3]]))
    assert place == pytest.approx([1])
    assert distance == pytest.approx(1)
    assert semidiscrete.line_optimum(np.array([[0.0], [1], [3]]), 1e-3, cells=120)[0] == pytest.approx(1, abs=1e-3)
    assert semidiscrete.geometric_median(KNOWN["star"]) == (pytest.approx([0, 0]), pytest.approx(0.75))
    place, distance = semidiscrete.geometric_median(KNOWN["triangle"])      # Fermat's point.
    assert place == pytest.approx([0.5, 3 ** -0.5 / 2], abs=1e-6)
    assert distance == pytest.approx(3 ** -0.5)

#----------------------------------------------------------------------------

def test_mistakes():
    walk = walks.shortest_walk(KNOWN["star"])
    with pytest.raises(UserError, match="a Lipschitz constant of 7.9 is below this walk's threshold 8"):
        curves.optimal_curve(KNOWN["star"], walk, 7.9)
    for speed in (0, -1):
        with pytest.raises(UserError, match=f"a Lipschitz constant of {speed}: must be above 0"):
            semidiscrete.line_optimum(KNOWN["line"], speed)
    with pytest.raises(UserError, match="points on the line"):
        semidiscrete.line_optimum(KNOWN["star"], 1)


def test_transport_needs_one_dimension():
    with pytest.raises(UserError, match="places of 3 dimensions and points of 2"):
        semidiscrete.transport(np.zeros([6, 3]), KNOWN["star"])

