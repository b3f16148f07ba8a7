# SPDX-License-Identifier: Apache-2.0
"""Class embeddings: from data, files and random numbers, for any number of classes."""
import numpy as np
import pytest
import safetensors.torch
import torch

import training.class_embedding
from dnnlib import UserError
from tests.discriminators.digits import Digits
from tests.parity import rel_error
from training.class_embedding import class_embedding
from training.feature_networks.registry import load_backbone


@pytest.mark.parametrize("c_dim", [1, 3, 1000, 1001, 5000])
def test_random(c_dim):
    table = class_embedding("random", c_dim, embed_dim=7, seed=2)
    assert table.shape == (c_dim, 7)
    assert torch.equal(table, class_embedding("random", c_dim, embed_dim=7, seed=2))
    assert not torch.equal(table, class_embedding("random", c_dim, embed_dim=7, seed=3))


def test_data_gives_the_mean_per_class():
    data, net = Digits(16, count=100), load_backbone("local:random")
    table = class_embedding("data", 10, dataset=data, backbone=net)
    x = torch.as_tensor(data.pixels).float() / 127.5 - 1
    with torch.no_grad():
        pooled = net.maps(net.preprocess(x))[-1].mean(dim=(2, 3))
    expected = torch.stack([pooled[torch.as_tensor(data.labels == k)].mean(dim=0) for k in range(10)])
    assert table.dtype == torch.float32
    assert rel_error(table, expected) < 1e-5
    assert torch.equal(table, class_embedding("data", 10, dataset=data, backbone="local:random"))


def test_data_with_many_images_takes_some_of_each_class(monkeypatch):
    monkeypatch.setattr(training.class_embedding, "MAX_PER_CLASS", 4)
    data, served = Digits(16, count=150), []

    class Counted(Digits):
        def __getitem__(self, i):
            served.append(i)
            return super().__getitem__(i)

    table = class_embedding("data", 10, dataset=Counted(16, count=150), backbone="local:random")
    assert np.bincount(data.labels[served]).tolist() == [4] * 10
    net = load_backbone("local:random")
    chosen = [i for i in served if data.labels[i] == 3]
    with torch.no_grad():
        expected = net.pooled(net.preprocess(torch.as_tensor(data.pixels[chosen]).float() / 127.5 - 1)).mean(dim=0)
    assert rel_error(table[3], expected) < 1e-5


def test_classes_without_images_get_the_mean():
    with pytest.warns(UserWarning, match="no images of class 10, 11"):
        table = class_embedding("data", 12, dataset=Digits(16, count=60), backbone="local:random")
    assert rel_error(table[10], table[:10].mean(dim=0)) < 1e-5
    assert torch.equal(table[10], table[11])


def test_data_refusals():
    with pytest.raises(UserError, match="--embedding=data: needs labelled images"):
        class_embedding("data", 10)
    with pytest.raises(UserError, match="label 9"):
        class_embedding("data", 9, dataset=Digits(16, count=60), backbone="local:random")

#----------------------------------------------------------------------------

def write(path, table: np.ndarray):
    {".npy": lambda: np.save(path, table), ".npz": lambda: np.savez(path, embed=table),
     ".pt": lambda: torch.save(torch.as_tensor(table), path),
     ".safetensors": lambda: safetensors.torch.save_file({"embed": torch.as_tensor(table)}, path)}[path.suffix]()
    return str(path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
def test_files(tmp_path, suffix):
    table = np.arange(12, dtype=np.float64).reshape(4, 3)
    path = write(tmp_path / f"embed{suffix}", table)
    assert torch.equal(class_embedding(path, 4), torch.as_tensor(table, dtype=torch.float32))
    with pytest.raises(UserError, match=r"shape \[4, 3\], but the data has 5 classes"):
        class_embedding(path, 5)
    table[1, 1] = np.nan
    write(tmp_path / f"embed{suffix}", table)
    with pytest.raises(UserError, match="not finite"):
        class_embedding(path, 4)
    (tmp_path / f"embed{suffix}").write_bytes(b"garbage")
    with pytest.raises(UserError, match="cannot be read"):
        class_embedding(path, 4)


def test_a_file_never_runs_code(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[print]], dtype=object), allow_pickle=True)
    torch.save(print, tmp_path / "a.pt")
    for name in ("a.npy", "a.pt"):
        with pytest.raises(UserError, match="cannot be read"):
            class_embedding(str(tmp_path / name), 1)


def test_other_refusals(tmp_path):
    with pytest.raises(UserError, match="--embedding=datta: choose data, random"):
        class_embedding("datta", 3)
    with pytest.raises(UserError, match="no such file"):
        class_embedding(str(tmp_path / "x.npy"), 3)
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 2)), b=np.zeros((3, 2)))
    with pytest.raises(UserError, match="holds 2 arrays"):
        class_embedding(str(tmp_path / "two.npz"), 3)
