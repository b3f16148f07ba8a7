# SPDX-License-Identifier: Apache-2.0
"""The classifier behind guidance."""
import pytest
import torch

from dnnlib import UserError
from tests.closeness import rel_error
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from training.feature_networks.classifier import load_classifier

pytestmark = pytest.mark.numeric


@pytest.fixture
def local(tmp_path) -> str:
    torch.manual_seed(0)
    net = OwnNetwork(own_config(num_classes=3, input_resolution=8, widths=(4, 8), class_names=["a", "b", "c"]))
    save_own_network(tmp_path / "net.safetensors", net)
    return str(tmp_path / "net.safetensors")


@pytest.mark.parametrize("size", [32, 256])
def test_timm_model(size):
    classifier = load_classifier("deit_tiny_distilled_patch16_224:random", c_dim=1000)
    x = (torch.rand(2, 3, size, size) * 2 - 1).requires_grad_(True)
    logits = classifier(x)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    y = (x / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]
    y = torch.nn.functional.interpolate(y, size=224, mode="bilinear", align_corners=False)
    assert rel_error(logits, classifier.net(y)) < 1e-4
    logits.sum().backward()
    assert x.grad.abs().max() > 0
    classifier.train()
    assert not any(m.training for m in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())


def test_own_network(local):
    classifier = load_classifier(local, c_dim=3, class_names=["a", "b", "c"])
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(classifier(x), classifier.net.logits(classifier.net.prepare_float(x)))
    assert classifier.sha256 == classifier.net.sha256
    assert classifier.source == local


def test_classes_in_another_order(local):
    """Column k is of class k of the data, whatever the order in which the classifier was trained."""
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    ours, theirs = load_classifier(local, 3, ["c", "a", "b"]), load_classifier(local)
    assert torch.equal(ours(x), theirs(x)[:, [2, 0, 1]])
    assert ours.state_dict().keys() == theirs.state_dict().keys()


def test_other_classes_are_refused(local):
    with pytest.raises(UserError, match="knows 3 classes, but the data has 10"):
        load_classifier(local, c_dim=10)
    with pytest.raises(UserError, match="--data: has the classes a, b, d, but --classifier=.* has a, b, c, and none "
                                        "called d: train it on this data set"):
        load_classifier(local, c_dim=3, class_names=["a", "b", "d"])
    with pytest.raises(UserError, match="unknown backbone"):
        load_classifier("resnet81")
    assert load_classifier("local:random", c_dim=10).sha256 is None
