# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain and clamp in one call."""
import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_utils.ops import dispatch, library, native

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Activation:
    """A nonlinearity and the settings that it takes when the caller gives none."""

    func: Callable[[torch.Tensor, float], torch.Tensor]     # (x, alpha) -> activated x.
    def_alpha: float = 0.0                                  # Slope of the negative part, where there is one.
    def_gain: float = 1.0                                   # Keeps the variance of a normal input about the same.


activation_funcs: dict[str, Activation] = {
    "linear":   Activation(lambda x, alpha: x),
    "relu":     Activation(lambda x, alpha: F.relu(x), def_gain=math.sqrt(2)),
    "lrelu":    Activation(lambda x, alpha: F.leaky_relu(x, alpha), def_alpha=0.2, def_gain=math.sqrt(2)),
    "tanh":     Activation(lambda x, alpha: torch.tanh(x)),
    "sigmoid":  Activation(lambda x, alpha: torch.sigmoid(x)),
    "elu":      Activation(lambda x, alpha: F.elu(x)),
    "selu":     Activation(lambda x, alpha: F.selu(x)),
    "softplus": Activation(lambda x, alpha: F.softplus(x)),
    "swish":    Activation(lambda x, alpha: torch.sigmoid(x) * x, def_gain=math.sqrt(2)),
}

#----------------------------------------------------------------------------

def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """`clamp(act(x + b) * gain)`, differentiable to any order in `x` and `b`.

    Args:
        x: Any shape, floating point.
        b: [x.shape[dim]], cast to the type of `x`; None adds nothing.
        dim: The dimension of `x` that `b` runs along. Without `b` it is not looked at.
        act: A key of `activation_funcs`.
        alpha: Slope of the negative part ('lrelu' only); None takes the activation's own.
        gain: Factor after the activation; None takes the activation's own.
        clamp: Bound of the result's magnitude; None for no bound.
        impl: See `dispatch.select`.

    Returns:
        A tensor of the shape and type of `x`.

    Raises:
        ValueError: `act` or `impl` is not known, `b` does not fit, or `clamp` is negative.
    """
    if act not in activation_funcs:
        raise ValueError(f"act={act!r}: choose from {', '.join(activation_funcs)}")
    if clamp is not None and not clamp >= 0:
        raise ValueError(f"clamp={clamp}: must be at least 0, or None")
    if b is not None:
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"dim={dim}: x has {x.ndim} dimensions")
        if b.ndim != 1 or b.shape[0] != x.shape[dim]:
            raise ValueError(f"b of shape {list(b.shape)}: x of shape {list(x.shape)} takes [{x.shape[dim]}] "
                             f"along dim={dim}")
    spec = activation_funcs[act]
    alpha = spec.def_alpha if alpha is None else float(alpha)
    gain = spec.def_gain if gain is None else float(gain)
    return dispatch.select("bias_act", impl, x.device)(x, b, dim, act, alpha, gain, clamp)

#----------------------------------------------------------------------------

@dispatch.implements("bias_act", "ref")
def _bias_act_ref(
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> torch.Tensor:
    if b is not None:
        x = x + b.to(x.dtype).reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    x = activation_funcs[act].func(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x


@dispatch.implements("bias_act", "cuda")
@dispatch.implements("bias_act", "cpu")
def _bias_act_native(
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> torch.Tensor:
    """One pass over the values."""
    library.check_size("bias_act", x.numel())
    b = None if b is None else b.to(x.dtype)
    return library.bias_act(x, b, native_plan(dim % max(x.ndim, 1), act, alpha, gain, clamp))


@torch.compiler.disable
@functools.lru_cache(maxsize=native.MAX_PLANS)
def native_plan(dim: int, act: str, alpha: float, gain: float, clamp: float | None) -> native.BiasActPlan:
    """What native code is told of an activation."""
    return native.BiasActPlan(dim, library.ACTS.index(act), alpha, gain, math.inf if clamp is None else float(clamp))
