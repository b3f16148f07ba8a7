# SPDX-License-Identifier: Apache-2.0
"""Detectors: what they answer, and that nothing is disturbed. Where weights come from is in test_weights.py."""
import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics import detectors
from metrics.detectors import DETECTORS, load_detector, require
from metrics.detectors.random_weights import hash_state, random_state
from tests.closeness import approx
from tests.metrics.helpers import TinyNet, random_images, tiny_kind

CPU = torch.device("cpu")
INCEPTIONS = ("inception-2015-12-05", "inception-2015-12-05-clean", "inception-2015-12-05-pytorch_fid",
              "inception-rand", "inception-random-seed0")


def images(num=2, size=32):
    return torch.from_numpy(random_images(num, size))


@pytest.fixture(scope="module")
def detector():
    return load_detector("inception-2015-12-05:random", CPU)


@pytest.mark.numeric
class TestInception:
    def test_outputs(self, detector):
        out = detector.features(images())
        assert {key: (tuple(x.shape), x.dtype) for key, x in out.items()} == {
            "pool": ((2, 2048), torch.float32), "spatial": ((2, 2023), torch.float32),
            "logits_unbiased": ((2, 1008), torch.float32), "pool64": ((2, 64), torch.float32),
            "pool192": ((2, 192), torch.float32), "pool768": ((2, 768), torch.float32)}
        assert {key: x.shape[1] for key, x in out.items()} == detector.dims
        assert set(out) == set(detector.outputs)
        assert detector.feature_dim == 2048
        assert out["pool"].std() > 0.01
        assert not out["pool"].requires_grad

    def test_only_what_is_asked_for(self, detector):
        out = detector.features(images(1), keys=["spatial"])
        assert set(out) == {"spatial"}
        assert detector.features(images(1), keys=[]) == {}

    def test_kinds_share_the_network_and_differ_in_the_resize(self):
        kinds = [DETECTORS[name] for name in INCEPTIONS]
        assert len({kind.make_net for kind in kinds}) == 1
        assert [kind.resize for kind in kinds] == ["tf1_bilinear_299", "pil_bicubic_float_299",
                                                   "pytorch_fid_bilinear_299", "tf1_bilinear_299", "tf1_bilinear_299"]
        published = [detectors.INCEPTION_FILE] * 3
        assert [kind.asset for kind in kinds] == [*published, detectors.RANDOM_INCEPTION_FILE, None]

    def test_declared_seed_needs_no_file(self):
        assert require("inception-random-seed0") is None

    def test_global_random_numbers_are_untouched(self):
        state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        load_detector("tiny", CPU)
        assert torch.equal(torch.get_rng_state(), state)
        assert np.array_equal(np.random.get_state()[1], numpy_state)

    def test_wrong_inputs(self, detector):
        with pytest.raises(ValueError, match="uint8"):
            detector.features(images().float())
        with pytest.raises(ValueError, match="shape"):
            detector.features(images()[:, :1])


@pytest.mark.numeric
class TestRandomWeights:
    def test_are_the_same_everywhere(self):
        """The first numbers of a frozen stream, in the order of the names."""
        state = random_state(TinyNet())
        assert state["conv.weight"].flatten()[:3].tolist() == approx(
            [x * (2 / 27) ** 0.5 for x in (1.764052346, 0.400157208, 0.978737984)])
        assert state["fc.bias"].abs().sum() == 0
        assert hash_state(state) == hash_state(random_state(TinyNet()))
        assert hash_state(state) != hash_state(random_state(TinyNet(), seed=1))

    def test_are_recorded(self):
        one, two = load_detector("tiny", CPU), load_detector("tiny", CPU)
        assert one.sha256 == two.sha256 == hash_state(random_state(TinyNet()))
        assert torch.equal(one.features(images())["pool"], two.features(images())["pool"])

    def test_pass_signals_through(self):
        """Scales of normalisation layers and LayerScale are one, variances are one, the rest is zero."""
        net = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
        net[0].gamma = torch.nn.Parameter(torch.zeros(3))
        state = random_state(net)
        for name in ("0.weight", "0.running_var", "0.gamma"):
            assert torch.equal(state[name], torch.ones(3))
        for name in ("0.bias", "0.running_mean"):
            assert torch.equal(state[name], torch.zeros(3))


@pytest.mark.numeric
def test_pinned_hashes():
    """Published names carry the first digits; DINOv2's carries none."""
    assert detectors.INCEPTION_FILE.sha256.startswith("6726825d")
    assert detectors.VGG16_FILE.sha256.startswith("397923af")
    for asset in (detectors.INCEPTION_FILE, detectors.VGG16_FILE, detectors.DINOV2_FILE):
        assert len(asset.sha256) == 64
        assert asset.url.startswith("https://")


def test_unknown_name():
    with pytest.raises(UserError, match="--detector=inceptoin: unknown detector: choose from dinov2-vitl14, inception"):
        require("inceptoin")


def test_broken_weights_are_noticed():
    kind = tiny_kind()
    broken = lambda x: {"pool": torch.full([len(x), 16], float("nan"))}
    detector = detectors.Detector("x", "", 16, kind.outputs, broken, CPU)
    with pytest.raises(UserError, match="not finite"):
        detector.features(images())


@pytest.mark.numeric
class TestJudge:
    @pytest.fixture
    def path(self, tmp_path):
        from torch_utils.own_network import OwnNetwork, own_config, save_own_network
        torch.manual_seed(0)
        net = OwnNetwork(own_config(3, 16, (8, 12), ["cat", "dog", "owl"]))
        save_own_network(tmp_path / "judge.safetensors", net)
        return tmp_path / "judge.safetensors"

    @pytest.mark.parametrize("prefix", ["", "local:"])
    def test_outputs(self, path, prefix):
        from torch_utils.own_network import load_own_network
        detector = load_detector(prefix + str(path), CPU)
        out = detector.features(images(5, 24))
        net = load_own_network(path)
        assert torch.equal(out["logits"], net.logits(net.prepare(images(5, 24))))
        assert torch.equal(out["pool"], net.embed(net.prepare(images(5, 24))))
        assert (detector.feature_dim, detector.num_classes, detector.class_names) == (12, 3, ["cat", "dog", "owl"])
        assert detector.name == "local:judge.safetensors"
        assert detector.sha256 == net.sha256
        assert detector.dims == {"pool": 12, "logits": 3}

    def test_global_random_numbers_are_untouched(self, path):
        state = torch.get_rng_state()
        load_detector(str(path), CPU)
        assert torch.equal(torch.get_rng_state(), state)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(UserError, match=r"absent\.safetensors"):
            load_detector(str(tmp_path / "absent.safetensors"), CPU)
