# SPDX-License-Identifier: Apache-2.0
"""Streaming statistics of features: float64 moments and, on demand, the features themselves; reduced over processes."""
import numpy as np
import torch

from torch_utils import distributed

BLOCK_ROWS = 4096       # Rows per message when features travel to process 0.

#----------------------------------------------------------------------------

class Moments:
    """Count, sum and sum of outer products of feature rows, in float64.

    A float32 running mean would be off by 6e-6 per coordinate after 50,000 images; float64 sums are exact enough that
    batch size and number of processes do not show.
    """

    def __init__(self, num_features: int):
        self.num = 0
        self.total = torch.zeros(num_features, dtype=torch.float64)                     # [D]
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64)       # [D, D]

    def append(self, features: torch.Tensor) -> None:
        """Add rows [N, D]."""
        device = torch.device("cpu") if features.device.type == "mps" else features.device     # MPS has no float64.
        x = features.to(device).double()
        if self.total.device != device:
            self.total, self.outer = self.total.to(device), self.outer.to(device)
        self.num += len(x)
        self.total += x.sum(dim=0)
        self.outer.addmm_(x.T, x)

    def reduce(self, device: torch.device) -> None:
        """Sum over the processes; every process must call it, once, after its last `append`."""
        if distributed.world_size() > 1:
            count = torch.tensor([float(self.num)], dtype=torch.float64, device=device)
            self.num = int(distributed.all_reduce_sum(count))
            self.total = distributed.all_reduce_sum(self.total.to(device))
            self.outer = distributed.all_reduce_sum(self.outer.to(device))

    def mean(self) -> np.ndarray:
        """[D]."""
        return (self.total / self.num).cpu().numpy()

    def covariance(self, ddof: int = 0) -> np.ndarray:
        """[D, D], divided by `num - ddof`: 0 in the StyleGAN line of code, 1 in ADM's and most others."""
        mean = self.total / self.num
        covariance = self.outer / self.num - torch.outer(mean, mean)
        return (covariance * (self.num / (self.num - ddof))).cpu().numpy()

#----------------------------------------------------------------------------

class Rows:
    """Rows of a table of `num_rows` that the processes fill in parts; each row has its place, so order never varies."""

    def __init__(self, num_rows: int):
        self.num_rows = num_rows
        self._rows: list[torch.Tensor] = []
        self._places: list[np.ndarray] = []

    def append(self, places: np.ndarray, rows: torch.Tensor) -> None:
        """Set row `places[i]` of the table to `rows[i]` ([N, ...]; kept on the CPU)."""
        if len(places):
            self._rows.append(rows.detach().cpu())
            self._places.append(np.asarray(places, dtype=np.int64))

    def gather(self, device: torch.device) -> torch.Tensor | None:
        """The whole table [num_rows, ...] on process 0, None on the others; every process must call it.

        Raises:
            RuntimeError: the processes together did not fill the table.
        """
        mine = torch.cat(self._rows) if self._rows else None
        places = np.concatenate(self._places) if self._places else np.zeros(0, dtype=np.int64)
        layout = None if mine is None else (tuple(mine.shape[1:]), mine.dtype)
        layouts = distributed.all_gather_object(layout)
        all_places = distributed.all_gather_object(places)
        shape, dtype = next(x for x in layouts if x is not None)
        table = torch.empty([self.num_rows, *shape], dtype=dtype) if distributed.rank() == 0 else None
        if sum(len(x) for x in all_places) != self.num_rows:
            raise RuntimeError(f"{sum(len(x) for x in all_places)} rows were collected, {self.num_rows} expected")
        for src, src_places in enumerate(all_places):
            for start in range(0, len(src_places), BLOCK_ROWS):
                where = torch.from_numpy(src_places[start : start + BLOCK_ROWS])
                if src == 0 and table is not None:
                    table[where] = mine[start : start + BLOCK_ROWS]
                elif src > 0:
                    # Only a broadcast reaches process 0 with every backend; the others drop what they get.
                    block = torch.empty([len(where), *shape], dtype=dtype, device=device)
                    if distributed.rank() == src:
                        block.copy_(mine[start : start + BLOCK_ROWS])
                    distributed.broadcast(block, src=src)
                    if table is not None:
                        table[where] = block.cpu()
        self._rows, self._places = [], []
        return table
