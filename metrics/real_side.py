# SPDX-License-Identifier: Apache-2.0
"""Statistics and features of the real images: from a file, from the cache, or computed and cached."""
import dataclasses
from pathlib import Path

import numpy as np
import torch

from dnnlib import UserError
from metrics.detectors import Detector
from metrics.options import MetricOptions
from metrics.passes import Collected, Wants, collect, on_rank0
from metrics.references import Reference, Statistics, cache_path, read_cache, write_cache
from metrics.sources import ImageSource, Mirrored, seeded_indices

MAX_FEATURES = 200_000      # Real images whose features are kept for KID and precision/recall.
SUBSET_SEED = 0             # Of their choice among more. Fixed, so that the cache serves every run.

#----------------------------------------------------------------------------

@dataclasses.dataclass
class RealSide:
    """What metrics take of the real images. Arrays exist on process 0 only."""

    num_images: int | None = None               # Behind mean and covariance; None where a file does not say.
    mean: np.ndarray | None = None              # float64 [D]
    covariance: np.ndarray | None = None        # float64 [D, D], ddof 0
    features: torch.Tensor | None = None        # float32 [min(N, MAX_FEATURES), D]


def load_real_side(
    reference: Reference,
    detector: Detector,
    wants: Wants,                   # Moments, features or both.
    mirror: bool,                   # Add the mirrored copies of the images.
    options: MetricOptions,         # Device, batch size, cache.
) -> RealSide:
    """What `wants` asks for. All processes take part and walk over the images at most once.

    Raises:
        UserError: mirror images of statistics are asked for.
    """
    side = RealSide()
    if wants.moments and reference.statistics is not None:
        if mirror:
            raise UserError(f"--mirror: {reference.statistics.path} holds statistics, which cannot be mirrored: name "
                            "the images themselves, or leave --mirror out")
        stored = reference.statistics
        side.num_images, side.mean, side.covariance = stored.num_images, stored.mean, stored.covariance
        wants = dataclasses.replace(wants, moments=False)
    if wants:
        source = Mirrored(reference.source) if mirror else reference.source
        _from_images(side, source, detector, wants, options)
    return side


def compute_statistics(source: ImageSource, detector: Detector, mirror: bool,
                       options: MetricOptions) -> Statistics | None:
    """Mean and covariance of all images of a source, for a file; on process 0, None on the others."""
    side = load_real_side(Reference(source), detector, Wants(moments=True), mirror, options)
    if side.mean is None:
        return None
    fingerprint = Mirrored(source).fingerprint if mirror else source.fingerprint
    return Statistics(side.mean, side.covariance, side.num_images, detector.name, detector.sha256,
                      fingerprint=fingerprint, resolution=source.description.get("resolution"))

#----------------------------------------------------------------------------

def _from_images(side: RealSide, source: ImageSource, detector: Detector, wants: Wants,
                 options: MetricOptions) -> None:
    """Fill `side` from the cache; what is not there, from one walk over the images."""
    moments_file = cache_path(detector, source.fingerprint, kind="moments")
    features_file = cache_path(detector, source.fingerprint, kind="features", limit=MAX_FEATURES, seed=SUBSET_SEED)
    found = set()
    if options.use_cache:
        found = on_rank0(lambda: _read(side, wants, moments_file, features_file))
    if wants.moments:
        side.num_images = source.num_images
    missing = Wants(moments=wants.moments and "moments" not in found,
                    features=wants.features and "features" not in found)
    if not missing:
        return
    subset = seeded_indices(source.num_images, MAX_FEATURES, SUBSET_SEED)
    everything = missing.moments        # Else only the images whose features are kept.
    got = collect(source, {"real": (detector, missing)}, options.device, options.batch_size,
                  indices=None if everything else subset, captured=subset if everything else None,
                  progress="real images" if options.verbose else None)["real"]
    if missing.moments:
        side.mean, side.covariance = got.mean, got.covariance
    if missing.features:
        side.features = got.features
    if options.use_cache:
        on_rank0(lambda: _write(got, missing, moments_file, features_file))


def _read(side: RealSide, wants: Wants, moments_file: Path, features_file: Path) -> set[str]:
    """Fill process 0's `side`; returns what was found."""
    found = set()
    if wants.moments and (arrays := read_cache(moments_file)) is not None:
        side.mean, side.covariance = arrays["mean"], arrays["covariance"]
        found.add("moments")
    if wants.features and (arrays := read_cache(features_file)) is not None:
        side.features = torch.from_numpy(arrays["features"])
        found.add("features")
    return found


def _write(got: Collected, wants: Wants, moments_file: Path, features_file: Path) -> None:
    if wants.moments:
        write_cache(moments_file, {"mean": got.mean, "covariance": got.covariance})
    if wants.features:
        write_cache(features_file, {"features": got.features.numpy()})
