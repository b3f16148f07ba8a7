# SPDX-License-Identifier: Apache-2.0
"""Network snapshots and training states: dicts of tensors and plain values, complete in themselves.

A network snapshot holds G, G_ema and D with the settings to rebuild them, without frozen backbones (their names and
sha256 only). A training state adds the optimisers and counters that an exact resume needs.
"""
import re
from pathlib import Path
from typing import Any

from dnnlib import UserError
from torch_utils.nested import copy_to_cpu
from training.config import GeneratorConfig, TrainConfig, from_dict, to_dict
from training.networks_stylegan3 import Generator
from training.run.formats import NETWORK_FORMAT, STATE_FORMAT, VERSION

Snapshot = dict[str, Any]       # What a file of this format holds: see `network_snapshot`.

#----------------------------------------------------------------------------
# Names of files that belong to a moment of training.

def kimg_digits(cur_nimg: int) -> str:
    """'000200' after 200,000 images, for file names; counts between two kimg keep three more digits."""
    kimg, rest = divmod(cur_nimg, 1000)
    return f"{kimg:06d}" if rest == 0 else f"{kimg:06d}.{rest:03d}"


def snapshot_name(cur_nimg: int) -> str:
    """'network-snapshot-000200.pkl' after 200,000 images."""
    return f"network-snapshot-{kimg_digits(cur_nimg)}.pkl"


def images_shown(name: str) -> int | None:
    """Images shown before the snapshot, or the sheet 'fakes000200.png', of this name; None for other files."""
    match = re.fullmatch(r"(?:network-snapshot-|fakes)(\d{6,})(?:\.(\d{3}))?\.(?:pkl|png)", name)
    return None if match is None else int(match[1]) * 1000 + int(match[2] or 0)


def snapshots_by_age(folder: Path) -> list[Path]:
    """The network snapshots of a run, oldest first; the best model is not among them."""
    found = {path: nimg for path in folder.glob("network-snapshot-*.pkl")
             if (nimg := images_shown(path.name)) is not None and path.is_file()}
    return sorted(found, key=found.__getitem__)

#----------------------------------------------------------------------------
# What is in them.

def training_state(state: dict[str, Any]) -> dict[str, Any]:
    """What a state file holds: `Trainer.state_dict()`, and of which format it is."""
    return {"format": STATE_FORMAT, "version": VERSION} | state


def network_snapshot(state: dict[str, Any], config: TrainConfig, class_names: list[str],
                     score: dict[str, Any] | None) -> Snapshot:
    """What `network-snapshot-<kimg>.pkl` holds.

    Args:
        state: `Trainer.state_dict()`.
        config: Settings of the run.
        class_names: One per class.
        score: Metric and value that decide which snapshot is the best; None without metrics.
    """
    return {
        "format": NETWORK_FORMAT,
        "version": VERSION,
        "generator_config": state["generator_config"],
        "G": state["G"],
        "G_ema": state["G_ema"],
        "discriminator_config": state["discriminator_config"],
        "D": state["D"],
        "backbones": state["backbones"],
        "class_names": list(class_names),
        "progress": state["counters"] | {"pl_mean": float(state["pl_mean"])},
        "score": score,
        "options": to_dict(config),
    }


def generator_snapshot(G: Generator, class_names: list[str] | None, progress: dict[str, Any],
                       more: dict[str, Any]) -> Snapshot:
    """A snapshot of a generator that was made of a trained one: it takes the place of G_ema, and there is no D.

    Args:
        G: The generator.
        class_names: One per class, if they are known.
        progress: Counters of the run that trained the original.
        more: Where it comes from: plain values under names that snapshots of training do not have.
    """
    return {
        "format": NETWORK_FORMAT,
        "version": VERSION,
        "generator_config": to_dict(G.config),
        "G": None,
        "G_ema": copy_to_cpu(G.state_dict()),
        "discriminator_config": None,
        "D": None,
        "class_names": class_names,
        "progress": progress,
        **more,
    }


def generator_config(snapshot: Snapshot) -> GeneratorConfig:
    """Settings of the generator in a snapshot."""
    config: GeneratorConfig = from_dict(GeneratorConfig, snapshot["generator_config"])
    return config


def build_generator(snapshot: Snapshot, which: str = "G_ema") -> Generator:
    """The generator `which` ('G_ema' or 'G') of a snapshot, on the CPU."""
    state = snapshot.get(which) or snapshot["G_ema"]
    G = Generator(generator_config(snapshot))
    try:
        G.load_state_dict(state)
    except RuntimeError as err:
        raise UserError(f"the snapshot's {which} does not fit its own settings: {err}") from err
    return G
