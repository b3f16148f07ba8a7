# SPDX-License-Identifier: Apache-2.0
"""Class vectors that were computed from images once and are needed again: kept beside the data, or in the cache.

A table is known by all that decides its numbers: content and labels of the data, weights of the network, the settings,
and the libraries, whose rounding may change. A file that says something else, or whose table is damaged, is made anew.
"""
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from dnnlib import UserError
from dnnlib.download import cache_dir
from dnnlib.util import atomic_file, first_line
from torch_utils.weights import open_safetensors, read_header, read_weights, safetensors_bytes

FORMAT = "stylesan-xl/class-vectors/1"
TABLE = "embedding"

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class KeptVectors:
    """The places where the class vectors of a data set may lie."""

    facts: dict[str, str]       # What decides the numbers.
    data: Path                  # The archive or folder of the images.

    def places(self) -> list[Path]:
        """Files, the best one first. The name begins with a dot, so nobody takes the file for a part of the data."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
        data = Path(os.path.abspath(self.data))
        name = f".{data.name}.class-vectors-{digest}.safetensors"
        return [data.parent / name, cache_dir() / "class-vectors" / name]

    def read(self, say: Callable[[str], None]) -> torch.Tensor | None:
        """The table [c_dim, width], if a place has it whole; a damaged file is told of."""
        for path in self.places():
            if not path.is_file():
                continue
            try:
                table = self._checked(path)
            except (UserError, OSError) as err:
                say(f"    class vectors: {path} is made anew: {first_line(err)}")
                continue
            say(f"    class vectors: taken from {path}, where they were kept")
            return table
        return None

    def _checked(self, path: Path) -> torch.Tensor:
        with open_safetensors(path) as file:
            header = read_header(path, file, FORMAT, "its content is not what was kept")
        table = read_weights(path).get(TABLE)
        if table is None or table.dtype != torch.float32 or table.ndim != 2 or header != self._header(table):
            raise UserError(f"{path}: its content is not what was kept")
        return table

    def _header(self, table: torch.Tensor) -> dict[str, str]:
        content = hashlib.sha256(table.contiguous().numpy().tobytes())
        return {"format": FORMAT, **self.facts, "table": content.hexdigest()}

    def keep(self, table: torch.Tensor, say: Callable[[str], None]) -> None:
        """Write the table to the first place that can be written to."""
        content, problem = safetensors_bytes({TABLE: table}, self._header(table)), ""
        for path in self.places():
            try:
                with atomic_file(path) as file:
                    file.write(content)
            except OSError as err:
                problem = f"{path}: {err.strerror or err}"
                continue
            say(f"    class vectors: kept in {path} for the next run")
            return
        say(f"    class vectors: not kept for the next run ({problem})")
