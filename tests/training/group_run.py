"""What a process of `test_processes.py` does in its group. Usage: group_run.py CASE"""
import datetime
import math
import os
import signal
import sys
import time
import types
from pathlib import Path

import torch

from torch_utils import distributed, peer_monitor
from torch_utils.misc import one_hot
from torch_utils.ops import tune
from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator
from training.run.forms import settle_forms
from training.step.gradients import FlatGradients
from training.trainer import Progress

CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


@case
def raises(rank: int) -> None:
    """Rank 1 fails in its second iteration; rank 0 waits at a barrier, where no broken connection would wake it."""
    for it in range(3):
        distributed.all_reduce_sum(torch.ones(1))
        if it == 1 and rank == 1:
            raise ValueError("the second iteration went wrong")
        if it == 1:
            distributed.barrier()


@case
def dies(rank: int) -> None:
    """Rank 1 is killed without a word."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


@case
def works(rank: int) -> None:
    """Rank 0 works for longer than a collective may take; downloads in turn; gradients while backward runs."""
    if rank == 0:
        time.sleep(4)
    distributed.barrier()
    times = distributed.all_gather_object(distributed.node_first(time.monotonic))
    assert times[0] < times[1]
    assert distributed.broadcast_object(rank, src=1) == 1
    with distributed.alone():
        assert distributed.world_size() == 1
        distributed.barrier()
    for bucket_bytes in (1, 300, 1 << 20):
        assert_equal_sums(rank, bucket_bytes)
    print(f"rank {rank} of {distributed.world_size()} is happy")


def small_config(**changed) -> TrainConfig:
    """Settings of a run with 16 pixels and 4 classes."""
    generator = stem_config(16, 4, 128, 16, 2, c_dim=4, w_dim=32)
    values = dict(data=DataConfig("none", 16, 4), generator=generator, loss=LossConfig(),
                  discriminator=DiscriminatorConfig(("local:random",), 16, 4), optim=OptimConfig.official(8), batch=8,
                  batch_gpu=4, total_kimg=1, kimg_per_tick=1, snapshot_ticks=1)
    return TrainConfig(**(values | changed))


@case
def chooses_forms(rank: int) -> None:
    """Forms of operations are timed by rank 0, which takes its time, and both use what it found."""
    timed = []

    def seconds_of(call, device):       # The last candidate is the fastest on rank 0, the first on rank 1.
        call()
        timed.append(call)
        time.sleep(0.1)                 # Together longer than a collective may take.
        return math.exp((rank - 0.5) * len(timed))

    tune.KINDS, tune.seconds_of = ("cpu",), seconds_of
    config = small_config()
    torch.manual_seed(0)
    G = Generator(config.generator).train().requires_grad_(False)
    trainer = types.SimpleNamespace(config=config, device=torch.device("cpu"), G=G, forms={}, progress=Progress())
    settle_forms(trainer, Path("nowhere"), False, [].append)
    assert (len(timed) > 10) == (rank == 0)
    assert {form for name, form in trainer.forms.items() if name.startswith("filtered_lrelu")} == {"matrix"}
    assert distributed.all_gather_object(trainer.forms) == [trainer.forms] * 2
    before = len(timed)
    images = G(torch.ones(config.batch_gpu, G.z_dim), one_hot(torch.arange(config.batch_gpu), 4))
    first, second = distributed.all_gather_object(images)
    assert torch.equal(first, second)
    assert len(timed) == before
    print(f"rank {rank} of {distributed.world_size()} is happy")


def assert_equal_sums(rank: int, bucket_bytes: int) -> None:
    """Overlapped sums over micro-batches of two backward passes are those of one message at the end, bit for bit."""
    sums = []
    for overlapped in (False, True):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
        unused = torch.nn.Parameter(torch.ones(5))
        net[0].requires_grad_(False)
        trained = [*net[1].parameters(), unused, *net[2].parameters()]
        gradients = FlatGradients(trained, bucket_bytes)
        torch.manual_seed(1 + rank)
        for k in range(3):
            if k == 2 and overlapped:
                gradients.overlap(num_backwards=2)
            for _ in range(2):
                net(torch.randn(5, 8)).square().sum().backward()
        assert net[0].weight.grad is None           # Frozen: not exchanged.
        sums.append(gradients.finish() if overlapped else distributed.all_reduce_sum(gradients.flat))
        assert len(sums[-1]) == sum(p.numel() for p in trained)
    assert sums[0].abs().sum() > 0
    assert torch.equal(*sums)


def main(device: torch.device) -> int:
    CASES[sys.argv[1]](distributed.rank())
    return 0


if __name__ == "__main__":
    distributed.TIMEOUT = datetime.timedelta(seconds=2 if sys.argv[1] in ("works", "chooses_forms") else 1800)
    peer_monitor.SILENT_SECONDS = 3.0
    peer_monitor.BEAT_SECONDS = 0.5
    sys.exit(distributed.run_in_group("cpu", main))
