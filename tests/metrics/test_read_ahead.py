# SPDX-License-Identifier: Apache-2.0
"""A thread that reads ahead: the same items, its errors in the caller, no thread left behind."""
import threading

import pytest
import torch

from metrics.detectors import load_detector
from metrics.passes import Wants, collect
from metrics.read_ahead import read_ahead
from metrics.sources import Mirrored, Subset
from tests.metrics.helpers import ArraySource, random_images


def reader_threads():
    return [t for t in threading.enumerate() if t.name == "read-ahead"]


def test_same_items_in_order():
    assert list(read_ahead(iter(range(100)))) == list(range(100))
    assert list(read_ahead(iter([]), depth=1)) == []
    assert list(read_ahead(iter([None, None]))) == [None, None]
    assert not reader_threads()


def test_reads_while_the_caller_works_but_not_far_ahead():
    made, third = [], threading.Event()

    def items():
        for i in range(100):
            made.append(i)
            if i == 2:
                third.set()
            yield i

    ahead = read_ahead(items(), depth=2)
    assert next(ahead) == 0
    assert third.wait(timeout=30)       # Two more were made, though nobody asked for them.
    assert len(made) <= 4               # One taken, two ready, one that waits for a place.
    assert list(ahead) == list(range(1, 100))


def test_errors_surface_after_the_items_before_them():
    def items():
        yield 1
        yield 2
        raise KeyError("broken file")

    ahead = read_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(KeyError, match="broken file"):
        next(ahead)
    assert not reader_threads()


@pytest.mark.parametrize("taken", [1, 5])
def test_leaving_early_ends_the_thread_and_closes_the_items(taken):
    closed = threading.Event()

    def items():
        try:
            yield from range(10 ** 9)
        finally:
            closed.set()

    ahead = read_ahead(items(), depth=1)
    for i in range(taken):
        assert next(ahead) == i
    ahead.close()
    assert closed.is_set()
    assert not reader_threads()


def test_an_error_of_the_caller_ends_the_thread():
    def divide():
        for item in read_ahead(iter(range(1000))):
            assert item // 0

    with pytest.raises(ZeroDivisionError):
        divide()
    assert not reader_threads()


class ThreadSource(ArraySource):
    """Notes which threads read it; breaks at image `broken`."""

    def __init__(self, can_read_ahead, broken=None):
        super().__init__(random_images(200))
        self.can_read_ahead, self.broken, self.threads = can_read_ahead, broken, set()

    def batches_at(self, batch_size, indices):
        self.threads.add(threading.current_thread().name)
        for i, batch in enumerate(super().batches_at(batch_size, indices)):
            if self.broken is not None and self.broken <= i * batch_size:
                raise ValueError("image is broken")
            yield batch


def walk(source):
    detector = load_detector("tiny", torch.device("cpu"))
    wants = Wants(features=frozenset({"pool"}))
    return collect(source, {"x": (detector, wants)}, torch.device("cpu"), 50)["x"].features["pool"]


def test_files_are_read_ahead_and_networks_are_not():
    files, network = ThreadSource(can_read_ahead=True), ThreadSource(can_read_ahead=False)
    assert torch.equal(walk(files), walk(network))
    assert files.threads == {"read-ahead"}
    assert network.threads == {threading.current_thread().name}
    assert Mirrored(Subset(files, [0, 3])).can_read_ahead
    assert not Mirrored(Subset(network, [0, 3])).can_read_ahead


def test_a_broken_image_ends_the_walk():
    with pytest.raises(ValueError, match="image is broken"):
        walk(ThreadSource(can_read_ahead=True, broken=100))
    assert not reader_threads()
