# SPDX-License-Identifier: Apache-2.0
"""Where a program would stop for a GPU, found without one: on the device "meta", which has no data."""
import traceback
from pathlib import Path

import torch


class HostNumbers(torch.overrides.TorchFunctionMode):
    """Notes where numbers of the host are handed to tensors on "meta": on a GPU each such copy waits for the GPU.

    They come as arguments of torch.tensor, as lists and tensors that are indices, and as tensors beside others.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if self._is_copy(name, args, result):
            frames = [f for f in traceback.extract_stack() if "site-packages" not in f.filename]
            self.found.append(f"{name} in {Path(frames[-2].filename).name}: {frames[-2].line}")
        return result

    def _is_copy(self, name: str, args: tuple, result: object) -> bool:
        if not (isinstance(result, torch.Tensor) and result.device.type == "meta"):
            return False
        if name in ("tensor", "as_tensor", "asarray"):
            return True
        if name in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            return any(isinstance(i, list) or self._is_on_host(i) for i in index)
        return any(self._is_on_host(value) for value in args)

    def _is_on_host(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.ndim > 0
