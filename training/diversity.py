# SPDX-License-Identifier: Apache-2.0
"""Diversity term of the generator, for small data sets: two images of a class may not be more alike than real ones are.

With few images per class and short runs a conditional generator tends to draw the same picture of a class for every z.
Mao et al. 2019 ("Mode Seeking GANs", equation 3) and Yang et al. 2019 ("Diversity-Sensitive Conditional GANs",
equation 2) reward the distance between images of two z; the latter caps it. Here the cap is no free number: it is the
distance that two real images of a class have on average, so the term is silent as soon as the variety is right.
"""
import numpy as np
import torch

from training.dataset import ImageDataset
from training.randomness import permutation

NUM_PAIRS = 1024


def real_pair_distance(dataset: ImageDataset, seed: int = 0, num_pairs: int = NUM_PAIRS) -> float:
    """Mean absolute difference of two random images of one class, pixels in [-1, 1]; 0 if no class has two.

    Args:
        dataset: The images; without labels all count as one class.
        seed: Of the choice of pairs.
        num_pairs: Pairs to look at, at most; classes come as often as in the data.
    """
    labels = np.asarray(dataset.labels)
    order = permutation(seed, 0, len(labels))
    order = order[np.argsort(labels[order], kind="stable")]         # Class by class, shuffled within.
    pairs = np.stack([order[:-1], order[1:]], axis=1)
    pairs = pairs[labels[pairs[:, 0]] == labels[pairs[:, 1]]]
    if len(pairs) == 0:
        return 0.0
    pairs = pairs[permutation(seed, 1, len(pairs))[:num_pairs]]
    distances = [np.abs(dataset[a][0].astype(np.float64) - dataset[b][0]).mean() for a, b in pairs]
    return float(np.mean(distances) / 127.5)


def diversity_loss(images: torch.Tensor, target: float) -> torch.Tensor:
    """What pairs lack in distance: images [N, C, H, W] in [-1, 1], 2k and 2k + 1 of one class -> [N / 2], at least 0.

    Args:
        images: Of independent z. N is even.
        target: Mean absolute difference to reach, `real_pair_distance`.
    """
    distances = (images[0::2] - images[1::2]).abs().mean(dim=[1, 2, 3])
    return torch.relu(target - distances)
