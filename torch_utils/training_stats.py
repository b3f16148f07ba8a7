# SPDX-License-Identifier: Apache-2.0
"""Statistics that are reported by name from anywhere and reduced over processes once per tick.

Reporting adds three numbers on the device of the value (count, sum, sum of squares) and never waits for it;
only `Collector.update` brings numbers to the host.
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
        self._moments: dict[str, torch.Tensor] = {}

    def report(self, name: str, value: torch.Tensor | float) -> None:
        """Add all elements of `value` to statistic `name`. No host synchronisation."""
        if not isinstance(value, torch.Tensor):
            value = torch.tensor(value, dtype=torch.float64)
        x = value.detach().flatten()
        x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
        moments = torch.stack([torch.full_like(x.sum(), x.numel()), x.sum(), x.square().sum()])
        old = self._moments.get(name)
        self._moments[name] = moments if old is None else old.to(moments.device) + moments

    def update(self) -> dict[str, Stat]:
        """Reduce everything reported since the last call over all processes; start a new interval.

        Every process must call it. Statistics without a value are left out.
        """
        names = sorted(set().union(*distributed.all_gather_object(sorted(self._moments))))
        if not names:
            return {}
        zero = torch.zeros(3, dtype=torch.float64)
        table = torch.stack([self._moments[n].cpu().double() if n in self._moments else zero for n in names])
        table = distributed.all_reduce_sum(table.to(distributed.device())).cpu()
        self._moments = {}
        stats = {}
        for name, (num, total, squares) in zip(names, table.tolist(), strict=True):
            if num > 0:
                mean = total / num
                stats[name] = Stat(int(num), mean, math.sqrt(max(squares / num - mean * mean, 0.0)))
        return stats
