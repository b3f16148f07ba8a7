# SPDX-License-Identifier: Apache-2.0
"""SAN's three conditions on a discriminator <w, h(x)>, measured on features: pure functions of samples.

Takida et al. (ICLR 2024) call a discriminator metrizable if its direction w is optimal, its slice separable and its
features h injective. Features are [N, D] tensors of real and of generated samples; everything is computed in double
precision, on the device of the features. For the saturating, non-saturating and least-squares losses the optimal
direction depends on a weight r(f) per sample; without weights it is the plain one.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from dnnlib import UserError

TINY = 1e-300       # Keeps ratios of exact zeros finite in double precision.

#----------------------------------------------------------------------------
# Direction optimality.

class Direction(NamedTuple):
    """How near a direction is to the optimal one."""

    inner_product: float    # <w/|w|, optimal direction>, in [-1, 1].
    gap: float              # |E_0 h - E_theta h| as measured.
    floor: float            # What an optimal direction would read on as many samples: see `noise_floor`.


def _features(h: torch.Tensor, name: str) -> torch.Tensor:
    if h.ndim != 2 or len(h) < 2:
        raise UserError(f"{name} features of shape {list(h.shape)}: expected [N, D] with at least two samples")
    return h.detach().to(torch.float64)


def _shares(h: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """Weights [N] that sum to one."""
    if weight is None:
        return torch.full([len(h)], 1 / len(h), dtype=torch.float64, device=h.device)
    weight = weight.detach().to(torch.float64)
    shares: torch.Tensor = weight / weight.sum().clamp_min(TINY)
    return shares


def mean_difference(real: torch.Tensor, fake: torch.Tensor, real_weight: torch.Tensor | None = None,
                    fake_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Delta_h = E_0 h - E_theta h, or with weights [N] >= 0 the difference of the two weighted means.

    Each side's weights are normalised by themselves, so a vector added to all features changes nothing.

    Args:
        real: [N, D].
        fake: [M, D].

    Returns:
        [D].

    Raises:
        UserError: features that are not [N, D] with N >= 2.
    """
    real, fake = _features(real, "real"), _features(fake, "generated")
    return _shares(real, real_weight) @ real - _shares(fake, fake_weight) @ fake


def unit(vector: torch.Tensor) -> torch.Tensor:
    """[..., D] in double precision at length one; a zero vector stays zero."""
    vector = vector.detach().to(torch.float64)
    scaled: torch.Tensor = vector / vector.norm(dim=-1, keepdim=True).clamp_min(TINY)
    return scaled


def optimal_direction(real: torch.Tensor, fake: torch.Tensor, real_weight: torch.Tensor | None = None,
                      fake_weight: torch.Tensor | None = None) -> torch.Tensor:
    """Delta_h / |Delta_h|, where <w, Delta_h> is largest among unit vectors: [D]. Arguments as `mean_difference`."""
    return unit(mean_difference(real, fake, real_weight, fake_weight))


def inner_product(w: torch.Tensor, direction: torch.Tensor) -> float:
    """Cosine of the angle between two vectors [D]."""
    return float(unit(w) @ unit(direction).to(w.device))


def noise_floor(gap: float, variance: float) -> float:
    """The inner product that an optimal direction reads against an estimate from samples: 1/sqrt(1 + variance/gap^2).

    Args:
        gap: |Delta_h|, the true one.
        variance: E |estimate of Delta_h - Delta_h|^2: tr(Sigma_0)/N + tr(Sigma_theta)/M.
    """
    return math.sqrt(gap ** 2 / max(gap ** 2 + variance, TINY))


def estimation_variance(h: torch.Tensor, weight: torch.Tensor | None = None) -> float:
    """E |weighted mean of h - its expectation|^2: tr(Sigma)/N without weights.

    With weights to first order, sum_i p_i^2 |h_i - mean|^2 with shares p_i.
    """
    h = _features(h, "given")
    share = _shares(h, weight)
    squares = (h - share @ h).square().sum(dim=1)
    return float((share.square() * squares).sum() * len(h) / (len(h) - 1))


def direction_optimality(w: torch.Tensor, real: torch.Tensor, fake: torch.Tensor,
                         real_weight: torch.Tensor | None = None,
                         fake_weight: torch.Tensor | None = None) -> Direction:
    """The inner product of w [D] (any length) with the optimal direction, and what it could read at best.

    A squared gap estimated from samples is too large by the estimate's variance; the floor corrects for that. It is 0
    where the gap does not stand out of the noise at all.
    """
    delta = mean_difference(real, fake, real_weight, fake_weight)
    variance = estimation_variance(real, real_weight) + estimation_variance(fake, fake_weight)
    gap = float(delta.norm())
    floor = noise_floor(max(gap ** 2 - variance, 0) ** 0.5, variance)
    return Direction(inner_product(w, delta), gap, floor)

#----------------------------------------------------------------------------
# Separability, and slices.

def slice_w1(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """W1 along every slice: values [N, K] and [M, K] -> [K], with its gradient.

    The area between the empirical distribution functions, by sorting; for N = M the mean |difference| of sorted values.
    """
    values, order = torch.cat([real, fake]).sort(dim=0)
    steps = torch.cat([real.new_full([len(real)], 1 / len(real)), fake.new_full([len(fake)], -1 / len(fake))])
    above = steps[order].cumsum(dim=0)[:-1]         # F - G between one value and the next.
    return (above.abs() * values.diff(dim=0)).sum(dim=0)


class Slice(NamedTuple):
    """Two laws seen along one direction."""

    direction: torch.Tensor     # [D], of length one.
    mean_difference: float      # <direction, Delta_h>, signed.
    w1: float
    separability: float         # |mean difference| / W1, in [0, 1]; 1 if the distribution functions never cross.


def slice_along(direction: torch.Tensor, real: torch.Tensor, fake: torch.Tensor) -> Slice:
    """Mean difference, W1 and separability S along a direction [D] of any length.

    S = 1 says that one law dominates the other (Takida et al., the condition of separability), because
    W1 - |mean difference| = 2 min(int (F - G)_+, int (F - G)_-). Two equal slices have S = 1.
    """
    direction = unit(direction)
    f0, f1 = _features(real, "real") @ direction, _features(fake, "generated") @ direction
    difference, w1 = float(f0.mean() - f1.mean()), float(slice_w1(f0[:, None], f1[:, None]))
    return Slice(direction, difference, w1, min(abs(difference) / w1, 1.0) if w1 > 0 else 1.0)


def max_asw(real: torch.Tensor, fake: torch.Tensor, starts: torch.Tensor | None = None, *,
            generator: torch.Generator | None = None, random_starts: int = 8, steps: int = 60) -> Slice:
    """The slice with the largest W1: max-ASW_h, searched from several directions at once.

    A search: the result is a lower bound, never below the starts. It begins at the optimal direction, at the principal
    axes of both laws, at `starts` and at random, and climbs along the sphere with a step that halves.

    Args:
        real, fake: [N, D], [M, D].
        starts: More directions to begin at, [K, D]: the learned one.
        generator: On the CPU, for the random starts; default: seed 0.
    """
    real, fake = _features(real, "real"), _features(fake, "generated")
    w = unit(_search_starts(real, fake, starts, generator, random_starts))
    w1 = slice_w1(real @ w.T, fake @ w.T)
    best, direction, step = w1.clone(), w.clone(), 0.5
    for index in range(steps):
        with torch.enable_grad():
            w.requires_grad_()
            total = slice_w1(real @ w.T, fake @ w.T).sum()
            (grad,) = torch.autograd.grad(total, w)
        w = w.detach()
        tangent = grad - (grad * w).sum(dim=1, keepdim=True) * w
        w = unit(w + step * unit(tangent))
        w1 = slice_w1(real @ w.T, fake @ w.T)
        better = w1 > best
        best, direction = torch.where(better, w1, best), torch.where(better[:, None], w, direction)
        if index % 4 == 3:
            w, step = direction.clone(), step / 2
    return slice_along(direction[best.argmax()], real, fake)


def _search_starts(real: torch.Tensor, fake: torch.Tensor, starts: torch.Tensor | None,
                   generator: torch.Generator | None, count: int) -> torch.Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    width = real.shape[1]
    axes = min(width, 4)
    parts = [optimal_direction(real, fake)[None]]
    for h in (real, fake):
        parts.append(torch.linalg.eigh(torch.cov(h.T).reshape(width, width)).eigenvectors.T[-axes:])
    parts.append(torch.randn([count, width], generator=generator, dtype=torch.float64).to(real.device))
    if starts is not None:
        parts.append(starts.detach().to(real))
    return torch.cat(parts)


def w1_floor(real: torch.Tensor, fake: torch.Tensor, direction: torch.Tensor, generator: torch.Generator,
             repeats: int = 10) -> float:
    """What W1 along a direction [D] reads between samples of one law: the mean after mixing both sides.

    Args:
        generator: On the CPU, for the mixing.
    """
    direction = unit(direction)
    values = torch.cat([_features(real, "real") @ direction, _features(fake, "generated") @ direction])
    orders = [torch.randperm(len(values), generator=generator) for _ in range(repeats)]
    mixed = torch.stack([values[order.to(values.device)] for order in orders], dim=1)
    return float(slice_w1(mixed[:len(real)], mixed[len(real):]).mean())

#----------------------------------------------------------------------------
# Injectivity of h. SAN's paper gives no number for it; these three are our own.

def jacobians(h: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """dh/dx at every sample: [N, D, d] for x [N, d] or [N, ...]. One backward pass per feature.

    h must treat samples apart (no batch statistics), or the sum over samples mixes them.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        features = h(x)
        rows = [torch.autograd.grad(features[:, i].sum(), x, retain_graph=True)[0].flatten(1)
                for i in range(features.shape[1])]
    return torch.stack(rows, dim=1)


def smallest_singular_values(jacobian: torch.Tensor) -> torch.Tensor:
    """[N, D, d] -> [N]: how little h may move when x moves by one. 0 where h has fewer features than x has numbers."""
    if jacobian.shape[1] < jacobian.shape[2]:
        return torch.zeros(len(jacobian), dtype=torch.float64, device=jacobian.device)
    values: torch.Tensor = torch.linalg.svdvals(jacobian.detach().to(torch.float64))
    return values[:, -1]


def spread(x: torch.Tensor) -> float:
    """Root of the mean squared distance from the mean, of samples [N, ...]."""
    flat = x.detach().flatten(1).to(torch.float64)
    return float((flat - flat.mean(dim=0)).square().sum(dim=1).mean().sqrt())


def min_pair_ratio(x: torch.Tensor, h: torch.Tensor) -> float:
    """min over pairs of |h(x) - h(y)| / |x - y|: 0 if h gives two samples the same features.

    Args:
        x: [N, ...], the samples; equal ones are left out.
        h: [N, D], their features. Memory grows with N^2: a few thousand samples.

    Raises:
        UserError: no two samples differ.
    """
    exact = "donot_use_mm_for_euclid_dist"      # Products of large numbers lose small distances.
    flat = x.detach().flatten(1).to(torch.float64)
    between = torch.cdist(flat, flat, compute_mode=exact)
    features = _features(h, "given")
    ratio = torch.cdist(features, features, compute_mode=exact)[between > 0] / between[between > 0]
    if ratio.numel() == 0:
        raise UserError(f"{len(x)} samples: injectivity takes two that differ")
    return float(ratio.min())


def decoder_error(x: torch.Tensor, h: torch.Tensor, generator: torch.Generator, *, width: int = 128,
                  steps: int = 600) -> float:
    """The share of the variance of x that a small network cannot recover from h, on held-out samples.

    Near 0: the samples can be read off their features. 1: nothing can. It is an upper bound, since a better decoder may
    exist. Every second sample trains, the others are held out.

    Args:
        x: [N, ...], the samples, in random order.
        h: [N, D], their features.
        generator: On the CPU: weights and batches.
    """
    target, features = x.detach().flatten(1).to(torch.float32), h.detach().to(torch.float32)
    features = (features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-6)
    mean, spread = target.mean(dim=0), target.std().clamp_min(1e-12)
    target = (target - mean) / spread
    net = torch.nn.Sequential(torch.nn.Linear(features.shape[1], width), torch.nn.SiLU(),
                              torch.nn.Linear(width, width), torch.nn.SiLU(),
                              torch.nn.Linear(width, target.shape[1])).to(target.device)
    with torch.no_grad():
        for parameter in net.parameters():
            bound = parameter.shape[-1] ** -0.5
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * bound)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    known = torch.arange(0, len(target), 2, device=target.device)
    with torch.enable_grad():
        for _ in range(steps):
            index = known[torch.randint(len(known), [256], generator=generator).to(known.device)]
            loss = (net(features[index]) - target[index]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        error = (net(features[1::2]) - target[1::2]).square().sum()
        return float(error / (target[1::2] - target[1::2].mean(dim=0)).square().sum().clamp_min(1e-12))
