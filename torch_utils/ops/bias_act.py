# SPDX-License-Identifier: Apache-2.0
"""Bias, activation, gain and clamp in one call."""
import torch

from torch_utils.ops import dispatch
from torch_utils.ops.calls import Calls
from torch_utils.ops.native_forms import BiasActCall, bias_act_call, bias_act_native
from torch_utils.ops.reference import activation_funcs, bias_act_ref

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
    if torch.compiler.is_compiling():       # What is remembered between calls is no part of a graph.
        return _prepare(x, b, dim, act, alpha, gain, clamp, impl)(x, b)
    settings = dim, act, alpha, gain, clamp, impl
    key = x.shape, x.dtype, x.device, None if b is None else b.shape, settings
    call = _calls.find(key) or _calls.keep(key, _prepare(x, b, *settings), x, (), settings)
    return call(x, b)


_calls: Calls[BiasActCall] = Calls()


def _prepare(x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float | None, gain: float | None,
             clamp: float | None, impl: str) -> BiasActCall:
    """The arguments checked, the form chosen: the call for x and b of such shapes and types."""
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
    settings = (dim, act, spec.def_alpha if alpha is None else float(alpha),
                spec.def_gain if gain is None else float(gain), clamp)
    function = dispatch.select("bias_act", impl, x.device)
    if function is bias_act_native:
        return bias_act_call(x, *settings)
    return lambda x, b: function(x, b, *settings)

#----------------------------------------------------------------------------

dispatch.implements("bias_act", "ref")(bias_act_ref)
dispatch.implements("bias_act", "cpu")(bias_act_native)
dispatch.implements("bias_act", "cuda")(bias_act_native)
