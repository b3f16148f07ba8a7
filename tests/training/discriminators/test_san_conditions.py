"""SAN's conditions on laws for which they are known."""
import math

import numpy as np
import pytest
import scipy.stats
import torch

from dnnlib import UserError
from tests.closeness import approx, assert_close
from training.discriminators import san_conditions
from transport.common.study import seeded

pytestmark = pytest.mark.numeric


def normal_quantiles(count: int) -> torch.Tensor:
    """A sample [N] of the standard normal law without noise, of variance one."""
    q = scipy.stats.norm.ppf((np.arange(count) + 0.5) / count)
    return torch.as_tensor(q / q.std())


def column(x: torch.Tensor) -> torch.Tensor:
    return x[:, None]


def test_two_normal_laws_of_one_mean():
    q = normal_quantiles(100_001)
    line = san_conditions.slice_along(torch.ones(1), column(q), column(2 * q))
    assert line.mean_difference == approx(0, abs=1e-9)
    assert line.w1 == pytest.approx(math.sqrt(2 / math.pi), abs=1e-3)
    assert line.separability == approx(0, abs=1e-9)

    q = normal_quantiles(4001)
    real, fake = torch.stack([2 * q, 4 * q ** 2], dim=1), torch.stack([q, q ** 2], dim=1)
    assert san_conditions.mean_difference(real, fake).norm().item() == pytest.approx(3, abs=1e-3)
    optimal = san_conditions.optimal_direction(real, fake)
    assert_close(optimal, torch.tensor([0.0, 1], dtype=torch.float64), atol=1e-6, rtol=0)
    along = san_conditions.slice_along(optimal, real, fake)
    assert along.w1 == pytest.approx(3, abs=1e-3)
    assert along.separability == approx(1, abs=1e-9)
    best = san_conditions.max_asw(real, fake, random_starts=1)
    assert best.w1 == pytest.approx(3, abs=1e-3)
    assert best.w1 >= along.w1


def test_optimal_in_mean_is_not_optimal_in_w1():
    q = normal_quantiles(4001)
    real = torch.stack([torch.ones_like(q), 10 * q], dim=1)
    fake = torch.stack([torch.zeros_like(q), q], dim=1)
    optimal = san_conditions.optimal_direction(real, fake)
    along = san_conditions.slice_along(optimal, real, fake)
    assert san_conditions.mean_difference(real, fake).norm().item() == approx(1, abs=1e-9)
    assert along.separability == approx(1, abs=1e-9)
    assert along.w1 == approx(1, abs=1e-9)
    best = san_conditions.max_asw(real, fake, random_starts=1)
    assert best.w1 == pytest.approx(7.180961, abs=1e-3)
    assert abs(best.direction[1].item()) > 0.99999
    assert best.separability < 0.01


@pytest.mark.parametrize(("count", "repeats", "mean", "formula"),
                         [(1000, 100, 0.180, 0.194), (10_000, 20, 0.526, 0.530), (100_000, 1, 0.891, 0.892)])
def test_noise_floor(count, repeats, mean, formula):
    width, gap = 128, 0.1
    assert san_conditions.noise_floor(gap, 2 * width / count) == pytest.approx(formula, abs=1e-3)
    w, draws = torch.zeros(width), seeded(0, f"floor{count}")
    w[0] = gap
    readings = []
    for _ in range(repeats):
        real, fake = (torch.randn(count, width, generator=draws) for _ in range(2))
        readings.append(san_conditions.direction_optimality(w, real + w, fake))
    assert np.mean([r.inner_product for r in readings]) == pytest.approx(mean, abs=0.03)
    if count == 100_000:                                # Smaller samples do not show the gap: the floor reads 0.
        assert readings[0].floor == pytest.approx(formula, abs=0.02)


def test_weights():
    real, fake = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[0.0, 0], [0, -2]])
    delta = san_conditions.mean_difference(real, fake, torch.tensor([3.0, 1]), torch.tensor([2.0, 0]))
    assert_close(delta, torch.tensor([0.75, 0.25], dtype=torch.float64), rtol=1e-7, atol=1e-7)
    many = torch.randn(5000, 3, generator=seeded(0, "h"))
    trace = torch.cov(many.T).trace().item()
    assert san_conditions.estimation_variance(many) == approx(trace / 5000, rel=1e-4)
    assert san_conditions.estimation_variance(many, torch.full([5000], 7.0)) == approx(trace / 5000, rel=1e-4)
    half = torch.arange(5000) % 2 == 0                  # Weights of zero leave samples out.
    assert san_conditions.estimation_variance(many, half.float()) == pytest.approx(trace / 2500, rel=0.05)


def test_w1_of_slices():
    draws = seeded(0, "w1")
    x, y = torch.randn(50, 3, generator=draws).double(), torch.randn(80, 3, generator=draws).double() + 1
    expected = [scipy.stats.wasserstein_distance(a, b) for a, b in zip(x.T.numpy(), y.T.numpy(), strict=True)]
    assert_close(san_conditions.slice_w1(x, y), expected, atol=1e-12, rtol=1e-7)
    floor = san_conditions.w1_floor(x, y, torch.ones(3), draws)
    assert 0 < floor < 0.5 * san_conditions.slice_along(torch.ones(3), x, y).w1
    equal = san_conditions.slice_along(torch.ones(3), x, x)
    assert (equal.w1, equal.separability) == (0, 1)


def test_search_begins_at_what_is_given():
    draws = seeded(0, "search")
    real, fake = torch.randn(300, 20, generator=draws), torch.randn(300, 20, generator=draws)
    fake[:, 7] *= 5
    learned = torch.eye(20)[7]
    best = san_conditions.max_asw(real, fake, learned[None], random_starts=1, steps=8)
    assert best.w1 >= san_conditions.slice_along(learned, real, fake).w1


def test_injectivity():
    draws = seeded(0, "injective")
    x, matrix = torch.randn(400, 2, generator=draws), torch.randn(5, 2, generator=draws)
    leaky = lambda x: torch.nn.functional.leaky_relu(x @ matrix.T, 0.1)
    folded = lambda x: x.abs()
    jacobian = san_conditions.jacobians(leaky, x)
    assert jacobian.shape == (400, 5, 2)
    slope = torch.where(x[0] @ matrix.T > 0, 1.0, 0.1)
    assert_close(jacobian[0], slope[:, None] * matrix, rtol=1.3e-6, atol=1e-5)
    values = san_conditions.smallest_singular_values(jacobian)
    assert values.min() >= 0.1 * torch.linalg.svdvals(matrix)[-1]       # A monotone activation keeps full rank.
    assert san_conditions.smallest_singular_values(torch.ones(3, 1, 2)).tolist() == [0, 0, 0]
    assert san_conditions.min_pair_ratio(x, leaky(x)) >= 0.1 * torch.linalg.svdvals(matrix)[-1].item()
    mirrored = torch.cat([x, -x])
    assert san_conditions.min_pair_ratio(mirrored, folded(mirrored)) == 0
    assert san_conditions.decoder_error(x, leaky(x), draws, steps=200) < 0.05
    assert san_conditions.decoder_error(x, folded(x), draws, steps=200) > 0.8


def test_mistakes():
    with pytest.raises(UserError, match=r"generated features of shape \[1, 2\].*at least two samples"):
        san_conditions.mean_difference(torch.zeros(3, 2), torch.zeros(1, 2))
    with pytest.raises(UserError, match="two that differ"):
        san_conditions.min_pair_ratio(torch.ones(3, 2), torch.ones(3, 2))
