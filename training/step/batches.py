# SPDX-License-Identifier: Apache-2.0
"""Makes the inputs of each phase: latents, labels, augmentation numbers and real images.

Every random number is a function of (seed, stream, position), where the position of a sample is the number of images
shown before it. It does not matter which process draws it, in which micro-batch, or whether the run was restarted.
"""
import dataclasses
import time
from collections.abc import Iterator

import numpy as np
import torch

from torch_utils.images import from_uint8
from torch_utils.misc import one_hot, to_device
from training.data.randomness import CounterRNG
from training.diffaug import NUM_UNIFORMS
from training.networks_stylegan3 import Generator
from training.step.micro_batch import MicroBatch
from training.step.phases import Phase


class BatchSource:
    """Makes the micro-batches of this process."""

    def __init__(
        self,
        G: Generator,
        rng: CounterRNG,
        label_probs: np.ndarray | None,     # [c_dim] float64: how often each class is asked for; None: unconditional.
        real_images: Iterator[tuple[torch.Tensor, torch.Tensor]],   # uint8 [batch_gpu, 3, R, R], int64 [batch_gpu].
        num_backbones: int,                 # Augmentation is drawn for each of them.
        batch: int,                         # Samples per iteration, over all processes.
        batch_gpu: int,                     # Samples of one micro-batch.
        rank: int,
        world_size: int,
        device: torch.device,
        augment: bool = True,
        paired: bool = False,               # Gmain asks for samples 2k and 2k + 1 of the same class (diversity term).
    ):
        self.G, self.rng, self.label_probs, self.real_images = G, rng, label_probs, real_images
        self.num_backbones, self.device, self.augment = num_backbones, device, augment
        self.batch_gpu, self.rank, self.world_size, self.paired = batch_gpu, rank, world_size, paired
        self.batch, self.num_micro_batches = batch, batch // (batch_gpu * world_size)
        self._waited = 0.0

    def micro_batches(self, phase: Phase, cur_nimg: int) -> Iterator[MicroBatch]:
        """This process's share of the iteration that begins at image `cur_nimg`."""
        for k in range(self.num_micro_batches):
            first = cur_nimg + (k * self.world_size + self.rank) * self.batch_gpu
            yield self._micro_batch(phase, np.arange(first, first + self.batch_gpu))

    def wait_seconds(self) -> float:
        """Time spent waiting for real images since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _micro_batch(self, phase: Phase, positions: np.ndarray) -> MicroBatch:
        name, config = phase.name, self.G.config
        batch = MicroBatch(
            z=self._to_device(self.rng.normal(f"z/{name}", positions, (config.z_dim,))),
            gen_c=self._one_hot(self._labels(name, positions)),
            augment_fake=self._augmentation(f"augment/{name}/fake", positions),
        )
        if phase.uses_real_images:
            started = time.perf_counter()
            images, labels = next(self.real_images)
            self._waited += time.perf_counter() - started
            images = from_uint8(to_device(images, self.device))
            batch = dataclasses.replace(batch, real_img=images, real_c=self._one_hot(labels),
                                        augment_real=self._augmentation(f"augment/{name}/real", positions))
        if phase.uses_noise:
            shape = (config.img_channels, config.img_resolution, config.img_resolution)
            noise = self._to_device(self.rng.normal(f"noise/{name}", positions, shape))
            batch = dataclasses.replace(batch, pl_noise=noise)
        return batch

    def _labels(self, name: str, positions: np.ndarray) -> torch.Tensor:
        if self.label_probs is None:
            return torch.zeros([len(positions)], dtype=torch.int64)
        if self.paired and name == "Gmain":
            positions = positions // 2 * 2
        return torch.from_numpy(self.rng.integers_from(f"c/{name}", positions, self.label_probs))

    def _one_hot(self, labels: torch.Tensor) -> torch.Tensor:
        return one_hot(to_device(labels, self.device), self.G.c_dim)

    def _augmentation(self, stream: str, positions: np.ndarray) -> torch.Tensor | None:
        """[backbones, N, NUM_UNIFORMS]."""
        if not self.augment:
            return None
        u = self.rng.uniform(stream, positions, (self.num_backbones, NUM_UNIFORMS))
        return self._to_device(u.transpose(1, 0, 2).copy())

    def _to_device(self, x: np.ndarray) -> torch.Tensor:
        return to_device(torch.from_numpy(x), self.device)
