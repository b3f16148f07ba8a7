# SPDX-License-Identifier: Apache-2.0
"""The same functions as PyTorch's compiler wants them.

Imported when it meets the first of them: the modules of the traced code are loaded by then, so all are known.
"""
from collections.abc import Callable

import torch

from torch_utils.ops import untraced_functions

functions: list[Callable[..., object]] = [torch.compiler.disable(function) for function in untraced_functions.functions]
