# SPDX-License-Identifier: Apache-2.0
"""The projected discriminator against the recorded numbers of the official one (weights filled by rule)."""
import numpy as np
import pytest
import torch

from tests.closeness import l2_error, rel_error
from tests.parity import fill_by_rule, filled, load_json, load_npz
from training.config import DiscriminatorConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks.registry import load_backbone

EXACT = 1e-4            # Feature maps, logits, spectral-norm and BatchNorm state.
GRADIENT = 2e-2         # L2, through the frozen networks.
GRADIENT_NORM = 3e-2

CASES = [
    "lite0_uncond32",
    "lite0_cond16",
    pytest.param("deit_cond16", marks=pytest.mark.slow),
    pytest.param("deit_lite0_uncond256", marks=pytest.mark.slow),
]


def filled_backbone(name: str):
    """A backbone filled by its own timm keys, with plain attention."""
    backbone = load_backbone(f"{name}:random")
    fill_by_rule(backbone.net)
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return backbone


def filled_discriminator(case: str):
    """(discriminator, recorded arrays, recorded settings)."""
    data, settings = load_npz(f"discriminator_{case}.npz"), load_json(f"discriminator_{case}.json")
    return filled_discriminator_of(tuple(settings["backbones"]), c_dim=data["c"].shape[1]), data, settings


def filled_discriminator_of(backbones: tuple[str, ...], c_dim: int) -> ProjectedDiscriminator:
    """A discriminator at the starting point of every recording."""
    config = DiscriminatorConfig(backbones=backbones, c_dim=c_dim)
    D = ProjectedDiscriminator(config, backbones={name: filled_backbone(name) for name in backbones})
    fill(D)
    return D


def fill(D: ProjectedDiscriminator) -> None:
    """The starting point of every recording."""
    D.load_own_state_dict({name: torch.as_tensor(np.asarray(filled(name, tuple(tensor.shape))))
                           for name, tensor in D.own_state_dict().items()})


def is_before_batch_norm(name: str) -> bool:
    """Biases whose true gradient is 0."""
    return name.endswith(".main.0.bias")


@pytest.mark.parametrize("case", CASES)
def test_recorded_numbers(case):
    D, data, settings = filled_discriminator(case)
    keys, c = settings["backbones"], torch.as_tensor(data["c"])
    assert {name: list(t.shape) for name, t in D.own_state_dict().items()} == settings["state_shapes"]

    # One pass through the frozen part serves all comparisons.
    x = torch.as_tensor(data["x"]).requires_grad_(True)
    features = D.features(x)
    for key in keys:
        assert len(features[key]) == 4
        for i, level in enumerate(features[key]):
            assert rel_error(level[:, :4, ::8, ::8], data[f"features/{key}/{i}"]) < EXACT, (key, i)

    D.eval()
    with torch.no_grad():
        for key, logits in zip(keys, D.heads(features, c), strict=True):
            assert rel_error(logits, data[f"logits_eval/{key}"]) < EXACT

    D.train()
    with torch.no_grad():
        for key, logits in zip(keys, D.heads(features, c), strict=True):
            assert rel_error(logits, data[f"logits_gen/{key}"]) < EXACT

    fill_by_rule(D.discriminators, "discriminators.")
    outputs = D.heads_san(features, c)
    loss = 0
    for key, out in zip(keys, outputs, strict=True):
        assert rel_error(out.fun, data[f"logits_fun/{key}"]) < EXACT
        assert rel_error(out.dir, data[f"logits_dir/{key}"]) < EXACT
        loss = loss + (out.fun * torch.as_tensor(data[f"probe_fun/{key}"])).sum()
        loss = loss + (out.dir * torch.as_tensor(data[f"probe_dir/{key}"])).sum()
    loss.backward()
    assert l2_error(x.grad, data["grad_x"]) < GRADIENT
    named = {name: p for name, p in D.named_parameters() if p.grad is not None}
    assert set(named) == set(data["grad_names"].tolist())
    for name, norm in zip(data["grad_names"].tolist(), data["grad_norms"].tolist(), strict=True):
        if not is_before_batch_norm(name):
            assert abs(named[name].grad.norm().item() / norm - 1) < GRADIENT_NORM, name
    state = D.own_state_dict()
    for name in (name for name in data if name.startswith("after/")):
        assert rel_error(state[name.removeprefix("after/")], data[name]) < EXACT, name


@pytest.mark.slow
def test_the_batch_norm_warm_up_matters():
    data = load_npz("discriminator_lite0_uncond32.npz")
    config = DiscriminatorConfig(backbones=("tf_efficientnet_lite0",), img_resolution=32, bn_warmup=False)
    D = ProjectedDiscriminator(config, backbones={"tf_efficientnet_lite0": filled_backbone("tf_efficientnet_lite0")})
    fill(D)
    with torch.no_grad():
        maps = D.features(torch.as_tensor(data["x"]))["tf_efficientnet_lite0"]
    errors = [l2_error(x[:, :4, ::8, ::8], data[f"features/tf_efficientnet_lite0/{i}"]) for i, x in enumerate(maps)]
    assert min(errors) > 0.1
