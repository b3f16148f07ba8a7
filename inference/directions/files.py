# SPDX-License-Identifier: Apache-2.0
"""Directions in files: an .npz of named arrays, with what is needed to make the file again."""
import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import atomic_file, list_some, normalized_name
from inference.latents import mapping_sha256, parameters_sha256
from torch_utils.arrays import DAMAGED, open_npz
from training.generator.synthesis import Offset
from training.networks_stylegan3 import Generator

FORMAT = "stylesan-xl directions 1"
STYLE_FORMAT = "stylesan-xl style directions 1"
# What is read again.
ARRAYS = ("format", "names", "vectors", "layers", "notes", "mapping_sha256")
STYLE_ARRAYS = (*ARRAYS, "style_sizes", "affine_sha256")
LONGEST = 1e6               # Of a unit of a direction: w is some tens long.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class StyleSpace:
    """The styles of a network: a value per layer and channel."""

    sizes: list[int]            # Of each layer.
    sha256: list[str]           # Of the weights that make the styles of each layer.


@dataclasses.dataclass(frozen=True)
class Directions:
    """N directions by name, of w or of style space."""

    names: list[str]            # No two are the same.
    vectors: torch.Tensor       # float32 [N, w_dim], or [N, all styles]. Each is one unit long.
    layers: torch.Tensor        # bool [N, num_ws]: the layers whose w or whose styles it moves.
    notes: list[str]            # What else is known of each, in words.
    mapping_sha256: str = ""    # Of the network that they were found for.
    where: str = ""             # The option and the file that they come from, for messages.
    styles: StyleSpace | None = None    # What the vectors belong to; None: to w, and a unit is a standard deviation.

    def __len__(self) -> int:
        return len(self.names)

    def offset(self, name: str) -> Offset:
        """What one unit adds to a picture.

        Raises:
            KeyError: no direction has this name.
        """
        wanted = normalized_name(name)
        for own, vector, layers in zip(self.names, self.vectors, self.layers, strict=True):
            if normalized_name(own) == wanted:
                return Offset(ws=layers[:, None] * vector) if self.styles is None else Offset(styles=vector)
        raise KeyError(name)


def style_space(G: Generator) -> StyleSpace:
    """The styles of a network. A stage has those of its stem in the layers that it keeps."""
    return StyleSpace(G.synthesis.style_sizes, [parameters_sha256(affine) for affine in G.synthesis.affines])

#----------------------------------------------------------------------------

def save_directions(path: str | os.PathLike[str], directions: Directions, G: Generator,
                    settings: dict[str, Any]) -> None:
    """Write directions of a network.

    Args:
        path: The file.
        directions: What is written.
        G: The network.
        settings: What it takes to make them again; text, or dicts of plain values, which become JSON.
    """
    origin = {key: np.array(value if isinstance(value, str) else json.dumps(value)) for key, value in settings.items()}
    styles = directions.styles
    if styles is not None:
        origin |= {"style_sizes": np.array(styles.sizes), "affine_sha256": np.array(styles.sha256)}
    with atomic_file(path) as f:
        np.savez(f, allow_pickle=False, format=np.array(FORMAT if styles is None else STYLE_FORMAT),
                 names=np.array(directions.names),
                 vectors=directions.vectors.numpy(), layers=directions.layers.numpy(),
                 notes=np.array(directions.notes), mapping_sha256=np.array(mapping_sha256(G)), **origin)


def read_directions(path: str, option: str = "--directions") -> Directions:
    """The directions of a file, whatever network they are for.

    Args:
        path: The file.
        option: Which names it, for messages.

    Raises:
        UserError: it is no file of directions, or damaged.
    """
    where = f"{option}={path}"
    try:
        with open_npz(path) as arrays:
            found = {"format": arrays["format"]}
            names = STYLE_ARRAYS if str(found["format"]) == STYLE_FORMAT else ARRAYS
            found |= {name: arrays[name] for name in names}
    except KeyError as err:
        raise UserError(f"{where}: has no array named {err.args[0]}: give a file that directions.py has made") from err
    except DAMAGED as err:
        raise UserError(f"{where}: not readable as .npz ({type(err).__name__}): make it again with "
                        "directions.py") from err
    if str(found["format"]) not in (FORMAT, STYLE_FORMAT):
        raise UserError(f"{where}: its format is {ascii(str(found['format'])[:40])} and not {FORMAT!r}: make it again "
                        "with directions.py")
    if (wrong := _mistake(found)) is not None:
        raise UserError(f"{where}: {wrong}: make it again with directions.py")
    styles = None
    if "style_sizes" in found:
        styles = StyleSpace(found["style_sizes"].tolist(), found["affine_sha256"].tolist())
    return Directions(found["names"].tolist(), torch.from_numpy(found["vectors"].astype(np.float32)),
                      torch.from_numpy(found["layers"].copy()), found["notes"].tolist(),
                      str(found["mapping_sha256"]), where, styles)


def _mistake(found: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the arrays of a file, in words."""
    names, vectors, layers, notes = (found[key] for key in ("names", "vectors", "layers", "notes"))
    if names.ndim != 1 or names.dtype.kind != "U" or len(names) == 0:
        return "names is no list of text"
    if vectors.ndim != 2 or layers.ndim != 2 or notes.shape != names.shape or not len(vectors) == len(layers) == len(
            names):
        return f"has {len(names)} names, vectors {list(vectors.shape)} and layers {list(layers.shape)}"
    if layers.shape[1] == 0:
        return "its directions are for a network without layers"
    if layers.dtype.kind != "b" or notes.dtype.kind != "U" or vectors.dtype.kind != "f":
        return "its arrays are of other types than they must be"
    if not (np.abs(vectors, dtype=np.float64) < LONGEST).all():
        return "holds what are no finite numbers"
    composed = [normalized_name(name) for name in names.tolist()]
    if len(set(composed)) != len(composed) or "" in composed:
        return f"names are empty or come twice ({list_some(sorted(composed))})"
    return _mistake_in_styles(found) if "style_sizes" in found else None


def _mistake_in_styles(found: dict[str, np.ndarray]) -> str | None:
    sizes, digests, num_styles = found["style_sizes"], found["affine_sha256"], found["vectors"].shape[1]
    if sizes.dtype.kind != "i" or digests.dtype.kind != "U" or not sizes.shape == digests.shape == found[
            "layers"].shape[1:]:
        return "what it says of the styles is of other types or shapes than it must be"
    if not ((sizes > 0) & (sizes <= num_styles)).all() or sum(sizes.tolist()) != num_styles:
        return f"its layers do not have the {num_styles} styles of its vectors"
    return None

#----------------------------------------------------------------------------
# Networks that directions are good for.

def fit_directions(directions: Directions, G: Generator) -> tuple[Directions, str | None]:
    """Directions as a network takes them, and a note for people if they were found for another one.

    Directions of a stem are good for the stages that were grown on it, whose first layers are the same: one that moves
    all layers moves all of them there, others move the layers of the same numbers. Directions of style space must find
    the layers that they move with as many channels.

    Raises:
        UserError: they do not fit the network.
    """
    others: list[str] = []
    if directions.styles is None:
        fitted = _fit_w(directions, G)
    else:
        fitted, others = _fit_styles(directions, directions.styles, G)
    reason = f"moves layers that are other ones in this network ({list_some(others)})" if others else None
    if directions.mapping_sha256 != mapping_sha256(G):
        reason = "was made of a network with another mapping"
    if reason is None:
        return fitted, None
    return fitted, f"{directions.where}: {reason}: pictures may change in other ways than its names say"


def _fit_w(directions: Directions, G: Generator) -> Directions:
    """Directions of w. Raises UserError."""
    w_dim, num_ws = directions.vectors.shape[1], directions.layers.shape[1]
    if w_dim != G.w_dim:
        raise UserError(f"{directions.where}: is for networks whose w has {w_dim} values, and this one's has "
                        f"{G.w_dim}: make directions of this network with directions.py")
    layers = directions.layers
    if num_ws != G.num_ws:
        layers = torch.zeros(len(directions), G.num_ws, dtype=torch.bool)
        common = min(num_ws, G.num_ws)
        layers[:, :common] = directions.layers[:, :common]
        layers[directions.layers.all(dim=1)] = True
    return dataclasses.replace(directions, layers=layers)


def _fit_styles(directions: Directions, styles: StyleSpace, G: Generator) -> tuple[Directions, list[str]]:
    """Directions of style space, and the layers that they move here as others did where they were found.

    Raises:
        UserError: a layer that they move is not there, or has another number of channels.
    """
    own, moved = style_space(G), directions.layers.any(dim=0).nonzero().flatten().tolist()
    remedy = "make directions of this network with directions.py"
    if moved and moved[-1] >= G.num_ws:
        raise UserError(f"{directions.where}: moves the layer {moved[-1]}, and this network has 0 to {G.num_ws - 1}: "
                        f"{remedy}")
    for layer in moved:
        if styles.sizes[layer] != own.sizes[layer]:
            raise UserError(f"{directions.where}: moves the layer {layer}, where it has {styles.sizes[layer]} styles, "
                            f"and this network's has {own.sizes[layer]}: {remedy}")
    given = dict(enumerate(directions.vectors.split(styles.sizes, dim=1)))
    parts = [given[k] if k in moved else torch.zeros(len(directions), size) for k, size in enumerate(own.sizes)]
    layers = torch.zeros(len(directions), G.num_ws, dtype=torch.bool)
    layers[:, moved] = directions.layers[:, moved]
    others = [str(k) for k in moved if styles.sha256[k] != own.sha256[k]]
    return dataclasses.replace(directions, vectors=torch.cat(parts, dim=1), layers=layers, styles=own), others


def load_directions(paths: Sequence[str], G: Generator) -> tuple[list[Directions], list[str]]:
    """The directions of some files as a network takes them, and notes for people. Raises UserError."""
    fitted = [fit_directions(read_directions(path), G) for path in paths]
    return [directions for directions, _ in fitted], [note for _, note in fitted if note is not None]
