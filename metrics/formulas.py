# SPDX-License-Identifier: Apache-2.0
"""What metrics compute from the two sides. Each formula returns (values by suffix of the metric's name, settings).

Settings go into the record; `num_real` and `ddof` among them become keys of their own.
"""
from collections.abc import Callable
from typing import Any

import torch

from metrics.frechet import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel_distance import kernel_distance
from metrics.linear_probe import probe_accuracy
from metrics.options import MetricOptions
from metrics.passes import Collected
from metrics.precision_recall import precision_recall
from metrics.real_side import RealSide

Answer = tuple[dict[str, float], dict[str, Any]]
Formula = Callable[[Collected, RealSide, MetricOptions], Answer]

ADM_SPLIT = 5000        # Images per split of ADM's inception score.

#----------------------------------------------------------------------------

def frechet(output: str, ddof: int) -> Formula:
    """Frechet distance of one output of the detector, both covariances divided by N - `ddof`."""
    def formula(gen: Collected, real: RealSide, options: MetricOptions) -> Answer:
        mean, covariance = gen.moments[output]
        covariance = covariance * (gen.num_images / (gen.num_images - ddof))
        other = real.moments[output]
        value = frechet_distance(other.mean, other.covariance_at(ddof), mean, covariance)
        return {"": value}, {"ddof": ddof, "num_real": other.num_images}
    return formula


def kernel(limit: int) -> Formula:
    """KID of 'pool' with at most `limit` real images."""
    def formula(gen: Collected, real: RealSide, options: MetricOptions) -> Answer:
        features = real.some_features("pool", limit)
        kid = kernel_distance(features, gen.features["pool"], seed=options.seed, device=options.device)
        return {"": kid.mean}, {"num_real": len(features), "num_subsets": kid.num_subsets,
                                "subset_size": kid.subset_size, "subset_seed": kid.seed, "std_over_subsets": kid.std}
    return formula


def neighbours(limit: int, dtype: torch.dtype) -> Formula:
    """Precision and recall of 'pool', rounded to `dtype`, with at most `limit` real images."""
    def formula(gen: Collected, real: RealSide, options: MetricOptions) -> Answer:
        features = real.some_features("pool", limit)
        result = precision_recall(features, gen.features["pool"], device=options.device, dtype=dtype)
        rounded = "fp16" if dtype == torch.float16 else "not rounded"
        return {"_precision": result.precision, "_recall": result.recall}, {
            "num_real": len(features), "k": result.k, "rounded_to": rounded, "distances_in": "float32"}
    return formula


def shuffled_score(gen: Collected, real: RealSide, options: MetricOptions) -> Answer:
    """Inception score, ten splits of the shuffled images."""
    assert gen.probs is not None            # What the metric wants of the walk says so.
    score = inception_score(gen.probs, shuffle_seed=options.seed)
    return {"_mean": score.mean, "_std": score.std}, {
        "num_splits": score.num_splits, "order": "shuffled", "shuffle_seed": score.shuffle_seed, "ddof": 0}


def score_in_order(gen: Collected, real: RealSide, options: MetricOptions) -> Answer:
    """Inception score as ADM's evaluator has it: splits of 5000 images in file order (the last may have fewer)."""
    assert gen.probs is not None
    score = inception_score(gen.probs, split_size=ADM_SPLIT)
    return {"": score.mean}, {"num_splits": score.num_splits, "split_size": ADM_SPLIT, "order": "file"}


def accuracy(gen: Collected, real: RealSide, options: MetricOptions) -> Answer:
    """Share of the images that the judge assigns to the class they were made for."""
    assert gen.num_correct is not None
    return {"": gen.num_correct / gen.num_images}, {"num_correct": gen.num_correct}


def probe(limit: int) -> Formula:
    """Share of the images that a linear probe of 'pool', fitted to at most `limit` real images, assigns to the class
    they were made for, and the share of real images held out of the fit that it classifies correctly."""
    def formula(gen: Collected, real: RealSide, options: MetricOptions) -> Answer:
        assert gen.labels is not None
        found = probe_accuracy(real.some_features("pool", limit), real.some_labels(limit), gen.features["pool"],
                               gen.labels, options.seed)
        return {"": found.accuracy, "_held_out": found.held_out}, {
            "num_real": found.num_fitted + found.num_held_out, "num_held_out": found.num_held_out,
            "held_out_seed": options.seed, "penalty": found.penalty}
    return formula
