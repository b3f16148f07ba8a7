# SPDX-License-Identifier: Apache-2.0
"""FD-DINOv2's network at reduced size: a file in torch.hub's layout against the network written out by hand."""
import dataclasses
import functools

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from metrics.detectors import DETECTORS, DINOV2_FILE, load_detector
from metrics.detectors.dinov2 import hub_position_table, make_dinov2
from tests.closeness import assert_close, rel_error
from tests.metrics.helpers import random_images

pytestmark = pytest.mark.numeric

CPU = torch.device("cpu")
DEPTH, DIM, HEADS, SIDE = 2, 48, 3, 37


def hub_state(seed=0):
    """Random tensors with the names and shapes that torch.hub's file has, but for depth and width."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, around=0.0, std=0.2):
        return around + std * torch.randn(shape, generator=generator)

    state = {"cls_token": draw(1, 1, DIM), "pos_embed": draw(1, 1 + SIDE * SIDE, DIM), "mask_token": draw(1, DIM),
             "patch_embed.proj.weight": draw(DIM, 3, 14, 14, std=0.05), "patch_embed.proj.bias": draw(DIM),
             "norm.weight": draw(DIM, around=1.0), "norm.bias": draw(DIM)}
    for i in range(DEPTH):
        b = f"blocks.{i}."
        for norm in ("norm1", "norm2"):
            state |= {f"{b}{norm}.weight": draw(DIM, around=1.0), f"{b}{norm}.bias": draw(DIM)}
        for layer, (num_out, num_in) in {"attn.qkv": (3 * DIM, DIM), "attn.proj": (DIM, DIM),
                                         "mlp.fc1": (4 * DIM, DIM), "mlp.fc2": (DIM, 4 * DIM)}.items():
            state |= {f"{b}{layer}.weight": draw(num_out, num_in), f"{b}{layer}.bias": draw(num_out)}
        state |= {f"{b}ls1.gamma": draw(DIM), f"{b}ls2.gamma": draw(DIM)}
    return state


def cubic_taps(at, size, a=-0.75):
    """Four clamped neighbours of a place and their weights by Keys' cubic."""
    first = int(np.floor(at)) - 1
    d = np.abs(at - np.arange(first, first + 4))
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a
    return np.clip(np.arange(first, first + 4), 0, size - 1), np.where(d < 1, near, far)


def positions_by_hand(table, grid, scale):
    """The published grid sampled at (i + 0.5) / scale - 0.5, in float64 loops."""
    side = int((table.shape[1] - 1) ** 0.5)
    weights = np.zeros([grid, side])
    for i in range(grid):
        for place, weight in zip(*cubic_taps((i + 0.5) / scale - 0.5, side), strict=True):
            weights[i, place] += weight
    patches = table[0, 1:].double().numpy().reshape(side, side, -1)
    sampled = np.einsum("iy,jx,yxc->ijc", weights, weights, patches).reshape(1, grid * grid, -1)
    return np.concatenate([table[:, :1].double().numpy(), sampled], axis=1)


def forward_by_hand(state, x):
    """Dosovitskiy et al.'s transformer with LayerScale, float64: images in the network's range -> class tokens."""
    state = {name: value.double() for name, value in state.items()}

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, [DIM], state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    x = torch.nn.functional.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=14)
    x = torch.cat([state["cls_token"].expand(len(x), 1, DIM), x.flatten(2).transpose(1, 2)], dim=1)
    x = x + torch.from_numpy(positions_by_hand(state["pos_embed"], 16, (16 + 0.1) / SIDE))
    for i in range(DEPTH):
        b = f"blocks.{i}."
        qkv = linear(norm(x, f"{b}norm1"), f"{b}attn.qkv").reshape(*x.shape[:2], 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attention = torch.softmax(q @ k.transpose(2, 3) / (DIM / HEADS) ** 0.5, dim=3)
        x = x + state[f"{b}ls1.gamma"] * linear((attention @ v).transpose(1, 2).flatten(2), f"{b}attn.proj")
        hidden = torch.nn.functional.gelu(linear(norm(x, f"{b}norm2"), f"{b}mlp.fc1"))
        x = x + state[f"{b}ls2.gamma"] * linear(hidden, f"{b}mlp.fc2")
    return norm(x, "norm")[:, 0]


def prepared_by_hand(images):
    """PIL, bicubic, 224; ImageNet's colours."""
    planes = [PIL.Image.fromarray(image.transpose(1, 2, 0)).resize((224, 224), PIL.Image.Resampling.BICUBIC)
              for image in images]
    x = np.stack([np.asarray(plane, np.float64) for plane in planes]) / 255
    x = (x - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(x.transpose(0, 3, 1, 2))


@pytest.fixture
def small(replace):
    """The official name with a network of a few thousand weights."""
    kind = dataclasses.replace(DETECTORS["dinov2-vitl14"], feature_dim=DIM, make_net=functools.partial(
        make_dinov2, depth=DEPTH, embed_dim=DIM, num_heads=HEADS))
    replace(DETECTORS, "dinov2-vitl14", kind)


def saved(tmp_path, state):
    torch.save(state, tmp_path / DINOV2_FILE.filename)
    return str(tmp_path)


def load(tmp_path, state):
    return load_detector("dinov2-vitl14", CPU, weights_dir=saved(tmp_path, state), allow_unverified=True)


@pytest.mark.parametrize("size", [32, 256])
def test_features_are_those_of_the_network_by_hand(tmp_path, small, size):
    state, images = hub_state(), random_images(2, size)
    ours = load(tmp_path, state).features(torch.from_numpy(images))["pool"].double()
    theirs = forward_by_hand(state, prepared_by_hand(images))
    assert ours.shape == (2, DIM)
    assert rel_error(ours, theirs) < 1e-5


def test_position_table():
    """torch.hub samples with the scale (16 + 0.1) / 37; the size alone gives another table."""
    table = hub_state()["pos_embed"]
    ours = hub_position_table(table)
    assert ours.shape == (1, 257, DIM)
    assert_close(ours, positions_by_hand(table, 16, (16 + 0.1) / SIDE), atol=1e-5, rtol=1e-7)
    assert np.abs(ours.numpy() - positions_by_hand(table, 16, 16 / SIDE)).max() > 0.01


def test_table_of_the_right_size_stays():
    table = torch.randn(1, 257, 4)
    assert torch.equal(hub_position_table(table), table)


@pytest.mark.parametrize(("change", "match"), [
    (lambda state: state.pop("blocks.1.ls2.gamma"), r"it lacks blocks\.1\.ls2\.gamma"),
    (lambda state: state.pop("pos_embed"), "it lacks pos_embed"),
    (lambda state: state.update({"head.weight": torch.zeros(1)}), r"it has besides head\.weight"),
    (lambda state: state.update({"norm.bias": torch.zeros(DIM + 1)}), r"other shape of norm\.bias"),
    (lambda state: state.update({"pos_embed": torch.zeros(1, 1 + 30 * 30 + 5, DIM)}), "other shape of pos_embed"),
])
def test_every_tensor_has_to_be_there(tmp_path, small, change, match):
    state = hub_state()
    change(state)
    with pytest.raises(UserError, match=match):
        load(tmp_path, state)


def test_the_real_architecture_takes_the_published_layout():
    """ViT-L/14: 24 blocks, 1024 wide, 342 tensors; the published file has the mask token besides."""
    with torch.device("meta"):
        net = make_dinov2()
    state = net.state_dict()
    assert len(state) == 342
    assert state["pos_embed"].shape == (1, 257, 1024)
    assert state["blocks.23.attn.qkv.weight"].shape == (3072, 1024)
    small_names = {name.replace("blocks.1.", "blocks.23.") for name in hub_state()} - {"mask_token"}
    assert small_names <= state.keys()


def test_record(tmp_path, small):
    detector = load(tmp_path, hub_state())
    assert detector.resize == "pil_bicubic_uint8_224"
    assert not detector.verified
    assert DETECTORS["dinov2-vitl14"].asset is DINOV2_FILE
    assert len(DINOV2_FILE.sha256) == 64
