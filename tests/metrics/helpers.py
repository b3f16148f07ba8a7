# SPDX-License-Identifier: Apache-2.0
"""Small sources of images and a small detector, so that whole evaluations take a second."""
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from metrics.detectors import DetectorKind

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch with one thread for the block, as in each of several processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_two_processes(module: str, dest: Path, **more: str) -> None:
    """Run `python -m module dest` as two processes of one group, with one thread each and more environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", module,
               str(dest)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


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
        maps = torch.relu(net.conv(images.float() / 127.5 - 1))
        pool = net.fc(maps.mean(dim=(2, 3)))
        spatial = torch.nn.functional.adaptive_avg_pool2d(maps[:, :3], 2).flatten(1)
        return {"pool": pool, key: net.out(pool) * 5, "spatial": spatial, "pool64": pool.repeat(1, 4)}
    return forward


def tiny_kind(key="logits_unbiased"):
    """16 features, 12 in 'spatial' and 64 in 'pool64'; with the key 'logits' a classifier."""
    outputs, dims = ("pool", key), {}
    if key != "logits":
        outputs, dims = ("pool", key, "spatial", "pool64"), {"spatial": 12, "pool64": 64}
    return DetectorKind(None, 16, outputs, TinyNet, tiny_forward(key), dims=dims)


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


def random_lpips_states(seed=0):
    """(VGG16 up to its last convolution, LPIPS's weights per channel), random, with the names of the official files."""
    from metrics.detectors.lpips import TAPS
    from metrics.detectors.vgg import make_vgg16

    with torch.device("meta"):
        net = make_vgg16()
    generator = torch.Generator().manual_seed(seed)
    features = {}
    for name, x in net.features.state_dict().items():
        scale = (2 / x[0].numel()) ** 0.5 if x.ndim > 1 else 0.1
        features[f"features.{name}"] = torch.randn(x.shape, generator=generator) * scale
    heads = {f"lin{i}.model.1.weight": torch.rand([1, channels, 1, 1], generator=generator)
             for i, channels in enumerate(TAPS.values())}
    return features, heads


def write_lpips_files(folder, states):
    """The two files of weights of LPIPS; the real one of VGG16 holds a classifier besides."""
    from metrics.detectors.lpips import LPIPS_FILE
    from metrics.detectors.vgg import VGG16_FILE

    features, heads = states
    torch.save({**features, "classifier.6.bias": torch.zeros(1000)}, Path(folder) / VGG16_FILE.filename)
    torch.save(heads, Path(folder) / LPIPS_FILE.filename)
    return Path(folder)


def float32_tolerance(terms: int) -> float:
    """How far the features of one network may be apart in two implementations in float32, relative to their length.

    A sum of n terms of random signs, added one after the other, has a relative error of u sqrt(n / 6) with u = 2^-24:
    partial sums grow with the square root of their length, and each is rounded with a mean square error of u^2 / 3.
    From layer to layer errors keep their size relative to the features. `terms` is the sum of n over the layers, and
    two sides differ by sqrt(2) of what each has. A mistake, such as another resize, is above 1e-3.
    """
    return 2 ** -24 * (2 * terms / 6) ** 0.5


VGG_TERMS = 9 * (3 + 64 + 64 + 128 + 128 + 3 * 256 + 5 * 512)           # Terms of the sums in its convolutions.
# Along the longest branch of each block: the stem, three blocks of 35 pixels, a reduction, four of 17, a reduction, two
# of 8, and the classes.
INCEPTION_TERMS = sum((27 + 288 + 288 + 64 + 720, 192 + 576 + 864, 256 + 576 + 864, 288 + 576 + 864, 288 + 576 + 864,
                       768 + 4 * 7 * 128, 2 * (768 + 4 * 7 * 160), 768 + 4 * 7 * 192, 768 + 2 * 7 * 192 + 9 * 192,
                       1280 + 9 * 448 + 3 * 384, 2048 + 9 * 448 + 3 * 384, 2048))
