# SPDX-License-Identifier: Apache-2.0
"""What a step of gpu_report.py is given, where it leaves what it found, and the layers that it measures."""
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import atomic_write_text
from training.config import GeneratorConfig
from training.generator.layer_schedule import stem_config, superres_config

CLASSES = 1000
RECIPE_STAGES, RECIPE_HEAD_LAYERS = 4, 7


class Skip(Exception):
    """Why a step does not apply to this machine."""


class Results:
    """The JSON file of a step. It is written whenever something is added, because the step may be killed."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = {"found": "", "skipped": "", "values": {}}

    def put(self, **values: Any) -> None:
        """Add measurements. Names may hold anything: `put(**{"cuda/seconds": 1.5})`."""
        self.content["values"] |= values
        self._write()

    def found(self, text: str) -> None:
        """Say in one line what the step found so far."""
        self.content["found"] = text
        self._write()

    def skip(self, reason: str) -> None:
        """Say that the step does not apply."""
        self.content["skipped"] = reason
        self._write()

    def _write(self) -> None:
        atomic_write_text(self.path, json.dumps(self.content, indent=1) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """The content of such a file; an empty one if the step left none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"found": "", "skipped": "", "values": {}}


@dataclasses.dataclass(frozen=True)
class Context:
    """What a step works with."""

    device: torch.device
    quick: bool
    folder: Path                # For its files; they stay for a look.
    results: Results

#----------------------------------------------------------------------------
# Networks.

def stem_of_recipe(quick: bool = False) -> GeneratorConfig:
    """The stem of the ImageNet recipe at 16 pixels; quick: a narrow one."""
    return stem_config(16, *((4, 512, 16) if quick else (10, 65536, 1024)), c_dim=CLASSES)


def recipe_config(quick: bool = False) -> GeneratorConfig:
    """The 128 -> 256 stage of the ImageNet recipe; quick: a narrow stage of 32 pixels."""
    config = stem_of_recipe(quick)
    for _ in range(1 if quick else RECIPE_STAGES):
        config = superres_config(config, 2, 4 if quick else RECIPE_HEAD_LAYERS)
    return config


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A nonlinearity of a network, and how often the network has it."""

    in_size: int
    out_size: int
    up: int
    down: int
    up_taps: int
    down_taps: int
    channels: int
    padding: tuple[int, ...]
    kernel: int                 # Side of the convolution before it, which enlarges the map.
    count: int = 1

    @property
    def name(self) -> str:
        return (f"{self.in_size} -> {self.out_size}, {self.up}/{self.down}, {self.up_taps}/{self.down_taps}, "
                f"{self.channels}")


def layer_cases(config: GeneratorConfig) -> list[LayerCase]:
    """The different nonlinearities of a generator, those near the image first: they take most of the time."""
    from training.networks_stylegan3 import SynthesisLayer
    found: dict[LayerCase, int] = {}
    for spec in reversed(config.layers):
        # One channel: sizes and filters do not depend on the width, and a wide layer takes long to make.
        layer = SynthesisLayer(dataclasses.replace(spec, in_channels=1, out_channels=1), config)
        taps = [1 if f is None else f.shape[0] for f in (layer.up_filter, layer.down_filter)]
        case = LayerCase(spec.in_size, spec.out_size, layer.up, layer.down, *taps, spec.out_channels,
                         tuple(layer.padding), spec.conv_kernel)
        found[case] = found.get(case, 0) + 1
    return [dataclasses.replace(case, count=count) for case, count in found.items()]


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """A convolution of a network, and how often the network has it."""

    size: int                   # Side of the map, before padding.
    in_channels: int
    out_channels: int
    kernel: int
    is_torgb: bool
    is_trained: bool            # Gradients of weights and styles, not only of the map.
    count: int = 1

    @property
    def name(self) -> str:
        return (f"{self.size}, {self.kernel}x{self.kernel}, {self.in_channels} -> {self.out_channels}"
                f"{', trained' if self.is_trained else ''}")


def conv_cases(config: GeneratorConfig) -> list[ConvCase]:
    """The different convolutions of a generator in training, those near the image first."""
    found: dict[ConvCase, int] = {}
    for index, spec in reversed(list(enumerate(config.layers))):
        case = ConvCase(spec.in_size, spec.in_channels, spec.out_channels, spec.conv_kernel, spec.is_torgb,
                        index >= config.num_frozen_layers)
        found[case] = found.get(case, 0) + 1
    return [dataclasses.replace(case, count=count) for case, count in found.items()]
