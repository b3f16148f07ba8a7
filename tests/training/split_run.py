"""Five iterations in float64, under any launcher; rank 0 writes every tensor. `test_nodes.py` starts it.

Usage: split_run.py DATA SPLIT_GROUP BATCH_GPU=DEST [BATCH_GPU=DEST ...]
"""
import dataclasses
import hashlib
import sys

import torch

from torch_utils import distributed
from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig
from training.dataset import ImageDataset
from training.generator.layer_schedule import stem_config
from training.run.networks import make_networks
from training.run.training_data import TrainingData
from training.step.batches import BatchSource
from training.trainer import Trainer

BATCH, ITERATIONS, START_NIMG = 8, 5, 64


def doubled(batch):
    """All floating-point tensors of a micro-batch in float64."""
    return dataclasses.replace(batch, **{name: value.double() for name, value in vars(batch).items()
                                         if value is not None and value.is_floating_point()})


def digests(phase: str, nimg: int, batch) -> dict[str, str]:
    """Position of every sample -> what it is made of; checks that z, labels and augmentation follow the position."""
    rows = {}
    for k in range(len(batch.z)):
        parts = [batch.z[k], batch.gen_c[k], batch.augment_fake[:, k]]
        parts += [x for x in (batch.pl_noise, batch.real_img, batch.real_c) if x is not None for x in (x[k],)]
        rows[f"{phase}/{nimg + k}"] = hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()
    return rows


class SeenBatches:
    """Batches in double precision, and digests of all of them by phase and position."""

    def __init__(self, source: BatchSource):
        self.source, self.batch, self.seen = source, source.batch, {}

    def micro_batches(self, phase, cur_nimg):
        for k, batch in enumerate(self.source.micro_batches(phase, cur_nimg)):
            first = cur_nimg + (k * distributed.world_size() + distributed.rank()) * len(batch.z)
            self.seen |= digests(phase.name, first, batch)
            yield doubled(batch)


def main(device) -> int:
    data, group = sys.argv[1], int(sys.argv[2])
    for batch_gpu, _, dest in (run.partition("=") for run in sys.argv[3:]):
        train(data, group, int(batch_gpu), dest, device)
    return 0


def train(data: str, group: int, batch_gpu: int, dest: str, device) -> None:
    """One run from its beginning."""
    rank = distributed.rank()
    dataset = ImageDataset(data, use_labels=True)
    config = TrainConfig(
        data=DataConfig(data, 16, dataset.c_dim), generator=stem_config(16, 4, 128, 16, 2, c_dim=4, w_dim=32),
        discriminator=DiscriminatorConfig(("local:random",), 16, dataset.c_dim, max_channels=32, ghost_batch=group),
        loss=LossConfig(pl_start_kimg=0), optim=OptimConfig.official(BATCH), batch=BATCH, batch_gpu=batch_gpu,
        total_kimg=1, kimg_per_tick=1, snapshot_ticks=1)
    G, D = (net.double() for net in make_networks(config, dataset, None, device))
    trainer = Trainer(config, G, D, None, device)
    trainer.progress.cur_nimg = START_NIMG
    batches = SeenBatches(TrainingData(trainer, dataset).batches())
    for _iteration in range(ITERATIONS):
        trainer.step(batches)
    G_ema, loss, seen = trainer.G_ema, trainer.loss, batches.seen
    seen = {key: value for part in distributed.all_gather_object(seen) for key, value in part.items()}
    if rank == 0:
        tensors = {f"{name}.{key}": value for name, net in (("G", G), ("G_ema", G_ema)) for key, value
                   in net.state_dict().items()} | {f"D.{key}": value for key, value in D.own_state_dict().items()}
        torch.save({"tensors": tensors | {"pl_mean": loss.pl_mean}, "seen": seen}, dest)


if __name__ == "__main__":
    sys.exit(distributed.run_in_group("cpu", main))
