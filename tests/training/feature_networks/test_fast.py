"""Frozen networks prepared for a run: the same function, in reduced precision nearly so."""
import copy
import threading

import pytest
import timm.layers
import torch

from tests import needs_cuda
from tests.closeness import l2_error
from torch_utils import misc
from training.config import DiscriminatorConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks import fast
from training.feature_networks.backbones import Backbone, warm_up_batch_norm
from training.feature_networks.classifier import Classifier, load_classifier
from training.feature_networks.fast import fold_batch_norm, optimize_frozen
from training.feature_networks.registry import load_backbone
from training.feature_networks.within import run_within

pytestmark = pytest.mark.numeric

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TRANSFORMER = "vit_tiny_patch16_224:random"


@torch.no_grad()
def efficientnet(name: str = "test_efficientnet:random") -> Backbone:
    """With statistics of some size, as trained networks have them."""
    b = load_backbone(name)
    torch.manual_seed(1)
    for name, buffer in b.net.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    warm_up_batch_norm(b)
    return b


@pytest.mark.parametrize("name", ["test_efficientnet:random", "tf_efficientnet_lite0:random"])
def test_folded_batch_norm_is_the_same_function(name):
    b = efficientnet(name)
    folded = copy.deepcopy(b)
    count = sum(isinstance(m, timm.layers.BatchNormAct2d) for m in b.net.modules())
    assert fold_batch_norm(folded.net) == count > 10
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.net.modules())
    assert not any(p.requires_grad for p in folded.net.parameters())
    x = torch.randn(1, 3, 64, 64)
    assert all(l2_error(a, c) < 1e-5 for a, c in zip(folded.maps(x), b.maps(x), strict=True))
    assert fold_batch_norm(folded.net) == 0


def test_other_networks_keep_their_batch_norm():
    b = load_backbone("resnet18:random")
    before = set(b.net.state_dict())
    optimize_frozen(b, "fp32")
    assert set(b.net.state_dict()) == before


def test_transformer_in_fp32_is_untouched():
    b = load_backbone(TRANSFORMER)
    x = torch.randn(1, 3, 224, 224)
    expected = b.maps(x)
    optimize_frozen(b, "fp32")
    assert all(torch.equal(a, c) for a, c in zip(b.maps(x), expected, strict=True))


def test_reduced_precision():
    b = load_backbone(TRANSFORMER)
    x = torch.randn(2, 3, 224, 224)
    results = []
    for precision in ("fp32", "bf16"):
        optimize_frozen(b, precision)
        y = x.clone().requires_grad_(True)
        maps = b.maps(y)
        assert all(m.dtype == torch.float32 for m in maps)
        results.append([*maps, *torch.autograd.grad(sum(m.square().sum() for m in maps), y)])
    assert b.net.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert b.net.blocks[0].norm1.weight.dtype == torch.float32
    errors = [l2_error(reduced, full) for full, reduced in zip(*results, strict=True)]
    assert all(1e-4 < error < 3e-2 for error in errors), errors


def test_convolutional_networks_stay_in_float32():
    b = efficientnet()
    full = copy.deepcopy(b)
    optimize_frozen(b, "bf16")
    optimize_frozen(full, "fp32")
    x = torch.randn(1, 3, 64, 64)
    assert all(torch.equal(a, c) for a, c in zip(b.maps(x), full.maps(x), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_discriminator(precision):
    """What snapshots hold stays as it is; logits and the images' gradient move little; twice is as once."""
    config = DiscriminatorConfig((TRANSFORMER, "test_efficientnet:random"), 16, 3, proj_channels=8, max_channels=32)
    D = ProjectedDiscriminator(config).requires_grad_(False).eval()
    state = {name: tensor.clone() for name, tensor in D.own_state_dict().items()}
    x, c = torch.rand(2, 3, 16, 16) * 2 - 1, torch.eye(3)[:2]

    def outputs() -> list[torch.Tensor]:
        y = x.clone().requires_grad_(True)
        logits = D(y, c)
        return [*(t.detach() for t in logits), *torch.autograd.grad(sum(t.sum() for t in logits), y)]

    before = outputs()
    D.optimize_frozen_(precision)
    after = outputs()
    assert all(l2_error(a, b) < (1e-5 if precision == "fp32" else 5e-2) for a, b in zip(after, before, strict=True))
    D.optimize_frozen_(precision)
    assert all(torch.equal(a, b) for a, b in zip(outputs(), after, strict=True))
    assert {name: tensor.dtype for name, tensor in D.own_state_dict().items()} == {n: t.dtype for n, t in state.items()}
    assert all(torch.equal(tensor, state[name]) for name, tensor in D.own_state_dict().items())

#----------------------------------------------------------------------------
# TF32: a switch of the whole process that must hold for the frozen networks only. On a processor it changes nothing, so
# where it stands is looked at, and the numbers must be the same.

def switch() -> tuple[str, str]:
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision


def watch_switch(module: torch.nn.Module, seen: list[tuple[str, str]]) -> None:
    """Notes where the switch stands whenever a part of the module runs, forward or backward."""
    def note(module: torch.nn.Module, args: tuple, output: object) -> None:
        seen.append(switch())
        if isinstance(output, torch.Tensor) and output.requires_grad:
            output.register_hook(lambda grad: seen.append(switch()))

    for part in module.modules():
        part.register_forward_hook(note)


def with_classifier() -> tuple[ProjectedDiscriminator, Classifier]:
    config = DiscriminatorConfig(("local:random", "test_efficientnet:random"), 16, 3, proj_channels=8, max_channels=32)
    D = ProjectedDiscriminator(config).requires_grad_(False).eval()
    D.optimize_frozen_("tf32")
    return D, load_classifier("local:random").optimize_frozen_("tf32")


def gradient_of_images(D: ProjectedDiscriminator, classifier: Classifier, gain: torch.Tensor) -> torch.Tensor:
    """Through both, from a trained number; the backward pass in a thread of its own, as on GPUs."""
    torch.manual_seed(3)
    x, c = torch.rand(2, 3, 16, 16) * 2 - 1, torch.eye(3)[:2]
    y = x * gain
    loss = sum(t.sum() for t in D(y, c)) + classifier(y).square().sum()
    thread = threading.Thread(target=lambda: loss.backward())
    thread.start()
    thread.join()
    grad, gain.grad = gain.grad, None
    return grad


def test_tf32_is_fp32_without_a_gpu():
    D, classifier = with_classifier()
    assert all(network.surroundings is None for network in D.feature_networks.values())
    assert classifier.surroundings is None


def test_tf32_is_for_transformers_on_gpus():
    transformer, convolutional = (load_backbone(name).net for name in (TRANSFORMER, "test_efficientnet:random"))
    assert fast.surroundings_of(transformer, "tf32", GPU) is misc.tf32
    for net, precision, device in ((transformer, "tf32", CPU), (transformer, "bf16", GPU),
                                   (convolutional, "tf32", GPU)):
        assert fast.surroundings_of(net, precision, device) is None


def test_tf32_holds_in_frozen_networks_only_forward_and_backward():
    D, classifier = with_classifier()
    gain = torch.full([1, 3, 1, 1], 0.9, requires_grad=True)
    expected = gradient_of_images(D, classifier, gain)
    frozen, trained = [], []
    for module in (*D.feature_networks.values(), classifier):
        module.surroundings = misc.tf32                         # This is how it is on a GPU.
        for part in module.children():
            watch_switch(part, frozen)
    watch_switch(D.discriminators, trained)
    before = switch()
    with misc.full_precision():
        found = gradient_of_images(D, classifier, gain)
    assert set(frozen) == {("tf32", "tf32")}
    assert set(trained) == {("ieee", "ieee")}
    assert switch() == before
    assert torch.equal(found, expected)
    forward = len(frozen)
    with torch.no_grad(), misc.full_precision():
        D(torch.zeros(1, 3, 16, 16), torch.eye(3)[:1])
    assert set(frozen[forward:]) == {("tf32", "tf32")}          # Also without a graph.


def test_a_function_within_surroundings():
    """Outputs that are not used, and several steps in one graph; what fails leaves the switch as it was."""
    x = torch.randn(4, requires_grad=True)
    first, _unused = run_within(misc.tf32, lambda t: (t.square(), t.exp()), x)
    (second,) = run_within(misc.tf32, lambda t: (t.sin(),), first)
    (grad,) = torch.autograd.grad(second.sum(), x)
    assert torch.allclose(grad, x.detach().square().cos() * 2 * x.detach())
    before = switch()
    with pytest.raises(ZeroDivisionError):
        run_within(misc.tf32, lambda t: 1 / 0, x)
    assert switch() == before


@pytest.mark.gpu
@needs_cuda
def test_tf32_on_a_gpu():
    """It shows in a transformer, forward and backward, and nowhere else."""
    if torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("this GPU has no TF32")
    config = DiscriminatorConfig((TRANSFORMER, "test_efficientnet:random"), 16, 3, proj_channels=8, max_channels=32)
    D = ProjectedDiscriminator(config).requires_grad_(False).eval().cuda()
    x = torch.rand(2, 3, 16, 16).cuda() * 2 - 1
    found = {}
    for precision in ("fp32", "tf32"):
        D.optimize_frozen_(precision)
        with misc.full_precision():
            y = x.clone().requires_grad_(True)
            for key, maps in D.features(y).items():
                (grad,) = torch.autograd.grad(sum(m.square().sum() for m in maps), y)
                found[precision, key] = [*maps, grad]
    transformer, convolutional = D.backbone_names
    errors = [l2_error(a, b) for a, b in zip(found["tf32", transformer], found["fp32", transformer], strict=True)]
    assert all(1e-5 < error < 1e-2 for error in errors), errors
    errors = [l2_error(a, b) for a, b in zip(found["tf32", convolutional], found["fp32", convolutional], strict=True)]
    assert max(errors) < 1e-5, errors
