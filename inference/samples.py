# SPDX-License-Identifier: Apache-2.0
"""The images of a set: which seed is made with which class, how often classes come, and the images themselves."""
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from dnnlib.classes import Classes, match
from inference.sampling import generate, seed_label, seed_latent
from torch_utils.images import to_uint8_sample
from training.data.randomness import CounterRNG
from training.generator.layer_schedule import largest_batch
from training.generator.synthesis import UNMOVED, Offset, require_finite, synthesize_ws
from training.networks_stylegan3 import Generator

#----------------------------------------------------------------------------
# Seeds and classes.

@dataclasses.dataclass(frozen=True)
class Samples:
    """Images by seed and class, in order. An unconditional network has the class 0 only."""

    seeds: Sequence[int]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.seeds)


def each_class(seeds: Sequence[int], classes: Sequence[int], by_class: bool = False) -> Samples:
    """Every seed with every class.

    Args:
        seeds: The seeds.
        classes: The classes.
        by_class: All seeds of the first class come before those of the next. Otherwise classes alternate, because
            some scores are means over parts of a set and want all classes in each.
    """
    if by_class:
        return Samples([s for _ in classes for s in seeds], [k for k in classes for _ in seeds])
    return Samples([s for s in seeds for _ in classes], [k for _ in seeds for k in classes])


def drawn_classes(seeds: Sequence[int], c_dim: int, policy: str, shares: np.ndarray | None = None) -> Samples:
    """Every seed with one class.

    Args:
        seeds: The seeds.
        c_dim: Number of classes; 0 if there are none.
        policy: As in `inference.sampling.LABEL_POLICIES`. 'uniform': the official draw from the seed. 'balanced': the
            classes take turns, whatever the seeds are. 'dataset': drawn from the seed by `shares`.
        shares: Of the classes in the data, float64 [c_dim].
    """
    if c_dim == 0:
        return Samples(seeds, [0] * len(seeds))
    if policy == "balanced":
        return Samples(seeds, [i % c_dim for i in range(len(seeds))])
    if policy == "dataset":
        assert shares is not None, "they are read where the policy is checked"
        # The official draw would not do: it begins with the numbers that become the latent, so a rare class would get
        # latents of one corner only.
        return Samples(seeds, CounterRNG(0).integers_from("samples/c", seeds, shares).tolist())
    return Samples(seeds, [seed_label(seed, c_dim) for seed in seeds])


def class_shares(what: str, labels: np.ndarray, names: Sequence[str] | None, whose: str,
                 network_names: Sequence[str] | None, c_dim: int) -> tuple[np.ndarray, str | None]:
    """How often the classes of a network come in a data set.

    Args:
        what: The data set, for messages.
        labels: Its labels, int64 [N].
        names: Names of its classes; None if they have none.
        whose: The network, for messages.
        network_names: Names of the network's classes.
        c_dim: How many it has.

    Returns:
        Shares float64 [c_dim], and a note for people, if something was taken for granted.

    Raises:
        UserError: the data have classes that the network does not know.
    """
    counts = np.bincount(labels)
    found = match(what, Classes(names, len(counts)), whose, Classes(network_names, c_dim),
                  "use the data set it was trained on, or --labels=uniform", np.flatnonzero(counts).tolist())
    shares = np.zeros(c_dim)
    for i, count in enumerate(counts.tolist()):
        if count:
            shares[found.indices[i]] = count / counts.sum()
    return shares, found.note

#----------------------------------------------------------------------------
# Images.

def sample_images(G: Generator, samples: Samples, batch_size: int = 1, truncation_psi: float = 1.0,
                  centroids: torch.Tensor | None = None, precision: str = "auto",
                  edit: Offset = UNMOVED) -> Iterator[np.ndarray]:
    """The images one by one, uint8 [R, R, 3], rounded as the official sample files are.

    In batches of one an image is a function of its seed and its class alone. In larger batches sums may be rounded
    differently, which moves a value by one of 255 levels here and there. Arguments as `synthesize`; large images come
    in smaller batches.

    Raises:
        UserError: an image has non-finite values.
    """
    batch_size = min(batch_size, largest_batch(G.config))
    for first in range(0, len(samples), batch_size):        # Latents of a million seeds would fill the memory.
        part = slice(first, first + batch_size)
        z = torch.stack([seed_latent(seed, G.z_dim) for seed in samples.seeds[part]])
        labels = torch.tensor(samples.labels[part], dtype=torch.int64)
        for images in generate(G, z, labels, batch_size, truncation_psi, centroids, precision, edit):
            yield from to_uint8_sample(images).permute(0, 2, 3, 1).cpu().numpy()


def given_images(G: Generator, ws: torch.Tensor, batch_size: int = 1, precision: str = "auto",
                 edit: Offset = UNMOVED) -> Iterator[np.ndarray]:
    """The same of latents [N, num_ws, w_dim] that are given, without truncation."""
    for part in ws.split(min(batch_size, largest_batch(G.config))):
        images = synthesize_ws(G, edit.moved(part), precision, styles=edit.styles)
        require_finite(torch.isfinite(images).all())
        yield from to_uint8_sample(images).permute(0, 2, 3, 1).cpu().numpy()
