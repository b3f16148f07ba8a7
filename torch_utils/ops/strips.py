# SPDX-License-Identifier: Apache-2.0
"""Which layers the GPU's fast programs of `csrc/strips.h` are for: the rates of the recipes.

The table is that of the source. Configurations T and R use no other filters between 16 and 1024 pixels (a test lists
them from the layer tables). The gradient of a layer is a layer with the rates exchanged and has a row of its own.
"""
import torch

from torch_utils.ops.descriptions import Strips

TYPES = {torch.float32: "Float", torch.float16: "Half", torch.bfloat16: "BFloat16"}     # As strips.cu calls them.

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
