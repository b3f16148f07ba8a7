# SPDX-License-Identifier: Apache-2.0
"""The mathematics: recorded values of the official code, closed forms, independent libraries, properties."""
import numpy as np
import pytest
import scipy.linalg
import sklearn.metrics.pairwise
import sklearn.neighbors
import torch

from dnnlib import UserError
from metrics import precision_recall as pr_module
from metrics.accuracy import accuracy
from metrics.frechet import covariance_factor, frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel_distance import kernel_distance, squared_mmd
from metrics.precision_recall import Points, manifold_radii, precision_recall
from tests.closeness import approx, assert_close
from tests.parity import load_json, load_npz

pytestmark = pytest.mark.numeric

#----------------------------------------------------------------------------

def moments(x):
    x = np.asarray(x, dtype=np.float64)
    return x.mean(axis=0), np.cov(x.T, ddof=0)


def random_moments(rng, dim, rank=None):
    factor = rng.standard_normal([dim, rank or dim])
    return rng.standard_normal(dim), factor @ factor.T


@pytest.fixture(scope="module")
def recorded():
    return load_npz("metrics.npz"), load_json("metrics.json")


class TestParity:
    def test_fid(self, recorded):
        data, values = recorded
        given = frechet_distance(data["mu_real"], data["sigma_real"], data["mu_gen"], data["sigma_gen"])
        assert given == approx(values["fid"], rel=1e-9)
        assert frechet_distance(*moments(data["real"]), *moments(data["gen"])) == approx(values["fid"], rel=1e-9)

    def test_fid_of_singular_covariances(self, recorded):
        data, values = recorded
        value = frechet_distance(*moments(data["real"][:20]), *moments(data["gen"][:20]))
        assert value == approx(values["fid_singular_first20"], rel=1e-6)

    def test_kid(self, recorded):
        data, values = recorded
        real, gen = torch.from_numpy(data["real"]), torch.from_numpy(data["gen"])
        value = kernel_distance(real, gen, num_subsets=1, max_subset_size=600)
        assert value.mean == approx(values["kid_one_subset_of_600"], rel=1e-6)

    def test_is(self, recorded):
        data, values = recorded
        score = inception_score(data["probs"])
        assert score.mean == approx(values["is_mean"], rel=1e-9)
        assert score.std == approx(values["is_std"], rel=1e-9)

    def test_precision_recall_exactly(self, recorded):
        data, values = recorded
        result = precision_recall(torch.from_numpy(data["real"]), torch.from_numpy(data["gen"]))
        assert np.float32(result.precision) == np.float32(values["precision_k3"])
        assert np.float32(result.recall) == np.float32(values["recall_k3"])

#----------------------------------------------------------------------------

class TestFrechet:
    def test_diagonal_gaussians(self):
        mu_a, mu_b = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])
        var_a, var_b = np.array([4.0, 1.0, 9.0]), np.array([1.0, 1.0, 16.0])
        expected = 5 + ((np.sqrt(var_a) - np.sqrt(var_b)) ** 2).sum()
        assert frechet_distance(mu_a, np.diag(var_a), mu_b, np.diag(var_b)) == approx(expected, rel=1e-12)

    def test_rotated_gaussians(self):
        rng = np.random.default_rng(0)
        q, _r = np.linalg.qr(rng.standard_normal([6, 6]))
        a, b = rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
        value = frechet_distance(np.zeros(6), q @ np.diag(a) @ q.T, np.zeros(6), q @ np.diag(b) @ q.T)
        assert value == approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-10)

    @pytest.mark.parametrize("rank", [None, 10])
    def test_eigenvalues_of_the_product(self, rank):
        rng = np.random.default_rng(1)
        mu_a, sigma_a = random_moments(rng, 24, rank)
        mu_b, sigma_b = random_moments(rng, 24, rank)
        roots = np.sqrt(np.linalg.eigvals(sigma_a @ sigma_b).astype(complex)).real.sum()
        expected = ((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * roots
        assert frechet_distance(mu_a, sigma_a, mu_b, sigma_b) == approx(expected, rel=1e-6)

    def test_against_torch_fidelity(self):
        from torch_fidelity.metric_fid import fid_statistics_to_metric
        rng = np.random.default_rng(2)
        (mu_a, sigma_a), (mu_b, sigma_b) = random_moments(rng, 32), random_moments(rng, 32)
        theirs = fid_statistics_to_metric({"mu": mu_a, "sigma": sigma_a}, {"mu": mu_b, "sigma": sigma_b}, False)
        assert frechet_distance(mu_a, sigma_a, mu_b, sigma_b) == approx(*theirs.values(), rel=1e-9)

    def test_against_the_matrix_root(self):
        rng = np.random.default_rng(4)
        (mu_a, sigma_a), (mu_b, sigma_b) = random_moments(rng, 40, 90), random_moments(rng, 40, 80)
        root = scipy.linalg.sqrtm(sigma_a @ sigma_b).real
        expected = ((mu_a - mu_b) ** 2).sum() + np.trace(sigma_a + sigma_b - 2 * root)
        assert frechet_distance(mu_a, sigma_a, mu_b, sigma_b) == approx(expected, rel=1e-10)

    @pytest.mark.parametrize(("num_a", "num_b"), [(40, 40), (30, 90), (150, 30), (2, 200)])
    def test_singular_covariances_are_no_less_exact(self, num_a, num_b):
        """With fewer rows than features, the trace is also the sum of singular values of the rows' products."""
        rng = np.random.default_rng(5)
        a, b = rng.standard_normal([num_a, 100]), rng.standard_normal([num_b, 100]) * 2
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        trace = np.linalg.svd(a @ b.T, compute_uv=False).sum() / np.sqrt(num_a * num_b)
        sigma_a, sigma_b = a.T @ a / num_a, b.T @ b / num_b
        expected = np.trace(sigma_a) + np.trace(sigma_b) - 2 * trace
        zero = np.zeros(100)
        assert frechet_distance(zero, sigma_a, zero, sigma_b) == approx(expected, rel=1e-12)
        assert frechet_distance(zero, sigma_b, zero, sigma_a) == approx(expected, rel=1e-12)
        assert frechet_distance(zero, sigma_a, zero, sigma_a) == approx(0, abs=1e-11)

    def test_no_covariance(self):
        """All images alike."""
        rng = np.random.default_rng(6)
        mu, sigma = random_moments(rng, 8)
        assert frechet_distance(mu, sigma, mu + 1, np.zeros([8, 8])) == approx(8 + np.trace(sigma), rel=1e-14)
        assert frechet_distance(mu, np.zeros([8, 8]), mu, np.zeros([8, 8])) == 0

    def test_factor(self):
        rng = np.random.default_rng(7)
        for rank in (1, 7, 20):
            _mu, sigma = random_moments(rng, 20, rank)
            factor = covariance_factor(sigma)
            assert factor.shape == (20, rank)
            assert_close(factor @ factor.T, sigma, rtol=1e-12, atol=1e-12 * np.abs(sigma).max())

    def test_symmetry_and_zero(self):
        rng = np.random.default_rng(3)
        a, b = random_moments(rng, 16), random_moments(rng, 16, rank=4)
        assert frechet_distance(*a, *b) == approx(frechet_distance(*b, *a), rel=1e-12)
        assert frechet_distance(*a, *a) == approx(0, abs=1e-10)
        assert frechet_distance(*b, *b) == approx(0, abs=1e-10)

    def test_wrong_inputs(self):
        with pytest.raises(ValueError, match="are not"):
            frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
        with pytest.raises(ValueError, match="not finite"):
            frechet_distance(np.array([np.nan]), np.eye(1), np.zeros(1), np.eye(1))

#----------------------------------------------------------------------------

class TestKernelDistance:
    def test_against_sklearn(self):
        rng = np.random.default_rng(0)
        x, y = rng.standard_normal([40, 7]), rng.standard_normal([40, 7]) + 1
        k = lambda a, b: sklearn.metrics.pairwise.polynomial_kernel(a, b, degree=3, gamma=1 / 7, coef0=1)
        off = ~np.eye(40, dtype=bool)
        expected = k(x, x)[off].mean() + k(y, y)[off].mean() - 2 * k(x, y).mean()
        assert squared_mmd(torch.from_numpy(x), torch.from_numpy(y)) == approx(expected, rel=1e-10)

    def test_against_torch_fidelity(self):
        from torch_fidelity.metric_kid import kernel_mmd
        rng = np.random.default_rng(1)
        x, y = rng.standard_normal([50, 5]), rng.standard_normal([50, 5])
        theirs = kernel_mmd(x, y, kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None,
                            kid_kernel_poly_coef0=1)
        assert squared_mmd(torch.from_numpy(x), torch.from_numpy(y)) == approx(theirs, rel=1e-9)

    def test_is_unbiased(self):
        rng = torch.Generator().manual_seed(0)
        x, y = (torch.randn(20_000, 4, generator=rng) for _ in range(2))
        result = kernel_distance(x, y, max_subset_size=200)
        assert result.subset_size == 200
        assert abs(result.mean) < 4 * result.std / 10      # 100 subsets: within four standard errors of zero.

    def test_seed_decides(self):
        rng = torch.Generator().manual_seed(0)
        x, y = torch.randn(300, 4, generator=rng), torch.randn(200, 4, generator=rng)
        first = kernel_distance(x, y, num_subsets=3, max_subset_size=50, seed=1)
        assert first == kernel_distance(x, y, num_subsets=3, max_subset_size=50, seed=1)
        assert first != kernel_distance(x, y, num_subsets=3, max_subset_size=50, seed=2)
        assert kernel_distance(x, y, num_subsets=1).subset_size == 200

    def test_too_few(self):
        with pytest.raises(UserError, match="two or more"):
            kernel_distance(torch.zeros(1, 3), torch.zeros(5, 3))

#----------------------------------------------------------------------------

class TestInceptionScore:
    def test_closed_forms(self):
        sure_of_all = np.tile(np.eye(8), [20, 1])
        assert inception_score(sure_of_all).mean == approx(8, rel=1e-12)     # One-hot, all classes: C.
        assert inception_score(np.full([50, 8], 1 / 8)).mean == approx(1, rel=1e-12)
        assert inception_score(np.tile(np.eye(8)[:1], [50, 1])).mean == approx(1, rel=1e-12)

    def test_sorted_classes_need_shuffling(self):
        probs = np.repeat(np.eye(10), 50, axis=0)
        assert inception_score(probs).mean == approx(1)
        assert inception_score(probs, shuffle_seed=0).mean > 9

    @pytest.mark.parametrize("num", [100, 107])
    def test_against_torch_fidelity(self, num):
        from torch_fidelity.metric_isc import isc_features_to_metric
        logits = torch.randn(num, 6, generator=torch.Generator().manual_seed(0)) * 3
        theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
        ours = inception_score(torch.softmax(logits.double(), dim=1).numpy())
        assert [ours.mean, ours.std] == approx(list(theirs.values()), rel=1e-10)

    def test_too_few(self):
        with pytest.raises(UserError, match="do not fill 10 splits"):
            inception_score(np.full([9, 2], 0.5))

#----------------------------------------------------------------------------

class TestPrecisionRecall:
    def features(self, num, seed, shift=0.0):
        return torch.randn(num, 12, generator=torch.Generator().manual_seed(seed)) + shift

    def test_against_nearest_neighbours(self):
        real, gen = self.features(300, 0), self.features(250, 1, shift=0.4)
        half = [x.half().double().numpy() for x in (real, gen)]

        def share(probes, centres):
            radii = sklearn.neighbors.NearestNeighbors(n_neighbors=4).fit(centres).kneighbors(centres)[0][:, 3]
            distances = np.linalg.norm(probes[:, None] - centres[None], axis=2)
            return (distances <= radii).any(axis=1).mean()

        result = precision_recall(real, gen)
        assert result.precision == approx(share(half[1], half[0]), abs=1e-12)
        assert result.recall == approx(share(half[0], half[1]), abs=1e-12)

    def test_against_torch_fidelity(self):
        from torch_fidelity.metric_prc import calculate_precision_recall_part
        real, gen = self.features(200, 2).half().float(), self.features(220, 3, shift=0.3).half().float()
        theirs = calculate_precision_recall_part(gen, real)
        ours = precision_recall(real, gen)
        assert [ours.precision, ours.recall] == approx(theirs, abs=1e-6)

    def test_same_and_far(self):
        x = self.features(100, 4)
        assert precision_recall(x, x).precision == precision_recall(x, x).recall == 1
        far = precision_recall(x, x + 100)
        assert (far.precision, far.recall) == (0, 0)

    def test_collapse_has_precision_without_recall(self):
        real = self.features(200, 5)
        gen = real[:1] + 0.01 * self.features(100, 6)
        result = precision_recall(real, gen)
        assert result.precision == 1
        assert result.recall < 0.05

    def test_radius_leaves_out_the_point_itself(self):
        line = torch.tensor([[0.0], [1.0], [3.0], [7.0], [20.0]])
        assert manifold_radii(Points(line, "cpu"), 1).tolist() == [1, 1, 4, 16, 169]
        assert manifold_radii(Points(line, "cpu"), 3).tolist() == [49, 36, 16, 49, 361]

    def test_radii_over_many_blocks(self, monkeypatch):
        """Each block of distances serves both of its sides."""
        x = self.features(300, 9)
        expected = torch.cdist(x.double(), x.double()).square().sort(dim=1).values[:, 3]
        monkeypatch.setattr(pr_module, "BLOCK", 64)
        assert manifold_radii(Points(x, "cpu"), 3).double() == approx(expected, rel=1e-4)

    def test_blocks_do_not_show(self, monkeypatch):
        real, gen = self.features(200, 7), self.features(150, 8)
        whole = precision_recall(real, gen)
        for block in (37, 10):
            monkeypatch.setattr(pr_module, "BLOCK", block)
            assert precision_recall(real, gen) == whole

    def test_wrong_inputs(self):
        with pytest.raises(UserError, match="more than 3"):
            precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
        with pytest.raises(UserError, match="float16"):
            precision_recall(torch.full([5, 2], 1e6), torch.zeros(9, 2))

#----------------------------------------------------------------------------

def test_accuracy():
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0, 0])) == 0.75
