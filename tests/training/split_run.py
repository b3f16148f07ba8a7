"""Five iterations in float64, under any launcher; rank 0 writes every tensor. `test_nodes.py` starts it.

Usage: split_run.py DATA BATCH_GPU SPLIT_GROUP DEST
"""
import copy
import dataclasses
import hashlib
import sys

import torch

from torch_utils import distributed
from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig
from training.data.randomness import CounterRNG
from training.dataset import EpochOrder, ImageDataset, TrainingStream
from training.generator.layer_schedule import stem_config
from training.loss import StyleSanLoss
from training.run.networks import make_networks
from training.step.batches import BatchSource
from training.step.ema import update_ema
from training.step.guard import GradientGuard
from training.step.phases import make_phases, run_phase

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


def main(device) -> int:
    data, batch_gpu, group, dest = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    rank, size = distributed.rank(), distributed.world_size()
    dataset = ImageDataset(data, use_labels=True)
    config = TrainConfig(
        data=DataConfig(data, 16, dataset.c_dim), generator=stem_config(16, 4, 128, 16, 2, c_dim=4, w_dim=32),
        discriminator=DiscriminatorConfig(("local:random",), 16, dataset.c_dim, max_channels=32, split_group=group),
        loss=LossConfig(pl_start_kimg=0), optim=OptimConfig.official(BATCH), batch=BATCH, batch_gpu=batch_gpu,
        total_kimg=1, kimg_per_tick=1, snapshot_ticks=1)
    G, D = (net.double() for net in make_networks(config, dataset, None, device))
    G_ema = copy.deepcopy(G)
    loss = StyleSanLoss(G, D, config.loss, device)
    loss.pl_mean = loss.pl_mean.double()
    phases, guard = make_phases(G, D, loss, config.optim), GradientGuard(BATCH)
    stream = TrainingStream(dataset, EpochOrder(len(dataset), 0), rank, size, batch_gpu, START_NIMG, 0)
    probs = dataset.label_distribution()
    source = BatchSource(G, CounterRNG(0), probs, stream, 1, BATCH, batch_gpu, rank, size, device)
    seen = {}
    for it in range(ITERATIONS):
        nimg = START_NIMG + it * BATCH
        loss.set_progress(nimg)
        for phase in phases:
            if it % phase.interval == 0:
                batches = list(source.micro_batches(phase, nimg))
                for k, batch in enumerate(batches):
                    seen |= digests(phase.name, nimg + (k * size + rank) * batch_gpu, batch)
                run_phase(phase, map(doubled, batches), BATCH, guard)
        update_ema(G_ema, G, nimg, BATCH, config.optim)
    seen = {key: value for part in distributed.all_gather_object(seen) for key, value in part.items()}
    if rank == 0:
        tensors = {f"{name}.{key}": value for name, net in (("G", G), ("G_ema", G_ema)) for key, value
                   in net.state_dict().items()} | {f"D.{key}": value for key, value in D.own_state_dict().items()}
        torch.save({"tensors": tensors | {"pl_mean": loss.pl_mean}, "seen": seen}, dest)
    return 0


if __name__ == "__main__":
    sys.exit(distributed.run_in_group("cpu", main))
