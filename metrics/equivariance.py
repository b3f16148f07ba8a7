# SPDX-License-Identifier: Apache-2.0
"""Equivariance to translation and rotation, EQ-T and EQ-R (Karras et al. 2021, section 2 and appendix E).

The generator is asked to move its input (`synthesis.input.transform`), and its image is compared with the moved image:
a peak signal-to-noise ratio in dB over all samples, channels and the pixels that can be known, for images in -1 to 1.

| key | the input is moved by | compared with |
|---|---|---|
| eqt_int | up to 1/8 of the width along either axis, rounded to whole pixels | the shifted image |
| eqt_frac | the same, unrounded | the image shifted by Lanczos interpolation |
| eqr | any angle | the image rotated by Lanczos filters; both sides are limited to the same band |
"""
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from metrics import image_motion
from metrics.feature_stats import Rows
from metrics.latents import LatentSource, chunk_size, questioned, synthesise, walk
from metrics.passes import on_rank0
from torch_utils import misc

MAX_TRANSLATION = 1 / 8     # Share of the width of an image.
RANGE = 2                   # Images go from -1 to 1.
MIN_ERROR = 1e-20           # Stands for a mean squared error of 0, whose PSNR would be no number.

#----------------------------------------------------------------------------

def equivariance(source: LatentSource, keys: Sequence[str], device: torch.device,
                 progress: str | None = None) -> dict[str, float]:
    """EQ-T and EQ-R in dB, by key. All processes take part and get the values.

    They depend on neither batch size nor the number of processes. The generator is left as it was.

    Args:
        source: The generator with its latents and classes.
        keys: Which of `COMPARISONS`; they share the unmoved images.
        device: Where this process computes.
        progress: Title of a progress bar.

    Raises:
        UserError: the generator has no input to transform, is too small, or gives images that are not finite.
    """
    _check_generator(source.G, keys)
    rows = Rows(source.num_images)
    with questioned(source.G), _own_transform(source.G.synthesis.input):
        for positions in walk(source.num_images, chunk_size(source.G.img_resolution), progress):
            rows.append(positions, _sums(source, keys, positions, device))
    table = rows.gather(device)

    def values() -> dict[str, float]:
        assert table is not None        # Process 0 has it.
        return {key: _decibels(column) for key, column in zip(keys, table.unbind(dim=1), strict=True)}
    return on_rank0(values)


def _decibels(sums: torch.Tensor) -> float:
    """PSNR from sums of squared errors and numbers of values summed: float64 [num, 2], row by row in order."""
    errors, count = (math.fsum(column) for column in sums.T.tolist())
    if count == 0:
        raise UserError("equivariance: no pixel stayed inside the image in any sample: use more samples")
    return 20 * math.log10(RANGE) - 10 * math.log10(max(errors / count, MIN_ERROR))


def _sums(source: LatentSource, keys: Sequence[str], positions: np.ndarray, device: torch.device) -> torch.Tensor:
    """Per sample and key the squared error, and the number of values it is summed over: float64 [N, keys, 2]."""
    G = source.G
    c = misc.one_hot(source.labels(positions).to(device), G.c_dim)
    ws = G.mapping(source.latents(positions).to(device), c)

    def move(transforms: torch.Tensor) -> torch.Tensor:
        G.synthesis.input.transform = transforms.to(device, torch.float32)
        return synthesise(G, ws)

    unmoved = move(torch.eye(3).repeat(len(positions), 1, 1))
    sums = []
    for key in keys:
        expected, got, mask = COMPARISONS[key](source, positions, unmoved, move)
        errors = (got - expected).square() * mask.unsqueeze(1)
        sums.append(torch.stack([_total(errors), _total(mask) * got.shape[1]], dim=1))
    return torch.stack(sums, dim=1)


def _total(x: torch.Tensor) -> torch.Tensor:
    """[N, ...] -> sums float64 [N] on the CPU."""
    x = x.cpu() if x.device.type == "mps" else x        # MPS has no float64.
    return x.flatten(1).sum(dim=1, dtype=torch.float64).cpu()


def _check_generator(G: Any, keys: Sequence[str]) -> None:
    if not hasattr(getattr(G.synthesis, "input", None), "transform"):
        raise UserError("equivariance: the input of this network cannot be moved, only that of the StyleGAN3 family")
    smallest = 2 * image_motion.ROTATION_RADIUS
    if "eqr" in keys and G.img_resolution < smallest:
        raise UserError(f"eqr: images of {G.img_resolution} pixels are smaller than its filter: it takes {smallest}")


@contextlib.contextmanager
def _own_transform(module: torch.nn.Module) -> Iterator[None]:
    """The block may put another tensor, also one per sample, in the place of the buffer `transform`."""
    found = module.transform
    try:
        yield
    finally:
        module.transform = found

#----------------------------------------------------------------------------
# The three comparisons: (source, positions, unmoved images, how to get moved ones) -> (expected and got [N, C, R, R],
# mask [N, R, R]). A transform says where the content of a place of the moved image comes from, in widths from the
# centre of the image.

Move = Callable[[torch.Tensor], torch.Tensor]       # Transforms [N, 3, 3] -> images [N, C, R, R]
Comparison = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _draw_shifts(source: LatentSource, positions: np.ndarray, stream: str) -> torch.Tensor:
    """Pixels to the right and down, float64 [N, 2]."""
    share = 2 * source.uniform(positions, (2,), stream).astype(np.float64) - 1
    return torch.from_numpy(share * MAX_TRANSLATION * source.G.img_resolution)


def _translation(shifts: torch.Tensor) -> torch.Tensor:
    """Shifts [N, 2] in widths -> transforms float64 [N, 3, 3]."""
    transforms = torch.eye(3, dtype=torch.float64).repeat(len(shifts), 1, 1)
    transforms[:, :2, 2] = -shifts
    return transforms


def _whole_pixels(source: LatentSource, positions: np.ndarray, unmoved: torch.Tensor, move: Move) -> Comparison:
    shifts = _draw_shifts(source, positions, "metric/eqt-int").round()
    expected, mask = image_motion.shift_whole(unmoved, shifts.long())
    return expected, move(_translation(shifts / source.G.img_resolution)), mask


def _any_shift(source: LatentSource, positions: np.ndarray, unmoved: torch.Tensor, move: Move) -> Comparison:
    shifts = _draw_shifts(source, positions, "metric/eqt-frac")
    expected, mask = image_motion.shift_lanczos(unmoved, shifts)
    return expected, move(_translation(shifts / source.G.img_resolution)), mask


def _any_angle(source: LatentSource, positions: np.ndarray, unmoved: torch.Tensor, move: Move) -> Comparison:
    angles = (2 * source.uniform(positions, (), "metric/eqr").astype(np.float64) - 1) * math.pi
    matrices = image_motion.rotations(torch.from_numpy(angles))
    transforms = torch.eye(3, dtype=torch.float64).repeat(len(angles), 1, 1)
    transforms[:, :2, :2] = matrices
    kernels = image_motion.rotation_kernels(matrices.to(unmoved.device, torch.float32))
    expected, known = image_motion.transform_filtered(unmoved, matrices, kernels)
    stay = torch.eye(2).repeat(len(angles), 1, 1)
    got, got_known = image_motion.transform_filtered(move(transforms), stay, kernels.flip(2))
    return expected, got, known & got_known


COMPARISONS: dict[str, Callable[[LatentSource, np.ndarray, torch.Tensor, Move], Comparison]] = {
    "eqt_int": _whole_pixels,
    "eqt_frac": _any_shift,
    "eqr": _any_angle,
}
