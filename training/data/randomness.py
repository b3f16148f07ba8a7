# SPDX-License-Identifier: Apache-2.0
"""Random numbers that are a pure function of (seed, stream name, position).

A position is the running number of a sample, such as the count of images seen so far. So a latent does not depend on
how a batch is split over micro-batches, processes or runs, and a resumed run needs no generator state.
"""
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

MAX_WORD = 2 ** 64 - 1

#----------------------------------------------------------------------------

class CounterRNG:
    """Counter-based draws: Philox (Salmon et al. 2011) keyed by (seed, stream), with the position as high counter word.

    Every position owns 2^192 counter values, so positions never overlap; streams differ in the key.
    """

    def __init__(self, seed: int):
        if not 0 <= seed <= MAX_WORD:
            raise ValueError(f"seed {seed} is not in [0, 2^64)")
        self.seed = int(seed)

    def normal(self, stream: str, positions: Sequence[int] | np.ndarray, shape: Sequence[int] = ()) -> np.ndarray:
        """Standard normal float32 [N, *shape], one row per position."""
        return self._fill(stream, positions, shape, np.float32, np.random.Generator.standard_normal)

    def uniform(self, stream: str, positions: Sequence[int] | np.ndarray, shape: Sequence[int] = ()) -> np.ndarray:
        """Uniform float32 [N, *shape] in [0, 1), one row per position."""
        return self._fill(stream, positions, shape, np.float32, np.random.Generator.random)

    def integers_from(self, stream: str, positions: Sequence[int] | np.ndarray, probs: np.ndarray) -> np.ndarray:
        """Indices int64 [N] drawn with probabilities `probs` [C], by the inverse of the distribution function.

        Raises:
            ValueError: `probs` is empty, negative, not finite or sums to zero.
        """
        probs = np.asarray(probs, dtype=np.float64)
        if probs.ndim != 1 or not np.isfinite(probs).all() or (probs < 0).any() or probs.sum() <= 0:
            raise ValueError("probs must be a list of finite, non-negative numbers with a positive sum")
        cdf = np.cumsum(probs)
        cdf /= cdf[-1]              # Exactly 1 from the last class that can occur: no draw falls behind it.
        u = self._fill(stream, positions, (), np.float64, np.random.Generator.random)
        return np.searchsorted(cdf, u, side="right").astype(np.int64)

    def _fill(self, stream: str, positions: Sequence[int] | np.ndarray, shape: Sequence[int],
              dtype: type[np.float32] | type[np.float64], draw: Callable[..., object]) -> np.ndarray:
        """One row of `draw` per position."""
        out: np.ndarray = np.empty((len(positions), *shape), dtype=dtype)
        rows = out.reshape(len(positions), -1)
        for row, generator in zip(rows, self._generators(stream, positions), strict=True):
            draw(generator, dtype=dtype, out=row)
        return out

    def _generators(self, stream: str, positions: Sequence[int] | np.ndarray) -> Iterator[np.random.Generator]:
        """A generator set to each position in turn. It is one object: setting its state takes a fifth of making one."""
        bits = np.random.Philox(key=np.array([self.seed, zlib.crc32(stream.encode())], dtype=np.uint64))
        generator = np.random.Generator(bits)
        state = bits.state          # A fresh one: empty buffers, counter 0. Drawing does not change this copy.
        for position in positions:
            state["state"]["counter"][3] = position
            bits.state = state
            yield generator

#----------------------------------------------------------------------------

def permutation(seed: int, epoch: int, num_items: int) -> np.ndarray:
    """The order int64 [num_items] of one epoch, a pure function of its arguments.

    It sorts raw Philox words: bit generators keep their output from one numpy version to the next, while
    `Generator.permutation` may change.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_items)
    return np.argsort(words, kind="stable")
