# SPDX-License-Identifier: Apache-2.0
"""How well a generator with one latent number can imitate a finite sample, and how near training comes to it.

After Stephanovitch, Tanielian, Cadre, Klutchnikoff and Biau, Optimal 1-Wasserstein distance for WGANs, arXiv
2201.02824. A K-Lipschitz map of [0, 1] rests at every point of the sample and travels between them at speed K, along a
walk with the least sum c* of squared steps: its W1 is c* / (4 K), from a threshold of K on. Below it, a linear
programme gives the optimum on the line.
"""
import dataclasses
from typing import Any

import numpy as np

from transport.common.study import check, option, study_command
from transport.latent1d import figures, growth, point_sets, semidiscrete, walk_programme
from transport.latent1d.cases import Case, Trained, optimal_w1, solve, train, walked_w1
from transport.latent1d.curves import bound, optimal_curve
from transport.latent1d.line_generators import FIELDS, LOSSES, Training

MULTIPLES = (0.125, 0.25, 0.5, 1.0, 2.0)        # Curves are trained at these multiples of K*.
EXAMPLES = ("star", "eight")


@dataclasses.dataclass(frozen=True)
class Config:
    """The best generator with a one-dimensional latent for a finite sample, and trained ones against it."""

    points: str | None = option(None, "Sample: FILE.npy or FILE.csv, a row per point; default: --sample")
    sample: str = option("eight", "Known sample", choices=tuple(point_sets.KNOWN))
    speed: float = option(1.5, "Lipschitz constant of the trained generators, in units of the threshold K*",
                          min=0, open_min=True)
    steps: int = option(2000, "Steps of training", min=1)
    cells: int = option(256, "Pieces of a trained curve", min=2)
    starts: int = option(6, "Random starts of every training", min=1)
    largest: int = option(64, "Points of the largest random sample whose best walk is computed", min=16,
                          max=walk_programme.MAX_POINTS)
    draws: int = option(40, "Random samples per size", min=2)
    gap: float = option(0.005, "Relative gap at which the search for a walk may stop, above 11 points", min=0, max=1)
    seed: int = option(0, "Seed of everything", min=0)
    device: str = option("cpu", "Where generators and critics are trained")

    def quick(self) -> "Config":
        return dataclasses.replace(self, steps=400, cells=128, starts=2, largest=32, draws=8, gap=0.02)


@dataclasses.dataclass(frozen=True)
class Result:
    config: Config
    case: Case
    examples: dict[str, Case]
    speeds: np.ndarray                  # [k], in absolute units, from K* / 16 to 4 K*.
    optimal: np.ndarray                 # [k] W1 of the optimal curve (NaN below K*), or on the line the optimum.
    permuted: np.ndarray                # [k] W1 of the best permutation's curve (NaN below its threshold).
    median: float                       # W1 of the best constant: K -> 0.
    trained: list[Trained]              # At `config.speed`: every field and loss, and one started at the optimum.
    sweep: list[Trained]                # Table and transport at MULTIPLES of K*, the best start each.
    rates: list[growth.Rate]
    tree_rates: list[growth.Rate]
    laws: list[growth.ToTheLaw]

    def best(self, field: str, loss: str, start: str = "random") -> Trained:
        """The one with the least W1 among the starts."""
        runs = [t for t in self.trained if (t.field, t.loss, t.start) == (field, loss, start)]
        return min(runs, key=lambda t: t.w1)

    def headline(self) -> dict[str, Any]:
        points, walk, once = self.case.points, self.case.walk, self.case.permutation
        last = int(np.nanargmax(self.speeds))
        ratios = {f"ratio_{f}_{loss}": round(self.best(f, loss).ratio, 4)
                  for f in FIELDS for loss in LOSSES}
        slopes = {}
        for dims in sorted({rate.dims for rate in self.rates}):
            rows = [rate for rate in self.rates if rate.dims == dims]
            sizes = [rate.points for rate in rows]
            slopes[f"slope_c_{dims}d"] = round(growth.slope(sizes, [rate.cost for rate in rows]), 3)
            slopes[f"slope_k_{dims}d"] = round(growth.slope(sizes, [rate.threshold for rate in rows]), 3)
        return {"points": len(points), "dims": points.shape[1], "c": walk.cost, "c_lower": walk.lower,
                "c_permutation": once and once.cost, "k_threshold": walk.threshold, "w1_median": self.median,
                "optimal_over_bound": float(self.optimal[last] / bound(walk, self.speeds[last])),
                **ratios, "ratio_from_optimum": round(self.best("table", "transport", "optimum").ratio, 4),
                "smallest_ratio": round(min(t.ratio for t in self.trained), 4),
                "sweep_w1": dict(zip(MULTIPLES, (round(t.w1, 4) for t in self.sweep), strict=True)),
                "sweep_ratio": dict(zip(MULTIPLES, (round(t.ratio, 4) for t in self.sweep), strict=True)), **slopes,
                "curve_over_sample": {f"{law.dims}d, {law.points} points": round(law.curve / law.sample, 4)
                                      for law in self.laws}}

#----------------------------------------------------------------------------

def run(config: Config) -> Result:
    """Walks, curves, trained generators and rates for one sample.

    Raises:
        UserError: a setting out of range, or a file that holds no sample.
    """
    check(config)
    points = point_sets.KNOWN[config.sample] if config.points is None else point_sets.load(config.points)
    case = solve(points, config.gap)
    examples = {name: solve(point_sets.KNOWN[name]) for name in EXAMPLES}
    speeds = case.walk.threshold * np.geomspace(1 / 16, 4, 25)
    rates, tree_rates, laws = _rates(config)
    return Result(config=config, case=case, examples=examples, speeds=speeds, optimal=optimal_w1(case, speeds),
                  permuted=walked_w1(case, case.permutation, speeds), median=semidiscrete.geometric_median(points)[1],
                  trained=_train_all(config, case), sweep=_sweep(config, case), rates=rates, tree_rates=tree_rates,
                  laws=laws)


def _training(config: Config, case: Case, multiple: float, field: str = "table", loss: str = "transport") -> Training:
    return Training(speed=multiple * case.walk.threshold, field=field, loss=loss, steps=config.steps,
                    cells=config.cells)


def _train_all(config: Config, case: Case) -> list[Trained]:
    """Every field and loss from random starts at `config.speed`; and from the optimum: can training find less?"""
    runs = [train(case, _training(config, case, config.speed, field, loss), config.seed, i, config.device)
            for field in FIELDS for loss in LOSSES for i in range(config.starts)]
    training = _training(config, case, max(config.speed, 1))
    best = optimal_curve(case.points, case.walk, training.speed)
    training = dataclasses.replace(training, slow=0, lr=training.lr / 4)
    return [*runs, train(case, training, config.seed, 0, config.device, start=best)]


def _sweep(config: Config, case: Case) -> list[Trained]:
    """The best of the starts at every multiple of K*."""
    def best(multiple: float) -> Trained:
        training = _training(config, case, multiple)
        return min((train(case, training, config.seed, i, config.device) for i in range(config.starts)),
                   key=lambda trained: trained.w1)
    return [best(multiple) for multiple in MULTIPLES]


def _rates(config: Config) -> tuple[list[growth.Rate], list[growth.Rate], list[growth.ToTheLaw]]:
    rng = np.random.default_rng([config.seed, 1])
    sizes = [n for n in (8, 16, 32, 64, 128) if n <= config.largest]
    rates = [growth.measure(n, d, config.draws, config.gap, rng) for d in (1, 2, 3) for n in sizes]
    trees = [growth.measure(n, d, 4, 0, rng, tree=True) for d in (2, 3) for n in (128, 256, 512, 1024)]
    few = min(config.draws, 4)
    laws = [growth.measure_to_law(n, d, few, config.gap, rng) for d in (2, 3) for n in sizes]
    return rates, trees, laws


main = study_command("latent1d", Config, run, figures.draw)
