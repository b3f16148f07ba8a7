# SPDX-License-Identifier: Apache-2.0
"""Perceptual path length against closed forms."""
import math

import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics import latents
from metrics.path_length import EPSILON, perceptual_path_length, trimmed_mean
from tests.closeness import approx, assert_close
from tests.metrics.generators import LinearGenerator, source, stem, tiny_distance

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")


def measure(G, num=20, distance=tiny_distance, **settings):
    return perceptual_path_length(source(G, num, **settings), distance, CPU)


def ends(G, num, seed=0):
    """The two latents of every sample, float64."""
    from training.data.randomness import CounterRNG
    rng = CounterRNG(seed)
    return [rng.normal(stream, np.arange(num), (G.z_dim,)).astype(np.float64)
            for stream in ("metric/z", "metric/z-other-end")]

#----------------------------------------------------------------------------

class TestClosedForms:
    @pytest.mark.parametrize("num", [1, 20, 130])       # 130: several chunks.
    def test_linear_generator_and_squared_distance(self, num):
        # d(G(w), G(w + eps (v - w))) / eps^2 = |(v - w) A|^2 * 127.5^2, whatever eps is.
        G = LinearGenerator()
        start, end = ends(G, num)
        lengths = np.square((end - start) @ G.matrix.detach().numpy() * 127.5).sum(axis=1)
        # Pixels of both images are rounded three times, each with a mean square error of u^2 / 3 of their square, where
        # u = 2^-24. They are as large as |w A|, which is sqrt(1/2) of |(v - w) A|, and a step is eps of that. So a
        # difference has a relative error of sqrt(6 / 3) u sqrt(1/2) / eps = 6e-4. Its square has twice that, and the
        # mean of 768 pixels that over the root of 768: 4.3e-5. Asked for is five times that.
        assert measure(G, num) == approx(trimmed_mean(lengths), rel=2.2e-4)

    def test_a_constant_generator(self):
        G = LinearGenerator()
        G.matrix.data.zero_()
        assert measure(G) == 0

    def test_images_as_the_distance_sees_them(self):
        seen = []

        def distance(first, second):
            seen.append((first, second))
            return tiny_distance(first, second)

        G = LinearGenerator()
        measure(G, 5, distance)
        (first, second), start = seen[0], torch.from_numpy(ends(G, 5)[0])
        expected = (start @ G.matrix).reshape(-1, 3, 16, 16) * 127.5 + 127.5
        assert_close(first, expected.float(), atol=1e-3, rtol=1e-5)
        assert first.min() < -50            # Not clipped...
        assert first.max() > 300
        assert (first != first.round()).float().mean() > 0.9        # ... nor rounded.
        assert 0 < (first - second).abs().max() < 5 * EPSILON * 127.5 * 10

    @pytest.mark.parametrize("resolution", [64, 256, 512, 1024])
    def test_large_images_are_averaged_to_256(self, resolution):
        seen = []
        G = LinearGenerator(16)
        G.img_resolution, size = resolution, min(resolution, 256)
        picture = torch.randn(1, 3, resolution, resolution, generator=torch.Generator().manual_seed(0))
        G.synthesis = lambda ws, force_fp32: picture.expand(len(ws), -1, -1, -1)
        measure(G, 1, lambda first, second: (seen.append(first), tiny_distance(first, second))[1])
        squares = picture.reshape(1, 3, size, resolution // size, size, resolution // size)
        assert_close(seen[0], (squares.mean(dim=(3, 5)) + 1) * 127.5, atol=1e-3, rtol=1e-5)

    def test_both_ends_share_the_class(self):
        G = LinearGenerator(c_dim=3)
        measure(G, 7, label_policy="uniform")
        first, second = G.mapping.classes
        assert torch.equal(first, second)
        assert first.shape == (7, 3)
        assert len(torch.unique(first.argmax(dim=1))) > 1


class TestTrimmedMean:
    def test_by_its_definition(self):
        values = np.random.RandomState(0).permutation(np.arange(1000.0) ** 2)
        # Ranks 1% and 99% of 999: between 9 and 10 the lower, between 989 and 990 the higher.
        expected = np.sort(values)[9:991].mean()
        assert trimmed_mean(values) == approx(expected, rel=1e-14)

    def test_outliers_do_not_count(self):
        values = np.concatenate([np.full(990, 2.0), np.full(5, 1e9), np.full(5, -1e9)])
        assert trimmed_mean(values) == 2

    def test_few(self):
        assert trimmed_mean(np.array([3.0])) == 3
        assert trimmed_mean(np.array([1.0, 2.0, 6.0])) == 3

#----------------------------------------------------------------------------

class TestReproducible:
    def test_seed(self):
        G = LinearGenerator()
        assert measure(G) == measure(G)
        assert measure(G, seed=1) != measure(G)

    def test_chunks(self, monkeypatch):
        G = LinearGenerator()
        whole = measure(G, 9)
        monkeypatch.setattr(latents, "MAX_CHUNK", 4)
        assert measure(G, 9) == approx(whole, rel=1e-4)

    def test_the_generator_is_left_as_it_was(self):
        G = stem(False, 16, 6).train()
        state = {name: x.clone() for name, x in G.state_dict().items()}
        assert math.isfinite(measure(G, 3))
        assert G.training
        assert all(torch.equal(x, state[name]) for name, x in G.state_dict().items())


def test_a_diverged_generator():
    G = LinearGenerator()
    G.matrix.data[0] = math.inf
    with pytest.raises(UserError, match="non-finite values"):
        measure(G)
