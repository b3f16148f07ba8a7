# SPDX-License-Identifier: Apache-2.0
"""How metrics are computed, and what their free names leave open."""
import dataclasses
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class MetricOptions:
    """How to compute, and what the free names leave open."""

    device: torch.device = torch.device("cpu")  # Where this process computes.
    batch_size: int = 64                        # Images per batch that sources are asked for; moves no result.
    num: int | None = None                      # Generated images; None: as many as the name says, 50,000 else.
    num_images: int | None = None               # Generated images there are, for names that take all; None: any number.
    seed: int = 0                               # Seed of a metric's random choices (subsets, shuffling).
    detector: str | None = None                 # For metrics with free names; None: inception, for pr vgg16.
    weights_dir: str | None = None              # Where files of weights are looked for first.
    offline: bool | None = None                 # Never download; None: as the environment says.
    allow_unverified: bool = False              # Take files of weights whose hash is not the published one.
    mirror: bool = False                        # Names that allow it: add mirrored copies of the real images.
    out_dir: str | None = None                  # Append each result to metric-<name>.jsonl in this folder.
    verbose: bool = False                       # Progress bars.
    use_cache: bool = True                      # Keep statistics of real images between runs.
    record: dict[str, Any] = dataclasses.field(default_factory=dict)    # Added to every result (snapshot_pkl, ...).
