# SPDX-License-Identifier: Apache-2.0
"""Small utilities without torch: configuration objects, files, downloads, command-line parsers."""
from dnnlib.errors import UserError
from dnnlib.util import EasyDict

__all__ = ["EasyDict", "UserError"]
