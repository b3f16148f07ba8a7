# SPDX-License-Identifier: Apache-2.0
"""SAN's three conditions on the heads of a live discriminator: direction, separability, injectivity.

A head is one scale of one backbone. Its logit at a position is, up to a factor, <omega, h(x)> (Takida et al., ICLR
2024, section 3):

* conditional: h is the output of the convolution `cls` (64 features per position), omega the unit vector of the class;
  every class has its own, and numbers are means over classes, weighted by their images;
* unconditional: h is the patch of the last map under the last layer's kernel, omega the kernel.

What is measured is what the training step sees: images blurred and augmented, heads normalised over micro-batches of
real and of generated images apart. Only spectral norm rests, whose power iteration would move the weights. Positions
are averaged before directions are compared (the direction's objective is linear in h), and are samples of their own
in slices, since the hinge is taken per position. Injectivity is about a function of one image, so heads use running
statistics there, and images are not augmented.

Nothing of the networks is changed, no global random number is drawn, and no process talks to another.
"""
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from torch_utils.images import from_uint8
from torch_utils.misc import evaluating
from training.data.randomness import CounterRNG, permutation
from training.dataset import ImageDataset, load_batches
from training.diffaug import NUM_UNIFORMS
from training.discriminators import san_conditions
from training.discriminators.heads import ScaleDisc
from training.discriminators.projected import ProjectedDiscriminator
from training.generator.synthesis import require_finite, synthesize
from training.networks_stylegan3 import Generator
from training.step.blur import blur

IMAGES_PER_CLASS = 32       # Where there are too many classes for so many of each, some classes are chosen.
MIN_IMAGES = 8              # Classes with fewer images are not counted.
MAX_VALUES = 1 << 23        # Numbers kept per head and side; if there are more, only some positions are kept.
MAX_PATCHES = 1024          # Patches per side in a search for the largest slice.
MAX_WIDTH = 256             # Features in that search; wider ones are searched in a random part of their span.
PAIR_IMAGES = 64            # So many real and as many generated images have their distances compared.
POINTS, TANGENTS = 4, 16    # Generated images, and directions of their latents, for the local measure.
STEP = 1e-2                 # Finite differences take this step, in units of a latent's standard deviation.
LEVELS = np.linspace(0, 1, 201)

#----------------------------------------------------------------------------
# Results.

@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings: how much is measured, and what the training step does to images."""

    num: int = 2048             # Images per side, at most those of the data.
    batch: int = 8              # Images over which heads normalise: the run's micro-batch.
    seed: int = 0
    blur_sigma: float = 0.0     # In pixels, as at this moment of the run.


@dataclasses.dataclass(frozen=True)
class Head:
    """The measurements of one head. Distances are in units of h, without SAN's scale and the gain of the logits."""

    name: str                   # <backbone>/<scale>; scale 0 is the shallowest.
    width: int                  # D: features of h.
    positions: int              # Logits per image.
    inner_product: float        # <omega, optimal direction>, in [-1, 1].
    floor: float                # What an optimal direction would read on as many images; 0: nothing stands out.
    gap: float                  # |E_real h - E_generated h|.
    separability: float         # S along omega: |mean difference| / W1, in [0, 1].
    separability_optimal: float     # S along the optimal direction.
    w1_learned: float           # W1 along omega; this and the next three are measured on halves, see `slices_of`.
    w1_optimal: float           # W1 along the optimal direction, estimated on the other half.
    w1_max: float               # max-ASW: the largest that a search found, on the other half.
    w1_floor: float             # What W1 along omega would read if both laws were equal.
    pair_ratio: float           # min over pairs |h(x) - h(y)| / |x - y|, over the ratio of typical distances.
    tangent_ratio: float        # Smallest |dh| / |dx| along the generator's images, over the same.
    quantiles: np.ndarray       # [2, len(LEVELS)]: of the slices along omega, real and generated.

    NUMBERS = ("inner_product", "floor", "gap", "separability", "separability_optimal", "w1_learned", "w1_optimal",
               "w1_max", "w1_floor", "pair_ratio", "tangent_ratio")

    def numbers(self) -> dict[str, float]:
        """The measurements that are single numbers."""
        return {name: getattr(self, name) for name in self.NUMBERS}


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The measurements of all heads."""

    heads: tuple[Head, ...]
    num: int                    # Images per side that were used.
    classes: int                # Classes that were counted; 1 without classes.

    def means(self) -> dict[str, float]:
        """Every number as its mean over heads, and the share of max-ASW that the learned directions see."""
        found = {name: float(np.mean([getattr(head, name) for head in self.heads])) for name in Head.NUMBERS}
        shares = [head.w1_learned / head.w1_max for head in self.heads if head.w1_max > 0]
        return found | {"w1_share": float(np.mean(shares)) if shares else 1.0}

    def scalars(self) -> dict[str, float]:
        """For curves: 'Diagnosis/<number>', the mean over heads, and 'Diagnosis/<number>/<backbone>/<scale>'."""
        by_head = {f"Diagnosis/{key}/{head.name}": value for head in self.heads
                   for key, value in head.numbers().items()}
        return {f"Diagnosis/{key}": value for key, value in self.means().items()} | by_head

    def record(self) -> dict[str, Any]:
        """The diagnosis as plain values, which go to JSON."""
        heads = [{"head": h.name, "width": h.width, "positions": h.positions} | h.numbers() for h in self.heads]
        return {"num": self.num, "classes": self.classes} | self.means() | {"heads": heads}

#----------------------------------------------------------------------------
# Modes of the heads. Both functions restore modes and buffers, also after an error.

@contextlib.contextmanager
def _unchanged(D: ProjectedDiscriminator) -> Iterator[None]:
    """Put D into eval mode for the block; afterwards all buffers of the heads have the values that they had."""
    before = [(buffer, buffer.clone()) for buffer in D.discriminators.buffers()]
    with evaluating(D):
        try:
            yield
        finally:
            for buffer, value in before:
                buffer.copy_(value)


@contextlib.contextmanager
def as_in_training(D: ProjectedDiscriminator) -> Iterator[None]:
    """Heads normalise over a forward's images, as in training; singular vectors stay. State is restored."""
    with _unchanged(D):
        for module in D.discriminators.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.training = True
        yield


def heads_of(D: ProjectedDiscriminator) -> dict[str, tuple[str, int, ScaleDisc]]:
    """Name -> (backbone, scale, the head), in the order of the logits."""
    return {f"{key}/{scale}": (key, scale, disc) for key, multi in D.heads_by_backbone().items()
            for scale, disc in enumerate(multi.scales())}


def patches(D: ProjectedDiscriminator, img: torch.Tensor, augment: torch.Tensor | None = None) -> list[torch.Tensor]:
    """h of every head, [N, positions, D], for images [N, 3, R, R] in [-1, 1]."""
    features = D.features(img, augment)
    return [disc.patches(features[key][scale]) for key, scale, disc in heads_of(D).values()]

#----------------------------------------------------------------------------
# Images.

def choose(dataset: ImageDataset, settings: Settings) -> np.ndarray:
    """Items to look at, in random order, int64 [count]; `count` is a multiple of the batch.

    With many classes only those are taken for which `num` leaves IMAGES_PER_CLASS each: of single images per class
    nothing could be said.

    Raises:
        UserError: there is not even one batch of images.
    """
    order = permutation(settings.seed, 0, len(dataset))
    if dataset.c_dim > 0:
        labels = dataset.labels[order]
        kinds, first = np.unique(labels, return_index=True)
        kinds = kinds[np.argsort(first)][:max(settings.num // IMAGES_PER_CLASS, 1)]     # In the order they come in.
        order = order[np.isin(labels, kinds)]
    count = min(settings.num, len(order)) // settings.batch * settings.batch
    if count == 0:
        raise UserError(f"{settings.num} of {len(order)} images do not make a batch of {settings.batch}: take at "
                        f"least {settings.batch} per side")
    return order[:count]


@dataclasses.dataclass
class Samples:
    """Features of one head. Generated image i has the class of real image i, so classes are of equal size."""

    mean: list[torch.Tensor]    # Real, generated: h averaged over positions, [N, D].
    kept: list[torch.Tensor]    # h at positions, [N, K, D], K <= positions.
    positions: int


def _image_batches(G: Generator, dataset: ImageDataset, settings: Settings, items: np.ndarray,
                   device: torch.device) -> Iterator[tuple[list[torch.Tensor], np.ndarray]]:
    """([real, generated] images [batch, 3, R, R] in about [-1, 1], their positions)."""
    rng, parts = CounterRNG(settings.seed), np.split(items, len(items) // settings.batch)
    for index, (pixels, labels) in enumerate(load_batches(dataset, parts)):
        positions = np.arange(index * settings.batch, (index + 1) * settings.batch)
        z = torch.from_numpy(rng.normal("diagnose/z", positions, (G.z_dim,)))
        fake = synthesize(G, z, labels)
        require_finite(torch.isfinite(fake).all())
        yield [from_uint8(pixels.to(device)), fake.to(torch.float32)], positions


def _augmentation(D: ProjectedDiscriminator, seed: int, side: int, positions: np.ndarray,
                  device: torch.device) -> torch.Tensor | None:
    if not D.config.diffaug:
        return None
    shape = (len(D.backbone_names), NUM_UNIFORMS)
    u = CounterRNG(seed).uniform(f"diagnose/augment/{side}", positions, shape)
    return torch.from_numpy(u.transpose(1, 0, 2).copy()).to(device)


@torch.no_grad()
def collect(G: Generator, D: ProjectedDiscriminator, dataset: ImageDataset, settings: Settings,
            items: np.ndarray) -> dict[str, Samples]:
    """Features of every head, taken as in training."""
    names, device = list(heads_of(D)), next(G.parameters()).device
    store = torch.device("cpu") if device.type == "mps" else device     # Measures are in double precision.
    means: list[tuple[list[torch.Tensor], ...]] = [([], []) for _ in names]
    kept: list[tuple[list[torch.Tensor], ...]] = [([], []) for _ in names]
    counts = [0] * len(names)
    with as_in_training(D):
        for images, positions in _image_batches(G, dataset, settings, items, device):
            for side, img in enumerate(images):
                augment = _augmentation(D, settings.seed, side, positions, device)
                for k, h in enumerate(patches(D, blur(img, settings.blur_sigma), augment)):
                    counts[k] = h.shape[1]
                    few = max(min(MAX_VALUES // (len(items) * h.shape[2]), h.shape[1]), 1)
                    chosen = torch.linspace(0, h.shape[1] - 1, few).round().long()
                    means[k][side].append(h.mean(dim=1).to(store))
                    kept[k][side].append(h[:, chosen].to(store))
    return {name: Samples([torch.cat(x) for x in means[k]], [torch.cat(x) for x in kept[k]], counts[k])
            for k, name in enumerate(names)}

#----------------------------------------------------------------------------
# Directions and slices.

def _spread_out(h: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Positions of these images as samples for a search: [n * K, D], at most MAX_PATCHES spread over them."""
    x = h[rows].flatten(0, 1)
    return x[:: -(-len(x) // MAX_PATCHES)]


def _narrowed(real: torch.Tensor, fake: torch.Tensor, keep: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns [D, <= MAX_WIDTH]: all of R^D, or `keep` [D, k] and a random part of the samples' span."""
    both = torch.cat([real, fake]).to(torch.float64)
    if both.shape[1] <= MAX_WIDTH:
        return torch.eye(both.shape[1], dtype=torch.float64, device=both.device)
    mix = torch.randn([len(both), MAX_WIDTH - keep.shape[1]], generator=generator, dtype=torch.float64).to(both)
    basis: torch.Tensor = torch.linalg.qr(torch.cat([keep, (both - both.mean(dim=0)).T @ mix], dim=1))[0]
    return basis


def searched_direction(real: torch.Tensor, fake: torch.Tensor, omega: torch.Tensor,
                       generator: torch.Generator) -> torch.Tensor:
    """The direction in which a search finds the largest W1 between samples [N, D] and [M, D]: a unit vector [D]."""
    keep = torch.stack([san_conditions.unit(omega), san_conditions.optimal_direction(real, fake)], dim=1)
    basis = _narrowed(real, fake, keep, generator)
    inside = [x.to(torch.float64) @ basis for x in (real, fake)]
    found = san_conditions.max_asw(inside[0], inside[1], (san_conditions.unit(omega) @ basis)[None],
                                   generator=generator, random_starts=2, steps=24)
    return san_conditions.unit(basis @ found.direction)


def slices_of(samples: Samples, rows: torch.Tensor, omega: torch.Tensor,
              generator: torch.Generator) -> dict[str, float]:
    """W1 along the learned direction omega, the optimal one and the largest that a search finds, for some images.

    Directions that come from samples fit these too well, so they come from one half of the images and W1 is measured on
    the other half, both ways; all four numbers are measured so. The floor mixes real and generated images as a whole,
    since positions of an image are alike.
    """
    found = {"w1_learned": 0.0, "w1_optimal": 0.0, "w1_max": 0.0, "w1_floor": 0.0}
    halves = rows[0::2], rows[1::2]
    for fit, held in (halves, halves[::-1]):
        real, fake = (h[held].flatten(0, 1) for h in samples.kept)
        optimal = san_conditions.optimal_direction(*(mean[fit] for mean in samples.mean))
        some_real, some_fake = (_spread_out(h, fit) for h in samples.kept)
        searched = searched_direction(some_real, some_fake, omega, generator)
        w1 = [san_conditions.slice_along(w, real, fake).w1 for w in (omega, optimal, searched)]
        both = torch.cat([h[held] for h in samples.kept])[torch.randperm(2 * len(held), generator=generator)]
        mixed = [x.flatten(0, 1) for x in both.split(len(held))]
        values = (*w1[:2], max(w1), san_conditions.slice_along(omega, *mixed).w1)
        found = {name: total + value / 2 for (name, total), value in zip(found.items(), values, strict=True)}
    return found


def conditions_of(samples: Samples, rows: torch.Tensor, omega: torch.Tensor,
                  generator: torch.Generator) -> dict[str, float]:
    """Direction and separability of one direction omega [D], on the images `rows` [n] of both sides."""
    real, fake = (mean[rows] for mean in samples.mean)
    direction = san_conditions.direction_optimality(omega, real, fake)
    values = [h[rows].flatten(0, 1) for h in samples.kept]
    learned = san_conditions.slice_along(omega, *values)
    optimal = san_conditions.slice_along(san_conditions.optimal_direction(real, fake), *values)
    return {"inner_product": direction.inner_product, "floor": direction.floor, "gap": direction.gap,
            "separability": learned.separability, "separability_optimal": optimal.separability,
            **slices_of(samples, rows, omega, generator)}


def _quantiles(samples: Samples, rows: list[torch.Tensor], omegas: list[torch.Tensor]) -> np.ndarray:
    """The quantiles of <omega, h> over all classes, each along its own direction: [2, len(LEVELS)]."""
    sides = []
    for h in samples.kept:
        values = [h[r].flatten(0, 1).to(torch.float64) @ san_conditions.unit(w)
                  for r, w in zip(rows, omegas, strict=True)]
        sides.append(np.quantile(torch.cat(values).cpu().numpy(), LEVELS))
    return np.stack(sides)


def weighted_mean(parts: list[dict[str, float]], weights: list[int]) -> dict[str, float]:
    """Every number as its mean over parts, weighted."""
    return {name: float(np.average([part[name] for part in parts], weights=weights)) for name in parts[0]}

#----------------------------------------------------------------------------
# Injectivity.

def smallest_stretch(dx: torch.Tensor, dh: torch.Tensor) -> float:
    """min over v of |dh^T v| / |dx^T v|: how little features move where images move.

    Args:
        dx, dh: Derivatives of an image and of its features along k directions, [k, ...] each. Directions along which
            the image does not move do not count.
    """
    dx, dh = (d.flatten(1).to(torch.float64) for d in (dx, dh))
    powers, axes = torch.linalg.eigh(dx @ dx.T)
    moving = powers > 1e-6 * powers[-1]
    axes = axes[:, moving] / powers[moving].sqrt()
    return float(torch.linalg.eigvalsh(axes.T @ (dh @ dh.T) @ axes)[0].clamp_min(0).sqrt())


@torch.no_grad()
def injectivity(G: Generator, D: ProjectedDiscriminator, dataset: ImageDataset, settings: Settings,
                items: np.ndarray) -> dict[str, dict[str, float]]:
    """pair_ratio and tangent_ratio of every head; h is a head's whole map.

    Both are over the ratio of spreads of h and of x, so that 1 says: no two images are nearer in h than a typical pair.
    """
    device = next(G.parameters()).device
    few = items[:max(PAIR_IMAGES // settings.batch, 1) * settings.batch]
    store = torch.device("cpu") if device.type == "mps" else device
    names, images, features = list(heads_of(D)), [], []
    with _unchanged(D):
        for pair, _ in _image_batches(G, dataset, settings, few, device):
            for img in pair:
                img = blur(img, settings.blur_sigma)
                images.append(img.to(store))
                features.append([h.flatten(1).to(store) for h in patches(D, img)])
        x, maps = torch.cat(images), [torch.cat(parts) for parts in zip(*features, strict=True)]
        stretches = _tangents(G, D, settings, dataset.labels[few], store)
    found = {}
    for name, h, stretch in zip(names, maps, stretches, strict=True):
        unit = san_conditions.spread(x) / max(san_conditions.spread(h), san_conditions.TINY)
        found[name] = {"pair_ratio": san_conditions.min_pair_ratio(x, h) * unit, "tangent_ratio": stretch * unit}
    return found


def _tangents(G: Generator, D: ProjectedDiscriminator, settings: Settings, labels: np.ndarray,
              store: torch.device) -> list[float]:
    """Per head the median over POINTS of the smallest stretch in a random TANGENTS-dimensional part of the tangent."""
    rng, found = CounterRNG(settings.seed), []
    for point in range(min(POINTS, len(labels))):
        z = torch.from_numpy(rng.normal("diagnose/point", [point], (G.z_dim,)))
        probes = rng.normal("diagnose/tangent", [point], (G.z_dim, min(TANGENTS, G.z_dim)))[0]
        steps = STEP * torch.linalg.qr(torch.from_numpy(probes))[0].T
        classes = torch.full([2 * len(steps)], int(labels[point]))
        img = synthesize(G, torch.cat([z + steps, z - steps]), classes, precision="fp32")
        img = blur(img, settings.blur_sigma)
        dx, *dhs = (torch.sub(*y.to(store).to(torch.float64).chunk(2)) for y in (img, *patches(D, img)))
        found.append([smallest_stretch(dx, dh) for dh in dhs])
    return [float(value) for value in np.median(found, axis=0)]

#----------------------------------------------------------------------------

def diagnose(G: Generator, D: ProjectedDiscriminator, dataset: ImageDataset, settings: Settings) -> Diagnosis:
    """Measure every head of `D` between real images and those of `G`.

    Args:
        G: The generator that D plays against; G_ema is another one, whose images D was not trained on.
        D: On G's device.
        dataset: Its images have G's size and classes.

    Raises:
        UserError: too few images for a batch, or for any class; images of G that are not finite.
    """
    items = choose(dataset, settings)
    labels = torch.from_numpy(dataset.labels[items])
    counts = torch.bincount(labels)
    kinds = [k for k in range(len(counts)) if counts[k] >= MIN_IMAGES]
    if not kinds:
        raise UserError(f"--num={settings.num}: no class has {MIN_IMAGES} of these {len(items)} images: take more, or "
                        "a data set with more images per class")
    collected = collect(G, D, dataset, settings, items)
    injective = injectivity(G, D, dataset, settings, items)
    heads = []
    for name, (_, _, disc) in heads_of(D).items():
        samples = collected.pop(name)
        directions = disc.directions().detach().to(samples.mean[0].device)
        generator = torch.Generator().manual_seed(settings.seed)
        rows = [torch.nonzero(labels == k)[:, 0] for k in kinds]
        omegas = [directions[k] for k in kinds]
        parts = [conditions_of(samples, r, w, generator) for r, w in zip(rows, omegas, strict=True)]
        heads.append(Head(name=name, width=directions.shape[1], positions=samples.positions,
                          quantiles=_quantiles(samples, rows, omegas), **injective[name],
                          **weighted_mean(parts, [len(r) for r in rows])))
    return Diagnosis(tuple(heads), len(items), len(kinds))


def training_diagnosis(dataset: ImageDataset, num: int, batch: int,
                       seed: int) -> Callable[[Generator, ProjectedDiscriminator, float], dict[str, float]]:
    """A function for the training loop: (G, D, blur sigma) -> numbers by the names of their curves."""
    def measure(G: Generator, D: ProjectedDiscriminator, sigma: float) -> dict[str, float]:
        return diagnose(G, D, dataset, Settings(num, batch, seed, sigma)).scalars()

    return measure
