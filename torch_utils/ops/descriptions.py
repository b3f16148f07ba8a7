# SPDX-License-Identifier: Apache-2.0
"""What an operation is told beside tensors, as plain values: filters, rates, kinds of layers, and plans of calls.

Nothing here computes anything or knows how native code is called, so that all other modules can share these values.
"""
import dataclasses
import functools
import itertools
import weakref
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from torch_utils.ops.arguments import output_size

# What the program of a layer does; as StylesanMode in csrc/abi.h.
ACTIVATE, ACTIVATE_AND_KEEP, READ_CODES = range(3)
ACTS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "elu", "selu", "softplus", "swish")    # As in csrc/formulas.h.

#----------------------------------------------------------------------------
# Filters.

class Taps(NamedTuple):
    """The content of a filter tensor. A tuple, because every call of an operation looks something up by it."""

    shape: tuple[int, ...]      # [n] or [h, w].
    content: bytes              # float64, C order.

    def array(self) -> np.ndarray:
        return np.frombuffer(self.content).reshape(self.shape)


IDENTITY = Taps((1,), np.ones(1).tobytes())


@dataclasses.dataclass(frozen=True)
class AxisFilter:
    """All that happens to images along one axis, with the content of the filter."""

    taps: Taps              # [n].
    size: int               # Samples in.
    up: int
    down: int
    pad: tuple[int, int]    # Before and after, in upsampled samples; negative crops.
    flip_filter: bool       # False: convolution; True: correlation.
    gain: float

    @property
    def out_size(self) -> int:
        return output_size(self.size, self.taps.shape[0], self.up, self.down, *self.pad)

    def is_scale(self) -> bool:
        """Whether nothing happens but a multiplication by `gain`."""
        return self.taps == IDENTITY and self.up == self.down == 1 and self.pad == (0, 0)


@dataclasses.dataclass(frozen=True)
class AxisRates:
    """out[o] = sum over i of f[i * up + pad - o * down] in[i], where f is 0 outside its taps."""

    up: int
    down: int
    pad: int
    taps: int
    out: int

    def transposed(self, size: int) -> "AxisRates":
        """The same weights from outputs to `size` inputs, for mirrored taps."""
        return AxisRates(self.down, self.up, self.taps - 1 - self.pad, self.taps, size)


@dataclasses.dataclass(frozen=True)
class ResamplingFilter:
    """A filter with its rates. Without `taps_y` it is not separable and `taps_x` holds [y.taps, x.taps]."""

    taps_x: tuple[float, ...]
    taps_y: tuple[float, ...]
    x: AxisRates
    y: AxisRates

    @property
    def out_size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return self.y.out, self.x.out

    def transposed(self, size: tuple[int, int]) -> "ResamplingFilter":
        """The gradient: from results to images of that (height, width)."""
        return ResamplingFilter(self.taps_x[::-1], self.taps_y[::-1], self.x.transposed(size[1]),
                                self.y.transposed(size[0]))

#----------------------------------------------------------------------------
# Kinds of layers.

@dataclasses.dataclass(frozen=True)
class Strips:
    """A kind of layer that has a fast program on GPUs: rates, taps, and what else is known when it is compiled."""

    name: str               # In the source.
    up: int
    down: int
    up_taps: int            # Along an axis.
    down_taps: int
    phase: int              # The tap which the first upsampled value of a strip takes of its first input.
    up_radial: bool         # Not separable.
    down_radial: bool
    width: int              # Results of a strip along x, and rows of inputs in one turn of the loop.
    unroll: int
    is_gradient: bool       # Multiplies by recorded slopes only.

    @property
    def family(self) -> str:
        """What is compiled together: separable filters ('t', all that config T needs) or radial ones ('r')."""
        return "r" if self.up_radial or self.down_radial else "t"

    @property
    def values_per_turn(self) -> int:
        """Values of the layer's result that one turn of a thread's loop is for.

        For a gradient these are the inputs, because the result of the layer is what its gradient starts from.
        """
        results = self.width * self.unroll * self.up // self.down
        return results * self.down**2 // self.up**2 if self.down > self.up else results

    def describe(self) -> str:
        """'2/2 12/12', radial filters with an r behind their taps."""
        return (f"{self.up}/{self.down} {self.up_taps}{'r' * self.up_radial}/"
                f"{self.down_taps}{'r' * self.down_radial}")

    def fits(self, up: ResamplingFilter, down: ResamplingFilter) -> bool:
        """Whether a layer with these filters is of this kind."""
        return (
            all(_is(axis, self.up, 1, self.up_taps) for axis in (up.x, up.y))
            and all(_is(axis, 1, self.down, self.down_taps) for axis in (down.x, down.y))
            and _has_taps(up, self.up_radial) and _has_taps(down, self.down_radial)
            and all((self.phase - a.pad - b.pad) % self.up == 0 for a, b in ((up.x, down.x), (up.y, down.y))))

    def can_run(self, down: ResamplingFilter, slope: float, mode: int) -> bool:
        """Whether the program does it. What activates must not bend upwards, nor crop what it keeps codes of."""
        return mode == READ_CODES or not self.is_gradient and slope <= 1 and down.x.pad == down.y.pad == 0


def _is(axis: AxisRates, up: int, down: int, taps: int) -> bool:
    return (axis.up, axis.down, axis.taps) == (up, down, taps)


def _has_taps(f: ResamplingFilter, is_radial: bool) -> bool:
    return not f.taps_y if is_radial else f.taps_x == f.taps_y

#----------------------------------------------------------------------------
# Plans.

_plans: "dict[int, weakref.ref[Plan]]" = {}      # By number; entries leave with their plans.
_numbers = itertools.count(1)


class Packed(NamedTuple):
    """What native code reads of a plan, as bytes, and the arrays that these point to."""

    content: bytes
    arrays: tuple[object, ...]


AnyPlan = TypeVar("AnyPlan", bound="Plan")


class Plan:
    """What native code is told beside tensors. It is made once and does not change, so that threads share it.

    The operations of PyTorch take its number. Whoever uses the number later, as gradients do, has to hold the plan.
    """

    def __init__(self) -> None:
        self.number = number = next(_numbers)
        self.packed: Packed | None = None               # `native` makes it at the first call.
        self.templates: dict[Hashable, Any] = {}        # `native` makes one for each layout of the images.
        _plans[number] = weakref.ref(self, lambda _: _plans.pop(number, None))


def plan_of(number: int, kind: type[AnyPlan]) -> AnyPlan:
    """The plan with this number, which is one of that kind."""
    try:
        plan = _plans[number]()
    except KeyError:
        plan = None
    if plan is None:
        raise RuntimeError(f"plan {number} of a native operation does not exist any more: hold the plan itself for as "
                           "long as its number is used")
    if not isinstance(plan, kind):
        raise RuntimeError(f"plan {number} is a {type(plan).__name__}, and the operation takes a {kind.__name__}")
    return plan


class ResamplingPlan(Plan):
    """A filter for images of `size` (height, width)."""

    def __init__(self, filter: ResamplingFilter, size: tuple[int, int]):
        super().__init__()
        self.filter, self.size, self.out_size = filter, size, filter.out_size

    @functools.cached_property
    def transposed(self) -> "ResamplingPlan":
        """The gradient."""
        return ResamplingPlan(self.filter.transposed(self.size), self.out_size)


class LayerPlan(Plan):
    """Upsample images of `size` (height, width), activate and downsample.

    Args:
        fast_kinds: A GPU runs the fast program of the first of these that the layer is of, and else the general one.
    """

    def __init__(self, up: ResamplingFilter, down: ResamplingFilter, size: tuple[int, int], slope: float,
                 clamp: float, fast_kinds: Sequence[Strips] = ()):
        super().__init__()
        self.up, self.down, self.size, self.out_size = up, down, size, down.out_size
        self.slope, self.clamp, self.fast_kinds = slope, clamp, fast_kinds
        kind = next((kind for kind in fast_kinds if kind.fits(up, down)), None)
        self._fast_kind = tuple(kind if kind and kind.can_run(down, slope, mode) else None
                                for mode in (ACTIVATE, ACTIVATE_AND_KEEP, READ_CODES))

    def fast_kind(self, mode: int) -> Strips | None:
        """The kind of fast program for it, if there is one."""
        return self._fast_kind[mode]

    @functools.cached_property
    def transposed(self) -> "LayerPlan":
        """The gradient, which multiplies by the recorded slopes where the layer activates."""
        return LayerPlan(self.down.transposed(self.up.out_size), self.up.transposed(self.size), self.out_size,
                         self.slope, self.clamp, self.fast_kinds)


class BiasActPlan(Plan):
    """The settings of an activation; `act` counts ACTS, the bias runs along `dim`."""

    def __init__(self, dim: int, act: int, alpha: float, gain: float, clamp: float):
        super().__init__()
        self.dim, self.act, self.alpha, self.gain, self.clamp = dim, act, alpha, gain, clamp
