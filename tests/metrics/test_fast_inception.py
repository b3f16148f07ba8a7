# SPDX-License-Identifier: Apache-2.0
"""The rebuilt Inception network against the one it was built from."""
import pytest
import torch

from metrics.detectors import fast_inception
from metrics.detectors.fast_inception import FastInception, FoldedConv
from metrics.detectors.inception import make_inception
from metrics.detectors.random_weights import random_state
from tests.closeness import l2_error
from tests.metrics.helpers import INCEPTION_TERMS, float32_tolerance

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
TOLERANCE = float32_tolerance(INCEPTION_TERMS)


def shake(net):
    """Normalisations that do something: random weights come with identities."""
    rng = torch.Generator().manual_seed(1)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for x, low, high in [(layer.running_mean, -0.2, 0.2), (layer.running_var, 0.5, 2),
                                 (layer.weight.data, 0.5, 1.5), (layer.bias.data, -0.2, 0.2)]:
                x.uniform_(low, high, generator=rng)


@pytest.fixture(scope="module")
def net():
    net = make_inception()
    net.load_state_dict(random_state(net))
    shake(net)
    return net.eval().requires_grad_(False)


def test_same_function(net):
    seen = {}
    hook = net.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _x, y: seen.update(map=y))
    images = torch.randint(0, 256, [3, 3, 299, 299], generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[1, :, :150] = 0
    images[2] //= 8
    pool, logits = net(images)
    hook.remove()
    fast = FastInception(net, CPU)
    maps = fast(images, lambda x: (x.float() - 128) / 128, num_channels=7)
    channels, features = maps.spatial, maps.pool
    assert features.shape == (3, 2048)
    assert channels.shape == (3, 7, 17, 17)
    assert l2_error(features, pool) < TOLERANCE
    assert l2_error(channels, seen["map"][:, :7]) < 5e-6
    assert l2_error(features @ fast.fc_weight.T, logits) < TOLERANCE
    assert l2_error(features - features.mean(dim=0), pool - pool.mean(dim=0)) < 1e-5      # Not just the mean.


def test_batch_does_not_show(net, monkeypatch):
    fast = FastInception(net, CPU)
    x = torch.rand(5, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    together = fast(x, torch.Tensor.float, 7)
    monkeypatch.setattr(fast_inception, "CPU_BATCH", 2)
    for whole, split in zip(together, fast(x, torch.Tensor.float, 7), strict=True):
        assert l2_error(split, whole) < TOLERANCE       # Sums of another batch size may be taken in another order.


def test_folding_is_exact():
    conv, bn = torch.nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False).double(), torch.nn.BatchNorm2d(6).double()
    layer = torch.nn.ModuleDict({"conv": conv, "bn": bn})
    layer.conv, layer.bn = conv, bn
    shake(layer)
    layer.eval()
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = bn(conv(x.double())).relu()
        assert l2_error(FoldedConv(layer)(x).double(), expected) < 1e-6


def test_cut_sums():
    conv, bn = torch.nn.Conv2d(70, 6, 3, stride=2, bias=False), torch.nn.BatchNorm2d(6)
    layer = torch.nn.ModuleDict({"conv": conv, "bn": bn})
    layer.conv, layer.bn = conv, bn
    shake(layer)
    layer.eval()
    x = torch.randn(2, 70, 9, 9, generator=torch.Generator().manual_seed(0))
    whole, parts = FoldedConv(layer), FoldedConv(layer)
    parts.cut(300)
    assert [w.shape[1] for w in parts.weights] == [24, 23, 23]
    with torch.no_grad():
        # Sums of 630 terms on both sides, and three times what roundings of random signs make of them.
        assert l2_error(parts(x).double(), whole(x).double()) < 3 * float32_tolerance(70 * 9)
