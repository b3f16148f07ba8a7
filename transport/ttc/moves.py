# SPDX-License-Identifier: Apache-2.0
"""Samples on their way: critics trained and kept, and what every step did to samples that no critic has seen."""
import dataclasses
import hashlib
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from torch_utils.images import to_uint8_metric
from transport.common import ot_exact, plotting
from transport.common.critics import w1_at_most
from transport.common.study import seeded
from transport.ttc.critic_sequence import FinishedCritic, Training, fit, move, parse_schedule, push
from transport.ttc.critic_store import claim, load_critics, save_critic
from transport.ttc.denoising import psnr, regularise
from transport.ttc.image_critics import make_critic
from transport.ttc.laws import Degraded, Law, Table, open_data, open_source
from transport.ttc.settings import Settled

W1_POINTS = 500                 # For the exact W1 between samples.
SHOWN, SHEET_ROWS = 10, 8       # Samples and steps in the sheet.
REGULARISED = 200               # Images for adversarial regularisation: it takes 200 gradients of each.
PROBE = 32                      # Samples that stand for the data when a run continues.
# Critics do not depend on these settings.
FREE = ("task", "size", "schedule", "images", "num", "detector", "device", "outdir")

#----------------------------------------------------------------------------
# The effect of a step.

class Frechet:
    """Frechet distance of images to the target's, in the features of a detector."""

    def __init__(self, spec: str, target: torch.Tensor, device: torch.device):
        from metrics.detectors import load_detector
        self.detector = load_detector(spec, device)
        self.target = self._moments(target)

    def _moments(self, images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        from metrics.feature_stats import Moments
        from metrics.passes import DETECTOR_BATCH
        moments = Moments(self.detector.feature_dim)
        for part in to_uint8_metric(images).split(DETECTOR_BATCH):
            moments.append(self.detector.features(part.expand(-1, 3, -1, -1), ["pool"])["pool"])
        return moments.mean(), moments.covariance()

    def __call__(self, images: torch.Tensor) -> float:
        """The distance of images [N, C, H, W] in about [-1, 1], which are rounded to 8 bits first."""
        from metrics.frechet import frechet_distance
        return frechet_distance(*self._moments(images), *self.target)


def distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Exact W1 of the first samples of both, as many as there are of each but at most W1_POINTS."""
    num = min(len(x), len(y), W1_POINTS)
    return ot_exact.w1(*(z[:num].flatten(1).double().cpu().numpy() for z in (x, y)))


def distinct(source: Law, num: int, generator: torch.Generator) -> torch.Tensor:
    """`num` samples, of a finite set without repetition and not more than it has."""
    if isinstance(source, Table):
        return source.samples[torch.randperm(len(source.samples), generator=generator)[:num]]
    return source.draw(num, generator)


@dataclasses.dataclass
class Bench:
    """Samples to test with, none of which critics are trained on."""

    start: torch.Tensor                 # Samples of the source, [N, ...].
    target: torch.Tensor                # [M, ...].
    clean: torch.Tensor | None          # What `start` was before it was degraded.
    frechet: Frechet | None

    def row(self, x: torch.Tensor) -> dict[str, float]:
        """Measures of `start` after some steps."""
        values = {"w1": distance(x, self.target)}
        if self.clean is not None:
            decibels = psnr(x, self.clean)
            values |= {"psnr": decibels.mean().item(), "psnr_std": decibels.std().item()}
        if self.frechet is not None:
            values["frechet"] = self.frechet(x)
        return values


def make_bench(source: Law, target: Law, config: Settled, device: torch.device) -> Bench:
    """Test samples of the halves 'test' of source and target."""
    generator, clean = seeded(config.seed, "test"), None
    y = distinct(target, config.num, generator).to(device)
    if isinstance(source, Degraded):
        clean, x = (z.to(device) for z in source.pair(config.num, generator))
    else:
        x = distinct(source, config.num, generator).to(device)
    frechet = None if config.detector is None else Frechet(config.detector, y, device)
    return Bench(x, y, clean, frechet)

#----------------------------------------------------------------------------
# The study.

@dataclasses.dataclass
class Moves:
    """What a sequence of critics did."""

    config: Settled
    rows: list[dict[str, float]]        # Per step, from 0: measures; from 1 also critic, estimate, debiased, eta.
    floor: dict[str, float]             # The measures between samples of the target itself.
    regularised: dict[str, float]       # PSNR of adversarial regularisation with the first critic; else empty.
    path: list[np.ndarray]              # Some samples after each step [SHOWN or more, ...], float.
    goal: np.ndarray                    # Some of the target's; of degraded samples, what they were before.
    seconds: float                      # Time that this run took; critics that were there are not in it.

    def headline(self) -> dict[str, Any]:
        """The numbers to remember."""
        first, last = self.rows[0], self.rows[-1]
        numbers: dict[str, Any] = {
            "task": self.config.task, "version": self.config.version, "theta": self.config.theta,
            "steps": len(self.rows) - 1, "not_taken": sum(row["eta"] == 0 for row in self.rows[1:]),
            "estimates": [round(row["estimate"], 4) for row in self.rows[1:]]}
        for name in (name for name in ("w1", "psnr", "frechet") if name in first):
            numbers |= {f"{name}_before": first[name], f"{name}_after": last[name]}
            best = max if name == "psnr" else min
            numbers[f"{name}_best_step"] = best(range(len(self.rows)), key=lambda i: self.rows[i][name])    # noqa: B023
        numbers |= {f"{name}_floor": value for name, value in self.floor.items()}
        return {**numbers, **self.regularised, "seconds": round(self.seconds, 1)}

    def draw(self, folder: Path) -> list[Path]:
        """Write the figures."""
        return [_draw_path(self, folder / "samples.png"), _draw_measures(self, folder / "measures.png")]


def run_moves(config: Settled) -> Moves:
    """Train (or continue) the critics of a settled configuration and follow test samples through all steps.

    Raises:
        UserError: settings, source and target do not fit each other.
    """
    started, device = time.monotonic(), torch.device(config.device)
    schedule = parse_schedule(config.schedule)
    training = Training(config.version, config.theta, config.iterations, config.batch, config.lam, config.lr,
                        config.pool, config.seed)
    training.check(schedule)
    assert config.source is not None, "only misalignment has no source"
    sources, targets = {}, {}
    for half in ("train", "test"):
        targets[half] = open_data(config.data, config.resolution, half)
        sources[half] = open_source(config.source, targets[half], half, config.sigma, config.images, config.seed,
                                    config.resolution)
    sequence = _train(config, schedule, training, sources["train"], targets["train"], device)
    bench = make_bench(sources["test"], targets["test"], config, device)
    rows, path = _follow(sequence, bench, training.lam)
    floor = _floor(targets, bench, config, device)
    regularised = {}
    if isinstance(sources["train"], Degraded):
        regularised = _regularised(sources["train"], bench, sequence[0], config)
    goal = bench.target if bench.clean is None else bench.clean
    return Moves(config, rows, floor, regularised, path, goal[:W1_POINTS].cpu().numpy(), time.monotonic() - started)


def _floor(targets: dict[str, Law], bench: Bench, config: Settled, device: torch.device) -> dict[str, float]:
    """Measures between two samples of the target: what is left of them at the goal.

    The second sample of a finite set is the half that critics see. The halves of a photograph show different things, so
    of photographs both samples are drawn from the half 'test'.
    """
    law = targets["train"] if isinstance(targets["train"], Table) else targets["test"]
    other = distinct(law, config.num, seeded(config.seed, "floor")).to(device)
    return {"w1": distance(other, bench.target)} | ({} if bench.frechet is None else {"frechet": bench.frechet(other)})


def _train(config: Settled, schedule: tuple[int, ...], training: Training, source: Law, target: Law,
           device: torch.device) -> list[FinishedCritic]:
    """All critics: those in the folder, then new ones, stored as they come."""
    def make() -> torch.nn.Module:
        return make_critic(config.critic, target.shape, config.width, config.seed)

    def report(number: int, finished: FinishedCritic) -> None:
        if config.outdir is not None:
            save_critic(Path(config.outdir), number, finished)
        for estimate, eta in zip(finished.estimates, finished.etas, strict=True):
            text = f"step of {eta:.4g}" if eta > 0 else "no step: samples would climb"
            click.echo(f"critic {number + 1}/{len(schedule)}: W1 estimate {estimate:.4g} "
                       f"(de-biased {w1_at_most(estimate, training.lam):.4g}), {text}", err=True)

    done: list[FinishedCritic] = []
    if config.outdir is not None:
        folder = Path(config.outdir)
        claim(folder, _dependencies(config, source, target))
        done = [FinishedCritic(finished.critic.to(device), finished.estimates, finished.etas)
                for finished in load_critics(folder, schedule, make)]
        if done:
            click.echo(f"{folder}: continues after critic {len(done)} of {len(schedule)}", err=True)
    return fit(source, target, make(), schedule, training, device, done, report)


def _dependencies(config: Settled, source: Law, target: Law) -> dict[str, Any]:
    """What critics depend on: settings, and the content of the data by some samples."""
    content = hashlib.sha256()
    for law in (source, target):
        content.update(law.draw(PROBE, seeded(config.seed, "probe")).numpy().tobytes())
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in FREE}
    return {**settings, "content": content.hexdigest()}


def _follow(sequence: list[FinishedCritic], bench: Bench,
            lam: float) -> tuple[list[dict[str, float]], list[np.ndarray]]:
    """(measures per step, some samples per step) of the test samples on their way."""
    x = bench.start
    rows, path = [{"step": 0, **bench.row(x)}], [x[:W1_POINTS].cpu().numpy()]
    for number, finished in enumerate(sequence):
        for estimate, eta in zip(finished.estimates, finished.etas, strict=True):
            x = push([FinishedCritic(finished.critic, (estimate,), (eta,))], x)
            rows.append({"step": len(rows), "critic": number + 1, "estimate": estimate,
                         "debiased": w1_at_most(estimate, lam), "eta": eta, **bench.row(x)})
            path.append(x[:W1_POINTS].cpu().numpy())
    return rows, path


def _regularised(source: Degraded, bench: Bench, first: FinishedCritic, config: Settled) -> dict[str, float]:
    """PSNR of adversarial regularisation with the first critic, and of one step of the noise's mean length."""
    clean, dirty = source.pair(config.num, seeded(config.seed, "noise"))
    length = (dirty - clean).flatten(1).norm(dim=1).mean().item()
    assert bench.clean is not None, "degraded samples have a clean original"
    start, clean = bench.start[:REGULARISED], bench.clean[:REGULARISED]
    restored = torch.cat([regularise(first.critic, part, 2 * length) for part in start.split(50)])
    one_step = move(first.critic, start, length)
    return {"psnr_regularised": psnr(restored, clean).mean().item(),
            "psnr_one_step": psnr(one_step, clean).mean().item()}

#----------------------------------------------------------------------------
# Figures.

def _draw_path(moves: Moves, file: Path) -> Path:
    """Samples along the steps: a row of images per step, or a panel of points; last the target's."""
    steps = np.unique(np.linspace(0, len(moves.path) - 1, SHEET_ROWS).round().astype(int)).tolist()
    if moves.goal.ndim == 2:
        steps = steps[:: max(len(steps) // 3, 1)][:3] + [len(moves.path) - 1]
        figure, axes = plotting.panels(1, len(steps))
        for axis, step in zip(axes[0], steps, strict=True):
            plotting.draw_points(axis, moves.goal, color="lightgrey")
            plotting.draw_points(axis, moves.path[step])
            axis.set_title(f"after step {step}")
        return plotting.save(figure, file)
    shown = np.concatenate([*(moves.path[step][:SHOWN] for step in steps), moves.goal[:SHOWN]])
    images = to_uint8_metric(torch.from_numpy(shown)).numpy().transpose(0, 2, 3, 1)
    images = np.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)], constant_values=255)     # A line between neighbours.
    last = "what they were" if moves.regularised else "the target"
    figure, axes = plotting.panels(1, 1, width=5, height=5 * (len(steps) + 1) / SHOWN + 0.4)
    plotting.draw_images(axes[0, 0], images[..., 0] if images.shape[3] == 1 else images, SHOWN)
    axes[0, 0].set_title(f"after step {', '.join(map(str, steps))}; last row: {last}", fontsize=9)
    return plotting.save(figure, file)


def _draw_measures(moves: Moves, file: Path) -> Path:
    """Estimates and measures over the steps."""
    names = {"w1": "W1", "psnr": "PSNR in dB", "frechet": "Frechet distance"}
    present = [name for name in names if name in moves.rows[0]]
    figure, axes = plotting.panels(1, len(present), width=4.5)
    steps = [row["step"] for row in moves.rows]
    for axis, name in zip(axes[0], present, strict=True):
        axis.plot(steps, [row[name] for row in moves.rows], "o-", markersize=3, label="test samples")
        if name == "w1":
            axis.plot(steps[:-1], [row["estimate"] for row in moves.rows[1:]], "s--", markersize=3,
                      label="the critic's estimate")
        if name in moves.floor:
            axis.axhline(moves.floor[name], color="grey", linestyle=":", label="two samples of the target")
        if name == "psnr":
            axis.axhline(moves.regularised["psnr_regularised"], color="C3", linestyle=":",
                         label="adversarial regularisation")
        axis.set_xlabel("steps taken")
        axis.set_ylabel(names[name])
        axis.legend(fontsize=7)
    return plotting.save(figure, file)
