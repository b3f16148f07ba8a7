# SPDX-License-Identifier: Apache-2.0
"""Directions of style space along which pictures become what a text says: StyleMC (Kocasari et al. 2022).

A direction has one value per layer and channel, which is added to the styles that a layer makes of w. It begins at
zero. AdamW makes the distance of CLIP's vectors of the moved pictures from those of the texts small, over many
pictures, a few of them per step.
"""
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

from dnnlib import UserError
from inference.directions.clip import Clip
from inference.directions.files import Directions, style_space
from inference.sampling import class_means, map_latents, seed_latent
from torch_utils.misc import evaluating, full_precision, to_device
from training.generator.layer_schedule import largest_batch
from training.networks_stylegan3 import Generator

PER_STEP = 8                # Pictures of a step.
LONGEST_NAME = 40           # Of a direction that is called by its text.


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How a direction is searched for. The defaults are the published ones."""

    learning_rate: float = 0.05
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.25
    most_changes: float = 0.25      # Share of the steps in which the gradient of a channel may change its sign.


PUBLISHED = TextSettings()


class TextStep(NamedTuple):
    """What a step has seen, before it changed anything."""

    distance: float                 # Mean over its pictures, summed over the texts.


@dataclasses.dataclass(frozen=True)
class TextDirection:
    """What comes out."""

    vector: torch.Tensor            # float32 [all styles], on the CPU.
    distances: list[float]          # Of each step.
    num_moved: int                  # Channels that are moved,
    num_looked_at: int              # of so many in these layers.

#----------------------------------------------------------------------------
# Texts and layers.

def split_prompts(text: str) -> list[str]:
    """'a smile | red hair' -> ['a smile', 'red hair']. Raises UserError: one of them is empty."""
    prompts = [part.strip() for part in text.split("|")]
    if not all(prompts):
        raise UserError(f"--prompt={text}: has an empty text: give texts with | between them, such as 'a smiling "
                        "face | a portrait'")
    return prompts


def default_name(text: str) -> str:
    """What the direction of a text is called, so that it can be typed: a-smiling-face."""
    return re.sub(r"\W+", "-", text).strip("-")[:LONGEST_NAME].strip("-") or "text"


def movable_layers(G: Generator, given: Sequence[int] | None = None) -> list[int]:
    """The layers that are moved: those that are given, or all but the input and the critically sampled ones.

    Raises:
        UserError: one is not there, or is critically sampled: what a picture looks like is decided before these.
    """
    critical = [k for k, spec in enumerate(G.config.layers, start=1) if spec.is_critically_sampled or spec.is_torgb]
    if given is None:
        return list(range(1, critical[0]))
    if max(given) >= critical[0]:
        raise UserError(f"--layers: the network has the layers 0 to {G.num_ws - 1}, and those from {critical[0]} on "
                        "are critically sampled and not moved by texts: leave these out")
    return list(dict.fromkeys(given))

#----------------------------------------------------------------------------
# The pictures of the steps.

def seed_steps(G: Generator, seeds: Sequence[int], classes: Sequence[int], psi: float,
               num_pictures: int) -> Iterator[torch.Tensor]:
    """Latents [n, num_ws, w_dim] of each step.

    Args:
        G: The generator.
        seeds: They begin again when all have been there.
        classes: Of each seed.
        psi: Truncation.
        num_pictures: In all steps.
    """
    for chosen in _steps(len(seeds), num_pictures):
        z = torch.stack([seed_latent(seeds[i], G.z_dim) for i in chosen])
        labels = torch.tensor([classes[i] for i in chosen], dtype=torch.int64)
        w = map_latents(G, z, labels)
        if psi != 1:
            w = class_means(G, labels).lerp(w, psi)
        yield w[:, None].expand(-1, G.num_ws, -1)


def given_steps(ws: torch.Tensor, num_pictures: int) -> Iterator[torch.Tensor]:
    """The same of latents [N, num_ws, w_dim] that are given, as they are."""
    for chosen in _steps(len(ws), num_pictures):
        yield ws[chosen]


def _steps(num_sources: int, num_pictures: int) -> Iterator[list[int]]:
    """Numbers of sources, those of a step at once."""
    for first in range(0, num_pictures, PER_STEP):
        yield [i % num_sources for i in range(first, min(first + PER_STEP, num_pictures))]

#----------------------------------------------------------------------------
# The search.

def spherical_distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """2 arcsin(|x - y| / 2)^2 of each unit vector [N, D] from each of [M, D]: half the squared angle, [N, M]."""
    halves: torch.Tensor = (x[:, None] - y[None]).norm(dim=2).div(2).arcsin()
    return 2 * halves.square()


def find_text_direction(G: Generator, clip: Clip, prompts: Sequence[str], steps: Iterable[torch.Tensor],
                        layers: Sequence[int], batch_size: int = PER_STEP, settings: TextSettings = PUBLISHED,
                        watch: Callable[[TextStep], None] | None = None) -> TextDirection:
    """A direction of style space that brings pictures nearer to texts.

    Args:
        G: The generator, whose parameters ask for no gradient.
        clip: What sees pictures and reads texts.
        prompts: The texts.
        steps: Latents [n, num_ws, w_dim] of the pictures of each step.
        layers: That may be moved.
        batch_size: Pictures at once: memory depends on it, and the result only by the rounding of sums.
        settings: How it is searched for.
        watch: Is shown every step.

    Raises:
        UserError: a text is too long; the distances are not finite; no channel is left.
    """
    device, batch_size = next(G.parameters()).device, min(batch_size, largest_batch(G.config))
    movable = torch.cat([torch.full([size], float(k in layers)) for k, size in enumerate(G.synthesis.style_sizes)])
    movable = movable.to(device)
    direction = torch.zeros_like(movable, requires_grad=True)
    signs, changes = torch.zeros_like(movable), torch.zeros_like(movable)
    adamw = torch.optim.AdamW([direction], settings.learning_rate, settings.betas, weight_decay=settings.weight_decay)
    distances: list[float] = []
    with evaluating(G), full_precision():       # Also while gradients are computed, which happens within `backward`.
        targets = clip.embed_texts(prompts)
        for ws in steps:
            adamw.zero_grad(set_to_none=True)
            total = _add_gradients(G, clip, targets, ws.split(batch_size), direction) / len(ws)
            gradient = direction.grad
            assert gradient is not None         # `backward` has just put it there.
            gradient.mul_(movable)
            changes += gradient.sign() * signs < 0
            signs = torch.where(gradient != 0, gradient.sign(), signs)
            adamw.step()
            distances.append(float(total))
            if not direction.isfinite().all():
                raise UserError(f"--prompt: after {len(distances)} steps the direction is not finite: take another "
                                "network by --clip, or other seeds")
            if watch is not None:
                watch(TextStep(distances[-1]))
    vector = (direction.detach() * (changes <= settings.most_changes * len(distances))).cpu()
    num_moved = int(vector.count_nonzero())
    if num_moved == 0:
        raise UserError("--prompt: the gradients of all channels changed their signs again and again, so that no "
                        "direction is left: give more --seeds, other --layers or another text")
    return TextDirection(vector, distances, num_moved, int(movable.sum()))


def _add_gradients(G: Generator, clip: Clip, targets: torch.Tensor, batches: Iterable[torch.Tensor],
                   direction: torch.Tensor) -> torch.Tensor:
    """Add the gradient of the sum of all distances to that of `direction`; returns the sum."""
    total = torch.zeros([], device=direction.device)
    for ws in batches:
        images = G.synthesis(to_device(ws, direction.device), force_fp32=True, style_offset=direction[None])
        distance = spherical_distances(clip.embed_images(images), targets).sum()
        distance.backward()
        total += distance.detach()
    return total


def as_directions(G: Generator, found: TextDirection, name: str) -> Directions:
    """What was found as a direction of a file. It moves the layers in which a channel is left."""
    space = style_space(G)
    parts = found.vector.split(space.sizes)
    note = (f"{found.num_moved} of {found.num_looked_at} channels; distance {found.distances[0]:.3f} in the first "
            f"step, {found.distances[-1]:.3f} in the last one")
    return Directions([name], found.vector[None], torch.tensor([[bool(part.any()) for part in parts]]), [note],
                      styles=space)
