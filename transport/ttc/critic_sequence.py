# SPDX-License-Identifier: Apache-2.0
"""Trust the Critics without its data: a sequence of critics, each of which moves samples against its gradient.

Milne, Bilocq and Nachman: "Trust the Critics" (arXiv 2111.15099, version 1 here) and its successor (arXiv 2211.00820,
version 2). A critic is trained to tell where samples are from where they shall go, its value estimates their distance
W1, and all samples move by `eta = theta * estimate` down its gradient. Then the next critic starts from its weights.
No gradient ever passes through an earlier step.
"""
import copy
import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import torch

from dnnlib import UserError
from transport.common.critics import Critic, between, gradient, penalty
from transport.common.study import seeded
from transport.ttc.laws import Law

RECENT = 100            # Batches of an estimate: the last of the training (version 1), or fresh ones (version 2).
MOVE_BATCH = 250        # Samples moved at once; no setting, because rounding in a network depends on the batch.
BETAS = (0.5, 0.999)

#----------------------------------------------------------------------------
# One step.

def objective(critic: Critic, x: torch.Tensor, y: torch.Tensor, lam: float, generator: torch.Generator) -> torch.Tensor:
    """E u(x) - E u(y) - Lam E (|grad u| - 1)_+^2 between x and y: what a critic maximises. A scalar."""
    return critic(x).mean() - critic(y).mean() - lam * penalty(critic, between(x, y, generator))


def move(critic: Critic, x: torch.Tensor, eta: float) -> torch.Tensor:
    """x - eta grad u(x): samples [N, ...] after one step. The gradient keeps its length; nothing is clipped."""
    return x.detach() - eta * gradient(critic, x)

#----------------------------------------------------------------------------
# Settings.

@dataclasses.dataclass(frozen=True)
class Training:
    """How critics are trained and how far samples follow them."""

    version: int = 1            # 1: estimate from the end of the training; 2: from fresh batches before every step.
    theta: float = 0.9          # Step as a share of the estimate.
    iterations: int = 5000      # Per critic.
    batch: int = 50
    lam: float = 1000.0         # Weight of the penalty.
    lr: float = 1e-4
    pool: int = 0               # Samples of the source kept and moved once per step; 0: fresh ones for every batch.
    seed: int = 0

    def check(self, schedule: Sequence[int]) -> None:
        """Raises UserError: theta or the schedule is not what the version takes."""
        if self.version == 1 and not 0 < self.theta < 1:
            raise UserError(f"--theta={self.theta}: version 1 moves by a share between 0 and 1, both excluded: "
                            "take another, or --version=2 for whole steps")
        if self.version == 2 and not 0 < self.theta <= 1:
            raise UserError(f"--theta={self.theta}: version 2 moves by a share above 0 and up to 1: take 1")
        if self.version == 1 and max(schedule) > 1:
            raise UserError(f"--schedule has {max(schedule)} steps per critic, but version 1 takes one: "
                            "use --version=2")


def parse_schedule(text: str) -> tuple[int, ...]:
    """'10x2,20x1' -> steps of each critic: ten critics with two steps each, then twenty with one.

    Raises:
        UserError: not of this form, or without critics or steps.
    """
    steps: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})x(\d{1,4})\s*", part)
        if match is None or int(match[1]) < 1 or int(match[2]) < 1:
            raise UserError(f"--schedule={text}: give critics x steps per critic, both at least 1, such as 20x1 "
                            "or 10x2,20x1")
        steps += [int(match[2])] * int(match[1])
    return tuple(steps)

#----------------------------------------------------------------------------
# The sequence.

@dataclasses.dataclass(frozen=True)
class FinishedCritic:
    """A finished critic, frozen, with its steps: `etas[k]` is 0 where `estimates[k]` was not positive."""

    critic: torch.nn.Module
    estimates: tuple[float, ...]
    etas: tuple[float, ...]


def push(sequence: Sequence[FinishedCritic], x: torch.Tensor) -> torch.Tensor:
    """Samples [N, ...] after all steps of the sequence."""
    for finished in sequence:
        for eta in finished.etas:
            x = _move_all(finished.critic, x, eta)
    return x


def _move_all(critic: Critic, x: torch.Tensor, eta: float) -> torch.Tensor:
    return x if eta == 0 else torch.cat([move(critic, part, eta) for part in x.split(MOVE_BATCH)])


class MovedLaw:
    """Samples of a source after the steps taken so far."""

    def __init__(self, source: Law, pool: int, seed: int, device: torch.device):
        """Args:
            source: The law before the first step.
            pool: With 0 every batch is fresh and goes through all steps, as in the papers, so that the cost grows with
                the square of the number of critics. Else so many samples are kept and move once per step, and batches
                are drawn from them, as if the source were this finite set.
            seed: Decides the samples of the pool.
            device: The device of the samples.
        """
        self.source, self.device = source, device
        self.steps: list[tuple[Critic, float]] = []
        self.pool = source.draw(pool, seeded(seed, "pool")).to(device) if pool else None

    def draw(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """Samples [num, ...] as they are after the steps."""
        if self.pool is not None:
            return self.pool[torch.randint(len(self.pool), [num], generator=generator).to(self.device)]
        x = self.source.draw(num, generator).to(self.device)
        for critic, eta in self.steps:
            x = move(critic, x, eta)
        return x

    def add(self, critic: Critic, eta: float) -> None:
        """Take a step."""
        if eta == 0:
            return
        if self.pool is None:
            self.steps.append((critic, eta))
        else:
            self.pool = _move_all(critic, self.pool, eta)

#----------------------------------------------------------------------------
# Training.

Report = Callable[[int, FinishedCritic], None]       # (number of the critic, the critic), when it is there.


def train_critic(critic: torch.nn.Module, source: MovedLaw, target: Law, training: Training,
                 generator: torch.Generator) -> float:
    """Maximise the objective with a new Adam; returns its mean over the last batches, penalty included."""
    optimizer = torch.optim.Adam(critic.parameters(), lr=training.lr, betas=BETAS)
    values: list[torch.Tensor] = []
    for _ in range(training.iterations):
        value = _objective_of_batch(critic, source, target, training, generator)
        optimizer.zero_grad(set_to_none=True)
        (-value).backward()
        optimizer.step()
        values = [*values[1 - RECENT:], value.detach()]
    return torch.stack(values).mean().item()


def fresh_estimate(critic: torch.nn.Module, source: MovedLaw, target: Law, training: Training,
                   generator: torch.Generator) -> float:
    """The objective's mean over new batches, with the samples as they are now."""
    values = [_objective_of_batch(critic, source, target, training, generator).detach() for _ in range(RECENT)]
    return torch.stack(values).mean().item()


def _objective_of_batch(critic: torch.nn.Module, source: MovedLaw, target: Law, training: Training,
                        generator: torch.Generator) -> torch.Tensor:
    y = target.draw(training.batch, generator).to(source.device)
    x = source.draw(training.batch, generator)
    return objective(critic, x, y, training.lam, generator)


def next_critic(number: int, critic: torch.nn.Module, steps: int, source: MovedLaw, target: Law,
               training: Training) -> FinishedCritic:
    """Train `critic` in place, freeze a copy, and move the source by its steps.

    All random numbers depend on the seed and the critic's number alone: whoever continues a sequence gets the same
    critics as whoever trains it in one go.

    Raises:
        UserError: the training diverged.
    """
    generator = seeded(training.seed, f"critic/{number}")
    at_end = train_critic(critic, source, target, training, generator)
    frozen = copy.deepcopy(critic).eval().requires_grad_(False)
    estimates, etas = [], []
    for _ in range(steps):
        estimate = at_end if training.version == 1 else fresh_estimate(frozen, source, target, training, generator)
        if not math.isfinite(estimate):
            raise UserError(f"--lr={training.lr}: critic {number + 1} diverged (its estimate is {estimate}): "
                            "take a smaller one")
        eta = training.theta * max(estimate, 0.0)       # Against a negative estimate samples would climb.
        source.add(frozen, eta)
        estimates.append(estimate)
        etas.append(eta)
    return FinishedCritic(frozen, tuple(estimates), tuple(etas))


def fit(source: Law, target: Law, critic: torch.nn.Module, schedule: Sequence[int], training: Training,
        device: torch.device | str = "cpu", done: Sequence[FinishedCritic] = (),
        report: Report = lambda number, finished: None,
        ) -> list[FinishedCritic]:
    """Train a sequence of critics.

    Args:
        source: The law of the samples.
        target: The law that they shall have.
        critic: It has the weights that the first critic starts from, and is trained in place.
        schedule: Steps of each critic.
        training: How critics are trained.
        device: Where to compute.
        done: Critics that are there already, in order; the sequence continues after them.
        report: Called after every new critic, for instance to store it.

    Raises:
        UserError: settings that do not fit each other; a critic diverged.
    """
    training.check(schedule)
    critic = critic.to(device)
    moved = MovedLaw(source, training.pool, training.seed, torch.device(device))
    sequence = list(done)
    for finished in sequence:
        critic.load_state_dict(finished.critic.state_dict())
        for eta in finished.etas:
            moved.add(finished.critic, eta)
    for number in range(len(sequence), len(schedule)):
        sequence.append(next_critic(number, critic, schedule[number], moved, target, training))
        report(number, sequence[-1])
    return sequence
