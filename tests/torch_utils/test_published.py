# SPDX-License-Identifier: Apache-2.0
"""Published weights from packages: found, checked, translated by name; they know ImageNet's classes."""
import importlib.util

import numpy as np
import PIL.Image
import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from dnnlib import UserError
from dnnlib.util import file_sha256
from tests.closeness import assert_close, rel_error
from torch_utils import published
from torch_utils.published import PACKAGES, as_timm_names, find_weights, load_published
from torch_utils.schema import Unfit
from torch_utils.weights import read_weights
from training.feature_networks.registry import load_backbone

LITE = [f"tf_efficientnet_lite{i}" for i in range(3)]
PALACE, FLOWER = 0, 1


@pytest.fixture(autouse=True)
def _nothing_else_on_this_machine(monkeypatch):
    """No weights but those of the packages."""
    monkeypatch.delenv("STYLESAN_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)


@pytest.fixture(scope="module")
def photographs() -> list[np.ndarray]:
    """scikit-learn's two: a Chinese palace and a flower, uint8 [427, 640, 3]."""
    return [np.asarray(image) for image in load_sample_images().images]


def answer(net: torch.nn.Module, photograph: np.ndarray) -> torch.Tensor:
    """Probabilities of ImageNet's classes by timm's own preparation of images."""
    prepare = create_transform(**resolve_data_config({}, model=net))
    with torch.no_grad():
        return net(prepare(PIL.Image.fromarray(photograph))[None]).softmax(dim=1)[0]

#----------------------------------------------------------------------------
# What is in them.

@pytest.mark.numeric
@pytest.mark.parametrize(("name", "palace"),
                         [(LITE[0], 0.2983), (LITE[1], 0.5541), (LITE[2], 0.3777)])
def test_classes_of_photographs(photographs, name, palace):
    model = load_published(name)
    assert (model.path.name, model.sha256) == (PACKAGES[name].file.partition("/")[2], PACKAGES[name].sha256)
    assert not model.net.training
    assert not any(p.requires_grad for p in model.net.parameters())
    probs, names = answer(model.net, photographs[PALACE]), ImageNetInfo()
    assert names.index_to_description(int(probs.argmax())) == "palace"
    assert_close(probs.max(), palace, atol=2e-3)
    flower = answer(model.net, photographs[FLOWER])
    found = {names.index_to_description(int(i)).partition(",")[0] for i in flower.topk(3).indices}
    assert found & {"daisy", "honeycomb", "bee"}
    if name == LITE[0]:
        assert names.index_to_description(int(flower.argmax())) == "daisy"


@pytest.mark.numeric
def test_feature_maps(photographs):
    """Ours against timm's own pyramid with the translated tensors, and one recorded number."""
    backbone = load_backbone(LITE[0])
    assert backbone.sha256 == PACKAGES[LITE[0]].sha256
    assert backbone.source == str(find_weights(LITE[0]).path)
    pyramid = timm.create_model(LITE[0], features_only=True, out_indices=(1, 2, 3, 4)).eval()
    state = as_timm_names(read_weights(backbone.source), [1, 2, 2, 3, 3, 4, 1])
    assert not pyramid.load_state_dict(state, strict=False).missing_keys        # Its head is all that it leaves out.
    image = torch.from_numpy(photographs[PALACE][:, 100:527].copy()).permute(2, 0, 1)[None] / 127.5 - 1
    x = backbone.preprocess(torch.nn.functional.interpolate(image, size=224, mode="bilinear", align_corners=False))
    with torch.no_grad():
        ours, theirs = backbone.maps(x), pyramid(x)
    assert [y.shape[1] for y in ours] == [24, 40, 112, 320]
    for y, z in zip(ours, theirs, strict=True):
        assert rel_error(y, z) < 1e-5
    assert_close(ours[-1].std(), 2.80657, rtol=1e-4)

#----------------------------------------------------------------------------
# How they are found.

@pytest.mark.parametrize("name", LITE)
def test_order_of_places(tmp_path, monkeypatch, name):
    found = find_weights(name)
    assert found.package == PACKAGES[name]
    assert found == find_weights(f"{name}.in1k")._replace(url=found.url)
    assert file_sha256(found.path) == PACKAGES[name].sha256
    for folder in ("cache/downloads", "weights"):       # Each comes before the one before it.
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / f"{name}.safetensors").write_bytes(b"")
        monkeypatch.setenv("STYLESAN_CACHE" if "cache" in folder else "STYLESAN_WEIGHTS",
                           str(tmp_path / folder.removesuffix("/downloads")))
        assert find_weights(name).path == tmp_path / folder / f"{name}.safetensors"
        assert find_weights(name).package is None


@pytest.mark.parametrize(("kept", "asked", "is_found"), [
    ("tf_efficientnet_lite0.in1k", LITE[0], True), (LITE[0], "tf_efficientnet_lite0.in1k", True),
    ("resnet50.tv_in1k", "resnet50", False), ("resnet50", "resnet50.tv_in1k", False)])
def test_weights_that_timm_takes_by_itself_have_two_names(tmp_path, kept, asked, is_found):
    (tmp_path / f"{kept}.safetensors").touch()
    found = published.locate_weights(asked, [tmp_path])
    assert (found is not None and found.path.parent == tmp_path) == is_found


def test_own_weights_are_not_passed_over(tmp_path, monkeypatch):
    """Where the user means weights of their own, none are taken from elsewhere without a word."""
    link = tmp_path / f"{LITE[0]}.safetensors"
    link.symlink_to(tmp_path / "nothing")
    with pytest.raises(UserError, match="is no file, but a broken link or a folder: mend or remove it"):
        find_weights(LITE[0], [tmp_path])
    link.unlink()
    link.mkdir()
    monkeypatch.setenv("STYLESAN_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="is no file, but a broken link or a folder: mend or remove it"):
        find_weights(LITE[0])
    for wrong in (tmp_path / "nothing", __file__):
        monkeypatch.setenv("STYLESAN_WEIGHTS", str(wrong))
        with pytest.raises(UserError, match=f"STYLESAN_WEIGHTS={wrong}: no such folder"):
            find_weights(LITE[0])


@pytest.mark.usefixtures("_no_packages")
@pytest.mark.parametrize(("name", "has_package"), [(LITE[1], True), ("resnet18", False)])
def test_absence_names_the_package(monkeypatch, tmp_path, name, has_package):
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"{name}.safetensors: it is not on this machine") as err:
        find_weights(name)
    assert ("pip install -e '.[pretrained]'" in str(err.value)) == has_package


def test_the_package_is_not_imported(monkeypatch):
    monkeypatch.delitem(importlib.sys.modules, PACKAGES[LITE[0]].module, raising=False)
    load_published(LITE[0])
    assert PACKAGES[LITE[0]].module not in importlib.sys.modules


def test_damaged_packages(tmp_path, monkeypatch):
    package = PACKAGES[LITE[0]]
    (tmp_path / "odd_package" / "models").mkdir(parents=True)
    (tmp_path / "odd_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGES, LITE[0], package._replace(module="odd_package"))
    with pytest.raises(UserError, match=f"has no such file: install it again: pip install .* {package.requirement}"):
        load_published(LITE[0])
    path = tmp_path / "odd_package" / package.file
    path.write_bytes(b"odd")
    with pytest.raises(UserError, match=f"expected {package.sha256}: install it again"):
        load_published(LITE[0])


@pytest.mark.parametrize(("change", "problem"), [
    (lambda state: state.pop("_fc.bias"), r"lacks tensors: classifier\.bias"),
    (lambda state: state.update({"_fc.bias": torch.zeros(7)}), r"other shapes: classifier\.bias \[7\] for \[1000\]"),
    (lambda state: state.update({"_blocks.99._bn1.bias": torch.zeros(7)}), r"no place for its tensor _blocks\.99"),
    (lambda state: state.update({"_blocks.1._swish.bias": torch.zeros(7)}), r"no place for its tensor _blocks\.1\._sw"),
    (lambda state: state.update({"extra": torch.zeros(7)}), "no place for its tensor extra"),
])
def test_tensors_that_do_not_fit(tmp_path, monkeypatch, change, problem):
    """A package of another version, whose hash somebody has entered."""
    state = read_weights(find_weights(LITE[0]).path)
    change(state)
    package = PACKAGES[LITE[0]]
    path = tmp_path / "new_package" / package.file
    path.parent.mkdir(parents=True)
    (tmp_path / "new_package" / "__init__.py").touch()
    torch.save(state, path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(PACKAGES, LITE[0], package._replace(module="new_package", sha256=file_sha256(path)))
    with pytest.raises(UserError, match=f"does not hold the weights of {LITE[0]} .*{problem}"):
        load_published(LITE[0])


def test_names_do_not_depend_on_the_order():
    """The rule looks at names only: a file whose tensors stand in another order gives the same network."""
    state = read_weights(find_weights(LITE[0]).path)
    depths = [len(stage) for stage in timm.create_model(LITE[0]).blocks]
    ordered, shuffled = as_timm_names(state, depths), as_timm_names(dict(reversed(state.items())), depths)
    assert ordered.keys() == shuffled.keys() == timm.create_model(LITE[0]).state_dict().keys()
    assert all(torch.equal(ordered[name], shuffled[name]) for name in ordered)
    with pytest.raises(Unfit, match="no place"):
        as_timm_names(state, depths[:-1])


def test_random_numbers_go_on_untouched():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    published.load_published(LITE[0])
    assert torch.equal(torch.get_rng_state(), state)
