# SPDX-License-Identifier: Apache-2.0
"""The only module that talks to torch.distributed.

`python train.py` and `torchrun ... train.py` are one path: without torchrun's environment variables the world has one
process, no process group exists, and every function here does the obvious thing.
"""
import contextlib
import datetime
import os
import socket
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from torch.distributed.elastic.multiprocessing.errors import record

from dnnlib import UserError
from dnnlib.util import first_line
from torch_utils.launch import Launch, end_with_launcher, leaves_exit_code, read_launch
from torch_utils.launch import leave_exit_code as leave_exit_code  # For whoever imports this module alone.
from torch_utils.launch import run_local_processes as run_local_processes
from torch_utils.peer_monitor import PeerMonitor

TIMEOUT = datetime.timedelta(minutes=30)    # For one collective. Who waits for rank 0's long work waits at a barrier.
START_SECONDS = 60.0                        # For all processes to come, and for the first message between them.
LEAVE_SECONDS = 20.0                        # For a process that failed to end by itself.
WAIT_SECONDS = 60.0                         # One of the waits that a barrier is made of.

HINTS = ("Set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the network interface that connects the nodes, open the "
         "ports between them, and try NCCL_P2P_DISABLE=1 if it hangs within one node (docs/multi-node.md)")

#----------------------------------------------------------------------------
# Joining and leaving.

class _Group:
    """What this process knows of its group beyond torch.distributed: torch keeps its own part per process as well."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As without a group."""
        self.store: Any = None
        self.monitor: PeerMonitor | None = None
        self.launch: Launch | None = None
        self.barriers = 0
        self.is_alone = False       # Inside `alone()`.


_group = _Group()


def init(device_type: str) -> torch.device:
    """Join the process group that the environment describes, if any, and send a first message.

    Args:
        device_type: 'cuda', 'cpu' or 'mps'. CUDA processes talk NCCL, all others gloo.

    Returns:
        The device of this process: with CUDA the one of its local rank.

    Raises:
        UserError: a process does not come within `start_seconds()`; its rank is named.
    """
    launch = read_launch()
    device = torch.device(device_type)
    if device_type == "cuda":
        # srun may show every process a GPU of its own.
        local_rank = 0 if launch is None else launch.local_rank % max(torch.cuda.device_count(), 1)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if launch is not None and not torch.distributed.is_initialized():
        _join(launch, device)
    return device


def start_seconds() -> float:
    """$STYLESAN_START_SECONDS, else 60."""
    return float(os.environ.get("STYLESAN_START_SECONDS", START_SECONDS))


def _join(launch: Launch, device: torch.device) -> None:
    """Find the others in the store, make the process group, see that a message comes through."""
    end_with_launcher()
    limit, host = start_seconds(), socket.gethostname()
    store = _meet(_open_store(launch, limit), launch, host, limit)
    monitor = PeerMonitor(store.clone(), launch.rank, launch.world_size, host)
    monitor.start()
    _group.store, _group.monitor, _group.launch, _group.barriers = store, monitor, launch, 0

    names = {r: f"{r} on {store.get(f'here/{r}').decode()}" for r in range(launch.world_size)}
    asker = store.clone()
    monitor.set_deadline(limit, lambda: _explain_silence(asker, names, limit))
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(
        backend, store=torch.distributed.PrefixStore("group", store), rank=launch.rank, world_size=launch.world_size,
        timeout=TIMEOUT, device_id=device if device.type == "cuda" else None)
    count = torch.ones([], device=device)
    torch.distributed.all_reduce(count)
    if int(count) != launch.world_size:
        raise RuntimeError(f"the first all-reduce gave {int(count)} for {launch.world_size} processes. {HINTS}")
    store.set(f"connected/{launch.rank}", "")
    monitor.set_deadline(None)


def _open_store(launch: Launch, limit: float) -> Any:
    """A client of the job's store, or its host."""
    try:
        return torch.distributed.TCPStore(
            launch.master_addr, launch.master_port, launch.world_size, launch.hosts_store, wait_for_workers=False,
            timeout=datetime.timedelta(seconds=limit))
    except RuntimeError as err:
        raise UserError(f"rank {launch.rank} on {socket.gethostname()} cannot reach the first process at "
                        f"{launch.master_addr}:{launch.master_port} ({first_line(err)}). {HINTS}") from err


def _meet(server: Any, launch: Launch, host: str, limit: float) -> Any:
    """Wait for all processes; return the part of the store that belongs to this start of the job.

    torchrun keeps its store when it starts processes again, and nodes count their restarts differently. So the first
    process makes a name and tells it to whoever asks with a name of its own: what older processes left is not found.
    """
    name, rank = uuid.uuid4().hex, launch.rank
    wait = datetime.timedelta(seconds=limit)
    came = f"did not come within {limit:.0f} s (STYLESAN_START_SECONDS): look at the output of"
    if rank > 0:
        server.set(f"ask/{rank}", name)
        try:
            server.wait([f"answer/{name}"], wait)
        except RuntimeError as err:
            raise UserError(f"rank 0 of {launch.world_size} {came} its node. {HINTS}") from err
        name = server.get(f"answer/{name}").decode()
    store = torch.distributed.PrefixStore(name, server)
    store.set(f"here/{rank}", host)
    if rank == 0:
        _answer(server, store, name, launch.world_size, limit)
    try:
        store.wait(["all"], datetime.timedelta(seconds=0.1) if rank == 0 else wait)
    except RuntimeError as err:
        missing = [str(r) for r in range(launch.world_size) if not store.check([f"here/{r}"])]
        raise UserError(f"rank(s) {', '.join(missing)} of {launch.world_size} {came} their nodes. {HINTS}") from err
    return store


def _answer(server: Any, store: Any, name: str, world_size: int, limit: float) -> None:
    """Tell `name` to all who ask, until all are here or the time is over."""
    end = time.monotonic() + limit
    missing, answered = list(range(world_size)), set()
    while time.monotonic() < end:
        missing = [r for r in missing if not store.check([f"here/{r}"])]
        if not missing:
            store.set("all", "")
            return
        for r in missing:
            ask = server.get(f"ask/{r}").decode() if server.check([f"ask/{r}"]) else None
            if ask is not None and ask not in answered:
                server.set(f"answer/{ask}", name)
                answered.add(ask)
        time.sleep(0.05)


def _explain_silence(store: Any, names: dict[int, str], limit: float) -> str:
    """Why the first all-reduce does not end; `names` tells rank and host."""
    silent = [name for r, name in names.items() if not store.check([f"connected/{r}"])]
    return (f"no message came through within {limit:.0f} s (STYLESAN_START_SECONDS); not connected: rank "
            f"{', rank '.join(silent)}. {HINTS}")


def shutdown() -> None:
    """Leave the process group, if one was joined. All processes must call it."""
    monitor, launch = _group.monitor, _group.launch
    if monitor is not None and launch is not None:
        barrier()
        monitor.stop()
        if not launch.hosts_store:
            _group.store.set(f"left/{rank()}", "")
        elif world_size() > 1:              # The others must not find its end before they have left.
            _group.store.wait([f"left/{r}" for r in range(1, world_size())])
        torch.distributed.destroy_process_group()
        _group.reset()


def run_in_group(device_type: str, body: Callable[[torch.device], int]) -> int:
    """Run `body` with the device of this process as a member of its group; its result is returned.

    An exception ends all processes of the job: it is reported to them, and they end within seconds, whatever they wait
    for. Its traceback is what the user sees; processes that fail later in consequence say so in one line.
    """
    def member() -> int:
        try:
            result = body(init(device_type))
        except Exception as err:
            _fail(err)
            if isinstance(err, UserError) and leaves_exit_code():
                # Raised, it would make torchrun kill the others, or start all again, and tell so in a hundred lines.
                print("Error:", " ".join(str(err).splitlines()), file=sys.stderr, flush=True)
                return err.exit_code
            raise
        shutdown()
        return result
    # torchrun's summary then names the first error. What PyTorch wraps returns None where it ends by exit code 0.
    return (record(member)() or 0) if read_launch() is not None else member()


def _fail(error: Exception) -> None:
    """Report an exception to the group."""
    if _group.monitor is None:
        return
    _group.monitor.set_deadline(LEAVE_SECONDS, lambda: "did not end by itself after its failure")
    where = f"rank {rank()} on {socket.gethostname()}"
    if isinstance(error, RuntimeError) and (blamed := _group.monitor.blame_the_silent()) is not None:
        print(f"{where} ends, because {blamed} shows no sign of life: it was killed or stopped, or its node is gone "
              f"(here: {first_line(error)})", file=sys.stderr, flush=True)
        return
    first = _group.monitor.report(error)
    if not first:
        time.sleep(LEAVE_SECONDS)           # The monitor ends this process, with the name of the one that failed first.
    if not isinstance(error, UserError):
        print(f"{where} failed:\n{''.join(traceback.format_exception(error))}", file=sys.stderr, flush=True)
    if _group.launch is not None and _group.launch.hosts_store:
        _group.monitor.wait_for_readers()

#----------------------------------------------------------------------------
# Facts.

def rank() -> int:
    """Number of this process, 0 to world_size() - 1."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() and not _group.is_alone else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The block runs as if there were one process: for trials that may fail on some processes and not on others."""
    _group.is_alone = True
    try:
        yield
    finally:
        _group.is_alone = False


def device() -> torch.device:
    """Where tensors must be for collectives: the GPU with NCCL, else the CPU."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def launched_world_size() -> int | None:
    """World size that a launcher announced in the environment; None when there was no launcher."""
    launch = read_launch()
    return None if launch is None else launch.world_size

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
    barrier()
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def all_reduce_start(tensor: torch.Tensor) -> Any:
    """Begin to sum over the processes, in place; `.wait()` of the result ends it. For more than one process."""
    return torch.distributed.all_reduce(tensor, async_op=True)


def broadcast(tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
    """Overwrite `tensor` on all processes by the one of rank `src`; returns its argument."""
    if world_size() > 1:
        torch.distributed.broadcast(tensor, src=src)
    return tensor


def broadcast_object(value: Any, src: int = 0) -> Any:
    """The plain value of rank `src`, on all processes. It may take its time to make it."""
    if world_size() == 1:
        return value
    barrier()
    box = [value]
    torch.distributed.broadcast_object_list(box, src=src)
    return box[0]


def barrier() -> None:
    """Wait until every process has come here, however long that takes: whoever fails or dies meanwhile ends the wait.

    In the store and not by a collective, which would have to end within TIMEOUT.
    """
    if world_size() == 1:
        return
    store = _group.store
    _group.barriers += 1
    name = f"barrier/{_group.barriers}"
    if store.add(name, 1) == world_size():
        store.set(f"{name}/open", "")
    is_open = False
    while not is_open:
        try:
            store.wait([f"{name}/open"], datetime.timedelta(seconds=WAIT_SECONDS))
            is_open = True
        except RuntimeError:
            is_open = store.check([f"{name}/open"])
    if rank() == 0:                         # Everybody came here, so everybody has left the one before.
        last = f"barrier/{_group.barriers - 1}"
        store.delete_key(last)
        store.delete_key(f"{last}/open")


def node_first(action: Callable[[], Any]) -> Any:
    """Run `action` on one process per node before the others, and on rank 0 first of all: for downloads.

    Nodes that share their disk with the first one find the file there, the others fetch their own, once.
    """
    local_rank = 0 if _group.launch is None else _group.launch.local_rank
    turn = 0 if rank() == 0 else 1 if local_rank == 0 else 2
    result = None
    for now in range(3):
        if now == turn:
            result = action()
        barrier()
    return result


def print0(*args: Any, **kwargs: Any) -> None:
    """print() on rank 0 only."""
    if rank() == 0:
        print(*args, **kwargs, flush=True)

