# SPDX-License-Identifier: Apache-2.0
"""Metrics by name (`metrics/protocols.py`): from names to work, and from work to records.

Metrics share work: images are generated once per number of images, and every detector sees them once.
"""
import collections
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.classes import Classes, match
from dnnlib.util import list_some
from metrics import records
from metrics.crops import crop_warnings
from metrics.detectors import Detector, load_detector, require
from metrics.jobs import Job, RealKey, plan
from metrics.latents import check_source as check_latents
from metrics.linear_probe import check_labels
from metrics.options import MetricOptions
from metrics.passes import Collected, Wants, class_scores, collect, labelled, on_rank0
from metrics.protocols import INCEPTION, METRICS, NOTHING, GeneratorKind, MetricKind, expand
from metrics.real_side import RealSide, RealWants, labels_of, load_real_side
from metrics.references import Reference, check_statistics
from metrics.sources import ImageSource, label_values, says_it_has_no_labels
from torch_utils import distributed

SourceFactory = Callable[[int], ImageSource]    # Number of images -> a source of just so many.

#----------------------------------------------------------------------------

def preflight(names: Iterable[str], options: MetricOptions) -> None:
    """Check names and settings and find (or fetch) every file of weights, before a long run needs them.

    Raises:
        UserError: the first thing that is wrong or missing.
    """
    for job in plan(names, options):
        kind = job.metric.kind
        if not isinstance(kind, GeneratorKind):
            find = functools.partial(require, job.detector, options.weights_dir, options.offline,
                                     options.allow_unverified)
        elif kind.require is not None:
            find = functools.partial(kind.require, options)
        else:
            continue
        distributed.node_first(find)


def detector_for(spec: str, options: MetricOptions) -> Detector:
    """The detector, loaded as the options say. All processes call it.

    Raises:
        UserError: unknown name, missing or damaged file.
    """
    return load_detector(spec, options.device, options.weights_dir, options.offline, options.allow_unverified)


def statistics_to_save(names: Iterable[str], options: MetricOptions) -> dict[str, list[str]]:
    """Detector -> outputs whose statistics a file of the real images must have to serve these metrics.

    Inception is always there with the outputs that ADM's files have, unless `options` name another detector.
    """
    if options.detector is not None:
        return {options.detector: ["pool"]}
    wanted: dict[str, list[str]] = {INCEPTION: ["pool", "spatial"]}
    for job in plan(names, options):
        for output in job.outputs:
            wanted.setdefault(job.detector, [])
            wanted[job.detector] += [] if output in wanted[job.detector] else [output]
    return wanted


def _image_kinds(names: Iterable[str]) -> list[MetricKind]:
    kinds = [METRICS[name].kind for name in expand(names)]
    return [kind for kind in kinds if not isinstance(kind, GeneratorKind)]


def needs_labels(names: Iterable[str]) -> bool:
    """Whether a metric compares the images with their labels."""
    return any(kind.gen.correct or kind.gen.labels for kind in _image_kinds(names))


def needs_real_labels(names: Iterable[str]) -> bool:
    """Whether a metric learns the classes from the real images."""
    return any(kind.real_labels for kind in _image_kinds(names))


def needs_reference(names: Iterable[str]) -> bool:
    """Whether a metric compares the images with real ones."""
    return any(kind.real.wants for kind in _image_kinds(names))


def needs_generator(names: Iterable[str]) -> list[str]:
    """The metrics that images alone cannot serve."""
    return [name for name in expand(names) if isinstance(METRICS[name].kind, GeneratorKind)]

#----------------------------------------------------------------------------

def evaluate(names: Iterable[str], generated: SourceFactory, reference: Reference | None = None,
             options: MetricOptions | None = None) -> list[dict[str, Any]]:
    """Compute metrics. All processes call it with equal arguments and get equal results.

    Args:
        names: Names in `METRICS` or `GROUPS`.
        generated: Makes the source of generated images; called with the number that a metric asks for.
        reference: The real side; None where no metric compares with real images.
        options: How to compute.

    Returns:
        One record per metric, in the order of the names: `results` holds the values, the rest says how they came about.

    Raises:
        UserError: unknown name, a missing file, a reference that cannot serve a metric, too few images.
    """
    options = options or MetricOptions()
    start = time.perf_counter()
    jobs = plan(names, options)
    _check_reference(jobs, reference)
    detectors = {spec: detector_for(spec, options) for spec in sorted({job.detector for job in jobs} - {""})}
    for job in jobs:
        if job.image_kind is not None:
            _check_detector(job, job.image_kind.gen, detectors[job.detector], reference)
            _check_numbers(job, job.image_kind, detectors[job.detector], reference)
    walks = [_walk_over(generated(num), [job for job in jobs if job.num == num], detectors, reference)
             for num in sorted({job.num for job in jobs})]
    real = {} if reference is None else {
        key: load_real_side(reference, detectors[key[0]], needs, key[1], key[2], options)
        for key, needs in _real_wants(jobs).items()}
    done = {}
    for walk in walks:
        source = walk.source
        gen = _collect_generated(walk, detectors, options)
        for job in walk.jobs:
            answer = _answer(job, source, gen.get(job.detector), real.get(job.real, RealSide()), options)
            done[job.metric.name] = records.result(job, *answer, detectors.get(job.detector), source, reference,
                                                   options.record, time.perf_counter() - start)
            if job.detector:
                _warn_few(done[job.metric.name], job, detectors[job.detector])
            if options.out_dir is not None:
                on_rank0(functools.partial(records.append_line, options.out_dir, done[job.metric.name]))
    return [done[job.metric.name] for job in jobs]


@dataclasses.dataclass(frozen=True)
class _Walk:
    """One source of generated images, and the metrics that it serves."""

    source: ImageSource
    jobs: list[Job]
    columns: dict[str, np.ndarray]      # Of logits, by judge, for each label of the images.
    classes: torch.Tensor | None        # Of the real images, for each label of the generated ones.


def _walk_over(source: ImageSource, jobs: list[Job], detectors: dict[str, Detector],
               reference: Reference | None) -> _Walk:
    """All that can be said of a source before its images are read. Raises UserError."""
    _check_source(source, reference, jobs)
    return _Walk(source, jobs, _columns_of_labels(source, jobs, detectors), _classes_of_real(source, jobs, reference))


def _answer(job: Job, source: ImageSource, gen: Collected | None, real: RealSide,
            options: MetricOptions) -> tuple[dict[str, float], dict[str, Any]]:
    """Values and settings of one metric. All processes take part. Raises UserError if a value is not finite."""
    kind = job.metric.kind
    if isinstance(kind, GeneratorKind):
        values, settings = kind.compute(check_latents(source, job.metric.name), options)
    else:
        assert gen is not None          # Every job with a detector has its part of the walk.
        values, settings = on_rank0(functools.partial(kind.compute, gen, real, options))
    if wrong := [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]:
        raise UserError(f"{job.metric.name}: {', '.join(wrong)}: the numbers of one side are too large: make the "
                        "reference again, or look at the images")
    return values, settings


def _real_wants(jobs: list[Job]) -> dict[RealKey, RealWants]:
    """What is needed of the real images."""
    wants: dict[RealKey, RealWants] = collections.defaultdict(RealWants)
    for job in jobs:
        if job.image_kind is not None and job.has_real_side:
            wants[job.real] |= job.image_kind.real
    return wants


def _collect_generated(walk: _Walk, detectors: dict[str, Detector], options: MetricOptions) -> dict[str, Collected]:
    """One walk over the generated images for all detectors that these metrics use."""
    wanted: dict[str, Wants] = collections.defaultdict(Wants)
    for job in walk.jobs:
        if job.image_kind is not None:
            wanted[job.detector] |= job.image_kind.gen
    if not wanted:
        return {}
    asked = {spec: (detectors[spec], wants) for spec, wants in wanted.items()}
    found = collect(walk.source, asked, options.device, options.batch_size,
                    progress="generated images" if options.verbose else None, columns=walk.columns)
    for collected in found.values():
        if collected.labels is not None and walk.classes is not None:
            collected.labels = walk.classes[collected.labels.cpu()]
    return found

#----------------------------------------------------------------------------
# Checks that come before hours of work.

def _check_reference(jobs: list[Job], reference: Reference | None) -> None:
    for job in jobs:
        if job.image_kind is None or not job.has_real_side:
            continue
        name = job.metric.name
        if reference is None or reference.source is None and not reference.statistics:
            raise UserError(f"--metrics={name} compares with real images: name them with --data or --ref")
        if job.image_kind.real_labels and reference.source is not None and labels_of(reference) is None:
            raise UserError(f"--metrics={name} learns the classes from the real images, but "
                            f"{reference.source.description.get('path', 'the reference')} has no labels: name a data "
                            "set with labels by --data")
        if job.image_kind.real_labels and (real := labels_of(reference)) is not None:
            check_labels(real)
        if reference.source is None and job.image_kind.real.wants.features:
            raise UserError(f"--metrics={name}: not computable from {path_of(reference)}, which holds only mean and "
                            "covariance: name the images themselves with --data or --ref")


def path_of(reference: Reference) -> str | None:
    """Path of the file of statistics."""
    return reference.statistics[0].path


def _check_detector(job: Job, gen: Wants, detector: Detector, reference: Reference | None) -> None:
    name = job.metric.name
    if gen.probs and class_scores(detector) not in detector.outputs:
        raise UserError(f"--detector={detector.name}: {name} needs a classifier, and it has no classes: use "
                        f"{INCEPTION} or a .safetensors judge")
    if gen.correct and "logits" not in detector.outputs:
        raise UserError(f"--detector={detector.name}: {name} needs a classifier of the classes of the data: "
                        "name a judge trained on them with --detector=PATH.safetensors, or use "
                        "--metrics=probe_accuracy")
    for output in sorted((gen.moments | gen.features) - set(detector.outputs)):
        raise UserError(f"--detector={detector.name}: {name} needs its output '{output}', which it does not have: use "
                        f"{INCEPTION}")
    if reference is None:               # The metric has no real side.
        return
    for output in job.outputs:
        stored = reference.statistics_for(detector.name, output)
        if stored is not None:
            _warn(check_statistics(stored, detector, output))
            if stored.num_images is None and job.metric.protocol == "free":
                _warn(f"{stored.path} does not say of how many images it is: its covariance is used as stored, usually "
                      f"divided by N - 1, while {name} divides by N: pytorch_fid and adm_fid50k divide by N - 1")
        elif reference.source is None:
            raise UserError(f"--metrics={name}: not computable from {path_of(reference)}, which holds statistics of "
                            f"{reference.holdings()}, but not {output} of {detector.name}: name the images themselves "
                            "with --data or --ref, or make it again with --save-ref")
        elif reference.statistics:
            _warn(f"{path_of(reference)} holds no statistics of {output} of {detector.name}: {name} takes its "
                  f"{reference.source.num_images} images")


def _same_size(ours: int, theirs: int) -> str:
    """How generated and real images of different sizes can be compared: dataset_tool.py makes powers of two only."""
    if theirs & (theirs - 1) != 0 and ours & (ours - 1) == 0:
        return f"convert the images of the reference with dataset_tool.py --resolution={ours}"
    if ours & (ours - 1) != 0 and theirs & (theirs - 1) == 0:
        return f"convert the generated images with dataset_tool.py --resolution={theirs}"
    if ours & (ours - 1) != 0:
        return "resize one of them to the size of the other (dataset_tool.py makes powers of two only)"
    return f"make both of one size, for example the reference with dataset_tool.py --resolution={ours}"


def _check_numbers(job: Job, kind: MetricKind, detector: Detector, reference: Reference | None) -> None:
    """Both sides must have as many images as the formula takes."""
    sides = {"generated": [job.num]}
    if reference is not None and job.has_real_side:
        stored = [reference.statistics_for(detector.name, output) for output in job.outputs]
        sides["real"] = [entry.num_images for entry in stored if entry is not None and entry.num_images is not None]
        if reference.source is not None and (kind.real.wants.features or not all(stored)):
            sides["real"].append(reference.source.num_images * (2 if job.real[1] else 1))
    for side, numbers in sides.items():
        num = min(numbers, default=kind.min_images)
        if num < kind.min_images:
            raise UserError(f"--metrics={job.metric.name}: {num} {side} image{'s are' if num > 1 else ' is'} too few: "
                            f"give {kind.min_images} or more")


def _check_source(source: ImageSource, reference: Reference | None, jobs: list[Job]) -> None:
    """Sizes must agree; what moves a value without being wrong is warned of."""
    for job in jobs:
        if job.image_kind is None:
            check_latents(source, job.metric.name)
        elif (job.image_kind.gen.labels or job.image_kind.gen.correct) and says_it_has_no_labels(source):
            labelled(None)
        elif job.image_kind.is_ordered and source.description.get("labels_sorted"):
            _warn(f"{job.metric.name} takes the images in file order, and they are sorted by class: the value will be "
                  "far too low: shuffle them, or use --metrics=is")
    compared = [job.metric.name for job in jobs if job.has_real_side]
    for warning in crop_warnings(compared, source.description, reference.crop if reference else None):
        _warn(warning)
    ours, theirs = source.description.get("resolution"), reference.resolution if reference else None
    if ours and theirs and ours != theirs:
        raise UserError(f"the generated images have {ours}x{ours} pixels, the reference {theirs}x{theirs}: "
                        + _same_size(ours, theirs))


def _columns_of_labels(source: ImageSource, jobs: list[Job], detectors: dict[str, Detector]) -> dict[str, np.ndarray]:
    """By detector that is a judge: the column of its logits that stands for each label of the images.

    Raises:
        UserError: a label means a class that the judge does not know.
    """
    columns = {}
    for job in jobs:
        if job.image_kind is None or not job.image_kind.gen.correct:
            continue
        judge, values = detectors[job.detector], label_values(source)
        count = judge.num_classes if values is None else int(values.max(initial=-1)) + 1
        found = match(
            str(source.description.get("path") or "the images"), Classes(source.description.get("class_names"), count),
            f"the judge --detector={judge.name}", Classes(judge.class_names, judge.num_classes),
            "use a judge trained on these classes, or call the classes alike on both sides",
            None if values is None else values.tolist())
        _note(found.note)
        columns[job.detector] = np.array(found.indices, dtype=np.int64)
    return columns


def _classes_of_real(source: ImageSource, jobs: list[Job], reference: Reference | None) -> torch.Tensor | None:
    """The class of the real images that each label of the generated ones means; None where no metric takes labels.

    Raises:
        UserError: a label means a class that the real images do not have.
    """
    taking = [job.metric.name for job in jobs if job.image_kind is not None and job.image_kind.real_labels]
    if not taking or reference is None or reference.source is None:
        return None
    real, values = labels_of(reference), label_values(source)
    assert real is not None, "checked before any work"
    known = Classes(reference.source.description.get("class_names"), int(real.max(initial=-1)) + 1)
    count = len(known) if values is None else int(values.max(initial=-1)) + 1
    found = match(
        str(source.description.get("path") or "the images"), Classes(source.description.get("class_names"), count),
        "the real images", known, f"name the data set that has these classes by --data, or leave {taking[0]} out",
        None if values is None else values.tolist())
    _note(found.note)
    if without := sorted({*found.indices} - {-1, *np.unique(real).tolist()}):
        raise UserError(f"{taking[0]} learns the classes from the real images, but there are none of the classes "
                        f"{list_some([known.names[i] for i in without])}: name a data set that has images of all "
                        "classes by --data, or leave these classes out (of a network by --labels=dataset)")
    return torch.tensor(found.indices)


def _warn_few(record: dict[str, Any], job: Job, detector: Detector) -> None:
    for output in job.outputs:
        for side, num in (("generated", record["num_gen"]), ("real", record["num_real"])):
            if num is not None and num < detector.dims[output]:
                _warn(f"{job.name}: {num} {side} images are fewer than the {detector.dims[output]} features: the "
                      "covariance is singular and the value mostly reflects the number of images")


def _warn(message: str | None) -> None:
    if message:
        distributed.print0(f"Warning: {message}", file=sys.stderr)


def _note(message: str | None) -> None:
    if message:
        distributed.print0(f"Note: {message}", file=sys.stderr)


def unused_mirror(names: Iterable[str], options: MetricOptions) -> str | None:
    """Why --mirror does nothing for some of these metrics, or None."""
    metrics = [METRICS[name] for name in expand(names)]
    unused = [m.name for m in metrics
              if options.mirror and not m.takes_mirror and not isinstance(m.kind, GeneratorKind)
              and m.kind.real != NOTHING]
    return f"--mirror has no effect on {', '.join(unused)}: defined on unmirrored real images" if unused else None
