# SPDX-License-Identifier: Apache-2.0
"""Files of statistics: ours and foreign ones, conversion of the divisor, refusals; the cache."""
import json

import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics import real_side, references
from metrics.detectors import DETECTORS, DetectorKind, load_detector
from metrics.options import MetricOptions
from metrics.passes import Wants
from metrics.real_side import compute_statistics, load_real_side
from metrics.references import Reference, check_statistics, load_statistics, save_statistics
from tests.metrics.helpers import ArraySource, TinyNet, random_images, tiny_forward

CPU = torch.device("cpu")


@pytest.fixture
def detector():
    return load_detector("tiny", CPU)


@pytest.fixture
def source():
    return ArraySource(random_images(150))


def features(detector, source):
    return torch.cat([detector.features(x)["pool"] for x, _ in source.batches(64)]).double().numpy()

#----------------------------------------------------------------------------

class TestFiles:
    def test_round_trip(self, tmp_path, detector, source):
        made = compute_statistics(source, detector, False, MetricOptions())
        save_statistics(tmp_path / "ref.npz", made, {"note": "x"})
        read = load_statistics(tmp_path / "ref.npz")
        np.testing.assert_allclose(read.mean, made.mean, rtol=0)
        np.testing.assert_allclose(read.covariance, made.covariance, rtol=1e-14, atol=1e-18)
        assert (read.num_images, read.detector, read.detector_sha256) == (150, "tiny", detector.sha256)
        assert (read.fingerprint, read.resolution, read.stored_ddof) == (source.fingerprint, 8, 1)
        assert check_statistics(read, detector) is None

    def test_keys_that_other_tools_read(self, tmp_path, detector, source):
        save_statistics(tmp_path / "ref.npz", compute_statistics(source, detector, False, MetricOptions()), {"note": 1})
        with np.load(tmp_path / "ref.npz", allow_pickle=False) as file:
            x = features(detector, source)
            np.testing.assert_allclose(file["mu"], x.mean(axis=0), rtol=1e-12)
            np.testing.assert_allclose(file["sigma"], np.cov(x.T), rtol=1e-9, atol=1e-12)     # N - 1, as they have it.
            assert file["sigma"].dtype == np.float64
            assert (int(file["num_images"]), int(file["ddof"]), str(file["detector"])) == (150, 1, "tiny")
            metadata = json.loads(str(file["metadata"]))
            assert metadata["note"] == 1
            assert metadata["ddof"] == 1

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    def test_foreign_files(self, tmp_path, detector, dtype):
        sigma = np.eye(16) * 2
        np.savez(tmp_path / "adm.npz", mu=np.ones(16, dtype), sigma=sigma, mu_s=np.zeros(3))
        read = load_statistics(tmp_path / "adm.npz")
        assert read.mean.dtype == read.covariance.dtype == np.float64
        np.testing.assert_array_equal(read.covariance, sigma)           # N is unknown: nothing to convert.
        assert read.num_images is None
        assert "does not say which detector" in check_statistics(read, detector)
        assert "not recorded" in read.describe()["detector"]

    @pytest.mark.parametrize(("arrays", "match"), [
        ({"mu": np.zeros(3)}, "holds mu, but statistics need"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu is \[3\] and sigma \[4, 4\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_images": 1}, "num_images is 1"),
        ({"mu": np.array([{}]), "sigma": np.eye(3)}, "not a readable file"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "metadata": "no json"}, "not a readable file"),
    ])
    def test_unusable_files(self, tmp_path, arrays, match):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(UserError, match=match):
            load_statistics(tmp_path / "x.npz")

    def test_cut_off(self, tmp_path):
        np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.eye(3))
        data = (tmp_path / "x.npz").read_bytes()
        (tmp_path / "x.npz").write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match="not a readable file"):
            load_statistics(tmp_path / "x.npz")

    def test_other_detector_is_refused(self, tmp_path, detector, source, monkeypatch):
        net = lambda: TinyNet(16, classes=3)
        monkeypatch.setitem(DETECTORS._items, "other", DetectorKind(None, 16, ("pool",), net, tiny_forward("x")))
        made = compute_statistics(source, detector, False, MetricOptions())
        save_statistics(tmp_path / "ref.npz", made, {})
        read = load_statistics(tmp_path / "ref.npz")
        with pytest.raises(UserError, match="made by detector tiny"):
            check_statistics(read, load_detector("other", CPU))
        np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
        with pytest.raises(UserError, match="have 3 dimensions, those of detector tiny 16"):
            check_statistics(load_statistics(tmp_path / "small.npz"), detector)

    def test_one_image_has_no_covariance(self, tmp_path, detector):
        made = compute_statistics(ArraySource(random_images(1)), detector, False, MetricOptions())
        with pytest.raises(UserError, match="use two or more"):
            save_statistics(tmp_path / "ref.npz", made, {})


#----------------------------------------------------------------------------

class TestCache:
    def test_second_run_reads_nothing(self, detector, source):
        wants = Wants(moments=True, features=True)
        first = load_real_side(Reference(source), detector, wants, False, MetricOptions())
        assert source.num_read == 150
        second = load_real_side(Reference(source), detector, wants, False, MetricOptions())
        assert source.num_read == 150
        assert torch.equal(first.features, second.features)
        np.testing.assert_array_equal(first.covariance, second.covariance)
        assert first.num_images == second.num_images == 150

    def test_off(self, detector, source, tmp_path):
        for _run in range(2):
            load_real_side(Reference(source), detector, Wants(moments=True), False, MetricOptions(use_cache=False))
        assert source.num_read == 300
        assert not (tmp_path / "cache").exists()

    def test_content_counts_not_the_place(self, detector, source):
        wants, options = Wants(moments=True), MetricOptions()
        load_real_side(Reference(source), detector, wants, False, options)
        same = ArraySource(source.images.clone(), description={"path": "elsewhere"})
        load_real_side(Reference(same), detector, wants, False, options)
        assert same.num_read == 0
        changed = ArraySource(source.images ^ 1)
        load_real_side(Reference(changed), detector, wants, False, options)
        assert changed.num_read == 150

    def test_every_input_is_in_the_key(self, detector, monkeypatch):
        path = references.cache_path
        paths = {path(detector, "a", kind="moments"), path(detector, "b", kind="moments"),
                 path(detector, "a", kind="features", limit=5), path(detector, "a", kind="features", limit=6)}
        monkeypatch.setattr(detector, "sha256", "other")
        paths.add(path(detector, "a", kind="moments"))
        monkeypatch.setattr(references, "CACHE_VERSION", 99)
        paths.add(path(detector, "a", kind="moments"))
        assert len(paths) == 6

    def test_damaged_file_counts_as_absent(self, detector, source, tmp_path):
        wants = Wants(moments=True)
        first = load_real_side(Reference(source), detector, wants, False, MetricOptions())
        files = list((tmp_path / "cache" / "metrics").glob("*.npz"))
        assert len(files) == 1
        files[0].write_bytes(files[0].read_bytes()[:100])
        again = load_real_side(Reference(source), detector, wants, False, MetricOptions())
        np.testing.assert_array_equal(first.mean, again.mean)

    def test_mirror_has_its_own_entry(self, detector, source):
        plain = load_real_side(Reference(source), detector, Wants(moments=True), False, MetricOptions())
        mirrored = load_real_side(Reference(source), detector, Wants(moments=True), True, MetricOptions())
        assert mirrored.num_images == 300
        assert not np.array_equal(plain.mean, mirrored.mean)


def test_features_of_a_seeded_subset(detector, source, monkeypatch):
    monkeypatch.setattr(real_side, "MAX_FEATURES", 40)
    alone = load_real_side(Reference(source), detector, Wants(features=True), False, MetricOptions(use_cache=False))
    assert source.num_read == 40
    both = load_real_side(Reference(source), detector, Wants(moments=True, features=True), False,
                          MetricOptions(use_cache=False))
    chosen = real_side.seeded_indices(150, 40, real_side.SUBSET_SEED)
    for side in (alone, both):
        np.testing.assert_allclose(side.features.numpy(), features(detector, source)[chosen], rtol=1e-4, atol=1e-5)
    assert both.num_images == 150
