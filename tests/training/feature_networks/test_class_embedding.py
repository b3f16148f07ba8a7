# SPDX-License-Identifier: Apache-2.0
"""Class embeddings: from data, files and random numbers, for any number of classes."""
import json
import os
import pickle
import re

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import training.feature_networks.class_embedding
from dnnlib import UserError
from dnnlib.classes import Classes
from dnnlib.util import atomic_file
from tests.closeness import assert_close, rel_error
from tests.data_prep.samples import files, metadata, write_zip
from tests.training.feature_networks.digits import Digits
from training.dataset import ImageDataset, follow_classes
from training.feature_networks.class_embedding import centred_table, class_embedding
from training.feature_networks.registry import load_backbone

pytestmark = pytest.mark.numeric


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
    assert rel_error(class_embedding("data", 10, dataset=data, backbone="local:random"), table) < 1e-5


def test_many_images_are_reported_on(monkeypatch):
    said = []
    monkeypatch.setattr(training.feature_networks.class_embedding, "SAY_SECONDS", -1)          # After every batch.
    class_embedding("data", 10, dataset=Digits(16, count=60), backbone="local:random", say=said.append)
    assert [line.strip() for line in said] == ["class vectors: features of 60 images", "class vectors: 32 of 60 images",
                                               "class vectors: 60 of 60 images"]


def test_data_with_many_images_takes_some_of_each_class(monkeypatch):
    monkeypatch.setattr(training.feature_networks.class_embedding, "MAX_PER_CLASS", 4)
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


def test_centred():
    """What the rows share is gone, and they keep their mean length; a class that is the mean has no direction."""
    plain = class_embedding("data", 10, dataset=Digits(16, count=60), backbone="local:random")
    table = class_embedding("centred", 10, dataset=Digits(16, count=60), backbone="local:random")
    assert torch.equal(table, centred_table(plain))
    assert_close(table.norm(dim=1), plain.norm(dim=1).mean().expand(10), rtol=1e-5, atol=0)
    about = plain - plain.mean(dim=0)
    assert_close(torch.cosine_similarity(table, about), torch.ones(10), rtol=1e-5, atol=0)
    with pytest.warns(UserWarning, match="no images of class 10"):
        table = class_embedding("centred", 11, dataset=Digits(16, count=60), backbone="local:random")
    assert_close(torch.cosine_similarity(table[:10], about), torch.ones(10), rtol=1e-5, atol=0)
    assert not table[10].any()
    assert torch.equal(centred_table(plain[:1]), plain[:1])
    assert not centred_table(torch.zeros(2, 3)).any()


def test_data_refusals():
    with pytest.raises(UserError, match="--embedding=data: needs labelled images"):
        class_embedding("data", 10)
    broken = load_backbone("local:random")
    broken.pooled = lambda x: torch.full([len(x), broken.channels[-1]], torch.inf)
    with pytest.raises(UserError, match="features of the backbone are not finite"):
        class_embedding("data", 10, dataset=Digits(16, count=60), backbone=broken)
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
    with pytest.raises(UserError, match="--embedding=datta: choose data, centred, random"):
        class_embedding("datta", 3)
    with pytest.raises(UserError, match="no such file"):
        class_embedding(str(tmp_path / "x.npy"), 3)
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 2)), b=np.zeros((3, 2)))
    with pytest.raises(UserError, match="holds 2 arrays"):
        class_embedding(str(tmp_path / "two.npz"), 3)

#----------------------------------------------------------------------------
# The command, and files with names.

@pytest.fixture
def archive(tmp_path):
    meta = metadata(12, classes=["ant", "bee", "cow"])
    return write_zip(tmp_path / "farm.zip", files(12, 16), meta)


def run(*args):
    return CliRunner().invoke(training.feature_networks.class_embedding.main, [str(a) for a in args])


@pytest.mark.parametrize("workers", [0, 1])
def test_command(archive, tmp_path, workers):
    out = tmp_path / "farm.safetensors"
    result = run(f"--data={archive}", "--backbone=tf_efficientnet_lite0:random", f"--out={out}", "--device=cpu",
                 f"--workers={workers}")
    assert result.exit_code == 0, result.output
    assert "3 classes, 320 numbers each" in result.output
    dataset = ImageDataset(archive, use_labels=True)
    table = class_embedding(str(out), 3, dataset)
    assert torch.equal(table, class_embedding("data", 3, dataset, "tf_efficientnet_lite0:random"))
    with safetensors.safe_open(out, framework="pt") as file:
        facts = file.metadata()
    assert json.loads(facts["classes"]) == ["ant", "bee", "cow"]
    assert (facts["backbone"], facts["data_fingerprint"]) == ("tf_efficientnet_lite0:random", dataset.fingerprint)
    dataset.close()


def test_what_took_long_is_kept_beside_the_data(archive, tmp_path, monkeypatch):
    """The second time nothing is computed, unless data, labels, seed or network differ."""
    monkeypatch.setattr(training.feature_networks.class_embedding, "KEEP_SECONDS", 0)
    dataset, said = ImageDataset(archive, use_labels=True), []

    def vectors(seed=0, backbone="local:random"):
        said.clear()
        return class_embedding("data", 3, dataset, backbone, seed=seed, say=said.append)

    first = vectors()
    (kept,) = tmp_path.glob(".farm.zip.class-vectors-*.safetensors")
    assert [line.strip().partition(":")[2][:9] for line in said] == [" features", " kept in "]
    assert torch.equal(vectors(), first)
    assert said == [f"    class vectors: taken from {kept}, where they were kept"]
    vectors(seed=1)
    vectors(backbone="local:random:1")
    follow_classes(dataset, "the run", Classes(["cow", "bee", "ant"]))
    assert rel_error(vectors(), first.flip(0)) < 1e-5
    assert len(list(tmp_path.glob(".farm.zip.*"))) == 4
    dataset.close()


@pytest.mark.parametrize("damage", [
    lambda content: b"garbage", lambda content: content[:-9], lambda content: b"",
    lambda content: content[:-4] + b"\0\0\0\x40", lambda content: content.replace(b"seed", b"seat")])
def test_damaged_vectors_are_made_anew(archive, tmp_path, monkeypatch, damage):
    monkeypatch.setattr(training.feature_networks.class_embedding, "KEEP_SECONDS", 0)
    dataset, said = ImageDataset(archive, use_labels=True), []
    first = class_embedding("data", 3, dataset, "local:random")
    (kept,) = tmp_path.glob(".farm.zip.class-vectors-*.safetensors")
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    assert torch.equal(class_embedding("data", 3, dataset, "local:random", say=said.append), first)
    assert re.search(rf"{kept} is made anew: .", said[0])
    assert kept.read_bytes() == whole
    dataset.close()


def test_a_folder_that_cannot_be_written_to(archive, tmp_path, monkeypatch):
    """Then the cache holds the vectors; if that cannot be written to either, there is a line and no error."""
    monkeypatch.setattr(training.feature_networks.class_embedding, "KEEP_SECONDS", 0)
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    dataset, said = ImageDataset(archive, use_labels=True), []
    refusing = [tmp_path]

    def refuse(path):
        if path.parent in refusing:
            raise PermissionError(13, "Permission denied", str(path))
        return atomic_file(path)

    monkeypatch.setattr("training.feature_networks.kept_vectors.atomic_file", refuse)
    first = class_embedding("data", 3, dataset, "local:random", say=said.append)
    assert not list(tmp_path.glob(".farm*"))
    (kept,) = (tmp_path / "cache" / "class-vectors").iterdir()
    assert torch.equal(class_embedding("data", 3, dataset, "local:random", say=said.append), first)
    assert said[-1].endswith(f"taken from {kept}, where they were kept")
    refusing.append(kept.parent)
    class_embedding("data", 3, dataset, "local:random", seed=1, say=said.append)
    assert re.search(r"not kept for the next run \(.*Permission denied\)", said[-1])
    dataset.close()


def test_command_writes_plain_arrays(archive, tmp_path):
    result = run(f"--data={archive}", "--backbone=local:random", f"--out={tmp_path}/t.npy",
                 "--workers=0", "--device=cpu")
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "t.npy").shape[0] == 3


@pytest.mark.parametrize(("options", "match"), [
    (["--backbone=local:random", "--out=t.zip"], r"--out=t\.zip: must end in"),
    (["--backbone=nothing", "--out=t.npy"], "unknown backbone 'nothing'"),
])
def test_command_refuses(archive, options, match):
    result = run(f"--data={archive}", "--device=cpu", *options)
    assert result.exit_code == 2
    assert re.search(match, result.output)


@pytest.mark.usefixtures("_no_packages")
def test_command_without_weights(archive, tmp_path, monkeypatch):
    """Offline and without a cache: the message that every user of published weights gets."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STYLESAN_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    result = run(f"--data={archive}", f"--out={tmp_path}/t.npy", "--device=cpu")
    assert result.exit_code == 2
    assert "tf_efficientnet_lite0" in result.output
    assert "STYLESAN_WEIGHTS" in result.output


def test_data_without_labels(tmp_path):
    result = run(f"--data={write_zip(tmp_path / 'a.zip', files())}", "--out=t.npy", "--device=cpu")
    assert result.exit_code == 2
    assert "has no labels" in result.output


def test_files_for_other_classes(tmp_path):
    path = tmp_path / "t.safetensors"
    table = torch.randn(7, 4)
    names = [f"n{i}" for i in range(7)]
    training.feature_networks.class_embedding.save_table(path, table, {"classes": json.dumps(names)})

    class Data:
        class_names = list(reversed(names))
    with pytest.raises(UserError, match="made for other classes: n0 instead of n6, .*n5 instead of n1 and 1 more"):
        class_embedding(str(path), 7, Data)
    Data.class_names = [str(i) for i in range(7)]       # Without names there is nothing to compare.
    assert torch.equal(class_embedding(str(path), 7, Data), table)
    Data.class_names = names
    assert torch.equal(class_embedding(str(path), 7, Data), table)


@pytest.mark.parametrize("content", [
    lambda table: {"embed": torch.nn.Embedding.from_pretrained(table)}, lambda table: {"embed": table},
    lambda table: table.numpy(), lambda table: [("x", {"weight": torch.nn.Parameter(table)})]])
def test_official_pickles(tmp_path, content):
    table = torch.randn(1000, 320)
    (tmp_path / "embed.pkl").write_bytes(pickle.dumps(content(table)))
    assert torch.equal(class_embedding(str(tmp_path / "embed.pkl"), 1000), table)
    with pytest.raises(UserError, match=r"shape \[1000, 320\], but the data has 10 classes"):
        class_embedding(str(tmp_path / "embed.pkl"), 10)


class Evil:
    def __reduce__(self):
        return os.system, ("touch run",)


def test_pickles_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embed.pkl").write_bytes(pickle.dumps({"embed": Evil(), "t": torch.randn(10, 4)}))
    with pytest.raises(UserError, match="nothing was run"):
        class_embedding(str(tmp_path / "embed.pkl"), 10)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("c_dim", [5, 100_000])
def test_any_number_of_classes(c_dim):
    """One image per class; the classes are only as many as they are."""
    class Data:
        labels = np.arange(c_dim)

        def __getitem__(self, i):
            return np.full((3, 4, 4), i % 251, np.uint8), int(self.labels[i])

    class Means(torch.nn.Module):
        channels = (1,)

        def preprocess(self, x):
            return x

        def pooled(self, x):
            return x.mean(dim=(2, 3))[:, :1]

    table = class_embedding("data", c_dim, Data(), Means())
    assert_close(table[:, 0], (torch.arange(c_dim) % 251) / 127.5 - 1, atol=1e-6, rtol=1e-5)
