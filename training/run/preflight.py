# SPDX-License-Identifier: Apache-2.0
"""What is checked before the first step: the same code, settings and data on every process, room for the
states and for what loader processes send.

That every process is there and messages come through is checked when the group is joined (torch_utils.distributed);
that weights are there, when the networks are made, on every node, before anything is trained.
"""
import dataclasses
import math
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.util import format_bytes
from torch_utils import distributed
from training.config import TrainConfig, to_dict
from training.data.loading import SHARED_MEMORY
from training.dataset import ImageDataset
from training.run.folder import flatten
from training.step.phases import Phase

PAGE_BYTES = 4096               # Shared memory comes in such.
BATCHES_AHEAD = 2               # A loader process keeps so many ready: PyTorch's default.
STATES_ON_DISK = 3              # The last two and the one that is being written.
LOCAL_SETTINGS = ("data.path",) # May differ from node to node: the data itself is compared.


def check_processes(config: TrainConfig, dataset: ImageDataset, info: Mapping[str, Any]) -> None:
    """All processes call it: they must run the same code with the same settings on the same data.

    Args:
        config: Settings of this process.
        dataset: Its data; an image is read.
        info: What else must agree: code, torch, fingerprint of the data (`training.run.folder.run_info`).

    Raises:
        UserError: names the processes that differ, and in what.
    """
    dataset[distributed.rank() % len(dataset)]
    mine = {**info} | {"images": len(dataset)} | flatten(to_dict(config))
    everyones = distributed.all_gather_object((socket.gethostname(), mine))
    lines = differences([facts for _, facts in everyones], [host for host, _ in everyones])
    if lines:
        raise UserError("processes do not agree: " + "; ".join(lines) + ": bring the same code, packages, options and "
                        "data to every node")


def differences(facts: list[dict[str, Any]], hosts: list[str]) -> list[str]:
    """Which ranks differ from rank 0 and in what, one text per fact."""
    lines = []
    for name in sorted(set().union(*facts)):
        values = [fact.get(name) for fact in facts]
        others = [r for r, value in enumerate(values) if value != values[0]]
        if others and name not in LOCAL_SETTINGS:
            found = ", ".join(f"{values[r]!r} on rank {r} ({hosts[r]})" for r in others[:3])
            lines.append(f"{name} is {values[0]!r} on rank 0 ({hosts[0]}), {found}"
                         + (f" and {len(others) - 3} more" if len(others) > 3 else ""))
    return lines

#----------------------------------------------------------------------------

def loader_bytes(config: TrainConfig) -> int:
    """Shared memory that the loader processes of one training process fill: each is two micro-batches ahead."""
    images = config.batch_gpu * 3 * config.data.resolution ** 2
    pages = math.ceil(images / PAGE_BYTES) + math.ceil(8 * config.batch_gpu / PAGE_BYTES)
    return (BATCHES_AHEAD * config.data.workers + 1) * pages * PAGE_BYTES if config.data.workers > 0 else 0


def check_shared_memory(config: TrainConfig) -> None:
    """See that there is room for what the loader processes of this node send. All processes call it.

    Raises:
        UserError: there is not.
    """
    neighbours = distributed.all_gather_object(socket.gethostname()).count(socket.gethostname())
    needed = neighbours * loader_bytes(config)
    if needed == 0 or not SHARED_MEMORY.is_dir():
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        fewer = [n for n in range(1, config.data.workers) if neighbours * loader_bytes(
            dataclasses.replace(config, data=dataclasses.replace(config.data, workers=n))) <= free]
        raise UserError(f"--workers={config.data.workers}: shared memory ({SHARED_MEMORY}) has {format_bytes(free)} "
                        f"free, but the loader processes need {format_bytes(needed)}: take "
                        f"--workers={max(fewer, default=0)}, or give the container more (docker run --shm-size=8g)")


def state_bytes(networks: list[torch.nn.Module], phases: list[Phase]) -> int:
    """Size of one training state: networks, and two moments of Adam per trained parameter."""
    trained = {id(p): p for phase in phases for p in phase.parameters}
    return (sum(int(tensor.nbytes) for net in networks for tensor in net.state_dict().values())
            + 2 * sum(p.nbytes for p in trained.values()))


def check_disk(folder: Path, needed: int) -> None:
    """See that the run folder has room for the states that a run keeps; `needed` is the size of one, in bytes.

    Raises:
        UserError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < STATES_ON_DISK * needed:
        raise UserError(f"--outdir: {folder} has {format_bytes(free)} free, but {STATES_ON_DISK} training states need "
                        f"{format_bytes(STATES_ON_DISK * needed)}: make room, or name a folder on another disk")
