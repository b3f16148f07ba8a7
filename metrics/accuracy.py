# SPDX-License-Identifier: Apache-2.0
"""Classification accuracy: the share of images that a classifier assigns to the class they were made for."""
import torch


def num_correct(logits: torch.Tensor, labels: torch.Tensor) -> int:
    """How many of [N, C] logits have their (first) maximum at the label [N]."""
    return int((logits.argmax(dim=1) == labels.to(logits.device)).sum())


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the images, in [0, 1], whose predicted class equals the label.

    Args:
        logits: [N, C].
        labels: int64 [N].
    """
    return num_correct(logits, labels) / len(logits)
