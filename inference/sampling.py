# SPDX-License-Identifier: Apache-2.0
"""Seeds and labels to images. A seed gives the same image whatever it is batched with."""
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.classes import Classes
from torch_utils.images import to_uint8_metric
from torch_utils.misc import evaluating, full_precision, one_hot, random_state, to_device
from training.data.randomness import CounterRNG
from training.generator.layer_schedule import largest_batch
from training.generator.synthesis import UNMOVED, Offset, require_finite, synthesize
from training.networks_stylegan3 import Generator

DRAWN_AT_ONCE = 4096        # Latents that are in memory; their w all are.
MAPPED_AT_ONCE = 256        # Latents: what their w is then does not depend on the batches of images.

#----------------------------------------------------------------------------
# The official conventions of gen_images.

def seed_latent(seed: int, z_dim: int) -> torch.Tensor:
    """The official latent of a seed: float32 [z_dim], standard normal."""
    return torch.from_numpy(random_state(seed).randn(1, z_dim)[0]).float()


def seed_label(seed: int, c_dim: int) -> int:
    """The official class of a seed for which none was asked."""
    return int(random_state(seed).randint(0, c_dim, 1)[0])


def find_class(value: str, class_names: Sequence[str] | None, c_dim: int, option: str = "--class") -> int:
    """Index of a class given by name or by number.

    Args:
        value: The name or the number.
        class_names: Of the network; None if its classes have none.
        c_dim: How many it has.
        option: Which names the class, for messages.

    Raises:
        UserError: the network is unconditional; no such class.
    """
    if c_dim == 0:
        raise UserError(f"{option}={value}: the network is unconditional: leave {option} out")
    classes = Classes(class_names, c_dim)
    found = classes.find(value)
    if found is None:
        numbers = "" if classes.are_numbers else f" or a number from 0 to {c_dim - 1}"
        raise UserError(f"{option}={value}: no class of this name: the network has {c_dim} classes, {classes}: "
                        f"give one of these names{numbers}")
    return found


def find_classes(value: str, class_names: Sequence[str] | None, c_dim: int, option: str = "--class") -> list[int]:
    """Indices of the classes of a list: names, numbers and ranges of numbers, as in 'cat,3,5-7'. Names may hold commas.

    Arguments as `find_class`.

    Raises:
        UserError: as `find_class`, which names the part of the list that means no class.
    """
    if c_dim == 0:
        find_class(value, class_names, c_dim, option)       # It says that there are no classes.
    classes = Classes(class_names, c_dim)
    most_parts = 1 + max((name.count(",") for name in classes.names), default=0)
    parts = value.split(",")
    found: list[int] = []
    while parts:
        # The longest name first: ImageNet has a class 'tench, Tinca tinca'.
        for count in range(min(most_parts, len(parts)), 0, -1):
            index = classes.find(",".join(parts[:count]).strip())
            if index is not None:
                break
        found += _range_of_classes(parts[0], class_names, c_dim, option) if index is None else [index]
        del parts[:count]
    return found


def _range_of_classes(part: str, class_names: Sequence[str] | None, c_dim: int, option: str) -> list[int]:
    """Indices of the classes from 3 to 5 for '3-5'. Raises UserError if one of them is none, or for other text."""
    ends = re.fullmatch(r"\s*(\d{1,9})-(\d{1,9})\s*", part)
    first, last = (int(ends[1]), int(ends[2])) if ends is not None else (0, -1)
    if first > last:
        return [find_class(part, class_names, c_dim, option)]
    find_class(str(last), class_names, c_dim, option)   # A range without end is refused before it is gone through.
    return [find_class(str(number), class_names, c_dim, option) for number in range(first, last + 1)]


@torch.no_grad()
def map_latents(G: Generator, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """w [N, w_dim] on the CPU, without truncation, of latents [N, z_dim] and classes [N].

    They come in batches of one size, whatever images are made of them later.
    """
    device = next(G.parameters()).device
    parts = []
    with evaluating(G), full_precision():
        for z_part, label_part in zip(z.split(MAPPED_AT_ONCE), labels.split(MAPPED_AT_ONCE), strict=True):
            c = one_hot(to_device(label_part, device), G.c_dim)
            parts.append(G.mapping(to_device(z_part, device), c)[:, 0].cpu())
    return torch.cat(parts)


def many_w(G: Generator, num: int, classes: Sequence[int], seed: int, stream: str) -> tuple[np.ndarray, torch.Tensor]:
    """w float32 [num, w_dim] of random latents, and their classes int64 [num], which take turns.

    Args:
        G: The generator.
        num: How many.
        classes: That take turns; [0] if there are none. The latents do not depend on them.
        seed: Of the latents.
        stream: Another one gives other latents.

    Raises:
        UserError: they are not finite.
    """
    rng = CounterRNG(seed)
    labels = torch.tensor(classes, dtype=torch.int64)[torch.arange(num) % len(classes)]
    w = np.empty([num, G.w_dim], dtype=np.float32)
    for first in range(0, num, DRAWN_AT_ONCE):
        part = slice(first, min(first + DRAWN_AT_ONCE, num))
        z = torch.from_numpy(rng.normal(stream, range(part.start, part.stop), (G.z_dim,)))
        w[part] = map_latents(G, z, labels[part]).numpy()
    if not np.isfinite(w).all():
        raise UserError("the network gives w that are not finite: the snapshot is of a diverged run")
    return w, labels


def class_means(G: Generator, labels: torch.Tensor) -> torch.Tensor:
    """Where truncation pulls the classes [N], on the CPU: [N, w_dim]."""
    means = G.mapping.w_avg.cpu()
    return means[labels] if G.c_dim > 0 else means.expand(len(labels), -1)


def generate(G: Generator, z: torch.Tensor, labels: torch.Tensor, batch_size: int, truncation_psi: float = 1.0,
             centroids: torch.Tensor | None = None, precision: str = "auto",
             edit: Offset = UNMOVED) -> Iterator[torch.Tensor]:
    """Batches of images [n, 3, R, R], about [-1, 1], for latents [N, z_dim] and classes [N].

    Arguments as `synthesize`.

    Raises:
        UserError: an image has non-finite values.
    """
    for z_part, label_part in zip(z.split(batch_size), labels.split(batch_size), strict=True):
        images = synthesize(G, z_part, label_part, truncation_psi, centroids, precision, edit)
        require_finite(torch.isfinite(images).all())
        yield images

#----------------------------------------------------------------------------
# The image source of metrics.

LABEL_POLICIES = ("dataset", "uniform", "balanced")


class GeneratorSource:
    """Generated images for metrics (the protocol of `metrics.sources`).

    Image i depends on (seed, i) alone. Labels: 'dataset' draws classes as often as the data has them, 'uniform' all
    equally often, 'balanced' gives every class the same count.
    """

    def __init__(
        self,
        G: Generator,
        num_images: int,
        seed: int = 0,
        label_policy: str = "dataset",
        label_probs: np.ndarray | None = None,      # [c_dim]: of the data; needed for 'dataset'.
        truncation_psi: float = 1.0,
        fingerprint: str = "",                      # Hash of the network's file.
        precision: str = "auto",                    # A key of `PRECISIONS`.
        class_names: Sequence[str] | None = None,   # Names of the network's classes.
    ):
        if label_policy not in LABEL_POLICIES:
            raise UserError(f"--labels={label_policy}: choose from {', '.join(LABEL_POLICIES)}")
        if G.c_dim > 0 and label_policy == "dataset" and label_probs is None:
            raise UserError("--labels=dataset: the label distribution of the data is not known: "
                            "give --data with labels, or --labels=uniform or balanced")
        if label_probs is not None and G.c_dim not in (0, len(label_probs)):
            raise UserError(f"the network has {G.c_dim} classes, the data {len(label_probs)}: take the data it was "
                            "trained on, or --labels=uniform")
        self.G, self.num_images, self.seed, self.psi = G, num_images, seed, truncation_psi
        self.label_policy = label_policy if G.c_dim > 0 else "none"
        self.probs = label_probs if label_policy == "dataset" else None
        self.fingerprint, self.precision = fingerprint, precision
        self.rng = CounterRNG(seed)
        self.description: dict[str, Any] = {"kind": "network", "labels": self.label_policy, "seed": seed,
                                            "truncation_psi": truncation_psi, "precision": precision,
                                            "class_names": class_names}
        drawn = np.ones(G.c_dim) if self.probs is None else self.probs
        self.label_values = np.flatnonzero(drawn) if G.c_dim > 0 else None

    def latents(self, positions: np.ndarray, stream: str = "metric/z") -> torch.Tensor:
        """Latents float32 [N, z_dim] of the images at `positions`; another stream gives others."""
        return torch.from_numpy(self.rng.normal(stream, positions, (self.G.z_dim,)))

    def uniform(self, positions: np.ndarray, shape: Sequence[int], stream: str) -> np.ndarray:
        """Further random numbers that go with the images at `positions`: float32 [N, *shape] in [0, 1)."""
        return self.rng.uniform(stream, positions, shape)

    def labels(self, positions: np.ndarray) -> torch.Tensor:
        """Classes int64 [N] of the images at `positions`."""
        c_dim = self.G.c_dim
        if c_dim == 0:
            return torch.zeros(len(positions), dtype=torch.int64)
        if self.label_policy == "balanced":
            return torch.from_numpy(positions.astype(np.int64) % c_dim)
        probs = self.probs if self.probs is not None else np.full(c_dim, 1 / c_dim)
        return torch.from_numpy(self.rng.integers_from("metric/c", positions, probs))

    def __len__(self) -> int:
        return self.num_images

    def batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """All images in order: uint8 [N, 3, R, R] and classes [N], None where the network has none."""
        return self.batches_at(batch_size, range(self.num_images))

    def batches_at(self, batch_size: int,
                   indices: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """The images with these numbers; the others are not made. Large images come in smaller batches."""
        positions = np.asarray(indices, dtype=np.int64)
        batch_size = min(batch_size, largest_batch(self.G.config))
        flags: list[torch.Tensor] = []
        for i in range(0, len(positions), batch_size):
            part = positions[i:i + batch_size]
            labels = self.labels(part)
            images = synthesize(self.G, self.latents(part), labels, self.psi, precision=self.precision)
            flags.append(torch.isfinite(images).all())
            is_last = i + batch_size >= len(positions)
            while len(flags) > (0 if is_last else 1):
                require_finite(flags.pop(0))    # That of the batch before: the device works on this one meanwhile.
            yield to_uint8_metric(images), labels if self.G.c_dim > 0 else None
