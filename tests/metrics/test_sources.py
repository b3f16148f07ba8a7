# SPDX-License-Identifier: Apache-2.0
"""Numbering of images: subsets, mirrored copies, chunks for processes."""
import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics.sources import (
    Mirrored,
    Subset,
    chunks_of_rank,
    read_chunks,
    read_rows,
    seeded_indices,
    seeded_subset,
)
from tests.metrics.helpers import ArraySource, SequentialSource, random_images


def whole(source, batch_size=7):
    parts = list(source.batches(batch_size))
    labels = None if parts[0][1] is None else torch.cat([labels for _, labels in parts])
    return torch.cat([images for images, _ in parts]), labels


@pytest.fixture
def images():
    return random_images(23)


@pytest.mark.parametrize("kind", [ArraySource, SequentialSource])
class TestViews:
    def test_rows(self, kind, images):
        source = kind(images, np.arange(23))
        indices = [0, 3, 4, 11, 22]
        for batch_size in (1, 4, 100):
            parts = list(read_rows(source, batch_size, indices))
            assert torch.equal(torch.cat([x for x, _ in parts]), torch.from_numpy(images)[indices])
            assert torch.cat([y for _, y in parts]).tolist() == indices

    def test_subset_of_subset(self, kind, images):
        source = Subset(Subset(kind(images, np.arange(23)), range(1, 23, 2)), [0, 2, 5])
        assert whole(source)[1].tolist() == [1, 5, 11]
        assert source.num_images == source.description["num_images"] == 3

    def test_mirrored(self, kind, images):
        source = Mirrored(kind(images, np.arange(23)))
        got, labels = whole(source)
        assert torch.equal(got[:23], torch.from_numpy(images))
        assert torch.equal(got[23:], torch.from_numpy(images[..., ::-1].copy()))
        assert labels.tolist() == [*range(23), *range(23)]
        assert source.description["mirror"] is True

    @pytest.mark.parametrize("world_size", [1, 2, 3, 8])
    def test_every_image_once_over_all_processes(self, kind, images, world_size):
        seen = {}
        for rank in range(world_size):
            for positions, batch, labels in read_chunks(kind(images, np.arange(23)), 4,
                                                        chunks_of_rank(23, 5, rank, world_size)):
                assert labels.tolist() == positions.tolist()
                assert len(batch) == len(positions) <= 5
                assert positions[0] % 5 == 0
                seen.update({p: image for p, image in zip(positions.tolist(), batch, strict=True) if p not in seen})
                assert len(set(positions.tolist()) & set(seen)) == len(positions)
        assert sorted(seen) == list(range(23))
        assert torch.equal(torch.stack([seen[i] for i in range(23)]), torch.from_numpy(images))


def test_fingerprints_tell_contents_apart(images):
    source = ArraySource(images)
    prints = [source.fingerprint, Subset(source, range(5)).fingerprint, Subset(source, range(6)).fingerprint,
              Mirrored(source).fingerprint, ArraySource(images[:5]).fingerprint]
    assert len(set(prints)) == len(prints)
    assert Subset(ArraySource(images.copy()), range(5)).fingerprint == prints[1]


def test_seeded_subset(images):
    source = ArraySource(images)
    assert seeded_subset(source, 23, 0) is source
    first, again, other = (seeded_subset(source, 9, seed) for seed in (1, 1, 2))
    assert first.indices.tolist() == sorted(set(first.indices.tolist())) == again.indices.tolist()
    assert first.indices.tolist() != other.indices.tolist()
    assert first.description["subset_of"] == 23
    with pytest.raises(UserError, match="folder has 23 images, the metric asks for 24.*--num=23"):
        seeded_subset(source, 24, 0, what="folder")


def test_seeded_indices_are_uniform():
    counts = np.zeros(20)
    for seed in range(400):
        counts[seeded_indices(20, 5, seed)] += 1
    assert 60 < counts.min()
    assert counts.max() < 140


def test_short_source_is_noticed(images):
    source = ArraySource(images)
    source.num_images = 30
    source.batches_at = lambda batch_size, indices: iter([])
    with pytest.raises(RuntimeError, match="ended before"):
        list(read_chunks(source, 4, chunks_of_rank(30, 8, 0, 1)))
