"""Recorded numbers of the official implementation, and how the weights of its recordings are filled.

`data/README.md` says where the numbers come from and which tolerances belong to them.
"""
import json
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).resolve().parent / "data"


def load_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as file:
        return {key: file[key] for key in file.files}


def load_json(name: str):
    return json.loads((DATA / name).read_text())


def filled(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recorded runs' weights: a value by rule from the tensor's name (data/README.md)."""
    seed = zlib.crc32(key.encode())
    n = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(n)
    if key.endswith("running_mean"):
        return 0.1 * n
    if key.endswith(("weight_u", "weight_v")):
        return n / np.linalg.norm(n)
    if key.endswith(".scale"):
        return 1 + 0.1 * n
    if len(shape) <= 1:
        return 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
    return n / np.sqrt(np.prod(shape[1:]))


@torch.no_grad()
def fill_by_rule(module: torch.nn.Module, prefix: str = "") -> None:
    """Fill every entry of the state dict by rule from `prefix` + its name."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(torch.as_tensor(np.asarray(filled(prefix + name, tuple(tensor.shape)))))
