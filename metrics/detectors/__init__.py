# SPDX-License-Identifier: Apache-2.0
"""Feature detectors: frozen networks that turn uint8 images into the numbers that metrics compare.

The one place for third-party networks. Each detector resizes and normalises by itself, computes in full float32 and
answers one call, `features(images, keys) -> {name: float32 tensor}` (see `metrics/detectors/base.py`).
"""
from metrics.detectors.base import DETECTORS, Detector, DetectorKind, Outputs
from metrics.detectors.dinov2 import DINOV2_FILE
from metrics.detectors.inception import INCEPTION_FILE, INCEPTION_LAYERS, RANDOM_INCEPTION_FILE
from metrics.detectors.loading import asset_of, load_detector, local_path, require
from metrics.detectors.random_weights import RANDOM_SUFFIX
from metrics.detectors.timm_networks import label_of, model_of
from metrics.detectors.vgg import VGG16_FILE

__all__ = ["DETECTORS", "DINOV2_FILE", "INCEPTION_FILE", "INCEPTION_LAYERS", "RANDOM_INCEPTION_FILE", "RANDOM_SUFFIX",
           "VGG16_FILE", "Detector", "DetectorKind", "Outputs", "asset_of", "label_of", "load_detector", "local_path",
           "model_of", "require"]
