# SPDX-License-Identifier: Apache-2.0
"""What an inversion goes for: pictures, the distance to them, and where they count."""
import torch

from inference.inversion.distances import Distance
from torch_utils.misc import full_precision


class Goal:
    """Pictures to be made, N at once."""

    def __init__(self, targets: torch.Tensor, distance: Distance, mask: torch.Tensor | None = None):
        """Args:
            targets: [N, 3, R, R] in [-1, 1], on the generator's device.
            distance: What is made small.
            mask: [R, R] on the same device, 1 where the pictures count and 0 where they do not; None: everywhere.
        """
        self.targets, self.distance, self.mask = targets, distance, mask
        with torch.no_grad(), full_precision():
            self._wanted = distance.maps(targets)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> "Goal":
        """One of the pictures alone."""
        return Goal(self.targets[i:i + 1], self.distance, self.mask)

    def distances(self, images: torch.Tensor) -> torch.Tensor:
        """Distances [N] of the pictures [N, 3, R, R], or of a single one [1, 3, R, R] to all targets."""
        return self.distance.between(self.distance.maps(self._covered(images)), self._wanted)

    def squared_errors(self, images: torch.Tensor) -> torch.Tensor:
        """Mean squared errors [N] of pixels in [-1, 1]; with a mask each counts as much as the mask says."""
        errors = (images - self.targets).square()
        if self.mask is None:
            return errors.mean(dim=(1, 2, 3))
        return (errors * self.mask).mean(dim=(1, 2, 3)) / self.mask.mean()

    def _covered(self, images: torch.Tensor) -> torch.Tensor:
        """With the target's pixels where the mask is 0, so that these make no difference."""
        return images if self.mask is None else self.targets.lerp(images, self.mask)
