# SPDX-License-Identifier: Apache-2.0
"""The only module that talks to torch.distributed.

`python train.py` and `torchrun ... train.py` are one path: without torchrun's environment variables the world has one
process, no process group exists, and every function here does the obvious thing.
"""
import datetime
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed

TIMEOUT = datetime.timedelta(minutes=30)    # Rank 0 may write a large file or score a metric meanwhile.

#----------------------------------------------------------------------------

def init(device_type: str) -> torch.device:
    """Join the process group that the environment describes, if any.

    Args:
        device_type: 'cuda', 'cpu' or 'mps'. CUDA processes talk NCCL, all others gloo.

    Returns:
        The device of this process: with CUDA the one of its local rank.
    """
    device = torch.device(device_type)
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not torch.distributed.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        options = {"device_id": device} if device_type == "cuda" else {}
        torch.distributed.init_process_group(backend, init_method="env://", timeout=TIMEOUT, **options)
    return device


def shutdown() -> None:
    """Leave the process group, if one was joined."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 to world_size() - 1."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def device() -> torch.device:
    """Where tensors must be for collectives: the GPU with NCCL, else the CPU."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def launched_world_size() -> int | None:
    """World size that a launcher announced in the environment; None when there was no launcher."""
    value = os.environ.get("WORLD_SIZE")
    return None if value is None else int(value)

#----------------------------------------------------------------------------
# Collectives. All of them return at once when there is one process.

def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the processes, in place; returns its argument."""
    if world_size() > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate [N, ...] of every process along the first axis, in the order of the ranks; equal N everywhere."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_object(value: Any) -> list[Any]:
    """The values of all processes, in the order of the ranks. For small plain values."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def broadcast(tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
    """Overwrite `tensor` on all processes by the one of rank `src`; returns its argument."""
    if world_size() > 1:
        torch.distributed.broadcast(tensor, src=src)
    return tensor


def broadcast_object(value: Any, src: int = 0) -> Any:
    """The plain value of rank `src`, on all processes."""
    if world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=src)
    return box[0]


def barrier() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        torch.distributed.barrier()


def rank0_first(action: Callable[[], Any]) -> Any:
    """Run `action` on rank 0, then on the others: for caches that the first run fills."""
    if rank() == 0:
        result = action()
    barrier()
    if rank() != 0:
        result = action()
    barrier()
    return result


def print0(*args: Any, **kwargs: Any) -> None:
    """print() on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)

#----------------------------------------------------------------------------

def run_local_processes(num_processes: int, argv: list[str]) -> int:
    """Start this script again in `num_processes` processes of this machine through torchrun; return its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    # After "--" torchrun takes nothing for its own: it would read our --num as short for --numa-binding.
    return subprocess.run([*command, "--", *argv], check=False).returncode
