"""The laws of Trust the Critics: shapes, halves that share nothing, and the level of their noise."""
import math

import pytest
import sklearn.datasets
import torch

from dnnlib import UserError
from tests.closeness import approx, assert_close
from transport.common.study import seeded
from transport.ttc.denoising import psnr
from transport.ttc.laws import Crops, Normal, Table, noisy, open_data, open_source


def drawn(source, num=40, seed=0):
    x = source.draw(num, seeded(seed, "test"))
    assert x.shape == (num, *source.shape)
    assert x.dtype == torch.float32
    assert torch.equal(x, source.draw(num, seeded(seed, "test")))
    return x


@pytest.mark.parametrize("name", ["digits", "photos", "photos:china", "photos:flower"])
def test_images(name):
    halves = [open_data(name, 16, half) for half in ("train", "test")]
    a, b = (drawn(half) for half in halves)
    assert a.shape[1:] == ((1 if name == "digits" else 3), 16, 16)
    for x in (a, b):
        assert x.min() >= -1
        assert x.max() <= 1
        assert x.std() > 0.2
    if name == "digits":
        assert [len(half.samples) for half in halves] == [899, 898]
    else:
        assert all(photo.shape == (3, 427, 320) for half in halves for photo in half.photos)
        whole = sklearn.datasets.load_sample_image("flower.jpg")
        assert (torch.cat([half.photos[-1] for half in halves], dim=2).numpy() == whole.transpose(2, 0, 1)).all() \
            == (name != "photos:china")


@pytest.mark.parametrize(("name", "radius"), [("points:ring", 2), ("points:eight", 2), ("points:circle", 1)])
@pytest.mark.numeric
def test_points(name, radius):
    x = drawn(open_data(name, 8, "train"), 400)
    assert x.norm(dim=1).mean().item() == pytest.approx(radius, abs=0.03)
    assert (x.norm(dim=1) - radius).abs().max() < 0.21
    assert x.mean(dim=0).abs().max() < 0.2 * radius


def test_data_set_in_halves(data16):
    halves = [open_data(str(data16), 8, half) for half in ("train", "test")]
    assert [len(half.samples) for half in halves] == [8, 8]
    assert halves[0].shape == (3, 16, 16)
    assert not torch.equal(halves[0].samples, halves[1].samples)


@pytest.mark.numeric
def test_made_for_the_target():
    target = Table(torch.zeros(5, 1, 8, 8))
    for name in ("noise", "untrained", "noisy", "blurred"):
        assert drawn(open_source(name, target, "train", 0.3, 4, 0, 8)).shape[1:] == target.shape
    flat = open_source("blurred", Table(torch.full([1, 3, 8, 8], 0.25)), "train", 0.3, 4, 0, 8)
    assert_close(drawn(flat), torch.full([40, 3, 8, 8], 0.25), rtol=1.3e-6, atol=1e-5)


@pytest.mark.parametrize(("sigma", "decibels", "length"), [
    (0.1, 26.0206, 22.170), (0.2, 20.0, 44.340), (0.3, 16.4782, 66.510), (0.4, 13.9794, 88.681)])
@pytest.mark.numeric
def test_noise(sigma, decibels, length):
    clean, dirty = noisy(open_data("photos", 128, "test"), sigma).pair(60, seeded(0, "noise"))
    assert psnr(dirty, clean).mean().item() == pytest.approx(decibels, abs=0.02)
    assert (dirty - clean).flatten(1).norm(dim=1).mean().item() == pytest.approx(length, abs=0.05)
    assert dirty.max() > 1          # Nothing is clipped.


@pytest.mark.numeric
def test_psnr_of_a_known_error():
    assert psnr(torch.full([2, 3, 4, 4], 0.2), torch.zeros(2, 3, 4, 4)).tolist() == approx([20, 20])
    assert math.isinf(psnr(torch.zeros(1, 4), torch.zeros(1, 4)).item())


@pytest.mark.parametrize(("call", "message"), [
    (lambda: open_data("nowhere.zip", 8, "train"), "nowhere.zip: no such data"),
    (lambda: open_data("photos:dog", 8, "train"), "photos:dog: no such photograph"),
    (lambda: open_data("photos", 400, "test"), "--resolution=400: a photograph has only 427x320"),
    (lambda: open_source("digits", Normal((3, 8, 8)), "train", 0.3, 4, 0, 8),
     r"--source=digits: its samples have the shape \[1, 8, 8\], the target's \[3, 8, 8\]"),
    (lambda: open_source("blurred", Normal((2,)), "train", 0.3, 4, 0, 8), "--source=blurred: makes images"),
    (lambda: open_source("none.pkl", Normal((3, 8, 8)), "train", 0.3, 4, 0, 8), "none.pkl: no such file"),
])
def test_mistakes(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_crops_cover_the_photograph():
    photo = torch.arange(20, dtype=torch.uint8).expand(3, 4, 20).contiguous()
    left = ((Crops([photo], 4).draw(500, seeded(0, "crops"))[:, 0, 0, 0] + 1) * 127.5).round()
    assert sorted(set(left.int().tolist())) == list(range(17))
