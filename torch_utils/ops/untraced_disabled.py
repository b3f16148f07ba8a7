# SPDX-License-Identifier: Apache-2.0
"""These are the functions of `untraced_functions` as PyTorch's compiler wants them.

The module is imported when it meets the first of them. The modules of the traced code are loaded by then, so all of
them are known.
"""
from collections.abc import Callable

import torch

from torch_utils.ops import untraced_functions

functions: list[Callable[..., object]] = [torch.compiler.disable(function) for function in untraced_functions.functions]
