# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's compiler is told about functions of ours, with types that a checker can follow.

`torch.compiler.disable` loads the whole compiler, which takes as long as loading PyTorch. So it is called only when
something is compiled, which most programs never do.
"""
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from torch_utils.ops import untraced_functions

F = TypeVar("F", bound=Callable[..., object])


def untraced(function: F) -> F:
    """Decorator: the compiler calls the function instead of tracing it. For whatever is remembered between calls."""
    number = len(untraced_functions.functions)
    untraced_functions.functions.append(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> object:
        if torch.compiler.is_compiling():
            from torch_utils.ops import untraced_disabled  # The compiler carries an import out, once.

            return untraced_disabled.functions[number](*args, **kwargs)
        return function(*args, **kwargs)
    return cast(F, call)
