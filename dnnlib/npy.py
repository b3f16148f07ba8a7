# SPDX-License-Identifier: Apache-2.0
"""The header of NumPy's .npy format, from a stream."""
from typing import Any

import numpy as np

from dnnlib.util import first_line

MAGIC = np.lib.format.MAGIC_PREFIX


def npy_header(f: Any) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of a stream in .npy format; leaves it at the first value. Raises ValueError."""
    version = np.lib.format.read_magic(f)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"unknown version {version} of the .npy format")
    try:
        return readers[version](f)
    except Exception as err:        # NumPy's parser of damaged headers raises anything.
        raise ValueError(f"a damaged .npy header ({first_line(err)})") from err
