# SPDX-License-Identifier: Apache-2.0
"""Reading in a thread: images are read and decoded while a network works on those before."""
import queue
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

DEPTH = 2       # Batches that wait at most: one being taken, one ready.


def read_ahead(items: Iterator[T], depth: int = DEPTH) -> Generator[T, None, None]:
    """The same items in the same order, produced by a thread that runs at most `depth` items ahead.

    What the thread raises is raised here, after the items before it. Leaving early (an exception, `close`) ends the
    thread after the item it is at, and closes `items`.

    Args:
        items: A generator that another thread may run: it uses no state of the calling thread, such as PyTorch's
            gradient mode.
        depth: 1 or more.
    """
    ready: queue.Queue[T | _End] = queue.Queue(maxsize=depth)   # Items, then an _End.
    stopped = threading.Event()
    thread = threading.Thread(target=_produce, args=(items, ready, stopped), name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            entry = ready.get()
            if isinstance(entry, _End):
                break
            yield entry
        if entry.error is not None:
            raise entry.error
    finally:
        stopped.set()
        while thread.is_alive():        # It may be waiting for a place in the queue.
            _drain(ready)
            thread.join(timeout=0.05)


class _End:
    """Follows the last item."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


def _produce(items: Iterator[T], ready: queue.Queue[T | _End], stopped: threading.Event) -> None:
    end = _End()
    try:
        for item in items:
            if stopped.is_set():
                break
            ready.put(item)
    except BaseException as err:        # Whatever it is, the caller's thread is the one to raise it.
        end = _End(err)
    finally:
        if hasattr(items, "close"):
            items.close()
        ready.put(end)


def _drain(ready: queue.Queue[T]) -> None:
    try:
        while True:
            ready.get_nowait()
    except queue.Empty:
        return
