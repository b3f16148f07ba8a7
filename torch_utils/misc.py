# SPDX-License-Identifier: Apache-2.0
"""Devices, shape checks, seeds, module summaries and scoped changes of global settings."""
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib import UserError

#----------------------------------------------------------------------------

def select_device(name: str) -> str:
    """Device type for the value of `--device`: 'auto' takes CUDA if there is any, else the CPU.

    Raises:
        UserError: the device that was asked for is not there.
    """
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not available[name]():
        raise UserError(f"--device={name}: this machine has no usable {name} device: use --device=cpu or --device=auto")
    return name


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`x` on the device, without waiting for it.

    A copy to a GPU from ordinary memory waits until the GPU has done everything that it was given before, so it goes
    through pinned memory.
    """
    if device.type == "cuda" and x.device.type == "cpu" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def assert_shape(tensor: torch.Tensor, shape: Sequence[int | None]) -> None:
    """Check a tensor's shape; None stands for any size."""
    ok = tensor.ndim == len(shape) and all(want in (None, got) for got, want in zip(tensor.shape, shape, strict=True))
    if not ok:
        raise ValueError(f"expected a tensor of shape {list(shape)}, got {list(tensor.shape)}")


def one_hot(labels: torch.Tensor, c_dim: int) -> torch.Tensor:
    """Classes [N] -> float32 [N, c_dim]; [N, 0] when unconditional (c_dim 0), whatever the labels say."""
    if c_dim == 0:
        return torch.zeros([len(labels), 0], device=labels.device)
    return torch.nn.functional.one_hot(labels.to(torch.int64), c_dim).to(torch.float32)


def random_state(seed: int) -> np.random.RandomState:
    """NumPy's legacy generator, which the official scripts use, for all seeds of 64 bits; it takes 32 by itself."""
    return np.random.RandomState(seed if seed < 1 << 32 else [seed % (1 << 32), seed >> 32])


def count_parameters(module: torch.nn.Module, trainable_only: bool = False) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trainable_only)

#----------------------------------------------------------------------------
# Scoped changes. Every one restores what it found, also after an exception.

@contextlib.contextmanager
def evaluating(*modules: torch.nn.Module) -> Iterator[None]:
    """Put modules into eval mode for the block."""
    modes = [(m, m.training) for top in modules for m in top.modules()]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def requires_grad(module: torch.nn.Module, parameters: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Let gradients reach just `parameters` of `module` for the block, and none after it."""
    wanted = {id(p) for p in parameters}
    try:
        for p in module.parameters():
            p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for p in module.parameters():
            p.requires_grad_(False)


@contextlib.contextmanager
def autotuning(wanted: bool) -> Iterator[None]:
    """Whether GPUs choose convolution algorithms by timing them, once per shape, for the block (cudnn.benchmark).

    For shapes that come seldom it takes longer to choose than to compute.
    """
    old = torch.backends.cudnn.benchmark
    try:
        torch.backends.cudnn.benchmark = wanted
        yield
    finally:
        torch.backends.cudnn.benchmark = old


@contextlib.contextmanager
def _single_precision_on_gpus(value: str) -> Iterator[None]:
    """How matrix products and convolutions of float32 are computed there, for the block, in all threads."""
    cudnn: Any = torch.backends.cudnn       # Its settings per operation are made at run time.
    old = torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = value
        cudnn.conv.fp32_precision = value
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision = old


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in matrix products and convolutions for the block (the default for convolutions is TF32)."""
    with _single_precision_on_gpus("ieee"):
        yield


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Matrix products and convolutions of float32 may round their arguments to TF32 (10 bits) for the block."""
    with _single_precision_on_gpus("tf32"):
        yield
