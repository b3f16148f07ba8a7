# SPDX-License-Identifier: Apache-2.0
"""From options to the plan of a run: its settings, its data, where its weights come from, and its folder."""
import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from dnnlib import UserError
from dnnlib.classes import Classes
from torch_utils import distributed
from training.config import (
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimConfig,
    SavingConfig,
    TrainConfig,
    to_dict,
)
from training.data.local_copy import copy_to_local_disk
from training.data.zip_index import prepare_index
from training.dataset import ImageDataset, follow_classes
from training.generator.layer_schedule import stem_config, superres_config
from training.generator.superres import stage_table
from training.run.batch_size import check_index_range, default_batch_gpu, find_batch_gpu, usable_sizes
from training.run.folder import (
    RUN_INFO,
    STEM_KEY,
    Given,
    RunChoice,
    claim_run,
    create_run,
    find_run,
    known_stem,
    read_options,
    recorded_options,
    run_description,
    run_info,
)
from training.run.init_from import check_generator
from training.run.networks import Stem
from training.run.options import Preset, TrainOptions, check_options, filled_preset
from training.run.snapshots import Snapshot, generator_config
from training.run.sources import FILES, find_sources, with_kept_networks
from training.run.splitting import check_diversity, check_ghost_batch, split_batch

SMALL_DATA = 50_000         # Images below which --preset=small is worth a thought.


class SnapshotReader(Protocol):
    """Gives the content of a snapshot, by the path of a file or of a run: `legacy.open_snapshot`."""

    def __call__(self, path: str, mmap: bool = False) -> Snapshot: ...


SnapshotFinder = Callable[[str], Path]          # Path of a file or of a run -> the file: `legacy.find_snapshot`.


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """All that a run is decided by, before anything is computed or written."""

    config: TrainConfig
    dataset: ImageDataset
    stem: Stem | None                   # What a super-resolution stage is grown on.
    start: Snapshot | None              # Whose weights a new run begins with: --init-from, --resume.
    transfer: str                       # What of `start` fits G_ema, as a table; '' without.
    choice: RunChoice                   # Its folder, and whether the run there is continued.
    find: Callable[[], RunChoice]       # Chooses again: what is in the folders may change until one is owned.
    given: Given                        # What the command brings along beside its settings.
    options: TrainOptions
    title: str = ""                     # Which stage of a recipe it is, for people.

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.choice.folder

    @property
    def info(self) -> Mapping[str, Any]:
        """What is known of it beside its settings: `run_info`."""
        return self.given.info


def plan_run(options: TrainOptions, gpus: int, open_snapshot: SnapshotReader,
             planned_stem: Stem | None = None, find_snapshot: SnapshotFinder = Path) -> RunPlan:
    """Resolve the options of one stem or stage. Nothing is created. All processes call this.

    Args:
        options: As typed, or as a recipe sets them.
        gpus: Number of processes.
        open_snapshot: Reads --path_stem, --init-from and --resume.
        planned_stem: One that is not trained yet, in place of --path_stem.
        find_snapshot: The file that such a path means.

    Raises:
        UserError: options, files and data that do not go together; names the option and a remedy.
    """
    check_options(options)
    preset = filled_preset(options)
    if preset.batch is None:
        raise UserError(f"--batch is missing: --preset={options.preset} does not set it; the paper's stems use 2048")
    if options.superres and "syn_layers" in options.given:
        distributed.print0("NOTE: --syn_layers has no effect with --superres: the kept layers are those of --path_stem")
    dataset = _open_dataset(options)
    stem, no_stem = (planned_stem, None) if planned_stem or not options.superres else _open_stem(options, open_snapshot)
    if stem is not None:
        follow_stem(dataset, stem)
    beginning = options.init_from or options.resume
    start, no_start = _opened(beginning, open_snapshot) if beginning else (None, None)
    config = _settings(options, preset, dataset, stem, gpus)
    transfer = check_generator(config, start, dataset.class_names) if start is not None else ""
    name = run_description([str(options.cfg), dataset.name, f"gpus{gpus}", f"batch{config.batch}"], options.desc)
    info = run_info(dataset, options.device, options.desc)
    if stem is not None:
        info[STEM_KEY] = {"generator_config": to_dict(stem.config), "class_names": list(stem.class_names)}
    given = Given(info, find_sources(config, find_snapshot), dataset.inventory)
    # Runs are compared with the settings that were asked for, before networks in a run's folder take their place.
    find = functools.partial(find_run, Path(options.outdir), name, config, given, options.continue_changed)
    choice: RunChoice = distributed.broadcast_object(find() if distributed.rank() == 0 else None)
    if choice.resumed:
        config = _with_kept_networks(config, choice.folder, given)
    elif (missing := no_start or no_stem) is not None:
        raise missing
    return RunPlan(config, dataset, stem, start, transfer, choice, find, given, options)


def _open_dataset(options: TrainOptions) -> ImageDataset:
    """The data set of `--data`, with labels when `--cond` asks for them."""
    distributed.node_first(lambda: prepare_index(options.data))
    dataset = ImageDataset(options.data, use_labels=options.cond, xflip=options.mirror)
    if dataset.has_labels and not options.cond:
        distributed.print0(f"NOTE: {options.data} has class labels but --cond is off: training without classes. "
                           "Add --cond=1 for a class-conditional generator.")
    return dataset


def _opened(path: str, open_snapshot: SnapshotReader,
            mmap: bool = False) -> tuple[Snapshot, None] | tuple[None, UserError]:
    """The snapshot, or why it cannot be had: a run that has a state does without it."""
    try:
        return open_snapshot(path, mmap=mmap), None
    except UserError as err:
        return None, err


def _open_stem(options: TrainOptions, open_snapshot: SnapshotReader) -> tuple[Stem, UserError | None]:
    """The snapshot of --path_stem; where it cannot be had, why, and what a run that was begun with it knows of it."""
    assert options.path_stem is not None, "check_options has seen it"
    snapshot, missing = _opened(options.path_stem, open_snapshot, mmap=True)        # Only G_ema of it is read.
    known = snapshot or known_stem(Path(options.outdir), options.desc, options.path_stem)
    if known is None:
        assert missing is not None, "there would be a snapshot"
        raise missing
    return Stem(generator_config(known), tuple(known.get("class_names") or ()), snapshot), missing


def follow_stem(dataset: ImageDataset, stem: Stem) -> None:
    """Number the classes of the data as the stem does, whose mapping a stage keeps, and with it the classes.

    Raises:
        UserError: the data has other classes.
    """
    there, here = stem.config.c_dim, dataset.c_dim
    if (there > 0) != (here > 0):
        remedy = "--cond=1 and data with labels" if there > 0 else "--cond=0"
        raise UserError(f"--path_stem: the stem has {there} classes, --data with --cond={int(here > 0)} has {here}: "
                        f"use {remedy}, as for the stem")
    if there != here:
        raise UserError(f"--path_stem: the stem has {there} classes, --data has {here}: moving a stage to other "
                        "classes is not supported, because it keeps its stem's: train a stem on this data first "
                        "(--init-from takes what fits of another stem), then grow the stage on it")
    note = follow_classes(dataset, "the stem of --path_stem", Classes(stem.class_names, there))
    if note:
        distributed.print0(f"NOTE: {note}")


def _with_kept_networks(config: TrainConfig, folder: Path, given: Given) -> TrainConfig:
    """The settings of a run that goes on, with networks that are gone or moved replaced by those in its folder."""
    known = (recorded_options(folder) or {}).get(RUN_INFO) or {} if distributed.rank() == 0 else None
    return with_kept_networks(config, folder, (distributed.broadcast_object(known)).get(FILES) or {}, given.sources)


def _generator(options: TrainOptions, preset: Preset, dataset: ImageDataset, stem: Stem | None) -> GeneratorConfig:
    """The generator of the stem or stage that the options describe."""
    rotation = options.cfg == "stylegan3-r"
    full_precision = options.fp32 or options.precision == "fp32"
    if stem is None:
        widen = 4 if rotation else 2        # Config T doubles the widths of the command line, R doubles them again.
        return stem_config(dataset.resolution, preset.syn_layers, preset.cbase * widen, preset.cmax * widen,
                           preset.margin, rotation, full_precision, c_dim=dataset.c_dim, w_dim=preset.w_dim,
                           mapping_layers=options.map_depth)
    below = stem.config
    config = superres_config(below, options.up_factor, preset.head_layers, rotation, full_precision)
    if config.img_resolution != dataset.resolution:
        raise UserError(f"--up_factor={options.up_factor} makes {config.img_resolution} pixels of the stem's "
                        f"{below.img_resolution}, but --data has {dataset.resolution}: convert the data with "
                        f"dataset_tool.py --resolution={config.img_resolution}, or take another --up_factor")
    return config


def _settings(options: TrainOptions, preset: Preset, dataset: ImageDataset, stem: Stem | None,
              gpus: int) -> TrainConfig:
    """Every setting, checked."""
    assert preset.batch is not None, "plan_run has seen it"
    optim = OptimConfig.official(preset.batch, G_lr=options.glr, D_lr=options.dlr)
    if options.resume:      # Officially the average of a resumed network has its full half-life at once.
        optim = dataclasses.replace(optim, ema_rampup=None)
    config = TrainConfig(
        data=DataConfig(str(options.data), dataset.resolution, dataset.c_dim, options.mirror, options.workers),
        generator=_generator(options, preset, dataset, stem),
        discriminator=DiscriminatorConfig(tuple(options.backbones), dataset.resolution, dataset.c_dim, options.san,
                                          ghost_batch=options.ghost_batch, feature_size=options.feature_size),
        loss=LossConfig(cls_weight=options.cls_weight, cls_model=options.classifier,
                        diversity_weight=preset.diversity),
        optim=optim,
        batch=preset.batch, batch_gpu=split_batch(preset.batch, options.batch_gpu, gpus), total_kimg=options.kimg,
        kimg_per_tick=options.tick, snapshot_ticks=options.snap, metrics=tuple(options.metrics),
        embedding=options.embedding, path_stem=options.path_stem, resume=options.resume, init_from=options.init_from,
        seed=options.seed, precision="fp32" if options.fp32 else options.precision,
        feature_precision=options.feature_precision, cudnn_benchmark=not options.nobench,
        restart_every=options.restart_every, on_collapse=options.on_collapse, wandb=options.wandb,
        diagnose=options.diagnose,
        saving=SavingConfig(options.keep, options.keep_every, options.snap_state, options.save_in_background,
                            options.best_metric, options.stop_patience))
    check_diversity(preset.diversity, config.batch_gpu)
    check_ghost_batch(options.ghost_batch, config.batch_gpu)
    config = _overridden(config, preset.overrides)
    if options.batch_gpu in (None, "auto"):
        config = dataclasses.replace(config, batch_gpu=default_batch_gpu(config, gpus))
    check_index_range(config, gpus)
    return config


def _overridden(config: TrainConfig, overrides: Mapping[str, Any]) -> TrainConfig:
    """The settings with some replaced by their dotted names, e.g. 'loss.pl_weight'."""
    for name, value in overrides.items():
        group, field = name.split(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{field: value})})
    return config

#----------------------------------------------------------------------------
# What needs the device, or the disk of the node.

def with_micro_batch(plan: RunPlan, gpus: int, device: torch.device) -> RunPlan:
    """The plan with its micro-batch decided, where --batch-gpu=auto leaves that to the machine: what the run had
    before, if it can have that again; else what fits and is fast. All processes call this."""
    if plan.options.batch_gpu != "auto" or plan.options.dry_run:
        return plan
    config = plan.config
    found = (distributed.broadcast_object(read_options(plan.folder)) or {}).get("batch_gpu", 0)
    if plan.choice.resumed and found in usable_sizes(config, gpus):
        distributed.print0(f"--batch-gpu=auto: {found}, as before")
    else:
        found = find_batch_gpu(config, device, distributed.print0, plan.dataset.class_names)
        distributed.print0(f"--batch-gpu=auto: {found}")
    official = config.loss.reference_micro_batch
    if config.discriminator.ghost_batch == 0 and found != official:
        remedy = f": --ghost-batch={official} keeps that" if config.batch // gpus % official == 0 else ""
        distributed.print0("NOTE: D's heads normalise over a micro-batch, and path lengths take their mean from it: "
                           f"here it has {found} image(s), in the published runs {official}{remedy}")
    check_ghost_batch(config.discriminator.ghost_batch, found)
    return dataclasses.replace(plan, config=dataclasses.replace(config, batch_gpu=found))


def with_local_data(plan: RunPlan) -> RunPlan:
    """The plan with its data read from the copy below `--stage-to`, which the first process of every node makes. All
    processes call this."""
    folder, options = plan.options.stage_to, plan.options
    if folder is None:
        return plan
    path = distributed.node_first(lambda: copy_to_local_disk(options.data, folder))
    dataset = ImageDataset(path, use_labels=options.cond, xflip=options.mirror)
    follow_classes(dataset, "the run", Classes(plan.dataset.class_names))
    return dataclasses.replace(plan, dataset=dataset)


@contextlib.contextmanager
def owned(plan: RunPlan) -> Iterator[RunPlan]:
    """The plan with its run's folder, which is made, with the settings in it, and belongs to this command for the
    block. All processes call this.

    Raises:
        UserError: another process has it.
    """
    lock, choice = None, None
    if distributed.rank() == 0:
        choice, lock = claim_run(plan.find)
        create_run(choice, plan.config, plan.given)
    try:
        yield dataclasses.replace(plan, choice=distributed.broadcast_object(choice))
    finally:
        if lock is not None:
            lock.release()

#----------------------------------------------------------------------------
# For people.

def print_plan(plan: RunPlan, gpus: int) -> None:
    """All settings, and what will happen with them."""
    config, dataset = plan.config, plan.dataset
    distributed.print0(json.dumps(to_dict(config), indent=2))
    distributed.print0(*plan.choice.notes, sep="\n")
    distributed.print0(f"\n{'Continues' if plan.choice.resumed else 'Starts'}: {plan.folder}\n"
                       f"Data:      {dataset.name}, {len(dataset)} images of {dataset.resolution} "
                       f"pixels, {dataset.c_dim or 'no'} classes\n"
                       f"Batch:     {config.batch} = {gpus} process(es) x {config.batch_gpu} x "
                       f"{config.batch // (config.batch_gpu * gpus)} micro-batches\n")
    if dataset.changes:
        distributed.print0(f"NOTE: --data: {dataset.changes}: dataset_tool.py does that once and for all\n")
    if len(dataset) < SMALL_DATA and plan.stem is None:
        distributed.print0(f"NOTE: fewer than {SMALL_DATA} images: --preset=small has widths and depth for such data\n")


def print_layers(plan: RunPlan) -> None:
    """Print the layers, and what of another network they begin with."""
    table = stage_table(plan.config.generator, plan.stem.config if plan.stem else None)
    distributed.print0(f"{table}\n{plan.transfer}\n\nDry run: nothing was written.")
