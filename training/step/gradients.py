# SPDX-License-Identifier: Apache-2.0
"""Gradients of a phase in one flat tensor, and their sum over processes, which starts during the backward pass."""
import functools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch.utils.hooks import RemovableHandle

from torch_utils import distributed

BUCKET_BYTES = 25 << 20         # A message this large goes at full speed, and is small enough to start early.


class Message(Protocol):
    """A sum over processes that is on its way."""

    def wait(self) -> object:
        """Return when the sum is there."""
        ...


class FlatGradients:
    """One tensor of which the `.grad` of all parameters are views.

    Backward passes finish the last parameters first, so messages ("buckets") are cut from the end of the tensor. They
    start in this order on every process, whatever order gradients are ready in: collectives must meet.

    Args:
        parameters: Those that are trained; frozen ones take no part. Their gradients are set to zero.
        bucket_bytes: Size of a message, rounded up to whole parameters.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        self.parameters = list(parameters)
        sizes = [p.numel() for p in self.parameters]
        self.flat = torch.zeros(sum(sizes), dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        for p, grad in zip(self.parameters, self.flat.split(sizes), strict=True):
            p.grad = grad.view(p.shape)
        self._buckets: list[tuple[int, int]] = []           # Slices of `flat`, last parameters first.
        self._bucket_of: list[int] = [0] * len(sizes)
        self._cut(sizes, bucket_bytes // self.flat.element_size())
        self._missing = [0] * len(self._buckets)            # Parameters whose gradient is not final yet.
        self._seen = [0] * len(sizes)
        self._hooks: list[RemovableHandle] = []
        self._messages: list[Message] = []

    def _cut(self, sizes: list[int], limit: int) -> None:
        start = stop = sum(sizes)
        for i in reversed(range(len(sizes))):
            start -= sizes[i]
            self._bucket_of[i] = len(self._buckets)
            if stop - start >= limit or i == 0:
                self._buckets.append((start, stop))
                stop = start

    def overlap(self, num_backwards: int) -> None:
        """Send buckets from here on as soon as they are complete.

        Call it before the last micro-batch. A parameter's gradient is complete after `num_backwards` more backward
        passes that reach it; buckets with parameters that are not reached wait for `finish`.
        """
        if distributed.world_size() == 1:
            return
        for bucket in self._bucket_of:
            self._missing[bucket] += 1
        for i, p in enumerate(self.parameters):
            hook = functools.partial(self._accumulated, i, num_backwards)
            self._hooks.append(p.register_post_accumulate_grad_hook(hook))

    def _accumulated(self, index: int, num_backwards: int, _parameter: torch.Tensor) -> None:
        self._seen[index] += 1
        if self._seen[index] > num_backwards:
            raise RuntimeError(f"parameter {index} got gradient {self._seen[index]} times where {num_backwards} were "
                               "announced: its bucket may be on its way already")
        if self._seen[index] == num_backwards:
            self._missing[self._bucket_of[index]] -= 1
            while len(self._messages) < len(self._buckets) and self._missing[len(self._messages)] == 0:
                self._send()

    def _send(self) -> None:
        start, stop = self._buckets[len(self._messages)]
        self._messages.append(distributed.all_reduce_start(self.flat[start:stop]))

    def finish(self) -> torch.Tensor:
        """Send what was not sent yet, wait for all; return the flat tensor, summed over processes."""
        for hook in self._hooks:
            hook.remove()
        if distributed.world_size() > 1:
            while len(self._messages) < len(self._buckets):
                self._send()
        for message in self._messages:
            message.wait()
        return self.flat
