# SPDX-License-Identifier: Apache-2.0
"""Which layers the GPU's fast programs of `csrc/strips.h` are for: the rates of the recipes.

The table is that of the source. Configurations T and R use no other filters between 16 and 1024 pixels (a test lists
them from the layer tables). The gradient of a layer is a layer with the rates exchanged and has a row of its own.
"""
import dataclasses
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch_utils.ops.native import Axis, Kernel

TYPES = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}     # As strips.cu calls them.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Strips:
    """A kind of layer that has a program: rates, taps, and what else is known when it is compiled."""

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

    def fits(self, up: "Kernel", down: "Kernel") -> bool:
        """Whether a layer with these filters is of this kind."""
        return (
            all(_is(axis, self.up, 1, self.up_taps) for axis in (up.x, up.y))
            and all(_is(axis, 1, self.down, self.down_taps) for axis in (down.x, down.y))
            and _has_taps(up, self.up_radial) and _has_taps(down, self.down_radial)
            and all((self.phase - a.pad - b.pad) % self.up == 0 for a, b in ((up.x, down.x), (up.y, down.y))))


def _is(axis: "Axis", up: int, down: int, taps: int) -> bool:
    return (axis.up, axis.down, axis.taps) == (up, down, taps)


def _has_taps(kernel: "Kernel", is_radial: bool) -> bool:
    return not kernel.taps_y if is_radial else kernel.taps_x == kernel.taps_y


KINDS = {kind.name: kind for kind in (
    Strips("22", 2, 2, 12, 12, 1, False, False, 8, 2, False),
    Strips("42", 4, 2, 24, 12, 2, False, False, 8, 1, False),
    Strips("24", 2, 4, 12, 24, 0, False, False, 3, 2, True),
    Strips("22D", 2, 2, 12, 12, 1, False, True, 8, 2, False),
    Strips("42D", 4, 2, 24, 12, 2, False, True, 8, 1, False),
    Strips("22U", 2, 2, 12, 12, 1, True, False, 8, 2, True),
    Strips("24U", 2, 4, 12, 24, 0, True, False, 2, 2, True),
)}
FAMILIES = tuple(dict.fromkeys(kind.family for kind in KINDS.values()))


def find(up: "Kernel", down: "Kernel") -> Strips | None:
    """The kind of a layer; None: it is left to the general program."""
    return next((kind for kind in KINDS.values() if kind.fits(up, down)), None)


def can_run(kind: Strips, down: "Kernel", slope: float, reads_codes: bool) -> bool:
    """Whether the kind's program does it. What activates must not bend upwards, nor crop what it keeps codes of."""
    return reads_codes or not kind.is_gradient and slope <= 1 and down.x.pad == down.y.pad == 0
