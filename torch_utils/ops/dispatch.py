# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs: the one place where that is decided.

Every operation registers its forms here under a name:
    'ref'     plain PyTorch, written to be read; the oracle of all others
    'matrix'  plain PyTorch, the same numbers through matrix products; faster
    'cpu', 'cuda'  native code for that kind of device, if it can be had and is found right (see `load`)
A caller says `impl='auto'` or names a form. On GPUs an operation may choose among its forms by their speed (`tune`).

$STYLESAN_OPS says whether native code is used: 'auto' (the default: where it can be had), 'native' (or else an error)
or 'reference' (never).
"""
import dataclasses
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from dnnlib import UserError
from torch_utils.ops import native, self_check, strips, tune
from torch_utils.ops.descriptions import Strips
from torch_utils.ops.native import Loaded

FORMS = ("ref", "matrix", "cpu", "cuda")
NATIVE = ("cpu", "cuda")
CHOICES = ("auto", "native", "reference")       # What $STYLESAN_OPS may be.

_implementations: dict[str, dict[str, Callable[..., Any]]] = {}     # Operation -> form -> function; filled at import.

#----------------------------------------------------------------------------
# Native code, checked before it is trusted.

# Held while a library is compiled and opened, and never while operations run: on GPUs autograd runs the backward pass
# of the self-check in a thread of its own, which asks for the library, too, and would wait for ever.
_lock = threading.Lock()


def choice() -> str:
    """The value of $STYLESAN_OPS."""
    value = os.environ.get("STYLESAN_OPS") or "auto"
    if value not in CHOICES:
        raise UserError(f"STYLESAN_OPS={value}: choose from {', '.join(CHOICES)}")
    return value


def load(kind: str) -> Loaded:
    """The library for devices of that type, compiled if need be; tried once per process.

    The first caller checks it. While that runs, some milliseconds, other threads get the library unchecked.

    Raises:
        UserError: STYLESAN_OPS=native and there is none.
    """
    if choice() == "reference":
        return Loaded(None, "STYLESAN_OPS=reference")
    if kind not in NATIVE:
        return Loaded(None, f"no native code for {kind}")
    if kind not in native.in_use:
        with _lock:
            is_first = kind not in native.in_use
            if is_first:
                native.in_use[kind] = _with_fast_programs(kind, native.load(kind))
        if is_first:
            try:
                native.in_use[kind] = _checked(kind, native.in_use[kind])
            except BaseException:       # What has not passed the check is not kept.
                native.in_use.pop(kind, None)
                raise
    loaded = native.in_use[kind]
    if loaded.functions is None and choice() == "native":
        raise UserError(f"STYLESAN_OPS=native: no {kind} ops: {loaded.reason}: mend that, or unset STYLESAN_OPS")
    return loaded


def _with_fast_programs(kind: str, loaded: Loaded) -> Loaded:
    if loaded.functions is None or kind != "cuda":
        return loaded
    return dataclasses.replace(loaded, fast=FastPrograms(
        lambda family, dtype: self_check.find_fault_of_strips(kind, family, dtype)))


def _checked(kind: str, loaded: Loaded) -> Loaded:
    """The library if it computes what the definitions do on this machine, else why not."""
    fault = None if loaded.functions is None else self_check.find_fault(kind)
    return loaded if fault is None else Loaded(None, f"self-check failed: {fault}")


class FastPrograms:
    """The libraries of fast programs of GPUs, compiled, loaded and checked when a layer first asks for one.

    A layer without its fast program is slower, but right, so that this is no reason to do without all native code.

    Args:
        find_fault: Says what is wrong with the programs of a family and type, None if nothing is.
    """

    def __init__(self, find_fault: Callable[[str, torch.dtype], str | None]) -> None:
        self._find_fault = find_fault
        self._found: dict[tuple[str, torch.dtype], Loaded] = {}
        self._lock = threading.Lock()       # Not held while operations run, as `_lock` is not.

    def __call__(self, kind: Strips, dtype: torch.dtype) -> Callable[..., int] | None:
        """The program for a kind of layer; None if it cannot be had.

        Raises:
            UserError: STYLESAN_OPS=native and the library cannot be had.
        """
        key = kind.family, dtype
        if dtype not in strips.TYPES:
            return None
        found = self._found.get(key)
        if found is None:
            with self._lock:
                is_first = key not in self._found
                if is_first:
                    self._found[key] = native.load_strips(*key)
                found = self._found[key]
            if is_first:
                found = self._checked(found, *key)
        if found.functions is not None:
            return found.functions.get(kind.name)
        if choice() == "native":
            raise UserError(f"STYLESAN_OPS=native: no fast programs: {found.reason}: mend that, or unset STYLESAN_OPS")
        return None

    def _checked(self, found: Loaded, family: str, dtype: torch.dtype) -> Loaded:
        """The programs if they compute what the definitions do, else why not; that is kept."""
        try:
            fault = None if found.functions is None else self._find_fault(family, dtype)
        except BaseException:       # What has not passed the check is not kept.
            self._found.pop((family, dtype), None)
            raise
        if fault is not None:
            found = self._found[family, dtype] = Loaded(None, f"self-check failed: {fault}")
        if found.functions is None and choice() != "native":
            print(f"ops: the general program is used instead of fast ones ({found.reason})", file=sys.stderr,
                  flush=True)
        return found


def describe(device: torch.device | str) -> str:
    """One line for the start of a run: what `impl='auto'` will use on that device."""
    kind = torch.device(device).type
    loaded = load(kind)
    return f"ops: reference ({loaded.reason})" if loaded.functions is None else f"ops: {kind} native"


def start_lines(device: torch.device | str) -> str:
    """For programs that leave the choice of forms to the machine: that line, and on GPUs where choices come from."""
    return "\n".join(filter(None, [describe(device), tune.describe(device)]))

#----------------------------------------------------------------------------
# Forms.

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

    'auto' takes native code for the device if there is any, then 'matrix', then 'ref'. Where the caller's network is
    being exported it takes 'ref': another program knows none of the others.

    Raises:
        ValueError: `impl` is no known name, has no such form of this operation, or belongs to another device.
    """
    forms, kind = _implementations[op], device.type
    if impl == "auto":
        if torch.compiler.is_exporting():
            return forms["ref"]
        if kind in NATIVE and kind in forms and load(kind).functions is not None:
            return forms[kind]
        return forms.get("matrix", forms["ref"])
    if impl not in FORMS:
        raise ValueError(f"impl={impl!r}: choose from auto, {', '.join(FORMS)}")
    if impl not in forms:
        raise ValueError(f"impl={impl!r}: {op} has only the forms {', '.join(forms)}")
    if impl in NATIVE:
        if kind != impl:
            raise ValueError(f"impl={impl!r}: {op} was called with a tensor on {device}")
        loaded = load(impl)
        if loaded.functions is None:
            raise ValueError(f"impl={impl!r}: no native {impl} ops ({loaded.reason}): use impl='auto' or impl='ref'")
    return forms[impl]
