# SPDX-License-Identifier: Apache-2.0
"""Native code against the definitions, on the machine where it will run: once per process, before it is trusted."""
import functools
from collections.abc import Callable

import torch

from torch_utils.ops import strips
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import upfirdn2d

Call = Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor]       # (x, b, form of the operation) -> y.

# Of the largest value. A wrong index gives errors near 1.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def find_fault(kind: str) -> str | None:
    """Runs all operations with their gradients on small inputs: where native code goes wrong, or None.

    Half precision is checked on GPUs only: processors compute in it nowhere by default.
    """
    for dtype in (torch.float32, torch.float16) if kind == "cuda" else (torch.float32,):
        for name, call in _CALLS.items():
            fault = _compare(name, call, kind, dtype)
            if fault is not None:
                return fault
    return None


def find_fault_of_strips(kind: str, family: str, dtype: torch.dtype) -> str | None:
    """The same for the layers that the fast programs of one family and type are for (`torch_utils.ops.strips`)."""
    for layer in strips.KINDS.values():
        if layer.family == family and not layer.is_gradient:
            fault = _compare(f"filtered_lrelu {layer.describe()}", functools.partial(_recipe_layer, layer), kind, dtype)
            if fault is not None:
                return fault
    return None


def _compare(name: str, call: Call, kind: str, dtype: torch.dtype) -> str | None:
    native, want = (_run(call, kind, dtype, impl) for impl in (kind, "ref"))
    for what, a, b in zip(("result", "gradient of x", "gradient of b"), native, want, strict=True):
        error = float((a.double().cpu() - b).abs().max() / b.abs().max())
        if not error <= TOLERANCE[dtype]:
            return f"{name}, {str(dtype).removeprefix('torch.')}: {what} differs by {error:.1e}"
    return None


def _recipe_layer(layer: strips.Strips, x: torch.Tensor, b: torch.Tensor, impl: str) -> torch.Tensor:
    def taps(count: int, is_radial: bool) -> torch.Tensor:
        f = torch.hann_window(count + 2, periodic=False, dtype=torch.float32, device=x.device)[1:-1]
        f = f / f.sum()
        return f.outer(f) + f.square().outer(f.square()) if is_radial else f     # The sum is not separable.
    low = layer.phase + 4 * layer.up        # Any that has the phase.
    padding = low, low - 1, low + layer.up, low
    return filtered_lrelu(x, taps(layer.up_taps, layer.up_radial), taps(layer.down_taps, layer.down_radial), b,
                          up=layer.up, down=layer.down, padding=padding, clamp=0.9, impl=impl)


def _layer(x: torch.Tensor, b: torch.Tensor, impl: str) -> torch.Tensor:
    """On GPUs the general program does it: no fast one has this phase (`find_fault_of_strips` checks those)."""
    taps = torch.hann_window(14, periodic=False, dtype=torch.float32, device=x.device)[1:-1]
    return filtered_lrelu(x, taps / taps.sum(), taps / taps.sum(), b, up=2, down=2, padding=(10, 8, 7, 9), clamp=0.9,
                          impl=impl)


def _resample(x: torch.Tensor, b: torch.Tensor, impl: str) -> torch.Tensor:
    taps = torch.arange(1, 6, dtype=torch.float32, device=x.device) / 15
    return upfirdn2d(x + b[:, None, None], taps, up=2, down=3, padding=(4, 3, 2, 5), gain=4, impl=impl)


def _activate(x: torch.Tensor, b: torch.Tensor, impl: str) -> torch.Tensor:
    return bias_act(x, b, act="lrelu", clamp=0.9, impl=impl)


_CALLS = {"filtered_lrelu": _layer, "upfirdn2d": _resample, "bias_act": _activate}


def _run(call: Call, kind: str, dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
    """[result, gradient of x, gradient of b]; the definition runs in float64 on the processor."""
    with torch.inference_mode(False), torch.enable_grad():      # Whatever the caller is in the middle of.
        return _gradients(call, kind, dtype, impl)


def _gradients(call: Call, kind: str, dtype: torch.dtype, impl: str) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in ([2, 19, 21, 23], [19])]
    place = {"device": "cpu", "dtype": torch.float64} if impl == "ref" else {"device": kind, "dtype": dtype}
    x, b = (t.to(**place).requires_grad_() for t in inputs)
    y = call(x, b, impl)
    weights = torch.randn(y.shape, generator=generator, device="cpu").to(dtype).to(**place)
    return [y.detach(), *torch.autograd.grad(y, [x, b], weights)]
