# SPDX-License-Identifier: Apache-2.0
"""Statistics that are reported by name from anywhere and reduced over processes once per tick.

Reporting adds two numbers on the device of the value (sum, sum of squares), counts on the host, and never waits;
only `Collector.update` brings numbers to the host, in one copy.
"""
import dataclasses
import math
from typing import Any

import torch

from torch_utils import distributed


@dataclasses.dataclass(frozen=True)
class Stat:
    """Moments of one statistic over an interval."""

    num: int
    mean: float
    std: float

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Collector:
    """Gathers statistics between two calls of `update`."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._sums: dict[str, torch.Tensor] = {}        # [2]: of the values, and of their squares.

    def report(self, name: str, value: torch.Tensor | float) -> None:
        """Add all elements of `value` to statistic `name`. No host synchronisation."""
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        x = value.detach().flatten()
        x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
        sums = torch.stack([x.sum(), x.square().sum()])
        old = self._sums.get(name)
        self._sums[name] = sums if old is None else old.to(sums.device) + sums
        self._counts[name] = self._counts.get(name, 0) + x.numel()

    def update(self) -> dict[str, Stat]:
        """Reduce everything reported since the last call over all processes; start a new interval.

        Every process must call it. Statistics without a value are left out.
        """
        names = sorted(set().union(*distributed.all_gather_object(sorted(self._sums))))
        if not names:
            return {}
        sums = self._on_host()
        rows = [[self._counts.get(name, 0), *sums.get(name, (0.0, 0.0))] for name in names]
        table = torch.tensor(rows, dtype=torch.float64)
        table = distributed.all_reduce_sum(table.to(distributed.device())).cpu()
        self._counts, self._sums = {}, {}
        stats = {}
        for name, (num, total, squares) in zip(names, table.tolist(), strict=True):
            if num > 0:
                mean = total / num
                stats[name] = Stat(int(num), mean, math.sqrt(max(squares / num - mean * mean, 0.0)))
        return stats

    def _on_host(self) -> dict[str, list[float]]:
        """The sums; each device is waited for once."""
        found: dict[str, list[float]] = {}
        for device in {sums.device for sums in self._sums.values()}:
            here = [name for name, sums in self._sums.items() if sums.device == device]
            table = torch.stack([self._sums[name] for name in here]).tolist()
            found |= dict(zip(here, table, strict=True))
        return found
