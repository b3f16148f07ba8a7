# SPDX-License-Identifier: Apache-2.0
"""The samples of one micro-batch, which the backward pass of a phase gets."""
import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one process feeds through the networks at once; N samples."""

    z: torch.Tensor                             # [N, z_dim]
    gen_c: torch.Tensor                         # [N, c_dim], one-hot.
    real_img: torch.Tensor | None = None        # [N, 3, R, R] in [-1, 1]; None in phases that see no real image.
    real_c: torch.Tensor | None = None          # [N, c_dim], one-hot.
    augment_fake: torch.Tensor | None = None    # [backbones, N, NUM_UNIFORMS] uniform numbers; None: no augmentation.
    augment_real: torch.Tensor | None = None
    pl_noise: torch.Tensor | None = None        # [N, 3, R, R] standard normal; only the path-length phase uses it.
