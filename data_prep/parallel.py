# SPDX-License-Identifier: Apache-2.0
"""A function over many chunks in worker processes: results in order, few chunks in memory."""
import collections
import concurrent.futures
import concurrent.futures.process
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from dnnlib import UserError

CHUNK_IMAGES = 16
CHUNK_BYTES = 8 << 20
CHUNKS_PER_WORKER = 3           # Waiting or being worked on.
SERIAL_IMAGES = 4000            # Below this many, starting processes costs more than it saves.

T = TypeVar("T")
R = TypeVar("R")


class Interrupted(UserError):
    """The work stopped for a reason outside the data; what is done so far is worth keeping."""


def default_workers(num_images: int) -> int:
    """All cores that this process may use, for large sets."""
    if num_images < SERIAL_IMAGES:
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunks(items: Iterable[T], nbytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in lists that are short and hold few bytes."""
    chunk: list[T] = []
    held = 0
    for item in items:
        chunk.append(item)
        held += nbytes(item)
        if len(chunk) == CHUNK_IMAGES or held >= CHUNK_BYTES:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def _start_worker() -> None:
    """In a worker: leave Ctrl-C to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None       # Only workers call this.

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def ordered_map(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Like map, in `workers` processes; `items` is read only a little ahead of the results.

    Raises:
        Interrupted: a worker was ended from outside.
    """
    if workers == 1:
        yield from map(function, items)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= CHUNKS_PER_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool as err:
        raise Interrupted(f"--workers={workers}: a worker process was ended from outside, perhaps because memory ran "
                          f"out: take fewer workers") from err
    finally:
        pool.shutdown(cancel_futures=True)
