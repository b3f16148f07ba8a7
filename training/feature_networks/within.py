# SPDX-License-Identifier: Apache-2.0
"""Global switches that hold for one network only, in its forward and in its backward pass.

PyTorch's switches for the precision of float32 products are global, and the gradient is computed later, on a GPU in
another thread: a switch that is set around the call of a network is back where it was by then. So the network becomes
one step of the graph, whose backward pass sets the switch itself. While it runs nothing else does: each process has one
GPU, and autograd one thread for it.
"""
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

Surroundings = Callable[[], AbstractContextManager[None]]


def run_within(surroundings: Surroundings, function: Callable[[torch.Tensor], Sequence[torch.Tensor]],
               x: torch.Tensor) -> list[torch.Tensor]:
    """`function(x)`, with both passes inside `surroundings()`. Can be differentiated once, with respect to x only.

    Args:
        surroundings: Makes a context manager.
        function: Tensor -> tensors. What it holds beside its argument gets no gradient.
        x: Its argument.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return list(_Within.apply(x, surroundings, function))
    with surroundings():
        return list(function(x))


class _Within(torch.autograd.Function):
    """The function as one step; its own graph is kept aside for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, surroundings: Surroundings,
                function: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> tuple[torch.Tensor, ...]:
        ctx.surroundings = surroundings
        with torch.enable_grad(), surroundings():
            ctx.inner = x.detach().requires_grad_(True)
            ctx.outputs = tuple(function(ctx.inner))
        return tuple(y.detach() for y in ctx.outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        with ctx.surroundings():
            (grad,) = torch.autograd.grad(ctx.outputs, ctx.inner, grads)
        del ctx.outputs, ctx.inner
        return grad, None, None
