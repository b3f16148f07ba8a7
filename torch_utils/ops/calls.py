# SPDX-License-Identifier: Apache-2.0
"""Calls that differ from earlier ones in the values of their tensors only take what was worked out for those.

The first call with some shapes, types, filters and settings checks its arguments, chooses a form and makes a plan. On
small images all that takes longer than to compute the result, so that later calls find it by a single look-up. What is
remembered holds as long as the filters were not written to, $STYLESAN_OPS is the same and no library was exchanged.
"""
import ctypes
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch

from torch_utils.ops import native, tune

MAX_CALLS = 1024        # When there are more calls of one operation all are forgotten.
PLAIN = {int, float, bool, str, type(None)}     # Settings of these types are the same where they are equal.
VARIABLE = b"STYLESAN_OPS"

Call = TypeVar("Call", bound=Callable[..., torch.Tensor])

# The variable is looked at in every call. `os.environ` keeps the environment of the process, which this reads, up to
# date; its own `get` takes several times as long where the variable is not set.
_getenv = ctypes.PyDLL(None).getenv
_getenv.argtypes, _getenv.restype = [ctypes.c_char_p], ctypes.c_char_p


def plain(setting: object) -> object:
    """A number or a list of them as something that can be looked up."""
    return tuple(setting) if type(setting) is list else setting


def _is_plain(setting: object) -> bool:
    return all(map(_is_plain, setting)) if type(setting) is tuple else type(setting) in PLAIN


class _Entry(NamedTuple, Generic[Call]):
    """A call, and what was the case when it was prepared."""

    call: Call
    filters: tuple[tuple["weakref.ref[torch.Tensor]", int, int], ...]   # With their versions and addresses.
    kind: str                       # The type of the device,
    loaded: native.Loaded | None    # and the library that was in use there.
    choice: bytes | None            # $STYLESAN_OPS.
    tuned: tuple[str, ...]


class Calls(Generic[Call]):
    """What is remembered of one operation. Threads may share it."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry[Call]] = {}

    def find(self, key: tuple[object, ...]) -> Call | None:
        """The call for such arguments; None if it is not known or does not hold any more.

        Args:
            key: All that was looked at when it was prepared; numbers of the filters (`id`), whose contents count.
        """
        try:
            entry = self._entries.get(key)
        except TypeError:       # A setting that cannot be looked up, such as an array.
            return None
        if entry is None:
            return None
        call, filters, kind, loaded, choice, tuned = entry
        if native.in_use.get(kind) is not loaded or _getenv(VARIABLE) != choice or tune.KINDS is not tuned:
            return None
        for reference, version, address in filters:
            f = reference()     # Where it still lives, the number in the key is its own.
            if f is None or f._version != version or f.data_ptr() != address:
                return None
        return call

    def keep(self, key: tuple[object, ...], call: Call, x: torch.Tensor, filters: Sequence[torch.Tensor | None],
             settings: tuple[object, ...]) -> Call:
        """The call, remembered under `key` where that is safe.

        Args:
            key: As for `find`.
            call: What was prepared.
            x: On the device.
            filters: Those in the key.
            settings: Whatever of the key is neither shape nor type nor number of a tensor.
        """
        tensors = {id(f): f for f in filters if f is not None}.values()
        if _is_plain(settings) and not any(f.is_inference() for f in tensors):      # Those have no version.
            if len(self._entries) >= MAX_CALLS:
                self._entries.clear()
            kind = x.device.type
            marks = tuple((weakref.ref(f), f._version, f.data_ptr()) for f in tensors)
            self._entries[key] = _Entry(call, marks, kind, native.in_use.get(kind), _getenv(VARIABLE), tune.KINDS)
        return call
