# SPDX-License-Identifier: Apache-2.0
"""Detectors: what they answer, where their weights come from, and that nothing is fetched or disturbed."""
import io

import pytest
import torch

from dnnlib import UserError
from metrics import detectors
from metrics.detectors import DETECTORS, DetectorKind, load_detector, require
from tests.metrics.helpers import TinyNet, random_images, tiny_forward, tiny_kind

CPU = torch.device("cpu")


def images(num=2, size=32):
    return torch.from_numpy(random_images(num, size))


@pytest.fixture(scope="module")
def detector():
    return load_detector("inception-2015-12-05:random", CPU)


class TestInception:
    def test_outputs(self, detector):
        out = detector.features(images())
        assert {key: (tuple(x.shape), x.dtype) for key, x in out.items()} == {
            "pool": ((2, 2048), torch.float32), "logits_unbiased": ((2, 1008), torch.float32)}
        assert set(out) == set(detector.outputs)
        assert detector.feature_dim == 2048
        assert out["pool"].std() > 0.01
        assert not out["pool"].requires_grad

    def test_random_weights_are_seeded(self, detector):
        again = load_detector("inception-2015-12-05:random", CPU)
        assert again.sha256 == detector.sha256
        assert len(detector.sha256) == 64
        assert torch.equal(again.features(images())["pool"], detector.features(images())["pool"])

    def test_is_torch_fidelitys_network(self, tmp_path, monkeypatch):
        """The same weights in torch-fidelity's own object, loaded its own way, give the same numbers."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        with torch.device("meta"):
            net = detectors._make_inception()
        state = detectors._random_state(net)
        state["fc.bias"] += 1
        torch.save(state, tmp_path / "w.pth")
        theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(tmp_path / "w.pth"))
        kind = DETECTORS["inception-2015-12-05"]
        asset = detectors.Asset("w.pth", "https://example.org", None)
        monkeypatch.setitem(DETECTORS._items, "inception-2015-12-05",
                            DetectorKind(asset, kind.feature_dim, kind.outputs, kind.make_net, kind.forward))
        ours = load_detector("inception-2015-12-05", CPU, weights_dir=str(tmp_path)).features(images())
        pool, logits = theirs(images())
        assert torch.equal(ours["pool"], pool)
        assert torch.equal(ours["logits_unbiased"], logits)

    def test_global_random_numbers_are_untouched(self):
        state = torch.get_rng_state()
        load_detector("inception-2015-12-05:random", CPU)
        assert torch.equal(torch.get_rng_state(), state)

    def test_wrong_inputs(self, detector):
        with pytest.raises(ValueError, match="uint8"):
            detector.features(images().float())
        with pytest.raises(ValueError, match="shape"):
            detector.features(images()[:, :1])


@pytest.mark.slow
def test_vgg16_is_torch_fidelitys(monkeypatch):
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
    with torch.device("meta"):
        net = detectors._make_vgg16()
    state = detectors._random_state(net)
    monkeypatch.setattr(detectors, "_random_state", lambda net: state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    theirs = FeatureExtractorVGG16("x", ["fc2_relu"], file)(images(1))[0]
    ours = load_detector("vgg16:random", CPU).features(images(1))["pool"]
    assert ours.shape == (1, 4096)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class TestWeights:
    def test_missing_file_says_all(self):
        with pytest.raises(UserError) as err:
            load_detector("inception-2015-12-05", CPU)
        text = str(err.value)
        for part in ("weights-inception-2015-12-05-6726825d.pth", "https://github.com/toshas/torch-fidelity/",
                     "6726825d0af5f729", "--weights", "STYLESAN_WEIGHTS", "offline"):
            assert part in text
        assert "\n" not in text

    def test_hash_fits_the_published_names(self):
        assert detectors.INCEPTION_FILE.sha256.startswith("6726825d")
        assert detectors.VGG16_FILE.sha256.startswith("397923af")
        assert all(len(x.sha256) == 64 for x in (detectors.INCEPTION_FILE, detectors.VGG16_FILE))

    def test_wrong_content_is_refused(self, tmp_path):
        (tmp_path / "vgg16-397923af.pth").write_bytes(b"something else")
        with pytest.raises(UserError, match="sha256 is .*, expected 397923af"):
            load_detector("vgg16", CPU, weights_dir=str(tmp_path))

    @pytest.mark.parametrize(("content", "match"), [({"a": torch.zeros(1)}, "do not fit"), (None, "not a readable")])
    def test_unusable_file(self, tmp_path, monkeypatch, content, match):
        asset = detectors.Asset("w.pth", "https://example.org", None)
        monkeypatch.setitem(DETECTORS._items, "other", DetectorKind(asset, 16, ("pool",), TinyNet, tiny_forward("x")))
        (tmp_path / "w.pth").write_bytes(b"nothing")
        if content is not None:
            torch.save(content, tmp_path / "w.pth")
        with pytest.raises(UserError, match=match):
            load_detector("other", CPU, weights_dir=str(tmp_path))

    def test_unknown_name(self):
        with pytest.raises(UserError, match="--detector=inceptoin: unknown detector: choose from inception"):
            require("inceptoin")

    def test_broken_weights_are_noticed(self):
        kind = tiny_kind()
        broken = lambda net, x: {"pool": torch.full([len(x), 16], float("nan"))}
        detector = detectors.Detector("x", "", 16, kind.outputs, lambda x: broken(None, x), CPU)
        with pytest.raises(UserError, match="not finite"):
            detector.features(images())


class TestJudge:
    @pytest.fixture
    def path(self, tmp_path):
        from torch_utils.local_network import LocalNet, local_config, save_local_network
        torch.manual_seed(0)
        net = LocalNet(local_config(3, 16, (8, 12), ["cat", "dog", "owl"]))
        save_local_network(tmp_path / "judge.safetensors", net)
        return tmp_path / "judge.safetensors"

    @pytest.mark.parametrize("prefix", ["", "local:"])
    def test_outputs(self, path, prefix):
        from torch_utils.local_network import load_local_network
        detector = load_detector(prefix + str(path), CPU)
        out = detector.features(images(5, 24))
        net = load_local_network(path)
        assert torch.equal(out["logits"], net.logits(net.prepare(images(5, 24))))
        assert torch.equal(out["pool"], net.embed(net.prepare(images(5, 24))))
        assert (detector.feature_dim, detector.num_classes, detector.class_names) == (12, 3, ["cat", "dog", "owl"])
        assert detector.name == "local:judge.safetensors"
        assert detector.sha256 == net.sha256

    def test_global_random_numbers_are_untouched(self, path):
        state = torch.get_rng_state()
        load_detector(str(path), CPU)
        assert torch.equal(torch.get_rng_state(), state)

    def test_no_such_file(self, tmp_path):
        with pytest.raises(UserError, match=r"absent\.safetensors"):
            load_detector(str(tmp_path / "absent.safetensors"), CPU)
