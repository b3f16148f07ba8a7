# SPDX-License-Identifier: Apache-2.0
"""Snapshots of networks in their real size, which would be gigabytes: settings, and tensors without memory."""
from pathlib import Path

import torch

from training.config import GeneratorConfig, to_dict
from training.networks_stylegan3 import Generator
from training.run.formats import NETWORK_FORMAT

SNAPSHOTS: dict[str, dict] = {}     # By path; see the fixture in conftest.py.


def pretend_snapshot(place: Path, config: GeneratorConfig, class_names: list[str] | None = None) -> Path:
    """From now on commands that are run in this process find such a snapshot there."""
    with torch.device("meta"):
        state = Generator(config).state_dict()
    SNAPSHOTS[str(place)] = {"format": NETWORK_FORMAT, "generator_config": to_dict(config), "G_ema": state,
                             "class_names": class_names}
    return place
