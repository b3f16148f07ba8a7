# SPDX-License-Identifier: Apache-2.0
"""Spectral normalisation against PyTorch's classic one; sizes and channels of heads and projections."""
import pytest
import torch

from tests.closeness import rel_error
from training.discriminators.blocks import DownBlock, GhostBatchNorm2d, SpectralConv2d
from training.discriminators.heads import MultiScaleD, channels_at, down_blocks, nominal_size
from training.discriminators.projector import FeatureFusion, Reassembly, seeded

pytestmark = pytest.mark.numeric


def reference_conv(ours: SpectralConv2d, **options) -> torch.nn.Module:
    """PyTorch's classic spectral norm with the same state."""
    out_channels, in_channels, size, _ = ours.weight_orig.shape
    conv = torch.nn.Conv2d(in_channels, out_channels, size, bias=ours.bias is not None, **options)
    theirs = torch.nn.utils.spectral_norm(conv)
    theirs.load_state_dict(ours.state_dict())
    return theirs


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*")     # Deprecated there, which is why there is ours.
@pytest.mark.parametrize("bias", [True, False])
def test_spectral_norm_is_the_classic_one(bias):
    torch.manual_seed(0)
    ours = SpectralConv2d(3, 5, 4, stride=2, padding=1, bias=bias)
    theirs = reference_conv(ours, stride=2, padding=1)
    x = torch.randn(2, 3, 8, 8)
    for training in (True, True, False, False, True):
        ours.train(training)
        theirs.train(training)
        results = []
        for conv in (ours, theirs):
            conv.zero_grad()
            y = conv(x) + conv(2 * x)           # Two forwards before the backward, as with real and generated images.
            y.square().sum().backward()
            results.append((y.detach(), conv.weight_orig.grad.clone()))
        assert rel_error(results[0][0], results[1][0]) < 1e-6
        assert rel_error(results[0][1], results[1][1]) < 1e-5
        for name in ("weight_u", "weight_v"):
            assert rel_error(ours.state_dict()[name], theirs.state_dict()[name]) < 1e-6


def test_spectral_norm_tends_to_one():
    torch.manual_seed(0)
    conv = SpectralConv2d(3, 5, 4)
    x = torch.randn(1, 3, 8, 8)
    for _ in range(100):
        conv(x)
    sigma = torch.linalg.matrix_norm((conv.weight_orig / conv.sigma()).flatten(1), ord=2)
    assert abs(sigma.item() - 1) < 1e-4
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    conv.eval()(x)
    assert all(torch.equal(before[name], value) for name, value in conv.state_dict().items())


def test_running_statistics_of_groups_move_once_per_step():
    """Towards the mean over all groups; without any they stay."""
    norm, x = GhostBatchNorm2d(3), torch.randn(6, 3, 4, 4) * 2 + 1
    norm.ghost_batch = 2
    norm.move_running()
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert int(norm.num_batches_tracked) == 0
    norm(x[:4])
    norm(x[4:])
    norm.move_running()
    groups = x.unflatten(0, (3, 2)).transpose(1, 2).flatten(2)              # [groups, C, values]
    assert rel_error(norm.running_mean, 0.1 * groups.mean(dim=2).mean(dim=0)) < 1e-5
    assert rel_error(norm.running_var, 0.9 + 0.1 * groups.var(dim=2).mean(dim=0)) < 1e-5
    assert int(norm.num_batches_tracked) == 1
    assert not norm.sums.any()


def test_down_block_halves():
    assert DownBlock(3, 6)(torch.randn(2, 3, 12, 12)).shape == (2, 6, 6, 6)

#----------------------------------------------------------------------------

@pytest.mark.parametrize(("size", "expected"), [(1, 1), (2, 2), (3, 4), (7, 8), (8, 8), (112, 128), (128, 128)])
def test_nominal_size(size, expected):
    assert nominal_size(size) == expected


def test_channels():
    assert [channels_at(size, 512) for size in (128, 64, 32, 16, 8)] == [64, 64, 128, 256, 512]
    assert [channels_at(size, 100) for size in (64, 32, 16, 8)] == [64, 100, 100, 100]


@pytest.mark.parametrize(("map_size", "num_blocks", "kernel"), [
    (128, 4, 4), (112, 4, 4), (56, 3, 4), (28, 2, 4), (14, 1, 4), (16, 1, 4), (8, 1, 4), (7, 1, 3), (4, 1, 2),
    (2, 1, 1), (1, 0, 1), (9, 1, 4),
])
def test_down_blocks(map_size, num_blocks, kernel):
    blocks, channels, found = down_blocks(6, map_size, max_channels=16)
    assert (len(blocks), found) == (num_blocks, kernel)
    assert channels == (16 if num_blocks else 6)
    assert blocks(torch.randn(2, 6, map_size, map_size)).shape[2] >= kernel


@pytest.mark.parametrize("san", [True, False])
@pytest.mark.parametrize("c_dim", [0, 1, 3])
def test_heads_concatenate_logits(c_dim, san):
    net = MultiScaleD([4, 4, 8], [32, 16, 4], c_dim=c_dim, cmap_dim=5, max_channels=8, san=san)
    features = [torch.randn(2, 4, 32, 32), torch.randn(2, 4, 16, 16), torch.randn(2, 8, 4, 4)]
    c = torch.eye(3)[:2, :c_dim] if c_dim else torch.zeros(2, 0)
    net.eval()
    logits = net(features, c)
    assert logits.shape == (2, 25 + 25 + 1)
    out = net.san(features, c)
    assert rel_error(out.fun, logits) < 1e-6
    if san:
        assert rel_error(out.dir, logits) < 1e-6
    else:
        assert torch.equal(out.dir, torch.zeros_like(logits))

#----------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [[16, 8, 4, 2], [8, 4, 2], [4], [14, 7, 4, 2, 1], [5, 3]])
def test_fusion_of_any_number_of_maps(sizes):
    channels = [3 * (i + 1) for i in range(len(sizes))]
    fusion = FeatureFusion(channels, proj_channels=4)
    maps = [torch.randn(2, c, s, s) for c, s in zip(channels, sizes, strict=True)]
    out = fusion(maps)
    assert [list(x.shape[2:]) for x in out] == [[s, s] for s in fusion.out_sizes(sizes)]
    assert [x.shape[1] for x in out] == fusion.out_channels == ([4, 4, 8, 16, 32])[:len(sizes)]
    assert fusion.out_sizes(sizes)[0] == 2 * sizes[0]
    assert not any(p.requires_grad for p in fusion.parameters())


def test_fusion_by_hand():
    """Two maps: out1 = conv(up(ccm1(x1))), out0 = conv(up(ccm0(x0) + out1))."""
    fusion = FeatureFusion([2, 3], proj_channels=4)
    x0, x1 = torch.randn(1, 2, 4, 4), torch.randn(1, 3, 2, 2)
    up = torch.nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
    out1 = fusion.layer1_csm["out_conv"](up(fusion.layer1_ccm(x1)))
    out0 = fusion.layer0_csm["out_conv"](up(fusion.layer0_ccm(x0) + out1))
    assert all(rel_error(got, want) < 1e-6 for got, want in zip(fusion([x0, x1]), (out0, out1), strict=True))


def test_reassembly_makes_a_pyramid():
    net = Reassembly(32)
    out = net([torch.randn(2, 32, 14, 14) for _ in range(4)])
    assert [tuple(x.shape[1:]) for x in out] == [(4, 56, 56), (8, 28, 28), (16, 14, 14), (32, 7, 7)]
    assert net.out_sizes([14] * 4) == [56, 28, 14, 7]
    assert not any(p.requires_grad for p in net.parameters())


def test_seeded_leaves_the_callers_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with seeded(1, "x"):
        a = torch.rand(3)
    assert torch.equal(torch.rand(3), expected)
    with seeded(1, "x"):
        assert torch.equal(torch.rand(3), a)
    with seeded(1, "y"):
        assert not torch.equal(torch.rand(3), a)
