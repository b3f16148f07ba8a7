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
from inference.latents import mapping_sha256
from torch_utils.arrays import DAMAGED, open_npz
from training.networks_stylegan3 import Generator

FORMAT = "stylesan-xl directions 1"
ARRAYS = ("format", "names", "vectors", "layers", "notes", "mapping_sha256")         # That are read again.
LONGEST = 1e6               # Of a unit of a direction: w is some tens long.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Directions:
    """N directions by name."""

    names: list[str]            # No two are the same.
    vectors: torch.Tensor       # float32 [N, w_dim], each one unit long: a standard deviation of w along it.
    layers: torch.Tensor        # bool [N, num_ws]: the layers whose w it moves.
    notes: list[str]            # What else is known of each, in words.
    mapping_sha256: str = ""    # Of the network that they were found for.
    where: str = ""             # The option and the file that they come from, for messages.

    def __len__(self) -> int:
        return len(self.names)

    def offset(self, name: str) -> torch.Tensor:
        """What one unit adds to ws: float32 [num_ws, w_dim].

        Raises:
            KeyError: no direction has this name.
        """
        wanted = normalized_name(name)
        for own, vector, layers in zip(self.names, self.vectors, self.layers, strict=True):
            if normalized_name(own) == wanted:
                moved: torch.Tensor = layers[:, None] * vector
                return moved
        raise KeyError(name)


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
    with atomic_file(path) as f:
        np.savez(f, allow_pickle=False, format=np.array(FORMAT), names=np.array(directions.names),
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
            found = {name: arrays[name] for name in ARRAYS}
    except KeyError as err:
        raise UserError(f"{where}: has no array named {err.args[0]}: give a file that directions.py has made") from err
    except DAMAGED as err:
        raise UserError(f"{where}: not readable as .npz ({type(err).__name__}): make it again with "
                        "directions.py") from err
    if str(found["format"]) != FORMAT:
        raise UserError(f"{where}: its format is {ascii(str(found['format'])[:40])} and not {FORMAT!r}: make it again "
                        "with directions.py")
    if (wrong := _mistake(found)) is not None:
        raise UserError(f"{where}: {wrong}: make it again with directions.py")
    return Directions(found["names"].tolist(), torch.from_numpy(found["vectors"].astype(np.float32)),
                      torch.from_numpy(found["layers"].copy()), found["notes"].tolist(),
                      str(found["mapping_sha256"]), where)


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
    return None


def fit_directions(directions: Directions, G: Generator) -> tuple[Directions, str | None]:
    """Directions as a network takes them, and a note for people if they were found for another one.

    Directions of a stem are good for the stages that were grown on it, whose first layers are the same: one that moves
    all layers moves all of them there, others move the layers of the same numbers.

    Raises:
        UserError: they do not fit the network.
    """
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
    note = None
    if directions.mapping_sha256 != mapping_sha256(G):
        note = (f"{directions.where}: was made of a network with another mapping: pictures may change in other ways "
                "than its names say")
    return dataclasses.replace(directions, layers=layers), note


def load_directions(paths: Sequence[str], G: Generator) -> tuple[list[Directions], list[str]]:
    """The directions of some files as a network takes them, and notes for people. Raises UserError."""
    fitted = [fit_directions(read_directions(path), G) for path in paths]
    return [directions for directions, _ in fitted], [note for _, note in fitted if note is not None]
