# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance of a detector's features, and the real side of a metric: images, such statistics, or both."""
import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import list_some
from metrics.detectors import INCEPTION_LAYERS, Detector
from metrics.references.limits import check_count, check_width
from metrics.sources import ImageSource

INCEPTION, DINOV2 = "inception-2015-12-05", "dinov2-vitl14"
# What others call the two arrays.
MEAN_KEYS, COVARIANCE_KEYS = ("mu", "mean"), ("sigma", "cov", "covariance")
BLOCK_ROWS = 4096                           # So many features are read at a time.
MAX_VALUE = 1e100                           # A mean or covariance stays below it, and so what is computed is finite.
ASYMMETRY = 1e-4                            # Allowed in a covariance, by its largest value; rounding makes 1e-7.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of one output of one detector."""

    mean: np.ndarray                # float64 [D]
    covariance: np.ndarray          # float64 [D, D], ddof 0; as stored where `num_images` is unknown.
    num_images: int | None
    detector: str | None            # None: the file does not say.
    detector_sha256: str | None = None
    stored_ddof: int | None = None  # What the file was divided by, before conversion; None: nothing was converted.
    path: str | None = None
    fingerprint: str = ""           # A hash of the images where they are known, else of the numbers.
    resolution: int | None = None   # Side of the images, where known.
    output: str = "pool"            # Which of the detector's outputs.
    format: str | None = None       # Which kind of file it comes from, for people and for the record.
    mirror: bool | None = None      # Whether mirrored copies of the images are in it, where known.
    resize: str | None = None       # How the detector's images came to its size, where known.
    crop: str | None = None         # How the images were cut out, where known: see `metrics.crops`.

    def covariance_at(self, ddof: int) -> np.ndarray:
        """[D, D] divided by N - ddof; as stored where N is not known."""
        if self.num_images is None or ddof == 0:
            return self.covariance
        return self.covariance * (self.num_images / (self.num_images - ddof))

    def may_be(self, output: str) -> bool:
        """Whether a file that names neither network nor layer holds this layer of Inception: its width says so."""
        return self.detector is None and INCEPTION_LAYERS.get(output) == len(self.mean)

    def describe(self) -> dict[str, Any]:
        """For the record of a result."""
        return {"kind": "statistics", "format": self.format, "path": self.path, "num_images": self.num_images,
                "detector": self.detector or "not recorded, taken as that of the metric",
                "stored_ddof": self.stored_ddof if self.num_images else "not recorded, used as stored",
                "crop": self.crop}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The real side of a metric. Images serve every metric; statistics alone serve Frechet distances."""

    source: ImageSource | None = None
    statistics: tuple[Statistics, ...] = ()     # At most one per detector and output.

    def statistics_for(self, detector: str, output: str = "pool") -> Statistics | None:
        """Stored mean and covariance of this output of this detector; a file that names no detector serves any."""
        here = [entry for entry in self.statistics if entry.output == output or entry.may_be(output)]
        by_name = [entry for entry in here if entry.detector == detector]
        unsaid = [entry for entry in here if entry.detector is None]
        # Foreign formats say which network but not which weights: 'name:random' passes, for tests, with a warning.
        alike = [entry for entry in here if entry.detector_sha256 is None and entry.detector == detector.split(":")[0]]
        return next(iter(by_name + unsaid + alike), None)

    @property
    def resolution(self) -> int | None:
        """Side of the images, where known."""
        if self.source is not None:
            return self.source.description.get("resolution")
        return next((entry.resolution for entry in self.statistics if entry.resolution), None)

    @property
    def crop(self) -> str | None:
        """How the images were cut out, where known."""
        of_images = self.source.description.get("crop") if self.source is not None else None
        return next((entry.crop for entry in self.statistics if entry.crop), of_images)

    def holdings(self) -> str:
        """What the statistics are of, for messages."""
        return list_some([f"{entry.output} of {entry.detector or 'an unnamed detector'}" for entry in self.statistics])

    def describe(self, used: Statistics | None = None) -> dict[str, Any]:
        """For the record of a result.

        Args:
            used: The statistics that the metric took; None: it took the images.
        """
        if used is not None:
            return {"used": "statistics", **used.describe()}
        images = {} if self.source is None else self.source.description
        return {"used": "images", **{key: value for key, value in images.items() if key != "class_names"}}

#----------------------------------------------------------------------------

def find_pair(keys: Iterable[str]) -> tuple[str, str] | None:
    """Which of the keys of a file are mean and covariance; None if there are not both."""
    keys = set(keys)
    mean, covariance = (next((name for name in names if name in keys), None) for names in (MEAN_KEYS, COVARIANCE_KEYS))
    return None if mean is None or covariance is None else (mean, covariance)


def make_statistics(path: str, names: str, mean: np.ndarray, covariance: np.ndarray, num: int | None, ddof: int,
                    **more: Any) -> Statistics:
    """Statistics from what a file holds, checked and brought to ddof 0 where the number of images is known.

    Args:
        path: The file.
        names: What the two arrays are called in it, for messages: 'mu and sigma'.
        mean: [D].
        covariance: [D, D], divided by N - `ddof`.
        num: N; None: not said.
        ddof: See `covariance`.
        more: Further fields of `Statistics`.

    Raises:
        UserError: arrays that are no mean and covariance.
    """
    mean, covariance = np.asarray(mean), np.asarray(covariance)
    if mean.dtype.kind not in "fiu" or covariance.dtype.kind not in "fiu":
        raise UserError(f"{path}: {names} are {mean.dtype} and {covariance.dtype}, but must be numbers: "
                        "make the file again")
    if any(array.dtype.kind == "f" and array.dtype.itemsize < 4 for array in (mean, covariance)):
        raise UserError(f"{path}: {names} are {mean.dtype} and {covariance.dtype}, which is too coarse: save them as "
                        "float64")
    if mean.ndim != 1 or not len(mean) or covariance.shape != (len(mean), len(mean)):
        raise UserError(f"{path}: {names} are {list(mean.shape)} and {list(covariance.shape)}, "
                        "but must be [D] and [D, D]: make the file again")
    check_width(path, names, len(mean))
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {names} are not finite everywhere: make the file again")
    largest = np.abs(covariance).max()
    if max(largest, np.abs(mean).max()) > MAX_VALUE:
        raise UserError(f"{path}: {names} have values up to {max(largest, np.abs(mean).max()):.1e}, which no features "
                        "have: make the file again")
    variances = np.diag(covariance)
    if np.abs(covariance - covariance.T).max() > ASYMMETRY * largest or variances.min() < -1e-6 * largest:
        raise UserError(f"{path}: of {names} the second is no covariance: it must be symmetric with variances that "
                        "are not negative: make the file again")
    if (np.square(covariance) - np.outer(variances, variances)).max() > ASYMMETRY * largest ** 2:
        raise UserError(f"{path}: of {names} the second is no covariance: an entry is larger than its two variances "
                        "allow: make the file again")
    check_count(path, num, ddof)
    if num is not None:
        covariance = covariance * ((num - ddof) / num)
    return Statistics(mean, covariance, num, more.pop("detector", None), stored_ddof=ddof, path=path,
                      fingerprint=more.pop("fingerprint", None) or hash_numbers(mean, covariance), **more)


def statistics_of_features(path: str, key: str, features: torch.Tensor, **more: Any) -> Statistics:
    """Statistics of stored features [N, D].

    Raises:
        UserError: they are no such table, or not finite.
    """
    if not features.is_floating_point() or features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise UserError(f"{path}: {key} is {features.dtype} {list(features.shape)}, but features must be floats "
                        "[N, D] with two rows or more: make the file again")
    check_width(path, key, features.shape[1])
    blocks = features.split(BLOCK_ROWS)
    mean = sum(block.double().sum(dim=0) for block in blocks) / len(features)
    outer = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for block in blocks:
        x = block.double() - mean
        outer.addmm_(x.T, x)
    return make_statistics(path, f"mean and covariance of {key}", mean.numpy(), (outer / len(features)).numpy(),
                           len(features), 0, **more)


def hash_numbers(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays, 64 hex digits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()

#----------------------------------------------------------------------------

def check_statistics(statistics: Statistics, detector: Detector, output: str = "pool") -> str | None:
    """Refuse statistics that another detector made; return a warning where that cannot be known.

    Args:
        statistics: As stored.
        detector: The metric's.
        output: Which of its outputs they are compared with.

    Raises:
        UserError: other width, or another detector on record.
    """
    width = detector.dims[output]
    if len(statistics.mean) != width:
        raise UserError(f"--ref={statistics.path}: its features have {len(statistics.mean)} dimensions, those of "
                        f"detector {detector.name} {width}: make it again with --save-ref and "
                        f"--detector={detector.name}")
    if statistics.detector is None:
        return f"{statistics.path} does not say which detector made it: taken as {detector.name}, which the metric uses"
    if statistics.detector_sha256 is None and statistics.detector != detector.name:
        return f"{statistics.path} was made by {statistics.detector}, but is compared with {detector.name}"
    if statistics.detector_sha256 not in (None, detector.sha256):
        raise UserError(f"--ref={statistics.path}: made by detector {statistics.detector} "
                        f"({str(statistics.detector_sha256)[:12]}), but the metric uses {detector.name} "
                        f"({detector.sha256[:12]}): make it again with --save-ref")
    if statistics.resize not in (None, detector.resize):
        raise UserError(f"--ref={statistics.path}: its images came to the size of {detector.name} by "
                        f"{statistics.resize}, but now come by {detector.resize}: make it again with --save-ref")
    return None

