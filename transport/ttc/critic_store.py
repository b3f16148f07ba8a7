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
from dnnlib.util import atomic_file, atomic_write_text, first_line, parse_json
from torch_utils.schema import Unfit, check_finite, check_tensors
from transport.ttc.critic_sequence import FinishedCritic

HEADER_KEY = "trust_the_critics"        # The header's only entry: the order of several would differ from file to file.
SETTINGS = "settings.json"


def critic_path(folder: Path, number: int) -> Path:
    """Where critic `number`, counted from 0, is kept."""
    return folder / "critics" / f"critic-{number:04}.safetensors"


def save_critic(folder: Path, number: int, finished: FinishedCritic) -> None:
    """Write a critic, whole or not at all. Numbers of the header come back exactly."""
    header = {HEADER_KEY: json.dumps({"number": number, "estimates": finished.estimates, "etas": finished.etas})}
    tensors = {name: value.detach().cpu().contiguous() for name, value in finished.critic.state_dict().items()}
    with atomic_file(critic_path(folder, number)) as file:
        file.write(safetensors.torch.save(tensors, header))


def load_critic(folder: Path, number: int, make: Callable[[], torch.nn.Module]) -> FinishedCritic:
    """Read a critic.

    Args:
        folder: The folder of the run.
        number: The critic's number.
        make: Makes a network of the critic's layout.

    Raises:
        UserError: the file is damaged, or holds a critic of another layout.
    """
    path = critic_path(folder, number)
    critic = make()
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = parse_json((file.metadata() or {})[HEADER_KEY])
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
    return FinishedCritic(critic.eval().requires_grad_(False), estimates, etas)


def load_critics(folder: Path, schedule: Sequence[int], make: Callable[[], torch.nn.Module]) -> list[FinishedCritic]:
    """The critics that are there, from the first on without a gap, at most as many as the schedule has.

    Raises:
        UserError: a file is damaged; a critic took another number of steps than the schedule says.
    """
    sequence: list[FinishedCritic] = []
    for number, steps in enumerate(schedule):
        if not critic_path(folder, number).is_file():
            break
        sequence.append(load_critic(folder, number, make))
        if len(sequence[-1].etas) != steps:
            raise UserError(f"--schedule: critic {number + 1} of {folder} took {len(sequence[-1].etas)} steps, not "
                            f"{steps}: keep the schedule's beginning, or name a new folder")
    return sequence


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
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise UserError(f"{path}: damaged ({err}): name a new --outdir") from err
    for name, value in json.loads(json.dumps(settings)).items():
        if not isinstance(found, dict) or found.get(name) != value:
            other = found.get(name) if isinstance(found, dict) else None
            raise UserError(f"--outdir={folder}: holds critics trained with {name}={other}, not {name}={value}: "
                            "use the same settings to continue them, or name a new folder")
