# SPDX-License-Identifier: Apache-2.0
"""The laws that samples come from and shall go to: noise, points, digits, photographs, data sets, generators.

Everything is float32 on the CPU, images [C, R, R] in [-1, 1], points [2]. The samples of a law are a function of the
random generator alone. Laws of real data come in two halves that share no image: 'train' for critics, 'test' to judge.
"""
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF

from dnnlib import UserError
from torch_utils.images import from_uint8
from transport.common.sklearn_images import PHOTOS, load_digits, load_photo
from transport.ttc.image_critics import InfoGANGenerator, Shape, make_generator

HALVES = ("train", "test")
MAX_IMAGES = 20_000             # So many images of a data set are kept in memory.
BLUR_KERNEL, BLUR_SIGMA = 5, 2.0


class Law(Protocol):
    """A law of samples."""

    @property
    def shape(self) -> Shape:
        """The shape of one sample."""
        ...

    def draw(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """Independent samples [num, *shape]."""
        ...

#----------------------------------------------------------------------------
# Kinds.

@dataclasses.dataclass(frozen=True)
class Normal:
    """Standard normal numbers: the papers' noise, one per pixel."""

    shape: Shape

    def draw(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """Independent samples."""
        return torch.randn([num, *self.shape], generator=generator)


class Table:
    """A finite set of samples [N, *shape], drawn with replacement."""

    def __init__(self, samples: torch.Tensor):
        self.samples = samples
        self.shape: Shape = tuple(samples.shape[1:])

    def draw(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """Independent samples."""
        return self.samples[torch.randint(len(self.samples), [num], generator=generator)]


class Crops:
    """Square crops at random places of photographs, uint8 [3, H, W] each."""

    def __init__(self, photos: list[torch.Tensor], side: int):
        small = [list(photo.shape[1:]) for photo in photos if min(photo.shape[1:]) < side]
        if small:
            raise UserError(f"--resolution={side}: a photograph has only {small[0][0]}x{small[0][1]} pixels there: "
                            "take smaller crops")
        self.photos = photos
        self.shape: Shape = (3, side, side)

    def draw(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """Independent samples."""
        side = self.shape[1]
        crops = []
        for number, down, right in torch.rand([num, 3], generator=generator, dtype=torch.float64).tolist():
            photo = self.photos[int(number * len(self.photos))]
            top, left = int(down * (photo.shape[1] - side + 1)), int(right * (photo.shape[2] - side + 1))
            crops.append(photo[:, top:top + side, left:left + side])
        return from_uint8(torch.stack(crops))


class Untrained:
    """Images of an untrained generator, batch statistics included: smoother than noise, and as far from any data."""

    def __init__(self, net: InfoGANGenerator, shape: Shape):
        self.net = net.train().requires_grad_(False)
        self.shape = shape

    def draw(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """Samples, independent up to the statistics of the batch; two or more."""
        state = {name: value.clone() for name, value in self.net.state_dict().items()}
        z = torch.randn([num, self.net.latent], generator=generator)
        images: torch.Tensor = torch.func.functional_call(self.net, state, z)   # Running statistics go into the copies.
        return images


class Degraded:
    """Samples of another law after noise or blur; `pair` also gives them as they were before."""

    def __init__(self, clean: Law, degrade: Callable[[torch.Tensor, torch.Generator], torch.Tensor]):
        self.clean, self.degrade, self.shape = clean, degrade, clean.shape

    def pair(self, num: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """(clean, degraded), [num, *shape] each."""
        clean = self.clean.draw(num, generator)
        return clean, self.degrade(clean, generator)

    def draw(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """Independent samples."""
        return self.pair(num, generator)[1]


@dataclasses.dataclass(frozen=True)
class Points:
    """Points of the plane made from uniform numbers [N, 2]."""

    make: Callable[[torch.Tensor], torch.Tensor]
    shape: Shape = (2,)

    def draw(self, num: int, generator: torch.Generator) -> torch.Tensor:
        """Independent samples."""
        return self.make(torch.rand([num, 2], generator=generator, dtype=torch.float64)).float()


def _circle(u: torch.Tensor) -> torch.Tensor:
    angle = 2 * math.pi * u[:, 0]
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _ring(u: torch.Tensor) -> torch.Tensor:
    return 2 * _circle(u) * (0.9 + 0.2 * u[:, 1:])


def _eight(u: torch.Tensor) -> torch.Tensor:
    """Eight small discs on a circle of radius 2."""
    corner = torch.stack([(8 * u[:, 0]).floor() / 8, u[:, 1]], dim=1)
    rest = torch.stack([u[:, 1], (8 * u[:, 0]) % 1], dim=1)
    return 2 * _circle(corner) + 0.1 * _circle(rest) * rest[:, 1:].sqrt()


POINTS = {"points:ring": _ring, "points:eight": _eight, "points:circle": _circle}

#----------------------------------------------------------------------------
# By name.

def noisy(clean: Law, sigma: float) -> Degraded:
    """Normal noise of standard deviation `sigma`, added after scaling to [-1, 1]; nothing is clipped."""
    return Degraded(clean, lambda x, generator: x + sigma * torch.randn(x.shape, generator=generator))


def blurred(clean: Law) -> Degraded:
    """A Gaussian blur of standard deviation 2 pixels, kernel of 5."""
    return Degraded(clean, lambda x, generator: TF.gaussian_blur(x, [BLUR_KERNEL] * 2, [BLUR_SIGMA] * 2))


def open_data(name: str, resolution: int, half: str) -> Law:
    """Real data, the half 'train' or 'test' of it, or points (which have no halves).

    Args:
        name: 'digits', 'photos', 'photos:china', 'photos:flower', 'points:ring', 'points:eight', 'points:circle', or
            the path of a data set (zip or folder, as train.py takes it).
        resolution: Side of digits and of crops of photographs; data sets have their own.

    Raises:
        UserError: no such data.
    """
    if name in POINTS:
        return Points(POINTS[name])
    if name == "digits":
        return Table(_digits(resolution)[HALVES.index(half)::2])
    if name.split(":")[0] == "photos":
        return Crops(_photos(name, half), resolution)
    if not Path(name).exists():
        raise UserError(f"{name}: no such data: give the path of a data set, or digits, photos, photos:china, "
                        f"photos:flower, {', '.join(POINTS)}")
    return Table(_data_set(name)[HALVES.index(half)::2])


def open_generator(path: str, half: str, num: int, seed: int) -> Table:
    """`num` images of a generator of ours; the halves are made from different latents.

    A conditional generator makes all classes equally often. Images are rounded to 8 bits, as files and data are.

    Raises:
        UserError: no such snapshot, or not one of a generator.
    """
    from inference.sampling import GeneratorSource
    from legacy import load_network

    made = GeneratorSource(load_network(path).G_ema, 2 * num, seed, "uniform")
    start = HALVES.index(half) * num
    return Table(torch.cat([from_uint8(images) for images, _ in made.batches_at(64, range(start, start + num))]))


def open_source(name: str, target: Law, half: str, sigma: float, num: int, seed: int, resolution: int) -> Law:
    """The law of --source: made for the target ('noise', 'untrained', 'noisy', 'blurred'), a generator's, or data.

    Args:
        target: Half `half` of the law where samples shall go: it gives shapes, and the images to degrade.
        sigma: Standard deviation of the noise of 'noisy'; data are in [-1, 1].
        num: Images to make with a generator, per half.

    Raises:
        UserError: no such source, or its samples have another shape than the target's.
    """
    if name == "noise":
        return Normal(target.shape)
    if name == "noisy":
        return noisy(target, sigma)
    if len(target.shape) != 3 and name in ("blurred", "untrained"):
        raise UserError(f"--source={name}: makes images, but the target's samples have the shape "
                        f"{list(target.shape)}: use noise or noisy")
    if name == "blurred":
        return blurred(target)
    if name == "untrained":
        return Untrained(make_generator(target.shape, seed=seed), target.shape)
    is_network = name.endswith(".pkl") or (Path(name) / "training_options.json").is_file()
    source = open_generator(name, half, num, seed) if is_network else open_data(name, resolution, half)
    if source.shape != target.shape:
        raise UserError(f"--source={name}: its samples have the shape {list(source.shape)}, the target's "
                        f"{list(target.shape)}: choose a source of the target's shape")
    return source

#----------------------------------------------------------------------------



def _digits(resolution: int) -> torch.Tensor:
    """The 1,797 handwritten digits, [N, 1, R, R]; other sizes than 8 pixels by bilinear interpolation."""
    images, _ = load_digits()
    if resolution == images.shape[2]:
        return images
    return F.interpolate(images, size=(resolution, resolution), mode="bilinear", align_corners=False)


def _photos(name: str, half: str) -> list[torch.Tensor]:
    """The left or the right side of photographs; either photograph looks much the same on both sides."""
    wanted = name.partition(":")[2]
    if wanted not in ("", *PHOTOS):
        raise UserError(f"{name}: no such photograph: choose from photos, photos:china, photos:flower")
    photos = [load_photo(photo) for photo in ([wanted] if wanted else PHOTOS)]
    return [photo.tensor_split(2, dim=2)[HALVES.index(half)] for photo in photos]


def _data_set(path: str) -> torch.Tensor:
    """Images [N, 3, R, R] of a data set, at most MAX_IMAGES."""
    from training.dataset import ImageDataset

    images = ImageDataset(path, max_size=MAX_IMAGES)
    table = torch.stack([torch.from_numpy(images[i][0]) for i in range(len(images))])
    images.close()
    return from_uint8(table)
