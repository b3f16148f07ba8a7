# SPDX-License-Identifier: Apache-2.0
"""The projected discriminator against the recorded numbers of the official one (weights filled by rule)."""
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.closeness import approx, l2_error, rel_error
from tests.parity import DOUBLE, DTYPES, GRADIENT, Recording, fill_by_rule, filled, load_json
from training.config import DiscriminatorConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks.registry import load_backbone

pytestmark = pytest.mark.numeric

CASES = [
    "lite0_uncond32",
    "lite0_cond16",
    pytest.param("deit_cond16", marks=pytest.mark.slow),
    pytest.param("deit_lite0_uncond256", marks=pytest.mark.slow),
]


def filled_backbone(name: str, dtype: torch.dtype):
    """A backbone filled by its own timm keys, with plain attention."""
    backbone = load_backbone(f"{name}:random").to(dtype)
    fill_by_rule(backbone.net)
    for module in backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return backbone


def filled_discriminator(backbones: tuple[str, ...], c_dim: int, dtype: torch.dtype,
                         **settings) -> ProjectedDiscriminator:
    """A discriminator at the starting point of every recording."""
    config = DiscriminatorConfig(backbones=backbones, c_dim=c_dim, **settings)
    # The backbones are cast before: the construction of a discriminator passes an image through them.
    D = ProjectedDiscriminator(config, backbones={name: filled_backbone(name, dtype) for name in backbones}).to(dtype)
    D.load_own_state_dict({name: torch.as_tensor(np.asarray(filled(name, tuple(tensor.shape))))
                           for name, tensor in D.own_state_dict().items()})
    return D


def is_before_batch_norm(name: str) -> bool:
    """Biases whose true gradient is 0."""
    return name.endswith(".main.0.bias")


def check_norms(norms: Sequence[float], names: Sequence[str], grads: Mapping[str, torch.Tensor],
                is_double: bool) -> None:
    """Compare the norms of gradients with recorded ones. That of a scalar is held in double precision only: it may be a
    difference of large numbers."""
    for name, norm in zip(names, norms, strict=True):
        if not is_before_batch_norm(name) and (is_double or grads[name].numel() > 1):
            near = approx(float(norm), rel=DOUBLE, abs=1e-12) if is_double else pytest.approx(float(norm), rel=GRADIENT)
            assert float(grads[name].norm()) == near, name


def head(tensor: torch.Tensor) -> torch.Tensor:
    """The first eight elements, filled up with zeros."""
    first = tensor.detach().flatten()[:8]
    return F.pad(first, (0, 8 - len(first)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_recorded_numbers(case, dtype):
    data, settings = Recording(f"discriminator_{case}", dtype), load_json(f"discriminator_{case}.json")
    keys, c = settings["backbones"], data.input("c")
    D = filled_discriminator(tuple(keys), c.shape[1], dtype)
    assert {name: list(t.shape) for name, t in D.own_state_dict().items()} == settings["state_shapes"]

    # One pass through the frozen part serves all comparisons.
    x = data.input("x").to(dtype).requires_grad_(True)
    features = D.features(x)
    for key in keys:
        assert len(features[key]) == 4
        for i, level in enumerate(features[key]):
            assert data.error(f"features/{key}/{i}", level[:, :4, ::8, ::8]) < data.bound(f"features/{key}/{i}")

    for mode, is_training in (("eval", False), ("gen", True)):
        D.train(is_training)
        with torch.no_grad():
            for key, logits in zip(keys, D.heads(features, c), strict=True):
                assert data.error(f"logits_{mode}/{key}", logits) < data.bound(f"logits_{mode}/{key}")

    fill_by_rule(D.discriminators, "discriminators.")
    outputs = D.heads_san(features, c)
    loss = 0
    for key, out in zip(keys, outputs, strict=True):
        for part, logits in out._asdict().items():
            assert data.error(f"logits_{part}/{key}", logits) < data.bound(f"logits_{part}/{key}")
            loss = loss + (logits * data.input(f"probe_{part}/{key}")).sum()
    loss.backward()
    assert data.error("grad_x", x.grad) < data.bound("grad_x")
    grads = {name: p.grad for name, p in D.named_parameters() if p.grad is not None}
    names = data["grad_names"].tolist()
    assert set(grads) == set(names)
    check_norms(data["grad_norms"], names, grads, data.is_double)
    if data.is_double:
        for name, recorded in zip(names, data["grad_head"], strict=True):
            assert is_before_batch_norm(name) or rel_error(head(grads[name]), recorded) < DOUBLE, name
    state = D.own_state_dict()
    for key in data.keys("after/"):
        assert data.error(key, state[key.removeprefix("after/")]) < data.bound(key), key


@pytest.mark.slow
def test_the_batch_norm_warm_up_matters():
    data = Recording("discriminator_lite0_uncond32", torch.float32)
    D = filled_discriminator(("tf_efficientnet_lite0",), 0, torch.float32, img_resolution=32, bn_warmup=False)
    with torch.no_grad():
        maps = D.features(data.input("x"))["tf_efficientnet_lite0"]
    errors = [l2_error(x[:, :4, ::8, ::8], data[f"features/tf_efficientnet_lite0/{i}"]) for i, x in enumerate(maps)]
    assert min(errors) > 0.1
