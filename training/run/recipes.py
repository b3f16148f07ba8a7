# SPDX-License-Identifier: Apache-2.0
"""The published runs as lists of stages, and what a command line makes of them. `training.run.stages` plans them.

A stage is what one train.py command trains. Every stage but the first is grown on the one before.
"""
import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dnnlib import UserError
from training.run.options import DEFAULTS, TrainOptions, spelled

#----------------------------------------------------------------------------
# The recipes. Options are named as in `TrainOptions` ('batch_gpu' is --batch-gpu).

@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a recipe."""

    resolution: int
    options: dict[str, Any]


def _stage(resolution: int, **options: Any) -> Stage:
    """A first stage."""
    return Stage(resolution, options)


def _superres(resolution: int, **options: Any) -> Stage:
    """A stage that doubles the resolution of the one before."""
    return Stage(resolution, {"superres": True, "up_factor": 2, **options})


_IMAGENET = {"cfg": "stylegan3-t", "cond": True, "batch_gpu": 8}
_CIFAR = {"cfg": "stylegan3-r", "cond": True, "batch": 2048}
_FFHQ = {"mirror": True}
_SMALL = {"cfg": "stylegan3-t", "preset": "small", "batch": 64}

RECIPES: dict[str, tuple[Stage, ...]] = {
    "imagenet256": (
        _stage(16, **_IMAGENET, syn_layers=10, batch=2048, mirror=True, snap=10),
        _superres(32, **_IMAGENET, head_layers=7, batch=2048, mirror=True, cls_weight=0.0),
        *(_superres(r, **_IMAGENET, head_layers=7, batch=256, mirror=True, cls_weight=8.0) for r in (64, 128)),
        _superres(256, **_IMAGENET, head_layers=7, batch=256, cls_weight=8.0, kimg=11000),
    ),
    "cifar10": (
        _stage(16, **_CIFAR, syn_layers=6, kimg=300000),
        _superres(32, **_CIFAR, head_layers=7, kimg=250000),
    ),
    "ffhq1024": (
        _stage(16, **_FFHQ, cfg="stylegan3-r", syn_layers=6, batch=2048),
        _superres(32, **_FFHQ, cfg="stylegan3-r", head_layers=7, batch=2048),
        *(_superres(r, **_FFHQ, cfg="stylegan3-t", head_layers=4, batch=256) for r in (64, 128, 256)),
        *(_superres(r, **_FFHQ, cfg="stylegan3-t", head_layers=4, batch=128) for r in (512, 1024)),
    ),
    "small": (
        _stage(16, **_SMALL, syn_layers=7),
        *(_superres(r, **_SMALL, head_layers=4) for r in (32, 64, 128, 256)),
    ),
}

SET_BY_RECIPE = ("stem", "superres", "path_stem", "up_factor")      # A recipe without these would be none.
FIRST_STAGE_ONLY = ("cbase", "cmax", "syn_layers", "map_depth", "embedding", "init_from", "resume")
LATER_STAGES_ONLY = ("head_layers", "cls_weight", "classifier")

#----------------------------------------------------------------------------
# From the command line to the options of every stage.

def select_stages(name: str, wanted: Sequence[int] | None) -> tuple[Stage, ...]:
    """The stages of a recipe, or those of the resolutions in `wanted`, which must follow each other."""
    stages = RECIPES[name]
    known = [stage.resolution for stage in stages]
    if not wanted:
        return stages
    if unknown := sorted(set(wanted) - set(known)):
        raise UserError(f"--stages: {unknown[0]} is no stage of --recipe={name}: "
                        f"choose from {', '.join(map(str, known))}")
    first, last = known.index(min(wanted)), known.index(max(wanted))
    if missing := sorted(set(known[first:last + 1]) - set(wanted)):
        raise UserError(f"--stages={','.join(map(str, sorted(wanted)))} leaves out {missing[0]}: every stage is grown "
                        f"on the one before: add {missing[0]}, or run one stage at a time")
    return stages[first:last + 1]


def stage_options(options: TrainOptions) -> list[tuple[Stage, TrainOptions]]:
    """Every stage that was asked for, with its own options. What was typed goes before what the recipe says, in every
    stage where the option has an effect.

    Args:
        options: Those of the command line; `recipe` names the recipe.

    Raises:
        UserError: options that the recipe sets by necessity; unknown stages; data that are not there.
    """
    recipe, given = str(options.recipe), options.given
    if wrong := [name for name in SET_BY_RECIPE if name in given]:
        raise UserError(f"--{wrong[0]} beside --recipe={recipe}: the recipe sets it for every stage: leave it "
                        "out, or leave out --recipe and train one stage")
    stages = select_stages(recipe, options.stages)
    first = RECIPES[recipe][0]
    if first not in stages and (wrong := [name for name in FIRST_STAGE_ONLY if name in given]):
        raise UserError(f"{spelled(wrong[0])} has an effect in stage {first.resolution} only, which "
                        "--stages leaves out: leave out the option, or add the stage")
    found = []
    for stage in stages:
        without = LATER_STAGES_ONLY if stage is first else FIRST_STAGE_ONLY
        own = dataclasses.replace(options, **{name: DEFAULTS[name] for name in without}, given=given - set(without))
        own = own.with_values({name: value for name, value in stage.options.items() if name not in own.given})
        found.append((stage, dataclasses.replace(
            own, recipe=None, stages=None, outdir=str(stage_dir(options.outdir, stage)),
            data=find_data(options.data, stage.resolution, is_only=len(stages) == 1))))
    return found


def find_data(data: str, resolution: int, is_only: bool = False) -> str:
    """The data set of one resolution.

    Args:
        data: A path with {resolution} in it, or a folder that holds <name><resolution>.zip.
        resolution: That of the stage.
        is_only: No other stage is asked for, so a plain data set will do.

    Raises:
        UserError: it is not there, or cannot be told from others.
    """
    path = Path(data)
    if "{resolution}" in data:
        path = Path(data.replace("{resolution}", str(resolution)))
    elif path.is_dir():
        found = sorted(p for p in path.iterdir() if re.fullmatch(rf"(.*\D)?{resolution}\.zip", p.name))
        if len(found) > 1:
            raise UserError(f"--data={data}: {found[0].name} and {found[1].name} both could be the data of "
                            f"{resolution} pixels: name them by --data={data}/NAME{{resolution}}.zip")
        if not found and is_only and not list(path.glob("*.zip")):
            return data
        path = found[0] if found else path / f"{_common_name(path)}{resolution}.zip"
    elif not is_only:
        raise UserError(f"--data={data}: a recipe needs a data set for every stage: write {{resolution}} where their "
                        "names differ, e.g. --data=data/imagenet{resolution}.zip, or name their folder")
    if not path.exists():
        raise UserError(f"--data: {path} is missing: make it with python dataset_tool.py --source=IMAGES --dest={path} "
                        f"--resolution={resolution} --transform=center-crop")
    return str(path)


def _common_name(folder: Path) -> str:
    """What the archives in a folder are called, without their resolution."""
    names = sorted(p.name for p in folder.glob("*.zip"))
    return re.sub(r"\d+\.zip$", "", names[0]) if names else "data"


def stage_dir(outdir: str | Path, stage: Stage) -> Path:
    """Where the run folders of a stage lie."""
    return Path(outdir) / f"stage{stage.resolution}"


def command_line(options: TrainOptions) -> str:
    """The train.py command that trains this stage alone."""
    words = ["python", "train.py"]
    for name in sorted((options.given | {"data", "outdir", "path_stem"}) - {"recipe", "stages", "dry_run"}):
        value = getattr(options, name)
        if value is None or value is False:
            continue
        text = (",".join(map(str, value)) or "none") if isinstance(value, tuple) else str(value)
        words.append(spelled(name) if value is True and name == "superres" else
                     f"{spelled(name)}={int(value) if value is True else text}")
    return shlex.join(words)
