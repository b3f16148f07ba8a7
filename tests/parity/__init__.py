"""Recorded numbers of the official implementation, and how the weights of its recordings are filled.

`data/README.md` says where the numbers come from and which tolerances belong to them.
"""
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.closeness import l2_error, rel_error

DATA = Path(__file__).resolve().parent / "data"

DTYPES = [torch.float64, torch.float32]     # Double precision is the judge, single precision a second check.
DOUBLE = 1e-9                               # Tolerance for everything that was recorded in double precision.
VALUE, GRADIENT = 1e-4, 5e-2                # In single precision; gradients L2-relative, their norms relative.


def load_npz(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as file:
        return {key: file[key] for key in file.files}


def load_json(name: str):
    return json.loads((DATA / name).read_text())


class Recording:
    """A recorded case, for networks of one type.

    Inputs are those of the single-precision file in either precision: networks cast them. In double precision what the
    double-precision file holds is compared with that, to `DOUBLE`, and what it lacks with the single-precision file.
    """

    def __init__(self, name: str, dtype: torch.dtype):
        self.dtype = dtype
        self._single = load_npz(f"{name}.npz")
        self._double = load_npz(f"{name}_float64.npz") if dtype == torch.float64 else {}

    @property
    def is_double(self) -> bool:
        return self.dtype == torch.float64

    def input(self, key: str) -> torch.Tensor:
        """A tensor of the single-precision file, as it was recorded."""
        return torch.as_tensor(self._single[key])

    def inputs(self, prefix: str) -> dict[str, torch.Tensor]:
        """All tensors under a prefix, which is taken off their names."""
        return {key.removeprefix(prefix): self.input(key) for key in self._single if key.startswith(prefix)}

    def __contains__(self, key: str) -> bool:
        return key in self._single or key in self._double

    def __getitem__(self, key: str) -> np.ndarray:
        """What our numbers are compared with."""
        return self._double[key] if key in self._double else self._single[key]

    def keys(self, prefix: str) -> list[str]:
        """All keys that begin with `prefix`."""
        return sorted(key for key in self._single | self._double if key.startswith(prefix))

    def error(self, key: str, actual: Any) -> float:
        """How far off `actual` is, to be compared with `bound(key)`: L2 for gradients in single precision.

        Those are plain numbers and not measured against their bound as errors of rounding are: a leaky ReLU whose input
        is within rounding of zero takes the other slope on some processors, and it is that which makes the error.
        """
        if self.bound(key) == GRADIENT:
            return float(l2_error(actual, self[key]))
        return rel_error(actual, self[key])

    def bound(self, key: str) -> float:
        if key in self._double:
            return DOUBLE
        return GRADIENT if re.search("(^|/)grad[_/]", key) else VALUE


def filled(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The recorded runs' weights: a value by rule from the tensor's name (data/README.md).

    The normal numbers are float32, but what is worked out of them may be float64: networks in double precision were
    filled with it as it is.
    """
    seed = zlib.crc32(key.encode())
    n = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32)
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if key.endswith("running_var"):
        return 1 + 0.1 * np.abs(n)
    if key.endswith("running_mean"):
        return 0.1 * n
    if key.endswith(("weight_u", "weight_v")):
        return n / recorded_norm(n)
    if key.endswith(".scale"):
        return 1 + 0.1 * n
    if len(shape) <= 1:
        return 1 + 0.1 * n if key.endswith("weight") else 0.1 * n
    return n / np.sqrt(np.prod(shape[1:]))


def recorded_norm(n: np.ndarray) -> np.float32:
    """The norm of a float32 vector, summed as on the machine that recorded: 8 accumulators of 4 lanes each, to which
    squares are added without a rounding between.

    `numpy.linalg.norm` takes another order on other processors and may differ in the last bit. That is a factor of the
    stored singular vectors. Before the first power iteration it goes into the logits, where in eval mode it amounts to
    5e-7; a power iteration takes it out.
    """
    if len(n) % 32:
        raise ValueError(f"vector of {len(n)} elements: no recording has one whose length is no multiple of 32")
    sums = np.zeros((8, 4), dtype=np.float32)
    for part in n.reshape(-1, 8, 4).astype(np.float64):
        sums = (part * part + sums).astype(np.float32)
    while len(sums) > 1:
        sums = sums[0::2] + sums[1::2]
    a, b, c, d = sums[0]
    return np.sqrt((a + b) + (c + d))


@torch.no_grad()
def fill_by_rule(module: torch.nn.Module, prefix: str = "") -> None:
    """Fill every entry of the state dict by rule from `prefix` + its name."""
    for name, tensor in module.state_dict().items():
        tensor.copy_(torch.as_tensor(np.asarray(filled(prefix + name, tuple(tensor.shape)))))
