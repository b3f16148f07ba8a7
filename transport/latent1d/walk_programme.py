# SPDX-License-Identifier: Apache-2.0
"""Shortest walks through more points than a dynamic programme can take: an integer programme for SciPy's HiGHS.

A walk is a connected multigraph in which all points but the two ends have an even number of steps. With a further
stop, joined to both ends at no cost, it is closed, and every cut is crossed at least twice. Such cuts are added where a
solution breaks them (Dantzig, Fulkerson and Johnson 1954; on graphs whose nodes may be revisited: Cornuejols, Fonlupt
and Naddef 1985).
"""
import itertools

import networkx
import numpy as np
import scipy.sparse as sp
from scipy.cluster.hierarchy import linkage
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse.csgraph import breadth_first_order, maximum_flow
from scipy.spatial.distance import squareform

from dnnlib import UserError

MAX_POINTS = 150        # A minute or two; the time grows fast.
MAX_ROUNDS = 200
_UNITS = 10 ** 6        # Flows are computed in whole numbers.
_BROKEN = 1e-4          # A cut crossed fewer than 2 - this times is added.


class _Programme:
    """Variables: uses of every edge (0, 1, 2), ends (0, 1) and half the degree (1, 2, ...) of every point."""

    def __init__(self, cost: np.ndarray, direct: np.ndarray):
        n = len(cost)
        i, j = np.triu_indices(n, k=1)
        useful = cost[i, j] <= direct[i, j] * (1 + 1e-12)       # Others are dearer than a detour.
        self.i, self.j, self.points = i[useful], j[useful], n
        self.edges = len(self.i)
        self.unit = float(cost[self.i, self.j].mean())
        self.cost = np.concatenate([cost[self.i, self.j] / self.unit, np.zeros(2 * n)])
        edge, one = np.arange(self.edges), np.ones(self.edges)
        meets = sp.csr_array((np.tile(one, 2), (np.concatenate([self.i, self.j]), np.tile(edge, 2))))
        degree = sp.hstack([meets, sp.eye_array(n), -2 * sp.eye_array(n)])
        ends = sp.csr_array(np.repeat([0.0, 1, 0], [self.edges, n, n])[None])
        self.equal = LinearConstraint(sp.vstack([degree, ends]), *[np.append(np.zeros(n), 2.0)] * 2)
        self.bounds = Bounds(np.repeat([0.0, 0, 1], [self.edges, n, n]), np.repeat([2.0, 1, n], [self.edges, n, n]))
        self.cuts: dict[bytes, np.ndarray] = {}

    def solve(self, integral: bool, gap: float) -> OptimizeResult:
        """The programme with the cuts so far, or its linear relaxation."""
        constraints = [self.equal]
        if self.cuts:
            constraints.append(LinearConstraint(sp.csr_array(np.stack(list(self.cuts.values()))), 2, np.inf))
        result = milp(self.cost, integrality=int(integral), bounds=self.bounds, constraints=constraints,
                      options={"mip_rel_gap": gap})
        if not result.success:
            raise RuntimeError(f"HiGHS: {result.message}")
        return result

    def add_cut(self, inside: np.ndarray) -> None:
        """Whoever visits the points `inside` (bool [n]) and the further stop crosses between them twice."""
        self.cuts[inside.tobytes()] = np.concatenate([inside[self.i] != inside[self.j], inside, np.zeros(self.points)])

    def add_clusters(self, cost: np.ndarray) -> None:
        """The cuts around natural clusters: most of those that will be needed."""
        for method in ("single", "average", "complete"):
            members = list(np.eye(self.points, dtype=bool))
            for first, second in linkage(squareform(cost, checks=False), method)[:-1, :2].astype(int):
                members.append(members[first] | members[second])
                self.add_cut(members[-1])

    def add_broken(self, x: np.ndarray) -> bool:
        """Cuts that `x` breaks, of those that part the further stop from some point; False if there are none."""
        n, before = self.points, len(self.cuts)
        start = np.concatenate([self.i, np.full(n, n)])         # The further stop has the number n.
        end = np.concatenate([self.j, np.arange(n)])
        room = np.rint(x[:self.edges + n] * _UNITS).astype(np.int32)
        used = room > 0
        both = np.concatenate([start[used], end[used]]), np.concatenate([end[used], start[used]])
        graph = sp.csr_array((np.tile(room[used], 2), both), shape=(n + 1, n + 1))
        for point in range(n):
            flow = maximum_flow(graph, n, point)
            if flow.flow_value < (2 - _BROKEN) * _UNITS:
                left = graph - flow.flow
                left.eliminate_zeros()
                beyond = np.ones(n + 1, dtype=bool)
                beyond[breadth_first_order(left, n, return_predecessors=False)] = False
                self.add_cut(beyond[:n])
                left = sp.csr_array(left.T)
                within = np.zeros(n + 1, dtype=bool)
                within[breadth_first_order(left, point, return_predecessors=False)] = True
                self.add_cut(within[:n])
        return len(self.cuts) > before

    def stops(self, x: np.ndarray) -> list[int]:
        """The walk of an integral, connected solution."""
        uses = np.rint(x[:self.edges]).astype(int)
        graph = networkx.MultiGraph()
        for i, j, count in zip(self.i.tolist(), self.j.tolist(), uses.tolist(), strict=True):
            graph.add_edges_from(itertools.repeat((i, j), count))
        way = list(networkx.eulerian_path(graph))
        return [way[0][0], *(end for _, end in way)]


def solve(cost: np.ndarray, direct: np.ndarray, gap: float) -> tuple[list[int], float]:
    """The cheapest walk through n points.

    Args:
        cost: One step, [n, n].
        direct: Its closure under detours, [n, n].
        gap: Relative gap at which the search may stop; 0 for the optimum.

    Returns:
        (stops, lower): the walk, and a cost that no walk can undercut.

    Raises:
        UserError: more than MAX_POINTS points.
    """
    if len(cost) > MAX_POINTS:
        raise UserError(f"{len(cost)} points: the integer programme takes up to {MAX_POINTS}: "
                        f"use fewer, or the tree's walk")
    programme = _Programme(cost, direct)
    programme.add_clusters(cost)
    while programme.add_broken(programme.solve(integral=False, gap=0).x):
        pass
    for _ in range(MAX_ROUNDS):
        result = programme.solve(integral=True, gap=gap)
        if not programme.add_broken(result.x):
            return programme.stops(result.x), float(result.mip_dual_bound) * programme.unit
    raise RuntimeError(f"no connected walk after {MAX_ROUNDS} rounds of cuts")
