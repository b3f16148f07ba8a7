# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits in the shape of a data set, for tests that need real images with classes."""
import numpy as np
import sklearn.datasets
import torch


class Digits:
    """The 1,797 digits of scikit-learn, enlarged: has what the code here asks of an `ImageDataset`."""

    def __init__(self, resolution: int = 16, count: int | None = None):
        digits = sklearn.datasets.load_digits()
        x = torch.as_tensor(digits.images[:count], dtype=torch.float32)[:, None] * (255 / 16)
        x = torch.nn.functional.interpolate(x, size=resolution, mode="bilinear")
        self.pixels = x.round().to(torch.uint8).expand(-1, 3, -1, -1).numpy()
        self.labels = digits.target[:count].astype(np.int64)
        self.class_names = [str(i) for i in range(10)]

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.pixels[i], int(self.labels[i])
