# SPDX-License-Identifier: Apache-2.0
"""What generated images are compared with: images, stored statistics of images, or both; and a cache of statistics.

Statistics files are .npz with the keys of the ADM evaluator (`mu`, `sigma`), which most tools read; ours hold besides
how many images, with which detector and with which divisor.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib import UserError
from dnnlib.download import cache_dir
from dnnlib.util import atomic_file
from metrics.detectors import Detector
from metrics.sources import ImageSource

FORMAT = "stylesan-xl/reference/1"
CACHE_VERSION = 1                           # Raise it when the same inputs give other numbers.
ASSUMED_DETECTOR = "inception-2015-12-05"   # Of a file of statistics that does not say.
READ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of a detector's features."""

    mean: np.ndarray                # float64 [D]
    covariance: np.ndarray          # float64 [D, D], ddof 0; as stored where `num_images` is unknown.
    num_images: int | None
    detector: str | None            # None: the file does not say.
    detector_sha256: str | None = None
    stored_ddof: int | None = None  # What the file was divided by, before conversion; None: nothing was converted.
    path: str | None = None
    fingerprint: str = ""           # Of the images where known, else of the numbers.
    resolution: int | None = None   # Of the images, where known.

    def describe(self) -> dict[str, Any]:
        """For the record of a result."""
        return {"kind": "statistics", "path": self.path, "num_images": self.num_images,
                "detector": self.detector or f"not recorded, taken as {ASSUMED_DETECTOR}",
                "stored_ddof": self.stored_ddof if self.num_images else "not recorded, used as stored"}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The real side of a metric. Images serve every metric; statistics alone serve FID."""

    source: ImageSource | None = None
    statistics: Statistics | None = None

    @property
    def fingerprint(self) -> str:
        """Of the content."""
        return self.statistics.fingerprint if self.statistics else self.source.fingerprint if self.source else ""

    @property
    def resolution(self) -> int | None:
        """Side of the images, where known."""
        if self.source is not None:
            return self.source.description.get("resolution")
        return self.statistics.resolution if self.statistics else None

    def describe(self) -> dict[str, Any]:
        """For the record of a result."""
        images = {} if self.source is None else self.source.description
        images = {key: value for key, value in images.items() if key != "class_names"}
        return {**images, **self.statistics.describe()} if self.statistics else images

#----------------------------------------------------------------------------
# Files of statistics.

def load_statistics(path: str | os.PathLike) -> Statistics:
    """Read mean and covariance from an .npz: ours, ADM's, pytorch-fid's, clean-fid's or EDM's.

    The covariance is converted to ddof 0 where the number of images is known. Foreign files divide by N - 1 but do
    not say N; theirs are used as they are (2e-5 relative at 50,000 images) and the record says so.

    Raises:
        UserError: not such a file, or its arrays do not fit each other.
    """
    try:
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            if "mu" not in file.files or "sigma" not in file.files:
                raise UserError(f"{path}: holds {', '.join(file.files) or 'nothing'}, but statistics need mu and sigma")
            mean, covariance = (np.asarray(file[key], dtype=np.float64) for key in ("mu", "sigma"))
            num = int(file["num_images"]) if "num_images" in file.files else None
            ddof = int(file["ddof"]) if "ddof" in file.files else 1
            metadata = json.loads(str(file["metadata"])) if "metadata" in file.files else {}
    except (*READ_ERRORS, TypeError, AttributeError) as err:
        raise UserError(f"{path}: not a readable file of statistics ({type(err).__name__}): make it again") from err
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: mu is {list(mean.shape)} and sigma {list(covariance.shape)}, "
                        "but must be [D] and [D, D]")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: mu or sigma is not finite: make the file again")
    if num is not None:
        if num <= ddof:
            raise UserError(f"{path}: num_images is {num} with ddof {ddof}: make the file again")
        covariance = covariance * ((num - ddof) / num)
    numbers = hashlib.sha256(mean.tobytes() + covariance.tobytes()).hexdigest()
    metadata = metadata if isinstance(metadata, dict) else {}
    return Statistics(mean, covariance, num, metadata.get("detector"), metadata.get("detector_sha256"), ddof,
                      str(path), metadata.get("images_fingerprint") or numbers, metadata.get("resolution"))


def save_statistics(path: str | os.PathLike, statistics: Statistics, metadata: dict[str, Any]) -> None:
    """Write an .npz that ADM's and pytorch-fid's readers take: `sigma` is divided by N - 1, and `ddof` says so.

    Args:
        path: File, by custom *.npz.
        statistics: With `num_images`.
        metadata: JSON-able; the detector, its hash and the fingerprint are added.

    Raises:
        UserError: fewer than two images.
    """
    num = statistics.num_images or 0
    if num < 2:
        raise UserError(f"--save-ref={path}: {num} images have no covariance: use two or more")
    metadata = {"format": FORMAT, **metadata, "detector": statistics.detector,
                "detector_sha256": statistics.detector_sha256, "images_fingerprint": statistics.fingerprint,
                "resolution": statistics.resolution, "ddof": 1}
    with atomic_file(path) as f:
        np.savez(f, mu=statistics.mean, sigma=statistics.covariance * (num / (num - 1)), num_images=num, ddof=1,
                 detector=np.array(statistics.detector), metadata=np.array(json.dumps(metadata, sort_keys=True)))

#----------------------------------------------------------------------------

def check_statistics(statistics: Statistics, detector: Detector) -> str | None:
    """Refuse statistics that another detector made; return a warning where that cannot be known.

    Raises:
        UserError: other width, or another detector on record.
    """
    if len(statistics.mean) != detector.feature_dim:
        raise UserError(f"--ref={statistics.path}: its features have {len(statistics.mean)} dimensions, those of "
                        f"detector {detector.name} {detector.feature_dim}: make it again with --save-ref and "
                        f"--detector={detector.name}")
    if statistics.detector is None:
        return (f"{statistics.path} does not say which detector made it: taken as {ASSUMED_DETECTOR}, "
                f"compared with {detector.name}")
    if statistics.detector_sha256 != detector.sha256:
        raise UserError(f"--ref={statistics.path}: made by detector {statistics.detector} "
                        f"({str(statistics.detector_sha256)[:12]}), but the metric uses {detector.name} "
                        f"({detector.sha256[:12]}): make it again with --save-ref")
    return None

#----------------------------------------------------------------------------
# The cache. Keyed by everything that moves the numbers: the content of the images, the weights of the detector, and
# what was kept. A file that cannot be read counts as absent.

def cache_path(detector: Detector, fingerprint: str, **what: Any) -> Path:
    """Where statistics of these images by this detector are kept."""
    key = {"version": CACHE_VERSION, "detector": detector.name, "detector_sha256": detector.sha256,
           "images": fingerprint, **what}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "metrics" / f"{digest[:32]}.npz"


def read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file, or None."""
    with contextlib.suppress(*READ_ERRORS):
        with open(path, "rb") as f, np.load(f, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    return None


def write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Keep arrays; a full disk or a read-only folder costs the cache, not the result."""
    try:
        with atomic_file(path) as f:
            np.savez(f, **arrays)
    except OSError as err:
        print(f"Warning: statistics were not kept in {path}: {err}", file=sys.stderr)
