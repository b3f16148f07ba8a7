# SPDX-License-Identifier: Apache-2.0
"""From names of metrics to work: which detector, how many images, which real images."""
import dataclasses
from collections.abc import Iterable

from dnnlib import UserError
from metrics.detectors import label_of, model_of
from metrics.options import MetricOptions
from metrics.protocols import METRICS, GeneratorKind, Metric, MetricKind, expand

DEFAULT_NUM_GEN = 50_000        # For metrics with free names, where the name does not say.

RealKey = tuple[str, bool, int | None]          # Detector, mirrored, at most so many images.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Job:
    """A metric with what its name left open."""

    metric: Metric
    detector: str                   # '' where the generator itself is measured.
    num: int
    mark: str                       # '@num=N' where the caller overrode the number that the name fixes.
    real: RealKey

    @property
    def title(self) -> str:
        """The metric's name, with the detector's where that is one that nobody would guess from it."""
        if self.image_kind is None or self.metric.detector is not None:
            return self.metric.name
        if self.image_kind.says_detector or model_of(self.detector) is not None:
            return f"{self.metric.name}_{label_of(self.detector)}"
        return self.metric.name

    @property
    def name(self) -> str:
        """As the record has it."""
        return self.title + self.mark

    @property
    def has_real_side(self) -> bool:
        """Whether it compares with real images."""
        return self.image_kind is not None and bool(self.image_kind.real.wants)

    @property
    def image_kind(self) -> MetricKind | None:
        """The formula over images; None where the generator itself is measured."""
        return self.metric.kind if isinstance(self.metric.kind, MetricKind) else None

    @property
    def outputs(self) -> list[str]:
        """Outputs of the detector whose mean and covariance are compared."""
        return [] if self.image_kind is None else sorted(self.image_kind.real.wants.moments)


def plan(names: Iterable[str], options: MetricOptions) -> list[Job]:
    """One job per metric, in the order of the names; names of groups stand for their members.

    Raises:
        UserError: unknown name, or options that the name does not allow.
    """
    jobs = []
    for metric in (METRICS[name] for name in expand(names)):
        there = options.num_images if metric.takes_all else None
        num = options.num or metric.num_gen or there or DEFAULT_NUM_GEN
        mark = f"@num={num}" if metric.num_gen not in (None, num) else ""
        detector = detector_of(metric, options)
        mirror = options.mirror and metric.takes_mirror
        jobs.append(Job(metric, detector, num, mark, (detector, mirror, metric.num_real)))
    return jobs


def detector_of(metric: Metric, options: MetricOptions) -> str:
    """Name of the detector that a metric will use; '' for a measurement of the generator itself.

    Raises:
        UserError: the name fixes another than the one asked for, or leaves it to a caller who named none.
    """
    kind = metric.kind
    if isinstance(kind, GeneratorKind):
        if options.detector is not None:
            raise UserError(f"--detector={options.detector}: {metric.name} measures the generator and takes none: "
                            "leave it out")
        return ""
    if metric.detector is not None:
        if options.detector not in (None, metric.detector):
            raise UserError(f"--detector={options.detector}: {metric.name} is defined with {metric.detector}: use "
                            f"--metrics={kind.free_name} for another detector")
        return metric.detector
    name = options.detector or kind.default_detector
    if name is None:
        raise UserError(f"--metrics={metric.name} needs {kind.wanted_detector}")
    if kind.inception_only and model_of(name) is not None:
        raise UserError(f"--detector={name}: {metric.name} is a distance of Inception's features: use --metrics=fd, "
                        "whose results say the network")
    return name
