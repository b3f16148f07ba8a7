# SPDX-License-Identifier: Apache-2.0
"""For metrics that question the generator itself: what they need of it, and their walk over its samples."""
import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import tqdm

from dnnlib import UserError
from metrics.sources import chunks_of_rank
from torch_utils import distributed, misc

MAX_CHUNK, MIN_CHUNK, CHUNK_PIXELS = 64, 4, 4096    # Samples per chunk times resolution is about CHUNK_PIXELS.

#----------------------------------------------------------------------------

@runtime_checkable
class LatentSource(Protocol):
    """A source of images that also hands out its generator and what its samples are made of.

    Sample i has the same latents, class and further random numbers whatever it is batched with.
    """

    G: Any                          # `mapping(z, c) -> ws`, `synthesis(ws, force_fp32=) -> images`, `c_dim`, ...
    num_images: int
    description: dict[str, Any]

    def latents(self, positions: np.ndarray, stream: str = "metric/z") -> torch.Tensor:
        """Standard normal float32 [N, z_dim]; another stream gives others."""
        ...

    def labels(self, positions: np.ndarray) -> torch.Tensor:
        """Classes int64 [N]."""
        ...

    def uniform(self, positions: np.ndarray, shape: Sequence[int], stream: str) -> np.ndarray:
        """Uniform float32 [N, *shape] in [0, 1)."""
        ...

#----------------------------------------------------------------------------

def check_source(source: Any, metric: str) -> LatentSource:
    """`source`, unless it is no generator or a truncated one.

    Raises:
        UserError: with the flag and what to do.
    """
    if not isinstance(source, LatentSource):
        raise UserError(f"--metrics={metric}: measures the generator itself: name it with --network (images alone are "
                        "not enough)")
    check_untruncated(source.description.get("truncation_psi", 1), metric)
    return source


def check_untruncated(truncation_psi: float, metric: str) -> None:
    """Refuse truncation. Raises UserError."""
    if truncation_psi != 1:
        raise UserError(f"--trunc={truncation_psi}: {metric} is defined without truncation: leave --trunc out")


def chunk_size(resolution: int) -> int:
    """Samples that a generator makes at a time: a function of its resolution alone, because rounding in a network
    depends on the batch it sees, and no setting of the caller's may move a result."""
    return max(MIN_CHUNK, min(MAX_CHUNK, CHUNK_PIXELS // resolution))


@contextlib.contextmanager
def questioned(G: Any) -> Iterator[None]:
    """The block may ask `G` for images as metrics do: in evaluation mode, without gradients and without TF32."""
    with misc.evaluating(G), torch.no_grad(), misc.full_precision():
        yield


def walk(num: int, size: int, progress: str | None) -> Iterator[np.ndarray]:
    """The positions of this process, chunk by chunk, under a progress bar of process 0.

    Args:
        num: Samples of all processes together.
        size: Samples per chunk.
        progress: Title of the bar; None: no bar.
    """
    chunks = chunks_of_rank(num, size, distributed.rank(), distributed.world_size())
    with tqdm.tqdm(total=num, desc=progress, unit="img", disable=progress is None or distributed.rank() != 0) as bar:
        for positions in chunks:
            yield positions
            bar.update(min(len(positions) * distributed.world_size(), num - bar.n))


def synthesise(G: Any, ws: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, R, R] in float32, about [-1, 1].

    Raises:
        UserError: an image has non-finite values.
    """
    images: torch.Tensor = G.synthesis(ws, force_fp32=True).float()
    if not torch.isfinite(images).all():
        raise UserError("the network gives images with non-finite values: the snapshot is of a diverged run")
    return images
