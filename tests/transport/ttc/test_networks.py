"""Critics of Trust the Critics: sizes as published, seeds, and which samples each takes."""
import pytest
import torch

from dnnlib import UserError
from torch_utils.misc import count_parameters
from transport.ttc.image_critics import CRITICS, InfoGANGenerator, make_critic, make_generator


@pytest.mark.parametrize(("name", "shape", "parameters"), [
    ("infogan", (1, 32, 32), 8_522_945),
    ("infogan", (3, 32, 32), 8_524_993),
    ("dcgan", (1, 32, 32), 373_761),
    ("sndcgan", (3, 128, 128), 5_983_745),
    ("arconvnet", (3, 128, 128), 2_496_001),
    ("bsndcgan", (3, 128, 128), 14_767_617),
    ("norm", (3, 128, 128), 2),
])
def test_critics_have_the_published_sizes(name, shape, parameters):
    with torch.device("meta"):
        critic = make_critic(name, shape)
        assert critic(torch.zeros(2, *shape)).shape == (2,)
    assert count_parameters(critic) == parameters


def test_generator_has_the_published_size():
    with torch.device("meta"):
        assert [count_parameters(InfoGANGenerator((c, 32, 32))) for c in (1, 3)] == [8_604_800, 8_606_848]
    images = make_generator((3, 8, 12), width=4)(torch.randn(5, 64, generator=torch.Generator().manual_seed(0)))
    assert images.shape == (5, 3, 8, 12)


def test_weights_are_a_function_of_the_seed():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    a, b, other = (make_critic("infogan", (1, 8, 8), 4, seed).layers[0].weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(a, b)
    assert not torch.equal(a, other)


@pytest.mark.parametrize("name", [name for name in CRITICS if name not in ("mlp", "bsndcgan")])
def test_small_critics(name):
    """All widths follow `width`, and every critic with room for it takes small images."""
    critic = make_critic(name, (3, 16, 16), width=4)
    assert critic(torch.zeros(2, 3, 16, 16)).shape == (2,)
    assert count_parameters(critic) < 30_000


@pytest.mark.parametrize(("name", "shape", "message"), [
    ("mlp", (3, 8, 8), r"--critic=mlp: takes points, but samples have the shape \[3, 8, 8\]"),
    ("infogan", (2,), r"--critic=infogan: takes images, but samples have the shape \[2\]: use --critic=mlp"),
    ("bsndcgan", (3, 32, 32), "--critic=bsndcgan: images of 32x32 pixels are too small"),
])
def test_samples_of_another_shape(name, shape, message):
    with pytest.raises(UserError, match=message):
        make_critic(name, shape, width=4)


def test_generator_of_odd_sizes():
    with pytest.raises(UserError, match="multiples of 4"):
        make_generator((1, 10, 8))
