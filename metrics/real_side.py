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
from metrics.sources import ImageSource, Mirrored, Subset, seeded_indices

MAX_FEATURES = 200_000      # Real images whose features are kept for KID and precision/recall.
SUBSET_SEED = 0             # Chooses images among more. It is fixed, so that the cache serves every run.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class RealWants:
    """What metrics need of the real images as one detector sees them."""

    wants: Wants = Wants()
    max_features: int = 0           # Images whose features are kept, a seeded choice among more.

    def __or__(self, other: "RealWants") -> "RealWants":
        return RealWants(self.wants | other.wants, max(self.max_features, other.max_features))


@dataclasses.dataclass
class RealSide:
    """What metrics take of the real images, by name of the detector's output. Filled on process 0 only."""

    moments: dict[str, Statistics] = dataclasses.field(default_factory=dict)
    features: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)     # float32 [kept, D]
    num_images: int = 0             # Images there are, where features were taken.
    labels: np.ndarray | None = None    # int64 [num_images], where a metric takes them.

    def some_features(self, output: str, limit: int) -> torch.Tensor:
        """Features of at most `limit` images: the seeded choice that a metric with this limit alone would have met."""
        features = self.features[output]
        if len(features) <= limit:
            return features
        kept = seeded_indices(self.num_images, len(features), SUBSET_SEED)
        return features[torch.from_numpy(np.isin(kept, seeded_indices(self.num_images, limit, SUBSET_SEED)))]

    def some_labels(self, limit: int) -> np.ndarray:
        """Labels of the images that `some_features` with the same limit gives."""
        assert self.labels is not None, "checked before any work"
        labels: np.ndarray = self.labels[seeded_indices(self.num_images, min(limit, self.num_images), SUBSET_SEED)]
        return labels


def load_real_side(
    reference: Reference,
    detector: Detector,
    needs: RealWants,
    mirror: bool,                   # Add the mirrored copies of the images.
    limit: int | None,              # Take no more images than these, a seeded choice; None: all.
    options: MetricOptions,         # Device, batch size, cache.
) -> RealSide:
    """What `needs` asks for: stored statistics where the reference has them, else from the images.

    All processes take part and walk over the images at most once.

    Raises:
        UserError: mirror images or a choice of images are asked for, but there are statistics only.
    """
    side, from_images = RealSide(labels=labels_of(reference)), set()
    for output in sorted(needs.wants.moments):
        stored = reference.statistics_for(detector.name, output)
        if stored is None:
            from_images.add(output)
        else:
            _check_stored(stored, mirror, limit)
            side.moments[output] = stored
    wants = dataclasses.replace(needs.wants, moments=frozenset(from_images))
    if wants:
        assert reference.source is not None         # Checked before any work: see `metric_main`.
        _from_images(side, view_of(reference.source, mirror, limit), detector, wants, needs.max_features, options)
    return side


def labels_of(reference: Reference) -> np.ndarray | None:
    """The labels of the real images, int64; None where there are none."""
    labels = getattr(reference.source, "labels", None)
    return None if labels is None else np.asarray(labels)


def _check_stored(stored: Statistics, mirror: bool, limit: int | None) -> None:
    if stored.mirror and not mirror:
        raise UserError(f"--ref={stored.path}: was saved with --mirror=1, but the metric takes real images as they "
                        "are: save it without, or use --metrics=fid --mirror=1")
    if mirror and not stored.mirror:
        raise UserError(f"--mirror: {stored.path} holds statistics, which cannot be mirrored: name the images "
                        "themselves, or leave --mirror out")
    if limit is not None and (stored.num_images is None or stored.num_images > limit):
        raise UserError(f"--ref={stored.path}: holds statistics of {stored.num_images or 'an unknown number of'} "
                        f"images, but the metric takes {limit} real images: name the images themselves, or use "
                        "fid50k_full")


def view_of(source: ImageSource, mirror: bool, limit: int | None) -> ImageSource:
    """`source` with or without its mirror images, then a seeded choice of `limit` of these."""
    source = Mirrored(source) if mirror else source
    if limit is None or source.num_images <= limit:
        return source
    return Subset(source, seeded_indices(source.num_images, limit, SUBSET_SEED))


def compute_statistics(source: ImageSource, detector: Detector, outputs: list[str], mirror: bool,
                       options: MetricOptions) -> list[Statistics]:
    """Mean and covariance of these outputs over all images of a source, for a file; empty on processes but the first.
    """
    needs = RealWants(Wants(moments=frozenset(outputs)))
    side = load_real_side(Reference(source), detector, needs, mirror, None, options)
    return [side.moments[output] for output in outputs] if side.moments else []

#----------------------------------------------------------------------------

def _from_images(side: RealSide, source: ImageSource, detector: Detector, wants: Wants, max_features: int,
                 options: MetricOptions) -> None:
    """Fill `side` from the cache; what is not there, from one walk over the images."""
    side.num_images = source.num_images
    moments_files = {key: cache_path(detector, source.fingerprint, kind="moments", output=key)
                     for key in sorted(wants.moments)}
    features_files = {key: cache_path(detector, source.fingerprint, kind="features", output=key, limit=max_features,
                                      seed=SUBSET_SEED) for key in sorted(wants.features)}
    fingerprint, resolution = source.fingerprint, source.description.get("resolution")

    def keep(output: str, mean: np.ndarray, covariance: np.ndarray) -> None:
        side.moments[output] = Statistics(mean, covariance, source.num_images, detector.name, detector.sha256,
                                          fingerprint=fingerprint, resolution=resolution, output=output,
                                          crop=source.description.get("crop"))

    def read() -> Wants:
        """Fill process 0's `side`; returns what was not there."""
        for key, path in moments_files.items():
            if (arrays := read_cache(path)) is not None:
                keep(key, arrays["mean"], arrays["covariance"])
        for key, path in features_files.items():
            if (arrays := read_cache(path)) is not None:
                side.features[key] = torch.from_numpy(arrays["features"])
        return Wants(wants.moments - side.moments.keys(), wants.features - side.features.keys())

    missing = on_rank0(read) if options.use_cache else wants
    if not missing:
        return
    got = _walk(source, detector, missing, max_features, options)
    for key, (mean, covariance) in got.moments.items():
        keep(key, mean, covariance)
    side.features.update(got.features)
    if options.use_cache:
        on_rank0(lambda: _write(got, moments_files, features_files))


def _walk(source: ImageSource, detector: Detector, wants: Wants, max_features: int,
          options: MetricOptions) -> Collected:
    """One walk: over all images, or over those alone whose features are kept."""
    subset = seeded_indices(source.num_images, max_features, SUBSET_SEED)
    indices, captured = (None, subset) if wants.moments else (subset, None)
    return collect(source, {"real": (detector, wants)}, options.device, options.batch_size, indices, captured,
                   "real images" if options.verbose else None)["real"]


def _write(got: Collected, moments_files: dict[str, Path], features_files: dict[str, Path]) -> None:
    for key, (mean, covariance) in got.moments.items():
        write_cache(moments_files[key], {"mean": mean, "covariance": covariance})
    for key, features in got.features.items():
        write_cache(features_files[key], {"features": features.numpy()})
