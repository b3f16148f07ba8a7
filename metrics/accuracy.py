# SPDX-License-Identifier: Apache-2.0
"""Classification accuracy: the share of images that a classifier assigns to the class they were made for."""
import torch

from torch_utils.misc import to_device


def num_correct(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How many of [N, C] logits have their (first) maximum at the label [N]: a number on their device, not waited for.
    """
    return (logits.argmax(dim=1) == to_device(labels, logits.device)).sum()


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images, in [0, 1], whose predicted class equals the label.

    Args:
        logits: [N, C].
        labels: int64 [N].
    """
    return int(num_correct(logits, labels)) / len(logits)
