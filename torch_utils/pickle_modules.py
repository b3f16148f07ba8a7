# SPDX-License-Identifier: Apache-2.0
"""Modules and settings in the notes that `torch_utils.safe_pickle` took: state dicts, attributes, numbers.

A file may lie about everything, so each value is checked where it is taken out.
"""
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from torch_utils.pickle_values import Call, Symbol, TensorRecord
from torch_utils.schema import Unfit

# A published discriminator has about 1,000 modules. Modules that share modules could multiply for ever.
MAX_MODULES = 20_000
MAX_TENSORS = 50_000
MAX_DEPTH = 50
MAX_NAME = 200
MAX_SIZE = 1 << 20              # Channels, pixels, classes: far above any network, far below trouble.
MAX_PLAIN = 10_000              # Values in one group of settings.

#----------------------------------------------------------------------------
# Plain values.

def as_number(value: Any, what: str) -> int | float | bool:
    """A plain number of any spelling: Python's, NumPy's, or an array or tensor of one element.

    Raises:
        Unfit: `what` is no number, or an integer beyond reason.
    """
    if isinstance(value, TensorRecord) and math.prod(value.shape) == 1:
        value = value.load().item()
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.item()
    if not isinstance(value, int | float):
        raise Unfit(f"{what} is no number")
    if isinstance(value, int) and abs(value) > 10 ** 15:    # Too long for a message, too.
        raise Unfit(f"{what} is beyond reason")
    return value


def as_size(value: Any, what: str, low: int = 1) -> int:
    """A whole number; of [width, height] the side of the square.

    Raises:
        Unfit: it is none, or smaller than `low`, or beyond reason.
    """
    if isinstance(value, np.ndarray) and 0 < value.size <= 2:
        value = value.ravel().tolist()
    if isinstance(value, list | tuple):
        if not value or any(as_number(side, what) != as_number(value[0], what) for side in value):
            raise Unfit(f"{what} is not square")
        value = value[0]
    size = as_number(value, what)
    if not low <= size <= MAX_SIZE or size != int(size):
        raise Unfit(f"{what} is {size}, which no network has")
    return int(size)


def as_positive(value: Any, what: str) -> float:
    """A number above 0.

    Raises:
        Unfit: it is none, or beyond reason.
    """
    size = float(as_number(value, what))
    if not 0 < size <= MAX_SIZE:
        raise Unfit(f"{what} is {size}, which no network has")
    return size


def as_plain(value: Any) -> Any:
    """Numbers, strings, and lists and dicts of them; whatever else becomes None.

    Raises:
        Unfit: more values than any settings have.
    """
    left = MAX_PLAIN

    def convert(value: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Unfit("its settings are nested or repeated beyond measure")
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, list | tuple):
            return [convert(item) for item in value]
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items() if isinstance(key, str)}
        return value if isinstance(value, str | bool | int | float) else None

    try:
        return convert(value)
    except RecursionError:
        raise Unfit("its settings are nested or repeated beyond measure") from None

#----------------------------------------------------------------------------
# Modules.

@dataclasses.dataclass(frozen=True, eq=False)
class ModuleRecord:
    """An object that the file describes: its class by name, and its attributes."""

    class_name: str
    state: dict[Any, Any]

    def get(self, name: str) -> Any:
        """An attribute.

        Raises:
            Unfit: there is none of this name.
        """
        if name not in self.state:
            raise Unfit(f"{self} lacks the attribute {name}")
        return self.state[name]

    def group(self, name: str) -> dict[str, Any]:
        """`_parameters`, `_buffers` or `_modules`; empty where there is none."""
        group = self.state.get(name)
        return {k: v for k, v in group.items() if isinstance(k, str)} if isinstance(group, dict) else {}

    def child(self, name: str) -> "ModuleRecord":
        """A module inside this one.

        Raises:
            Unfit: there is none of this name.
        """
        found = as_module(self.group("_modules").get(name))
        if found is None:
            raise Unfit(f"{self} lacks the module {name[:MAX_NAME]!a}")
        return found

    def tensors(self) -> dict[str, TensorRecord]:
        """Its own parameters and buffers, without those that state dicts leave out."""
        passing = self.state.get("_non_persistent_buffers_set")
        passing = passing if isinstance(passing, set | frozenset | list) else ()
        both = self.group("_parameters") | {k: v for k, v in self.group("_buffers").items() if k not in passing}
        return {name: value for name, value in both.items() if isinstance(value, TensorRecord)}

    def __str__(self) -> str:
        return ascii(self.class_name[:60])[1:-1] or "an object"


def as_module(node: Any) -> ModuleRecord | None:
    """The object behind a recorded construction; None for anything else.

    Persistent objects of the StyleGAN line keep attributes and class name in the argument of their construction,
    beside a source text that is left alone.
    """
    if not isinstance(node, Call):
        return None
    if node.calls("torch_utils.persistence", "_reconstruct_persistent_obj"):
        meta = node.args[0] if node.args else None
        if not isinstance(meta, dict) or not isinstance(meta.get("state"), dict):
            return None
        name = meta.get("class_name")
        return ModuleRecord(name if isinstance(name, str) else "", meta["state"])
    kind = node.function
    if node.calls("copyreg", "_reconstructor") and node.args:
        kind = node.args[0]
    state = node.state[0] if isinstance(node.state, tuple) and node.state else node.state   # (attributes, slots)
    return ModuleRecord(kind.name if isinstance(kind, Symbol) else "", state) if isinstance(state, dict) else None


def walk(root: ModuleRecord) -> Iterator[tuple[str, ModuleRecord]]:
    """(name with a trailing dot, module) of a module and all inside it, in the order of state dicts.

    Raises:
        Unfit: more of them, or deeper, than any network has.
    """
    pending, count = [("", root, 0)], 0
    while pending:
        prefix, module, depth = pending.pop()
        count += 1
        if count > MAX_MODULES or depth > MAX_DEPTH or len(prefix) > (depth + 1) * MAX_NAME:
            raise Unfit("its modules are nested or repeated beyond measure")
        yield prefix, module
        children = [(name, as_module(node)) for name, node in module.group("_modules").items()]
        pending.extend((f"{prefix}{name[:MAX_NAME]}.", child, depth + 1)
                       for name, child in reversed(children) if child is not None)


def state_records(root: ModuleRecord) -> dict[str, TensorRecord]:
    """A module's state dict, not yet read.

    Raises:
        Unfit: more tensors than any network has.
    """
    found: dict[str, TensorRecord] = {}
    for prefix, module in walk(root):
        own = module.tensors()
        if len(found) + len(own) > MAX_TENSORS:
            raise Unfit("its tensors are repeated beyond measure")
        found.update((f"{prefix}{name[:MAX_NAME]}", value) for name, value in own.items())
    return found


def load_tensors(records: dict[str, TensorRecord]) -> dict[str, torch.Tensor]:
    """Read tensors to the CPU, floating-point ones in single precision."""
    state = {name: record.load() for name, record in records.items()}
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}
