# SPDX-License-Identifier: Apache-2.0
"""The whole discriminator: frozen and trainable parts, state, augmentation, names of backbones."""
import dataclasses

import pytest
import torch

from dnnlib import UserError
from tests.closeness import max_error, rel_error
from training.config import DiscriminatorConfig
from training.diffaug import NUM_UNIFORMS
from training.discriminators.projected import ProjectedDiscriminator, module_keys
from training.discriminators.san import SanMixin
from training.feature_networks.backbones import warm_up_batch_norm
from training.feature_networks.registry import load_backbone

pytestmark = pytest.mark.numeric

TINY_TIMM = "resnet10t"
SMALL = DiscriminatorConfig(backbones=("local:random",), img_resolution=32, c_dim=5, cmap_dim=8, proj_channels=8,
                            max_channels=16)


def make(**changes) -> ProjectedDiscriminator:
    torch.manual_seed(0)
    return ProjectedDiscriminator(dataclasses.replace(SMALL, **changes))


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def labels(count: int = 4, c_dim: int = 5) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.arange(count) % c_dim, c_dim).float() if c_dim else torch.zeros(count, 0)

#----------------------------------------------------------------------------

@pytest.mark.parametrize("c_dim", [0, 1, 5, 1001])
def test_any_number_of_classes(c_dim):
    D = make(c_dim=c_dim)
    out = D.san(images(), labels(4, c_dim))
    assert len(out) == 1
    assert out[0].fun.shape == out[0].dir.shape == (4, out[0].fun.shape[1])


@pytest.mark.parametrize("size", [16, 32, 64])
def test_images_of_any_size(size):
    assert make()(images(size=size), labels())[0].shape == make()(images(), labels())[0].shape


def test_features_of_another_size():
    """A quarter of the positions in the backbone; fewer blocks in the heads, so that logits see as much of the map."""
    small, whole = (make(backbones=(f"{TINY_TIMM}:random",), feature_size=size) for size in (112, 224))
    depths = [[len(head.main) for head in D.discriminators[f"{TINY_TIMM}_random"].mini_discs.values()]
              for D in (small, whole)]
    assert depths == [[3, 2, 1, 1], [4, 3, 2, 1]]
    x = images().requires_grad_()
    (logits,), (others,) = small(x, labels()), whole(x, labels())
    assert len(logits) == len(others) == 4
    (gradient,) = torch.autograd.grad(logits.sum(), x)
    assert gradient.abs().sum(dim=(1, 2, 3)).min() > 0


def test_two_backbones_give_two_logits():
    D = make(backbones=("local:random", "local:random:7"))
    logits = D(images(), labels())
    assert len(logits) == 2
    assert not torch.allclose(logits[0], logits[1])


def test_wrong_labels_are_an_error():
    with pytest.raises(ValueError, match="shape"):
        make()(images(), labels(4, 3))


def test_only_heads_train():
    D = make()
    trainable = {name for name, p in D.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in D.named_parameters() if name.startswith("discriminators.")}
    assert {id(p) for p in D.trainable_parameters()} == {id(p) for p in D.parameters() if p.requires_grad}
    frozen = {name: value.clone() for name, value in D.state_dict().items() if name.startswith("feature_networks.")}
    D.train()
    sum(out.fun.sum() + out.dir.sum() for out in D.san(images(), labels())).backward()
    assert all(torch.equal(D.state_dict()[name], value) for name, value in frozen.items())
    assert not any(m.training for n in D.feature_networks.values() for m in n.backbone.modules())
    assert all(p.grad is not None for p in D.trainable_parameters())


def test_gradients_reach_the_image():
    x = images().requires_grad_(True)
    make()(x, labels(), torch.rand(1, 4, NUM_UNIFORMS))[0].sum().backward()
    assert x.grad.abs().max() > 0


def test_frozen_part_of_a_joint_batch_is_that_of_the_parts():
    D = make()
    real, fake = images(3), -images(2)
    u = torch.rand(1, 5, NUM_UNIFORMS)
    with torch.no_grad():
        first, rest = D.split_features(D.features(torch.cat([real, fake]), u), 3)
        for got, want in ((first, D.features(real, u[:, :3])), (rest, D.features(fake, u[:, 3:]))):
            for a, b in zip(got["local_random"], want["local_random"], strict=True):
                assert rel_error(a, b) < 1e-5


def test_augmentation_is_drawn_for_each_backbone():
    D = make(backbones=("local:random", "local:random:0"))      # The same network twice.
    u = torch.rand(2, 4, NUM_UNIFORMS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = D.features(images(), u).values()
        same = D.features(images(), u[:1].expand(2, -1, -1))
        maps = [network.backbone.maps(network.backbone.preprocess(images())) for network in D.feature_networks.values()]
    assert not torch.allclose(a[0], b[0])
    assert all(torch.equal(x, y) for x, y in zip(*maps, strict=True))
    assert len(same) == 2
    with pytest.raises(ValueError, match="shape"):
        D.features(images(), u[:1])

#----------------------------------------------------------------------------

def test_project_brings_every_direction_to_unit_norm():
    D = make()
    D.eval()
    with torch.no_grad():
        for p in D.trainable_parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = D(images(), labels())[0]
    D.project_()
    layers = [m for m in D.modules() if isinstance(m, SanMixin)]
    assert layers
    for m in layers:
        norms = m.weight.flatten(1).norm(dim=1)
        assert max_error(norms, torch.ones_like(norms)) < 1e-6
    assert rel_error(D(images(), labels())[0], before) < 1e-5


def test_without_san():
    D = make(san=False)
    D.project_()
    out, = D.san(images(), labels())
    assert torch.equal(out.dir, torch.zeros_like(out.fun))
    assert not any(isinstance(m, SanMixin) for m in D.modules())


def test_projections_depend_on_the_seed_only():
    torch.manual_seed(1)
    a = ProjectedDiscriminator(SMALL).own_state_dict()
    torch.manual_seed(2)
    b = ProjectedDiscriminator(SMALL).own_state_dict()
    other = ProjectedDiscriminator(dataclasses.replace(SMALL, seed=1)).own_state_dict()
    for name in a:
        if name.startswith("feature_networks."):
            assert torch.equal(a[name], b[name])
            assert not torch.equal(a[name], other[name])
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_own_state_goes_round():
    D, other = make(seed=3), make(seed=4)
    D.san(images(), labels())
    state = {name: value.clone() for name, value in D.own_state_dict().items()}
    assert not any(".backbone." in name for name in state)
    other.load_own_state_dict(state)
    D.eval()
    other.eval()
    assert torch.equal(D(images(), labels())[0], other(images(), labels())[0])


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.popitem(), "lacks"),
    (lambda s: s.update(extra=torch.zeros(1)), "unknown tensors extra"),
    (lambda s: s.update({"feature_networks.local_random.scratch.layer0_ccm.bias": torch.zeros(3)}), r"\[3\] for \[8\]"),
])
def test_own_state_must_fit(change, message):
    D = make()
    state = dict(D.own_state_dict())
    change(state)
    with pytest.raises(UserError, match=message):
        D.load_own_state_dict(state)


def test_backbone_info():
    info = make(backbones=("local:random", "local:random:4")).backbone_info()
    assert info["local_random"] == {"name": "local:random", "source": "random weights, seed 0", "sha256": None}
    assert info["local_random_4"]["source"] == "random weights, seed 4"


def test_keys_of_backbones():
    assert module_keys(["deit_base_distilled_patch16_224", "tf_efficientnet_lite0"]) == [
        "deit_base_distilled_patch16_224", "tf_efficientnet_lite0"]
    assert module_keys(["/a/my.net.safetensors", "b/my.net.safetensors", "local:c/x.safetensors"]) == [
        "my_net", "my_net_2", "x"]
    assert module_keys(["x:random", "x.random"]) == ["x_random", "x_random_2"]


def test_wrong_settings():
    with pytest.raises(UserError, match="colour"):
        make(diffaug=("colour",))
    with pytest.raises(UserError, match="at least one"):
        make(backbones=())

#----------------------------------------------------------------------------

def test_batch_norm_warm_up_is_for_efficientnets():
    local = load_backbone("local:random")
    assert not warm_up_batch_norm(local)
    lite = load_backbone("tf_efficientnet_lite0:random")
    before = {name: value.clone() for name, value in lite.net.state_dict().items()}
    assert warm_up_batch_norm(lite)
    moved = {name for name, value in lite.net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all(name.endswith(("running_mean", "running_var", "num_batches_tracked")) for name in moved)
    assert lite.net.state_dict()["bn1.num_batches_tracked"] == 1
    assert not any(m.training for m in lite.modules())
    assert not warm_up_batch_norm(lite)
    assert lite.net.state_dict()["bn1.num_batches_tracked"] == 1


def test_given_backbones_are_used_and_warmed_up_on_request():
    for wanted in (True, False):
        lite = load_backbone("tf_efficientnet_lite0:random")
        config = dataclasses.replace(SMALL, backbones=("tf_efficientnet_lite0",), bn_warmup=wanted)
        D = ProjectedDiscriminator(config, backbones={"tf_efficientnet_lite0": lite})
        assert D.feature_networks["tf_efficientnet_lite0"].backbone is lite
        assert lite.net.state_dict()["bn1.num_batches_tracked"] == int(wanted)
