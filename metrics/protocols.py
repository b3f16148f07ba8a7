# SPDX-License-Identifier: Apache-2.0
"""The names of the metrics. A name is a protocol: it fixes the detector, the numbers of images and the formula.

| protocol | what its names mean |
|---|---|
| stylegan | what they mean in StyleGAN3 and StyleGAN-XL: all real images as they are, ddof 0 |
| stylegan-legacy | the names without `_full`: a limited number of real images, with their mirror images if asked |
| adm | what guided-diffusion's evaluator prints: ddof 1, sFID in the order H, W, C, inception score in file order |
| clean-fid | clean-fid's resize, ddof 1 |
| pytorch-fid | what pytorch-fid prints: its resize, all images of either side, ddof 1; also of its earlier layers |
| fd-dinov2 | DINOv2 ViT-L/14 at 224 pixels, ddof 1, as EDM2 has it |
| fd-timm | a network of timm with its own preparation of images, ddof 1 |
| own | defined here |
| free | detector and number of images are the caller's choice; the record says which they were |
"""
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dnnlib.download import Asset
from dnnlib.registry import Registry
from metrics import formulas, generator_formulas
from metrics.detectors import INCEPTION_LAYERS, VGG16_FILE
from metrics.detectors.lpips import LPIPS_FILE
from metrics.formulas import Answer, Formula
from metrics.latents import LatentSource
from metrics.options import MetricOptions
from metrics.passes import Wants
from metrics.precision_recall import K_NEIGHBOURS
from metrics.real_side import MAX_FEATURES, RealWants

INCEPTION = "inception-2015-12-05"
ADM_REAL_FEATURES = 10_000      # Images in ADM's reference files, for precision and recall.
PROBE_IMAGES = 50_000           # Real images that a linear probe is fitted to and tested with, at most.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class MetricKind:
    """A formula over images: what it needs of either side, and how it becomes numbers."""

    free_name: str                      # The metric with this formula whose detector and numbers are free.
    gen: Wants
    real: RealWants
    default_detector: str | None        # What the free name takes. None: the caller must name one.
    compute: Formula
    is_ordered: bool = False            # The order of the images moves the value.
    min_images: int = 1                 # Each side must have so many.
    lower_is_better: bool = False       # Distances want to be low.
    real_labels: bool = False           # It takes the labels of the real images.
    says_detector: bool = False         # The free name is followed by the detector's in results.
    inception_only: bool = False        # Its name stands for Inception: it takes no network of timm.
    wanted_detector: str = ""           # What the caller must name where there is no default, for the message.


@dataclasses.dataclass(frozen=True)
class GeneratorKind:
    """A measurement of the generator itself. It has no detector that the caller could choose."""

    # All processes take part. Settings may say `detector` and `detector_sha256`.
    compute: Callable[[LatentSource, MetricOptions], Answer]
    require: Callable[[MetricOptions], Any] | None = None   # Finds or fetches the files it needs, or raises UserError.
    assets: tuple[Asset, ...] = ()                          # These files, for `metrics.prefetch`.
    lower_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class Metric:
    """A name."""

    name: str
    kind: MetricKind | GeneratorKind
    detector: str | None = None         # None: the caller's choice.
    num_gen: int | None = None          # None: the caller's choice.
    num_real: int | None = None         # At most so many real images, a seeded choice; None: all.
    protocol: str = "free"
    takes_mirror: bool = False          # Whether --mirror adds the mirrored real images.
    takes_all: bool = False             # It scores all images that there are, unless the caller says how many.

    @property
    def is_official(self) -> bool:
        """Whether the name fixes detector and number of images, be it all there are."""
        return self.num_gen is not None or self.takes_all

#----------------------------------------------------------------------------
# Formulas with what they need.

def _fid(free_name: str, output: str, ddof: int) -> MetricKind:
    wants = Wants(moments=frozenset({output}))
    return MetricKind(free_name, wants, RealWants(wants), INCEPTION, formulas.frechet(output, ddof),
                      min_images=1 + ddof, lower_is_better=True, inception_only=True)


def _pr(limit: int, dtype: torch.dtype) -> MetricKind:
    return MetricKind("pr", POOL, RealWants(POOL, limit), "vgg16", formulas.neighbours(limit, dtype),
                      min_images=K_NEIGHBOURS + 1)


POOL = Wants(features=frozenset({"pool"}))
NOTHING = RealWants()

FID, FID_DDOF1 = _fid("fid", "pool", ddof=0), _fid("fid", "pool", ddof=1)
SFID, SFID_DDOF1 = _fid("sfid", "spatial", ddof=0), _fid("sfid", "spatial", ddof=1)
# The distance of features of any other network.
FD = dataclasses.replace(
    _fid("fd", "pool", ddof=1), default_detector=None, inception_only=False, says_detector=True,
    wanted_detector="a network: name it with --detector, such as --detector=timm:tf_efficientnet_lite2")
KID = MetricKind("kid", POOL, RealWants(POOL, MAX_FEATURES), INCEPTION, formulas.kernel(MAX_FEATURES), min_images=2,
                 lower_is_better=True)
PR, ADM_PR = _pr(MAX_FEATURES, torch.float16), _pr(ADM_REAL_FEATURES, torch.float32)
IS = MetricKind("is", Wants(probs=True), NOTHING, INCEPTION, formulas.shuffled_score)
ADM_IS = MetricKind("is", Wants(probs=True), NOTHING, INCEPTION, formulas.score_in_order, is_ordered=True)
ACCURACY = MetricKind("accuracy", Wants(correct=True), NOTHING, None, formulas.accuracy, wanted_detector=(
    "a classifier of the classes: name it with --detector=PATH.safetensors, or use --metrics=probe_accuracy with "
    "any network"))
PROBE = MetricKind(
    "probe_accuracy", dataclasses.replace(POOL, labels=True), RealWants(POOL, PROBE_IMAGES), None,
    formulas.probe(PROBE_IMAGES), real_labels=True, says_detector=True,
    wanted_detector="a network: name it with --detector, such as --detector=timm:tf_efficientnet_lite2")

PPL = GeneratorKind(generator_formulas.ppl2_wend, generator_formulas.require_lpips, (VGG16_FILE, LPIPS_FILE),
                    lower_is_better=True)
EQT_INT = GeneratorKind(generator_formulas.equivariance_in("eqt_int"))
EQT_FRAC = GeneratorKind(generator_formulas.equivariance_in("eqt_frac"))
EQR = GeneratorKind(generator_formulas.equivariance_in("eqr"))

#----------------------------------------------------------------------------

METRICS: Registry[Metric] = Registry("metric")


def register(metric: Metric) -> None:
    """Add a name to the table."""
    METRICS.register(metric.name)(metric)


def _protocol(protocol: str, *rows: tuple[str, MetricKind, str, int, int | None]) -> None:
    for name, kind, detector, num_gen, num_real in rows:
        register(Metric(name, kind, detector, num_gen, num_real, protocol, takes_mirror=num_real is not None))


_protocol(
    "stylegan",
    ("fid50k_full", FID, INCEPTION, 50_000, None),
    ("fid10k_full", FID, INCEPTION, 10_000, None),
    ("kid50k_full", KID, INCEPTION, 50_000, None),
    ("pr50k3_full", PR, "vgg16", 50_000, None),
    ("is50k", IS, INCEPTION, 50_000, None),
    ("sfid50k_full", SFID, INCEPTION, 50_000, None),
    ("rfid50k_full", FID, "inception-rand", 50_000, None),
)
_protocol(
    "stylegan-legacy",
    ("fid50k", FID, INCEPTION, 50_000, 50_000),
    ("kid50k", KID, INCEPTION, 50_000, 50_000),
    ("pr50k3", PR, "vgg16", 50_000, 50_000),
    ("pr10k3", PR, "vgg16", 10_000, 10_000),
)
_protocol(
    "adm",
    ("adm_is50k", ADM_IS, INCEPTION, 50_000, None),
    ("adm_fid50k", FID_DDOF1, INCEPTION, 50_000, None),
    ("adm_sfid50k", SFID_DDOF1, INCEPTION, 50_000, None),
    ("adm_pr50k", ADM_PR, INCEPTION, 50_000, None),
)
_protocol("clean-fid", ("clean_fid50k", FID_DDOF1, "inception-2015-12-05-clean", 50_000, None))
for _output, _mark in (("pool", ""), *((output, f"_{width}") for output, width in INCEPTION_LAYERS.items())):
    register(Metric(f"pytorch_fid{_mark}", _fid("fid", _output, ddof=1), "inception-2015-12-05-pytorch_fid",
                    protocol="pytorch-fid", takes_all=True))
_protocol("fd-dinov2", ("fd_dinov2_50k", FD, "dinov2-vitl14", 50_000, None))
_protocol("fd-timm", *((f"fd_lite{i}_50k", FD, f"timm:tf_efficientnet_lite{i}", 50_000, None) for i in range(3)))
_protocol("own", ("rfid_random", FID, "inception-random-seed0", 50_000, None))

for _name, _measurement in (("ppl2_wend", PPL), ("eqt50k_int", EQT_INT), ("eqt50k_frac", EQT_FRAC), ("eqr50k", EQR)):
    register(Metric(_name, _measurement, num_gen=50_000, protocol="stylegan"))

for _kind in (FID, SFID, KID, PR, IS, ACCURACY, FD):
    register(Metric(_kind.free_name, _kind, takes_mirror=True))
register(Metric(PROBE.free_name, PROBE))    # A mirrored copy of what is held out must not be fitted to.

#----------------------------------------------------------------------------

GROUPS = {
    "adm": ("adm_is50k", "adm_fid50k", "adm_sfid50k", "adm_pr50k"),     # In the order of ADM's evaluator.
    "stylegan": ("fid50k_full", "kid50k_full", "pr50k3_full", "is50k"),
}


def expand(names: Iterable[str]) -> list[str]:
    """Names of metrics, with the names of groups replaced by their members and without repetitions."""
    return list(dict.fromkeys(member for name in names for member in GROUPS.get(name, (name,))))
