"""Between tensors and 8-bit images."""
import torch

from torch_utils.images import from_uint8, to_uint8_metric, to_uint8_nearest, to_uint8_sample


def test_all_grey_values():
    grey = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(grey)
    assert x.dtype == torch.float32
    assert (x[0].item(), x[51].item(), x[255].item()) == (-1, torch.tensor(-0.6).item(), 1)
    assert torch.equal(to_uint8_nearest(x), grey)


def test_roundings():
    """0.7 of a grey value above 10: one rounding goes up, one is truncated, one is shifted by a half and truncated."""
    x = torch.tensor([10.7, 10.2]) / 127.5 - 1
    assert to_uint8_nearest(x).tolist() == [11, 10]
    assert to_uint8_sample(x).tolist() == [10, 10]
    assert to_uint8_metric(x).tolist() == [11, 10]
    far = torch.tensor([-3.0, 3])
    for rounding in (to_uint8_nearest, to_uint8_sample, to_uint8_metric):
        assert rounding(far).tolist() == [0, 255]
