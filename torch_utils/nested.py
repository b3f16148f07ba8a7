# SPDX-License-Identifier: Apache-2.0
"""Values in nested dicts, lists and tuples, as states and snapshots are."""
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of what is no dict, list or tuple, from left to right; names are such as 'G.layers.0'."""
    if isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def map_leaves(function: Callable[[Any], Any], value: Any) -> Any:
    """The same nesting with `function` of each leaf, from left to right."""
    if isinstance(value, dict):
        return {key: map_leaves(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(function, item) for item in value)
    return function(value)


def copy_to_cpu(value: Any) -> Any:
    """The same nesting with every tensor copied to the CPU."""
    return map_leaves(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, torch.Tensor) else x, value)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors."""
    return sum(x.nbytes for _, x in leaves(value) if isinstance(x, torch.Tensor))


def first_nonfinite(value: Any) -> str | None:
    """Name of the first tensor that is not finite, such as 'G.mapping.fc0.weight'; None: all are finite.

    One reduction per tensor, on the device where it is; one read per device.
    """
    extremes: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, x in leaves(value):
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
            # One of both is NaN or infinite if any element is, and they need no memory. (Sums may overflow.)
            extremes.setdefault(x.device, {})[name] = torch.stack(torch.aminmax(x.detach())).float()
    bad = set()
    for found in extremes.values():
        finite = torch.stack(list(found.values())).isfinite().all(dim=1).tolist()
        bad |= {name for name, is_finite in zip(found, finite, strict=True) if not is_finite}
    return next((name for name, _ in leaves(value) if name in bad), None)
