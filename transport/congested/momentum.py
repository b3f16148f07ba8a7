# SPDX-License-Identifier: Apache-2.0
"""The flow that a critic encodes in the plane, and the check that it moves the mass that has to be moved.

At the optimum w = -2 Lam sigma (|grad u| - 1)_+ grad u / |grad u|: the critic's gradient gives, where it is steeper
than 1, direction and amount of the optimal flow, averaged over time (Milne & Nachman 2022, arXiv 2109.00528). It leaves
x's law and enters y's: div w = law(x) - law(y). Through a line {first coordinate = c} flows in sum
P(x_1 <= c) - P(y_1 <= c).
"""
import dataclasses

import numpy as np
import torch

from transport.common import critics
from transport.common.critics import check_lamb
from transport.congested.pairs import Draw

CHUNK = 100_000         # Samples that are drawn at a time.


def momentum(gradient: np.ndarray, sigma: np.ndarray, lamb: float) -> np.ndarray:
    """w [..., d] from grad u [..., d] and the density sigma [...] at the same places."""
    check_lamb(lamb)
    norm = np.linalg.norm(gradient, axis=-1, keepdims=True)
    share = np.clip(norm - 1, 0, None) / np.maximum(norm, 1)        # (|g| - 1)_+ / |g|, without 0 / 0.
    flow: np.ndarray = -2 * lamb * sigma[..., None] * share * gradient
    return flow


@dataclasses.dataclass(frozen=True)
class Field:
    """A critic's flow on the cells of a square grid."""

    centres: np.ndarray     # The cells' centres, along both axes [cells].
    sigma: np.ndarray       # Density of (1-t)x + ty [cells, cells], first coordinate first.
    slope: np.ndarray       # grad u at the centres [cells, cells, 2].
    flow: np.ndarray        # w [cells, cells, 2].
    crossing: np.ndarray    # int w_1 over the second coordinate [cells]: the mass that the critic moves through a line.
    needed: np.ndarray      # F_x - F_y of the first coordinate [cells]: the mass that has to be moved through it.

    @property
    def shortfall(self) -> float:
        """int |crossing - needed| / int |needed|: 0 for the exact flow."""
        return float(np.abs(self.crossing - self.needed).sum() / np.abs(self.needed).sum())


def field(critic: critics.MLP, draw: Draw, lamb: float, generator: torch.Generator, *,
          half_width: float, cells: int = 60, samples: int = 2_000_000, device: str = "cpu") -> Field:
    """The flow of a critic of two numbers on [-half_width, half_width]^2; sigma is a histogram of `samples` draws."""
    check_lamb(lamb)
    edges = np.linspace(-half_width, half_width, cells + 1)
    centres, size = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    sigma, needed, total = np.zeros([cells, cells]), np.zeros(cells), 0
    while total < samples:
        x, y = draw(min(CHUNK, samples - total), generator)
        z = critics.between(x, y, generator).numpy()
        sigma += np.histogram2d(z[:, 0], z[:, 1], bins=[edges, edges])[0]
        first = [np.sort(s[:, 0].numpy()) for s in (x, y)]
        needed += np.searchsorted(first[0], centres) - np.searchsorted(first[1], centres)
        total += len(x)
    sigma /= total * size ** 2
    places = torch.from_numpy(np.stack(np.meshgrid(centres, centres, indexing="ij"), axis=-1)).float().flatten(0, 1)
    slope = critics.gradient(critic, places.to(device)).cpu().numpy().astype(np.float64).reshape(cells, cells, 2)
    flow = momentum(slope, sigma, lamb)
    return Field(centres, sigma, slope, flow, flow[..., 0].sum(axis=1) * size, needed / total)
