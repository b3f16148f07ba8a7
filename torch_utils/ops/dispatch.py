# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: the one place where that is decided.

Every operation registers its forms here under a name:
    'ref'     plain PyTorch, written to be read; the oracle of all others
    'matrix'  plain PyTorch, the same numbers through matrix products; faster
    'cpu', 'cuda'  native code for that kind of device, if it can be had (see `native`)
A caller says `impl='auto'` or names a form. On GPUs an operation may choose among its forms by their speed (`tune`).
"""
from collections.abc import Callable
from typing import Any

import torch

from torch_utils.ops import native, tune

FORMS = ("ref", "matrix", "cpu", "cuda")
NATIVE = ("cpu", "cuda")

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}     # Operation -> form -> function; filled at import.

#----------------------------------------------------------------------------

def implements(op: str, form: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that files the function below it as one form of an operation."""
    if form not in FORMS:
        raise ValueError(f"form {form!r} of {op}: choose from {', '.join(FORMS)}")
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        if form in _implementations.setdefault(op, {}):
            raise ValueError(f"{op} has a form {form!r} already")
        _implementations[op][form] = function
        return function
    return add


def select(op: str, impl: str, device: torch.device) -> Callable[..., Any]:
    """The function that computes `op` for tensors on `device`.

    'auto' takes native code for the device if there is any, then 'matrix', then 'ref'.

    Raises:
        ValueError: `impl` is no known name, has no such form of this operation, or belongs to another device.
    """
    forms, kind = _implementations[op], device.type
    if impl == "auto":
        if kind in NATIVE and kind in forms and native.load(kind).functions is not None:
            return forms[kind]
        return forms.get("matrix", forms["ref"])
    if impl not in FORMS:
        raise ValueError(f"impl={impl!r}: choose from auto, {', '.join(FORMS)}")
    if impl not in forms:
        raise ValueError(f"impl={impl!r}: {op} has only the forms {', '.join(forms)}")
    if impl in NATIVE:
        if kind != impl:
            raise ValueError(f"impl={impl!r}: {op} was called with a tensor on {device}")
        loaded = native.load(impl)
        if loaded.functions is None:
            raise ValueError(f"impl={impl!r}: no native {impl} ops ({loaded.reason}): use impl='auto' or impl='ref'")
    return forms[impl]


def describe(device: torch.device | str) -> str:
    """One line for the start of a run: what `impl='auto'` will use on that device."""
    return native.describe(device)


def start_lines(device: torch.device | str) -> str:
    """For programs that leave the choice of forms to the machine: that line, and on GPUs where choices come from."""
    return "\n".join(filter(None, [describe(device), tune.describe(device)]))
