# SPDX-License-Identifier: Apache-2.0
"""Ways to find directions of a network. One unit of each is one standard deviation of some w along it.

| method | what it takes | published |
|---|---|---|
| `sefa` | the weights that turn w into styles | Shen and Zhou 2021 |
| `pca` | many w | GANSpace, Harkonen et al. 2020 |
| `class_changes` | the running means of w of classes | |
| `change` | latents of pictures without something, and of pictures with it | |
"""
import collections
from collections.abc import Sequence

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import normalized_name
from inference.directions.axes import components, deviations, factorised
from inference.directions.files import Directions
from inference.sampling import class_means
from training.networks_stylegan3 import Generator


def _directions(G: Generator, names: Sequence[str], axes: np.ndarray, units: np.ndarray, notes: Sequence[str],
                layers: Sequence[int]) -> Directions:
    """Directions that move some layers along axes [N, w_dim], with their units [N]."""
    moved = torch.zeros(len(names), G.num_ws, dtype=torch.bool)
    moved[:, list(layers)] = True
    vectors = torch.from_numpy((axes * units[:, None]).astype(np.float32))
    return Directions(list(names), vectors, moved, list(notes))


def style_weights(G: Generator, layers: Sequence[int]) -> np.ndarray:
    """The weights by which w becomes the styles of some layers, one below the other: [rows, w_dim].

    Layer 0 is the input, whose four rows turn and shift the picture.
    """
    affines = G.synthesis.affines
    return np.concatenate([affines[i].weight.detach().cpu().double().numpy() for i in layers])


def sefa(G: Generator, w: np.ndarray, num: int, layers: Sequence[int], name: str = "sefa") -> Directions:
    """Closed-form factorisation: the directions along which the styles of some layers change most.

    Args:
        G: The generator.
        w: Samples [N, w_dim], which give the units.
        num: How many directions.
        layers: Whose styles count, and which the directions move.
        name: What the names begin with.
    """
    found = factorised(style_weights(G, layers), num)
    return _directions(G, [f"{name}{i}" for i in range(num)], found.vectors, deviations(found.vectors, w),
                       [f"{share:.1%} of the squared weights" for share in found.shares], layers)


def pca(G: Generator, w: np.ndarray, num: int, layers: Sequence[int], name: str = "pca") -> Directions:
    """Principal components of samples of w [N, w_dim], that with the largest variance first; arguments as `sefa`."""
    found = components(w, num)
    return _directions(G, [f"{name}{i}" for i in range(num)], found.vectors, deviations(found.vectors, w),
                       [f"{share:.1%} of the variance" for share in found.shares], layers)


def class_changes(G: Generator, w: np.ndarray, first: Sequence[int] | None, second: Sequence[int],
                  names: Sequence[str], layers: Sequence[int]) -> Directions:
    """From the mean of each of some classes to that of each of some others. A class does not become itself.

    Args:
        G: The generator.
        w: Samples [N, w_dim], which give the units.
        first: Classes where the ways begin; None: there is one beginning, the mean of all classes' means.
        second: Classes where they end.
        names: Of all classes.
        layers: That the directions move.

    Raises:
        UserError: the means of two classes are the same.
    """
    means = class_means(G, torch.arange(G.c_dim)).double().numpy()
    if first is None:
        return joined([change(G, w, means, means[k, None], f"all-to-{names[k]}", layers) for k in second])
    return joined([change(G, w, means[i, None], means[k, None], f"{names[i]}-to-{names[k]}", layers)
                   for i in first for k in second if i != k])


def change(G: Generator, w: np.ndarray, before: np.ndarray, after: np.ndarray, name: str,
           layers: Sequence[int]) -> Directions:
    """From the mean of some w [N, w_dim] to the mean of others [M, w_dim].

    Raises:
        UserError: both means are the same.
    """
    way = after.mean(axis=0, dtype=np.float64) - before.mean(axis=0, dtype=np.float64)
    length = np.linalg.norm(way)
    if not length > 0:
        raise UserError(f"{name}: the means of w are the same, so there is no direction from one to the other: name "
                        "others, or a network that is trained further")
    axes = way[None] / length
    units = deviations(axes, w)
    return _directions(G, [name], axes, units, [f"one mean becomes the other at {length / units[0]:.2f}"], layers)


def _has(part: Directions, name: str) -> bool:
    return normalized_name(name) in map(normalized_name, part.names)


def joined(parts: Sequence[Directions]) -> Directions:
    """All directions of some. Raises UserError: two have the same name."""
    names = [name for part in parts for name in part.names]
    counts = collections.Counter(map(normalized_name, names))
    if (twice := next((name for name in names if counts[normalized_name(name)] > 1), None)) is not None:
        files = " and ".join(part.where for part in parts if part.where and _has(part, twice))
        raise UserError(f"{files}: both have a direction called {twice}: give one of these files only" if files else
                        f"two directions would be called {twice}: name fewer classes, or others")
    return Directions(names, torch.cat([part.vectors for part in parts]), torch.cat([part.layers for part in parts]),
                      [note for part in parts for note in part.notes])
