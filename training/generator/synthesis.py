# SPDX-License-Identifier: Apache-2.0
"""Images of a generator that is not trained at the moment: a batch of latents and classes, without gradients."""
import torch

from dnnlib import UserError
from torch_utils.misc import evaluating, full_precision, one_hot, to_device
from training.networks_stylegan3 import PRECISIONS, Generator


@torch.no_grad()
def synthesize(G: Generator, z: torch.Tensor, labels: torch.Tensor, truncation_psi: float = 1.0,
               centroids: torch.Tensor | None = None, precision: str = "auto",
               edit: torch.Tensor | None = None) -> torch.Tensor:
    """Images [N, 3, R, R], about [-1, 1], of one batch of latents [N, z_dim] and classes [N].

    Args:
        centroids: [K, w_dim]; truncation pulls every w towards the nearest of them instead of the class's mean
            (multi-modal truncation, Mokady et al. 2022).
        precision: A key of `PRECISIONS`.
        edit: Added to the ws after truncation: [num_ws, w_dim].
    """
    device = next(G.parameters()).device
    with evaluating(G), full_precision():
        z, c = to_device(z, device), one_hot(to_device(labels, device), G.c_dim)
        if centroids is None or truncation_psi == 1:
            ws = G.mapping(z, c, truncation_psi=truncation_psi)
        else:
            ws = G.mapping(z, c)
            ws = nearest_centroids(ws[:, 0], centroids).unsqueeze(1).lerp(ws, truncation_psi)
        if edit is not None:
            ws = ws + to_device(edit, device)
        return synthesize_ws(G, ws, precision)


@torch.no_grad()
def synthesize_ws(G: Generator, ws: torch.Tensor, precision: str = "auto",
                  transform: torch.Tensor | None = None) -> torch.Tensor:
    """Images [N, 3, R, R], about [-1, 1], of one batch of ws [N, num_ws, w_dim].

    Args:
        precision: A key of `PRECISIONS`.
        transform: [N, 3, 3], where each image lies (`inference.frames.make_transform`); None: as the input says.
    """
    device = next(G.parameters()).device
    moved = None if transform is None else to_device(transform, device)
    with evaluating(G), full_precision():
        images: torch.Tensor = G.synthesis(to_device(ws, device), transform=moved, **PRECISIONS[precision])
        return images


def nearest_centroids(w: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """For each w [N, w_dim] the nearest of the centres [K, w_dim]: [N, w_dim]."""
    return centroids[distances(w, centroids).argmin(dim=1)]


def distances(w: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """From each w [N, w_dim] to each of the centres [K, w_dim]: [N, K].

    By differences. Products, which PyTorch takes for many, lose half of the digits, and others with each batch size.
    """
    return torch.cdist(w, centroids, compute_mode="donot_use_mm_for_euclid_dist")


def require_finite(finite: torch.Tensor) -> None:
    """Wait for a flag that was computed from images.

    Raises:
        UserError: it is not set.
    """
    if not finite:
        raise UserError("the network gives images with non-finite values: the snapshot is of a diverged run")
