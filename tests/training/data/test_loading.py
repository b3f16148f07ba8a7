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
