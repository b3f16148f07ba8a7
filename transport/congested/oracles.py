# SPDX-License-Identifier: Apache-2.0
"""Congested transport in closed form: pairs of laws on the line, and pairs of rotation-invariant laws.

The maximum over critics u of E u(x) - E u(y) - Lam E_sigma (|grad u| - 1)_+^2, with sigma the law of (1-T)x + Ty, is
the least cost P of a flow w from x to y, div w = law(x) - law(y), at the price |w| + |w|^2 / (4 Lam sigma) (Milne &
Nachman, "Wasserstein GANs with Gradient Penalty Compute Congested Transport", 2022, arXiv 2109.00528). With one
variable there is one flow, and everything is an integral: with m = F_y - F_x

    u' = sign(m) (1 + |m| / (2 Lam sigma)),   w = -m,   P = W1 + C / (4 Lam),   W1 = int |m|,   C = int m^2 / sigma.

The same holds for rotation-invariant laws with the radius as the variable: m of the radii's distribution functions, and
for sigma the density of |(1-T)x + Ty|.
"""
import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
import scipy.special
from scipy.integrate import quad

from dnnlib import UserError
from transport.common.critics import check_lamb

TAILS = 10.0        # Standard deviations of a Gaussian that are integrated over.
Curve = Callable[[float], float]

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Exact:
    """The solution in one variable r: a point of the line, or a radius."""

    gap: Curve                          # m = F_y - F_x at r.
    density: Curve                      # sigma at r.
    low: float                          # m is zero, or as good as, outside [low, high].
    high: float
    breaks: tuple[float, ...] = ()      # Where m or sigma has a kink.

    @functools.cached_property
    def w1(self) -> float:
        """W1 of the two laws, in units of r."""
        return self._integral(lambda r: abs(self.gap(r)))

    @functools.cached_property
    def congestion(self) -> float:
        """C = int m^2 / sigma, in units of r squared."""
        return self._integral(self._congestion_at)

    def value(self, lamb: float) -> float:
        """P: what the best critic reaches with weight `lamb`."""
        return self.w1 + self.excess(lamb)

    def excess(self, lamb: float) -> float:
        """P - W1. At the optimum the penalty is as large, and E u(x) - E u(y) is W1 plus twice this."""
        check_lamb(lamb)
        return self.congestion / (4 * lamb)

    def slope(self, r: np.ndarray, lamb: float) -> np.ndarray:
        """u' of the best critic at each r; where m = 0 it is free up to 1, and 0 is returned."""
        check_lamb(lamb)
        m, sigma = self.at(r)
        slope: np.ndarray = np.sign(m) * (1 + np.abs(m) / (2 * lamb * sigma))
        return slope

    def value_of(self, slope: Callable[[np.ndarray], np.ndarray], lamb: float, points: int = 601) -> float:
        """What a critic reaches, from its slope at `points` even places: without noise, and at most P."""
        check_lamb(lamb)
        r = np.linspace(self.low, self.high, points)
        m, sigma = self.at(r)
        u = slope(r)
        return float(np.trapezoid(u * m - lamb * sigma * np.clip(np.abs(u) - 1, 0, None) ** 2, r))

    def at(self, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m, sigma) at each r."""
        return np.vectorize(self.gap, otypes=[float])(r), np.vectorize(self.density, otypes=[float])(r)

    def _congestion_at(self, r: float) -> float:
        m = self.gap(r)
        if m == 0:
            return 0.0
        sigma = self.density(r)
        return m * m / sigma if sigma > 0 else math.inf

    def _integral(self, function: Curve) -> float:
        edges = sorted({self.low, self.high, *(b for b in self.breaks if self.low < b < self.high)})
        return sum(_quad(function, a, b) for a, b in zip(edges, edges[1:], strict=False))


def extrapolate(lamb: np.ndarray, value: np.ndarray) -> tuple[float, float]:
    """(W1, C) of the line P = W1 + C / (4 Lam) that fits the values of P at two or more weights best.

    Exact where the flow does not depend on Lam (one variable); elsewhere P is concave in 1/Lam, and W1 comes out too
    large.

    Raises:
        UserError: fewer than two different weights.
    """
    for one in lamb:
        check_lamb(float(one))
    if len(np.unique(lamb)) < 2:
        raise UserError(f"Lam {lamb.tolist()}: extrapolation to W1 takes two different weights")
    slope, start = np.polyfit(0.25 / lamb, value, 1)
    return float(start), float(slope)

#----------------------------------------------------------------------------

def line_gaussians(mean_x: float, std_x: float, mean_y: float, std_y: float) -> Exact:
    """N(mean_x, std_x^2) to N(mean_y, std_y^2) on the line."""
    _check_positive(std_x=std_x, std_y=std_y)
    middle = (mean_x * std_y + mean_y * std_x) / (std_x + std_y)

    def gap(r: float) -> float:
        zx, zy = (r - mean_x) / std_x, (r - mean_y) / std_y
        if r < middle:
            return float(scipy.special.ndtr(zy) - scipy.special.ndtr(zx))
        return float(scipy.special.ndtr(-zx) - scipy.special.ndtr(-zy))     # 1 - F: no cancellation in the tail.

    def density(r: float) -> float:
        def at(t: float) -> float:
            var = ((1 - t) * std_x) ** 2 + (t * std_y) ** 2
            return math.exp(-0.5 * (r - mean_x - t * (mean_y - mean_x)) ** 2 / var) / math.sqrt(2 * math.pi * var)
        centre = 0.5 if mean_x == mean_y else (r - mean_x) / (mean_y - mean_x)
        return _over_t(at, centre)

    low = min(mean_x - TAILS * std_x, mean_y - TAILS * std_y)
    high = max(mean_x + TAILS * std_x, mean_y + TAILS * std_y)
    crossing = () if std_x == std_y else ((mean_x * std_y - mean_y * std_x) / (std_y - std_x),)
    return Exact(gap, density, low, high, (mean_x, mean_y, *crossing))



def radial_gaussians(dims: int, std_x: float, std_y: float) -> Exact:
    """N(0, std_x^2 I) to N(0, std_y^2 I) in `dims` dimensions; r is the radius."""
    _check_positive(dims=dims, std_x=std_x, std_y=std_y)
    half, spread = dims / 2, max(std_x, std_y)
    middle = math.sqrt(dims) * (std_x + std_y) / 2
    log_scale = (1 - half) * math.log(2) - math.lgamma(half)        # Scales the density of chi with `dims` degrees.

    def gap(r: float) -> float:
        qx, qy = (r / std_x) ** 2 / 2, (r / std_y) ** 2 / 2
        if r < middle:
            return float(scipy.special.gammainc(half, qy) - scipy.special.gammainc(half, qx))
        return float(scipy.special.gammaincc(half, qx) - scipy.special.gammaincc(half, qy))

    def density(r: float) -> float:
        def at(t: float) -> float:
            std = math.hypot((1 - t) * std_x, t * std_y)
            return math.exp(log_scale + (dims - 1) * math.log(r / std) - (r / std) ** 2 / 2) / std
        return _over_t(at, 0.5) if r > 0 else 0.0

    # A radius is near sqrt(dims) std, give or take std.
    smallest = max((math.sqrt(dims) - TAILS) * min(std_x, std_y), 0.0)
    return Exact(gap, density, smallest, (math.sqrt(dims) + TAILS) * spread,
                 (math.sqrt(dims) * std_x, math.sqrt(dims) * std_y))


def circles(radius_x: float, radius_y: float) -> Exact:
    """A circle to a smaller circle of the same centre in the plane, both uniform; r is the radius."""
    _check_positive(radius_y=radius_y)
    if radius_x <= radius_y:
        raise UserError(f"circles of radius {radius_x} and {radius_y}: the first must be the larger")
    total, difference = radius_x + radius_y, radius_x - radius_y

    def density(r: float) -> float:
        start = (radius_x - r) / total
        stop = min((radius_x + r) / total, (radius_x - r) / difference)

        def at(v: float) -> float:      # t = start + (stop - start) sin^2 v takes the singularities at both ends away.
            t = start + (stop - start) * math.sin(v) ** 2
            a, b = (1 - t) * radius_x, t * radius_y
            inner, outer = r * r - (a - b) ** 2, (a + b) ** 2 - r * r
            weight = (stop - start) * math.sin(2 * v)
            return weight * 2 * r / (math.pi * math.sqrt(inner * outer)) if inner > 0 and outer > 0 else 0.0
        return _quad(at, 0, math.pi / 2) if 0 < r < radius_x else 0.0

    return Exact(lambda r: 1.0 if radius_y < r < radius_x else 0.0, density, radius_y, radius_x)

#----------------------------------------------------------------------------

def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{name} {value}: must be a number above 0")


def _quad(function: Curve, low: float, high: float) -> float:
    return float(quad(function, low, high, epsabs=1e-12, epsrel=1e-9, limit=200)[0])


def _over_t(function: Curve, *breaks: float) -> float:
    """The integral over t from 0 to 1, because sigma is a mixture over t. `breaks` that lie outside are left out."""
    edges = [0.0, *sorted({b for b in breaks if 0 < b < 1}), 1.0]
    return sum(_quad(function, a, b) for a, b in zip(edges, edges[1:], strict=False))
