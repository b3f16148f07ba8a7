# SPDX-License-Identifier: Apache-2.0
"""Moments against NumPy, exactness where float32 would drift, rows that find their places."""
import numpy as np
import pytest
import torch

from metrics import feature_stats
from metrics.feature_stats import Moments, Rows
from tests.closeness import assert_close

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


@pytest.mark.parametrize("batch_size", [1, 3, 64, 1000])
def test_moments(batch_size):
    x = np.random.default_rng(0).standard_normal([500, 9]).astype(np.float32) + 3
    moments = Moments(9)
    for start in range(0, 500, batch_size):
        moments.append(torch.from_numpy(x[start : start + batch_size]))
    moments.reduce(CPU)
    exact = x.astype(np.float64)
    assert moments.num == 500
    assert_close(moments.mean(), exact.mean(axis=0), rtol=1e-13)
    assert_close(moments.covariance(), np.cov(exact.T, ddof=0), rtol=1e-10, atol=1e-13)
    assert_close(moments.covariance(ddof=1), np.cov(exact.T, ddof=1), rtol=1e-10, atol=1e-13)


def test_batches_do_not_show_at_all():
    x = torch.randn(1300, 700, generator=torch.Generator().manual_seed(0))      # Several runs of rows and of columns.
    found = []
    for batch_size in (1, 64, 500, 1300):
        moments = Moments(700)
        for part in x.split(batch_size):
            moments.append(part)
        moments.reduce(CPU)
        found.append((moments.mean(), moments.covariance()))
    for mean, covariance in found[1:]:
        assert np.array_equal(mean, found[0][0])
        assert np.array_equal(covariance, found[0][1])
    assert np.array_equal(found[0][1], found[0][1].T)
    assert_close(found[0][1], np.cov(x.double().numpy().T, ddof=0), atol=1e-13, rtol=1e-7)


def test_large_offset_keeps_precision():
    x = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0)) + 1000
    moments = Moments(2)
    for part in x.split(100):
        moments.append(part)
    assert_close(moments.covariance(), np.cov(x.double().numpy().T, ddof=0), atol=1e-8, rtol=1e-7)


def test_rows_find_their_places():
    rows = Rows(10)
    table = torch.arange(30.0).reshape(10, 3)
    for places in ([7, 8, 9], [], [0, 1], [2, 3, 4, 5, 6]):
        rows.append(np.array(places), table[places])
    assert torch.equal(rows.gather(CPU), table)


def test_rows_in_many_copies(monkeypatch):
    monkeypatch.setattr(feature_stats, "BLOCK_ROWS", 16)
    order = np.random.default_rng(0).permutation(100)
    table = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    rows = Rows(100)
    for start in range(0, 100, 7):
        places = order[start : start + 7]
        rows.append(places, table[places])
    assert torch.equal(rows.gather(CPU), table)


def test_missing_rows_are_noticed():
    rows = Rows(10)
    rows.append(np.array([1, 2]), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="2 rows were collected, 10 expected"):
        rows.gather(CPU)
