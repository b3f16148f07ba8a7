# SPDX-License-Identifier: Apache-2.0
"""Do a WGAN's images move along the critic's gradient when the generator is updated? The experiment that motivates TTC.

For images G(z1) three directions are compared (Milne, Bilocq and Nachman 2021, arXiv 2111.15099; protocol as in their
code): the critic's gradient, along which Trust the Critics moves them; the direction in which a step of SGD on an
independent batch z2 moves them, to first order; and the way that the generator's own next step of Adam
really moves them. The critic is large on generated images, and the generator descends.
"""
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from dnnlib import UserError
from torch_utils.images import to_uint8_metric
from torch_utils.misc import evaluating
from transport.common import plotting
from transport.common.critics import Critic, gradient
from transport.common.study import seeded
from transport.ttc.critic_sequence import BETAS, objective
from transport.ttc.image_critics import make_critic, make_generator
from transport.ttc.laws import Law, open_data
from transport.ttc.moves import distance, distinct
from transport.ttc.settings import Settled

CRITIC_ITERATIONS = 5       # Per update of the generator.
MEASURED, BINS = 256, 40    # Images whose directions are compared; bins of their histogram.
MOMENTS = (0.01, 0.3, 1.0)  # Shares of the training after which they are: the papers' 10, 25,000 and 40,000 updates.

Tensors = dict[str, torch.Tensor]

#----------------------------------------------------------------------------
# Directions.

def cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Cosine per sample, [N], of two fields [N, ...]."""
    return torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1), dim=1)


def state_of(net: torch.nn.Module) -> tuple[Tensors, Tensors]:
    """Copies of (parameters, buffers)."""
    return ({name: value.detach().clone() for name, value in net.named_parameters()},
            {name: value.detach().clone() for name, value in net.named_buffers()})


def images_of(net: torch.nn.Module, state: tuple[Tensors, Tensors], z: torch.Tensor) -> torch.Tensor:
    """G(z) with other parameters and buffers, in eval mode: with statistics of the batch, an image would depend on
    the others, and would not have a direction of its own."""
    with evaluating(net):
        images: torch.Tensor = torch.func.functional_call(net, state, (z,))
        return images


def sgd_direction(net: torch.nn.Module, critic: Critic, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
    """How much G(z1) changes, against its motion, per learning rate of one step of SGD on E u(G(z2)): [N, ...].

    It is the derivative of theta -> G_theta(z1) along the gradient of E u(G_theta(z2)).
    """
    parameters, buffers = state_of(net)
    point = tuple(value.requires_grad_() for value in parameters.values())

    def images(*values: torch.Tensor, z: torch.Tensor = z1) -> torch.Tensor:
        return images_of(net, (dict(zip(parameters, values, strict=True)), buffers), z)

    uphill = torch.autograd.grad(critic(images(*point, z=z2)).mean(), point)
    # This makes two passes backwards, because forward-mode differentiation loads modules that warn of their age.
    change: torch.Tensor = torch.autograd.functional.jvp(images, point, uphill)[1]
    return change


def way_of_update(net: torch.nn.Module, update: Callable[[], None], z: torch.Tensor) -> torch.Tensor:
    """G_old(z) - G_new(z) of an update that is carried out: [N, ...]. The buffers of before serve both."""
    before = state_of(net)
    update()
    after, _ = state_of(net)
    with torch.no_grad():
        return images_of(net, before, z) - images_of(net, (after, before[1]), z)

#----------------------------------------------------------------------------
# A small WGAN-GP.

class WGAN:
    """Generator and critic of the InfoGAN layouts, trained with the one-sided penalty."""

    def __init__(self, config: Settled, target: Law):
        self.config, self.target, self.device = config, target, torch.device(config.device)
        self.G = make_generator(target.shape, config.width, seed=config.seed).to(self.device)
        self.critic = make_critic(config.critic, target.shape, config.width, config.seed).to(self.device)
        self.optimizers = {net: torch.optim.Adam(net.parameters(), lr=config.lr, betas=BETAS)
                           for net in (self.G, self.critic)}
        self.generator = seeded(config.seed, "wgan")

    def latents(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """[num, latent]."""
        return torch.randn([num, self.G.latent], generator=generator).to(self.device)

    def train_critic(self) -> None:
        """Do the iterations that come before an update of the generator."""
        for _ in range(CRITIC_ITERATIONS):
            y = self.target.draw(self.config.batch, self.generator).to(self.device)
            with torch.no_grad():
                x = self.G(self.latents(self.config.batch, self.generator))
            self._step(self.critic, -objective(self.critic, x, y, self.config.lam, self.generator))

    def train_generator(self) -> None:
        """Update the generator once."""
        z = self.latents(self.config.batch, self.generator)
        self._step(self.G, self.critic(self.G(z)).mean())

    def _step(self, net: torch.nn.Module, loss: torch.Tensor) -> None:
        self.optimizers[net].zero_grad(set_to_none=True)
        loss.backward()
        self.optimizers[net].step()

    def measure(self, update: int) -> "Alignment":
        """Measure the cosines, for which the generator is updated once."""
        generator = seeded(self.config.seed, f"measure/{update}")
        z1, z2 = self.latents(MEASURED, generator), self.latents(self.config.batch, generator)
        with torch.no_grad():
            images = images_of(self.G, state_of(self.G), z1)
        downhill = gradient(self.critic, images)
        sgd = cosines(sgd_direction(self.G, self.critic, z1, z2), downhill)
        real = distinct(self.target, MEASURED, generator).to(self.device)
        adam = cosines(way_of_update(self.G, self.train_generator, z1), downhill)
        return Alignment(update, sgd.cpu().numpy(), adam.cpu().numpy(), distance(images, real),
                         images[:10].cpu().numpy())

#----------------------------------------------------------------------------
# The study.

@dataclasses.dataclass
class Alignment:
    """Cosines at one moment of the training."""

    update: int             # Updates of the generator before.
    sgd: np.ndarray         # [MEASURED].
    adam: np.ndarray
    w1: float               # Exact W1 of MEASURED generated and as many real images.
    images: np.ndarray      # Some generated ones.


@dataclasses.dataclass
class Misalignment:
    """Cosines at some moments of a WGAN's training."""

    config: Settled
    moments: list[Alignment]
    seconds: float

    def headline(self) -> dict[str, Any]:
        """Mean and standard deviation over images, per moment."""
        rows = [{"update": m.update, "sgd": round(float(m.sgd.mean()), 4), "sgd_std": round(float(m.sgd.std()), 4),
                 "adam": round(float(m.adam.mean()), 4), "adam_std": round(float(m.adam.std()), 4),
                 "w1": round(m.w1, 4)} for m in self.moments]
        return {"task": self.config.task, "moments": rows, "seconds": round(self.seconds, 1)}

    def draw(self, folder: Path) -> list[Path]:
        """Histograms of the cosines per moment, and generated images."""
        figure, axes = plotting.panels(2, len(self.moments), height=2.6)
        for (top, bottom), moment in zip(axes.T, self.moments, strict=True):
            for name, values in (("SGD", moment.sgd), ("Adam", moment.adam)):
                top.hist(values, bins=np.linspace(-1, 1, BINS + 1), alpha=0.6, label=f"{name}, {values.mean():.2f}")
            top.set_title(f"before update {moment.update + 1}")
            top.set_xlabel("cosine with the critic's gradient")
            top.legend(fontsize=8)
            images = to_uint8_metric(torch.from_numpy(moment.images)).numpy().transpose(0, 2, 3, 1)
            plotting.draw_images(bottom, images[..., 0] if images.shape[3] == 1 else images, 5)
        axes[0, 0].set_ylabel("images per bin")
        return [plotting.save(figure, folder / "misalignment.png")]


def run_misalignment(config: Settled) -> Misalignment:
    """Train a WGAN with a settled configuration and measure at the beginning, on the way and at the end.

    Raises:
        UserError: no such data, or not images.
    """
    started = time.monotonic()
    target = open_data(config.data, config.resolution, "train")
    if len(target.shape) != 3:
        raise UserError(f"--data={config.data}: points, but this WGAN makes images: take digits or a data set")
    wgan = WGAN(config, target)
    when = sorted({min(max(round(part * config.iterations), 1), config.iterations) - 1 for part in MOMENTS})
    found: list[Alignment] = []
    for update in range(config.iterations):
        wgan.train_critic()
        if update not in when:
            wgan.train_generator()
            continue
        found.append(wgan.measure(update))
        click.echo(f"update {update + 1}/{config.iterations}: cosine {found[-1].sgd.mean():.3f} (SGD), "
                   f"{found[-1].adam.mean():.3f} (Adam), W1 {found[-1].w1:.4g}", err=True)
    return Misalignment(config, found, time.monotonic() - started)
