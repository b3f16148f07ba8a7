# SPDX-License-Identifier: Apache-2.0
"""The native operations as PyTorch sees them: types, shapes and layouts of results, and gradients.

A resampler's gradient is a resampler. The derivative of the filtered leaky ReLU is linear and built alike: filter,
multiply by the recorded slope, filter; so is the gradient of that. Both operations are therefore closed under
differentiation. Bias and activation have derivatives up to the second order; above, plain PyTorch takes over.

What PyTorch knows as operations is the bare computation (`stylesan::...`): a tensor or two and the number of a plan, so
that a call costs microseconds. Gradients are functions of autograd around them.
"""
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from torch_utils.ops import native
from torch_utils.ops.descriptions import (
    ACTIVATE,
    ACTS,
    READ_CODES,
    BiasActPlan,
    LayerPlan,
    ResamplingPlan,
    plan_of,
)
from torch_utils.ops.reference import bias_act_ref

STRAIGHT = ACTS[:3]     # Made of straight lines: no second derivative.

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library("stylesan", "DEF")


def _operation(schema: str, fake: Callable[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: the function below becomes the operation `schema` on processors and GPUs.

    Args:
        schema: Name, arguments and results.
        fake: Makes results of the same sizes and layouts where there is no data.
    """
    def define(function: Callable[P, R]) -> Callable[P, R]:
        name = schema.partition("(")[0]
        _library.define(schema)
        for kind in ("CPU", "CUDA"):
            _library.impl(name, function, kind)
        # Autograd passes by: it would only find out at every call that nobody has told it of a gradient.
        _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(f"stylesan::{name}", fake, lib=_library)
        operation: Callable[P, R] = getattr(torch.ops.stylesan, name).default
        return operation
    return define

#----------------------------------------------------------------------------
def _needs_gradient(x: torch.Tensor, b: torch.Tensor | None = None, g: torch.Tensor | None = None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or b is not None and b.requires_grad
                                        or g is not None and g.requires_grad)

#----------------------------------------------------------------------------
# Resampling.

@_operation("resample(Tensor x, int plan) -> Tensor",
            lambda x, plan: native.new_result(x, plan_of(plan, ResamplingPlan)))
def _resample(x: torch.Tensor, plan: int) -> torch.Tensor:
    return native.resample(x, plan_of(plan, ResamplingPlan))


class _Resample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, plan: ResamplingPlan) -> torch.Tensor:
        ctx.plan = plan
        return _resample(x, plan.number)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return resample(grad, ctx.plan.transposed), None


def resample(x: torch.Tensor, plan: ResamplingPlan) -> torch.Tensor:
    """x [N, C, H, W] -> [N, C, H', W']."""
    if not _needs_gradient(x):
        return _resample(x, plan.number)
    y: torch.Tensor = _Resample.apply(x, plan)
    return y

#----------------------------------------------------------------------------
# Filtered leaky ReLU.

@_operation("filtered_lrelu(Tensor x, Tensor? b, int plan) -> Tensor",
            lambda x, b, plan: native.new_result(x, plan_of(plan, LayerPlan)))
def _layer(x: torch.Tensor, b: torch.Tensor | None, plan: int) -> torch.Tensor:
    """down(clamp(lrelu(up(x + b))))."""
    return native.filtered_lrelu(x, b, plan_of(plan, LayerPlan), ACTIVATE, None)


def _fake_layer_and_codes(x: torch.Tensor, b: torch.Tensor | None, plan: int) -> tuple[torch.Tensor, torch.Tensor]:
    return native.new_result(x, plan_of(plan, LayerPlan)), native.new_codes(x, plan_of(plan, LayerPlan))


@_operation("filtered_lrelu_and_codes(Tensor x, Tensor? b, int plan) -> (Tensor, Tensor)", _fake_layer_and_codes)
def _layer_and_codes(x: torch.Tensor, b: torch.Tensor | None, plan: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, and the codes of the slopes for the gradient."""
    return native.filtered_lrelu_and_codes(x, b, plan_of(plan, LayerPlan))


@_operation("filtered_lrelu_slopes(Tensor v, Tensor codes, int plan) -> Tensor",
            lambda v, codes, plan: native.new_result(v, plan_of(plan, LayerPlan)))
def _slopes(v: torch.Tensor, codes: torch.Tensor, plan: int) -> torch.Tensor:
    """down(slopes * up(v)), with the slopes that the codes stand for: linear in v."""
    return native.filtered_lrelu(v, None, plan_of(plan, LayerPlan), READ_CODES, codes)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, b: torch.Tensor | None, plan: LayerPlan) -> torch.Tensor:
        y, codes = _layer_and_codes(x, b, plan.number)
        ctx.save_for_backward(codes)
        ctx.plan = plan
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        codes, = ctx.saved_tensors
        plan: LayerPlan = ctx.plan.transposed
        # The first of these goes a shorter way, for a gradient that nobody takes another one of.
        dx = filtered_lrelu_slopes(grad, codes, plan) if torch.is_grad_enabled() else _slopes(grad, codes, plan.number)
        return dx, dx.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[1] else None, None


class _Slopes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, v: torch.Tensor, codes: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
        ctx.save_for_backward(codes)
        ctx.plan = plan
        return _slopes(v, codes, plan.number)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, = ctx.saved_tensors
        return filtered_lrelu_slopes(grad, codes, ctx.plan.transposed), None, None


def filtered_lrelu(x: torch.Tensor, b: torch.Tensor | None, plan: LayerPlan) -> torch.Tensor:
    """down(clamp(lrelu(up(x + b)))), x [N, C, H, W], b [C] of its type; codes are kept for gradients only."""
    if not (torch.is_grad_enabled() and (x.requires_grad or b is not None and b.requires_grad)):
        return _layer(x, b, plan.number)
    y: torch.Tensor = _Layer.apply(x, b, plan)
    return y


def filtered_lrelu_slopes(v: torch.Tensor, codes: torch.Tensor, plan: LayerPlan) -> torch.Tensor:
    """The derivative of the layer that recorded the codes, or its transpose, by `plan`."""
    if not _needs_gradient(v):
        return _slopes(v, codes, plan.number)
    y: torch.Tensor = _Slopes.apply(v, codes, plan)
    return y

#----------------------------------------------------------------------------
# Bias and activation.

def _run_bias_act(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor | None, plan: int,
                  order: int) -> torch.Tensor:
    x = native.dense(x)
    return native.bias_act(x, None if b is None else b.contiguous(), None if g is None else _like(g, x),
                           plan_of(plan, BiasActPlan), order)


def _like(x: torch.Tensor, layout: torch.Tensor) -> torch.Tensor:
    """x in the memory layout of another tensor of its shape."""
    return x if x.stride() == layout.stride() else torch.empty_like(layout).copy_(x)


@_operation("bias_act(Tensor x, Tensor? b, int plan) -> Tensor", lambda x, b, plan: torch.empty_like(native.dense(x)))
def _bias_act(x: torch.Tensor, b: torch.Tensor | None, plan: int) -> torch.Tensor:
    return _run_bias_act(x, b, None, plan, 0)


@_operation("bias_act_derivative(Tensor x, Tensor? b, Tensor g, int plan, int order) -> Tensor",
            lambda x, b, g, plan, order: torch.empty_like(native.dense(x)))
def _derivative(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor, plan: int, order: int) -> torch.Tensor:
    return _run_bias_act(x, b, g, plan, order)


class _BiasAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, b: torch.Tensor | None, plan: BiasActPlan) -> torch.Tensor:
        ctx.save_for_backward(x, b)
        ctx.plan = plan
        return _bias_act(x, b, plan.number)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        x, b = ctx.saved_tensors
        dx = bias_act_derivative(x, b, grad, ctx.plan, 1)
        return dx, _along(dx, b, ctx.plan.dim), None


class _Derivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor, plan: BiasActPlan,
                order: int) -> torch.Tensor:
        ctx.save_for_backward(x, b, g)
        ctx.plan, ctx.order = plan, order
        return _derivative(x, b, g, plan.number, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, b, g = ctx.saved_tensors
        plan, order = ctx.plan, ctx.order
        dg = bias_act_derivative(x, b, grad, plan, order) if ctx.needs_input_grad[2] else None
        dx = None
        if (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]) and ACTS[plan.act] not in STRAIGHT:
            if order == 1:
                dx = bias_act_derivative(x, b, grad * g, plan, 2)
            else:
                dx = _third_derivative(x, b, grad * g, plan)
        return dx, None if dx is None else _along(dx, b, plan.dim), dg, None, None


def bias_act(x: torch.Tensor, b: torch.Tensor | None, plan: BiasActPlan) -> torch.Tensor:
    """clamp(gain * act(x + b)), b of the type of x."""
    if not _needs_gradient(x, b):
        return _bias_act(x, b, plan.number)
    y: torch.Tensor = _BiasAct.apply(x, b, plan)
    return y


def bias_act_derivative(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor, plan: BiasActPlan,
                        order: int) -> torch.Tensor:
    """g times the derivative of that order (1 or 2) of `bias_act` with respect to x, element by element."""
    if not _needs_gradient(x, b, g):
        return _derivative(x, b, g, plan.number, order)
    y: torch.Tensor = _Derivative.apply(x, b, g, plan, order)
    return y


def _third_derivative(x: torch.Tensor, b: torch.Tensor | None, g: torch.Tensor, plan: BiasActPlan) -> torch.Tensor:
    """g times the third derivative, by plain PyTorch and therefore differentiable further."""
    further = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        y = bias_act_ref(x, b, plan.dim, ACTS[plan.act], plan.alpha, plan.gain, plan.clamp)
        for _ in range(2):
            y, = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
        return torch.autograd.grad(y, x, g, create_graph=further)[0]


def _along(dx: torch.Tensor, b: torch.Tensor | None, dim: int) -> torch.Tensor | None:
    """The gradient of a bias."""
    if b is None:
        return None
    others = tuple(d for d in range(dx.ndim) if d != dim)
    return dx.sum(dim=others) if others else dx
