# SPDX-License-Identifier: Apache-2.0
"""The data of a run on this process: one stream of real images, and the micro-batches that are made with it."""
from collections.abc import Callable

from torch_utils import distributed
from training.data.randomness import CounterRNG
from training.dataset import EpochOrder, ImageDataset, TrainingStream
from training.step.batches import BatchSource
from training.trainer import Trainer


class TrainingData:
    """Real images from where `trainer` stands on, as its settings say. Close it: it may have loader processes.

    Args:
        trainer: Whose run it is.
        dataset: The real images.
        is_asked_to_stop: Whether somebody wants training to stop: then it is not waited long for images.
    """

    def __init__(self, trainer: Trainer, dataset: ImageDataset, is_asked_to_stop: Callable[[], bool] = lambda: False):
        config = trainer.config
        self._trainer = trainer
        self._probs = dataset.label_distribution() if trainer.G.c_dim > 0 else None
        self._stream = TrainingStream(dataset, EpochOrder(len(dataset), config.seed), distributed.rank(),
                                      distributed.world_size(), config.batch_gpu, trainer.progress.cur_nimg,
                                      config.data.workers, pin_memory=trainer.device.type == "cuda",
                                      is_asked_to_stop=is_asked_to_stop)

    def batches(self, num_micro_batches: int | None = None) -> BatchSource:
        """Iterations of so many micro-batches per process; None: of those that make the batch of the settings."""
        config, world_size = self._trainer.config, distributed.world_size()
        batch = config.batch if num_micro_batches is None else num_micro_batches * world_size * config.batch_gpu
        return BatchSource(self._trainer.G, CounterRNG(config.seed), self._probs, self._stream,
                           len(self._trainer.D.backbone_names), batch, config.batch_gpu, distributed.rank(), world_size,
                           self._trainer.device, augment=bool(config.discriminator.diffaug),
                           paired=config.loss.diversity_weight > 0)

    def close(self) -> None:
        """End the loader processes."""
        self._stream.close()
