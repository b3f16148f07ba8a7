# SPDX-License-Identifier: Apache-2.0
"""Inception score: how sure a classifier is of each image and how varied its answers are."""
import dataclasses
import itertools

import numpy as np
import scipy.special

from dnnlib import UserError

NUM_SPLITS = 10

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation (ddof 0) over the splits."""

    mean: float
    std: float
    num_splits: int
    shuffle_seed: int | None


def inception_score(probs: np.ndarray, num_splits: int = NUM_SPLITS, shuffle_seed: int | None = None,
                    split_size: int | None = None) -> InceptionScore:
    """Per split `exp(mean_x KL(p(y|x) || p(y)))` (Salimans et al. 2016, "Improved Techniques for Training GANs", 4).

    Args:
        probs: Class probabilities [N, C], rows summing to one. Computed in float64.
        num_splits: Runs of neighbouring rows, each with its own p(y).
        shuffle_seed: Shuffle the rows first; None keeps their order. Rows sorted by class must be shuffled: a split
            that holds few classes has a low score whatever the images are.
        split_size: Rows per split, the last may have fewer; replaces `num_splits`.

    Raises:
        UserError: fewer images than splits.
    """
    probs = np.asarray(probs, dtype=np.float64)
    bounds = [split * len(probs) // num_splits for split in range(num_splits + 1)]
    if split_size is not None:
        bounds = [*range(0, len(probs), split_size), len(probs)]
    num_splits = len(bounds) - 1
    if len(probs) < max(num_splits, 1):
        raise UserError(f"is: {len(probs)} images do not fill {num_splits} splits: use {num_splits} images or more")
    order = np.arange(len(probs))
    if shuffle_seed is not None:
        order = np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(len(probs))
    scores = []
    for start, end in itertools.pairwise(bounds):
        part = probs[order[start:end]]      # A copy of one split at a time: 50,000 rows are 400 MB.
        kl = scipy.special.rel_entr(part, part.mean(axis=0, keepdims=True)).sum(axis=1)      # [n]
        scores.append(np.exp(kl.mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), num_splits, shuffle_seed)
