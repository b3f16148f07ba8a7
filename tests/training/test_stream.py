# SPDX-License-Identifier: Apache-2.0
"""The order of items and the stream of micro-batches."""
import itertools

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.data_prep.samples import files, metadata, write_folder, write_zip
from training.dataset import EpochOrder, ImageDataset, TrainingStream


@pytest.fixture
def dataset(tmp_path):
    made = ImageDataset(write_zip(tmp_path / "a.zip", files(10), metadata(10)), use_labels=True)
    yield made
    made.close()


def take(dataset, count, **options):
    """The first `count` micro-batches of a stream."""
    stream = TrainingStream(dataset, EpochOrder(len(dataset), seed=3), **options)
    batches = list(itertools.islice(stream, count))
    stream.close()
    assert next(stream, None) is None
    return batches


def direct(dataset, positions):
    """Those positions by indexing."""
    items = [dataset[EpochOrder(len(dataset), seed=3).index(p)] for p in positions]
    return torch.from_numpy(np.stack([image for image, _ in items])), torch.tensor([label for _, label in items])


def same(a, b):
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))

#----------------------------------------------------------------------------

def test_order_covers_every_item_once_per_epoch():
    order = EpochOrder(7, seed=1)
    seen = order.indices(np.arange(7 * 40)).reshape(40, 7)
    assert (np.sort(seen, axis=1) == np.arange(7)).all()
    assert len({tuple(row) for row in seen.tolist()}) > 30


def test_order_is_a_pure_function_of_seed_and_position():
    positions = np.random.RandomState(0).permutation(300)
    a = EpochOrder(11, seed=5).indices(positions)
    order = EpochOrder(11, seed=5)
    assert a.tolist() == [order.index(int(p)) for p in positions]
    assert a[np.argsort(positions)].tolist() == EpochOrder(11, seed=5).indices(range(300)).tolist()
    assert a.tolist() != EpochOrder(11, seed=6).indices(positions).tolist()
    assert order.index(10 ** 12) == EpochOrder(11, seed=5).index(10 ** 12)


def test_every_item_is_as_likely_first():
    firsts = EpochOrder(5, seed=0).indices(np.arange(4000) * 5)
    assert np.abs(np.bincount(firsts, minlength=5) / 4000 - 0.2).max() < 0.03


def test_order_of_nothing():
    with pytest.raises(ValueError, match="order of 0 items"):
        EpochOrder(0)

#----------------------------------------------------------------------------

def test_one_process_equals_direct_indexing(dataset):
    for k, batch in enumerate(take(dataset, 8, batch_gpu=4)):
        images, labels = batch
        assert images.shape == (4, 3, 8, 8)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert same(batch, direct(dataset, range(k * 4, k * 4 + 4)))


def test_two_processes_interleave(dataset):
    ranks = [take(dataset, 4, rank=rank, world_size=2, batch_gpu=2) for rank in (0, 1)]
    merged = [batch for pair in zip(*ranks, strict=True) for batch in pair]
    assert all(same(a, b) for a, b in zip(merged, take(dataset, 8, batch_gpu=2), strict=True))


def test_resume(dataset):
    whole = take(dataset, 8, batch_gpu=3)
    assert all(same(a, b) for a, b in zip(whole[5:], take(dataset, 3, batch_gpu=3, start_nimg=15), strict=True))


def test_worker_processes_give_the_same(dataset):
    assert all(same(a, b) for a, b in zip(take(dataset, 9, batch_gpu=4, workers=0),
                                          take(dataset, 9, batch_gpu=4, workers=2), strict=True))


def test_loader_processes_hand_batches_over_in_shared_memory(dataset):
    for images, labels in take(dataset, 3, batch_gpu=4, workers=1):
        assert images.is_shared()
        assert labels.is_shared()


@pytest.mark.parametrize("workers", [0, 1])
def test_global_random_state_is_left_alone(dataset, workers):
    before = torch.get_rng_state()
    take(dataset, 2, batch_gpu=4, workers=workers)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_file_is_a_user_error_of_one_line(tmp_path, workers):
    path = write_folder(tmp_path / "set", files())
    dataset = ImageDataset(path)
    (path / "00000/img00000004.png").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"img00000004\.png: cannot be decoded") as caught:
        take(dataset, 6, batch_gpu=2, workers=workers)
    assert "\n" not in str(caught.value)


def test_wrong_arguments(dataset):
    with pytest.raises(ValueError, match="order is of 3 items"):
        TrainingStream(dataset, EpochOrder(3))
    with pytest.raises(ValueError, match="rank 2 of 2"):
        TrainingStream(dataset, EpochOrder(10), rank=2, world_size=2)
