# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's compiler is told about functions of ours, with types that a checker can follow."""
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])


def untraced(function: F) -> F:
    """Decorator: the compiler calls the function instead of tracing it. For whatever is remembered between calls."""
    disabled: F = torch.compiler.disable(function)
    return disabled
