# SPDX-License-Identifier: Apache-2.0
"""Counter-based random numbers."""
import itertools
import zlib

import numpy as np
import pytest

from training.data.randomness import CounterRNG, permutation


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_draws_do_not_depend_on_batch_splitting(kind):
    draw = getattr(CounterRNG(5), kind)
    whole = draw("z", range(100, 116), (4, 3))
    assert whole.shape == (16, 4, 3)
    assert whole.dtype == np.float32
    parts = [draw("z", range(100 + i, 100 + i + 4), (4, 3)) for i in range(0, 16, 4)]
    assert np.array_equal(whole, np.concatenate(parts))
    order = np.random.RandomState(0).permutation(16)
    assert np.array_equal(whole[order], draw("z", 100 + order, (4, 3)))
    assert np.array_equal(whole[7], getattr(CounterRNG(5), kind)("z", [107], (4, 3))[0])


def test_rows_do_not_depend_on_each_others_length():
    rng = CounterRNG(0)
    assert np.array_equal(rng.normal("z", [3, 4], (64,))[:, :5], rng.normal("z", [3, 4], (5,)))


def test_labels_do_not_depend_on_batch_splitting():
    rng, probs = CounterRNG(1), np.full(10, 0.1)
    whole = rng.integers_from("c", range(64), probs)
    assert np.array_equal(whole, np.concatenate([rng.integers_from("c", [i], probs) for i in range(64)]))


def test_streams_seeds_and_positions_differ():
    rows = [CounterRNG(seed).normal(stream, [position], (64,))[0]
            for seed, stream, position in itertools.product((0, 1), ("Gmain.z", "Dmain.z"), (0, 1, 2 ** 40))]
    for a, b in itertools.combinations(rows, 2):
        assert not np.isin(a, b).any()
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.6


def test_generator_state_is_the_documented_one():
    bits = np.random.Philox(key=[9, zlib.crc32(b"stream")], counter=[0, 0, 0, 77])
    want = np.random.Generator(bits).standard_normal(10, dtype=np.float32)
    assert np.array_equal(CounterRNG(9).normal("stream", [77], (10,))[0], want)


def test_moments():
    x = CounterRNG(0).normal("z", range(2000), (64,)).astype(np.float64)
    assert abs(x.mean()) < 0.012
    assert abs(x.var() - 1) < 0.02
    assert abs((x ** 3).mean()) < 0.04
    assert abs((x ** 4).mean() - 3) < 0.12
    assert np.abs(np.corrcoef(x.T) - np.eye(64)).max() < 0.1       # Between the dimensions.
    assert abs((x[1:] * x[:-1]).mean()) < 0.012                     # Between neighbouring positions.
    u = CounterRNG(0).uniform("u", range(20000))
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.003


def test_labels_follow_the_distribution():
    probs = np.array([0, 0.5, 0, 0.2, 0.3, 0])
    labels = CounterRNG(3).integers_from("c", range(20000), probs)
    assert labels.dtype == np.int64
    share = np.bincount(labels, minlength=6) / 20000
    assert np.abs(share - probs).max() < 0.015
    assert share[probs == 0].sum() == 0
    assert np.array_equal(labels, CounterRNG(3).integers_from("c", range(20000), probs * 7))


def test_labels_of_one_class_and_of_many():
    assert (CounterRNG(0).integers_from("c", range(50), [1.0]) == 0).all()
    many = CounterRNG(0).integers_from("c", range(500), np.ones(5000))
    assert many.max() < 5000
    assert len(np.unique(many)) > 400


@pytest.mark.parametrize("probs", [[], [0, 0], [-1, 2], [np.nan, 1]])
def test_wrong_probabilities(probs):
    with pytest.raises(ValueError, match="probs must be"):
        CounterRNG(0).integers_from("c", [0], probs)


def test_wrong_seed():
    for seed in (-1, 2 ** 64):
        with pytest.raises(ValueError, match="is not in"):
            CounterRNG(seed)


def test_largest_seed_and_position():
    rows = CounterRNG(2 ** 64 - 1).uniform("u", [2 ** 63 - 1, 2 ** 62], (4,))
    assert np.unique(rows).size == 8


def test_permutation():
    first = permutation(3, 0, 1000)
    assert np.array_equal(np.sort(first), np.arange(1000))
    assert np.array_equal(first, permutation(3, 0, 1000))
    assert not np.array_equal(first, permutation(3, 1, 1000))
    assert not np.array_equal(first, permutation(4, 0, 1000))
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.1
    assert permutation(0, 0, 8).tolist() == np.argsort(np.random.Philox(key=[0, 0]).random_raw(8)).tolist()
