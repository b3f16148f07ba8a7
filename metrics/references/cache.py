# SPDX-License-Identifier: Apache-2.0
"""A cache of what real images gave, keyed by everything that moves the numbers.

That is the content of the images, the weights of the detector and its resize, and what was kept. A file that cannot be
read counts as absent.
"""
import contextlib
import hashlib
import json
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError
from dnnlib.download import cache_dir
from dnnlib.util import atomic_file
from metrics.detectors import Detector
from torch_utils.arrays import open_npz

CACHE_VERSION = 2                           # Raise it when the same inputs give other numbers.
READ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error,
               NotImplementedError, UserError)


def cache_path(detector: Detector, fingerprint: str, **what: Any) -> Path:
    """Where statistics of these images by this detector are kept."""
    key = {"version": CACHE_VERSION, "detector": detector.name, "detector_sha256": detector.sha256,
           "resize": detector.resize, "images": fingerprint, **what}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "metrics" / f"{digest[:32]}.npz"


def read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None."""
    with contextlib.suppress(*READ_ERRORS):
        with open_npz(path) as file:
            return {key: file[key] for key in file.files}
    return None


def write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays; a full disk or a read-only folder costs the cache, not the result."""
    try:
        with atomic_file(path) as f:
            named: dict[str, Any] = dict(arrays)        # Some of NumPy's annotations take every name for an option.
            np.savez(f, **named)
    except OSError as err:
        print(f"Warning: statistics were not kept in {path}: {err}", file=sys.stderr)
