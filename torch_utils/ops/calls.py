# SPDX-License-Identifier: Apache-2.0
"""Calls that differ from earlier ones in the values of their tensors only take what was worked out for those.

The first call with some shapes, types, filters and settings checks its arguments, chooses a form and makes a plan. On
small images all that takes longer than to compute the result, so that later calls find it by a single look-up. What is
remembered holds as long as the filters were not written to, $STYLESAN_OPS is the same and no library was exchanged.
"""
import os
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch

from torch_utils.ops import native, tune
from torch_utils.ops.resampler import Mark

MAX_CALLS = 1024        # Of an operation. All are forgotten when there are more.
PLAIN = {int, float, bool, str, type(None)}     # Settings of these types are the same where they are equal.

Call = Callable[..., torch.Tensor]


def plain(setting: object) -> object:
    """A number or a list of them as something that can be looked up."""
    return tuple(setting) if type(setting) is list else setting


def _is_plain(setting: object) -> bool:
    return all(map(_is_plain, setting)) if type(setting) is tuple else type(setting) in PLAIN


class _Entry(NamedTuple):
    call: Call
    marks: tuple[Mark, ...]     # Of the filters.
    kind: str                   # The type of the device,
    loaded: native.Loaded | None        # and what was in use there.


class Calls:
    """What is remembered of one operation. Threads may share it."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, _Entry] = {}

    def find(self, x: torch.Tensor, b: torch.Tensor | None, filters: tuple[torch.Tensor | None, ...],
             settings: tuple[object, ...], prepare: Callable[[], Call]) -> Call:
        """The call for such arguments.

        Args:
            x: Its shape, type and device matter.
            b: Its shape matters.
            filters: Their contents matter.
            settings: All else that `prepare` looks at.
            prepare: Checks the arguments and returns the call, which takes the tensors.
        """
        key = (x.shape, x.dtype, x.device, None if b is None else b.shape, *map(id, filters), settings,
               os.environ.get("STYLESAN_OPS"), tune.KINDS)
        try:
            entry = self._entries.get(key)
        except TypeError:       # A setting that cannot be looked up, such as an array.
            return prepare()
        if entry is not None and native.in_use.get(entry.kind) is entry.loaded:
            for mark in entry.marks:
                if not mark.is_unchanged():
                    break
            else:
                return entry.call
        call, kind = prepare(), x.device.type
        tensors = [f for f in filters if f is not None]
        if _is_plain(settings) and not any(f.is_inference() for f in tensors):
            if len(self._entries) >= MAX_CALLS:
                self._entries.clear()
            self._entries[key] = _Entry(call, tuple(map(Mark, tensors)), kind, native.in_use.get(kind))
        return call
