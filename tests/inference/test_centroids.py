"""python -m inference.centroids: clusters against closed forms, and the file that gen_images.py takes."""
import builtins

import numpy as np
import PIL.Image
import pytest
import torch

import gen_images
from dnnlib import UserError
from inference import centroids, sampling
from inference.centroids import STREAM, centers_per_class, find_centers
from inference.latents import load_centroids
from inference.sample_files import NAME_WIDTH
from inference.sampling import many_w
from legacy import load_network
from tests.closeness import assert_close, max_error
from tests.inference import commands
from tests.parity import DATA
from torch_utils.images import to_uint8_sample
from training.data.randomness import CounterRNG
from training.generator.synthesis import distances, nearest_centroids


def invoke(*args, command=centroids.main):
    return commands.invoke(command, *args)


@pytest.fixture(scope="module")
def G(network):
    return load_network(network).G_ema

#----------------------------------------------------------------------------

@pytest.mark.numeric
def test_clusters_on_a_line():
    """Three groups of known means, the largest first."""
    w = np.array([[0], [1], [2], [10], [11], [100], [101], [102], [103]], np.float32)
    assert_close(find_centers(w, 3, seed=0), [[101.5], [1], [10.5]], atol=1e-5)
    assert_close(find_centers(w, 1, seed=0), [[w.mean()]], atol=1e-4)


@pytest.mark.numeric
def test_centres_are_the_means_of_what_is_nearest_to_them():
    """The definition of k-means' end, and the groups that the points were made of."""
    rng = np.random.RandomState(0)
    means = 10 * rng.randn(12, 16)
    w = np.concatenate([m + rng.randn(10 + i, 16) for i, m in enumerate(means)]).astype(np.float32)
    centers = find_centers(w, 12, seed=3)
    nearest = ((w[:, None] - centers) ** 2).sum(axis=2).argmin(axis=1)
    assert np.bincount(nearest).tolist() == list(range(21, 9, -1))
    assert max_error(centers, np.stack([w[nearest == i].mean(axis=0) for i in range(12)])) < 1e-4


def test_a_seed_gives_the_same_centres():
    w = np.random.RandomState(0).randn(300, 8).astype(np.float32)
    first = find_centers(w, 7, seed=2 ** 64 - 1)
    assert first.dtype == np.float32
    assert first.tobytes() == find_centers(w, 7, seed=2 ** 64 - 1).tobytes()
    assert first.tobytes() != find_centers(w, 7, seed=1).tobytes()


def test_a_mapping_that_has_collapsed():
    with pytest.raises(UserError, match="--clusters=3: the 20 latents have only 1 different w: give fewer"):
        find_centers(np.ones([20, 4], np.float32), 3, seed=0)


def test_without_scikit_learn(monkeypatch):
    def no_sklearn(name, *args):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *args)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_sklearn)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        find_centers(np.ones([2, 4], np.float32), 1, seed=0)

@pytest.mark.numeric
def test_the_nearest_centre_does_not_depend_on_how_many_are_asked_for():
    """Products of vectors, by which PyTorch finds many distances, lose those that are small beside the vectors."""
    rng = np.random.RandomState(0)
    centers = torch.from_numpy(1000 + rng.randn(40, 16) * 1e-2).float()
    w = centers + torch.from_numpy(rng.randn(40, 16) * 1e-3).float()
    assert torch.equal(nearest_centroids(w, centers), centers)
    exact = (w.double()[:, None] - centers.double()).norm(dim=2)
    assert max_error(distances(w, centers), exact) < 1e-4 * float(exact.max())

#----------------------------------------------------------------------------

@pytest.mark.numeric
def test_latents_are_those_of_the_seed_whatever_the_classes(G, monkeypatch):
    w, labels = many_w(G, 7, [2, 0], 5, STREAM)
    assert labels.tolist() == [2, 0, 2, 0, 2, 0, 2]
    z = torch.from_numpy(CounterRNG(5).normal("centroids/z", range(7), (G.z_dim,)))
    assert max_error(w, G.mapping(z, torch.eye(3)[labels])[:, 0]) < 1e-5
    monkeypatch.setattr(sampling, "DRAWN_AT_ONCE", 3)
    assert max_error(many_w(G, 7, [2], 5, STREAM)[0][::2], w[::2]) < 1e-5


@pytest.mark.numeric
def test_one_centre_per_class_is_its_mean(G):
    found = centers_per_class(G, 50, 1, [2, 0], seed=0)
    for row, k in enumerate((2, 0)):
        w, _ = many_w(G, 50, [k], 0, STREAM)
        assert max_error(found.centers[row], w.mean(axis=0)) < 1e-5
    assert 0 < found.to_centers < found.to_means        # The running means of this network are random numbers.


def test_how_many_are_nearest_to_their_own_class(G, monkeypatch):
    """All, where classes lie apart; half, where two of them are the same."""
    apart = {0: 0.0, 1: 100.0, 2: 100.0}
    monkeypatch.setattr(centroids, "many_w", lambda G, num, classes, seed, stream: (
        np.random.RandomState(0).randn(num, G.w_dim).astype(np.float32) + np.float32(apart[classes[0]]), None))
    assert centers_per_class(G, 20, 2, [0, 1], seed=0).own == 1
    assert centers_per_class(G, 20, 2, [1, 2], seed=0).own == 0.5


def test_the_file_is_what_gen_images_takes(network, G, tmp_path):
    sheet = tmp_path / "sheet.png"
    base = [f"--network={network}", "--clusters=2", "--num=40", "--per-class"]
    result = invoke(*base, f"--dest={tmp_path / 'all.npy'}", f"--sheet={sheet}")
    assert result.exit_code == 0, result.output
    assert "6 centres; on average a w is" in result.output
    found = load_centroids(str(tmp_path / "all.npy"), 32)
    assert found.shape == (6, 32)
    with PIL.Image.open(sheet) as picture:
        assert picture.size == (NAME_WIDTH + 2 * 64, 3 * 64)
        cell = np.asarray(picture)[64:128:4, NAME_WIDTH : NAME_WIDTH + 64 : 4]
    expected = to_uint8_sample(G.synthesis(found[2].expand(1, G.num_ws, -1)))[0].permute(1, 2, 0).numpy()
    assert np.abs(cell.astype(int) - expected.astype(int)).max() <= 1
    # A class by itself has the same centres.
    assert invoke(*base, "--class=dog", f"--dest={tmp_path / 'dog.npy'}").exit_code == 0
    assert np.array_equal(np.load(tmp_path / "dog.npy"), found[2:4].numpy())
    result = invoke(f"--network={network}", "--seeds=0", "--class=dog", "--trunc=0", f"--outdir={tmp_path}",
                    f"--centroids-path={tmp_path / 'dog.npy'}", command=gen_images.main)
    assert result.exit_code == 0, result.output


def test_centres_over_all_classes(network, tmp_path):
    result = invoke(f"--network={network}", "--clusters=5", "--num=60", f"--dest={tmp_path / 'a.npy'}",
                    f"--sheet={tmp_path / 'a.png'}")
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "a.npy").shape == (5, 32)
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (3 * 64, 2 * 64)


@pytest.mark.parametrize(("args", "message"), [
    (["--dest={out}/a.pt"], "is read by its suffix: name a file that ends with .npy"),
    (["--num=1"], "--clusters=2: more than the 1 latents of --num"),
    (["--num=2147483647"], "--num=2147483647: their w do not fit into 2 GiB: give at most"),
    (["--class=cow"], "--class=cow: no class of this name"),
    (["--per-class", "--clusters=60000", "--num=60000", "--sheet={out}/a.png"], "more than fit into one picture"),
    (["--sheet={out}/a.npy"], "--dest={out}/a.npy: is the file of --sheet={out}/a.npy, too"),
    ([f"--network={DATA / 'snapshot_stem16_r_uncond.pkl'}", "--per-class"], "--per-class: the network is uncond"),
])
def test_mistakes(network, tmp_path, args, message):
    out = tmp_path / "out"
    result = invoke(f"--network={network}", "--clusters=2", f"--dest={out}/a.npy",
                    *(arg.format(out=out) for arg in args))
    assert result.exit_code == 2, result.output
    assert message.format(out=out) in result.output
    assert not out.exists()
