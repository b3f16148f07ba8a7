# SPDX-License-Identifier: Apache-2.0
"""Networks of your own: shapes, files, refusals."""
import json

import pytest
import safetensors.torch
import torch

from dnnlib import UserError
from dnnlib.util import file_sha256
from torch_utils.own_network import OwnNetwork, load_own_network, own_config, save_own_network

pytestmark = pytest.mark.numeric


def make(**options) -> OwnNetwork:
    torch.manual_seed(0)
    config = {"num_classes": 3, "input_resolution": 16, "widths": (4, 6, 8), **options}
    return OwnNetwork(own_config(**config))


def test_shapes():
    net = make(class_names=["a", "b", "c"]).eval()
    x = net.prepare(torch.randint(256, (5, 3, 40, 40), dtype=torch.uint8))
    assert x.shape == (5, 3, 16, 16)
    assert [tuple(m.shape) for m in net.maps(x)] == [(5, 4, 8, 8), (5, 6, 4, 4), (5, 8, 2, 2)]
    embedding, logits = net.embed_and_logits(x)
    assert embedding.shape == (5, net.embed_dim)
    assert logits.shape == (5, net.num_classes)
    assert torch.equal(net.embed(x), embedding)
    assert torch.equal(net.logits(x), logits)
    assert torch.equal(net(x), logits)
    assert net.class_names == ["a", "b", "c"]


def test_preparation():
    net = make()
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2).expand(1, 3, 16, 2).repeat(1, 1, 1, 8)
    assert torch.equal(net.prepare(ends), ends.float() * 2 / 255 - 1)
    x = torch.rand(1, 3, 24, 24) * 2 - 1
    expected = torch.nn.functional.interpolate(x, size=16, mode="bilinear", align_corners=False, antialias=False)
    assert torch.equal(net.prepare_float(x), expected)
    x.requires_grad_(True)
    net.eval().embed(net.prepare_float(x)).sum().backward()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("resolution", [8, 13, 28])
def test_odd_sizes(resolution):
    net = make(input_resolution=resolution).eval()
    assert net.logits(torch.zeros(1, 3, resolution, resolution)).shape == (1, 3)


def test_file_goes_round(tmp_path):
    net = make()
    net(torch.randn(8, 3, 16, 16))                      # Moves the BatchNorm statistics.
    path = tmp_path / "net.safetensors"
    sha256 = save_own_network(path, net, {"data": "digits"})
    back = load_own_network(path)
    assert back.sha256 == sha256 == file_sha256(path)
    assert back.config == net.config
    assert back.metadata == {"data": "digits"}
    assert not back.training
    assert not any(p.requires_grad for p in back.parameters())
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(back(x), net.eval()(x))
    assert save_own_network(tmp_path / "again.safetensors", back, back.metadata) == sha256


def test_refused_files(tmp_path):
    path = tmp_path / "net.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load_own_network(path)
    save_own_network(path, make())
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:20], b"", b"garbage" * 10):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged or cut off"):
            load_own_network(path)
    for header in (None, {"stylesan_xl": "[]"}, {"stylesan_xl": '{"format": "other"}'}):
        safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata=header)
        with pytest.raises(UserError, match="expected a file of format"):
            load_own_network(path)


@pytest.mark.parametrize("config", [{"widths": [4]}, [], 3, {"num_classes": 4, "widths": [4, 6, 8]}])
def test_header_that_does_not_fit_the_tensors(tmp_path, config):
    path = tmp_path / "net.safetensors"
    header = json.dumps({"format": "stylesan-xl/local-network/1", "config": config})
    safetensors.torch.save_file(make().state_dict(), path, metadata={"stylesan_xl": header})
    with pytest.raises(UserError, match="do not agree"):
        load_own_network(path)


@pytest.mark.parametrize(("options", "message"), [
    ({"num_classes": 0}, "0 classes"),
    ({"class_names": ["a"]}, "3 classes with 1 names"),
    ({"widths": ()}, "widths"),
    ({"widths": (4, 0)}, "widths"),
    ({"input_resolution": 4}, "at least 8"),
])
def test_wrong_settings(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)
