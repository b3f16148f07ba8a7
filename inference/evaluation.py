# SPDX-License-Identifier: Apache-2.0
"""Metrics of a generator while it trains."""
from collections.abc import Callable, Sequence
from typing import Any

import torch

from dnnlib.classes import Classes
from inference.image_inputs import DatasetSource
from inference.sampling import GeneratorSource
from metrics.metric_main import evaluate, preflight
from metrics.options import MetricOptions
from metrics.references import Reference
from training.dataset import ImageDataset, follow_classes
from training.networks_stylegan3 import Generator


def network_evaluator(names: Sequence[str], dataset: ImageDataset, detector: str | None, num: int | None,
                      device: torch.device, seed: int) -> Callable[[Generator], list[dict[str, Any]]]:
    """A function that scores a generator against its training data.

    Real images are taken without x-flips, as officially. Everything a metric needs is looked for now, so that missing
    weights show before training and not at the first snapshot.

    Args:
        names: Metrics, or groups of them.
        dataset: The training data.
        detector: For metrics whose name leaves it open.
        num: Generated images, instead of the number that a name says.
    """
    options = MetricOptions(device=device, seed=seed, detector=detector, num=num)
    preflight(list(names), options)
    images = ImageDataset(dataset.path, use_labels=dataset.c_dim > 0)
    follow_classes(images, "the run", Classes(dataset.class_names))
    labels = images.labels if images.c_dim > 0 else None
    reference = Reference(source=DatasetSource(images, str(dataset.path), labels, images.class_names))
    probs = dataset.label_distribution() if dataset.c_dim > 0 else None

    def score(G: Generator) -> list[dict[str, Any]]:
        def samples(count: int) -> GeneratorSource:
            return GeneratorSource(G, count, seed, "dataset", probs, class_names=dataset.class_names or None)
        return evaluate(list(names), samples, reference, options)

    return score
