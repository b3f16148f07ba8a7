# SPDX-License-Identifier: Apache-2.0
"""Inputs that several tests of the operations share."""
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from torch_utils.ops import compilation, native, strips

# Where there is a compiler, native operations that do not build or fail their self-check are failures, not skipped.
needs_compiler = pytest.mark.skipif(compilation.cpu_target().compiler is None, reason="no C++ compiler")
FORMS = pytest.mark.parametrize("impl", ["ref", "matrix", pytest.param("cpu", marks=needs_compiler)])


def use_programs_of_gpu(monkeypatch: pytest.MonkeyPatch, fast: bool) -> list[str]:
    """In place of the library for processors, for one test, what a GPU runs: its programs, block by block.

    Args:
        fast: With the programs for the rates of the recipes, else the general ones for all.

    Returns:
        A list that gets the name of every fast program when it is called.
    """
    target = compilation.Target("tiles", compilation.cpu_target().compiler, ("-O1", "-std=c++17", "-fPIC"),
                          (compilation.Source("emulate.cpp"),), ())
    library = compilation.library(target)
    called: list[str] = []

    def without_stream(name: str, function: Callable[..., int]) -> Callable[..., int]:
        return lambda *args: called.append(name) or function(*args, None)

    functions, programs = ({name: without_stream(name, function) for name, function in found.items()} for found in
                           (native.bind(library, with_stream=True), native.bind_strips(library, strips.KINDS)))
    find = (lambda kind, dtype: programs[kind.name]) if fast else None
    monkeypatch.setitem(native.in_use, "cpu", native.Loaded(functions, fast=find))
    monkeypatch.setitem(native._CODES, "cpu", native._CODES["cuda"])
    return called


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def filters(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    """One of each kind: separable, general, general in shape but of rank one, none."""
    return {"1d": randn(7, seed=1, dtype=dtype), "2d": randn(4, 5, seed=2, dtype=dtype),
            "rank1": torch.tensor([1.0, 3, 3, 1], dtype=dtype).outer(torch.tensor([2.0, 5, 1], dtype=dtype)) / 64,
            "none": None}


def bound(dtype: torch.dtype, *fs: torch.Tensor | None) -> float:
    """How far from the same in float64 a result in `dtype` may be, relative to the largest value.

    A filter adds a term, and so a rounding by at most u = eps / 2, for each of its taps: along one axis and then along
    the other, or all of them at once. Gains, slopes, biases and clamps are fewer than eight more. If all n roundings go
    the same way they add up to n u; as they go either way, sqrt(n) u is usual. In float64, where mistakes are looked
    for, there is room between both.
    """
    taps = sum(0 if f is None else 2 * len(f) if f.ndim == 1 else f.numel() for f in fs)
    return 1e-12 if dtype == torch.float64 else (taps + 8) * torch.finfo(dtype).eps / 2


def random_options(rng: np.random.Generator, size: tuple[int, int], taps: tuple[int, int]) -> dict:
    """Options of upfirdn2d that leave something of images of size (h, w) under a filter of (h, w) taps."""
    while True:
        up, down = rng.integers(1, 5, 2).tolist(), rng.integers(1, 5, 2).tolist()
        pad = rng.integers(-6, 12, 4).tolist()
        left = [size[1] * up[0] + pad[0] + pad[1] - taps[1], size[0] * up[1] + pad[2] + pad[3] - taps[0]]
        if min(left) >= 0:
            return {"up": up, "down": down, "padding": pad, "flip_filter": bool(rng.integers(2)),
                    "gain": float(rng.normal())}


def random_layers(count: int) -> Iterator[tuple[torch.Tensor, dict[str, Any]]]:
    """Images and options of `filtered_lrelu` at random: filters, rates, paddings, limits."""
    rng = np.random.default_rng(0)
    for i in range(count):
        n_up, n_down = rng.integers(1, 13, 2).tolist()
        h, w = rng.integers(8, 24, 2).tolist()
        options = {"fu": randn(n_up, seed=i), "fd": randn(n_down, seed=i + 1), "b": randn(4, seed=i + 2),
                   "up": int(rng.integers(1, 5)), "down": int(rng.integers(1, 5)), "gain": float(rng.uniform(0.5, 2)),
                   "padding": (rng.integers(-2, 6, 4) + 6).tolist(), "slope": float(rng.uniform(0, 1)),
                   "clamp": [None, 0.5, 256][i % 3], "flip_filter": bool(rng.integers(2))}
        yield randn(2, 4, h, w, seed=i + 3), options
