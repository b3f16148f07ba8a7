# SPDX-License-Identifier: Apache-2.0
"""Critics on the disk: one .safetensors per critic with its steps in the header, and the settings they belong to.

    DIR/settings.json               what the critics depend on
    DIR/critics/critic-0000.safetensors
"""
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from dnnlib import UserError
from dnnlib.util import atomic_file, atomic_write_text, first_line
from torch_utils.schema import Unfit, check_finite, check_tensors
from transport.ttc.critic_sequence import Stage

HEADER_KEY = "trust_the_critics"        # The header's only entry: the order of several would differ from file to file.
SETTINGS = "settings.json"


def stage_path(folder: Path, number: int) -> Path:
    """Where critic `number`, counted from 0, is kept."""
    return folder / "critics" / f"critic-{number:04}.safetensors"


def save_stage(folder: Path, number: int, stage: Stage) -> None:
    """Write a critic, whole or not at all. Numbers of the header come back exactly."""
    header = {HEADER_KEY: json.dumps({"number": number, "estimates": stage.estimates, "etas": stage.etas})}
    tensors = {name: value.detach().cpu().contiguous() for name, value in stage.critic.state_dict().items()}
    with atomic_file(stage_path(folder, number)) as file:
        file.write(safetensors.torch.save(tensors, header))


def load_stage(folder: Path, number: int, make: Callable[[], torch.nn.Module]) -> Stage:
    """Read a critic.

    Args:
        folder: Of the run.
        number: Of the critic.
        make: A network of the critic's layout.

    Raises:
        UserError: the file is damaged, or holds a critic of another layout.
    """
    path = stage_path(folder, number)
    critic = make()
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
            state = {name: file.get_tensor(name) for name in file.keys()}   # noqa: SIM118
        check_tensors(state, "its content", critic.state_dict())
        check_finite(state)
        critic.load_state_dict(state)
        if header["number"] != number:
            raise ValueError(f"it is critic {header['number']}")
        estimates, etas = (tuple(float(value) for value in header[key]) for key in ("estimates", "etas"))
    except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError, Unfit) as err:
        raise UserError(f"{path}: not a usable critic ({first_line(err)}): delete it and the later ones, and run "
                        "again") from err
    return Stage(critic.eval().requires_grad_(False), estimates, etas)


def load_stages(folder: Path, schedule: Sequence[int], make: Callable[[], torch.nn.Module]) -> list[Stage]:
    """The critics that are there, from the first on without a gap, at most as many as the schedule has.

    Raises:
        UserError: a file is damaged; a critic took another number of steps than the schedule says.
    """
    stages: list[Stage] = []
    for number, steps in enumerate(schedule):
        if not stage_path(folder, number).is_file():
            break
        stages.append(load_stage(folder, number, make))
        if len(stages[-1].etas) != steps:
            raise UserError(f"--schedule: critic {number + 1} of {folder} took {len(stages[-1].etas)} steps, not "
                            f"{steps}: keep the schedule's beginning, or name a new folder")
    return stages


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Note what the critics of this folder depend on, or compare with what was noted.

    Raises:
        UserError: the folder holds critics of other settings.
    """
    path = folder / SETTINGS
    if not path.is_file():
        atomic_write_text(path, json.dumps(settings, indent=2) + "\n")
        return
    try:
        found = json.loads(path.read_text())
    except ValueError as err:
        raise UserError(f"{path}: damaged ({err}): name a new --outdir") from err
    for name, value in json.loads(json.dumps(settings)).items():
        if not isinstance(found, dict) or found.get(name) != value:
            other = found.get(name) if isinstance(found, dict) else None
            raise UserError(f"--outdir={folder}: holds critics trained with {name}={other}, not {name}={value}: "
                            "use the same settings to continue them, or name a new folder")
