# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its name, its settings, and whether the same command has been here before."""
import json
import os
import re
from pathlib import Path
from typing import Any

from dnnlib import UserError
from dnnlib.util import atomic_write_text
from training.config import TrainConfig, to_dict

OPTIONS_FILE = "training_options.json"
STATE_FILE = "training-state.pt"

# Settings that may differ between two starts of one run without changing what it computes.
FREE_SETTINGS = ("total_kimg", "kimg_per_tick", "snapshot_ticks", "metrics", "restart_every", "cudnn_benchmark")


def comparable(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that make a run what it is."""
    kept = {name: value for name, value in options.items() if name not in FREE_SETTINGS}
    kept["data"] = {name: value for name, value in kept["data"].items() if name != "workers"}
    return json.loads(json.dumps(kept))


def find_run(outdir: Path, desc: str, config: TrainConfig) -> tuple[Path, bool]:
    """The folder for this command below `outdir`, and whether it continues a run.

    Folders are called NNNNN-<desc>. The newest one with the same description and the same settings is continued;
    without one, the next number is taken. Nothing is created here.
    """
    found = []
    if outdir.is_dir():
        found = sorted(p for p in outdir.iterdir() if p.is_dir() and re.match(r"\d{5}-", p.name))
    wanted = comparable(to_dict(config))
    for folder in reversed([p for p in found if p.name[6:] == desc]):
        options = folder / OPTIONS_FILE
        if options.is_file() and (folder / STATE_FILE).is_file():
            if comparable(json.loads(options.read_text())) == wanted:
                return folder, True
    number = 1 + max((int(p.name[:5]) for p in found), default=-1)
    return outdir / f"{number:05d}-{desc}", False


def create_run(folder: Path, config: TrainConfig) -> None:
    """Make the folder and write the settings into it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / OPTIONS_FILE, json.dumps(to_dict(config), indent=2) + "\n")
    except OSError as err:
        raise UserError(f"--outdir: cannot write to {folder} ({os.strerror(err.errno or 0)}): "
                        "name a folder that you may write to") from err
