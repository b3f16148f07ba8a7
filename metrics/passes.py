# SPDX-License-Identifier: Apache-2.0
"""One walk over a source of images, shared by all detectors and metrics that need it, and by all processes."""
import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import tqdm

from dnnlib import UserError
from metrics.accuracy import num_correct
from metrics.detectors import Detector
from metrics.feature_stats import Moments, Rows
from metrics.sources import ImageSource, chunks_of_rank, read_chunks
from torch_utils import distributed

DETECTOR_BATCH = 64     # Images per detector call. A constant: rounding in a network depends on the batch it sees.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Wants:
    """What to keep of a detector's answers."""

    moments: bool = False       # Mean and covariance of 'pool'.
    features: bool = False      # 'pool' itself, of the captured positions.
    probs: bool = False         # Class probabilities.
    correct: bool = False       # How often the predicted class is the label.

    def __or__(self, other: "Wants") -> "Wants":
        return Wants(*(a or b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __bool__(self) -> bool:
        return any(dataclasses.astuple(self))


@dataclasses.dataclass
class Collected:
    """What was kept, over all processes. Arrays exist on process 0 only."""

    num_images: int
    mean: np.ndarray | None = None              # float64 [D]
    covariance: np.ndarray | None = None        # float64 [D, D], ddof 0
    features: torch.Tensor | None = None        # float32 [captured, D], in the order of the positions
    probs: np.ndarray | None = None             # float64 [num_images, C]
    num_correct: int | None = None

#----------------------------------------------------------------------------

class _Keeper:
    """Keeps the answers of one detector during one walk, on one process."""

    def __init__(self, detector: Detector, wants: Wants, num_images: int, places: np.ndarray, num_captured: int):
        self.detector = detector
        self.wants = wants
        self.num_images = num_images
        self.places = places                    # Row of the feature table per position; -1: not captured.
        self.moments = Moments(detector.feature_dim)
        self.features = Rows(num_captured)
        self.logits = Rows(num_images)
        self.correct = 0

    def append(self, positions: np.ndarray, images: torch.Tensor, labels: torch.Tensor | None) -> None:
        outputs = self.detector.features(images)
        if self.wants.moments:
            self.moments.append(outputs["pool"])
        if self.wants.features:
            captured = np.flatnonzero(self.places[positions] >= 0)
            rows = outputs["pool"][torch.from_numpy(captured).to(outputs["pool"].device)]
            self.features.append(self.places[positions][captured], rows)
        if self.wants.probs:
            self.logits.append(positions, outputs.get("logits_unbiased", outputs.get("logits")))
        if self.wants.correct:
            self.correct += num_correct(outputs["logits"], self._checked(labels))

    def _checked(self, labels: torch.Tensor | None) -> torch.Tensor:
        if labels is None:
            raise UserError("accuracy: the images have no labels: give a data set with labels, a folder with one "
                            "sub-folder per class, or a conditional network")
        if len(labels) and int(labels.max()) >= self.detector.num_classes:
            raise UserError(f"accuracy: an image has label {int(labels.max())}, but the judge {self.detector.name} "
                            f"knows {self.detector.num_classes} classes: use a judge trained on the same data")
        return labels

    def finish(self, device: torch.device) -> Collected:
        """Bring the processes together; every process must call it."""
        result = Collected(self.num_images)
        if self.wants.moments:
            self.moments.reduce(device)
            if distributed.rank() == 0:
                result.mean, result.covariance = self.moments.mean(), self.moments.covariance(ddof=0)
        if self.wants.features:
            result.features = self.features.gather(device)
        if self.wants.probs:
            logits = self.logits.gather(device)
            if logits is not None:
                result.probs = torch.softmax(logits.double(), dim=1).numpy()
        if self.wants.correct:
            result.num_correct = sum(distributed.all_gather_object(self.correct))
        return result


def collect(
    source: ImageSource,
    wanted: dict[str, tuple[Detector, Wants]],  # What to keep, by a name of the caller's.
    device: torch.device,                       # Of this process, for messages between processes.
    batch_size: int = 64,                       # Images per batch that the source is asked for.
    indices: np.ndarray | None = None,          # Image numbers to walk over, ascending; None: all.
    captured: np.ndarray | None = None,         # Positions whose features are kept, ascending; None: all.
    progress: str | None = None,                # Title of a progress bar.
) -> dict[str, Collected]:
    """Read every image once, show it to every detector once, and keep what is wanted. All processes take part.

    The result depends on neither `batch_size` nor the number of processes (moments: to rounding in float64).
    """
    num = source.num_images if indices is None else len(indices)
    captured = np.arange(num) if captured is None else captured
    places = np.full(num, -1, dtype=np.int64)
    places[captured] = np.arange(len(captured))
    keepers = {key: _Keeper(detector, wants, num, places, len(captured)) for key, (detector, wants) in wanted.items()}
    chunks = chunks_of_rank(num, DETECTOR_BATCH, distributed.rank(), distributed.world_size())
    bar = tqdm.tqdm(total=num, desc=progress, unit="img", disable=progress is None or distributed.rank() != 0)
    with bar:
        for positions, images, labels in read_chunks(source, batch_size, chunks, indices):
            for keeper in keepers.values():
                keeper.append(positions, images, labels)
            bar.update(min(len(positions) * distributed.world_size(), num - bar.n))
    return {key: keeper.finish(device) for key, keeper in keepers.items()}

#----------------------------------------------------------------------------

def on_rank0(action: Callable[[], Any]) -> Any:
    """Run `action` on process 0 and hand its value, or the exception it raised, to all processes."""
    value, error = None, None
    if distributed.rank() == 0:
        try:
            value = action()
        except Exception as err:        # Carried to all: a process that waited for the value would wait for ever.
            error = err
    value, error = distributed.broadcast_object((value, error))
    if error is not None:
        raise error
    return value
