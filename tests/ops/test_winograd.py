"""Convolution by tiles against the convolution."""
import pytest
import torch
import torch.nn.functional as F

from tests.closeness import l2_error, rel_error
from torch_utils.ops import winograd

pytestmark = pytest.mark.numeric

SHAPES = [(1, 5, 7, 4, 4, 0), (2, 16, 8, 13, 10, 2), (3, 8, 8, 6, 21, 1), (1, 3, 2, 1, 1, 2), (5, 4, 6, 9, 9, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("chunk", [1, 11, winograd.CHUNK_TILES])
def test_equal_to_the_convolution(shape, chunk, monkeypatch):
    """Also where an image is worked on in parts, and where several go together."""
    monkeypatch.setattr(winograd, "CHUNK_TILES", chunk)
    n, i, o, h, w, padding = shape
    torch.manual_seed(0)
    x, weight = torch.randn(n, i, h, w), torch.randn(o, i, 3, 3)
    wanted = F.conv2d(x.double(), weight.double(), padding=padding)
    y = winograd.conv2d_tiles(x, weight, padding)
    assert y.shape == wanted.shape
    assert rel_error(y, wanted) < 1e-5
    assert rel_error(winograd.conv2d_tiles(x.double(), weight.double(), padding), wanted) < 1e-13


def test_rounding_is_small():
    """In the mean over many sums as long as those of real layers.

    At each of the 36 points 256 terms are added: if one after the other, with a relative error of u sqrt(256 / 6) =
    6.5 u, u = 2^-24, in the mean. The transforms of inputs, filters and outputs, of up to 36 terms, bring it to 8 u.
    The outputs are five times (5.02) smaller than the terms they are sums of, so the error is 5.02 * 8 u = 2.4e-6.
    Asked for is twice that, because signs of roundings need not be quite random. A wrong matrix has errors near 1.
    """
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 20, 20), torch.randn(32, 256, 3, 3)
    wanted = F.conv2d(x.double(), weight.double(), padding=2)
    assert l2_error(winograd.conv2d_tiles(x, weight, 2), wanted) < 4.8e-6


def test_used_where_it_pays_and_no_gradient_is_asked_for(monkeypatch):
    calls = []
    monkeypatch.setattr(winograd, "conv2d_tiles", lambda *args: calls.append(args) or F.conv2d(*args[:2], padding=2))
    wide, narrow = winograd.MIN_CHANNELS, winograd.MIN_CHANNELS - 1
    x, weight = torch.randn(1, wide, 64, 64), torch.randn(wide, wide, 3, 3)

    def used(x: torch.Tensor, weight: torch.Tensor) -> bool:
        calls.clear()
        winograd.conv2d(x, weight, 2)
        return bool(calls)

    assert used(x, weight)
    assert not used(x[:, :, :8, :8], weight)
    assert not used(x[:, :narrow], weight[:, :narrow])
    assert not used(x, weight[:, :, :1, :1])
    assert not used(x[..., :16].double(), weight.double())
    assert not used(x.bfloat16(), weight.bfloat16())
    assert not used(x, weight.clone().requires_grad_())
    with torch.no_grad():
        assert used(x, weight.clone().requires_grad_())
