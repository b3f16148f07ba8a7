# SPDX-License-Identifier: Apache-2.0
"""A linear probe: a linear classifier on a network's features, fitted to labelled real images, as a judge of others.

It is ridge regression of one column per class on standardised features, with an intercept; the predicted class is the
column with the largest value. The strength of the penalty is the one of `PENALTIES` whose leave-one-out error is
smallest, which has a closed form (Hastie, Tibshirani, Friedman, "The Elements of Statistical Learning", eq. 7.64), so
there is nothing to tune and nothing random. A fifth of every class is held out of the fit; how often those images are
classified correctly says how far the probe is to be believed.
"""
import dataclasses

import numpy as np
import torch

from dnnlib import UserError

PENALTIES = tuple(10.0 ** k for k in range(-5, 3))      # Per image.
ROUNDING = 1e-6         # Share of a feature that may differ between equal images: it is of single precision.
HELD_OUT = 5            # Each fifth image of a class, in a seeded order.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class LinearProbe:
    """Features [N, D] -> scores [N, C]."""

    mean: torch.Tensor      # float64 [D], and so on: of the images that it was fitted to.
    scale: torch.Tensor     # [D]
    weight: torch.Tensor    # [D, C]
    bias: torch.Tensor      # [C]
    penalty: float          # Per image.

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """float64 [N, C]; the largest tells the class."""
        return (features.double() - self.mean) / self.scale @ self.weight + self.bias

    def accuracy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """Share of the images whose predicted class is the label."""
        return float((self.scores(features).argmax(dim=1) == labels).double().mean())


@dataclasses.dataclass(frozen=True)
class ProbeAccuracy:
    """What a probe says of generated images, and what it is worth."""

    accuracy: float             # Of the generated images.
    held_out: float             # Of real images that it was not fitted to.
    num_fitted: int
    num_held_out: int
    penalty: float


def fit_probe(features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> LinearProbe:
    """The probe of features [N, D] and labels int64 [N], in float64."""
    x, y = features.double(), torch.nn.functional.one_hot(labels, num_classes).double()
    mean, scale = x.mean(dim=0), x.std(dim=0, correction=0)
    # Such a feature moves by rounding alone and says nothing. Its weight will be zero.
    scale[scale <= ROUNDING * mean.abs()] = 1
    x = (x - mean) / scale
    bias = y.mean(dim=0)
    # X = Z V^T with orthogonal columns of Z: every penalty is then a division.
    powers, directions = torch.linalg.eigh(x.T @ x)
    powers = powers.clamp_min(0)
    z = x @ directions
    target = z.T @ (y - bias)
    best: tuple[float, float] = (float("inf"), PENALTIES[0])
    for penalty in PENALTIES:
        inverse = 1 / (powers + penalty * len(x))
        # How much each image pulls its own prediction; 1/N is what the intercept does.
        leverage = 1 / len(x) + (z.square() * inverse).sum(dim=1)
        left_out = (y - bias - z @ (inverse[:, None] * target)) / (1 - leverage).clamp_min(1e-12)[:, None]
        best = min(best, (float(left_out.square().mean()), penalty))
    weight = directions @ (target / (powers + best[1] * len(x))[:, None])
    return LinearProbe(mean, scale, weight, bias, best[1])


def held_out_of(labels: np.ndarray, seed: int) -> np.ndarray:
    """Which images are held out, bool [N]: a fifth of each class, rounded down, a seeded choice."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    grouped = labels[by_class]
    rank = np.arange(len(labels)) - np.searchsorted(grouped, grouped)
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[by_class[rank % HELD_OUT == HELD_OUT - 1]] = True
    return held_out


def check_labels(labels: np.ndarray) -> None:
    """Raise UserError unless a probe can be fitted to images with these labels, and some be held out."""
    counts = np.bincount(labels)
    if np.count_nonzero(counts) < 2 or counts.max(initial=0) < HELD_OUT:
        raise UserError(f"a linear probe needs real images of two classes or more, and {HELD_OUT} of one of them, but "
                        f"of {len(labels)} real images the largest class has {counts.max(initial=0)}, and classes with "
                        f"images are {np.count_nonzero(counts)}: name a data set with more labelled images by --data")


def probe_accuracy(real: torch.Tensor, real_labels: np.ndarray, generated: torch.Tensor, labels: torch.Tensor,
                   seed: int = 0) -> ProbeAccuracy:
    """Fit a probe to four fifths of the real images; its accuracy on the others and on generated images.

    Args:
        real: Features of real images, [N, D].
        real_labels: Their classes, int64 [N].
        generated: Features of the images to be judged, [M, D].
        labels: The classes that they were made for, numbered as those of the real images; int64 [M].
        seed: Chooses the images that are held out.

    Raises:
        UserError: only one class, or so few images that none is held out.
    """
    check_labels(real_labels)
    held_out = held_out_of(real_labels, seed)
    test, targets = torch.from_numpy(held_out), torch.from_numpy(real_labels)
    probe = fit_probe(real[~test], targets[~test], int(real_labels.max()) + 1)
    return ProbeAccuracy(probe.accuracy(generated, labels), probe.accuracy(real[test], targets[test]),
                         int((~held_out).sum()), int(held_out.sum()), probe.penalty)
