# SPDX-License-Identifier: Apache-2.0
"""Closed registries: classes and functions are chosen by name from a list that the code declares.

Nothing is ever imported by a string that came from a file or a command line.
"""
import contextlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from dnnlib.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Name -> object, filled by decorators at import time."""

    def __init__(self, kind: str):
        self.kind = kind                        # What the names stand for; used in error messages.
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that files the object below it under `name`."""
        def add(item: T) -> T:
            if name in self._items:
                raise KeyError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item
        return add

    @contextlib.contextmanager
    def replaced(self, name: str, item: T) -> Iterator[None]:
        """Let `name` stand for `item` within the block, whether it is known or not. This is for tests."""
        before = dict(self._items)
        self._items[name] = item
        try:
            yield
        finally:
            self._items = before

    def __getitem__(self, name: str) -> T:
        if name not in self._items:
            raise UserError(f"unknown {self.kind} {name!r}: choose from {', '.join(sorted(self._items))}")
        return self._items[name]

    def __contains__(self, name: str) -> bool:
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
