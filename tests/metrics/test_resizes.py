# SPDX-License-Identifier: Apache-2.0
"""Resizes against the libraries that define them, and against the formula where the library is old."""
import math

import numpy as np
import PIL.Image
import pytest
import torch

from metrics.detectors import resizes
from metrics.detectors.base import normalised
from tests.closeness import max_error
from tests.host_numbers import HostNumbers
from tests.metrics.helpers import random_images

pytestmark = pytest.mark.numeric

SIZES = [(32, 32), (256, 256), (300, 299), (299, 300), (512, 512), (20, 500)]       # Enlarged, equal, reduced.


def images(size, num=2):
    height, width = size
    noise = torch.from_numpy(np.random.RandomState(0).randint(0, 256, [num, 3, height, width], dtype=np.uint8))
    noise[0] = torch.where(noise[0] > 127, 255, 0)      # Edges from black to white: the cubic overshoots.
    return noise


def by_pil(x, size, mode, interpolation="bicubic"):
    """Every channel of every image on its own, as clean-fid does; [N, 3, size, size] float32."""
    kind = np.float32 if mode == "F" else np.uint8
    kernel = PIL.Image.Resampling[interpolation.upper()]
    planes = [PIL.Image.fromarray(plane.astype(kind), mode=mode).resize((size, size), kernel)
              for plane in x.numpy().reshape(-1, *x.shape[2:])]
    stack = np.stack([np.asarray(plane, np.float32) for plane in planes])
    return torch.from_numpy(stack).reshape(*x.shape[:2], size, size)


def float_tolerance(size):
    """Ours is a sum in float32 along one axis, then the other: n taps, of which the absolute values add up to at most
    1.25, times levels up to 255, with n roundings by at most u = 2^-24; PIL's sums are in float64 and rounded once."""
    taps = max(4, math.ceil(4 * max(size) / 299))
    return 2 * (taps + 1) * 2 ** -24 * 255 * 1.25 ** 2


@pytest.mark.parametrize("size", SIZES)
def test_float_bicubic_is_pils(size):
    x = images(size)
    expected = by_pil(x, 299, "F").clamp(0, 255)
    ours = resizes.pil_bicubic_float(x, 299)
    assert ours.dtype == torch.float32
    assert max_error(ours, expected) < float_tolerance(size)


@pytest.mark.parametrize("interpolation", resizes.PIL_FILTERS)
@pytest.mark.parametrize("size", [*SIZES, (224, 224), (224, 256)])
def test_8_bit_resizes_are_pils(size, interpolation):
    x = images(size)
    assert torch.equal(resizes.pil_uint8(x, 224, interpolation).float(), by_pil(x, 224, "L", interpolation))


def test_8_bit_bicubic_in_parts(monkeypatch):
    x = images((20, 30), num=5)
    whole = resizes.pil_uint8(x, 224)
    monkeypatch.setattr(resizes, "FLOAT64_IMAGES", 2)
    assert torch.equal(resizes.pil_uint8(x, 224), whole)


def test_float_bicubic_is_clipped_but_not_rounded():
    x = resizes.pil_bicubic_float(images((32, 32)), 299)
    assert x.min() == 0
    assert x.max() == 255
    assert (x != x.round()).float().mean() > 0.5


def test_float_bicubic_is_clean_fids():
    from cleanfid.resize import build_resizer
    x = images((40, 40), num=1)
    theirs = build_resizer("clean")(x[0].permute(1, 2, 0).numpy())
    ours = resizes.pil_bicubic_float(x, 299)[0].permute(1, 2, 0).numpy()
    assert max_error(ours, theirs.clip(0, 255)) < float_tolerance((40, 40))


@pytest.mark.parametrize("size", [7, 32, 256, 299, 300, 1000])
def test_tf1_bilinear_is_torch_fidelitys(size):
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize
    images = torch.from_numpy(random_images(2, size))[..., : size // 2]     # Not square.
    theirs = resize(images.float(), size=(299, 299), align_corners=False)
    assert max_error(resizes.tf1_bilinear(images, 299), theirs) < 1e-4      # Of 255.


@pytest.mark.parametrize("size", [16, 299, 400])
def test_tf1_bilinear_is_its_formula(size):
    """src = dst * in / out; the right neighbour of the last pixel is itself."""
    x = random_images(1, size)[0, 0].astype(np.float64)
    at = np.arange(299) * (size / 299)
    low = np.floor(at).astype(int)
    high, t = np.minimum(low + 1, size - 1), at - low
    rows = x[low] * (1 - t)[:, None] + x[high] * t[:, None]
    expected = rows[:, low] * (1 - t) + rows[:, high] * t
    ours = resizes.tf1_bilinear(torch.from_numpy(random_images(1, size)), 299)[0, 0].numpy()
    assert max_error(ours, expected) < 0.01         # It takes places in float32.


def test_resizes_differ_from_each_other():
    """Mixing them up must not pass unnoticed: they are levels apart on a smooth image."""
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    smooth = (127 + 120 * torch.sin(x / 5) * torch.cos(y / 7)).to(torch.uint8).expand(1, 3, 64, 64)
    found = [resizes.tf1_bilinear(smooth, 299), 255 * resizes.pytorch_fid_bilinear(smooth, 299),
             resizes.pil_bicubic_float(smooth, 299)]
    for i, a in enumerate(found):
        for b in found[:i]:
            assert (a - b).abs().mean() > 0.1

#----------------------------------------------------------------------------

@pytest.mark.parametrize("prepare", [
    lambda x: resizes.tf1_bilinear(x, 8), lambda x: resizes.pil_bicubic_float(x, 8), normalised,
    lambda x: resizes.pil_uint8(x, 8)])
def test_weights_come_to_the_device_once(prepare):
    images = torch.zeros([2, 3, 12, 12], dtype=torch.uint8, device="meta")
    prepare(images)
    with HostNumbers() as watch:
        prepare(images)
    assert not watch.found
