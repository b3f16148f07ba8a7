# SPDX-License-Identifier: Apache-2.0
"""Diversity term of the generator, for small data sets: two images of a class may not be more alike than real ones are.

With few images per class and short runs a conditional generator tends to draw the same picture of a class for every z.
Mao et al. 2019 ("Mode Seeking GANs", equation 3) and Yang et al. 2019 ("Diversity-Sensitive Conditional GANs",
equation 2) reward the distance between images of two z; the latter caps it. Here the cap is no free number: it is the
distance that two real images of a class have on average, so the term is silent as soon as the variety is right.
"""
import torch


def diversity_loss(images: torch.Tensor, target: float) -> torch.Tensor:
    """The distance that pairs lack, [N / 2], at least 0, of images [N, C, H, W] in [-1, 1], 2k and 2k + 1 of one class.

    Args:
        images: Made from independent z; N is even.
        target: Mean absolute difference to reach, `training.dataset.real_pair_distance`.
    """
    distances = (images[0::2] - images[1::2]).abs().mean(dim=[1, 2, 3])
    return torch.relu(target - distances)
