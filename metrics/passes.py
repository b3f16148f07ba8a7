# SPDX-License-Identifier: Apache-2.0
"""One walk over a source of images, shared by all detectors and metrics that need it, and by all processes."""
import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
import tqdm

from dnnlib import UserError
from metrics.accuracy import num_correct
from metrics.detectors import Detector
from metrics.feature_stats import BLOCK_ROWS, Moments, Rows
from metrics.read_ahead import read_ahead
from metrics.sources import ImageSource, chunks_of_rank, pinned, read_chunks
from torch_utils import distributed
from torch_utils.misc import to_device

T = TypeVar("T")

DETECTOR_BATCH = 64     # Images per detector call. A constant: rounding in a network depends on the batch it sees.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Wants:
    """What to keep of a detector's answers."""

    moments: frozenset[str] = frozenset()       # Outputs whose mean and covariance are taken.
    features: frozenset[str] = frozenset()      # Outputs that are kept, at the captured positions.
    probs: bool = False                         # Class probabilities.
    correct: bool = False                       # How often the predicted class is the label.
    labels: bool = False                        # The labels themselves.

    def __or__(self, other: "Wants") -> "Wants":
        return Wants(*(a | b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))

    def outputs_of(self, detector: Detector) -> frozenset[str]:
        """Names of the outputs that `detector` is asked for."""
        keys = self.moments | self.features
        if self.probs:
            keys |= {class_scores(detector)}
        return keys | {"logits"} if self.correct else keys


def class_scores(detector: Detector) -> str:
    """Name of the output that class probabilities come from."""
    return "logits_unbiased" if "logits_unbiased" in detector.outputs else "logits"


@dataclasses.dataclass
class Collected:
    """What was kept, over all processes. Arrays exist on process 0 only."""

    num_images: int
    # By name of the output: (mean float64 [D], covariance float64 [D, D] with ddof 0)
    moments: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    # By name of the output: float32 [captured, D], in the order of the positions
    features: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    probs: np.ndarray | None = None             # float64 [num_images, C]
    num_correct: int | None = None
    labels: torch.Tensor | None = None          # int64 [num_images]

#----------------------------------------------------------------------------

def labelled(labels: torch.Tensor | None) -> torch.Tensor:
    """Labels that a metric needs. Raises UserError if there are none."""
    if labels is None:
        raise UserError("the images have no labels, which accuracy and probe_accuracy need: give a data set "
                        "with labels, a folder with one sub-folder per class, or a conditional network")
    return labels


class _Keeper:
    """Keeps the answers of one detector during one walk, on one process."""

    def __init__(self, detector: Detector, wants: Wants, num_images: int, places: np.ndarray, num_captured: int,
                 columns: np.ndarray | None):
        self.detector = detector
        self.wants = wants
        self.num_images = num_images
        self.places = places                    # Row of the feature table per position; -1: not captured.
        self.outputs = wants.outputs_of(detector)
        self.moments = {key: Moments(detector.dims[key]) for key in sorted(wants.moments)}
        self.features = {key: Rows(num_captured) for key in sorted(wants.features)}
        self.logits = Rows(num_images)
        self.labels = Rows(num_images)
        self.correct: torch.Tensor | int = 0
        self.columns = None if columns is None else torch.from_numpy(columns)   # Column of each label of the images.

    def append(self, positions: np.ndarray, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        outputs = self.detector.features(images, self.outputs)
        for key, moments in self.moments.items():
            moments.append(outputs[key])
        captured = np.flatnonzero(self.places[positions] >= 0)
        for key, rows in self.features.items():
            kept = outputs[key]
            if len(captured) == len(positions):
                kept = kept.clone()         # It may be part of something large, which must not live as long.
            else:
                kept = kept[to_device(torch.from_numpy(captured), kept.device)]
            rows.append(self.places[positions][captured], kept)
        if self.wants.probs:
            self.logits.append(positions, outputs[class_scores(self.detector)])
        if self.wants.correct:
            self.correct = self.correct + num_correct(outputs["logits"], self._checked(labels))
        if self.wants.labels:
            self.labels.append(positions, labelled(labels))

    def _checked(self, labels: torch.Tensor | None) -> torch.Tensor:
        labels = labelled(labels)
        known = self.detector.num_classes if self.columns is None else len(self.columns)
        if len(labels) and int(labels.max()) >= known:
            raise UserError(f"accuracy: an image has label {int(labels.max())}, but the judge {self.detector.name} "
                            f"knows {known} classes: use a judge trained on the same data")
        return labels if self.columns is None else self.columns[labels.cpu()]

    def finish(self, device: torch.device) -> Collected:
        """Bring the processes together; every process must call it."""
        self.detector.check()
        result = Collected(self.num_images)
        for key, moments in self.moments.items():
            moments.reduce(device)
            if distributed.rank() == 0:
                result.moments[key] = moments.mean(), moments.covariance(ddof=0)
        for key, rows in self.features.items():
            table = rows.gather(device)
            if table is not None:
                result.features[key] = table
        if self.wants.probs:
            logits = self.logits.gather(device)
            if logits is not None:
                probs = logits.double()
                for block in probs.split(BLOCK_ROWS):       # In place: 50,000 rows are 400 MB.
                    block.copy_(block.softmax(dim=1))
                result.probs = probs.numpy()
        if self.wants.correct:
            result.num_correct = sum(distributed.all_gather_object(int(self.correct)))
        if self.wants.labels:
            result.labels = self.labels.gather(device)
        return result


def collect(
    source: ImageSource,
    wanted: dict[str, tuple[Detector, Wants]],  # What to keep, by a name of the caller's.
    device: torch.device,                       # Where this process has its tensors, for messages between processes.
    batch_size: int = 64,                       # Images per batch that the source is asked for.
    indices: np.ndarray | None = None,          # Image numbers to walk over, ascending; None: all.
    captured: np.ndarray | None = None,         # Positions whose features are kept, ascending; None: all.
    progress: str | None = None,                # Title of a progress bar.
    columns: Mapping[str, np.ndarray] | None = None,    # Column of the logits for each label, by the same names.
) -> dict[str, Collected]:
    """Read every image once, show it to every detector once, and keep what is wanted. All processes take part.

    The result depends on neither `batch_size` nor the number of processes (moments: to rounding in float64).
    """
    num = source.num_images if indices is None else len(indices)
    captured = np.arange(num) if captured is None else captured
    places = np.full(num, -1, dtype=np.int64)
    places[captured] = np.arange(len(captured))
    keepers = {key: _Keeper(detector, wants, num, places, len(captured), (columns or {}).get(key))
               for key, (detector, wants) in wanted.items()}
    chunks = chunks_of_rank(num, DETECTOR_BATCH, distributed.rank(), distributed.world_size())
    bar = tqdm.tqdm(total=num, desc=progress, unit="img", disable=progress is None or distributed.rank() != 0)
    batches = read_chunks(source, batch_size, chunks, indices)
    if device.type == "cuda":
        batches = pinned(batches)
    if getattr(source, "can_read_ahead", False):
        batches = read_ahead(batches)
    with bar, contextlib.closing(batches):
        for positions, images, labels in batches:
            for keeper in keepers.values():
                keeper.append(positions, images, labels)
            bar.update(min(len(positions) * distributed.world_size(), num - bar.n))
    return {key: keeper.finish(device) for key, keeper in keepers.items()}

#----------------------------------------------------------------------------

def on_rank0(action: Callable[[], T]) -> T:
    """Run `action` on process 0 and hand its value, or the exception it raised, to all processes."""
    value: T | None = None
    error: Exception | None = None
    if distributed.rank() == 0:
        try:
            value = action()
        except Exception as err:        # Carried to all: a process that waited for the value would wait for ever.
            error = err
    answer: tuple[T, Exception | None] = distributed.broadcast_object((value, error))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]
