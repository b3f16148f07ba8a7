# SPDX-License-Identifier: Apache-2.0
"""Streaming statistics of features: float64 moments and, on demand, the features themselves; reduced over processes."""
import numpy as np
import torch

from torch_utils import distributed

MOMENT_ROWS = 512       # Rows per matrix product.
MOMENT_COLUMNS = 512    # Its columns: the smaller, the less of the lower triangle is computed in vain.
BLOCK_ROWS = 4096       # Rows per copy to the CPU, and per message when features travel to process 0.

#----------------------------------------------------------------------------

class Moments:
    """Count, sum and sum of outer products of feature rows, in float64.

    A float32 running mean would be off by 6e-6 per coordinate after 50,000 images; float64 sums are exact enough that
    batch size and number of processes do not show.

    Rows are added in runs of `MOMENT_ROWS`, because a matrix product with fewer is bound by memory, and only on and
    above the diagonal, because the rest is the same. Where a run ends depends on the number of rows alone.
    """

    def __init__(self, num_features: int):
        self.num = 0
        self._total = torch.zeros(num_features, dtype=torch.float64)                    # [D]
        self._outer = torch.zeros(num_features, num_features, dtype=torch.float64)      # [D, D], upper blocks only
        self._run = torch.empty(0, num_features, dtype=torch.float64)                   # [MOMENT_ROWS, D]
        self._waiting = 0                                                               # Rows of it that are filled.

    def append(self, features: torch.Tensor) -> None:
        """Add rows [N, D]. Nothing waits for the device."""
        if not len(self._run):
            device = torch.device("cpu") if features.device.type == "mps" else features.device     # No float64 there.
            self._total, self._outer = self._total.to(device), self._outer.to(device)
            self._run = torch.empty(MOMENT_ROWS, len(self._total), dtype=torch.float64, device=device)
        while len(features):
            taken = features[: MOMENT_ROWS - self._waiting]
            self._run[self._waiting : self._waiting + len(taken)] = taken
            self._waiting += len(taken)
            self.num += len(taken)
            features = features[len(taken) :]
            if self._waiting == MOMENT_ROWS:
                self._add_run()

    def _add_run(self) -> None:
        """Add the rows that wait."""
        x = self._run[: self._waiting]
        self._total += x.sum(dim=0)
        for start in range(0, x.shape[1], MOMENT_COLUMNS):
            end = start + MOMENT_COLUMNS
            self._outer[start:end, start:].addmm_(x[:, start:end].T, x[:, start:])
        self._waiting = 0

    def reduce(self, device: torch.device) -> None:
        """Sum over the processes; every process must call it, once, after its last `append`."""
        self._add_run()
        if distributed.world_size() > 1:
            count = torch.tensor([float(self.num)], dtype=torch.float64, device=device)
            self.num = int(distributed.all_reduce_sum(count))
            self._total = distributed.all_reduce_sum(self._total.to(device))
            self._outer = distributed.all_reduce_sum(self._outer.to(device))

    def mean(self) -> np.ndarray:
        """[D]."""
        self._add_run()
        return (self._total / self.num).cpu().numpy()

    def covariance(self, ddof: int = 0) -> np.ndarray:
        """[D, D], divided by `num - ddof`: 0 in the StyleGAN line of code, 1 in ADM's and most others."""
        self._add_run()
        mean = self._total / self.num
        outer = self._outer.triu() + self._outer.triu(diagonal=1).T
        covariance = outer.div_(self.num).sub_(torch.outer(mean, mean))
        return covariance.mul_(self.num / (self.num - ddof)).cpu().numpy()

#----------------------------------------------------------------------------

class Rows:
    """Rows of a table of `num_rows` that the processes fill in parts; each row has its place, so order never varies.

    Process 0 fills the table itself, so that the rows are in memory once.
    """

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self._table: torch.Tensor | None = None                         # On process 0.
        self._filled: list[np.ndarray] = []                             # Places that are.
        self._parts: list[tuple[np.ndarray, torch.Tensor]] = []         # On the others: at most BLOCK_ROWS rows each.
        self._waiting: list[tuple[np.ndarray, torch.Tensor]] = []       # Not copied to the CPU yet.

    def append(self, places: np.ndarray, rows: torch.Tensor) -> None:
        """Set row `places[i]` of the table to `rows[i]` ([N, ...], N at most `BLOCK_ROWS`)."""
        if sum(len(x) for x, _rows in self._waiting) + len(places) > BLOCK_ROWS:
            self._settle()
        if len(places):
            self._waiting.append((np.asarray(places, dtype=np.int64), rows.detach()))

    def _settle(self) -> None:
        """Copy what waits to the CPU. Not after each batch: the copy waits for the device."""
        if not self._waiting:
            return
        places = np.concatenate([places for places, _rows in self._waiting])
        rows = torch.cat([rows for _places, rows in self._waiting]).cpu()
        self._waiting = []
        if distributed.rank() == 0:
            if self._table is None:
                self._table = torch.empty([self.num_rows, *rows.shape[1:]], dtype=rows.dtype)
            self._table[torch.from_numpy(places)] = rows
            self._filled.append(places)
        else:
            self._parts.append((places, rows))

    def gather(self, device: torch.device) -> torch.Tensor | None:
        """The whole table [num_rows, ...] on process 0, None on the others; every process must call it, once.

        Raises:
            RuntimeError: the processes together did not fill the table.
        """
        self._settle()
        mine = [part for _places, part in self._parts] if self._table is None else [self._table]
        layouts = distributed.all_gather_object((tuple(mine[0].shape[1:]), mine[0].dtype) if mine else None)
        filled = distributed.all_gather_object(self._filled + [places for places, _part in self._parts])
        count = sum(len(places) for process in filled for places in process)
        if count != self.num_rows:
            raise RuntimeError(f"{count} rows were collected, {self.num_rows} expected")
        shape, dtype = next(x for x in layouts if x is not None)
        table = self._table
        if distributed.rank() == 0 and table is None:
            table = torch.empty([self.num_rows, *shape], dtype=dtype)
        for src in range(1, distributed.world_size()):
            for i, places in enumerate(filled[src]):
                # Only a broadcast reaches process 0 with every backend; the others drop what they get.
                block = torch.empty([len(places), *shape], dtype=dtype, device=device)
                if distributed.rank() == src:
                    block.copy_(self._parts[i][1])
                distributed.broadcast(block, src=src)
                if table is not None:
                    table[torch.from_numpy(places)] = block.cpu()
        self._table, self._filled, self._parts = None, [], []
        return table
