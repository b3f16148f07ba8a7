# SPDX-License-Identifier: Apache-2.0
"""Metrics of the generator itself, as protocols name them: path length and equivariance."""
from collections.abc import Callable

from metrics import path_length
from metrics.detectors import lpips
from metrics.equivariance import MAX_TRANSLATION, equivariance
from metrics.formulas import Answer
from metrics.image_motion import LOBES
from metrics.latents import LatentSource
from metrics.options import MetricOptions

#----------------------------------------------------------------------------

def require_lpips(options: MetricOptions) -> None:
    """Find or fetch the files of LPIPS. Raises UserError."""
    lpips.require_lpips(options.weights_dir, options.offline, options.allow_unverified)


def ppl2_wend(source: LatentSource, options: MetricOptions) -> Answer:
    """Perceptual path length in w, at the end points of paths, over whole images."""
    distance = lpips.load_lpips(options.device, options.weights_dir, options.offline, options.allow_unverified)
    value = path_length.perceptual_path_length(source, distance, options.device,
                                               progress="path length" if options.verbose else None)
    settings = {"detector": lpips.NAME, "detector_sha256": distance.sha256, "epsilon": path_length.EPSILON,
                "space": "w", "sampling": "end", "crop": False, "resolution": path_length.RESOLUTION,
                "percentiles": path_length.PERCENTILES}
    return {"": value}, settings if distance.verified else {**settings, "detector_unverified": True}


def equivariance_in(key: str) -> Callable[[LatentSource, MetricOptions], Answer]:
    """EQ-T or EQ-R; `key` as in `metrics.equivariance`."""
    def formula(source: LatentSource, options: MetricOptions) -> Answer:
        title = f"equivariance {key}" if options.verbose else None
        value = equivariance(source, [key], options.device, progress=title)[key]
        limits = {"angle": "uniform"} if key == "eqr" else {"max_translation": MAX_TRANSLATION}
        return {"": value}, {"unit": "dB", **limits, "lanczos": None if key == "eqt_int" else LOBES}
    return formula
