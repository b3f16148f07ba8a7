# SPDX-License-Identifier: Apache-2.0
"""Metrics by name. A name is a protocol: it fixes the detector, the numbers of images and the formula.

The names of the StyleGAN line (`fid50k_full`, ...) mean what they mean there. The short names (`fid`, `kid`, `pr`,
`is`, `accuracy`) leave detector and number of images to the caller; the record of a result says which they were.
"""
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from dnnlib import UserError
from dnnlib.registry import Registry
from dnnlib.util import list_some
from metrics import records
from metrics.detectors import Detector, load_detector, require
from metrics.frechet import frechet_distance
from metrics.inception_score import inception_score
from metrics.kernel_distance import kernel_distance
from metrics.options import MetricOptions
from metrics.passes import Collected, Wants, collect, on_rank0
from metrics.precision_recall import precision_recall
from metrics.real_side import RealSide, load_real_side
from metrics.references import Reference, check_statistics
from metrics.sources import ImageSource
from torch_utils import distributed

DEFAULT_NUM_GEN = 50_000        # Of the short names.

SourceFactory = Callable[[int], ImageSource]    # Number of images -> a source of just so many.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class MetricKind:
    """A formula: what it needs of either side, and how it becomes numbers."""

    gen: Wants
    real: Wants
    default_detector: str | None                # None: the caller must name one.
    compute: Callable[[Collected, RealSide, MetricOptions], tuple[dict[str, float], dict[str, Any]]]


@dataclasses.dataclass(frozen=True)
class Metric:
    """A name."""

    name: str
    kind: MetricKind
    detector: str | None = None                 # None: the caller's choice.
    num_gen: int | None = None                  # None: the caller's choice.

    @property
    def is_official(self) -> bool:
        """Whether the name fixes detector and number of images."""
        return self.num_gen is not None

#----------------------------------------------------------------------------
# Formulas. Each returns (values by suffix of the metric's name, settings to record).

def _fid(gen: Collected, real: RealSide, options: MetricOptions) -> tuple[dict[str, float], dict[str, Any]]:
    value = frechet_distance(real.mean, real.covariance, gen.mean, gen.covariance)
    return {"": value}, {"ddof": 0, "num_real": real.num_images}


def _kid(gen: Collected, real: RealSide, options: MetricOptions) -> tuple[dict[str, float], dict[str, Any]]:
    kid = kernel_distance(real.features, gen.features, seed=options.seed, device=options.device)
    return {"": kid.mean}, {"num_real": len(real.features), "num_subsets": kid.num_subsets,
                            "subset_size": kid.subset_size, "subset_seed": kid.seed, "std_over_subsets": kid.std}


def _pr(gen: Collected, real: RealSide, options: MetricOptions) -> tuple[dict[str, float], dict[str, Any]]:
    result = precision_recall(real.features, gen.features, device=options.device)
    return {"_precision": result.precision, "_recall": result.recall}, {
        "num_real": len(real.features), "k": result.k, "rounded_to": "fp16", "distances_in": "float32"}


def _is(gen: Collected, real: RealSide, options: MetricOptions) -> tuple[dict[str, float], dict[str, Any]]:
    score = inception_score(gen.probs, shuffle_seed=options.seed)
    return {"_mean": score.mean, "_std": score.std}, {
        "num_splits": score.num_splits, "order": "shuffled", "shuffle_seed": score.shuffle_seed, "ddof": 0}


def _accuracy(gen: Collected, real: RealSide, options: MetricOptions) -> tuple[dict[str, float], dict[str, Any]]:
    return {"": gen.num_correct / gen.num_images}, {"num_correct": gen.num_correct}

#----------------------------------------------------------------------------

INCEPTION = "inception-2015-12-05"
NOTHING = Wants()

FID = MetricKind(Wants(moments=True), Wants(moments=True), INCEPTION, _fid)
KID = MetricKind(Wants(features=True), Wants(features=True), INCEPTION, _kid)
PR = MetricKind(Wants(features=True), Wants(features=True), "vgg16", _pr)
IS = MetricKind(Wants(probs=True), NOTHING, INCEPTION, _is)
ACCURACY = MetricKind(Wants(correct=True), NOTHING, None, _accuracy)

METRICS = Registry("metric")

for _metric in (
    Metric("fid50k_full", FID, INCEPTION, 50_000),
    Metric("fid10k_full", FID, INCEPTION, 10_000),
    Metric("kid50k_full", KID, INCEPTION, 50_000),
    Metric("pr50k3_full", PR, "vgg16", 50_000),
    Metric("is50k", IS, INCEPTION, 50_000),
    Metric("fid", FID),
    Metric("kid", KID),
    Metric("pr", PR),
    Metric("is", IS),
    Metric("accuracy", ACCURACY),
):
    METRICS.register(_metric.name)(_metric)

#----------------------------------------------------------------------------
# From names to work.

def detector_of(metric: Metric, options: MetricOptions) -> str:
    """Name of the detector that a metric will use.

    Raises:
        UserError: the name fixes another than the one asked for, or leaves it to a caller who named none.
    """
    if metric.is_official:
        if options.detector not in (None, metric.detector):
            raise UserError(f"--detector={options.detector}: {metric.name} is defined with {metric.detector}: use "
                            f"--metrics={_short_name(metric)} for another detector")
        return str(metric.detector)
    name = options.detector or metric.kind.default_detector
    if name is None:
        raise UserError(f"--metrics={metric.name} needs a classifier of the classes: name it with "
                        "--detector=PATH.safetensors")
    return name


def num_gen_of(metric: Metric, options: MetricOptions) -> int:
    """Number of generated images that a metric will use.

    Raises:
        UserError: the name fixes another than the one asked for.
    """
    if metric.is_official:
        if options.num not in (None, metric.num_gen):
            raise UserError(f"--num={options.num}: {metric.name} is defined with {metric.num_gen} generated images: "
                            f"use --metrics={_short_name(metric)} for another number")
        return int(metric.num_gen or 0)
    return DEFAULT_NUM_GEN if options.num is None else options.num


def _short_name(metric: Metric) -> str:
    return next(m.name for m in map(METRICS.__getitem__, METRICS) if not m.is_official and m.kind is metric.kind)


def preflight(names: list[str], options: MetricOptions) -> None:
    """Check names and settings and find (or fetch) every file of weights, before a long run needs them.

    Raises:
        UserError: the first thing that is wrong or missing.
    """
    for name in names:
        metric = METRICS[name]
        num_gen_of(metric, options)
        spec = detector_of(metric, options)
        distributed.node_first(lambda spec=spec: require(spec, options.weights_dir, options.offline))


def needs_labels(names: list[str]) -> bool:
    """Whether a metric compares the images with their labels."""
    return any(METRICS[name].kind.gen.correct for name in names)


def needs_reference(names: list[str]) -> bool:
    """Whether a metric compares the images with real ones."""
    return any(METRICS[name].kind.real for name in names)

#----------------------------------------------------------------------------

def evaluate(names: list[str], generated: SourceFactory, reference: Reference | None = None,
             options: MetricOptions | None = None) -> list[dict[str, Any]]:
    """Compute metrics. All processes call it with equal arguments and get equal results.

    Metrics share work: images are generated once per number of images and shown once to every detector.

    Args:
        names: Names in `METRICS`.
        generated: Makes the source of generated images; called with the number that a metric asks for.
        reference: The real side; None where no metric compares with real images.
        options: How to compute.

    Returns:
        One record per name, in their order: `results` holds the values, the rest says how they came about.

    Raises:
        UserError: unknown name, a missing file, a reference that cannot serve a metric, too few images.
    """
    options = options or MetricOptions()
    start = time.perf_counter()
    metrics = [METRICS[name] for name in dict.fromkeys(names)]
    uses = {m.name: (detector_of(m, options), num_gen_of(m, options)) for m in metrics}
    _check_reference(metrics, reference)
    detectors = {}
    for spec in sorted({spec for spec, _num in uses.values()}):
        detectors[spec] = load_detector(spec, options.device, options.weights_dir, options.offline)
    for metric in metrics:
        _check_detector(metric, detectors[uses[metric.name][0]], reference)
    real = {key: load_real_side(reference, detectors[key[0]], wants, key[1], options)
            for key, wants in _real_wants(metrics, uses, options).items()}
    done = {}
    for num in sorted({num for _spec, num in uses.values()}):
        source = generated(num)
        _check_source(source, reference, [detectors[uses[m.name][0]] for m in metrics if m.kind.gen.correct])
        group = [m for m in metrics if uses[m.name][1] == num]
        gen = _collect_generated(source, group, uses, detectors, options)
        for metric in group:
            spec = uses[metric.name][0]
            side = real.get((spec, options.mirror and not metric.is_official), RealSide())
            values, settings = on_rank0(lambda m=metric, k=spec, r=side, g=gen: m.kind.compute(g[k], r, options))
            done[metric.name] = records.result(metric.name, values, settings, detectors[spec], source, reference,
                                               options.record, time.perf_counter() - start)
            _warn_few(metric, side, num, detectors[spec])
            if options.out_dir is not None:
                on_rank0(lambda record=done[metric.name]: records.append_line(options.out_dir, record))
    return [done[name] for name in names]


def _real_wants(metrics: list[Metric], uses: dict[str, tuple[str, int]],
                options: MetricOptions) -> dict[tuple[str, bool], Wants]:
    """(detector, mirrored) -> what is needed of the real images. Official protocols take them as they are."""
    wants: dict[tuple[str, bool], Wants] = {}
    for metric in metrics:
        if metric.kind.real:
            key = uses[metric.name][0], options.mirror and not metric.is_official
            wants[key] = wants.get(key, NOTHING) | metric.kind.real
    return wants


def _collect_generated(source: ImageSource, metrics: list[Metric], uses: dict[str, tuple[str, int]],
                       detectors: dict[str, Detector], options: MetricOptions) -> dict[str, Collected]:
    """One walk over the generated images for all detectors that these metrics use."""
    wanted: dict[str, tuple[Detector, Wants]] = {}
    for metric in metrics:
        spec = uses[metric.name][0]
        wanted[spec] = detectors[spec], wanted.get(spec, (None, NOTHING))[1] | metric.kind.gen
    title = "generated images" if options.verbose else None
    return collect(source, wanted, options.device, options.batch_size, progress=title)

#----------------------------------------------------------------------------
# Checks that come before hours of work.

def _check_reference(metrics: list[Metric], reference: Reference | None) -> None:
    for metric in metrics:
        if not metric.kind.real:
            continue
        if reference is None or reference.source is None and reference.statistics is None:
            raise UserError(f"--metrics={metric.name} compares with real images: name them with --data or --ref")
        if metric.kind.real.features and reference.source is None:
            raise UserError(f"--metrics={metric.name}: not computable from {reference.statistics.path}, which holds "
                            "only mean and covariance: name the images themselves with --data or --ref")


def _check_detector(metric: Metric, detector: Detector, reference: Reference | None) -> None:
    if metric.kind.gen.probs and not {"logits_unbiased", "logits"} & set(detector.outputs):
        raise UserError(f"--detector={detector.name}: {metric.name} needs a classifier, and it has no classes: use "
                        f"{INCEPTION} or a .safetensors judge")
    if metric.kind.gen.correct and "logits" not in detector.outputs:
        raise UserError(f"--detector={detector.name}: {metric.name} needs a classifier of the classes of the data: "
                        "name a judge trained on them with --detector=PATH.safetensors")
    if metric.kind.real.moments and reference is not None and reference.statistics is not None:
        _warn(check_statistics(reference.statistics, detector))


def _check_source(source: ImageSource, reference: Reference | None, judges: list[Detector]) -> None:
    """Sizes must agree, and so must the meaning of labels where both sides give names to their classes."""
    ours, theirs = source.description.get("resolution"), reference.resolution if reference else None
    if ours and theirs and ours != theirs:
        raise UserError(f"the generated images have {ours}x{ours} pixels, the reference {theirs}x{theirs}: "
                        f"make both of one size, for example with dataset_tool.py --resolution={ours}")
    names = source.description.get("class_names") or []
    for judge in judges:
        known = judge.class_names or []
        if _are_names(names) and _are_names(known) and list(names) != list(known):
            raise UserError(f"--detector={judge.name}: knows the classes {list_some(list(known))}, the images have "
                            f"{list_some(list(names))}: use a judge trained on the same classes in the same order")


def _are_names(names: Sequence[str]) -> bool:
    """Whether classes have names and not only numbers."""
    return any(not str(name).isdigit() for name in names)


def _warn_few(metric: Metric, real: RealSide, num_gen: int, detector: Detector) -> None:
    counts = {"generated": num_gen, "real": real.num_images or num_gen}
    for side, num in counts.items():
        if metric.kind.gen.moments and num < detector.feature_dim:
            _warn(f"{metric.name}: {num} {side} images are fewer than the {detector.feature_dim} features: the "
                  "covariance is singular and the value mostly reflects the number of images")


def _warn(message: str | None) -> None:
    if message:
        distributed.print0(f"Warning: {message}", file=sys.stderr)


def unused_mirror(names: list[str], options: MetricOptions) -> str | None:
    """Why --mirror does nothing for some of these metrics, or None."""
    official = [name for name in names if options.mirror and METRICS[name].is_official and METRICS[name].kind.real]
    return f"--mirror has no effect on {', '.join(official)}: defined on unmirrored real images" if official else None
