"""Where the recorded numbers of the official implementation are, how weights are filled, and how closeness is measured.

The folder is `../shared/parity` beside the project, or $STYLESAN_PARITY. Its README gives the tolerances.
"""
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

PARITY = Path(os.environ.get("STYLESAN_PARITY") or Path(__file__).resolve().parents[2] / "shared" / "parity")

needs_parity = pytest.mark.skipif(not PARITY.is_dir(), reason="the parity data are not beside the project")


def load_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / name) as file:
        return {key: file[key] for key in file.files}


def load_json(name: str):
    return json.loads((PARITY / name).read_text())


def rel_error(a, b) -> float:
    """max|a-b| / max|b|."""
    a, b = (np.asarray(torch.as_tensor(x).detach().cpu(), dtype=np.float64) for x in (a, b))
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    return float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)) if a.size else 0.0


def l2_error(a, b) -> float:
    """|a-b| / |b|."""
    a, b = (np.asarray(torch.as_tensor(x).detach().cpu(), dtype=np.float64) for x in (a, b))
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-30))


def filled(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recorded runs' weights: a value by rule from the tensor's name (parity/README.md)."""
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
