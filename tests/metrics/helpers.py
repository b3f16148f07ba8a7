# SPDX-License-Identifier: Apache-2.0
"""Small sources of images and a small detector, so that whole evaluations take a second."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from metrics.detectors import DetectorKind


class ArraySource:
    """uint8 [N, 3, H, W] in memory, with cheap access to any image."""

    def __init__(self, images, labels=None, description=None):
        self.images = torch.as_tensor(images)
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.num_images = len(self.images)
        self.fingerprint = hashlib.sha256(self.images.numpy().tobytes()).hexdigest()
        self.description = {"kind": "array", "num_images": self.num_images, "resolution": self.images.shape[3],
                            **(description or {})}
        self.num_read = 0

    def batches(self, batch_size):
        return self.batches_at(batch_size, range(self.num_images))

    def batches_at(self, batch_size, indices):
        for part in torch.as_tensor(list(indices)).split(batch_size):
            self.num_read += len(part)
            yield self.images[part], None if self.labels is None else self.labels[part]


class SequentialSource(ArraySource):
    """The same without random access."""

    batches_at = None

    def batches(self, batch_size):
        for start in range(0, self.num_images, batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], None if self.labels is None else self.labels[part]


class TinyNet(torch.nn.Module):
    """A convolution and two linear maps: rounding in it depends on the batch, as in any network."""

    def __init__(self, dim: int = 16, classes: int = 10):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, dim, 3, stride=2, padding=1)
        self.fc = torch.nn.Linear(dim, dim)
        self.out = torch.nn.Linear(dim, classes)


def tiny_forward(key):
    def forward(net, images):
        x = torch.relu(net.conv(images.float() / 127.5 - 1)).mean(dim=(2, 3))
        pool = net.fc(x)
        return {"pool": pool, key: net.out(pool) * 5}
    return forward


def tiny_kind(key="logits_unbiased"):
    return DetectorKind(None, 16, ("pool", key), TinyNet, tiny_forward(key))


def random_images(num, size=8, seed=0, shift=0):
    """uint8 [num, 3, size, size]: noise of a random tint, so that images differ also in the mean."""
    rng = np.random.RandomState(seed)
    tint = rng.randint(0, 128, [num, 3, 1, 1])
    return (rng.randint(0, 100, [num, 3, size, size]) + tint + shift).clip(0, 255).astype(np.uint8)


def write_folder(path, images, classes=None):
    """PNG files 000000.png..., in sub-folders where `classes` gives one per image."""
    for i, image in enumerate(images):
        file = Path(path) / (classes[i] if classes else "") / f"{i:06d}.png"
        os.makedirs(file.parent, exist_ok=True)
        PIL.Image.fromarray(np.ascontiguousarray(np.asarray(image).transpose(1, 2, 0))).save(file)
    return Path(path)


def json_lines(text):
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
