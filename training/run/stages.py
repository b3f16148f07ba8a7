# SPDX-License-Identifier: Apache-2.0
"""The stages of a recipe as plans, in order.

The run folder of a stage lies in <outdir>/stage<resolution>. A stage is grown on the best model of the one before, or
on its last where no metric was taken. Started again, a recipe passes over the stages that ended and continues in the
one that did not.
"""
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from dnnlib import UserError
from dnnlib.util import atomic_write_text, parse_json
from torch_utils import distributed
from training.run.folder import BEST_FILE, typed_stem
from training.run.networks import Stem
from training.run.options import TrainOptions
from training.run.plan import RunPlan, SnapshotFinder, SnapshotReader, plan_run
from training.run.recipes import RECIPES, Stage, select_stages, stage_dir, stage_options
from training.run.snapshots import snapshots_by_age

FINISHED_FILE = "finished.json"     # In the run folder of a stage that ended.

#----------------------------------------------------------------------------
# What is there of a stage.

def has_snapshot(folder: Path) -> bool:
    """Whether a run has a network that the next stage can be grown on."""
    return (folder / BEST_FILE).is_file() or bool(snapshots_by_age(folder))


def is_finished(folder: Path, total_kimg: float) -> bool:
    """Whether the stage ended, and is not to become longer than it was to be then."""
    try:
        text = (folder / FINISHED_FILE).read_text(encoding="utf-8")
        return float(parse_json(text)["kimg"]) >= total_kimg
    except (OSError, ValueError, KeyError, TypeError):
        return False


def mark_finished(folder: Path, total_kimg: float) -> None:
    """Note that a stage of this length ended: by reaching it, by --stop-patience or by a STOP file."""
    atomic_write_text(folder / FINISHED_FILE, json.dumps({"kimg": total_kimg}) + "\n")


def newest_run(folder: Path) -> Path | None:
    """The newest run with a snapshot in the folder of a stage."""
    runs = sorted(p for p in folder.glob("[0-9][0-9][0-9][0-9][0-9]-*") if has_snapshot(p))
    return runs[-1] if runs else None


def stem_of_first(options: TrainOptions, first: Stage) -> Path | None:
    """The run that the first of the selected stages is grown on; None for the first of the recipe.

    Raises:
        UserError: it was not trained here.
    """
    stages = RECIPES[str(options.recipe)]
    index = stages.index(first)
    if index == 0:
        return None
    before = stages[index - 1]
    folder = newest_run(stage_dir(options.outdir, before))
    if folder is None:
        raise UserError(f"--stages: stage {first.resolution} is grown on stage {before.resolution}, which has no "
                        f"snapshot in {stage_dir(options.outdir, before)}: add {before.resolution} to --stages")
    return folder

def stem_that_is_gone(stages: list[tuple[Stage, TrainOptions]]) -> tuple[int, Path | None]:
    """The last stage that was begun on a stem which was moved or deleted since: its position among the stages, and its
    stem. Its state has everything, so that it goes on; begun again, the stages before it would give another stem.

    Returns:
        0 and None where every stem is there.
    """
    for number, (_, options) in reversed(list(enumerate(stages))):
        typed = typed_stem(Path(options.outdir), options.desc) if options.superres else None
        if typed is not None:
            return (0, None) if has_snapshot(Path(typed)) else (number, Path(typed))
    return 0, None

#----------------------------------------------------------------------------
# Plans.

def plan_recipe(options: TrainOptions, gpus: int, open_snapshot: SnapshotReader,
                find_snapshot: SnapshotFinder = Path) -> Iterator[RunPlan]:
    """The plans of the stages that were asked for, in order; each is made when the one before has been dealt with.

    Args:
        options: Those of the command line; `recipe` names the recipe.
        gpus, open_snapshot, find_snapshot: As in `plan_run`.

    Raises:
        UserError: as `stage_options` and `plan_run`; the stage below the first one was not trained.
    """
    stages = stage_options(options)
    first, gone = distributed.broadcast_object(stem_that_is_gone(stages) if distributed.rank() == 0 else None)
    stem = gone or distributed.broadcast_object(stem_of_first(options, stages[0][0]))
    note = f" (of the stage before it no run is left: this one goes on without {gone})" if gone else ""
    plans = _plans(stages[first:], stem, gpus, open_snapshot, find_snapshot)
    for number, (stage, plan) in enumerate(plans, start=first + 1):
        title = f"Stage {number} of {len(stages)} of {options.recipe}: {stage.resolution} pixels{note}"
        yield dataclasses.replace(plan, title=title)
        note = ""


def plan_untrained(options: TrainOptions, gpus: int, open_snapshot: SnapshotReader,
                   find_snapshot: SnapshotFinder = Path) -> Iterator[RunPlan]:
    """The plans of the stages that were asked for, for measurements: those below need not have been trained."""
    wanted = select_stages(str(options.recipe), options.stages)
    stages = stage_options(dataclasses.replace(options, stages=None, given=options.given - {"stages"}))
    for stage, plan in _plans(stages, None, gpus, open_snapshot, find_snapshot):
        if stage in wanted:
            yield plan


def _plans(stages: list[tuple[Stage, TrainOptions]], stem: Path | None, gpus: int,
           open_snapshot: SnapshotReader, find_snapshot: SnapshotFinder) -> Iterator[tuple[Stage, RunPlan]]:
    """Stages, each grown on the one before, the first on `stem`.

    A stem that is not trained yet is stood in for by the settings that it will have.
    """
    below: Stem | None = None
    for stage, options in stages:
        planned = None
        if options.superres:
            assert stem is not None, "only the first stage of a recipe has no stem"
            options = dataclasses.replace(options, path_stem=str(stem))
            planned = None if has_snapshot(stem) else below
        plan = plan_run(options, gpus, open_snapshot, planned, find_snapshot)
        below, stem = Stem(plan.config.generator, tuple(plan.dataset.class_names)), plan.folder
        yield stage, plan
