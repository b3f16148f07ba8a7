# SPDX-License-Identifier: Apache-2.0
"""LPIPS against an independent implementation on the same random weights, and its files of weights."""
import os
import types

import pytest
import torch

from dnnlib import UserError
from metrics.detectors import lpips
from metrics.detectors.lpips import LPIPS_FILE
from metrics.detectors.vgg import VGG16_FILE, make_vgg16
from tests.closeness import assert_close
from tests.metrics.helpers import VGG_TERMS, float32_tolerance, random_lpips_states, write_lpips_files

pytestmark = pytest.mark.numeric

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def states():
    return random_lpips_states()


@pytest.fixture(scope="module")
def weights(states, tmp_path_factory):
    return write_lpips_files(tmp_path_factory.mktemp("weights"), states)


@pytest.fixture(scope="module")
def net(weights):
    return lpips.load_lpips(DEVICE, str(weights), offline=True, allow_unverified=True)


@pytest.fixture(scope="module")
def theirs(states):
    """torch-fidelity's, its two downloads replaced by our weights."""
    import torch_fidelity.sample_similarity_lpips as module

    with torch.device("meta"):
        features = make_vgg16().features
    features.load_state_dict({k.removeprefix("features."): v for k, v in states[0].items()}, assign=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torchvision_load_pretrained_vgg16", lambda *a, **k: types.SimpleNamespace(
            features=features), raising=True)
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: states[1])
        return module.SampleSimilarityLPIPS("lpips-vgg16", sample_similarity_dtype="float32")


def images(num, size, seed=0):
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("noise", [100.0, 1.0])
def test_equals_torch_fidelity(net, theirs, states, size, noise):
    a = images(2, size)
    b = (a + noise * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 255)
    ours = net(a, b)
    assert ours.shape == (2,)
    assert (ours > 0).all()
    # A distance is the weighted square of a difference of features of length one in each of five layers. Both features
    # have an error in both implementations, which adds in a random direction of at least 512.
    weight = sum(float(w.mean()) for w in states[1].values())
    error = (2 * weight) ** 0.5 * float32_tolerance(VGG_TERMS)
    expected = theirs(a, b)
    assert_close(ours, expected, rtol=1e-5, atol=2 * float(expected.max()) ** 0.5 * error / 512 ** 0.5)


def test_small_changes_count_squared(net):
    a, direction = images(2, 32), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    full, half = net(a, a + 0.2 * direction), net(a, a + 0.1 * direction)
    torch.testing.assert_close(full / half, torch.full([2], 4.0), rtol=0.02, atol=0)
    assert net(a, a).tolist() == [0, 0]


def test_values_are_neither_clipped_nor_rounded(net):
    a = images(1, 16)
    assert net(a, a + 300) > 0
    assert net(a * 0, a * 0 + 0.25) > 0


class TestFiles:
    @pytest.fixture
    def folder(self, weights, tmp_path, monkeypatch):
        """Both files, the large one shared between the tests."""
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
        os.link(weights / VGG16_FILE.filename, tmp_path / VGG16_FILE.filename)
        (tmp_path / LPIPS_FILE.filename).write_bytes((weights / LPIPS_FILE.filename).read_bytes())
        return tmp_path

    def load(self, folder):
        return lpips.load_lpips(DEVICE, str(folder), offline=True, allow_unverified=True)

    def test_published_hashes_are_asked_for(self, folder):
        with pytest.raises(UserError, match="sha256 is"):
            lpips.load_lpips(DEVICE, str(folder), offline=True)

    def test_both_are_needed(self, folder):
        (folder / LPIPS_FILE.filename).unlink()
        with pytest.raises(UserError, match=r"weights-vgg16-lpips\.pth: it is not on this machine"):
            lpips.require_lpips(str(folder), offline=True, allow_unverified=True)

    def test_the_hash_covers_both(self, net, states, folder, capsys):
        first = "lin0.model.1.weight"
        torch.save({**states[1], first: states[1][first] * 2}, folder / LPIPS_FILE.filename)
        other = self.load(folder)
        assert len(net.sha256) == 64
        assert other.sha256 != net.sha256
        assert not net.verified
        assert capsys.readouterr().err.count("unverified weights of lpips-vgg16") == 2

    @pytest.mark.parametrize(("change", "match"), [
        (lambda heads: heads.pop("lin3.model.1.weight"), "lacks weight3"),
        (lambda heads: heads.update(lin5=torch.zeros(3)), "besides weight5"),
        (lambda heads: heads.update({"lin2.model.1.weight": torch.zeros(1, 7, 1, 1)}), "other shape of weight2"),
        (lambda heads: heads.update(epoch=3), "must hold tensors by name"),
    ])
    def test_wrong_tensors(self, states, folder, change, match):
        heads = dict(states[1])
        change(heads)
        torch.save(heads, folder / LPIPS_FILE.filename)
        with pytest.raises(UserError, match=match):
            self.load(folder)

    def test_no_file_of_weights(self, folder):
        (folder / LPIPS_FILE.filename).write_bytes(b"<html>not found</html>")
        with pytest.raises(UserError, match="damaged or cut off"):
            self.load(folder)
