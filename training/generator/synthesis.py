# SPDX-License-Identifier: Apache-2.0
"""Images of a generator that is not trained at the moment: a batch of latents and classes, without gradients."""
import dataclasses
from collections.abc import Sequence

import torch

from dnnlib import UserError
from torch_utils.misc import evaluating, full_precision, one_hot, to_device
from training.networks_stylegan3 import PRECISIONS, Generator

#----------------------------------------------------------------------------
# Edits.

@dataclasses.dataclass(frozen=True)
class Offset:
    """What moves a picture: it is added after truncation to its latents, to its styles, or to both."""

    ws: torch.Tensor | None = None          # [num_ws, w_dim]; None: nothing.
    styles: torch.Tensor | None = None      # [sum of the network's `style_sizes`]; None: nothing.

    @property
    def is_zero(self) -> bool:
        """Whether it moves nothing."""
        return not any(part is not None and bool(part.any()) for part in (self.ws, self.styles))

    def moved(self, ws: torch.Tensor) -> torch.Tensor:
        """Latents [..., num_ws, w_dim] with what is added to them."""
        return ws if self.ws is None else ws + to_device(self.ws, ws.device)


UNMOVED = Offset()


def combined(parts: Sequence[tuple[float, Offset]]) -> Offset:
    """The weighted sum of some offsets."""
    return Offset(_weighted_sum([(weight, part.ws) for weight, part in parts]),
                  _weighted_sum([(weight, part.styles) for weight, part in parts]))


def _weighted_sum(parts: Sequence[tuple[float, torch.Tensor | None]]) -> torch.Tensor | None:
    """None if no part is there."""
    total: torch.Tensor | None = None
    for weight, part in parts:
        if part is not None:
            total = weight * part if total is None else total + weight * part
    return total

#----------------------------------------------------------------------------

@torch.no_grad()
def synthesize(G: Generator, z: torch.Tensor, labels: torch.Tensor, truncation_psi: float = 1.0,
               centroids: torch.Tensor | None = None, precision: str = "auto",
               edit: Offset = UNMOVED) -> torch.Tensor:
    """Images [N, 3, R, R], about [-1, 1], of one batch of latents [N, z_dim] and classes [N].

    Args:
        centroids: [K, w_dim]; truncation pulls every w towards the nearest of them instead of the class's mean
            (multi-modal truncation, Mokady et al. 2022).
        precision: A key of `PRECISIONS`.
        edit: Added after truncation.
    """
    device = next(G.parameters()).device
    with evaluating(G), full_precision():
        z, c = to_device(z, device), one_hot(to_device(labels, device), G.c_dim)
        if centroids is None or truncation_psi == 1:
            ws = G.mapping(z, c, truncation_psi=truncation_psi)
        else:
            ws = G.mapping(z, c)
            ws = nearest_centroids(ws[:, 0], centroids).unsqueeze(1).lerp(ws, truncation_psi)
        return synthesize_ws(G, edit.moved(ws), precision, styles=edit.styles)


@torch.no_grad()
def synthesize_ws(G: Generator, ws: torch.Tensor, precision: str = "auto",
                  transform: torch.Tensor | None = None, styles: torch.Tensor | None = None) -> torch.Tensor:
    """Images [N, 3, R, R], about [-1, 1], of one batch of ws [N, num_ws, w_dim].

    Args:
        precision: A key of `PRECISIONS`.
        transform: [N, 3, 3], where each image lies (`inference.frames.make_transform`); None: as the input says.
        styles: [sum of the network's `style_sizes`] or [N, as many], added to the styles of the images.
    """
    device = next(G.parameters()).device
    places = None if transform is None else to_device(transform, device)
    offset = None if styles is None else to_device(torch.atleast_2d(styles), device)
    with evaluating(G), full_precision():
        images: torch.Tensor = G.synthesis(to_device(ws, device), transform=places, style_offset=offset,
                                           **PRECISIONS[precision])
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
