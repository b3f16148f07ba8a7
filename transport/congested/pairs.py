# SPDX-License-Identifier: Apache-2.0
"""Pairs of laws to draw independent samples from: x from the first, y from the second."""
import math
from collections.abc import Callable

import torch

# (count, generator on the CPU) -> x [count, dims], y [count, dims], independent of each other.
Draw = Callable[[int, torch.Generator], tuple[torch.Tensor, torch.Tensor]]


def gaussians(mean_x: list[float], std_x: float, mean_y: list[float], std_y: float) -> Draw:
    """N(mean_x, std_x^2 I) and N(mean_y, std_y^2 I)."""
    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(count, len(mean_x), generator=generator)
        y = torch.randn(count, len(mean_y), generator=generator)
        return torch.tensor(mean_x) + std_x * x, torch.tensor(mean_y) + std_y * y
    return draw


def blobs(std: float = 0.4, distance: float = 1.5) -> Draw:
    """One Gaussian blob at the origin, and two as wide at (-distance, 0) and (distance, 0)."""
    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = std * torch.randn(count, 2, generator=generator)
        y = std * torch.randn(count, 2, generator=generator)
        side = torch.randint(2, [count], generator=generator) * 2 - 1
        y[:, 0] += distance * side
        return x, y
    return draw


def ring(std: float = 0.4, radius: float = 1.5, thickness: float = 0.15) -> Draw:
    """A Gaussian blob at (-0.5, 0), and a ring around the origin with a Gaussian error of that thickness."""
    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        x = std * torch.randn(count, 2, generator=generator)
        x[:, 0] -= 0.5
        angle = 2 * math.pi * torch.rand(count, generator=generator)
        y = radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return x, y + thickness * torch.randn(count, 2, generator=generator)
    return draw


def resample(x: torch.Tensor, y: torch.Tensor) -> Draw:
    """Two fixed samples [n, dims] as laws: points of each, drawn with replacement and paired at random."""
    def draw(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        first = torch.randint(len(x), [count], generator=generator)
        second = torch.randint(len(y), [count], generator=generator)
        return x[first], y[second]
    return draw
