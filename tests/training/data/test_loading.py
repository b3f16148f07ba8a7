"""Loader processes that die, are stopped or find no shared memory: every wait ends, with a line."""
import dataclasses
import os
import signal
import time

import pytest
import torch

from dnnlib import UserError
from dnnlib.errors import StoppedEarly
from training.data import loading
from training.dataset import EpochOrder, ImageDataset, TrainingStream
from training.run import preflight


@pytest.fixture
def stream(data16, monkeypatch):
    """Two processes, of which each is two small batches ahead."""
    monkeypatch.setattr(loading, "POLL_SECONDS", 0.1)
    for name in ("STOPPED_SECONDS", "STOP_SECONDS"):
        monkeypatch.setattr(loading, name, 0.3)
    dataset = ImageDataset(data16, use_labels=True)
    made = TrainingStream(dataset, EpochOrder(len(dataset)), batch_gpu=4, workers=2)
    yield made
    made.close()


def pids(stream) -> list[int]:
    return [p.pid for p in stream._batches._processes]


def exhaust(stream) -> None:
    for _ in range(50):
        next(stream)


@pytest.mark.parametrize(("number", "message"), [
    (signal.SIGKILL, r"loader process \d+ \(killed by SIGKILL\) .* shared memory .* --workers"),
    (signal.SIGSTOP, r"no images for 0 s: loader process \d+ is stopped .*--workers=0"),
])
def test_a_loader_process_that_ends_or_is_deaf(stream, number, message):
    next(stream)
    processes = list(stream._batches._processes)
    os.kill(pids(stream)[0], number)
    with pytest.raises(UserError, match=message):
        exhaust(stream)
    for process in processes:           # None is left, or waited for.
        process.join(5)
        assert process.exitcode is not None


def test_a_request_to_stop_is_heard_while_nothing_comes(stream):
    next(stream)
    stream._batches._is_asked_to_stop = lambda: True
    os.kill(pids(stream)[0], signal.SIGSTOP)
    with pytest.raises(StoppedEarly, match="stopped as asked, but in the middle of an iteration") as error:
        exhaust(stream)
    assert error.value.exit_code == 3


def test_a_wait_has_an_end(stream, monkeypatch):
    monkeypatch.setenv("STYLESAN_DATA_SECONDS", "0.3")
    monkeypatch.setattr(ImageDataset, "__getitem__", lambda self, i: time.sleep(60))      # A disk that does not answer.
    with pytest.raises(UserError, match="no images from 2 loader processes for 0 s.*STYLESAN_DATA_SECONDS"):
        next(stream)


def test_time_between_two_waits_counts_for_none(stream, monkeypatch):
    """Metrics take long, and nobody waits meanwhile; what the thread sees of a wait that just ended is not kept."""
    monkeypatch.setenv("STYLESAN_DATA_SECONDS", "0.3")
    next(stream)
    looks, waits = [], iter([object(), None, None, None, None, object(), object()])

    class Looking(loading.Loading):
        _wait = property(lambda self: next(waits, None), lambda self, value: None)

        def _reason_to_end(self, waited):
            looks.append(waited)

    looking = Looking.__new__(Looking)
    looking._reason, looking._closed = None, type("Closed", (), {"wait": lambda self, seconds: len(looks) >= 2})()
    looking._look_on()
    assert looks == [0.0, 0.0]


def test_a_loader_process_knows_its_trainer_whatever_the_start_method(monkeypatch):
    """A fork server's processes have the server for their parent; only the signal of the trainer counts."""
    steps = iter([(11, signal.SIGTERM), (7, signal.SIGINT), None, (5, signal.SIGTERM)])
    started, ends = [], []
    info = dataclasses.make_dataclass("Info", ["si_pid", "si_signo"])

    class Ended(BaseException):
        pass

    def end(code):
        ends.append(code)
        raise Ended
    trainer = type("Trainer", (), {"pid": 5, "is_alive": lambda self: True})()
    monkeypatch.setattr(loading.multiprocessing, "parent_process", lambda: trainer)
    monkeypatch.setattr(loading.os, "getppid", lambda: 11)
    monkeypatch.setattr(loading.os, "_exit", end)
    monkeypatch.setattr(loading.signal, "pthread_sigmask", lambda *args: None)
    monkeypatch.setattr(loading.signal, "sigtimedwait", lambda *args: (s := next(steps)) and info(*s))
    monkeypatch.setattr(loading.threading, "Thread", lambda target, daemon: started.append(target) or trainer)
    trainer.__class__.start = lambda self: None
    loading.obey_parent_only(0)
    with pytest.raises(Ended):
        started[0]()
    assert (ends, next(steps, "all were looked at")) == ([0], "all were looked at")


def test_metrics_put_batches_into_shared_memory_themselves(monkeypatch):
    """A full one is then an answer of the loader process, and not lost by a thread of its queue."""
    from inference import image_files
    items = [(torch.full([3, 4, 4], i, dtype=torch.uint8), i) for i in range(2)]
    assert not image_files._stack(items)[0].is_shared()
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: "one")
    images, labels = image_files._stack(items)
    assert images.is_shared()
    assert labels.is_shared()
    assert images[1].unique().tolist() == [1]
    assert labels.tolist() == [0, 1]

    def full(self):
        raise RuntimeError("No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert "--workers" in str(image_files._stack(items))


def test_slow_images_are_waited_for(stream, monkeypatch):
    original = ImageDataset.__getitem__
    monkeypatch.setattr(ImageDataset, "__getitem__", lambda self, i: (time.sleep(0.1), original(self, i))[1])
    assert next(stream)[0].shape == (4, 3, 16, 16)


def test_full_shared_memory_is_told(stream, monkeypatch):
    def full(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(UserError, match=r"finds no \d+ bytes of shared memory .*--workers.*No space left"):
        next(stream)

#----------------------------------------------------------------------------

def test_room_in_shared_memory_is_checked_before_training(monkeypatch, tmp_path):
    from tests.training.run.test_resume import settings
    config = settings()                 # 2 images of 16 pixels: a page, and one of labels.
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=3))
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr(preflight, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(7 * 8192))
    preflight.check_shared_memory(config)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(7 * 8192 - 1))
    with pytest.raises(UserError, match=r"--workers=3: shared memory .*need 56.0 KiB: take --workers=2"):
        preflight.check_shared_memory(config)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0))
    with pytest.raises(UserError, match="take --workers=0"):
        preflight.check_shared_memory(config)
    preflight.check_shared_memory(dataclasses.replace(config, data=dataclasses.replace(config.data, workers=0)))
