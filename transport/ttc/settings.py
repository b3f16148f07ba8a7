# SPDX-License-Identifier: Apache-2.0
"""Settings of the study of Trust the Critics: the options, and what each task takes where they are left open."""
import dataclasses
from typing import Any, Self

from dnnlib import UserError
from torch_utils.misc import select_device
from transport.common.ot_exact import MAX_POINTS
from transport.common.study import check, option
from transport.ttc.image_critics import CRITICS

TASKS = ("generation", "denoising", "translation", "refinement", "misalignment")


@dataclasses.dataclass(frozen=True)
class Config:
    """Move samples with a sequence of critics: from noise to data, from one image to another, from noisy to clean.

    With --outdir critics are kept, and the same command continues after the last one.
    """

    task: str = option("generation", "What to do; gives defaults to all options that have none", choices=TASKS)
    size: str = option("small", "Settings that fit: small (minutes), quick, or those of the papers (hours on a GPU)",
                       choices=("quick", "small", "paper"))
    version: int = option(1, "1: one step per critic, estimate from its training; 2: fresh estimate before each step",
                          min=1, max=2)
    source: str | None = option(None, "Where samples come from: noise, untrained, noisy, blurred (of the target), "
                                "a generator's .pkl or run, or what --data takes")
    data: str | None = option(None, "Where they shall go: digits, photos[:china|:flower], points:ring|eight|circle, "
                              "or a data set (zip or folder)")
    critic: str | None = option(None, "Layout of the critics", choices=CRITICS)
    width: int | None = option(None, "Width of the networks; 64 in the papers", min=1)
    schedule: str | None = option(None, "Critics x steps per critic, such as 20x1 or 10x2,20x1")
    iterations: int | None = option(None, "Iterations per critic, or of the generator (misalignment)", min=1)
    batch: int | None = option(None, "Samples per batch", min=1)
    theta: float | None = option(None, "Step as a share of the estimated W1: below 1 in version 1", min=0, max=1)
    lam: float | None = option(None, "Weight of the gradient penalty", min=0, open_min=True)
    lr: float | None = option(None, "Learning rate of Adam", min=0, open_min=True)
    sigma: float | None = option(None, "Standard deviation of the noise of --source=noisy; images are in [-1, 1]",
                                 min=0)
    resolution: int | None = option(None, "Pixels of digits and crops", min=4)
    pool: int | None = option(None, "Law samples kept and moved once per step; 0: fresh ones for every batch",
                              min=0)
    images: int = option(1000, "Images to make with the generator of --source, to train with and to test with", min=2)
    num: int = option(500, "Samples to test with", min=2, max=MAX_POINTS)
    detector: str | None = option(None, "For a Frechet distance in its features: a judge's .safetensors, or a name")
    seed: int = option(0, "Random seed", min=0)
    device: str = option("auto", "Where to compute")
    outdir: str | None = None

    def quick(self) -> Self:
        """These settings, made smaller: under two minutes on two cores."""
        return dataclasses.replace(self, size="quick")


@dataclasses.dataclass(frozen=True)
class Settled(Config):
    """A `Config` in which no option is left open. `settled` makes one and gives every field that stands here."""

    data: str = ""
    critic: str = ""
    width: int = 0
    schedule: str = ""
    iterations: int = 0
    batch: int = 0
    theta: float = 0.0
    lam: float = 0.0
    lr: float = 0.0
    sigma: float = 0.0
    resolution: int = 0
    pool: int = 0

#----------------------------------------------------------------------------

# The deep ones among the papers' critics come to life only after thousands of iterations, so the small sizes take a
# shallow one for all tasks.
_COMMON: dict[str, Any] = {"lam": 1000.0, "lr": 1e-3, "sigma": 0.2, "resolution": 16, "pool": 2000, "batch": 50,
                           "width": 16, "theta": 0.9, "schedule": "8x1"}
_TASK: dict[str, dict[str, Any]] = {
    "generation": {"source": "noise", "data": "digits", "critic": "infogan", "resolution": 8},
    "denoising": {"source": "noisy", "data": "photos", "critic": "infogan", "batch": 16, "theta": 0.7},
    "translation": {"source": "photos:china", "data": "photos:flower", "critic": "infogan", "batch": 16},
    "refinement": {"critic": "infogan"},
    "misalignment": {"data": "digits", "critic": "infogan", "resolution": 8, "lam": 10.0, "batch": 128},
}
_QUICK: dict[str, dict[str, Any]] = {
    "generation": {"iterations": 300}, "denoising": {"iterations": 300, "schedule": "5x1"},
    "translation": {"iterations": 200, "schedule": "5x1"}, "refinement": {"iterations": 100, "schedule": "3x1"},
    "misalignment": {"iterations": 100},
}
_SMALL: dict[str, dict[str, Any]] = {
    "generation": {"iterations": 1000, "schedule": "20x1"}, "denoising": {"iterations": 1000, "schedule": "20x1"},
    "translation": {"iterations": 500, "schedule": "12x1"}, "refinement": {"iterations": 300, "schedule": "6x1"},
    "misalignment": {"iterations": 1000},
}
# As in the code of the two papers; misalignment as in the first.
_PAPER: dict[str, Any] = {"width": 64, "lr": 1e-4, "pool": 0, "schedule": "20x1"}
_PAPER_TASK: dict[tuple[str, int], dict[str, Any]] = {
    ("generation", 1): {"iterations": 5000, "batch": 50, "theta": 0.9, "resolution": 32},
    ("generation", 2): {"iterations": 1000, "batch": 128, "schedule": "10x2,20x1", "resolution": 32},
    ("denoising", 1): {"iterations": 5000, "batch": 16, "theta": 0.7, "sigma": 0.3, "resolution": 128,
                       "critic": "arconvnet"},
    ("denoising", 2): {"iterations": 2500, "batch": 32, "sigma": 0.2, "resolution": 128,
                       "critic": "arconvnet"},
    ("translation", 1): {"iterations": 5000, "batch": 16, "theta": 0.9, "schedule": "30x1", "resolution": 128,
                         "critic": "sndcgan"},
    ("translation", 2): {"iterations": 2500, "batch": 32, "resolution": 128, "critic": "sndcgan"},
    ("refinement", 1): {"iterations": 5000, "batch": 50, "theta": 0.9},
    ("refinement", 2): {"iterations": 1000, "batch": 128},
    ("misalignment", 1): {"iterations": 40_000, "resolution": 32},
    ("misalignment", 2): {"iterations": 40_000, "resolution": 32},
}


def defaults(task: str, size: str, version: int) -> dict[str, Any]:
    """Values of the options that the user left open."""
    values = {**_COMMON, **_TASK[task]}
    if version == 2:
        values["theta"] = 1.0
    if size == "paper":
        return {**values, **_PAPER, **_PAPER_TASK[task, version]}
    return {**values, **(_QUICK if size == "quick" else _SMALL)[task]}


def settled(config: Config) -> Settled:
    """The settings with every open option filled in.

    Raises:
        UserError: a value is out of range, or one is missing that has no default.
    """
    check(config)
    values = defaults(config.task, config.size, config.version)
    values |= {name: value for name, value in vars(config).items() if value is not None}
    if config.task == "refinement":
        for name, what in (("source", "the generator to refine, a .pkl or the folder of a run"),
                           ("data", "the data set it was trained on")):
            if name not in values:
                raise UserError(f"--task=refinement needs --{name}: name {what}")
    return Settled(**{**values, "device": select_device(config.device)})
