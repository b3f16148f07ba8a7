# SPDX-License-Identifier: Apache-2.0
"""DiffAugment against a plain per-image reference; gradients; ranges of the random numbers."""
import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.closeness import rel_error
from training.diffaug import NUM_UNIFORMS, diff_augment

pytestmark = pytest.mark.numeric

ALL = ("color", "translation", "cutout")


def reference(image: np.ndarray, policy, u: np.ndarray) -> np.ndarray:
    """One image [C, H, W], in words of the paper's code: pixel by pixel."""
    x = image.astype(np.float64)
    _, height, width = x.shape
    for name in policy:
        if name == "color":
            x = x + (u[0] - 0.5)
            grey = x.mean(axis=0, keepdims=True)
            x = (x - grey) * (2 * u[1]) + grey
            x = (x - x.mean()) * (u[2] + 0.5) + x.mean()
        elif name == "translation":
            largest_y, largest_x = int(height / 8 + 0.5), int(width / 8 + 0.5)
            dy = int(u[3] * (2 * largest_y + 1)) - largest_y
            dx = int(u[4] * (2 * largest_x + 1)) - largest_x
            y = np.zeros_like(x)
            for i in range(height):
                for j in range(width):
                    if 0 <= i + dy < height and 0 <= j + dx < width:
                        y[:, i, j] = x[:, i + dy, j + dx]
            x = y
        else:
            side_y, side_x = int(height / 5 + 0.5), int(width / 5 + 0.5)
            centre_y = int(u[5] * (height + 1 - side_y % 2))
            centre_x = int(u[6] * (width + 1 - side_x % 2))
            x = x.copy()
            for i in range(centre_y - side_y // 2, centre_y - side_y // 2 + side_y):
                for j in range(centre_x - side_x // 2, centre_x - side_x // 2 + side_x):
                    if 0 <= i < height and 0 <= j < width:
                        x[:, i, j] = 0
    return x


@pytest.mark.parametrize("policy", [(), ("color",), ("translation",), ("cutout",), ALL, ALL[::-1]])
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (13, 10)])
def test_against_the_reference(policy, size):
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (40, 3, *size)).astype(np.float32)
    u = rng.random((40, NUM_UNIFORMS)).astype(np.float32)
    u[0], u[1] = 0, np.nextafter(np.float32(1), np.float32(0))      # The ends of the range.
    out = diff_augment(torch.as_tensor(images), policy, torch.as_tensor(u))
    expected = np.stack([reference(x, policy, v) for x, v in zip(images, u, strict=True)])
    assert rel_error(out, expected) < 1e-5


def test_gradient_is_that_of_a_linear_map():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(4, 3, 8, 8, generator=rng, dtype=torch.float64, requires_grad=True)
    u = torch.rand(4, NUM_UNIFORMS, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: diff_augment(x, ALL, u), [x])


def test_middle_of_the_range_changes_no_colour_and_moves_nothing():
    x = torch.rand(2, 3, 16, 16)
    u = torch.full((2, NUM_UNIFORMS), 0.5)
    assert rel_error(diff_augment(x, ("color", "translation"), u), x) < 1e-6


def test_every_shift_and_place_occurs():
    count = 4000
    u = torch.rand(count, NUM_UNIFORMS, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(count, 1, 16, 16)
    x[:, :, 8, 8] = 1
    moved = diff_augment(x, ("translation",), u)
    assert moved.sum() == count
    counts = torch.bincount(moved.flatten(1).argmax(dim=1) // 16, minlength=16)
    assert (counts > 0).nonzero()[:, 0].tolist() == [6, 7, 8, 9, 10]
    assert counts[6:11].min() > 0.8 * count / 5
    holes = 1 - diff_augment(torch.ones(count, 1, 16, 16), ("cutout",), u)
    assert (holes.sum(dim=0) > 0).all()
    assert holes.sum(dim=(1, 2, 3)).max() == 3 * 3


def test_each_image_has_its_own_numbers():
    x = torch.rand(3, 3, 16, 16)
    u = torch.rand(3, NUM_UNIFORMS)
    together = diff_augment(x, ALL, u)
    for i in range(3):
        assert torch.equal(diff_augment(x[i:i + 1], ALL, u[i:i + 1]), together[i:i + 1])


def test_unknown_name():
    with pytest.raises(UserError, match="'flip'.*color, translation, cutout"):
        diff_augment(torch.zeros(1, 3, 8, 8), ("flip",), torch.zeros(1, NUM_UNIFORMS))


def test_double_precision():
    """Random numbers come in single precision and are not worked with in it."""
    torch.manual_seed(0)
    images, u = torch.rand(32, 3, 16, 16, dtype=torch.float64) * 2 - 1, torch.rand(32, NUM_UNIFORMS)
    assert torch.equal(diff_augment(images, ALL, u), diff_augment(images, ALL, u.double()))
