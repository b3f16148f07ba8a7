# SPDX-License-Identifier: Apache-2.0
"""Latents and centres of w in files."""
import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from dnnlib import UserError, cli
from torch_utils import checkpoint
from torch_utils.arrays import DAMAGED, open_npz, read_npy
from training.networks_stylegan3 import Generator

#----------------------------------------------------------------------------

def load_centroids(path: str, w_dim: int) -> torch.Tensor:
    """Centres of w for multi-modal truncation, [K, w_dim]: .npy, or .pt with a tensor.

    Raises:
        UserError: unreadable, or of another width.
    """
    try:
        if path.endswith(".npy"):
            centroids = torch.from_numpy(read_npy(path))
        else:
            centroids = checkpoint.load_plain(path)
    except OSError:         # No such file, and the like: the command says which.
        raise
    except Exception as err:
        raise UserError(f"--centroids-path={path}: not readable as .npy or .pt ({type(err).__name__}): make it by "
                        "python -m inference.centroids") from err
    if not isinstance(centroids, torch.Tensor) or centroids.ndim != 2 or centroids.shape[1] != w_dim:
        shape = list(centroids.shape) if isinstance(centroids, torch.Tensor) else type(centroids).__name__
        raise UserError(f"--centroids-path={path}: expected a tensor [number of centroids, {w_dim}], found {shape}")
    if len(centroids) == 0:
        raise UserError(f"--centroids-path={path}: holds no centroids: compute them again, or leave the option out")
    if centroids.is_complex() or not centroids.float().isfinite().all():
        raise UserError(f"--centroids-path={path}: holds what are no finite numbers: compute the centroids again")
    return centroids.float()


def load_latents(path: str, num_ws: int, w_dim: int, option: str = "--w") -> torch.Tensor:
    """Latents float32 [N, num_ws, w_dim] of a file: the array "w" of an .npz, or an .npy.

    Args:
        path: An array [N, 1 or num_ws, w_dim], as the official run_inversion.py writes it.
        num_ws: Of the network; one w for all layers is repeated for each.
        w_dim: Of the network.
        option: Which names the file, for messages.

    Raises:
        UserError: unreadable, of another shape, or not finite.
    """
    try:
        w = _read_array(path)
    except (OSError, UserError):
        raise
    except KeyError as err:
        raise UserError(f"{option}={path}: has no array named w: give latents as run_inversion.py writes them") from err
    except DAMAGED as err:
        raise UserError(f"{option}={path}: not readable as .npz or .npy ({type(err).__name__}): make it again") from err
    if w.ndim != 3 or len(w) == 0 or w.shape[1] not in (1, num_ws) or w.shape[2] != w_dim:
        raise UserError(f"{option}={path}: expected latents [number, 1 or {num_ws}, {w_dim}], found {list(w.shape)}: "
                        "give latents of this network")
    if w.dtype.kind not in "fiu" or not (np.abs(w, dtype=np.float64) < cli.MAX_FLOAT).all():
        raise UserError(f"{option}={path}: holds what are no finite numbers: make the latents again")
    return torch.from_numpy(w.astype(np.float32)).expand(-1, num_ws, -1)


def _read_array(path: str) -> np.ndarray:
    """The latents as they are in the file. Raises KeyError for an .npz without them, and what its readers raise."""
    if path.endswith(".npy"):
        return read_npy(path)
    with open_npz(path) as arrays:
        return arrays["w"]

#----------------------------------------------------------------------------
# Which network they belong to.

def mapping_sha256(G: Generator) -> str:
    """SHA-256 of the weights that make w. A stem and the stages grown on it have the same, and so have copies."""
    return parameters_sha256(G.mapping)


def parameters_sha256(module: torch.nn.Module) -> str:
    """SHA-256 of what a module has learned, wherever it lies. Buffers, such as averages, do not count."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.named_parameters()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def origin_notes(paths: Sequence[str], G: Generator, option: str = "--w") -> list[str]:
    """Notes for people on files that `load_latents` has read and whose latents are of a network with another mapping.

    Files that say nothing of their network, as official ones, get none.
    """
    notes = []
    for path in (path for path in paths if not path.endswith(".npy")):
        with open_npz(path) as arrays:
            made_of = str(arrays["mapping_sha256"]) if "mapping_sha256" in arrays.files else None
        if made_of is not None and made_of != mapping_sha256(G):
            notes.append(f"{option}={path}: its latents are of a network with another mapping, so that they may give "
                         "other pictures here")
    return notes
