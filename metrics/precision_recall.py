# SPDX-License-Identifier: Apache-2.0
"""Improved precision and recall of generative models."""
import dataclasses
from collections.abc import Iterator

import torch

from dnnlib import UserError
from torch_utils import misc

K_NEIGHBOURS = 3
BLOCK = 2048            # Rows per side of a block of distances. Fixed, so that a result never depends on a batch size.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]."""

    precision: float        # Generated images that lie on the manifold of the real ones.
    recall: float           # Real images that lie on the manifold of the generated ones.
    k: int


def squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[N, D], [M, D] float32 -> [N, M] squared Euclidean distances by one matrix product in full float32.

    `torch.cdist` is avoided: it chooses its algorithm by size and device, and with it its rounding.
    """
    norms_a, norms_b = a.square().sum(dim=1), b.square().sum(dim=1)
    return (norms_a[:, None] + norms_b[None, :]).addmm_(a, b.T, alpha=-2).clamp_(min=0)


@dataclasses.dataclass(frozen=True)
class Points:
    """Features [N, D] that are rounded block by block: a rounded copy of all would take half as much memory again."""

    features: torch.Tensor
    device: torch.device | str              # Where to multiply.
    dtype: torch.dtype = torch.float32      # What they are rounded to.

    def __len__(self) -> int:
        return len(self.features)

    def blocks(self, start: int = 0) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which rows, these rows as float32 on the device) from row `start` on."""
        for first in range(start, len(self), BLOCK):
            rows = slice(first, min(first + BLOCK, len(self)))
            yield rows, self.features[rows].to(self.dtype).to(self.device).float()

    def are_finite(self) -> bool:
        """Whether rounding left all within the range of `dtype`."""
        return all(bool(block.isfinite().all()) for _rows, block in self.blocks())


def manifold_radii(points: Points, k: int) -> torch.Tensor:
    """Squared distance of every row to its k-th nearest other row: [N].

    The row itself is the nearest of all, so this is the (k+1)-th smallest distance to the whole set. A block of
    distances between two runs of rows serves both, so each is computed once.
    """
    nearest = torch.full([len(points), k + 1], torch.inf, device=points.device)     # Smallest distances, ascending.

    def take(rows: slice, distances: torch.Tensor) -> None:
        found = torch.cat([nearest[rows], distances], dim=1)
        nearest[rows] = found.topk(k + 1, dim=1, largest=False, sorted=True).values

    for rows, x in points.blocks():
        for columns, y in points.blocks(start=rows.start):
            distances = squared_distances(x, y)
            take(rows, distances)
            if columns != rows:
                take(columns, distances.T)
    return nearest[:, k]


def covered(a: Points, b: Points, radii_a: torch.Tensor, radii_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows of one set lie within the radius of some row of the other, both ways.

    Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", eq. 1.

    Args:
        a: N points.
        b: M points.
        radii_a: [N], squared.
        radii_b: [M], squared.

    Returns:
        (bool [N]: rows of `a` near `b`, bool [M]: rows of `b` near `a`).
    """
    near_b = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    near_a = torch.zeros(len(b), dtype=torch.bool, device=a.device)
    for rows, x in a.blocks():
        for columns, y in b.blocks():
            distances = squared_distances(x, y)
            near_b[rows] |= (distances <= radii_b[columns]).any(dim=1)
            near_a[columns] |= (distances <= radii_a[rows, None]).any(dim=0)
    return near_b, near_a


def precision_recall(real: torch.Tensor, gen: torch.Tensor, k: int = K_NEIGHBOURS,
                     device: torch.device | str = "cpu", dtype: torch.dtype = torch.float16) -> PrecisionRecall:
    """Eq. 2 of the paper above: precision is the covered share of `gen`, recall the covered share of `real`.

    Distances are taken in float32.

    Args:
        real: Features [N, D].
        gen: Features [M, D].
        k: Neighbours that set the radius of an image.
        device: Where to multiply.
        dtype: What features are rounded to first: float16 as in the StyleGAN line of code, float32 for none.

    Raises:
        UserError: k or fewer images on a side, or features beyond the range of `dtype`.
    """
    if min(len(real), len(gen)) <= k:
        raise UserError(f"pr: {len(real)} real and {len(gen)} generated images: it needs more than {k} of each")
    a, b = Points(real, device, dtype), Points(gen, device, dtype)
    if not (a.are_finite() and b.are_finite()):
        raise UserError(f"pr: the detector's features exceed {torch.finfo(dtype).max:g}, the range of {dtype}: use "
                        "another detector")
    with misc.full_precision():
        near_gen, near_real = covered(a, b, manifold_radii(a, k), manifold_radii(b, k))
    return PrecisionRecall(int(near_real.sum()) / len(gen), int(near_gen.sum()) / len(real), k)
