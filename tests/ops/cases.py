# SPDX-License-Identifier: Apache-2.0
"""Inputs that several tests of the operations share."""
import numpy as np
import pytest
import torch

from torch_utils.ops import build

# Where there is a compiler, native operations that do not build or fail their self-check are failures, not skipped.
needs_compiler = pytest.mark.skipif(build.cpu_target().compiler is None, reason="no C++ compiler")
FORMS = pytest.mark.parametrize("impl", ["ref", "matrix", pytest.param("cpu", marks=needs_compiler)])


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filters(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    """One of each kind: separable, general, general in shape but of rank one, none."""
    return {"1d": randn(7, seed=1, dtype=dtype), "2d": randn(4, 5, seed=2, dtype=dtype),
            "rank1": torch.tensor([1.0, 3, 3, 1], dtype=dtype).outer(torch.tensor([2.0, 5, 1], dtype=dtype)) / 64,
            "none": None}


def random_options(rng: np.random.Generator, size: tuple[int, int], taps: tuple[int, int]) -> dict:
    """Options of upfirdn2d that leave something of images of size (h, w) under a filter of (h, w) taps."""
    while True:
        up, down = rng.integers(1, 5, 2).tolist(), rng.integers(1, 5, 2).tolist()
        pad = rng.integers(-6, 12, 4).tolist()
        left = [size[1] * up[0] + pad[0] + pad[1] - taps[1], size[0] * up[1] + pad[2] + pad[3] - taps[0]]
        if min(left) >= 0:
            return {"up": up, "down": down, "padding": pad, "flip_filter": bool(rng.integers(2)),
                    "gain": float(rng.normal())}
