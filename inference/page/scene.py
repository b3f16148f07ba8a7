# SPDX-License-Identifier: Apache-2.0
"""What the controls of the page mean: from their values to latents. Knows no pages.

Latents go through one line: where they come from (a seed, two saved points, a picture), layers of another seed,
truncation, directions. What a saved point keeps is what comes before truncation, so psi and directions act on it anew.
"""
import dataclasses
import math
from collections.abc import Mapping

import torch

from dnnlib import UserError
from dnnlib.cli import MAX_PSI, MAX_SHIFT, MAX_STRENGTH, MAX_TURN
from inference.frames import make_transform
from inference.sampling import class_means, map_latents, seed_latent
from training.generator.synthesis import UNMOVED, Offset
from training.networks_stylegan3 import Generator

SEED, BETWEEN, PICTURE = "seed", "between A and B", "inverted picture"
SOURCES = (SEED, BETWEEN, PICTURE)
LARGEST_SEED = 2 ** 53 - 1          # Browsers count in float64: beyond, two seeds would be one.
NUM_NEIGHBOURS = 8

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Point:
    """Latents before truncation, on the CPU."""

    ws: torch.Tensor            # float32 [num_ws, w_dim]
    centers: torch.Tensor       # [num_ws, w_dim]: where truncation pulls.


@dataclasses.dataclass(frozen=True)
class Mixing:
    """Layers that come from another seed."""

    seed: int
    class_idx: int
    first: int
    last: int                   # It belongs to them.


@dataclasses.dataclass(frozen=True)
class Controls:
    """What is to be seen."""

    source: str = SEED                          # One of SOURCES.
    class_idx: int = 0                          # 0 where the network has no classes.
    seed: int = 0
    psi: float = 1.0
    noise: float = 0.0                          # How far from the seed's latent: 0 is there, 1 a right angle away.
    noise_seed: int = 0                         # In which direction.
    mixing: Mixing | None = None
    translate: tuple[float, float] = (0.0, 0.0)
    rotate: float = 0.0                         # Degrees.
    between: float = 0.0                        # 0 is A, 1 is B.
    edits: tuple[tuple[str, float], ...] = ()   # Names of directions and strengths.

    def check(self, G: Generator) -> None:
        """Refuse what a page cannot send by its controls, but by its fields or by another program. Raises UserError."""
        if self.source not in SOURCES:
            raise UserError(f"what is shown: {str(self.source)[:40]!r} is none of {', '.join(SOURCES)}: choose one")
        mixing = self.mixing or Mixing(0, 0, 0, 0)
        for name, seed in (("seed", self.seed), ("seed of the noise", self.noise_seed), ("other seed", mixing.seed)):
            if not 0 <= seed <= LARGEST_SEED:
                raise UserError(f"{name}: {seed} is none: give a whole number from 0 to {LARGEST_SEED}")
        for class_idx in (self.class_idx, mixing.class_idx):
            if not 0 <= class_idx < max(G.c_dim, 1):
                raise UserError(f"class: the network has no number {class_idx}: choose one of the list")
        if not 0 <= mixing.first <= mixing.last < G.num_ws:
            raise UserError(f"layers {mixing.first} to {mixing.last}: the network has 0 to {G.num_ws - 1}: give the "
                            "first one first")
        ranges = {"psi": (self.psi, -MAX_PSI, MAX_PSI), "noise": (self.noise, 0, 1), "between": (self.between, 0, 1),
                  "shift to the right": (self.translate[0], -MAX_SHIFT, MAX_SHIFT),
                  "shift down": (self.translate[1], -MAX_SHIFT, MAX_SHIFT),
                  "rotation": (self.rotate, -MAX_TURN, MAX_TURN),
                  **{name: (strength, -MAX_STRENGTH, MAX_STRENGTH) for name, strength in self.edits}}
        for name, (value, low, high) in ranges.items():
            if not low <= value <= high:            # Also nan.
                raise UserError(f"{name}: {value:g} is beyond its limits: give a number from {low:g} to {high:g}")

    @property
    def is_plain(self) -> bool:
        """Whether a seed, a class and psi say all about the latents, but for directions."""
        return self.source == SEED and self.noise == 0 and self.mixing is None

    def transform(self) -> torch.Tensor:
        """Where the picture lies: [1, 3, 3]."""
        return make_transform(self.translate, self.rotate)[None]

#----------------------------------------------------------------------------
# Points.

def shared_point(G: Generator, w: torch.Tensor, class_idx: int) -> Point:
    """A point whose layers all have the same w [w_dim]."""
    centers = class_means(G, torch.tensor([class_idx]))
    return Point(w.expand(G.num_ws, -1), centers.expand(G.num_ws, -1))


def noisy_latent(z: torch.Tensor, noise: float, noise_seed: int) -> torch.Tensor:
    """A latent [z_dim] that lies `noise` right angles from z on the way to the latent of another seed.

    Both are standard normal and independent, and so is what comes out, whatever the noise.
    """
    if noise == 0:
        return z
    angle = noise * math.pi / 2
    return math.cos(angle) * z + math.sin(angle) * _noise_latent(noise_seed, len(z))


def _noise_latent(noise_seed: int, z_dim: int) -> torch.Tensor:
    """The latent of a seed of noise. It counts from the last of all seeds down, so that no seed is its own noise."""
    return seed_latent(2 ** 64 - 1 - noise_seed, z_dim)


def seed_point(G: Generator, seed: int, class_idx: int, noise: float = 0.0, noise_seed: int = 0) -> Point:
    """The point of a seed, or one near it."""
    z = noisy_latent(seed_latent(seed, G.z_dim), noise, noise_seed)
    return shared_point(G, map_latents(G, z[None], torch.tensor([class_idx]))[0], class_idx)


def mixed(point: Point, other: Point, first: int, last: int) -> Point:
    """The layers from `first` to `last` from another point, together with their centres."""
    layers = slice(first, last + 1)
    ws, centers = point.ws.clone(), point.centers.clone()
    ws[layers], centers[layers] = other.ws[layers], other.centers[layers]
    return Point(ws, centers)


def on_the_way(start: Point, end: Point, t: float) -> Point:
    """What lies between two points: at 0 the first, at 1 the second one."""
    return Point(start.ws.lerp(end.ws, t), start.centers.lerp(end.centers, t))


def find_point(G: Generator, controls: Controls, saved: Mapping[str, Point]) -> Point:
    """The point that the controls ask for.

    Args:
        G: The generator.
        controls: Values that `Controls.check` has seen.
        saved: "A", "B" and PICTURE, as far as they are there.

    Raises:
        UserError: they need a point that is not there.
    """
    if controls.source == BETWEEN:
        for name in ("A", "B"):
            if name not in saved:
                raise UserError(f"{BETWEEN}: nothing is saved as {name}: show a picture and press 'Save as {name}'")
        point = on_the_way(saved["A"], saved["B"], controls.between)
    elif controls.source == PICTURE:
        if PICTURE not in saved:
            raise UserError(f"{PICTURE}: there is none: choose a picture under 'Invert' and press 'Find its latents'")
        point = saved[PICTURE]
    else:
        point = seed_point(G, controls.seed, controls.class_idx, controls.noise, controls.noise_seed)
    if (mixing := controls.mixing) is None:
        return point
    return mixed(point, seed_point(G, mixing.seed, mixing.class_idx), mixing.first, mixing.last)


def truncated(point: Point, psi: float, edit: Offset = UNMOVED) -> torch.Tensor:
    """The ws [1, num_ws, w_dim] of which a picture is made.

    Args:
        point: Latents.
        psi: 1 leaves them, 0 gives the centres.
        edit: Added after truncation, as far as latents can hold it.
    """
    ws = point.ws if psi == 1 else point.centers.lerp(point.ws, psi)
    return edit.moved(ws)[None]
