# SPDX-License-Identifier: Apache-2.0
"""Inception score: how sure a classifier is of each image and how varied its answers are."""
import dataclasses

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


def inception_score(probs: np.ndarray, num_splits: int = NUM_SPLITS, shuffle_seed: int | None = None) -> InceptionScore:
    """Per split `exp(mean_x KL(p(y|x) || p(y)))` (Salimans et al. 2016, "Improved Techniques for Training GANs", 4).

    Args:
        probs: Class probabilities [N, C], rows summing to one. Computed in float64.
        num_splits: Runs of neighbouring rows, each with its own p(y).
        shuffle_seed: Shuffle the rows first; None keeps their order. Rows sorted by class must be shuffled: a split
            that holds few classes has a low score whatever the images are.

    Raises:
        UserError: fewer images than splits.
    """
    probs = np.asarray(probs, dtype=np.float64)
    if len(probs) < num_splits:
        raise UserError(f"is: {len(probs)} images do not fill {num_splits} splits: use {num_splits} images or more")
    if shuffle_seed is not None:
        probs = probs[np.random.Generator(np.random.PCG64(shuffle_seed)).permutation(len(probs))]
    scores = []
    for split in range(num_splits):
        part = probs[split * len(probs) // num_splits : (split + 1) * len(probs) // num_splits]
        kl = scipy.special.rel_entr(part, part.mean(axis=0, keepdims=True)).sum(axis=1)      # [n]
        scores.append(np.exp(kl.mean()))
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)), num_splits, shuffle_seed)
