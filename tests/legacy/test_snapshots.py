# SPDX-License-Identifier: Apache-2.0
"""Snapshots by path: files, folders of runs, our own format."""
import hashlib

import pytest
import torch

import legacy
from dnnlib import UserError
from tests.legacy.official_files import dump, official_generator
from torch_utils import checkpoint
from training.config import to_dict
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator


def own_snapshot(G: Generator) -> dict:
    return {"format": "stylesan-xl-network", "version": 1, "generator_config": to_dict(G.config),
            "G_ema": G.state_dict(), "G": None, "discriminator_config": None, "D": None,
            "class_names": ["cat", "dog"], "progress": {"cur_nimg": 1000}}


@pytest.fixture
def G() -> Generator:
    torch.manual_seed(0)
    return Generator(stem_config(8, 3, 64, 4, z_dim=8, w_dim=8, c_dim=2, embed_dim=6))


def test_our_own_format(tmp_path, G):
    path = tmp_path / "network-snapshot-000001.pkl"
    checkpoint.save(path, own_snapshot(G))
    network = legacy.load_network(path)
    assert network.class_names == ["cat", "dog"]
    assert network.progress == {"cur_nimg": 1000}
    assert network.generator_config == G.config
    assert network.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    z, c = torch.randn(2, 8), torch.eye(2)
    assert torch.equal(network.G_ema(z, c), G(z, c))


@pytest.mark.numeric
def test_both_formats_give_the_same_images(tmp_path, G):
    checkpoint.save(tmp_path / "ours.pkl", own_snapshot(G))
    dump(tmp_path / "official.pkl", {"G_ema": official_generator(G)})
    ours, official = (legacy.load_network(tmp_path / name).G_ema for name in ("ours.pkl", "official.pkl"))
    z, c = torch.randn(2, 8), torch.eye(2)
    assert torch.equal(ours(z, c), official(z, c))
    # A converted file is a snapshot of ours.
    checkpoint.save(tmp_path / "converted.pkl", legacy.open_snapshot(tmp_path / "official.pkl"))
    assert torch.equal(legacy.load_network(tmp_path / "converted.pkl").G_ema(z, c), ours(z, c))


def test_folders(tmp_path, G):
    with pytest.raises(UserError, match="no best_model.pkl and no network-snapshot"):
        legacy.load_network(tmp_path)
    for name in ("network-snapshot.pkl", "network-snapshot-000009.pkl", "network-snapshot-000010.500.pkl",
                 "network-snapshot-000010.pkl"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "network-snapshot-000099.pkl").mkdir()
    assert legacy.find_snapshot(tmp_path).name == "network-snapshot-000010.500.pkl"
    checkpoint.save(tmp_path / "best_model.pkl", own_snapshot(G))
    assert legacy.load_network(str(tmp_path)).path == tmp_path / "best_model.pkl"


def one_line(path) -> str:
    with pytest.raises(UserError) as err:
        legacy.load_network(path)
    assert "\n" not in str(err.value)
    assert str(path) in str(err.value)
    return str(err.value)


def test_files_that_are_not_there(tmp_path):
    assert "no such file or folder" in one_line(tmp_path / "none.pkl")
    assert "download" in one_line("https://example.org/x.pkl")
    (tmp_path / "empty.pkl").write_bytes(b"")
    assert "damaged or cut off (size 0 bytes)" in one_line(tmp_path / "empty.pkl")


def test_our_own_format_damaged(tmp_path, G):
    path = tmp_path / "x.pkl"
    checkpoint.save(path, own_snapshot(G))
    path.write_bytes(path.read_bytes()[:-3000])
    assert "damaged or cut off" in one_line(path)
    checkpoint.save(path, {"format": "stylesan-xl-training-state"})
    assert "expected a file of format" in one_line(path)
    checkpoint.save(path, {"format": "stylesan-xl-network"})
    assert "lacks generator_config, G_ema" in one_line(path)
    for key, value in (("G_ema", {"x": 1}), ("G_ema", {}), ("G_ema", {"x": torch.zeros(1)}), ("generator_config", {}),
                       ("generator_config", to_dict(G.config) | {"layers": 3}),
                       ("generator_config", to_dict(G.config) | {"filter_size": "six"}),
                       ("generator_config", to_dict(G.config) | {"filter_size": 10 ** 9}),
                       ("generator_config", to_dict(G.config) | {"w_dim": 9})):
        checkpoint.save(path, own_snapshot(G) | {key: value})
        assert "not a usable snapshot" in one_line(path)
