# SPDX-License-Identifier: Apache-2.0
"""One network for several people: who may use it next, and long work that shows how far it is and lets others in."""
import contextlib
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Generic, TypeVar

Seen = TypeVar("Seen")
Outcome = TypeVar("Outcome")

SHOWN_EVERY = 0.25          # Seconds between two looks at long work.
PATIENCE = 30.0             # Seconds after which work that nobody looks at ends.


class Turns:
    """A lock that is given in the order in which it was asked for.

    With an ordinary lock, work that gives it back for a moment between two steps would take it again before anybody
    who waits has woken up.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 0              # Number that the next one who asks gets.
        self._current = 0           # Number of the one whose turn it is.

    def take(self) -> None:
        """Wait for a turn."""
        with self._changed:
            number = self._next
            self._next += 1
            self._changed.wait_for(lambda: self._current == number)

    def give_back(self) -> None:
        """End the turn that was taken."""
        with self._changed:
            self._current += 1
            self._changed.notify_all()

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Have the turn for the block."""
        self.take()
        try:
            yield
        finally:
            self.give_back()

    def let_others_in(self) -> None:
        """Give the turn to those who wait, and wait for the next one."""
        self.give_back()
        self.take()

#----------------------------------------------------------------------------

class Abandoned(Exception):
    """Nobody looks at the work any more."""


class Watched(Generic[Seen, Outcome]):
    """Work in a thread of its own that is looked at now and then.

    Args:
        work: Is called with a function that it calls after each step with what there is to see, and gives the outcome.
            That function raises Abandoned once nobody looks, which ends the work.
    """

    def __init__(self, work: Callable[[Callable[[Seen], None]], Outcome]):
        self._work = work
        self._news = threading.Event()
        self._stopped = threading.Event()
        self._looked = time.monotonic()
        self._seen: Seen | None = None
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self._outcome = self._work(self._show)
        except BaseException as err:        # Raised again where somebody looks.
            self._error = err
        self._news.set()

    def _show(self, seen: Seen) -> None:
        if self._stopped.is_set() or time.monotonic() - self._looked > PATIENCE:
            raise Abandoned
        self._seen = seen
        self._news.set()

    def looks(self, every: float = SHOWN_EVERY) -> Generator[Seen, None, None]:
        """Begin the work. What there is to see comes at most once in `every` seconds, until it is done or fails.

        The work ends with the iterator, also if that is given up before the end.

        Raises:
            Whatever the work raises.
        """
        self._thread.start()
        last: Seen | None = None
        try:
            while self._thread.is_alive():
                self._news.wait(timeout=every)
                self._news.clear()
                self._looked = time.monotonic()
                if self._seen is not None and self._seen is not last:
                    last = self._seen
                    yield last
                self._thread.join(timeout=every)
        finally:
            self._stopped.set()
        if self._error is not None:
            raise self._error

    def outcome(self) -> Outcome:
        """What came out, after the last look."""
        assert self._outcome is not None        # `looks` has waited for it.
        return self._outcome
