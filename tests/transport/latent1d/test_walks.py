"""Shortest walks over squared distances: dynamic programme, integer programme, thresholds, bounds."""
import itertools

import numpy as np
import pytest

from dnnlib import UserError
from tests.closeness import approx
from transport.latent1d import growth, point_sets, walk_programme, walks
from transport.latent1d.point_sets import KNOWN

pytestmark = pytest.mark.numeric


def reverse_or_same(stops, expected):
    return list(stops) in (expected, expected[::-1])


# Configuration, c*, K* of the walk, cost of the best permutation.
@pytest.mark.parametrize(("name", "cost", "threshold", "once"), [
    ("star", 4, 8, 5),
    ("triangle", 2, 3, 2),
    ("square", 3, 4, 3),
    ("bent", 6.64, 9.829925, 7.02),
    ("eight", 0.94, 4.461534, 1.005),
    ("line", 5, 4.5, 5),
])
def test_known(name, cost, threshold, once):
    walk = walks.shortest_walk(KNOWN[name])
    assert walk.cost == approx(cost, abs=1e-9)
    assert walk.lower == walk.cost
    assert walk.threshold == pytest.approx(threshold, abs=1e-6)
    assert walks.shortest_permutation(KNOWN[name]).cost == approx(once, abs=1e-9)


def test_walks_themselves():
    star = walks.shortest_walk(KNOWN["star"]).stops
    assert star[1] == star[3] == 0                              # The walk goes leaf, centre, leaf, centre, leaf.
    assert sorted(star[::2]) == [1, 2, 3]
    assert reverse_or_same(walks.shortest_walk(KNOWN["bent"]).stops, [3, 2, 1, 2, 0])
    assert reverse_or_same(walks.shortest_walk(KNOWN["eight"]).stops, [3, 2, 6, 0, 6, 5, 1, 7, 4])
    assert walks.shortest_permutation(KNOWN["star"]).threshold == pytest.approx(5.464102, abs=1e-6)


def test_on_the_line_the_sorted_order_is_best():
    points = np.array([[4.0], [0], [2], [1]])
    walk = walks.shortest_walk(points)
    assert (walk.cost, walk.threshold) == (6, 6)
    assert reverse_or_same(walk.stops, [1, 3, 2, 0])


def test_scaling():
    points = KNOWN["eight"]
    one, other = walks.shortest_walk(points), walks.shortest_walk(3.7 * points + 11)
    assert other.cost == approx(one.cost * 3.7 ** 2, rel=1e-9)
    assert other.threshold == approx(one.threshold * 3.7, rel=1e-9)


def test_dynamic_programme_against_all_orders():
    rng = np.random.default_rng(0)
    for n in (2, 3, 6):
        cost = walks.closure(walks.squared_distances(point_sets.uniform(n, 2, rng)))[0]
        best = min(sum(cost[i, j] for i, j in itertools.pairwise(order)) for order in itertools.permutations(range(n)))
        order = walks.held_karp(cost)
        assert sorted(order) == list(range(n))
        assert sum(cost[i, j] for i, j in itertools.pairwise(order)) == approx(best, rel=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_integer_programme_against_dynamic_programme(dims):
    rng = np.random.default_rng(dims)
    for n in (2, 3, 7, 12):
        points = point_sets.uniform(n, dims, rng)
        cost = walks.squared_distances(points)
        direct, before = walks.closure(cost)
        exact = walks.walk(points, walks.expand(walks.held_karp(direct), before), lower=np.inf)
        stops, lower = walk_programme.solve(cost, direct, gap=0)
        assert walks.walk(points, stops, lower).cost == pytest.approx(exact.cost, rel=1e-7)
        assert lower == pytest.approx(exact.cost, rel=1e-6)


def test_many_points():
    points = point_sets.uniform(40, 2, np.random.default_rng(5))
    best, loose, tree = walks.shortest_walk(points), walks.shortest_walk(points, gap=0.1), walks.tree_walk(points)
    assert best.lower == pytest.approx(best.cost, rel=1e-6)
    assert loose.lower <= best.cost * (1 + 1e-6) <= loose.cost * (1 + 2e-6)
    assert loose.cost <= 1.12 * loose.lower
    assert tree.lower == approx(walks.tree_bound(points))
    assert tree.lower < best.cost < tree.cost < 2 * tree.lower
    line = np.random.default_rng(0).uniform(size=[30, 1])
    assert walks.shortest_walk(line).cost == pytest.approx(np.square(np.diff(np.sort(line[:, 0]))).sum(), rel=1e-6)
    large = point_sets.uniform(walk_programme.MAX_POINTS + 50, 3, np.random.default_rng(0))
    assert walks.shortest_walk(large) == walks.tree_walk(large)


def test_tree_walk_ends_at_the_far_end():
    star = walks.tree_walk(KNOWN["star"])
    assert (star.cost, star.lower) == (pytest.approx(4), pytest.approx(3))
    assert walks.tree_walk(KNOWN["line"]).cost == 5             # A tree that is a path is walked once.


def test_random_points_on_the_line():
    rate = growth.measure(6, 1, draws=200, gap=0, rng=np.random.default_rng(0))
    assert growth.line_cost(6) == pytest.approx(0.17857, abs=1e-5)
    assert abs(rate.cost - 0.17857) < 3 * rate.cost_error < 0.03


@pytest.mark.parametrize(("dims", "costs"), [(2, (0.478, 0.625, 0.651)), (3, (0.905, 1.092, 1.413))])
def test_random_points_in_the_cube(dims, costs):     # `costs` are of 40 other draws; both means have an error.
    rng = np.random.default_rng(1)
    for n, expected in zip((4, 6, 8), costs, strict=True):
        rate = growth.measure(n, dims, draws=40, gap=0, rng=rng)
        assert abs(rate.cost - expected) < 3 * np.sqrt(2) * rate.cost_error


def test_rates():                                               # c* ~ n^(1 - 2/d), K* ~ n^(1 - 1/d).
    rng = np.random.default_rng(2)
    sizes = [6, 12, 24]
    rows = [growth.measure(n, 2, draws=10, gap=0.05, rng=rng) for n in sizes]
    assert growth.slope(sizes, [row.cost for row in rows]) == pytest.approx(0, abs=0.3)
    assert growth.slope(sizes, [row.threshold for row in rows]) == pytest.approx(0.5, abs=0.4)
    line = growth.measure(24, 1, draws=20, gap=0.01, rng=rng)
    assert abs(line.cost - growth.line_cost(24)) < 4 * line.cost_error
    assert growth.slope([10, 100], [3, 300]) == approx(2)
    tree = growth.measure(64, 2, draws=2, gap=0, rng=rng, tree=True)
    assert tree.lower < tree.cost < 2 * tree.lower


def test_curves_are_as_near_to_the_law_as_samples():
    row = growth.measure_to_law(8, 3, draws=2, gap=0, rng=np.random.default_rng(0), resolution=256)
    assert 0.5 < row.curve / row.sample < 1.5

#----------------------------------------------------------------------------

@pytest.mark.parametrize(("points", "message"), [
    (np.zeros([1, 2]), "points: one point: a walk needs at least two"),
    (np.array([[0.0, 1], [2, 3], [0, 1]]), "points: points 0 and 2 are the same: leave one out"),
    (np.array([[0.0, 1], [np.nan, 3]]), "points: row 1 is not finite: leave it out"),
    (np.zeros([2, 2, 2]), "points: an array of float64 and shape [2, 2, 2]: give numbers [points, d]"),
    (np.zeros([0, 2]), "points: an array of float64 and shape [0, 2]: give numbers [points, d]"),
    (np.array(["a", "b"]), "points: an array of <U1 and shape [2]: give numbers [points, d]"),
])
def test_no_sample(points, message):
    with pytest.raises(UserError) as error:
        walks.shortest_walk(points)
    assert str(error.value) == message


def test_too_many_points():
    points = point_sets.uniform(16, 2, np.random.default_rng(0))
    with pytest.raises(UserError, match="16 points: the exact dynamic programme takes up to 15"):
        walks.shortest_permutation(points)
    cost = walks.squared_distances(point_sets.uniform(walk_programme.MAX_POINTS + 1, 2, np.random.default_rng(0)))
    with pytest.raises(UserError, match="the integer programme takes up to"):
        walk_programme.solve(cost, cost, gap=0)


def test_a_walk_visits_every_point():
    with pytest.raises(UserError, match="every one of the 4 points must be visited"):
        walks.walk(KNOWN["star"], [0, 1, 2], lower=0)


def test_files(tmp_path):
    np.save(tmp_path / "a.npy", np.array([3, 1, 2]))
    np.testing.assert_array_equal(point_sets.load(f"{tmp_path}/a.npy"), [[3], [1], [2]])
    (tmp_path / "b.csv").write_text("0,1\n2,3.5\n")
    np.testing.assert_array_equal(point_sets.load(f"{tmp_path}/b.csv"), [[0, 1], [2, 3.5]])
    (tmp_path / "c.csv").write_text("x,y\n2,3.5\n")
    np.save(tmp_path / "d.npy", np.array([object()]), allow_pickle=True)
    for name in ("c.csv", "d.npy", "missing.npy"):
        with pytest.raises(UserError, match=f"--points=.*{name}: cannot be read") as error:
            point_sets.load(f"{tmp_path}/{name}")
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"give a \.npy or a \.csv file"):
        point_sets.load("points.txt")
