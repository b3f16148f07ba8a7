# SPDX-License-Identifier: Apache-2.0
"""Native code against the definitions, on the machine where it will run: once per process, before it is trusted.

It compares forms with each other and does not know how one is chosen: `dispatch` asks, and acts on what is found.
"""
import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from dnnlib.util import first_line
from torch_utils.ops import strips
from torch_utils.ops.descriptions import Strips
from torch_utils.ops.native_forms import bias_act_native, filtered_lrelu_native, upfirdn2d_native
from torch_utils.ops.reference import bias_act_ref, filtered_lrelu_ref, upfirdn2d_ref

Form = Callable[..., torch.Tensor]


class Call(NamedTuple):
    """A call of an operation: its two forms, and how one of them is called."""

    native: Form
    ref: Form
    run: Callable[[Form, torch.Tensor, torch.Tensor], torch.Tensor]     # (form, x, b) -> y.


# Shares of the largest value. A wrong index gives errors near 1.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def find_fault(kind: str) -> str | None:
    """Runs all operations with their gradients on small inputs: where native code goes wrong, or None.

    Half precision is checked on GPUs only: processors compute in it nowhere by default.
    """
    dtypes = (torch.float32, torch.float16) if kind == "cuda" else (torch.float32,)
    return _first_fault((name, call, kind, dtype) for dtype in dtypes for name, call in _CALLS.items())


def find_fault_of_strips(kind: str, family: str, dtype: torch.dtype) -> str | None:
    """The same for the layers that the fast programs of one family and type are for (`torch_utils.ops.strips`)."""
    layers = [layer for layer in strips.KINDS.values() if layer.family == family and not layer.is_gradient]
    return _first_fault((f"filtered_lrelu {layer.describe()}", _layer_call(functools.partial(_recipe_layer, layer)),
                         kind, dtype) for layer in layers)


def _first_fault(comparisons: Iterable[tuple[str, Call, str, torch.dtype]]) -> str | None:
    try:
        return next((fault for comparison in comparisons if (fault := _compare(*comparison)) is not None), None)
    except RuntimeError as error:       # Native code says itself that it failed.
        return first_line(error)


def _compare(name: str, call: Call, kind: str, dtype: torch.dtype) -> str | None:
    native, want = (_run(call, kind, dtype, form) for form in (call.native, call.ref))
    for what, a, b in zip(("result", "gradient of x", "gradient of b"), native, want, strict=True):
        error = float((a.double().cpu() - b).abs().max() / b.abs().max())
        if not error <= TOLERANCE[dtype]:
            return f"{name}, {str(dtype).removeprefix('torch.')}: {what} differs by {error:.1e}"
    return None


def _recipe_layer(layer: Strips, form: Form, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    def taps(count: int, is_radial: bool) -> torch.Tensor:
        f = torch.hann_window(count + 2, periodic=False, dtype=torch.float32, device=x.device)[1:-1]
        f = f / f.sum()
        return f.outer(f) + f.square().outer(f.square()) if is_radial else f     # The sum is not separable.
    low = layer.phase + 4 * layer.up        # Any that has the phase.
    padding = low, low - 1, low + layer.up, low
    return form(x, taps(layer.up_taps, layer.up_radial), taps(layer.down_taps, layer.down_radial), b, layer.up,
                layer.down, padding, *_SETTINGS)


def _layer(form: Form, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """On GPUs the general program does it: no fast one has this phase (`find_fault_of_strips` checks those)."""
    taps = torch.hann_window(14, periodic=False, dtype=torch.float32, device=x.device)[1:-1]
    return form(x, taps / taps.sum(), taps / taps.sum(), b, 2, 2, (10, 8, 7, 9), *_SETTINGS)


def _resample(form: Form, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    taps = torch.arange(1, 6, dtype=torch.float32, device=x.device) / 15
    return form(x + b[:, None, None], taps, (2, 2), (3, 3), (4, 3, 2, 5), False, 4.0)


def _activate(form: Form, x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return form(x, b, 1, "lrelu", 0.2, math.sqrt(2), 0.9)


_SETTINGS = math.sqrt(2), 0.2, 0.9, False       # gain, slope, clamp and flip_filter of a layer.
_layer_call = functools.partial(Call, filtered_lrelu_native, filtered_lrelu_ref)
_CALLS = {"filtered_lrelu": _layer_call(_layer), "upfirdn2d": Call(upfirdn2d_native, upfirdn2d_ref, _resample),
          "bias_act": Call(bias_act_native, bias_act_ref, _activate)}


def _run(call: Call, kind: str, dtype: torch.dtype, form: Form) -> list[torch.Tensor]:
    """[result, gradient of x, gradient of b]; the definition runs in float64 on the processor."""
    with torch.inference_mode(False), torch.enable_grad():      # Whatever the caller is in the middle of.
        return _gradients(call, kind, dtype, form)


def _gradients(call: Call, kind: str, dtype: torch.dtype, form: Form) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, device="cpu").to(dtype) for shape in ([2, 19, 21, 23], [19])]
    place = ("cpu", torch.float64) if form is call.ref else (kind, dtype)
    x, b = (t.to(*place).requires_grad_() for t in inputs)
    y = call.run(form, x, b)
    weights = torch.randn(y.shape, generator=generator, device="cpu").to(dtype).to(*place)
    return [y.detach(), *torch.autograd.grad(y, [x, b], weights)]
