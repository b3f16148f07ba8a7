# SPDX-License-Identifier: Apache-2.0
"""Times of a video's frames, and what lies between keyframes.

A position is counted in keyframes: 2.5 is halfway between the third and the fourth one. The official interpolation
repeats the sequence of keyframes and lays a cubic spline through all of them, so that the video can be shown in a loop.
"""
import dataclasses
import math
from collections.abc import Callable

import numpy as np
import scipy.interpolate

WRAPS = 2               # Officially the sequence is repeated so often on each side.
# So many keyframes on each side are enough: the influence of one falls to a quarter with each interval, and at this
# distance it is far below the rounding of float64.
FAR = 64

EASINGS: dict[str, Callable[[float], float]] = {    # [0, 1] -> [0, 1], for the way between two keyframes.
    "none": lambda x: x,
    "sine": lambda x: (1 - math.cos(math.pi * x)) / 2,      # It rests at the keyframes.
    "cubic": lambda x: x * x * (3 - 2 * x),                 # So does this.
}

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Timing:
    """When what is shown."""

    num_keyframes: int
    w_frames: int               # Frames of the way between two keyframes. A single keyframe lasts as long.
    loop: bool = True           # Whether the way leads from the last keyframe back to the first.
    easing: str = "none"        # A key of `EASINGS`.

    @property
    def num_frames(self) -> int:
        """Frames of the video. One that does not loop ends with its last keyframe."""
        if self.loop or self.num_keyframes == 1:
            return self.num_keyframes * self.w_frames
        return (self.num_keyframes - 1) * self.w_frames + 1

    def position(self, frame: int) -> float:
        """Where a frame lies, in keyframes."""
        passed, rest = divmod(frame, self.w_frames)
        return passed + EASINGS[self.easing](rest / self.w_frames)

    def progress(self, frame: int) -> float:
        """How much of the video has passed. A loop does not show 1, which is 0 again; otherwise the last frame is 1."""
        return frame / self.num_frames if self.loop else frame / max(self.num_frames - 1, 1)

    def there_and_back(self, frame: int) -> float:
        """0 to 1, and in a loop back to 0, resting at both ends: for motions that are not periodic by themselves."""
        progress = self.progress(frame)
        return (1 - math.cos(2 * math.pi * progress)) / 2 if self.loop else progress

#----------------------------------------------------------------------------

class KeyframePath:
    """What lies between keyframes, in float64: a cubic spline through all of them."""

    def __init__(self, keys: np.ndarray, loop: bool = True):
        """Args:
            keys: [K, ...], K at least 1.
            loop: Whether the way leads from the last keyframe back to the first; otherwise it ends at the last one.
        """
        keys = np.asarray(keys, dtype=np.float64)
        before = min(WRAPS * len(keys), FAR) if loop else 0
        places = np.arange(-before, len(keys) + before)
        self._at: Callable[[float], np.ndarray] = lambda position: keys[0]
        if len(keys) > 1:
            self._at = scipy.interpolate.CubicSpline(places, keys[places % len(keys)], axis=0, bc_type="not-a-knot")

    def __call__(self, position: float) -> np.ndarray:
        """The point at a position, 0 to K (to K - 1 without a loop): [...]."""
        return self._at(position)
