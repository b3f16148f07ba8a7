# SPDX-License-Identifier: Apache-2.0
"""SAN layers: recorded numbers, which output trains what, projection, conditional against unconditional heads."""
import numpy as np
import pytest
import torch

from tests.closeness import max_error, rel_error
from tests.parity import load_npz
from training.discriminators.heads import SingleDiscCond
from training.discriminators.san import PlainConv2d, PlainEmbedding, SanConv1d, SanConv2d, SanEmbedding, SanLinear

pytestmark = pytest.mark.numeric

TOLERANCE = 1e-5

MAKERS = {
    "conv2d": lambda: SanConv2d(5, 3, 4, bias=False),
    "conv2d_bias": lambda: SanConv2d(5, 3, 3, padding=1),
    "conv1d": lambda: SanConv1d(4, 2, 3, padding=1),
    "linear": lambda: SanLinear(7, 3),
    "embedding": lambda: SanEmbedding(6, 8),
}
INPUTS = {"conv2d": (2, 5, 8, 8), "conv2d_bias": (2, 5, 6, 6), "conv1d": (2, 4, 9), "linear": (4, 7)}


def recorded(case: str):
    """(layer with the recorded parameters, input, the case's arrays)."""
    data = {key[len(case) + 1:]: value for key, value in load_npz("san.npz").items() if key.startswith(f"{case}/")}
    layer = MAKERS[case]()
    state = {key.removeprefix("param/"): torch.as_tensor(value) for key, value in data.items()
             if key.startswith("param/")}
    layer.load_state_dict(state, strict=True)
    x = torch.as_tensor(data["x"])
    return layer, x.requires_grad_(x.is_floating_point()), data


@pytest.mark.parametrize("case", MAKERS)
def test_recorded_values(case):
    layer, x, data = recorded(case)
    out = layer.san(x)
    assert rel_error(layer(x), data["y"]) < TOLERANCE
    assert rel_error(out.fun, data["fun"]) < TOLERANCE
    assert rel_error(out.dir, data["dir"]) < TOLERANCE
    layer.project_()
    assert rel_error(layer.weight, data["weight_normalized"]) < TOLERANCE


@pytest.mark.parametrize("case", MAKERS)
@pytest.mark.parametrize("output", ["fun", "dir", "both", "eval"])
def test_recorded_gradients(case, output):
    layer, x, data = recorded(case)
    probe_fun, probe_dir = (torch.as_tensor(data[f"probe_{name}"]) for name in ("fun", "dir"))
    loss = {
        "fun": lambda: (layer.san(x).fun * probe_fun).sum(),
        "dir": lambda: (layer.san(x).dir * probe_dir).sum(),
        "both": lambda: sum((y * p).sum() for y, p in zip(layer.san(x), (probe_fun, probe_dir), strict=True)),
        "eval": lambda: (layer(x) * probe_fun).sum(),
    }[output]()
    loss.backward()
    leaves = dict(layer.named_parameters()) | ({"x": x} if x.is_floating_point() else {})
    names = [key for key in data if key.startswith(f"grad_{output}/")]
    assert {name.partition("/")[2] for name in names} == set(leaves)
    for name, leaf in leaves.items():
        expected = data[f"grad_{output}/{name}"]
        if expected.size == 0:
            assert leaf.grad is None, f"{name} must get no gradient from {output}"
        else:
            assert rel_error(leaf.grad, expected) < TOLERANCE, name


def test_recorded_construction():
    data = load_npz("san.npz")
    layer = SanConv2d(5, 3, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.as_tensor(data["init/ref_weight"]))
    layer._split_norm_()
    assert rel_error(layer.weight, data["init/weight"]) < TOLERANCE
    assert rel_error(layer.scale, data["init/scale"]) < TOLERANCE

#----------------------------------------------------------------------------
# Properties.

def sample(case: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(6, (4,)) if case == "embedding" else torch.randn(INPUTS[case])


def stretched(case: str):
    """A layer as an optimiser step leaves it: rows off unit norm, a scale and a bias of their own."""
    torch.manual_seed(0)
    layer = MAKERS[case]()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return layer


@pytest.mark.parametrize("case", MAKERS)
def test_values_of_all_three_outputs_agree(case):
    layer, x = stretched(case), sample(case)
    fun, along = layer.san(x)
    assert rel_error(fun, layer(x)) < 1e-6
    assert rel_error(along, layer(x)) < 1e-6


@pytest.mark.parametrize("case", MAKERS)
def test_each_output_trains_its_own_part(case):
    layer, x = stretched(case), sample(case)
    x.requires_grad_(x.is_floating_point())
    features = [x] * x.is_floating_point() + [layer.scale] + [p for n, p in layer.named_parameters() if n == "bias"]
    fun, along = layer.san(x)
    assert torch.autograd.grad(fun.sum(), [layer.weight], allow_unused=True, retain_graph=True) == (None,)
    assert all(g is not None for g in torch.autograd.grad(fun.sum(), features))
    assert torch.autograd.grad(along.sum(), features, allow_unused=True, retain_graph=True) == (None,) * len(features)
    direction_grad, = torch.autograd.grad((along * torch.randn_like(along)).sum(), [layer.weight])
    assert direction_grad.abs().max() > 0
    # The direction has no radial gradient: stretching a row does nothing.
    radial = (direction_grad * layer.weight).flatten(1).sum(dim=1)
    assert max_error(radial, torch.zeros_like(radial)) < 1e-4 * direction_grad.norm()


@pytest.mark.parametrize("case", MAKERS)
def test_projection_keeps_the_function_and_gives_unit_rows(case):
    layer, x = stretched(case), sample(case)
    before = layer(x)
    layer.project_()
    norms = layer.weight.flatten(1).norm(dim=1)
    assert max_error(norms, torch.ones_like(norms)) < 1e-6
    assert rel_error(layer(x), before) < 1e-6
    weight = layer.weight.clone()
    layer.project_()
    assert rel_error(layer.weight, weight) < 1e-6


@pytest.mark.parametrize("case", MAKERS)
def test_fresh_layer_is_the_drawn_map(case):
    torch.manual_seed(0)
    layer = MAKERS[case]()
    norms = layer.weight.flatten(1).norm(dim=1)
    assert max_error(norms, torch.ones_like(norms)) < 1e-6
    assert layer.scale.min() > 0
    assert layer.scale.shape == ((6, 1) if case == "embedding" else (layer.weight.shape[0],))


def test_names_of_parameters():
    assert {n for n, _ in SanConv2d(2, 3, 4).named_parameters()} == {"weight", "scale", "bias"}
    assert {n for n, _ in SanConv2d(2, 3, 4, bias=False).named_parameters()} == {"weight", "scale"}
    assert SanLinear(7, 3).bias.shape == (7,)      # It is added to the input.


def test_zero_row_stays_finite():
    layer = SanLinear(4, 2, bias=False)
    with torch.no_grad():
        layer.weight[0].zero_()
    layer.project_()
    assert layer(torch.ones(1, 4)).isfinite().all()


def test_conditional_head_is_one_unconditional_head_per_class():
    torch.manual_seed(0)
    head = SingleDiscCond(in_channels=16, map_size=8, c_dim=5, cmap_dim=6).eval()
    with torch.no_grad():
        for p in head.embed.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(7, 16, 8, 8)
    classes = torch.tensor([0, 1, 2, 3, 4, 2, 0])
    c = torch.nn.functional.one_hot(classes, 5).float()
    out, single = head.san(x, c), head(x, c)
    h = head.cls(head.main(x))
    for i, k in enumerate(classes.tolist()):
        last = SanConv2d(6, 1, 1, bias=False)
        with torch.no_grad():
            last.weight.copy_(head.embed.weight[k].reshape(1, 6, 1, 1))
            last.scale.copy_(head.embed.scale[k])
        expected = last.san(h[i:i + 1])
        for got, want in ((out.fun, expected.fun), (out.dir, expected.dir), (single, expected.fun)):
            assert rel_error(got[i], want[0, 0] / np.sqrt(6)) < 1e-5


def test_conditional_head_isolates_its_outputs():
    head = SingleDiscCond(in_channels=16, map_size=16, c_dim=5, cmap_dim=6)
    x = torch.randn(3, 16, 16, 16, requires_grad=True)
    c = torch.eye(5)[:3]
    others = [p for n, p in head.named_parameters() if n != "embed.weight"] + [x]
    fun, along = head.san(x, c)
    assert torch.autograd.grad(fun.sum(), [head.embed.weight], allow_unused=True, retain_graph=True) == (None,)
    assert torch.autograd.grad(along.sum(), others, allow_unused=True, retain_graph=True) == (None,) * len(others)
    assert torch.autograd.grad(along.sum(), [head.embed.weight])[0].abs().max() > 0

#----------------------------------------------------------------------------

def test_plain_layers_have_no_direction_objective():
    conv, table = PlainConv2d(5, 1, 4, bias=False), PlainEmbedding(6, 8)
    x, index = torch.randn(2, 5, 8, 8), torch.tensor([1, 4])
    for layer, value in ((conv, x), (table, index)):
        fun, along = layer.san(value)
        assert torch.equal(fun, layer(value))
        assert torch.equal(along, torch.zeros_like(fun))
        assert not along.requires_grad
