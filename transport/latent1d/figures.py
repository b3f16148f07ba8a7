# SPDX-License-Identifier: Apache-2.0
"""Figures of the study of one-dimensional latents. A `result` is the `Result` of experiment.py."""
from pathlib import Path
from typing import Any

import numpy as np

from transport.common import plotting
from transport.latent1d.cases import Case, Trained
from transport.latent1d.curves import bound, optimal_curve
from transport.latent1d.growth import line_cost
from transport.latent1d.walks import Walk

WALK, ONCE, TRAINED = "#1f77b4", "#d62728", "#2ca02c"


def draw(result: Any, folder: Path) -> list[Path]:
    """The walks, W1 against K, trained generators against the bound (latent1d.png); rates (latent1d_rates.png)."""
    figure, axes = plotting.panels(2, 2)
    own = {"sample": result.case} if result.config.points else {}
    for axis, (name, case) in zip(axes[0], [*own.items(), *result.examples.items()][:2], strict=True):
        draw_walks(axis, case, name)
    draw_speeds(axes[1, 0], result)
    draw_trained(axes[1, 1], result)
    paths = [plotting.save(figure, folder / "latent1d.png")]
    figure, axes = plotting.panels(1, 3)
    draw_rates(axes[0], result)
    return [*paths, plotting.save(figure, folder / "latent1d_rates.png"), draw_curves(result, folder)]


def plane(places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first two coordinates of places [p, d]; on the line, the second is how far along the sequence they are."""
    second = places[:, 1] if places.shape[1] > 1 else np.linspace(0, 1, len(places))
    return places[:, 0], second


def draw_walks(axis: Any, case: Case, name: str) -> None:
    """The best walk (steps taken twice are drawn side by side) and the best permutation."""
    points, size = case.points, np.ptp(case.points, axis=0).max()
    if case.permutation is not None:
        axis.plot(*plane(points[list(case.permutation.stops)]), "--", color=ONCE, lw=1,
                  label=f"every point once: {case.permutation.cost:.4g}")
    axis.plot(*plane(_side_by_side(points, case.walk, 0.012 * size)), color=WALK, lw=1.6,
              label=f"walk: {case.walk.cost:.4g}; K* = {case.walk.threshold:.3g}")
    if points.shape[1] > 1:
        plotting.draw_points(axis, points, s=22, color="black", alpha=1, zorder=3)
    axis.set_title(f"{name}: sum of squared steps", fontsize=9)
    axis.margins(0.08)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)


def _side_by_side(points: np.ndarray, walk: Walk, shift: float) -> np.ndarray:
    """The walk's stops [2 (m - 1), d], every step moved to its right by `shift` in the first two dimensions."""
    ends = points[list(walk.stops)]
    if points.shape[1] < 2:
        return ends
    steps = np.diff(ends, axis=0)
    aside = np.zeros_like(steps)
    aside[:, 0], aside[:, 1] = steps[:, 1], -steps[:, 0]
    length = np.linalg.norm(aside, axis=1, keepdims=True)
    aside *= shift / np.where(length > 0, length, 1)
    return np.stack([ends[:-1] + aside, ends[1:] + aside], axis=1).reshape(-1, points.shape[1])


def draw_speeds(axis: Any, result: Any) -> None:
    """W1 against K on logarithmic axes."""
    case, speeds = result.case, result.speeds
    axis.plot(speeds, bound(case.walk, speeds), color="gray", lw=1, label="c / 4K")
    what = "optimum (linear programme)" if case.points.shape[1] == 1 else "optimal curve"
    axis.plot(speeds, result.optimal, "o", color=WALK, ms=4, label=what)
    axis.plot(speeds, result.permuted, ".", color=ONCE, ms=4, label="every point once")
    sweep = sorted(result.sweep, key=lambda t: t.speed)
    axis.plot([t.speed for t in sweep], [t.w1 for t in sweep], "x-", color=TRAINED, lw=0.8, ms=5,
              label="trained by exact transport")
    axis.axhline(result.median, color="gray", ls=":", lw=1, label="K to 0: geometric median")
    axis.axvline(case.walk.threshold, color="gray", ls="--", lw=1, label="threshold K*")
    axis.set(xscale="log", yscale="log", xlabel="Lipschitz constant K", ylabel="W1")
    axis.legend(fontsize=7)


def draw_trained(axis: Any, result: Any) -> None:
    """Ratio of every trained generator's W1 to the bound."""
    kinds = list(dict.fromkeys((t.field, t.loss, t.start) for t in reversed(result.trained)))
    for column, kind in enumerate(kinds):
        ratios = [t.ratio for t in result.trained if (t.field, t.loss, t.start) == kind]
        axis.plot(np.full(len(ratios), column), ratios, "o", color=WALK, ms=5, alpha=0.7)
    axis.axhline(1, color="gray", lw=1)
    names = [f"{field},\n{loss}" if start == "random" else f"{field},\n{loss},\nfrom optimum"
             for field, loss, start in kinds]
    axis.set_xticks(range(len(kinds)), names, fontsize=6)
    axis.set(yscale="log", ylabel="W1 of trained generators / (c / 4K)")
    _plain_ticks(axis.yaxis, (1, 1.5, 2, 3, 5, 8))
    axis.set_title(f"K = {result.config.speed:g} K*, {result.config.steps} steps", fontsize=9)


def draw_curves(result: Any, folder: Path) -> Path:
    """The images of the best trained generators beside the optimal curve."""
    kinds = [(field, loss) for field in ("table", "network") for loss in ("transport", "critic")]
    figure, axes = plotting.panels(2, 2, width=3, height=3)
    speed = max(result.config.speed, 1) * result.case.walk.threshold
    best = optimal_curve(result.case.points, result.case.walk, speed)
    for axis, kind in zip(axes.flat, kinds, strict=True):
        _draw_curve(axis, result.best(*kind), best.places, result.case.points)
    return plotting.save(figure, folder / "latent1d_curves.png")


def _draw_curve(axis: Any, trained: Trained, best: np.ndarray, points: np.ndarray) -> None:
    axis.plot(*plane(best), color="lightgray", lw=4)
    axis.plot(*plane(trained.curve.places), ".-", color=TRAINED, ms=2, lw=0.8)
    if points.shape[1] > 1:
        plotting.draw_points(axis, points, s=18, color="black", alpha=1, zorder=3)
    axis.set_title(f"{trained.field}, {trained.loss}: {trained.ratio:.2f} x bound", fontsize=9)


def _plain_ticks(axis: Any, values: tuple[float, ...]) -> None:
    """Ticks of a logarithmic axis (x or y) at those of `values` that are on it, as plain numbers."""
    low, high = sorted(axis.get_view_interval())
    shown = [value for value in values if low <= value <= high]
    axis.set_ticks(shown, [f"{value:g}" for value in shown])
    axis.set_ticks([], minor=True)


def draw_rates(axes: np.ndarray, result: Any) -> None:
    """c*, K* and the distance to the law, against the number of points."""
    for color, dims in zip((WALK, ONCE, TRAINED), (1, 2, 3), strict=True):
        rows = [rate for rate in result.rates if rate.dims == dims]
        trees = [rate for rate in result.tree_rates if rate.dims == dims]
        n, m = np.array([rate.points for rate in rows]), [rate.points for rate in trees]
        axes[0].plot(n, [rate.cost for rate in rows], "o", color=color, ms=4, label=f"d = {dims}")
        axes[0].fill_between(m, [rate.lower for rate in trees], [rate.cost for rate in trees], color=color, alpha=0.2)
        axes[1].plot(n, [rate.threshold for rate in rows], "o", color=color, ms=4, label=f"d = {dims}")
        axes[1].plot(n, rows[0].threshold * (n / n[0]) ** (1 - 1 / dims), color=color, lw=0.8)
        laws = [row for row in result.laws if row.dims == dims]
        n = np.array([row.points for row in laws])
        if laws:
            axes[2].plot(n, [row.sample for row in laws], "s", mfc="none", color=color, ms=5,
                         label=f"sample, d = {dims}")
            axes[2].plot(n, [row.curve for row in laws], "o", color=color, ms=4, label=f"curve, d = {dims}")
            axes[2].plot(n, laws[0].sample * (n / n[0]) ** (-1 / dims), color=color, lw=0.8)
        if dims == 1:
            n = np.array([rate.points for rate in rows])
            axes[0].plot(n, [line_cost(rate.points) for rate in rows], color=color, lw=0.8)
        else:
            n = np.array([rows[0].points, (trees or rows)[-1].points])
            axes[0].plot(n, rows[-1].cost * (n / rows[-1].points) ** (1 - 2 / dims), color=color, lw=0.8)
    titles = ("least sum of squared steps c*", "threshold K*", "W1 to the uniform law")
    heights = ((0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10), (2, 4, 8, 16, 32), (0.05, 0.1, 0.15, 0.2, 0.3))
    for axis, title, ticks in zip(axes, titles, heights, strict=True):
        axis.set(xscale="log", yscale="log", xlabel="points n")
        _plain_ticks(axis.xaxis, (8, 64, 512) if axis is axes[0] else (8, 16, 32, 64, 128))
        _plain_ticks(axis.yaxis, ticks)
        axis.set_title(title, fontsize=9)
        axis.legend(fontsize=7)
