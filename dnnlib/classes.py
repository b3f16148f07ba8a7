# SPDX-License-Identifier: Apache-2.0
"""What class a folder, a label or a name means. This is the one place that decides it.

A class is known by its name; networks and archives number their classes, each in an order of its own. So numbers of two
sides are brought together by names, and never by the position in a list of what happens to be there:

- Names that differ only in how Unicode composes their letters are the same name.
- A whole number is that number, whether it is written 3, "3", "03", 3.0 or "3.0".
- Classes without names are called by their numbers: "0", "1", "2".
- Where one side calls classes by numbers and the other by words, a number is an index into the list of words. A word
  among numbers means nothing.
- Where one side is known to have no names at all, as official networks have none, only the order is left. It is taken
  if there are as many classes on either side, and the note says so.
"""
import collections
import dataclasses
import math
import numbers
import re
from collections.abc import Iterable, Sequence
from typing import TypeGuard

from dnnlib.errors import UserError
from dnnlib.util import list_some, normalized_name

NUMBER = re.compile(r"[+-]?\d{1,18}(\.0*)?", re.ASCII)
FRACTION = re.compile(r"[+-]?\d{0,18}\.\d+", re.ASCII)
HALF_LETTER = re.compile(r"[\ud800-\udfff]")
SHOWN = 10              # Names of a list that messages repeat.
BETWEEN_NAMES, BETWEEN_NUMBERS = re.compile(r"[|;,]"), re.compile(r"[|;,\s]+")

#----------------------------------------------------------------------------
# Single names and numbers.

def whole_number(value: object) -> int | None:
    """The whole number that a value is, as a number or as text; None if it is none. Truth values are no numbers."""
    if isinstance(value, str):
        text = value.strip()
        return int(text.partition(".")[0]) if NUMBER.fullmatch(text) else None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return int(number) if math.isfinite(number) and number.is_integer() else None


def is_fraction(value: object) -> bool:
    """Whether a value is a number that is not whole, which no class has."""
    if isinstance(value, str):
        return whole_number(value) is None and FRACTION.fullmatch(value.strip()) is not None
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and whole_number(value) is None


def are_numbers(names: Iterable[str]) -> bool:
    """Whether classes are called by numbers only."""
    return all(whole_number(name) is not None for name in names)


def are_names(names: object) -> TypeGuard[list[str]]:
    """Whether this is a list of text that every file can hold: JSON also spells halves of letters, such as \\ud800."""
    return isinstance(names, list) and all(isinstance(name, str) and not HALF_LETTER.search(name) for name in names)


def is_unnamed(names: Sequence[str] | None) -> bool:
    """Whether there are no names, or only those that stand for none: the numbers from 0, in order."""
    return not names or list(names) == [str(i) for i in range(len(names))]

#----------------------------------------------------------------------------
# Labels of several values.

def single(value: object) -> object:
    """A label without the list of one around it."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def with_several(values: Iterable[object]) -> list[object]:
    """Those labels that say more than one thing: lists, and text such as '3 5' or, where both are labels, 'cat|dog'.

    A comma alone says nothing: ImageNet has a class 'tench, Tinca tinca'.
    """
    found: list[object] = []
    texts: set[str] = set()
    for value in values:
        if isinstance(value, str):
            texts.add(value)
        elif isinstance(value, list | tuple | dict | set):
            found.append(value)
    alone = {normalized_name(text.strip()) for text in texts}
    return [*found, *sorted(text for text in texts if _lists_several(text, alone))]


def _lists_several(text: str, alone: set[str]) -> bool:
    inside = text.strip().strip("[](){}")
    words = [normalized_name(part.strip(" \t'\"")) for part in BETWEEN_NAMES.split(inside)]
    figures = [part for part in BETWEEN_NUMBERS.split(inside) if part]
    return len(words) > 1 and all(word in alone for word in words) or len(figures) > 1 and are_numbers(figures)

#----------------------------------------------------------------------------
# Lists of classes.

def number_names(where: str, names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Classes of things by name: for each its index, and the names by index.

    Numbers are in the order of numbers, words in the order of text.

    Raises:
        UserError: two names mean one number, or one is no text.
    """
    if odd := sorted({name for name in names if HALF_LETTER.search(name)}):
        raise UserError(f"{where}: {len(odd)} names of classes hold halves of letters, which is no text: "
                        f"{list_some(odd)}: spell them anew")
    composed = {name: normalized_name(name) for name in set(names)}
    classes = sorted(set(composed.values()))
    if are_numbers(classes):
        spelt = collections.defaultdict(list)
        for name in classes:
            spelt[whole_number(name)].append(name)
        if twice := [" and ".join(group) for group in spelt.values() if len(group) > 1]:
            raise UserError(f"{where}: {list_some(twice)} mean the same class: call it by one name")
        classes.sort(key=lambda name: whole_number(name) or 0)
    index = {name: i for i, name in enumerate(classes)}
    return [index[composed[name]] for name in names], classes


class Classes:
    """The classes of a network, a judge or a data set, by index."""

    def __init__(self, names: Sequence[str] | None, count: int = 0):
        """Args:
            names: By index; None or empty if they have none.
            count: How many there are, if they have no names.
        """
        self.has_names = bool(names)
        self.names = [str(name) for name in names] if names else [str(i) for i in range(count)]
        self.are_numbers = are_numbers(self.names)
        composed = [normalized_name(name) for name in self.names]
        self._by_name = {name: i for i, name in enumerate(composed)}
        self._twice = {name for name, count in collections.Counter(composed).items() if count > 1}
        self._by_number = {whole_number(name): i for i, name in enumerate(self.names)} if self.are_numbers else {}

    def __len__(self) -> int:
        return len(self.names)

    def find(self, name: str) -> int | None:
        """Index of the class that a name or a number in text means; None if there is none.

        Raises:
            UserError: two classes have this name, as files of others may say it.
        """
        found = self._named(name)
        number = whole_number(name)
        if found is not None or number is None:
            return found
        return self._by_number.get(number) if self.are_numbers else self.index(number)

    def _named(self, name: str) -> int | None:
        """Index of the class that is called so. Raises UserError if two are."""
        composed = normalized_name(name)
        if composed in self._twice:
            places = [i for i, other in enumerate(self.names) if normalized_name(other) == composed]
            raise UserError(f"{name}: the classes {list_some(places)} have this name: call them by these numbers")
        return self._by_name.get(composed)

    def find_all(self, names: Sequence[str]) -> list[int | None]:
        """Indices of the classes that all names of another side mean. Numbers are indices only if all of them are."""
        by_name = [self._named(name) for name in names]
        if not are_numbers(names):
            return by_name
        if self.are_numbers or all(i is None for i in by_name):
            return [self.find(name) for name in names]
        return by_name

    def index(self, value: object) -> int | None:
        """What a stored label means: a number is an index already, text is the name of a class."""
        if isinstance(value, str):
            return self.find(value)
        number = whole_number(value)
        return number if number is not None and 0 <= number < len(self) else None

    def __str__(self) -> str:
        return list_some(self.names, SHOWN)

#----------------------------------------------------------------------------
# Two sides.

@dataclasses.dataclass(frozen=True)
class Match:
    """Which class of one side is which class of the other."""

    indices: list[int]      # Classes of the other side, by index of the one; -1 where a class is not in use there.
    note: str | None        # What was taken for granted, for people.

    @property
    def is_same_order(self) -> bool:
        """Whether both sides number the classes alike."""
        return self.indices == list(range(len(self.indices)))


def match(what: str, given: Classes, whose: str, known: Classes, remedy: str,
          used: Iterable[int] | None = None) -> Match:
    """Find the classes of one side in those of the other.

    Args:
        what: The side that brings classes, for messages: '--images=out'.
        given: Its classes.
        whose: The side that knows classes: 'the judge x.safetensors'.
        known: The classes that it knows.
        remedy: What the user can do if they do not fit.
        used: Indices of `given` that occur; None: all.

    Raises:
        UserError: a class in use is not among those known. The message shows both lists.
    """
    places = list(range(len(given))) if used is None else sorted(set(used))
    names = [given.names[i] if i < len(given) else str(i) for i in places]
    if not known.has_names and given.has_names and not are_numbers(names):
        return _in_order(what, given, whose, known, remedy)
    found = known.find_all(names)
    missing = [name for name, i in zip(names, found, strict=True) if i is None]
    if missing or len(set(found)) != len(found):
        wrong = f"and none called {list_some(missing, SHOWN)}" if missing else "and two mean the same one"
        raise UserError(f"{what}: has the classes {list_some(names, SHOWN)}, but {whose} has {known}, {wrong}: "
                        f"{remedy}")
    indices = [-1] * max(len(given), *(i + 1 for i in places), 0)
    for place, i in zip(places, found, strict=True):
        assert i is not None        # It would be missing.
        indices[place] = i
    note = None
    if names and are_numbers(names) and not known.are_numbers:
        pairs = [f"{name} is {known.names[indices[place]]}" for name, place in zip(names, places, strict=True)]
        note = f"{what}: its numbers are taken as indices of the classes of {whose}: {list_some(pairs, SHOWN)}"
    return Match(indices, note)


def _in_order(what: str, given: Classes, whose: str, known: Classes, remedy: str) -> Match:
    """Words against a side without names: as many classes, in the same order."""
    if len(given) != len(known):
        raise UserError(f"{what}: has {len(given)} classes, {given}, but {whose} has {len(known)} without names: "
                        f"{remedy}")
    return Match(list(range(len(given))),
                 f"{whose} has no names of classes: those of {what} are taken in their order: {given}")
