# SPDX-License-Identifier: Apache-2.0
"""Generators with a one-dimensional latent that can be trained and never break their Lipschitz constant."""
import copy
import dataclasses
import math

import numpy as np
import torch
from scipy.spatial.distance import pdist, squareform

from dnnlib import UserError
from transport.common import critics
from transport.latent1d import semidiscrete
from transport.latent1d.curves import Curve

FIELDS = ("table", "network")
LOSSES = ("transport", "critic")


@dataclasses.dataclass(frozen=True)
class Training:
    """How one generator is trained."""

    speed: float                    # Its Lipschitz constant K.
    field: str = "table"            # Its velocity: free numbers, or a network of the time.
    loss: str = "transport"         # The number that is minimised: W1 by exact transport, or the value of a critic.
    steps: int = 1500
    slow: float = 0.6               # Share of the steps in which the speed allowed grows from 0 to K.
    cells: int = 256                # The curve is linear on each.
    lr: float = 0.05                # The generator's rate, which falls to 0 as a cosine.
    critic_lr: float = 1e-3
    critic_steps: int = 3           # Per step of the generator.
    lamb: float = 10.0              # Weight Lam of the critic's penalty.
    width: int = 64


class LineGenerator(torch.nn.Module):
    """A curve as a start and a velocity of length at most K on every cell: K-Lipschitz whatever its parameters are."""

    features: torch.Tensor      # [cells, 32]: sines and cosines of the time, for the network.

    def __init__(self, training: Training, start: np.ndarray, generator: torch.Generator):
        super().__init__()
        cells, dims = training.cells, len(start)
        self.speed, self.cells = training.speed, cells
        self.share = 1.0        # The share of the speed that is allowed so far: training starts slowly.
        self.start = torch.nn.Parameter(torch.as_tensor(start, dtype=torch.float32))
        phases = 2 * math.pi * torch.arange(1, 17) * (torch.arange(cells)[:, None] + 0.5) / cells
        self.register_buffer("features", torch.cat([phases.sin(), phases.cos()], dim=1))
        if training.field == "table":
            self.table = torch.nn.Parameter(0.3 * torch.randn([cells, dims], generator=generator))
        else:
            self.net = critics.MLP(self.features.shape[1], width=training.width, depth=2, out_features=max(dims, 2))
            randomise(self.net, generator)
            self.dims = dims

    def velocities(self) -> torch.Tensor:
        """[cells, d], each of length at most 1: in units of K."""
        if hasattr(self, "table"):
            capped: torch.Tensor = self.table / self.table.norm(dim=1, keepdim=True).clamp_min(1)
            return capped
        raw: torch.Tensor = self.net(self.features)[:, :self.dims]
        length: torch.Tensor = raw.norm(dim=1, keepdim=True).clamp_min(1e-6)
        return raw * (length.tanh() / length)

    def knots(self) -> torch.Tensor:
        """Places [cells + 1, d] at times 0, 1 / cells, ..., 1."""
        way = self.velocities().cumsum(dim=0) * (self.share * self.speed / self.cells)
        return torch.cat([self.start[None], self.start + way])

    def middles(self) -> torch.Tensor:
        """Places [cells, d] at the middles of the cells."""
        knots = self.knots()
        return (knots[1:] + knots[:-1]) / 2

    @torch.no_grad()
    def settle(self) -> None:
        """Bring velocities back to length 1: beyond, they would not feel that they should fall."""
        if hasattr(self, "table"):
            self.table.copy_(self.velocities())

    @torch.no_grad()
    def follow(self, curve: Curve) -> None:
        """Start from a curve. This is for tables of velocities only."""
        places = torch.as_tensor(curve.at(np.linspace(0, 1, self.cells + 1)), dtype=torch.float32)
        self.start.copy_(places[0])
        self.table.copy_(places.diff(dim=0) * (self.cells / self.speed))

    @torch.no_grad()
    def curve(self) -> Curve:
        """The curve as it is now, in double precision, because rounding must not make it faster than K."""
        exact = copy.deepcopy(self).cpu().double()
        return Curve(times=np.linspace(0, 1, self.cells + 1), places=exact.knots().numpy())


def randomise(module: torch.nn.Module, generator: torch.Generator) -> None:
    """Linear layers as PyTorch starts them, but with draws of `generator`."""
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                limit = layer.in_features ** -0.5
                for parameter in layer.parameters():
                    parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * limit)

#----------------------------------------------------------------------------

def train(points: np.ndarray, training: Training, generator: torch.Generator, device: str = "cpu",
          start: Curve | None = None) -> Curve:
    """A K-Lipschitz curve whose law imitates points [n, d], started at random near their mean, or at `start`.

    Raises:
        UserError: K <= 0, an unknown field or loss, or a start for a network.
    """
    semidiscrete.check_speed(training.speed)
    for value, known in ((training.field, FIELDS), (training.loss, LOSSES)):
        if value not in known:
            raise UserError(f"{value}: choose from {', '.join(known)}")
    model = LineGenerator(training, points.mean(axis=0), generator)
    if start is not None:
        if training.field != "table":
            raise UserError("a start is followed by a table of velocities only: field=table")
        model.follow(start)
    model.to(device)
    loss = _Transport(points) if training.loss == "transport" else _Critic(points, training, generator, device)
    adam = torch.optim.Adam(model.parameters(), lr=training.lr if training.field == "table" else training.lr / 10,
                            betas=(0.5, 0.95))
    plan = torch.optim.lr_scheduler.CosineAnnealingLR(adam, training.steps)
    growth = training.slow * training.steps
    for step in range(training.steps):
        model.share = min((step + 1) / growth, 1) if growth else 1.0
        adam.zero_grad(set_to_none=True)
        loss(model).backward()
        adam.step()
        plan.step()
        model.settle()
    return model.curve()


class _Transport:
    """W1 by exact transport. Its gradient is that of the transport's cost with the plan held fixed."""

    def __init__(self, points: np.ndarray):
        self.points = points

    def __call__(self, model: LineGenerator) -> torch.Tensor:
        places = model.middles()
        plan = semidiscrete.transport(places.detach().double().cpu().numpy(), self.points).plan
        row, column = plan.nonzero()
        ends = torch.as_tensor(self.points[column], dtype=places.dtype, device=places.device)
        weights = torch.as_tensor(plan[row, column], dtype=places.dtype, device=places.device)
        lengths: torch.Tensor = (places[torch.as_tensor(row, device=places.device)] - ends).norm(dim=1)
        return (weights * lengths).sum()


class _Critic:
    """The loss of a WGAN's generator: a critic with the one-sided gradient penalty, which is trained along.

    Its unit of length is the mean distance to the nearest point: a small network could not tell nearer ones apart.
    """

    def __init__(self, points: np.ndarray, training: Training, generator: torch.Generator, device: str):
        near = squareform(pdist(points)) + np.diag(np.full(len(points), np.inf))
        self.scale = float(1 / near.min(axis=1).mean())
        self.points = torch.as_tensor(points * self.scale, dtype=torch.float32, device=device)
        self.training, self.generator = training, generator
        self.net = critics.MLP(self.points.shape[1], width=training.width)
        randomise(self.net, generator)
        self.net.to(device)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=training.critic_lr, betas=(0.5, 0.9))

    def __call__(self, model: LineGenerator) -> torch.Tensor:
        places = model.middles() * self.scale
        for _ in range(self.training.critic_steps):
            fakes = places.detach()
            partner = torch.randint(len(self.points), [len(fakes)], generator=self.generator)
            between = critics.between(self.points[partner.to(fakes.device)], fakes, self.generator)
            penalty = critics.penalty(self.net, between)
            loss = self.net(fakes).mean() - self.net(self.points).mean() + self.training.lamb * penalty
            self.adam.zero_grad(set_to_none=True)
            loss.backward()
            self.adam.step()
        value: torch.Tensor = self.net(places).mean()
        return -value
