# SPDX-License-Identifier: Apache-2.0
"""Arguments of the resampling operations: parsed, checked, and the sizes that follow from them."""
import math
from collections.abc import Sequence
from typing import Any

import torch

#----------------------------------------------------------------------------

def parse_rate(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """(x, y) from an integer or a pair of them, each at least 1; `name` is for the message."""
    pair = _integers(value)
    if pair is not None and len(pair) == 1:
        pair *= 2
    if pair is None or len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"{name}={value!r}: expected an integer of at least 1, or a pair (x, y) of them")
    return pair[0], pair[1]


def parse_padding(value: int | Sequence[int]) -> tuple[int, int, int, int]:
    """(x0, x1, y0, y1) from an integer, (x, y) or (x0, x1, y0, y1); negative numbers crop."""
    numbers = _integers(value)
    if numbers is not None and len(numbers) == 1:
        numbers *= 4
    elif numbers is not None and len(numbers) == 2:
        numbers = [numbers[0], numbers[0], numbers[1], numbers[1]]
    if numbers is None or len(numbers) != 4:
        raise ValueError(f"padding={value!r}: expected an integer, (x, y) or (x0, x1, y0, y1)")
    return numbers[0], numbers[1], numbers[2], numbers[3]


def _integers(value: Any) -> list[int] | None:
    """The integers in a number or a sequence; None if there is anything else."""
    if type(value) is int:          # Nearly always. Every call of an operation comes here several times.
        return [value]
    if type(value) in (list, tuple) and {*map(type, value)} == {int}:
        return list(value)
    try:
        items = list(value) if hasattr(value, "__len__") else [value]
        numbers = [int(item) for item in items]
    except (TypeError, ValueError):
        return None
    return numbers if all(number == item for number, item in zip(numbers, items, strict=True)) else None


def filter_size(f: torch.Tensor | None) -> tuple[int, int]:
    """(width, height) in taps.

    Raises:
        ValueError: not a filter: neither None nor a tensor of one or two dimensions with at least one tap.
    """
    if f is None:
        return 1, 1
    if not isinstance(f, torch.Tensor) or f.ndim not in (1, 2) or f.numel() == 0 or not f.is_floating_point():
        raise ValueError(f"filter {describe_tensor(f)}: expected None or floating-point taps of shape [n] or [h, w]")
    if f.requires_grad:
        raise ValueError("the filter requires a gradient: filters are constants here, detach it")
    return f.shape[-1], f.shape[0]


def describe_tensor(value: Any) -> str:
    """Shape and type, for error messages."""
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else repr(value)


def output_size(size: int, taps: int, up: int, down: int, pad0: int, pad1: int) -> int:
    """Number of samples that one axis of `size` samples becomes; not positive if nothing is left."""
    return (size * up + pad0 + pad1 - taps) // down + 1


def split_gain(gain: float) -> tuple[float, float]:
    """Two factors of equal magnitude whose product is `gain`, one for each axis of a separable filter."""
    root = math.sqrt(abs(gain))
    return math.copysign(root, gain), root


def check_images(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
) -> tuple[int, int]:
    """Check `x` and `f` and return the (width, height) of the result."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x {describe_tensor(x)}: expected floating-point images [N, C, H, W]")
    taps = filter_size(f)
    width = output_size(x.shape[3], taps[0], up[0], down[0], padding[0], padding[1])
    height = output_size(x.shape[2], taps[1], up[1], down[1], padding[2], padding[3])
    if min(width, height) < 1:
        raise ValueError(f"padding={list(padding)}: images of {x.shape[2]}x{x.shape[3]} upsampled by {list(up)} (x, y) "
                         f"become smaller than the filter of {taps[1]}x{taps[0]}")
    return width, height
