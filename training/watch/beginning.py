# SPDX-License-Identifier: Apache-2.0
"""What a run says before its first tick: which step of the start it is at, and then how fast it goes.

A start may take minutes: operations are compiled, weights are loaded, class vectors are computed from the images, and
on a GPU algorithms are chosen for every convolution. Whoever looks at the screen or at log.txt must see which of these
is going on. Only these lines depend on the clock: nothing here moves a result, a tick or stats.jsonl.
"""
import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from dnnlib.util import format_time

PATIENCE = 30.0             # Seconds of training without a tick after which a line says how fast it goes.

#----------------------------------------------------------------------------

class Beginning:
    """Says what goes on until the first tick of this start.

    Args:
        say: Takes a line.
        device: Where we compute. It is waited for after each phase's first run, so that seconds mean something.
        clock: Seconds.
    """

    def __init__(self, say: Callable[[str], None], device: torch.device, clock: Callable[[], float] = time.monotonic):
        self.say, self.device, self.clock = say, device, clock
        self._seen: set[str] = set()        # Phases that have run.
        self._iterations = self._images = 0
        self._started = self._first_ended = 0.0
        self._next_line = PATIENCE
        self._is_over = False

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[None]:
        """A step of the start: named when it begins; the seconds follow if there are any."""
        began = self.clock()
        self.say(f"{what} ...")
        yield
        seconds = self.clock() - began
        if seconds >= 1:
            self.say(f"    took {seconds:.1f} s")

    def train(self, chooses_algorithms: bool) -> None:
        """The first iteration begins."""
        self._started = self.clock()
        self.say("first iteration" + (": convolution algorithms are chosen, once per shape (--nobench=1 leaves it out)"
                                      if chooses_algorithms else "") + " ...")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around every run of a phase: says how long the first one takes."""
        if name in self._seen:
            yield
            return
        self._seen.add(name)
        began = self.clock()
        yield
        self._wait()
        self.say(f"    first {name}: {self.clock() - began:.1f} s")

    def iteration(self, images: int, left: int) -> None:
        """After an iteration of `images` images, `left` of them before the next tick."""
        if self._is_over:
            return
        self._iterations += 1
        now = self.clock()
        if self._iterations == 1:
            self._wait()
            self._first_ended = now = self.clock()
            more = -(-max(left, 0) // images)
            self.say(f"first iteration done in {now - self._started:.1f} s; the first tick comes "
                     + (f"after {more} more" if more else "now"))
        else:
            self._images += images
        if now - self._started >= self._next_line and left > 0:
            self._next_line = 2 * (now - self._started)         # So that a long tick does not fill the log.
            self.say(f"{self._iterations} iteration(s) in {format_time(now - self._started)}{self._speed(now, left)}")

    def tick(self) -> None:
        """From the first tick on it is the status lines that speak."""
        self._is_over = True

    def _speed(self, now: float, left: int) -> str:
        if self._images == 0:
            return ""
        rate = self._images / max(now - self._first_ended, 1e-9)
        return f", {rate:.3g} images/s after the first; the first tick comes in about {format_time(left / rate)}"

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
