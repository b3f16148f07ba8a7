# SPDX-License-Identifier: Apache-2.0
"""Improved precision and recall of generative models."""
import dataclasses

import torch

from dnnlib import UserError
from torch_utils import misc

K_NEIGHBOURS = 3
ROW_BLOCK = 4096        # Fixed, so that a result never depends on a batch size.
COLUMN_BLOCK = 8192

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
    return torch.addmm(norms_a[:, None] + norms_b[None, :], a, b.T, alpha=-2).clamp_(min=0)


def manifold_radii(features: torch.Tensor, k: int, device: torch.device | str) -> torch.Tensor:
    """Squared distance of every row to its k-th nearest other row: [N, D] -> [N].

    The row itself is the nearest of all, so this is the (k+1)-th smallest distance to the whole set.
    """
    radii = []
    for rows in features.split(ROW_BLOCK):
        rows = rows.to(device, torch.float32)
        nearest = torch.empty([len(rows), 0], device=rows.device)
        for columns in features.split(COLUMN_BLOCK):
            distances = squared_distances(rows, columns.to(device, torch.float32))
            nearest = torch.cat([nearest, distances], dim=1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), dim=1, largest=False, sorted=True).values
        radii.append(nearest[:, k].cpu())
    return torch.cat(radii)


def covered(probes: torch.Tensor, centres: torch.Tensor, radii: torch.Tensor,
            device: torch.device | str) -> torch.Tensor:
    """Whether each row of `probes` [M, D] is within the radius [N] of some row of `centres` [N, D] -> bool [M].

    Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", eq. 1.
    """
    hits = []
    for rows in probes.split(ROW_BLOCK):
        rows = rows.to(device, torch.float32)
        hit = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, column_radii in zip(centres.split(COLUMN_BLOCK), radii.split(COLUMN_BLOCK), strict=True):
            distances = squared_distances(rows, columns.to(device, torch.float32))
            hit |= (distances <= column_radii.to(device)).any(dim=1)
        hits.append(hit.cpu())
    return torch.cat(hits)


def precision_recall(real: torch.Tensor, gen: torch.Tensor, k: int = K_NEIGHBOURS,
                     device: torch.device | str = "cpu") -> PrecisionRecall:
    """Eq. 2 of the paper above: precision is the covered share of `gen`, recall the covered share of `real`.

    Features are rounded to fp16 first and distances taken in float32, as in the StyleGAN line of code.

    Args:
        real: Features [N, D].
        gen: Features [M, D].
        k: Neighbours that set the radius of an image.
        device: Where to multiply.

    Raises:
        UserError: k or fewer images on a side, or features beyond the range of fp16.
    """
    if min(len(real), len(gen)) <= k:
        raise UserError(f"pr: {len(real)} real and {len(gen)} generated images: it needs more than {k} of each")
    real, gen = real.to(torch.float16), gen.to(torch.float16)
    if not (real.isfinite().all() and gen.isfinite().all()):
        raise UserError("pr: the detector's features exceed 65504, the range of fp16: use another detector")
    with misc.full_precision():
        precision = covered(gen, real, manifold_radii(real, k, device), device)
        recall = covered(real, gen, manifold_radii(gen, k, device), device)
    return PrecisionRecall(int(precision.sum()) / len(gen), int(recall.sum()) / len(real), k)
