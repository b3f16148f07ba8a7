# SPDX-License-Identifier: Apache-2.0
"""Small utilities without torch: configuration objects, files, downloads, command-line parsers."""
import os

from dnnlib.errors import UserError
from dnnlib.util import EasyDict

# Large tensors in pages of 2 MB, where Linux gives them to programs that ask: on processors PyTorch takes fresh memory
# for every result, and with pages of 4 KB its first touch took two thirds of a multiplication's time. PyTorch looks at
# this when it makes its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = ["EasyDict", "UserError"]
