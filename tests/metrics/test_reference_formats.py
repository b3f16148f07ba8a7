# SPDX-License-Identifier: Apache-2.0
"""Files of statistics that other tools write: each one read back, and one clear line for each broken one."""
import io
import os
import pickle
import struct

import numpy as np
import pytest
import torch

from dnnlib import EasyDict, UserError
from inference.image_inputs import has_samples, kind_of
from metrics.references import Reference, load_statistics
from tests.closeness import assert_close

INCEPTION, DINOV2 = "inception-2015-12-05", "dinov2-vitl14"
MD5 = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def x():
    """Features [50, 6]."""
    return np.random.RandomState(0).randn(50, 6) @ np.random.RandomState(1).randn(6, 6)


def mu_sigma(x, dtype=np.float64):
    return {"mu": x.mean(axis=0).astype(dtype), "sigma": np.cov(x, rowvar=False)}


def stylegan_cache(x, **change):
    """What StyleGAN's FeatureStats pickles: its attributes."""
    return {"capture_all": False, "capture_mean_cov": True, "max_items": None, "num_items": len(x),
            "num_features": x.shape[1], "all_features": None, "raw_mean": x.sum(axis=0), "raw_cov": x.T @ x, **change}


def write_pickle(path, value, protocol=pickle.DEFAULT_PROTOCOL):
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def refused(path, match):
    with pytest.raises(UserError, match=match) as info:
        load_statistics(path)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)

#----------------------------------------------------------------------------

@pytest.mark.numeric
class TestNpz:
    def test_adm(self, tmp_path, x):
        spatial = np.random.RandomState(2).randn(50, 4)
        path = tmp_path / "VIRTUAL.npz"
        np.savez(path, **mu_sigma(x, np.float32), mu_s=spatial.mean(axis=0).astype(np.float32),
                 sigma_s=np.cov(spatial.T), arr_0=np.zeros([3, 8, 8, 3], np.uint8))
        assert kind_of(path) == "statistics"
        assert has_samples(path)
        pool, spatial_read = load_statistics(path)
        assert pool.mean.dtype == pool.covariance.dtype == np.float64
        np.testing.assert_array_equal(pool.mean, x.mean(axis=0).astype(np.float32))
        np.testing.assert_array_equal(pool.covariance, np.cov(x.T))         # N is unknown: nothing to convert.
        np.testing.assert_array_equal(spatial_read.covariance, np.cov(spatial.T))
        np.testing.assert_array_equal(pool.covariance_at(1), pool.covariance)
        reference = Reference(statistics=(pool, spatial_read))
        assert reference.statistics_for(INCEPTION) is pool
        assert reference.statistics_for(INCEPTION, "spatial") is spatial_read
        assert reference.statistics_for(DINOV2) is None
        assert (pool.format, pool.resolution, pool.num_images) == ("ADM reference npz", 8, None)
        assert reference.crop == "center-crop-dhariwal"

    @pytest.mark.parametrize("dtype", [np.float32, np.float64])
    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_pytorch_fid_clean_fid_and_edm(self, tmp_path, x, dtype, save):
        save(tmp_path / "ref.npz", **mu_sigma(x, dtype))
        (read,) = load_statistics(tmp_path / "ref.npz")
        np.testing.assert_array_equal(read.covariance, np.cov(x.T))
        assert (read.detector, read.num_images, read.output, read.crop) == (None, None, "pool", None)
        assert read.format == "npz with mu and sigma"

    @pytest.mark.parametrize(("mean", "covariance"), [("mean", "cov"), ("mu", "cov"), ("mean", "covariance"),
                                                      ("mean", "sigma")])
    def test_other_names(self, tmp_path, x, mean, covariance):
        content = {mean: x.mean(axis=0), covariance: np.cov(x.T)}
        np.savez(tmp_path / "ref.npz", **content)
        for path in (tmp_path / "ref.npz", write_pickle(tmp_path / "ref.pkl", content)):
            assert kind_of(path) == "statistics"
            (read,) = load_statistics(path)
            np.testing.assert_array_equal(read.mean, x.mean(axis=0))
            np.testing.assert_array_equal(read.covariance, np.cov(x.T))
            assert f"with {mean} and {covariance}" in read.format
        np.savez(tmp_path / "x.npz", np.zeros([2, 8, 8, 3], np.uint8), mean=np.zeros(3), std=np.ones(3))
        assert kind_of(tmp_path / "x.npz") == "images"                 # Colours, as some tools keep beside images.

    def test_dgm_eval(self, tmp_path, x):
        """Its settings are an array of objects, which is left alone."""
        np.savez(tmp_path / "a.npz", reps=x, model=np.array("dinov2"), hparams=np.array({"seed": 1}, dtype=object))
        np.savez(tmp_path / "b.npz", reps=x, model=np.array(["dinov2"], dtype=object), hparams=np.array(object()))
        np.savez(tmp_path / "c.npz", feats=x.astype(np.float32))        # clean-fid's for KID.
        reads = [load_statistics(tmp_path / f"{name}.npz")[0] for name in "abc"]
        assert [read.detector for read in reads] == [DINOV2, None, None]
        for read in reads:
            assert kind_of(read.path) == "statistics"
            assert read.num_images == 50
            assert_close(read.mean, x.mean(axis=0), atol=1e-6, rtol=1e-7)
            assert_close(read.covariance, np.cov(x.T, ddof=0), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(("arrays", "match"), [
        ({"mu": np.zeros(3)}, "holds mu, but statistics need"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"are \[3\] and \[4, 4\], but must be \[D\]"),
        ({"mu": np.zeros([1, 3]), "sigma": np.eye(3)}, r"are \[1, 3\] and \[3, 3\]"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.full([3, 3], np.inf)}, "not finite"),
        ({"mu": np.zeros(3), "sigma": np.triu(np.ones([3, 3]))}, "no covariance: it must be symmetric"),
        ({"mu": np.zeros(3), "sigma": -np.eye(3)}, "variances that are not negative"),
        ({"mu": np.zeros(3, complex), "sigma": np.eye(3)}, "are complex128 and float64"),
        ({"mu": np.zeros(3, np.float16), "sigma": np.eye(3)}, "are float16 and float64, which is too coarse"),
        ({"mean": np.zeros(2), "cov": np.array([[1.0, 2], [2, 1]])}, "mean and cov .* larger than its two variances"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_images": 50.5}, r"num_images is float64 \[\], but must be one"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_images": [5, 6]}, r"num_images is int64 \[2\], but must be one"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_images": 50, "ddof": -3}, "ddof is -3"),
        ({"mu": np.array(["a", "b", "c"]), "sigma": np.eye(3)}, "but must be numbers"),
        ({"mu": np.array([{}]), "sigma": np.eye(3)}, "not a readable file"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "num_images": 1}, "num_images is 1"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "metadata": "no json"}, "not a readable file"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.zeros(4), "sigma_s": np.eye(5)}, "mu_s and sigma_s"),
        ({"reps": np.array([{}])}, "not a readable file"),
        ({"reps": np.zeros(5)}, r"reps is torch.float64 \[5\]"),
        ({"reps": np.full([5, 3], np.nan)}, "not finite"),
    ])
    def test_broken(self, tmp_path, arrays, match):
        np.savez(tmp_path / "x.npz", **arrays)
        refused(tmp_path / "x.npz", match)

    def test_cut_off(self, tmp_path, x):
        np.savez(tmp_path / "x.npz", **mu_sigma(x))
        data = (tmp_path / "x.npz").read_bytes()
        (tmp_path / "x.npz").write_bytes(data[: len(data) // 2])
        refused(tmp_path / "x.npz", "not a readable file")

    def test_header_that_claims_everything(self, tmp_path):
        """A header of 2 TB over a few bytes must not become an allocation."""
        import zipfile
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (1 << 38,)})
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("mu.npy", buffer.getvalue())
            archive.writestr("sigma.npy", buffer.getvalue())
        refused(tmp_path / "x.npz", "not a readable file")

#----------------------------------------------------------------------------

def with_numpy1_names(data):
    """The same pickle as NumPy 1 writes it: strings carry their length before them."""
    old, new = b"numpy._core.multiarray", b"numpy.core.multiarray"
    assert data.count(old) == 1
    data = data.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
    at = data.index(b"\x95") + 1        # The frame is one byte shorter then.
    (length,) = struct.unpack("<Q", data[at : at + 8])
    return data[:at] + struct.pack("<Q", length - 1) + data[at + 8 :]


@pytest.mark.numeric
class TestEdm2:
    def value(self, x, **change):
        return {"num_images": len(x), "fid": mu_sigma(x), "fd_dinov2": mu_sigma(x[:, :4]), **change}

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    @pytest.mark.parametrize("kind", [dict, EasyDict])
    def test_read(self, tmp_path, x, protocol, kind):
        path = write_pickle(tmp_path / "img512.pkl", kind(self.value(x)), protocol)
        assert kind_of(path) == "statistics"
        fid, dinov2 = load_statistics(path)
        assert (fid.detector, dinov2.detector, fid.num_images) == (INCEPTION, DINOV2, 50)
        assert_close(fid.covariance, np.cov(x.T, ddof=0), rtol=1e-12)
        assert_close(dinov2.covariance_at(1), np.cov(x[:, :4].T), rtol=1e-12)
        np.testing.assert_array_equal(fid.mean, x.mean(axis=0))
        assert fid.format == "EDM2 reference pickle"

    def test_names_of_numpy_1(self, tmp_path, x):
        data = with_numpy1_names(pickle.dumps({"num_images": 50, "fid": {
            "mu": x.mean(axis=0), "sigma": np.cov(x.T)}}, 4))
        assert b"numpy.core.multiarray" in data
        (tmp_path / "a.pkl").write_bytes(data)
        (read,) = load_statistics(tmp_path / "a.pkl")
        np.testing.assert_array_equal(read.mean, x.mean(axis=0))

    def test_numpy_count(self, tmp_path, x):
        path = write_pickle(tmp_path / "a.pkl", self.value(x, num_images=np.int64(50)))
        assert load_statistics(path)[0].num_images == 50

    def test_broken(self, tmp_path, x):
        for change, match in (
                ({"num_images": None}, "num_images is None"), ({"num_images": -3}, "num_images is -3"),
                ({"fid": {"mu": x[0]}}, "sigma is absent, but must be an array"),
                ({"fid": [1, 2]}, "fid must hold mu and sigma"),
                ({"fid": {"mu": [1.0], "sigma": [[1.0]]}}, "mu is a list, but must be an array"),
                ({"fid": {"mu": x[0] * np.nan, "sigma": np.eye(6)}}, "mu and sigma of fid are not finite"),
                ({"fd_dinov2": {"mu": x[0], "sigma": np.eye(5)}}, r"of fd_dinov2 are \[6\] and \[5, 5\]")):
            refused(write_pickle(tmp_path / "a.pkl", self.value(x, **change)), match)


@pytest.mark.numeric
class TestStyleganCache:
    @pytest.mark.parametrize(("file", "detector"), [
        (f"ffhq256x256-inception-2015-12-05-{MD5}.pkl", INCEPTION), (f"my-set-vgg16-{MD5}.pkl", "vgg16"),
        (f"x-inception_rand_full-{MD5}.pkl", "inception-rand"), ("renamed.pkl", None)])
    def test_read(self, tmp_path, x, file, detector):
        (read,) = load_statistics(write_pickle(tmp_path / file, stylegan_cache(x)))
        assert (read.detector, read.num_images, read.output) == (detector, 50, "pool")
        assert_close(read.mean, x.mean(axis=0), rtol=1e-12)
        assert_close(read.covariance, np.cov(x.T, ddof=0), rtol=1e-10, atol=1e-12)
        assert read.format == "StyleGAN statistics cache"

    def test_features_alone(self, tmp_path, x):
        blocks = [x[:30].astype(np.float32), x[30:].astype(np.float32)]
        (read,) = load_statistics(write_pickle(tmp_path / "a.pkl", stylegan_cache(
            x, capture_all=True, all_features=blocks, raw_mean=None, raw_cov=None)))
        assert_close(read.covariance, np.cov(x.T, ddof=0), rtol=1e-4, atol=1e-4)
        refused(write_pickle(tmp_path / "a.pkl", stylegan_cache(x, raw_mean=None, all_features=blocks[:1])),
                "num_items is 50, but it holds features of 30")
        refused(write_pickle(tmp_path / "a.pkl", stylegan_cache(x, raw_mean=None)), "neither raw_mean nor a list")

    def test_spatial_features_come_in_adms_order(self, tmp_path):
        """There channel by channel, in ADM's files and here pixel by pixel."""
        total, channels = 2023, np.repeat(np.arange(7.0), 17 * 17)
        value = stylegan_cache(np.zeros([2, 3]), raw_mean=channels * 2, num_features=total,
                               raw_cov=np.outer(channels, channels) * 2 + np.diag(channels) * 2)
        (read,) = load_statistics(write_pickle(tmp_path / f"x-{INCEPTION}-{MD5}.pkl", value))
        assert read.output == "spatial"
        np.testing.assert_array_equal(read.mean, np.tile(np.arange(7.0), 17 * 17))
        assert_close(np.diag(read.covariance), read.mean, atol=1e-12, rtol=1e-7)

    @pytest.mark.parametrize(("change", "match"), [
        ({"num_items": 0}, "num_items is 0"),
        ({"raw_cov": np.eye(5)}, r"raw_cov are float64 \[6\] and float64 \[5, 5\]"),
        ({"raw_mean": np.array([1, 2])}, "but must be floats"), ({"raw_mean": "x"}, "raw_mean is a str"),
        ({"raw_mean": np.full(6, np.nan)}, "not finite")])
    def test_broken(self, tmp_path, x, change, match):
        refused(write_pickle(tmp_path / "a.pkl", stylegan_cache(x, **change)), match)


@pytest.mark.numeric
class TestTorchFidelityCache:
    def test_statistics(self, tmp_path, x):
        path = tmp_path / "set-inception-v3-compat-stat-fid-2048.pt"
        torch.save(mu_sigma(x, np.float32), path)
        assert kind_of(path) == "statistics"
        (read,) = load_statistics(path)
        assert (read.detector, read.num_images, read.format) == (INCEPTION, None, "torch-fidelity cache")
        np.testing.assert_array_equal(read.covariance, np.cov(x.T))
        os.rename(path, tmp_path / "renamed.pt")
        assert load_statistics(tmp_path / "renamed.pt")[0].detector is None

    @pytest.mark.parametrize("new", [True, False])
    def test_features(self, tmp_path, x, new):
        path = tmp_path / "set-inception-v3-compat-features-2048.pt"
        torch.save(torch.from_numpy(x).float(), path, _use_new_zipfile_serialization=new)
        assert kind_of(path) == "statistics"
        (read,) = load_statistics(path)
        assert (read.detector, read.num_images) == (INCEPTION, 50)
        assert_close(read.covariance, np.cov(x.T, ddof=0), rtol=1e-4, atol=1e-4)

    def test_broken(self, tmp_path):
        torch.save({"mu": np.zeros(3)}, tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "a pickle without statistics .it holds mu.")
        torch.save(torch.zeros(3), tmp_path / "a.pt")
        refused(tmp_path / "a.pt", "features must be floats")

#----------------------------------------------------------------------------

class Evil:
    def __init__(self, file):
        self.file = str(file)

    def __reduce__(self):
        return os.mkdir, (self.file,)


class TestHostilePickles:
    @pytest.mark.parametrize("protocol", [0, 2, 4])
    def test_code_is_refused_and_not_run(self, tmp_path, x, protocol):
        trap = tmp_path / "trap"
        for i, value in enumerate((Evil(trap), {"num_images": 50, "fid": mu_sigma(x), "more": Evil(trap)},
                                   stylegan_cache(x, max_items=Evil(trap)))):
            path = write_pickle(tmp_path / f"{i}.pkl", value, protocol)
            with pytest.raises(UserError, match="nothing was run" if protocol else "nothing was run|not a readable"):
                load_statistics(path)
            assert not trap.exists()
        torch.save({"mu": Evil(trap), "sigma": 1}, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", "nothing was run")
        assert not trap.exists()

    def test_arrays_of_objects(self, tmp_path, x):
        value = {"num_images": 3, "fid": {"mu": np.array([{}, {}], dtype=object), "sigma": np.eye(2)}}
        refused(write_pickle(tmp_path / "a.pkl", value), "array of objects")

    @pytest.mark.parametrize("keep", [3, 40, 400, -1])
    def test_cut_off(self, tmp_path, x, keep):
        data = pickle.dumps(stylegan_cache(x))
        (tmp_path / "a.pkl").write_bytes(data[:keep])
        refused(tmp_path / "a.pkl", "damaged or cut off")

    @pytest.mark.parametrize("value", [3, "text", [1, 2], {"G_ema": 1}, {}])
    def test_other_pickles(self, tmp_path, value):
        path = write_pickle(tmp_path / "a.pkl", value)
        assert kind_of(path) == "statistics"
        refused(path, "a pickle without statistics")


def test_a_single_array_is_no_file_of_statistics(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    refused(tmp_path / "x.npy", "neither a whole .npz nor a pickle")
    (tmp_path / "text").write_text("hello")
    refused(tmp_path / "text", "not a readable file")
