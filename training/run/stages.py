# SPDX-License-Identifier: Apache-2.0
"""Running the stages of a recipe in order, in one process group.

The run folder of a stage lies in <outdir>/stage<resolution>. A stage is grown on the best model of the one before, or
on its last where no metric was taken. Started again, a recipe passes over the stages that ended and continues in the
one that did not.
"""
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib import EasyDict, UserError
from dnnlib.util import atomic_write_text
from torch_utils import distributed
from training.config import to_dict
from training.run.recipes import RECIPES, Stage, StageRun, command_line, plan_stages, select_stages, stage_dir

FINISHED_FILE = "finished.json"     # In the run folder of a stage that ended.

Resolve = Callable[[EasyDict, set[str], dict[str, Any] | None], EasyDict]
Train = Callable[[EasyDict, EasyDict], int]

#----------------------------------------------------------------------------
# What is there of a stage.

def has_snapshot(folder: Path) -> bool:
    """Whether a run has a network that the next stage can be grown on."""
    return (folder / "best_model.pkl").is_file() or any(folder.glob("network-snapshot*.pkl"))


def is_finished(folder: Path, total_kimg: float) -> bool:
    """Whether the stage ended, and is not to become longer than it was to be then."""
    try:
        return json.loads((folder / FINISHED_FILE).read_text())["kimg"] >= total_kimg
    except (OSError, ValueError, KeyError):
        return False


def mark_finished(folder: Path, total_kimg: float) -> None:
    """Note that a stage of this length ended: by reaching it, by --stop-patience or by a STOP file."""
    atomic_write_text(folder / FINISHED_FILE, json.dumps({"kimg": total_kimg}) + "\n")


def newest_run(folder: Path) -> Path | None:
    """The newest run with a snapshot in the folder of a stage."""
    runs = sorted(p for p in folder.glob("[0-9][0-9][0-9][0-9][0-9]-*") if has_snapshot(p))
    return runs[-1] if runs else None


def stem_of_first(opts: EasyDict, first: Stage) -> Path | None:
    """The run that the first of the selected stages is grown on; None for the first of the recipe.

    Raises:
        UserError: it was not trained here.
    """
    stages = RECIPES[opts.recipe]
    index = stages.index(first)
    if index == 0:
        return None
    before = stages[index - 1]
    folder = newest_run(stage_dir(opts.outdir, before))
    if folder is None:
        raise UserError(f"--stages: stage {first.resolution} is grown on stage {before.resolution}, which has no "
                        f"snapshot in {stage_dir(opts.outdir, before)}: add {before.resolution} to --stages")
    return folder

#----------------------------------------------------------------------------
# Running.

def resolved_stages(opts: EasyDict, runs: list[StageRun], resolve: Resolve) -> Iterator[tuple[StageRun, EasyDict]]:
    """(stage, settings) in order; each is resolved when the one before has been dealt with.

    A stem that is not trained yet is stood in for by the settings that it will have.
    """
    stem = distributed.broadcast_object(stem_of_first(opts, runs[0].stage))
    planned = None
    for run in runs:
        stand_in = None
        if run.options.superres:
            run.options.path_stem = str(stem)
            stand_in = None if has_snapshot(stem) else planned
        setup = resolve(run.options, run.given, stand_in)
        planned = {"generator_config": to_dict(setup.config.generator), "class_names": setup.dataset.class_names}
        stem = setup.run.folder
        yield run, setup


def planned_stages(opts: EasyDict, given: set[str], defaults: dict[str, Any],
                   resolve: Resolve) -> Iterator[EasyDict]:
    """Settings of the stages that `opts` asks for. Those below are resolved, too, and need not be trained."""
    wanted = select_stages(opts.recipe, opts.stages)
    runs = plan_stages(EasyDict(opts | {"stages": None}), given - {"stages"}, defaults)
    for run, setup in resolved_stages(EasyDict(opts | {"stages": None}), runs, resolve):
        if run.stage in wanted:
            yield setup


def check_recipe(opts: EasyDict, given: set[str], defaults: dict[str, Any], resolve: Resolve) -> None:
    """Resolve all stages, so that the mistakes of the last one show before the first is trained."""
    for _ in resolved_stages(opts, plan_stages(opts, given, defaults), resolve):
        pass


def run_recipe(opts: EasyDict, given: set[str], defaults: dict[str, Any], spelling: dict[str, str], resolve: Resolve,
               train: Train) -> int:
    """Train the stages of `opts.recipe` in order; every process calls this.

    Args:
        opts, given, defaults: As in `plan_stages`.
        spelling: As in `command_line`.
        resolve: (options, given, stand-in for the stem or None) -> config, dataset, stem, start and run (the folder).
        train: (options, what `resolve` returned) -> exit code.

    Returns:
        The exit code of the stage that did not end with 0, else 0.
    """
    check_recipe(opts, given, defaults, resolve)
    runs = plan_stages(opts, given, defaults)
    for number, (run, setup) in enumerate(resolved_stages(opts, runs, resolve), start=1):
        title = f"Stage {number} of {len(runs)} of {opts.recipe}: {run.stage.resolution} pixels"
        if distributed.broadcast_object(is_finished(setup.run.folder, setup.config.total_kimg)):
            distributed.print0(f"{title}: finished, in {setup.run.folder}")
            continue
        distributed.print0(f"\n{title}\n{command_line(run, spelling)}\n")
        code = train(run.options, setup)
        if code != 0:
            return code
        distributed.barrier()
        del setup
        gc.collect()                        # The networks of a stage must be gone before the next one's come.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return 0
