# SPDX-License-Identifier: Apache-2.0
"""The samples of one micro-batch, which the backward pass of a phase gets."""
import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """N samples, which one process feeds through the networks at once."""

    z: torch.Tensor                             # [N, z_dim]
    gen_c: torch.Tensor                         # [N, c_dim], one-hot.
    real_img: torch.Tensor | None = None        # [N, 3, R, R] in [-1, 1]; None in phases that see no real image.
    real_c: torch.Tensor | None = None          # [N, c_dim], one-hot.
    augment_fake: torch.Tensor | None = None    # [backbones, N, NUM_UNIFORMS] uniform numbers; None: no augmentation.
    augment_real: torch.Tensor | None = None
    pl_noise: torch.Tensor | None = None        # [N, 3, R, R] standard normal; only the path-length phase uses it.

    def real(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(real_img, real_c), which a phase with `uses_real_images` gets."""
        assert self.real_img is not None, "this phase gets no real images"
        assert self.real_c is not None
        return self.real_img, self.real_c

    def noise(self) -> torch.Tensor:
        """pl_noise, which a phase with `uses_noise` gets."""
        assert self.pl_noise is not None, "this phase gets no noise"
        return self.pl_noise
