# SPDX-License-Identifier: Apache-2.0
"""The same images through the same weights by other implementations, written independently of this one.

Few images here; benchmarks/compare_metrics.py takes thousands.
"""
import numpy as np
import pytest
import torch

from metrics import inception_score, kernel_distance, precision_recall
from metrics.detectors import DETECTORS, load_detector
from metrics.frechet import frechet_distance
from metrics.metric_main import evaluate
from metrics.options import MetricOptions
from metrics.references import Reference
from metrics.references.statistics import make_statistics
from tests.closeness import approx, l2_error
from tests.metrics import others
from tests.metrics.helpers import (
    INCEPTION_TERMS,
    VGG_TERMS,
    ArraySource,
    float32_tolerance,
    random_images,
    tiny_kind,
    write_folder,
)

pytestmark = pytest.mark.numeric

PYTORCH_FID = "inception-2015-12-05-pytorch_fid"
NUM = 9         # Three of each kind: a CPU core does ten a second.


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    others.write_weights(folder, vgg=False)
    return folder


@pytest.fixture(scope="module")
def images():
    return others.three_kinds(NUM)


@pytest.fixture(scope="module")
def files(images, tmp_path_factory):
    return sorted(write_folder(tmp_path_factory.mktemp("images"), images).glob("*.png"))


def ours(name, weights, images):
    detector = load_detector(name, others.CPU, str(weights), allow_unverified=True)
    return detector.features(torch.from_numpy(images))


def assert_equal(ours, theirs, terms=INCEPTION_TERMS):
    """Length of the difference over the length of theirs, all images together: no more than rounding."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    assert theirs.std(axis=0).mean() > 1e-3 * np.abs(theirs).mean() > 0     # Images are told apart.
    assert l2_error(ours, theirs) < float32_tolerance(terms)


class TestFeatures:
    @pytest.mark.slow
    def test_torch_fidelity(self, weights, images):
        out = ours("inception-2015-12-05", weights, images)
        pool, logits, spatial = others.by_torch_fidelity(images, weights)
        assert_equal(out["pool"], pool)
        assert_equal(out["logits_unbiased"], logits)
        assert spatial.shape == (NUM, 7, 17, 17)
        assert spatial.min() == 0                                       # After normalisation and rectification.
        in_adms_order = np.stack([[x[c, i, j] for i in range(17) for j in range(17) for c in range(7)]
                                  for x in spatial.numpy()])
        assert_equal(out["spatial"], in_adms_order)

    @pytest.mark.slow
    def test_pytorch_fid(self, weights, images, files):
        assert_equal(ours("inception-2015-12-05-pytorch_fid", weights, images)["pool"],
                     others.by_pytorch_fid(files, weights))

    @pytest.mark.slow
    def test_layers_of_pytorch_fid(self, weights, images, files):
        found = ours(PYTORCH_FID, weights, images[:3])
        for dims in (64, 192, 768):
            assert_equal(found[f"pool{dims}"], others.by_pytorch_fid(files[:3], weights, dims))

    @pytest.mark.slow
    def test_clean_fid(self, weights, images, files):
        assert_equal(ours("inception-2015-12-05-clean", weights, images)["pool"], others.by_clean_fid(files, weights))

    @pytest.mark.slow
    def test_resizes_are_told_apart(self, weights, images):
        """What the tests above would not forgive."""
        names = ("inception-2015-12-05", "inception-2015-12-05-clean", "inception-2015-12-05-pytorch_fid")
        pools = [ours(name, weights, images[:3])["pool"] for name in names]
        for i, a in enumerate(pools):
            for b in pools[:i]:
                assert (a - b).abs().max() > 1e-3 * a.abs().max()

    @pytest.mark.slow
    def test_torch_fidelity_vgg(self, tmp_path, images):
        others.write_weights(tmp_path)
        assert_equal(ours("vgg16", tmp_path, images[:3])["pool"], others.by_torch_fidelity_vgg(images[:3], tmp_path),
                     terms=VGG_TERMS + 25_088 + 4096)       # And two layers that see all.


@pytest.fixture(scope="module")
def features():
    """Two overlapping clouds, with values that float16 can hold: ours rounds to it before it takes neighbours."""
    rng = np.random.RandomState(0)
    mix = rng.standard_normal([24, 24]) / 5
    real = rng.standard_normal([600, 24]) @ mix
    gen = rng.standard_normal([500, 24]) @ mix * 0.9 + 0.1
    return real.astype(np.float16).astype(np.float32), gen.astype(np.float16).astype(np.float32)


class TestMetrics:
    @pytest.mark.parametrize("package", ["torch-fidelity", "pytorch-fid", "clean-fid"])
    def test_frechet(self, features, package):
        a, b = (x.astype(np.float64) for x in features)
        value = frechet_distance(a.mean(axis=0), np.cov(a.T), b.mean(axis=0), np.cov(b.T))
        assert value > 0.1
        assert value == approx(others.frechet_distance(a, b, package), rel=1e-5)

    def test_protocol_of_pytorch_fid(self, replace):
        """Its number for all images of two sets, from images and from the statistics that it saves."""
        replace(DETECTORS, PYTORCH_FID, tiny_kind())
        real, gen = (ArraySource(random_images(num, seed=num)) for num in (230, 170))
        net = load_detector(PYTORCH_FID, others.CPU)
        a, b = (net.features(x.images)["pool"].double().numpy() for x in (real, gen))
        theirs = others.frechet_distance(a, b, "pytorch-fid")
        stored = make_statistics("ref.npz", "mu and sigma", a.mean(axis=0), np.cov(a, rowvar=False), None, 1)
        for reference in (Reference(real), Reference(statistics=(stored,))):
            record = evaluate(["pytorch_fid"], lambda num: gen, reference, MetricOptions(num_images=170))[0]
            assert record["results"]["pytorch_fid"] == approx(theirs, rel=1e-6)
            other = evaluate(["fid"], lambda num: gen, reference, MetricOptions(num=170, detector=PYTORCH_FID))[0]
            assert abs(other["results"]["fid"] / theirs - 1) > 1e-4         # Divided by N it is another number.

    @pytest.mark.parametrize("package", ["torch-fidelity", "clean-fid"])
    def test_kernel(self, features, package):
        a, b = (torch.from_numpy(x[:500]) for x in features)
        value = kernel_distance.kernel_distance(a, b, num_subsets=1, max_subset_size=500).mean
        theirs = others.kernel_distances(a.double().numpy(), b.double().numpy())[package]
        assert value == approx(theirs, rel=1e-5)

    def test_inception_score(self, features):
        logits = np.concatenate(features) * 4
        score = inception_score.inception_score(torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy())
        assert score.mean > 1.5
        assert (score.mean, score.std) == approx(others.inception_score(logits), rel=1e-5)

    def test_precision_recall(self, features):
        real, gen = features
        found = precision_recall.precision_recall(torch.from_numpy(real), torch.from_numpy(gen))
        assert (found.precision, found.recall) == approx(others.precision_recall(real, gen), rel=1e-6)
        assert 0.05 < found.recall < found.precision < 0.999
