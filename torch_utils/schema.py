# SPDX-License-Identifier: Apache-2.0
"""What a file may hold, written down as data: keys, types, ranges, and the names, shapes and types of tensors.

A schema is made of checks. A check takes a value and the place where it stands in the file ("" for all of it), and
raises `Unfit` with a sentence about that place. Whoever reads a file adds its name and a remedy:

    NETWORK = record({"widths": items(whole(1, 4096)), "classes": items(text)}, {"note": nothing_or(text)})
    NETWORK(header, "header")           # Unfit: header.widths[2] is -4, but must be a whole number from 1 to 4096

Nothing is computed or allocated from a value before its check has passed, so sizes that a file claims cost nothing.
"""
import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch

from dnnlib.util import list_some
from torch_utils.nested import first_nonfinite

MAX_WHOLE = 10 ** 15            # Above every count; numbers with thousands of digits cannot even be printed.
MAX_TEXT = 10_000               # Characters of a name or path.
MAX_ITEMS = 1_000_000           # A longer list is not believed; classes are the longest.
MAX_DEPTH = 16                  # Lists and dicts may lie so deep in each other.
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COUNTERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

Check = Callable[[Any, str], None]

#----------------------------------------------------------------------------

class Unfit(Exception):
    """What the file holds is not what is needed; the message says where."""


def shown(value: Any) -> str:
    """A value in a few characters, for messages. Containers are not looked into: they may be endless."""
    if value is None or isinstance(value, bool | float):
        return str(value)
    if isinstance(value, int):
        return str(value) if abs(value) <= MAX_WHOLE else "a number beyond reason"
    if isinstance(value, str):
        return ascii(value[:40])
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def names_shown(names: Iterable[Any]) -> str:
    """The first three of some keys, for messages."""
    return list_some([shown(name).strip("'") for name in names], 3)

#----------------------------------------------------------------------------
# Plain values.

def whole(low: int = 0, high: int = MAX_WHOLE) -> Check:
    """An int, which a bool is not."""
    def check(value: Any, place: str) -> None:
        if type(value) is not int or not low <= value <= high:
            wanted = f"{low}" if low == high else f"a whole number from {low} to {high}"
            raise Unfit(f"{place} is {shown(value)}, but must be {wanted}")
    return check


def number(low: float = -math.inf, high: float = math.inf, above: float | None = None) -> Check:
    """A finite number from `low` to `high`, and larger than `above`."""
    def check(value: Any, place: str) -> None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= MAX_WHOLE or not low <= value <= high or (
                above is not None and not value > above):
            limits = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
            limits += [] if above is None else [f"above {above:g}"]
            raise Unfit(f"{place} is {shown(value)}, but must be a finite number{''.join(', ' + x for x in limits)}")
    return check


def flag(value: Any, place: str) -> None:
    """True or False."""
    if type(value) is not bool:
        raise Unfit(f"{place} is {shown(value)}, but must be true or false")


def text(value: Any, place: str) -> None:
    """A string of no more than MAX_TEXT characters."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise Unfit(f"{place} is {shown(value)}, but must be a text of at most {MAX_TEXT} characters")


def label(value: Any, place: str) -> None:
    """A short text of one line, such as the name of an array."""
    if not isinstance(value, str) or len(value) > 200 or not value.isprintable():
        raise Unfit(f"{place} is {shown(value)}, but must be a name of at most 200 characters that can be printed")


def exactly(*values: str) -> Check:
    """One of some texts."""
    def check(value: Any, place: str) -> None:
        if not isinstance(value, str) or value not in values:
            raise Unfit(f"{place} is {shown(value)}, but must be {' or '.join(map(repr, values))}")
    return check


def nothing_or(inner: Check) -> Check:
    """None, or what `inner` wants."""
    def check(value: Any, place: str) -> None:
        if value is not None:
            inner(value, place)
    return check


def plain(value: Any, place: str) -> None:
    """None, numbers, texts, and lists and dicts of them, of which this project asks nothing else."""
    pending = [(value, 0)]
    seen: set[int] = set()
    while pending:
        part, depth = pending.pop()
        if isinstance(part, dict | list | tuple):
            if depth > MAX_DEPTH:
                raise Unfit(f"{place} is nested beyond measure")
            if id(part) in seen:
                continue
            seen.add(id(part))
            pending += [(item, depth + 1) for item in (part.values() if isinstance(part, dict) else part)]
        elif part is not None and not isinstance(part, bool | int | float | str):
            raise Unfit(f"{place} holds {shown(part)}, but must hold plain values")

#----------------------------------------------------------------------------
# Containers.

def items(inner: Check, low: int = 0, high: int = MAX_ITEMS) -> Check:
    """A list or tuple of `low` to `high` values, each of them as `inner` wants it."""
    def check(value: Any, place: str) -> None:
        if not isinstance(value, list | tuple):
            raise Unfit(f"{place} is {shown(value)}, but must be a list")
        if not low <= len(value) <= high:
            raise Unfit(f"{place} has {len(value)} entries, but must have {low if low == high else f'{low} to {high}'}")
        for i, item in enumerate(value):
            inner(item, f"{place}[{i}]")
    return check


def entries(inner: Check, key: type = str) -> Check:
    """A dict with keys of one type and values that are as `inner` wants them."""
    def check(value: Any, place: str) -> None:
        _check_dict(value, place)
        for name, item in value.items():
            if type(name) is not key:
                raise Unfit(f"{place} has the key {shown(name)}, but its keys must be of type {key.__name__}")
            inner(item, _inside(place, name))
    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None, others: Check | None = None,
           ) -> Check:
    """A dict with these keys.

    Args:
        required: Keys that must be there, and what they hold.
        optional: Keys that may be there.
        others: What further keys hold, such as those of later versions; None: there must not be any.
    """
    known = {**(optional or {}), **required}

    def check(value: Any, place: str) -> None:
        _check_dict(value, place)
        if missing := [name for name in required if name not in value]:
            raise Unfit(f"{place or 'the file'} lacks {list_some(missing)}")
        unknown = [name for name in value if not isinstance(name, str) or name not in known]
        if unknown and (others is None or not all(isinstance(name, str) for name in unknown)):
            raise Unfit(f"{place or 'the file'} has unknown entries: {names_shown(unknown)}")
        for name, item in value.items():
            inner = known.get(name, others)
            assert inner is not None        # Unknown names were refused above.
            inner(item, _inside(place, name))
    return check


def _inside(place: str, name: Any) -> str:
    name = ascii(name)[1:-1] if isinstance(name, str) else str(name)
    return f"{place}.{name[:100]}" if place else name[:100]


def _check_dict(value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise Unfit(f"{place or 'the file'} is {shown(value)}, but must hold entries by name")

#----------------------------------------------------------------------------
# Settings.

def settings_of(kind: type, ranges: Mapping[str, Check]) -> Check:
    """The dict of a dataclass of settings: each field of its annotated type, none missing but those with a default.

    Args:
        kind: The dataclass.
        ranges: What a field must be besides its type, by the field's name.
    """
    hints = typing.get_type_hints(kind)
    checks = {field.name: ranges.get(field.name) or _of_type(hints[field.name]) for field in dataclasses.fields(kind)}
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    return record({name: checks[name] for name in needed},
                  {name: check for name, check in checks.items() if name not in needed})


def _of_type(hint: Any) -> Check:
    simple: dict[Any, Check] = {bool: flag, int: whole(), float: number(), str: text}
    if hint in simple:
        return simple[hint]
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type)       # Annotations name classes, not their instances.
        return settings_of(hint, {})
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return nothing_or(_of_type(next(arg for arg in args if arg is not types.NoneType)))
    if origin is tuple and args[-1] is Ellipsis:
        return items(_of_type(args[0]))
    if origin is tuple:
        return items(_of_type(args[0]), len(args), len(args))
    raise TypeError(f"no check for settings of type {hint}")

#----------------------------------------------------------------------------
# Tensors.

def check_tensors(state: Any, place: str, like: Mapping[str, torch.Tensor] | None = None, exact: bool = False) -> None:
    """Refuse what is not a dict of dense tensors of numbers, or not one that a network takes.

    Args:
        state: By name.
        place: Where it stands in the file.
        like: The tensors that the network has, also without memory (on the meta device); None: not known.
        exact: Types must be equal, too; otherwise floating-point types of other precision are taken.

    Raises:
        Unfit: it is refused.
    """
    _check_dict(state, place)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise Unfit(f"{place} holds {shown(value)} as {shown(name)}, but must hold tensors by name")
        if value.dtype not in FLOATS + COUNTERS:
            raise Unfit(f"{place}.{name} is {shown(value)}, a type that no network has")
    if like is not None:
        compare_shapes(state, place, like)
        _compare_types(state, place, like, exact)


def check_finite(content: Any) -> None:
    """Refuse nested dicts and lists with a tensor that is not finite. Raises Unfit."""
    if (name := first_nonfinite(content)) is not None:
        raise Unfit(f"{ascii(name[:200])[1:-1]} is not finite")


class HasShape(Protocol):
    """A tensor, or a note of one that is still in its file."""

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclasses.dataclass(frozen=True)
class StoredShape:
    """A note of a tensor that is still in its file."""

    shape: tuple[int, ...]


def compare_shapes(state: Mapping[str, HasShape], place: str, like: Mapping[str, torch.Tensor]) -> None:
    """Refuse tensors that are not those of a network. Nothing is read.

    Raises:
        Unfit: some are missing, unknown or of other shapes.
    """
    if missing := sorted(like.keys() - state.keys()):
        raise Unfit(f"{place} lacks tensors: {names_shown(missing)}")
    if unknown := sorted(state.keys() - like.keys()):
        raise Unfit(f"{place} has unknown tensors: {names_shown(unknown)}")
    other = [f"{name} {list(state[name].shape)} for {list(value.shape)}" for name, value in like.items()
             if tuple(state[name].shape) != tuple(value.shape)]
    if other:
        raise Unfit(f"{place} has tensors of other shapes: {list_some(other, 3)}")


def _compare_types(state: Mapping[str, torch.Tensor], place: str, like: Mapping[str, torch.Tensor],
                   exact: bool) -> None:
    for name, value in like.items():
        found = state[name].dtype
        if found != value.dtype and (exact or not (found.is_floating_point and value.dtype.is_floating_point)):
            raise Unfit(f"{place}.{name} is {shown(state[name])}, but must be of "
                        f"{str(value.dtype).removeprefix('torch.')}")
