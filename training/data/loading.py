# SPDX-License-Identifier: Apache-2.0
"""Loader processes: how they are started and ended, and waiting for them, which always ends.

Batches come through shared memory. A process that finds none left says so, instead of losing the batch; one that died,
is stopped or hangs ends the wait; and so does a request to stop.
"""
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.data

from dnnlib import UserError
from dnnlib.errors import StoppedEarly
from torch_utils.launch import STOP_SIGNALS, state_of

POLL_SECONDS = 1.0          # After one wait for a batch of this length it is looked at what may be wrong.
WAIT_SECONDS = 600.0        # For a batch, in all; $STYLESAN_DATA_SECONDS goes first.
STOPPED_SECONDS = 60.0      # For a batch, where a loader process is stopped.
STOP_SECONDS = 20.0         # For a batch, when somebody has asked to stop.
SHARED_MEMORY = Path("/dev/shm")
AGAIN = "the same command continues from the last state"

#----------------------------------------------------------------------------
# In loader processes.

def obey_parent_only(_worker: int) -> None:
    """In a loader process: end by SIGTERM only if the training process sent it, and when that process is gone.

    Clusters send signals to every process of a job, and terminals do; the training process then saves, for which its
    loaders must live.
    """
    if not hasattr(signal, "sigtimedwait"):     # macOS
        return
    # Not the parent as the system has it: that may be a fork server, or, if the other one has just died, anybody.
    trainer, parent = multiprocessing.parent_process(), os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    def listen() -> None:
        while True:
            info = signal.sigtimedwait(STOP_SIGNALS, 1.0)
            is_told = info is not None and info.si_signo == signal.SIGTERM and (
                info.si_pid == (parent if trainer is None else trainer.pid))
            if is_told or os.getppid() != parent or (trainer is not None and not trainer.is_alive()):
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def shared(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor where the training process can read it: in a loader process in shared memory.

    Otherwise it would come there when it is sent, by a thread whose errors nobody hears.

    Raises:
        UserError: shared memory is full.
    """
    if torch.utils.data.get_worker_info() is None:
        return tensor
    try:
        there: torch.Tensor = tensor.share_memory_()
        return there
    except RuntimeError as err:
        size = tensor.numel() * tensor.element_size()
        raise UserError(f"{no_shared_memory(size)} ({str(err).splitlines()[0]})") from err


def no_shared_memory(size: int) -> str:
    """What is wrong, and the remedies."""
    return (f"a loader process finds no {size} bytes of shared memory ({SHARED_MEMORY}): take fewer --workers (0 needs "
            "none), or give the container more (docker run --shm-size=8g)")

#----------------------------------------------------------------------------
# In the process that they load for.

class Loading:
    """Iterates over a loader. Unlike the loader's own iterator it never waits without an end.

    PyTorch's own limits do not reach every wait: a batch is fetched from its process in a conversation, which a process
    that is stopped does not answer. So a thread looks on and, where nothing comes, ends the processes, which ends every
    wait for them.

    Raises (while iterating):
        UserError: a loader process died, is stopped or hangs.
        StoppedEarly: somebody asked to stop, and no batch comes.
    """

    def __init__(self, loader: torch.utils.data.DataLoader[Any], is_asked_to_stop: Callable[[], bool] = lambda: False):
        self._is_asked_to_stop = is_asked_to_stop
        self._wait: object | None = None        # One for each wait, while it goes on; only the main thread writes it.
        self._reason: UserError | None = None   # Why the processes were ended.
        self._closed = threading.Event()
        before = set(multiprocessing.active_children())
        loader.timeout = POLL_SECONDS if loader.num_workers > 0 else 0
        try:
            with _signals_blocked():
                self._batches: Iterator[Any] | None = iter(loader)
        except OSError as err:
            raise UserError(f"--workers={loader.num_workers}: loader processes cannot be started ({err}): take fewer, "
                            f"or make room in {SHARED_MEMORY}") from err
        self._processes = [p for p in multiprocessing.active_children() if p not in before]
        if self._processes:
            threading.Thread(target=self._look_on, name="loading", daemon=True).start()

    def __iter__(self) -> "Loading":
        return self

    def __next__(self) -> Any:
        self._wait = object()
        try:
            while self._batches is not None:
                try:
                    return next(self._batches)
                except (RuntimeError, OSError, EOFError) as err:
                    self._explain(err)
            raise StopIteration
        finally:
            self._wait = None

    def _explain(self, err: Exception) -> None:
        """Raise what an error of the loader means; return if it is the end of one of many short waits."""
        if self._reason is not None:
            raise self._reason from err
        timed_out = str(err).startswith("DataLoader timed out")
        if not timed_out and self._processes:       # Their end may show a moment after the broken connection,
            ended = multiprocessing.connection.wait([p.sentinel for p in self._processes], timeout=1)
            for process in self._processes:         # and a moment after that the system says how they ended.
                if process.sentinel in ended:
                    process.join(1)
        if dead := [p for p in self._processes if not p.is_alive()]:
            self._end_processes()
            how = ", ".join(f"{p.pid} ({_ending(p.exitcode)})" for p in dead)
            raise UserError(f"loader process {how} ended before its time: shared memory ({SHARED_MEMORY}) or memory "
                            "may be full: take fewer --workers (0 needs none), or give the container more shared "
                            f"memory (docker run --shm-size=8g); {AGAIN}") from err
        if not timed_out:
            raise err

    def _look_on(self) -> None:
        """The thread. Time is counted while it runs: the whole job may be stopped for a while."""
        wait, waited = self._wait, 0.0
        while not self._closed.wait(POLL_SECONDS):
            before, wait = wait, self._wait
            waited = waited + POLL_SECONDS if wait is before else 0.0
            if wait is not None:
                self._reason = self._reason or self._reason_to_end(waited)
            if self._reason is not None:
                self._end_processes()

    def _reason_to_end(self, waited: float) -> UserError | None:
        limit = float(os.environ.get("STYLESAN_DATA_SECONDS", WAIT_SECONDS))
        if waited >= min(STOP_SECONDS, limit) and self._is_asked_to_stop():
            return StoppedEarly(f"stopped as asked, but in the middle of an iteration, because for {waited:.0f} s no "
                                f"images came from the loader processes: {AGAIN}")
        stopped = [str(p.pid) for p in self._processes if _is_stopped(p.pid)]
        if waited >= min(STOPPED_SECONDS, limit) and stopped:
            return UserError(f"no images for {waited:.0f} s: loader process {', '.join(stopped)} is stopped (by "
                             f"SIGSTOP or a debugger): {AGAIN}; --workers=0 does without such processes")
        if waited >= limit:
            return UserError(f"no images from {len(self._processes)} loader processes for {waited:.0f} s: see whether "
                             f"the disk of --data answers: {AGAIN}; --stage-to reads from a local disk, "
                             "STYLESAN_DATA_SECONDS=N waits for N seconds")
        return None

    def _end_processes(self) -> None:
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End the loader processes."""
        self._closed.set()
        if any(_is_stopped(process.pid) for process in self._processes):
            self._end_processes()       # They would not end by themselves, and might hold what the others need.
        self._batches = None
        self._processes = []


def start_loading(loader: torch.utils.data.DataLoader[Any],
                  is_asked_to_stop: Callable[[], bool] = lambda: False) -> Iterator[Any]:
    """Iterate over a loader to its end. It has `obey_parent_only` as its `worker_init_fn`."""
    loading = Loading(loader, is_asked_to_stop)
    try:
        yield from loading
    finally:
        loading.close()


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """Start loader processes in the block: a signal to the whole job cannot hit them before they obey their parent.

    A process starts with the signals blocked that its parent blocks; what arrives meanwhile waits, in both. And a
    process that dies later is noticed while waiting for it: the handler that PyTorch installs would raise its error
    wherever the main thread is.
    """
    if not hasattr(signal, "pthread_sigmask") or not hasattr(signal, "SIGCHLD"):    # Windows
        yield
        return
    is_main = threading.current_thread() is threading.main_thread()
    child_handler = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        if is_main and child_handler is not None:
            signal.signal(signal.SIGCHLD, child_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"killed by {signal.Signals(-code).name}"


def _is_stopped(pid: int | None) -> bool:
    """Whether a process is stopped; False where nobody can tell."""
    return pid is not None and state_of(pid) in ("T", "t")
