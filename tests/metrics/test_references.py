# SPDX-License-Identifier: Apache-2.0
"""Our file of statistics, who may use which statistics, the real side of a metric, and the cache."""
import json
import zipfile

import numpy as np
import pytest
import torch

from dnnlib import UserError
from inference.image_inputs import has_samples, kind_of, open_images
from metrics import real_side
from metrics.detectors import DETECTORS, DetectorKind, load_detector
from metrics.options import MetricOptions
from metrics.passes import Wants
from metrics.real_side import RealWants, compute_statistics, load_real_side
from metrics.references import Reference, Statistics, cache, check_statistics, load_statistics, save_statistics
from tests.closeness import assert_close
from tests.metrics.helpers import ArraySource, TinyNet, random_images, tiny_forward

CPU = torch.device("cpu")
MOMENTS = RealWants(Wants(moments=frozenset({"pool"})))
FEATURES = RealWants(Wants(features=frozenset({"pool"})), real_side.MAX_FEATURES)


@pytest.fixture
def detector():
    return load_detector("tiny", CPU)


@pytest.fixture
def source():
    return ArraySource(random_images(150))


def features(detector, source):
    return torch.cat([detector.features(x)["pool"] for x, _ in source.batches(64)]).double().numpy()


def moments(detector, source):
    return compute_statistics(source, detector, ["pool"], False, MetricOptions())


def gaussian(dim, seed=0, num=100, **more):
    """Statistics of random vectors."""
    x = np.random.RandomState(seed).randn(3 * dim, dim)
    return Statistics(x.mean(axis=0), np.cov(x.T, ddof=0), num, fingerprint="f" * 64, resolution=8, **more)

#----------------------------------------------------------------------------

@pytest.mark.numeric
class TestOurFile:
    def test_round_trip(self, tmp_path, detector, source):
        made = moments(detector, source)
        save_statistics(tmp_path / "ref.npz", made, {"note": "x"})
        (read,) = load_statistics(tmp_path / "ref.npz")
        np.testing.assert_array_equal(read.mean, made[0].mean)
        assert_close(read.covariance, made[0].covariance, rtol=1e-14, atol=1e-18)
        assert (read.num_images, read.detector, read.detector_sha256) == (150, "tiny", detector.sha256)
        assert (read.fingerprint, read.resolution, read.stored_ddof) == (source.fingerprint, 8, 1)
        assert check_statistics(read, detector) is None
        assert kind_of(tmp_path / "ref.npz") == "statistics"
        assert not has_samples(tmp_path / "ref.npz")

    def test_keys_that_other_tools_read(self, tmp_path):
        entries = [gaussian(6, 0, detector="inception-2015-12-05", detector_sha256="aa"),
                   gaussian(5, 1, detector="inception-2015-12-05", detector_sha256="aa", output="spatial"),
                   gaussian(4, 2, detector="dinov2-vitl14", detector_sha256="bb"),
                   gaussian(3, 3, detector="local:judge.safetensors", detector_sha256="cc"),
                   gaussian(3, 4, detector="vgg16", detector_sha256="dd", output="other")]
        save_statistics(tmp_path / "ref.npz", entries, {"note": 1})
        with np.load(tmp_path / "ref.npz", allow_pickle=False) as file:
            assert set(file.files) == {
                "mu", "sigma", "mu_s", "sigma_s", "mu_dinov2", "sigma_dinov2", "mu@local_judge.safetensors",
                "sigma@local_judge.safetensors", "mu@vgg16@other", "sigma@vgg16@other", "num_images", "ddof",
                "metadata"}
            for key, entry in zip(("sigma", "sigma_s", "sigma_dinov2"), entries, strict=False):
                assert_close(file[key], entry.covariance * 100 / 99, rtol=1e-14)
                assert file[key].dtype == np.float64
            assert (int(file["num_images"]), int(file["ddof"])) == (100, 1)
            metadata = json.loads(str(file["metadata"]))
        assert metadata["note"] == 1
        assert metadata["statistics"][0]["detector_sha256"] == "aa"
        assert {"Pillow", "numpy", "torch"} <= metadata["decoded_by"].keys()
        reference = Reference(statistics=load_statistics(tmp_path / "ref.npz"))
        for entry in entries:
            found = reference.statistics_for(entry.detector, entry.output)
            np.testing.assert_array_equal(found.mean, entry.mean)
        assert reference.statistics_for("vgg16") is None
        assert "pool of dinov2-vitl14" in reference.holdings()

    def test_divisor(self, tmp_path, detector, source):
        save_statistics(tmp_path / "ref.npz", moments(detector, source), {})
        (read,) = load_statistics(tmp_path / "ref.npz")
        x = features(detector, source)
        assert_close(read.covariance, np.cov(x.T, ddof=0), rtol=1e-9, atol=1e-12)
        assert_close(read.covariance_at(1), np.cov(x.T), rtol=1e-9, atol=1e-12)

    def test_images_are_a_seeded_choice(self, tmp_path, detector, source):
        for name, limit in (("all", 1000), ("some", 20), ("again", 20)):
            save_statistics(tmp_path / f"{name}.npz", moments(detector, source), {}, source, limit)
        assert (tmp_path / "some.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
        with np.load(tmp_path / "all.npz", allow_pickle=False) as file:
            np.testing.assert_array_equal(file["arr_0"].transpose(0, 3, 1, 2), source.images.numpy())
        with np.load(tmp_path / "some.npz", allow_pickle=False) as file:
            chosen = {image.tobytes() for image in file["arr_0"].transpose(0, 3, 1, 2)}
            assert json.loads(str(file["metadata"]))["arr_0"] == {"num_images": 20, "of": 150, "seed": 0}
        assert len(chosen) == 20
        assert chosen <= {image.tobytes() for image in source.images.numpy()}
        assert has_samples(tmp_path / "some.npz")
        assert open_images(tmp_path / "some.npz").num_images == 20

    def test_a_broken_write_leaves_the_old_file(self, tmp_path, detector, source):
        save_statistics(tmp_path / "ref.npz", moments(detector, source), {})
        before = (tmp_path / "ref.npz").read_bytes()

        class Breaking(ArraySource):
            def batches(self, batch_size):
                yield next(super().batches(10))
                raise UserError("the disk is gone")

        with pytest.raises(UserError, match="the disk is gone"):
            save_statistics(tmp_path / "ref.npz", moments(detector, source), {}, Breaking(source.images), 150)
        assert (tmp_path / "ref.npz").read_bytes() == before
        assert [path.name for path in tmp_path.glob("*ref*")] == ["ref.npz"]

    def test_one_image_has_no_covariance(self, tmp_path, detector):
        made = moments(detector, ArraySource(random_images(1)))
        with pytest.raises(UserError, match="use two or more"):
            save_statistics(tmp_path / "ref.npz", made, {})
        with pytest.raises(UserError, match="no statistics to save"):
            save_statistics(tmp_path / "ref.npz", [], {})


class TestBrokenFileOfOurs:
    @pytest.fixture
    def file(self, tmp_path):
        save_statistics(tmp_path / "ref.npz", [gaussian(6, detector="inception-2015-12-05", detector_sha256="aa")], {})
        with np.load(tmp_path / "ref.npz") as loaded:
            return tmp_path / "ref.npz", {key: loaded[key] for key in loaded.files}

    def check(self, file, match):
        path, arrays = file
        np.savez(path, **arrays)
        with pytest.raises(UserError, match=match) as info:
            load_statistics(path)
        assert str(path) in str(info.value)
        assert "\n" not in str(info.value)

    def test_missing_array(self, file):
        del file[1]["sigma"]
        self.check(file, "lacks sigma: make the file again")

    def test_metadata_is_no_json(self, file):
        file[1]["metadata"] = np.array("no json")
        self.check(file, "not a readable file of statistics")

    @pytest.mark.parametrize(("change", "match"), [
        ({"statistics": []}, "holds no statistics"), ({"statistics": 3}, "not a readable file"),
        ({"statistics": [{"keys": ["mu", "ddof"], "detector": "x", "detector_sha256": "y", "output": "pool"}]},
         r"must be \[D\] and \[D, D\]")])
    def test_metadata_of_another_shape(self, file, change, match):
        metadata = json.loads(str(file[1]["metadata"]))
        file[1]["metadata"] = np.array(json.dumps({**metadata, **change}))
        self.check(file, match)

    def test_too_few_images(self, file):
        file[1]["num_images"] = np.array(1)
        self.check(file, "num_images is 1 with ddof 1")

    def test_cut_off(self, file):
        path = file[0]
        path.write_bytes(path.read_bytes()[:300])
        with pytest.raises(UserError, match="not a readable file"):
            load_statistics(path)
        with pytest.raises(UserError, match="cut off"):
            kind_of(path)

    def test_one_byte_flipped(self, file):
        data = bytearray(file[0].read_bytes())
        data[150] ^= 255
        file[0].write_bytes(data)
        with zipfile.ZipFile(file[0]) as archive:
            assert archive.testzip() is not None
        with pytest.raises(UserError, match="not a readable file"):
            load_statistics(file[0])

#----------------------------------------------------------------------------

class TestWhoMayUseWhat:
    def test_other_weights_are_refused(self, tmp_path, detector, source, replace):
        save_statistics(tmp_path / "ref.npz", moments(detector, source), {})
        (read,) = load_statistics(tmp_path / "ref.npz")
        net = lambda: TinyNet(16, classes=3)
        replace(DETECTORS, "tiny", DetectorKind(None, 16, ("pool",), net, tiny_forward("x")))
        with pytest.raises(UserError, match="made by detector tiny"):
            check_statistics(read, load_detector("tiny", CPU))

    def test_other_width_is_refused(self, detector):
        with pytest.raises(UserError, match="have 3 dimensions, those of detector tiny 16"):
            check_statistics(gaussian(3, detector=None), detector)

    def test_unnamed_detector(self, detector):
        unnamed = gaussian(16, detector=None, path="x.npz")
        reference = Reference(statistics=(unnamed,))
        assert reference.statistics_for("tiny") is unnamed
        assert reference.statistics_for("tiny", "spatial") is None
        assert "does not say which detector" in check_statistics(unnamed, detector)
        assert "not recorded" in unnamed.describe()["detector"]

    def test_known_network_with_unknown_weights(self, detector, monkeypatch):
        foreign = gaussian(16, detector="tiny", path="adm.npz")
        reference = Reference(statistics=(foreign,))
        assert check_statistics(foreign, detector) is None
        assert reference.statistics_for("tiny:random") is foreign       # Tests have no other weights.
        assert reference.statistics_for("tiny-clean") is None           # Another resize is another detector.
        monkeypatch.setattr(detector, "name", "tiny:random")
        assert "was made by tiny, but is compared with tiny:random" in check_statistics(foreign, detector)

    def test_by_name_comes_first(self):
        unnamed, named = gaussian(4, 0, detector=None), gaussian(4, 1, detector="b")
        reference = Reference(statistics=(unnamed, named))
        assert reference.statistics_for("b") is named
        assert reference.statistics_for("c") is unnamed

    def test_what_is_recorded(self, source):
        foreign = gaussian(16, detector="tiny", path="adm.npz", format="ADM reference npz", crop="center-crop-dhariwal")
        reference = Reference(source, (foreign,))
        used = reference.describe(foreign)
        assert (used["used"], used["format"]) == ("statistics", "ADM reference npz")
        assert used["crop"] == "center-crop-dhariwal"
        assert reference.describe()["used"] == "images"
        assert reference.resolution == 8
        assert reference.crop == "center-crop-dhariwal"


#----------------------------------------------------------------------------

class TestCache:
    def test_second_run_reads_nothing(self, detector, source):
        wants = MOMENTS | FEATURES
        first = load_real_side(Reference(source), detector, wants, False, None, MetricOptions())
        assert source.num_read == 150
        second = load_real_side(Reference(source), detector, wants, False, None, MetricOptions())
        assert source.num_read == 150
        assert torch.equal(first.features["pool"], second.features["pool"])
        np.testing.assert_array_equal(first.moments["pool"].covariance, second.moments["pool"].covariance)
        assert first.moments["pool"].num_images == second.moments["pool"].num_images == 150

    def test_off(self, detector, source, tmp_path):
        for _run in range(2):
            load_real_side(Reference(source), detector, MOMENTS, False, None, MetricOptions(use_cache=False))
        assert source.num_read == 300
        assert not (tmp_path / "cache").exists()

    def test_content_counts_not_the_place(self, detector, source):
        wants, options = MOMENTS, MetricOptions()
        load_real_side(Reference(source), detector, wants, False, None, options)
        same = ArraySource(source.images.clone(), description={"path": "elsewhere"})
        load_real_side(Reference(same), detector, wants, False, None, options)
        assert same.num_read == 0
        changed = ArraySource(source.images ^ 1)
        load_real_side(Reference(changed), detector, wants, False, None, options)
        assert changed.num_read == 150

    def test_every_input_is_in_the_key(self, detector, monkeypatch):
        path = cache.cache_path
        paths = {path(detector, "a", kind="moments"), path(detector, "b", kind="moments"),
                 path(detector, "a", kind="features", limit=5), path(detector, "a", kind="features", limit=6)}
        monkeypatch.setattr(detector, "sha256", "other")
        paths.add(path(detector, "a", kind="moments"))
        monkeypatch.setattr(cache, "CACHE_VERSION", 99)
        paths.add(path(detector, "a", kind="moments"))
        assert len(paths) == 6

    def test_damaged_file_counts_as_absent(self, detector, source, tmp_path):
        wants = MOMENTS
        first = load_real_side(Reference(source), detector, wants, False, None, MetricOptions())
        files = list((tmp_path / "cache" / "metrics").glob("*.npz"))
        assert len(files) == 1
        files[0].write_bytes(files[0].read_bytes()[:100])
        again = load_real_side(Reference(source), detector, wants, False, None, MetricOptions())
        np.testing.assert_array_equal(first.moments["pool"].mean, again.moments["pool"].mean)

    def test_mirror_has_its_own_entry(self, detector, source):
        plain = load_real_side(Reference(source), detector, MOMENTS, False, None, MetricOptions())
        mirrored = load_real_side(Reference(source), detector, MOMENTS, True, None, MetricOptions())
        assert mirrored.moments["pool"].num_images == 300
        assert not np.array_equal(plain.moments["pool"].mean, mirrored.moments["pool"].mean)


@pytest.mark.numeric
def test_features_of_a_seeded_subset(detector, source):
    few = RealWants(FEATURES.wants, 40)
    alone = load_real_side(Reference(source), detector, few, False, None, MetricOptions(use_cache=False))
    assert source.num_read == 40
    both = load_real_side(Reference(source), detector, MOMENTS | few, False, None,
                          MetricOptions(use_cache=False))
    chosen = real_side.seeded_indices(150, 40, real_side.SUBSET_SEED)
    for side in (alone, both):
        want = features(detector, source)[chosen]
        assert_close(side.features["pool"].numpy(), want, rtol=1e-4, atol=1e-5)
    assert both.moments["pool"].num_images == 150
