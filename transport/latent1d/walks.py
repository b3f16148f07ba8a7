# SPDX-License-Identifier: Apache-2.0
"""Walks through all points of a sample with the least sum of squared steps.

They decide how well a K-Lipschitz map of [0, 1] can imitate the sample (Stephanovitch, Tanielian, Cadre, Klutchnikoff,
Biau: Optimal 1-Wasserstein distance for WGANs, arXiv 2201.02824). A walk may come back to a point: two short steps can
cost less than a long one, as squares do not obey the triangle inequality.
"""
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import scipy.sparse.csgraph
from scipy.spatial.distance import pdist, squareform

from dnnlib import UserError
from transport.latent1d import walk_programme
from transport.latent1d.point_sets import checked

MAX_EXACT = 15          # The dynamic programme keeps n 2^n numbers.
MAX_DYNAMIC = 11        # Up to so many points it is also the faster of the two exact ways.


@dataclasses.dataclass(frozen=True)
class Walk:
    """A walk that visits every point, and what is known about the best one."""

    stops: tuple[int, ...]      # Points in the order of visits; some may come more than once.
    cost: float                 # c: sum of squared steps, in squared units of the points.
    lower: float                # No walk costs less than this.
    threshold: float            # K* of this walk: from this Lipschitz constant on, it can be walked with full rests.


def squared_distances(points: np.ndarray) -> np.ndarray:
    """[n, n] from points [n, d]."""
    squares: np.ndarray = squareform(pdist(points, "sqeuclidean"))
    return squares


def closure(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The least cost of getting from i to j by any number of steps.

    Args:
        cost: One step, [n, n], positive off the diagonal.

    Returns:
        (cost, before), both [n, n]: before[i, j] is the stop before j on a cheapest way from i.
    """
    least, before = scipy.sparse.csgraph.floyd_warshall(cost, directed=False, return_predecessors=True)
    return least, before


def held_karp(cost: np.ndarray) -> list[int]:
    """The cheapest order in which every point comes once: exact dynamic programme, O(n^2 2^n), n <= 15.

    Source: Held and Karp, A dynamic programming approach to sequencing problems, 1962. All sets of one size at a time.

    Raises:
        UserError: too many points.
    """
    n = len(cost)
    if n > MAX_EXACT:
        raise UserError(f"{n} points: the exact dynamic programme takes up to {MAX_EXACT}: "
                        f"use fewer, or the integer programme")
    best = np.full([1 << n, n], np.inf)             # [set of points seen, last one]
    came_from = np.zeros([1 << n, n], dtype=np.int8)
    bits = 1 << np.arange(n)
    best[bits, np.arange(n)] = 0
    sets = np.arange(1 << n)
    size = np.bitwise_count(sets)
    for k in range(1, n):
        seen = sets[size == k]
        total = best[seen][:, :, None] + cost       # [set, last, next]
        row, nxt = np.nonzero((seen[:, None] & bits) == 0)
        best[seen[row] | bits[nxt], nxt] = total.min(axis=1)[row, nxt]
        came_from[seen[row] | bits[nxt], nxt] = total.argmin(axis=1)[row, nxt]
    order, seen = [int(best[-1].argmin())], (1 << n) - 1
    while len(order) < n:
        last = order[-1]
        order.append(int(came_from[seen, last]))
        seen ^= 1 << last
    return order[::-1]


def expand(order: Sequence[int], before: np.ndarray) -> tuple[int, ...]:
    """Replace every jump of `order` by its cheapest way, as `closure` gives it."""
    stops = [order[0]]
    for start, end in itertools.pairwise(order):
        way = [end]
        while before[start, way[-1]] != start:
            way.append(int(before[start, way[-1]]))
        stops += way[::-1]
    return tuple(stops)


def tree_bound(points: np.ndarray) -> float:
    """The minimum spanning tree of squared distances: no walk through all points costs less."""
    return float(scipy.sparse.csgraph.minimum_spanning_tree(squared_distances(points)).sum())


def steps(points: np.ndarray, stops: Sequence[int]) -> np.ndarray:
    """Lengths [m - 1] of the steps between m stops."""
    lengths: np.ndarray = np.linalg.norm(np.diff(points[list(stops)], axis=0), axis=1)
    return lengths


def threshold(points: np.ndarray, stops: Sequence[int]) -> float:
    """K*(walk) = n max_i (half the length of all steps that start or end at point i).

    With a smaller Lipschitz constant the travel around some point takes longer than the time 1/n which it is due.
    """
    half, travel = steps(points, stops) / 2, np.zeros(len(points))
    np.add.at(travel, list(stops[:-1]), half)
    np.add.at(travel, list(stops[1:]), half)
    return float(len(points) * travel.max())


def walk(points: np.ndarray, stops: Sequence[int], lower: float) -> Walk:
    """A `Walk` along `stops`.

    Raises:
        UserError: a point is not visited.
    """
    if set(stops) != set(range(len(points))):
        raise UserError(f"stops {list(stops)}: every one of the {len(points)} points must be visited, and no other")
    cost = float(np.square(steps(points, stops)).sum())
    return Walk(stops=tuple(int(i) for i in stops), cost=cost, lower=min(lower, cost),
                threshold=threshold(points, stops))


def shortest_walk(points: np.ndarray, gap: float = 0) -> Walk:
    """The walk with the least sum of squared steps through points [n, d]; `cost` is c* where `lower` equals it.

    Up to MAX_DYNAMIC points by dynamic programming on the closure, then by an integer programme, and for more than
    `walk_programme.MAX_POINTS` the tree's walk, which may cost up to twice `lower`.

    Args:
        points: Distinct points.
        gap: Relative gap at which the integer programme may stop.

    Raises:
        UserError: points that are no sample.
    """
    points = checked(points, "points")
    if len(points) > walk_programme.MAX_POINTS:
        return tree_walk(points)
    cost = squared_distances(points)
    direct, before = closure(cost)
    if len(points) <= MAX_DYNAMIC:
        return walk(points, expand(held_karp(direct), before), lower=np.inf)
    stops, lower = walk_programme.solve(cost, direct, gap)
    return walk(points, stops, lower)


def tree_walk(points: np.ndarray) -> Walk:
    """The walk around the minimum spanning tree, between the ends of its longest way: at most twice the best cost."""
    tree = scipy.sparse.csgraph.minimum_spanning_tree(squared_distances(points))
    lower, ways = float(tree.sum()), scipy.sparse.csgraph.dijkstra
    first = int(ways(tree, directed=False, indices=0).argmax())
    far, parent = ways(tree, directed=False, indices=first, return_predecessors=True)
    last = {first}
    point = int(far.argmax())
    while point != first:
        last.add(point)
        point = int(parent[point])
    branches: list[list[int]] = [[] for _ in points]
    for child in sorted(set(range(len(points))) - {first}, key=lambda i: (i not in last, i)):
        branches[parent[child]].append(child)           # Taken from the end: the longest way is kept for last.
    trail, stops, seen = [first], [first], 1
    while seen < len(points):
        if branches[trail[-1]]:
            trail.append(branches[trail[-1]].pop())
            seen += 1
        else:
            trail.pop()
        stops.append(trail[-1])
    return walk(points, stops, lower)


def shortest_permutation(points: np.ndarray) -> Walk:
    """The shortest walk that visits every point once, n <= 15; its cost is an upper bound of c*. `lower` is that of the
    spanning tree."""
    points = checked(points, "points")
    return walk(points, held_karp(squared_distances(points)), lower=tree_bound(points))
