# SPDX-License-Identifier: Apache-2.0
"""The critic of WGAN-GP computes congested transport (Milne & Nachman 2022, arXiv 2109.00528).

    python -m transport.congested --quick --outdir=out

Critics are trained with the penalty Lam E (|grad u| - 1)_+^2 and held against exact values: their objective against P,
its straight line in 1/Lam against W1 where the line meets 0, their gradient against the exact one, the flow that the
gradient encodes against the mass to be moved, and critics of a few fixed points against what those points allow.
"""
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from transport.common import critics, ot_exact, plotting
from transport.common.study import check, option, seeded, study_command
from transport.congested import critic_training, finite_sample, momentum, oracles, pairs
from transport.congested.critic_training import Reached, Recipe

PLANES: dict[str, Callable[[], pairs.Draw]] = {"blobs": pairs.blobs, "ring": pairs.ring}
HALF_WIDTH = 3.0            # Flows in the plane are drawn on a square of twice this side, which holds blobs and ring.
ARROW = 0.6                 # Length of the longest arrow on it.
FAINT = 0.03                # Flows below this share of the largest get no arrow.
MEMORY_DIMS = 3             # Fewest in which the exact solution for fixed points holds.
FEW_X = ((0.0, 0, 0), (1, 0, 0), (0, 1, 0))       # Three points to three points, with a known solution.
FEW_Y = ((2.0, 0, 1), (0, 2, 1), (1, 1, 3))


@dataclasses.dataclass(frozen=True)
class Config:
    """What a critic with a gradient penalty computes: congested transport, against exact values."""

    lamb_low: float = option(1.0, "Smallest weight of the penalty; also that of the gradients and flows",
                             min=0, open_min=True)
    lamb_high: float = option(10.0, "Largest weight of the penalty", min=0, open_min=True)
    rungs: int = option(4, "Weights in all, evenly spaced in 1/weight", min=2, max=20)
    sides: str = option("one-sided", "Penalty of all critics but one", choices=critic_training.SIDES)
    steps: int = option(2500, "Steps of training per critic", min=1)
    batch: int = option(512, "Pairs of samples per step", min=2)
    width: int = option(64, "Numbers per hidden layer of a critic", min=1)
    rounds: int = option(40, "Independent batches of fresh samples per measurement", min=2)
    count: int = option(20_000, "Samples per such batch", min=2)
    sample: int = option(1000, "Points of the samples whose W1 is computed exactly", min=2, max=ot_exact.MAX_POINTS)
    points: int = option(64, "Points of the largest fixed sample to be memorised; also a 4th and a 16th of it",
                         min=2, max=finite_sample.MAX_POINTS)
    seed: int = option(0, "Seed of everything drawn", min=0)
    device: str = option("cpu", "Where critics are trained")

    def quick(self) -> "Config":
        return dataclasses.replace(self, steps=400, rounds=10, count=10_000, rungs=3, sample=500)


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Critics of one pair of laws, a weight each, beside the exact solution."""

    exact: oracles.Exact
    lamb: np.ndarray            # [rungs]
    reached: list[Reached]

    @property
    def w1(self) -> float:
        """Where the straight line through the critics' objectives meets 1/Lam = 0."""
        return oracles.extrapolate(self.lamb, np.array([r.objective for r in self.reached]))[0]

    def summary(self) -> dict[str, Any]:
        rows = [{"lamb": round(float(lamb), 4), "exact": round(self.exact.value(lamb), 4), **reached.summary()}
                for lamb, reached in zip(self.lamb, self.reached, strict=True)]
        return {"w1_exact": round(self.exact.w1, 4), "w1_extrapolated": round(self.w1, 4), "critics": rows}


@dataclasses.dataclass(frozen=True)
class Slopes:
    """u' on the line, at the smallest weight."""

    places: np.ndarray          # [places], where sigma is not negligible.
    exact: np.ndarray           # [places]
    trained: dict[str, np.ndarray]      # Per penalty [places].
    certified: dict[str, float]         # Per penalty: the critic's value by quadrature, at most P.
    norms: Reached              # What the one-sided critic reaches.
    sigma: np.ndarray           # [places]


@dataclasses.dataclass(frozen=True)
class Plane:
    """A critic of two laws in the plane, its flow, and W1 and bounds of P from exact transport of samples."""

    x: np.ndarray               # [sample, 2]
    y: np.ndarray
    reached: Reached
    field: momentum.Field
    w1: float
    bounds: tuple[float, float]

    def summary(self) -> dict[str, Any]:
        low, high = self.bounds
        return {**self.reached.summary(), "w1_sample": round(self.w1, 4), "at_least": round(low, 4),
                "at_most": round(high, 4), "flow_shortfall": round(self.field.shortfall, 4)}


@dataclasses.dataclass(frozen=True)
class Memory:
    """A critic of n fixed points: on these, what they allow at most, and on fresh points of the same laws."""

    points: int
    allowed: float              # P of the fixed points, exactly.
    own: Reached
    fresh: Reached | None       # None: the points are from no law.

    def summary(self) -> dict[str, Any]:
        row = {"points": self.points, "allowed": round(self.allowed, 4), "own": round(self.own.objective, 4),
               "own_error": round(self.own.error, 4)}
        return row if self.fresh is None else {**row, "fresh": round(self.fresh.objective, 4)}


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything measured; Lam is the weight of the penalty."""

    config: Config
    line: Ladder                # N(0, 1) to N(2, 1).
    radial: Ladder              # N(0, I) to N(0, 4 I) in the plane.
    slopes: Slopes
    planes: dict[str, Plane]
    few: Memory                 # Three points to three points in space.
    memory_exact: float         # P of N(0, I) to N(0, 4 I) in space, of which `memory` has samples.
    memory: list[Memory]

    def headline(self) -> dict[str, Any]:
        """Plain numbers, rounded to 4 digits after the point."""
        certified = {name: round(value, 4) for name, value in self.slopes.certified.items()}
        return {"line": self.line.summary(), "line_by_quadrature": certified, "radial": self.radial.summary(),
                **{name: plane.summary() for name, plane in self.planes.items()}, "three_points": self.few.summary(),
                "memory": {"exact": round(self.memory_exact, 4), "samples": [m.summary() for m in self.memory]}}

#----------------------------------------------------------------------------

def run(config: Config) -> Result:
    """Train and measure all critics of the study.

    Raises:
        UserError: a setting outside its range, or --lamb-low not below --lamb-high.
    """
    check(config)
    if config.lamb_low >= config.lamb_high:
        raise UserError(f"--lamb-low={config.lamb_low}: must be below --lamb-high={config.lamb_high}")
    line, nets = _ladder(config, "line", pairs.gaussians([0.0], 1, [2.0], 1), oracles.line_gaussians(0, 1, 2, 1))
    radial, _ = _ladder(config, "radial", pairs.gaussians([0.0, 0], 1, [0.0, 0], 2), oracles.radial_gaussians(2, 1, 2))
    planes = {name: _plane(config, name, make()) for name, make in PLANES.items()}
    few = _memory(config, "few", torch.tensor(FEW_X), torch.tensor(FEW_Y), None)
    cloud = pairs.gaussians([0.0] * MEMORY_DIMS, 1, [0.0] * MEMORY_DIMS, 2)
    sizes = sorted({max(config.points // part, 2) for part in (16, 4, 1)})
    memory = [_memory(config, f"memory{n}", *cloud(n, seeded(config.seed, f"memory{n}")), cloud) for n in sizes]
    return Result(config, line, radial, _slopes(config, line, nets), planes, few,
                  oracles.radial_gaussians(MEMORY_DIMS, 1, 2).value(config.lamb_low), memory)


def _recipe(config: Config, lamb: float, sides: str | None = None) -> Recipe:
    return Recipe(lamb=lamb, sides=sides or config.sides, steps=config.steps, batch=config.batch, width=config.width,
                  device=config.device)


def _measure(config: Config, critic: critics.MLP, draw: pairs.Draw, recipe: Recipe, stream: str) -> Reached:
    return critic_training.measure(critic, draw, recipe, seeded(config.seed, f"{stream}/measure"),
                                   count=config.count, rounds=config.rounds)


def _ladder(config: Config, name: str, draw: pairs.Draw, exact: oracles.Exact) -> tuple[Ladder, list[critics.MLP]]:
    lambs = 1 / np.linspace(1 / config.lamb_low, 1 / config.lamb_high, config.rungs)
    nets, reached = [], []
    for index, lamb in enumerate(lambs):
        recipe, stream = _recipe(config, float(lamb)), f"{name}/{index}"
        nets.append(critic_training.train(draw, recipe, seeded(config.seed, f"{stream}/train")))
        reached.append(_measure(config, nets[-1], draw, recipe, stream))
    return Ladder(exact, lambs, reached), nets


def _slopes(config: Config, line: Ladder, nets: list[critics.MLP]) -> Slopes:
    """The gradient of the line's first critic, and of one with the other penalty."""
    lamb, exact = float(line.lamb[0]), line.exact
    other = next(sides for sides in critic_training.SIDES if sides != config.sides)
    draw = pairs.gaussians([0.0], 1, [2.0], 1)
    made = {config.sides: nets[0],
            other: critic_training.train(draw, _recipe(config, lamb, other), seeded(config.seed, "line/0/train"))}

    def slope_of(net: critics.MLP) -> Callable[[np.ndarray], np.ndarray]:
        def slope(r: np.ndarray) -> np.ndarray:
            points = torch.from_numpy(r).float()[:, None].to(config.device)
            return critics.gradient(net, points)[:, 0].cpu().numpy().astype(np.float64)
        return slope

    places = np.linspace(-2, 4, 121)
    return Slopes(places, exact.slope(places, lamb), {name: slope_of(net)(places) for name, net in made.items()},
                  {name: exact.value_of(slope_of(net), lamb) for name, net in made.items()}, line.reached[0],
                  exact.at(places)[1])


def _plane(config: Config, name: str, draw: pairs.Draw) -> Plane:
    recipe = _recipe(config, config.lamb_low)
    critic = critic_training.train(draw, recipe, seeded(config.seed, f"{name}/train"))
    x, y = (s.double().numpy() for s in draw(config.sample, seeded(config.seed, f"{name}/sample")))
    return Plane(x, y, _measure(config, critic, draw, recipe, name),
                 momentum.field(critic, draw, recipe.lamb, seeded(config.seed, f"{name}/field"),
                                half_width=HALF_WIDTH, device=config.device),
                 ot_exact.w1(x, y), finite_sample.bounds(x, y, recipe.lamb))


def _memory(config: Config, name: str, x: torch.Tensor, y: torch.Tensor, law: pairs.Draw | None) -> Memory:
    recipe, own = _recipe(config, config.lamb_low), pairs.resample(x, y)
    critic = critic_training.train(own, recipe, seeded(config.seed, f"{name}/train"))
    return Memory(len(x), finite_sample.solve(x.double().numpy(), y.double().numpy(), recipe.lamb).dual,
                  _measure(config, critic, own, recipe, name),
                  None if law is None else _measure(config, critic, law, recipe, f"{name}/fresh"))

#----------------------------------------------------------------------------

def draw(result: Result, folder: Path) -> list[Path]:
    """Three figures: values against 1/Lam, gradients on the line, flows in the plane."""
    return [_draw_values(result, folder / "congested_values.png"),
            _draw_slopes(result, folder / "congested_gradient.png"),
            _draw_planes(result, folder / "congested_momentum.png")]


def _draw_values(result: Result, path: Path) -> Path:
    figure, axes = plotting.panels(1, 2, width=4.4)
    titles = ("N(0, 1) to N(2, 1) on the line", "N(0, I) to N(0, 4 I) in the plane")
    for axis, ladder, title in zip(axes[0], (result.line, result.radial), titles, strict=True):
        inverse = np.array([0, 1.05 / ladder.lamb.min()])
        rise, exact = ladder.exact.congestion / 4, ladder.exact
        axis.plot(inverse, exact.w1 + inverse * rise, "k-", lw=1, label="exact P")
        axis.plot(inverse, exact.w1 + 2 * inverse * rise, "k:", lw=1, label="exact E u(x) - E u(y)")
        axis.axhline(exact.w1, color="0.7", lw=0.8, label="exact W1")
        axis.plot(1 / ladder.lamb, [r.gap for r in ladder.reached], "s", mfc="none", color="C1",
                  label="critic: E u(x) - E u(y)")
        axis.errorbar(1 / ladder.lamb, [r.objective for r in ladder.reached], [r.error for r in ladder.reached],
                      fmt="o", color="C0", label="critic: objective")
        axis.plot([0], [ladder.w1], "x", color="C3", label="W1 extrapolated")
        axis.set(xlabel="1 / Lam", title=title)
    axes[0, 0].set_ylabel("on fresh samples")
    axes[0, 0].legend(fontsize=7)
    return plotting.save(figure, path)


def _draw_slopes(result: Result, path: Path) -> Path:
    figure, axes = plotting.panels(1, 2, width=4.4)
    left, right = axes[0]
    slopes, lamb = result.slopes, result.line.lamb[0]
    left.plot(slopes.places, slopes.exact, "k-", lw=2.5, alpha=0.35, label="exact")
    for (name, trained), style in zip(slopes.trained.items(), ("C0-", "C1--"), strict=True):
        left.plot(slopes.places, trained, style, lw=1, label=f"critic, {name}")
    left.set(xlabel="x", ylabel="u'", title=f"N(0, 1) to N(2, 1), Lam = {lamb:g}")
    left.legend(fontsize=7)
    density, edges = slopes.norms.histogram()
    right.stairs(density, edges, fill=True, alpha=0.4, label="critic")
    weight = slopes.sigma / slopes.sigma.sum()
    right.hist(np.abs(slopes.exact), bins=edges, weights=weight / (edges[1] - edges[0]), histtype="step", color="k",
               label="exact, for x in [-2, 4]")
    right.axvline(1, color="0.7", lw=0.8)
    right.set(xlabel="|u'| on sigma", ylabel="density", title="slope on the penalty's samples")
    right.legend(fontsize=7)
    return plotting.save(figure, path)


def _draw_planes(result: Result, path: Path) -> Path:
    figure, axes = plotting.panels(len(result.planes), 2, width=3.9, height=3.2)
    for (flow_axis, line_axis), (name, plane) in zip(axes, result.planes.items(), strict=True):
        field, extent = plane.field, [-HALF_WIDTH, HALF_WIDTH, -HALF_WIDTH, HALF_WIDTH]
        strength = np.linalg.norm(field.flow, axis=-1)
        image = flow_axis.imshow(strength.T, origin="lower", extent=extent, cmap="Greys")
        figure.colorbar(image, ax=flow_axis, shrink=0.8, label="|w|")
        for sample, color in ((plane.x, "C0"), (plane.y, "C1")):
            plotting.draw_points(flow_axis, sample[:200], color=color)
        pick = slice(1, None, 3)
        longest = max(float(strength.max()), 1e-12)         # An untrained critic may have no flow.
        first, second = np.meshgrid(field.centres[pick], field.centres[pick], indexing="ij")
        w, seen = field.flow[pick, pick], strength[pick, pick] > FAINT * longest
        flow_axis.quiver(first[seen], second[seen], w[seen, 0], w[seen, 1], color="C3", width=0.005,
                         angles="xy", scale_units="xy", scale=longest / ARROW)
        flow_axis.set(title=f"{name}: flow from blue to orange", xlim=extent[:2], ylim=extent[2:])
        line_axis.plot(field.centres, field.needed, "k-", lw=2.5, alpha=0.35, label="has to be moved")
        line_axis.plot(field.centres, field.crossing, "C3-", lw=1, label="flow of the critic")
        line_axis.set(xlabel="c", title="mass through {first coordinate = c}")
        line_axis.legend(fontsize=7)
    return plotting.save(figure, path)


main = study_command("congested", Config, run, draw)
