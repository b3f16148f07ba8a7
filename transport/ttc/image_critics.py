# SPDX-License-Identifier: Apache-2.0
"""Critics of the papers on Trust the Critics, and the generator of their WGAN: plain networks without normalisation.

Layouts as in the papers' experiments, with all widths in proportion to `width` (64 there), so that the same networks
can be had small. No critic uses statistics of the batch: a gradient per sample would not exist.
"""
from collections.abc import Callable, Sequence

import torch

from dnnlib import UserError
from transport.common.critics import MLP

Shape = tuple[int, ...]
PAPER_WIDTH = 64

#----------------------------------------------------------------------------
# Critics: [N, C, H, W] -> [N].

class ConvCritic(torch.nn.Module):
    """Convolutions (out, kernel, stride, padding), linear layers, one number; leaky ReLU between them."""

    def __init__(self, shape: Shape, convolutions: Sequence[tuple[int, int, int, int]], hidden: Sequence[int],
                 slope: float = 0.1):
        super().__init__()
        layers: list[torch.nn.Module] = []
        channels = shape[0]
        for out, kernel, stride, padding in convolutions:
            layers += [torch.nn.Conv2d(channels, out, kernel, stride, padding), torch.nn.LeakyReLU(slope)]
            channels = out
        layers.append(torch.nn.Flatten())
        features = _features(convolutions, shape)
        for out in hidden:
            layers += [torch.nn.Linear(features, out), torch.nn.LeakyReLU(slope)]
            features = out
        self.layers = torch.nn.Sequential(*layers, torch.nn.Linear(features, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y.squeeze(1)


def _features(convolutions: Sequence[tuple[int, int, int, int]], shape: Shape) -> int:
    """Numbers per image after the convolutions; 0 or fewer if the image is too small for them."""
    sides = list(shape[1:])
    for _out, kernel, stride, padding in convolutions:
        sides = [(side + 2 * padding - kernel) // stride + 1 for side in sides]
    return -1 if min(sides) < 1 else convolutions[-1][0] * sides[0] * sides[1]


class NormTaker(torch.nn.Module):
    """u(x) = a |x| + b: optimal between a sphere and the origin for the right a, which training must find."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(1 + 0.1 * torch.randn([]))
        self.b = torch.nn.Parameter(torch.zeros([]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm: torch.Tensor = x.flatten(1).norm(dim=1)
        return self.a * norm + self.b


def _infogan(shape: Shape, w: int) -> torch.nn.Module:
    return ConvCritic(shape, [(w, 4, 2, 1), (2 * w, 4, 2, 1)], [16 * w])


def _dcgan(shape: Shape, w: int) -> torch.nn.Module:
    return ConvCritic(shape, [(w, 3, 2, 1), (2 * w, 3, 2, 1), (4 * w, 3, 2, 1)], [], slope=0.01)


def _sndcgan_layers(w: int) -> list[tuple[int, int, int, int]]:
    return [(w, 3, 1, 1), (2 * w, 4, 2, 1), (2 * w, 3, 1, 1), (4 * w, 4, 2, 1), (4 * w, 3, 1, 1), (8 * w, 4, 2, 1),
            (8 * w, 3, 1, 1)]


def _sndcgan(shape: Shape, w: int) -> torch.nn.Module:
    return ConvCritic(shape, _sndcgan_layers(w), [])


def _bsndcgan(shape: Shape, w: int) -> torch.nn.Module:
    return ConvCritic(shape, [*_sndcgan_layers(w), (8 * w, 3, 2, 1), (8 * w, 3, 2, 1), (8 * w, 4, 1, 0)], [])


def _arconvnet(shape: Shape, w: int) -> torch.nn.Module:
    widths = [max(w * k // 64, 1) for k in (16, 32, 32, 64, 64, 128)]
    strides = (1, 1, 2, 2, 2, 2)
    return ConvCritic(shape, [(out, 5, stride, 2) for out, stride in zip(widths, strides, strict=True)], [4 * w])


IMAGE_CRITICS: dict[str, Callable[[Shape, int], torch.nn.Module]] = {
    "infogan": _infogan, "sndcgan": _sndcgan, "arconvnet": _arconvnet, "dcgan": _dcgan, "bsndcgan": _bsndcgan}
CRITICS = (*IMAGE_CRITICS, "mlp", "norm")


def make_critic(name: str, shape: Shape, width: int = PAPER_WIDTH, seed: int = 0) -> torch.nn.Module:
    """A critic with fresh weights, a function of the seed; other random numbers are not disturbed.

    Args:
        name: One of `CRITICS`.
        shape: The shape of a sample: [C, H, W] for images, [d] for points.
        width: Channels of the first layers; 64 in the papers.

    Raises:
        UserError: this critic does not take samples of this shape.
    """
    if name == "mlp" and len(shape) != 1:
        raise UserError(f"--critic=mlp: takes points, but samples have the shape {list(shape)}: "
                        f"choose from {', '.join(IMAGE_CRITICS)}")
    if name in IMAGE_CRITICS and len(shape) != 3:
        raise UserError(f"--critic={name}: takes images, but samples have the shape {list(shape)}: use --critic=mlp")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            return MLP(shape[0], width)
        if name == "norm":
            return NormTaker()
        try:
            return IMAGE_CRITICS[name](shape, width)
        except RuntimeError as err:     # No features left.
            raise UserError(f"--critic={name}: images of {shape[1]}x{shape[2]} pixels are too small for it: "
                            "take a larger --resolution, or infogan or arconvnet") from err

#----------------------------------------------------------------------------

class InfoGANGenerator(torch.nn.Module):
    """[N, latent] -> [N, C, H, W] in [-1, 1]: two linear and two transposed convolutions, no biases, batch norm.

    Raises:
        UserError: H or W is no multiple of 4.
    """

    def __init__(self, shape: Shape, width: int = PAPER_WIDTH, latent: int = 64):
        super().__init__()
        channels, height, across = shape
        if height % 4 or across % 4:
            raise UserError(f"images of {height}x{across} pixels: the generator makes multiples of 4: "
                            "take another --resolution")
        self.latent = latent
        self.small = (2 * width, height // 4, across // 4)
        features = 2 * width * (height // 4) * (across // 4)
        self.linear = torch.nn.Sequential(
            torch.nn.Linear(latent, 16 * width, bias=False), torch.nn.BatchNorm1d(16 * width), torch.nn.ReLU(),
            torch.nn.Linear(16 * width, features, bias=False), torch.nn.BatchNorm1d(features), torch.nn.ReLU())
        self.convolutions = torch.nn.Sequential(
            torch.nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False), torch.nn.BatchNorm2d(width),
            torch.nn.ReLU(), torch.nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), torch.nn.Tanh())

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self.convolutions(self.linear(z).unflatten(1, self.small))
        return images


def make_generator(shape: Shape, width: int = PAPER_WIDTH, latent: int = 64, seed: int = 0) -> InfoGANGenerator:
    """A generator with fresh weights, a function of the seed; other random numbers are not disturbed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return InfoGANGenerator(shape, width, latent)
