# SPDX-License-Identifier: Apache-2.0
"""Train StyleGAN-XL with SAN heads: a stem, or a super-resolution stage on top of one.

Options -> training.config.TrainConfig -> training.training_loop. Under torchrun every process runs this file.
"""
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from dnnlib import EasyDict, UserError, cli
from torch_utils import distributed, misc
from training.run.recipes import RECIPES
from training.run.splitting import check_diversity, check_split_group, split_batch

OFFICIAL_BACKBONES = ["deit_base_distilled_patch16_224", "tf_efficientnet_lite0"]
DIAGNOSIS_IMAGES = 1024     # Per side, of --diagnose without a number.
SMALL_DATA = 50_000         # Images below which --preset=small is worth a thought.

#----------------------------------------------------------------------------
# Presets fill options that were left out; `overrides` reach settings that have no option of their own.

PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(cbase=32768, cmax=512, syn_layers=14, head_layers=7, margin=10, w_dim=512, diversity=0.0),
    "small": dict(cbase=16384, cmax=256, syn_layers=7,  head_layers=4, margin=10, w_dim=512, diversity=0.0),
    "demo":  dict(cbase=256,   cmax=16,  syn_layers=4,  head_layers=4, margin=2,  w_dim=128, diversity=4.0,
                  batch=32, overrides={
        "discriminator.diffaug": (), "discriminator.max_channels": 128,
        "loss.blur_init_sigma": 0.0, "loss.pl_weight": 0.0, "optim.ema_kimg": 2.0, "optim.eps": 1e-8}),
}

STEM_ONLY = ("cbase", "cmax", "map_depth", "embedding")
SUPERRES_ONLY = ("path_stem", "up_factor", "head_layers", "cls_weight", "classifier")

#----------------------------------------------------------------------------
# Checks that need nothing but the options.

def check_options(opts: EasyDict, given: set[str]) -> None:
    """Refuse options that would have no effect: a user who sets one expects one.

    `--syn_layers` beside `--superres` is let through with a note, because published commands have it.
    """
    if opts.cfg is None:
        raise UserError("--cfg is missing: choose stylegan3-t or stylegan3-r")
    if opts.bench and opts.dry_run:
        raise UserError("--bench and --dry-run exclude each other: --dry-run computes nothing: leave one out")
    if opts.stages:
        raise UserError("--stages has an effect only with --recipe: add --recipe or leave it out")
    if opts.init_from and opts.resume:
        raise UserError("--init-from and --resume exclude each other: --init-from takes what fits, --resume wants all")
    if opts.superres and opts.stem:
        raise UserError("--stem and --superres exclude each other: train the stem, then grow the next stage on it")
    if opts.superres:
        for name in STEM_ONLY:
            if name in given:
                raise UserError(f"--{name.replace('_', '-')} has no effect with --superres: mapping, embedding and "
                                "widths come from the stem: leave it out")
        if opts.path_stem is None:
            raise UserError("--superres needs --path_stem: the run folder or snapshot of the stage before")
    else:
        for name in SUPERRES_ONLY:
            if name in given:
                raise UserError(f"--{name} has an effect only with --superres: add --superres or leave it out")
    for name, value, neutral in (("precision", opts.precision, ("auto", "fp32")),
                                 ("feature-precision", opts.feature_precision, ("fp32",))):
        if opts.fp32 and value not in neutral:
            raise UserError(f"--fp32=1 and --{name}={value} exclude each other: leave one out")
    if opts.freezed:
        raise UserError(f"--freezed={opts.freezed} has no effect: the features of a projected discriminator are always "
                        "frozen and its heads are trained: leave it out")


def check_saving(opts: EasyDict) -> None:
    """The metric that decides must be measured."""
    from metrics.protocols import expand
    opts.metrics = expand(opts.metrics)
    if opts.best_metric is not None and opts.best_metric not in opts.metrics:
        raise UserError(f"--best-metric={opts.best_metric} is not among --metrics={','.join(opts.metrics) or 'none'}: "
                        "add it there, or take one of them")
    if opts.stop_patience > 0 and not opts.metrics:
        raise UserError(f"--stop-patience={opts.stop_patience} counts evaluations, and there are none with "
                        "--metrics=none: add a metric or leave it out")

#----------------------------------------------------------------------------
# Options -> settings.

def open_dataset(opts: EasyDict):
    """The data set of `--data`, with labels when `--cond` asks for them."""
    from training.data.zip_index import prepare_index
    from training.dataset import ImageDataset
    distributed.node_first(lambda: prepare_index(opts.data))
    dataset = ImageDataset(opts.data, use_labels=opts.cond, xflip=opts.mirror)
    if dataset.has_labels and not opts.cond:
        distributed.print0(f"NOTE: {opts.data} has class labels but --cond is off: training without classes. "
                           "Add --cond=1 for a class-conditional generator.")
    return dataset


def stage_dataset(opts: EasyDict, dataset: Any):
    """The data set in its copy below `--stage-to`, which the first process of every node makes; without it, `dataset`.

    All processes call this.
    """
    if opts.stage_to is None:
        return dataset
    from training.data.local_copy import stage
    from training.dataset import ImageDataset
    path = distributed.node_first(lambda: stage(opts.data, opts.stage_to))
    return ImageDataset(path, use_labels=opts.cond, xflip=opts.mirror)


def generator_settings(opts: EasyDict, dataset: Any, stem: dict[str, Any] | None):
    """GeneratorConfig of the stem or stage that the options describe."""
    from training.generator.layer_schedule import stem_config, superres_config
    from training.run.snapshots import generator_config
    rotation = opts.cfg == "stylegan3-r"
    full_precision = opts.fp32 or opts.precision == "fp32"
    if stem is None:
        widen = 4 if rotation else 2        # Config T doubles the widths of the command line, R doubles them again.
        return stem_config(dataset.resolution, opts.syn_layers, opts.cbase * widen, opts.cmax * widen, opts.margin,
                           rotation, full_precision, c_dim=dataset.c_dim, w_dim=opts.w_dim,
                           mapping_layers=opts.map_depth)
    below = generator_config(stem)
    if below.c_dim != dataset.c_dim:
        raise UserError(f"--path_stem: the stem has {below.c_dim} classes, --data with --cond={int(opts.cond)} has "
                        f"{dataset.c_dim}: use the data set that the stem was trained on, at the new resolution")
    config = superres_config(below, opts.up_factor, opts.head_layers, rotation, full_precision)
    if config.img_resolution != dataset.resolution:
        raise UserError(f"--up_factor={opts.up_factor} makes {config.img_resolution} pixels of the stem's "
                        f"{below.img_resolution}, but --data has {dataset.resolution}: convert the data with "
                        f"dataset_tool.py --resolution={config.img_resolution}, or take another --up_factor")
    return config


def apply_overrides(config: Any, overrides: dict[str, Any]) -> Any:
    """Replace settings by their dotted names, e.g. 'loss.pl_weight'."""
    for name, value in overrides.items():
        group, field = name.split(".")
        config = dataclasses.replace(config, **{group: dataclasses.replace(getattr(config, group), **{field: value})})
    return config


def stem_snapshot(opts: EasyDict) -> dict[str, Any] | None:
    """The snapshot of --path_stem; where that is gone, what a run that was begun with it knows of it."""
    from legacy import open_snapshot
    from training.run.folder import known_stem
    if not opts.superres:
        return None
    try:
        return open_snapshot(opts.path_stem, mmap=True)
    except UserError:
        known = known_stem(Path(opts.outdir), opts.desc, opts.path_stem)
        if known is None:
            raise
        return known


def start_snapshot(opts: EasyDict) -> tuple[dict[str, Any] | None, UserError | None]:
    """The snapshot of --init-from or --resume, or why it cannot be had: a run that has a state does without it."""
    from legacy import open_snapshot
    path = opts.init_from or opts.resume
    if not path:
        return None, None
    try:
        return open_snapshot(path), None
    except UserError as err:
        return None, err


def setup_config(opts: EasyDict, given: set[str], gpus: int, stem: dict[str, Any] | None = None) -> EasyDict:
    """Resolve the options.

    Args:
        opts, given: All options; those that were typed, or set by a recipe.
        gpus: Number of processes.
        stem: Stands in for a snapshot in --path_stem that is not there yet: its 'generator_config'.

    Returns:
        config (TrainConfig), dataset, stem (snapshot or None), start (snapshot or None), transfer (what of `start`
        fits G_ema, as a table), desc.
    """
    from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, SavingConfig, TrainConfig
    from training.run.batch_size import check_index_range, default_batch_gpu
    from training.run.folder import run_description
    from training.run.init_from import check_generator
    from training.watch.reporting import import_wandb
    check_options(opts, given)
    check_saving(opts)
    preset = PRESETS[opts.preset]
    for name, value in preset.items():
        opts[name] = value if opts.get(name) is None else opts[name]
    if opts.batch is None:
        raise UserError(f"--batch is missing: --preset={opts.preset} does not set it; the paper's stems use 2048")
    if opts.superres and "syn_layers" in given:
        distributed.print0("NOTE: --syn_layers has no effect with --superres: the kept layers are those of --path_stem")

    if opts.wandb:
        import_wandb(opts.wandb)
    dataset = open_dataset(opts)
    stem = stem or stem_snapshot(opts)
    start, missing = start_snapshot(opts)
    generator = generator_settings(opts, dataset, stem)
    optim = OptimConfig.official(opts.batch, G_lr=opts.glr, D_lr=opts.dlr)
    if opts.resume:     # Officially the average of a resumed network has its full half-life at once.
        optim = dataclasses.replace(optim, ema_rampup=None)
    config = TrainConfig(
        data=DataConfig(str(opts.data), dataset.resolution, dataset.c_dim, opts.mirror, opts.workers),
        generator=generator,
        discriminator=DiscriminatorConfig(tuple(opts.backbones), dataset.resolution, dataset.c_dim, opts.san,
                                          split_group=opts.split_group),
        loss=LossConfig(cls_weight=opts.cls_weight, cls_model=opts.classifier, diversity_weight=opts.diversity),
        optim=optim,
        batch=opts.batch, batch_gpu=split_batch(opts.batch, opts.batch_gpu, gpus), total_kimg=opts.kimg,
        kimg_per_tick=opts.tick, snapshot_ticks=opts.snap, metrics=tuple(opts.metrics), embedding=opts.embedding,
        path_stem=opts.path_stem, resume=opts.resume, init_from=opts.init_from, seed=opts.seed,
        precision="fp32" if opts.fp32 else opts.precision, feature_precision=opts.feature_precision,
        cudnn_benchmark=not opts.nobench, restart_every=opts.restart_every, on_collapse=opts.on_collapse,
        wandb=opts.wandb, diagnose=opts.diagnose,
        saving=SavingConfig(opts.keep, opts.keep_every, opts.snap_state, opts.save_in_background, opts.best_metric,
                            opts.stop_patience))
    check_diversity(opts.diversity, config.batch_gpu)
    check_split_group(opts.split_group, config.batch_gpu)
    config = apply_overrides(config, preset.get("overrides", {}))
    if opts.batch_gpu in (None, "auto"):
        config = dataclasses.replace(config, batch_gpu=default_batch_gpu(config, gpus))
    check_index_range(config, gpus)
    transfer = check_generator(config, start, dataset.class_names) if start is not None else ""
    desc = run_description([opts.cfg, dataset.name, f"gpus{gpus}", f"batch{opts.batch}"], opts.desc)
    return EasyDict(config=config, dataset=dataset, stem=stem, start=start, missing=missing, transfer=transfer,
                    desc=desc)

#----------------------------------------------------------------------------
# Running.

def make_evaluator(opts: EasyDict, dataset: Any, device: Any):
    """Metrics of G_ema against the training data, for the loop; None without metrics."""
    if not opts.metrics:
        return None
    from inference.evaluation import network_evaluator
    return network_evaluator(opts.metrics, dataset, opts.detector, opts.num, device, seed=opts.seed)


def make_diagnosis(config: Any, dataset: Any):
    """The diagnosis of D for the loop; None without `--diagnose`."""
    if not config.diagnose:
        return None
    from training.watch.discriminator_diagnosis import training_diagnosis
    return training_diagnosis(dataset, config.diagnose, config.batch_gpu, config.seed)


def print_setup(setup: EasyDict, gpus: int) -> None:
    """All settings, and what will happen with them."""
    from training.config import to_dict
    distributed.print0(json.dumps(to_dict(setup.config), indent=2))
    distributed.print0(*setup.run.notes, sep="\n")
    distributed.print0(f"\n{'Continues' if setup.run.resumed else 'Starts'}: {setup.run.folder}\n"
                       f"Data:      {setup.dataset.name}, {len(setup.dataset)} images of {setup.dataset.resolution} "
                       f"pixels, {setup.dataset.c_dim or 'no'} classes\n"
                       f"Batch:     {setup.config.batch} = {gpus} process(es) x {setup.config.batch_gpu} x "
                       f"{setup.config.batch // (setup.config.batch_gpu * gpus)} micro-batches\n")
    if len(setup.dataset) < SMALL_DATA and setup.stem is None:
        distributed.print0(f"NOTE: fewer than {SMALL_DATA} images: --preset=small has widths and depth for such data\n")


def resolve_run(opts: EasyDict, given: set[str], gpus: int, stem: dict[str, Any] | None = None) -> EasyDict:
    """What `setup_config` gives, and the run that it starts or continues. All processes call this."""
    from legacy import find_snapshot, open_snapshot
    from training.run.folder import FILES, RUN_INFO, STEM_KEY, Given, find_run, recorded_options, run_info
    from training.run.sources import find_sources, with_kept_networks
    setup = setup_config(opts, given, gpus, stem)
    setup.info = run_info(setup.dataset, opts.device, opts.desc)
    if setup.stem is not None:
        setup.info[STEM_KEY] = setup.stem["generator_config"]
    setup.given = Given(setup.info, find_sources(setup.config, find_snapshot), setup.dataset.inventory)
    setup.find = lambda: find_run(Path(opts.outdir), setup.desc, setup.typed, setup.given, opts.continue_changed)
    setup.typed = setup.config
    setup.run = distributed.broadcast_object(setup.find() if distributed.rank() == 0 else None)
    if setup.run.resumed:
        records = distributed.broadcast_object(
            ((recorded_options(setup.run.folder) or {}).get(RUN_INFO) or {}).get(FILES) or {}
            if distributed.rank() == 0 else None)
        setup.config = with_kept_networks(setup.config, setup.run.folder, records, setup.given.sources)
    elif setup.missing is not None:
        raise setup.missing
    elif stem is None and setup.stem is not None and "G_ema" not in setup.stem:
        open_snapshot(opts.path_stem)       # Says what is wrong with it.
    return setup


def choose_batch_gpu(setup: EasyDict, gpus: int, device: Any) -> None:
    """--batch-gpu=auto: what the run had before, if it can have that again; else what fits and is fast."""
    from training.run.batch_size import find_batch_gpu, usable_sizes
    from training.run.folder import read_options
    config = setup.config
    before = (distributed.broadcast_object(read_options(setup.run.folder)) or {}).get("batch_gpu", 0)
    if setup.run.resumed and before in usable_sizes(config, gpus):
        distributed.print0(f"--batch-gpu=auto: {before}, as before")
    else:
        before = find_batch_gpu(config, device, distributed.print0)
        distributed.print0(f"--batch-gpu=auto: {before}")
    setup.config = dataclasses.replace(config, batch_gpu=before)
    official = config.loss.reference_micro_batch
    if config.discriminator.split_group == 0 and before != official:
        remedy = f": --split-group={official} keeps that" if config.batch // gpus % official == 0 else ""
        distributed.print0("NOTE: D's heads normalise over a micro-batch, and path lengths take their mean from it: "
                           f"here it has {before} image(s), in the published runs {official}{remedy}")


@contextlib.contextmanager
def owned_run(setup: EasyDict) -> Iterator[None]:
    """The block owns the run's folder, which is made, with the settings in it. All processes call this."""
    from training.run.folder import claim_run, create_run
    lock, choice = None, None
    if distributed.rank() == 0:
        choice, lock = claim_run(setup.find)
        create_run(choice, setup.config, setup.given)
    try:
        setup.run = distributed.broadcast_object(choice)
        yield
    finally:
        if lock is not None:
            lock.release()


def train_stage(opts: EasyDict, setup: EasyDict, gpus: int, device: Any, stop: Any) -> int:
    """Train what `resolve_run` resolved, until `stop` (StopRequests) says so. Returns the exit code."""
    from training.run.preflight import check_processes, check_shared_memory
    from training.run.stages import mark_finished
    if opts.batch_gpu == "auto" and not opts.dry_run:
        choose_batch_gpu(setup, gpus, device)
    check_split_group(opts.split_group, setup.config.batch_gpu)
    check_processes(setup.config, setup.dataset, setup.info)
    check_shared_memory(setup.config)
    print_setup(setup, gpus)
    if opts.dry_run:
        from training.generator.superres import stage_table
        from training.run.snapshots import generator_config
        below = generator_config(setup.stem) if setup.stem else None
        distributed.print0(f"{stage_table(setup.config.generator, below)}\n{setup.transfer}\n\n"
                           "Dry run: nothing was written.")
        return 0
    setup.dataset = stage_dataset(opts, setup.dataset)
    with owned_run(setup):
        from training.training_loop import training_loop
        evaluate = make_evaluator(opts, setup.dataset, device)
        code = training_loop(setup.config, setup.run.folder, device, setup.dataset, setup.stem, setup.start, evaluate,
                             stop, make_diagnosis(setup.config, setup.dataset))
        if code == 0 and distributed.rank() == 0:
            mark_finished(setup.run.folder, setup.config.total_kimg)
    return code


def bench(opts: EasyDict, given: set[str], gpus: int, device: Any) -> int:
    """How long the stage, or those of the recipe, will take, from a few iterations of each. Nothing is written."""
    from dnnlib.util import format_time
    from training.run.bench import time_stage
    from training.run.preflight import check_processes
    from training.run.stages import planned_stages

    def resolve(options: EasyDict, names: set[str], stem: dict[str, Any] | None = None) -> EasyDict:
        return resolve_run(options, names, gpus, stem)

    stages = []
    for setup in planned_stages(opts, given, default_options(), resolve) if opts.recipe else [resolve(opts, given)]:
        if opts.batch_gpu == "auto":
            choose_batch_gpu(setup, gpus, device)
        check_processes(setup.config, setup.dataset, setup.info)
        stages.append(time_stage(setup.config, stage_dataset(opts, setup.dataset), device))
        distributed.print0(*stages[-1].lines(), sep="\n")
    total = sum(stage.total_seconds for stage in stages)
    distributed.print0(f"\nExpected time: {format_time(total)}, without the start, snapshots, states and metrics")
    distributed.print0(json.dumps({"stages": [stage.as_dict() for stage in stages], "total_seconds": total}))
    return 0


def default_options() -> dict[str, Any]:
    """What every option is when it is not typed."""
    return dict(main.make_context("train.py", [], resilient_parsing=True).params)


def train_recipe(opts: EasyDict, given: set[str], gpus: int, device: Any = None, stop: Any = None) -> int:
    """All stages of `opts.recipe`. Without a device they are only resolved. Returns the exit code."""
    from training.run.stages import check_recipe, run_recipe
    defaults, spelling = default_options(), {p.name: p.opts[-1] for p in main.params}

    def resolve(options: EasyDict, names: set[str], stem: dict[str, Any] | None) -> EasyDict:
        return resolve_run(options, names, gpus, stem)

    if device is None:
        check_recipe(opts, given, defaults, resolve)
        return 0
    return run_recipe(opts, given, defaults, spelling, resolve,
                      lambda options, setup: train_stage(options, setup, gpus, device, stop))


def run(opts: EasyDict, given: set[str]) -> int:
    """Resolve, launch or join the processes, train. Returns the exit code."""
    from training.run.stopping import StopRequests
    launched = distributed.launched_world_size()
    gpus = launched or opts.gpus or 1
    if launched is not None and opts.gpus not in (None, launched):
        raise UserError(f"--gpus={opts.gpus}, but the launcher started {launched} processes: leave --gpus out")
    if launched is None and gpus == 1 and opts.max_restarts:
        raise UserError(f"--max-restarts={opts.max_restarts} has an effect only with --gpus of 2 or more; torchrun has "
                        "an option of this name: leave it out")
    device_type = misc.select_device(opts.device)
    if launched is None and gpus > 1 and not opts.dry_run:
        # Mistakes show here once, and not from every process.
        train_recipe(EasyDict(opts), given, gpus) if opts.recipe else setup_config(EasyDict(opts), given, gpus)
        return distributed.run_local_processes(gpus, sys.argv, opts.max_restarts)

    def train(device: Any) -> int:
        if opts.bench:
            return bench(opts, given, gpus, device)
        with StopRequests(opts.restart_every) as stop:      # One for all stages: the time is that of this process.
            if opts.recipe:
                return train_recipe(opts, given, gpus, device, stop)
            return train_stage(opts, resolve_run(opts, given, gpus), gpus, device, stop)

    return distributed.leave_exit_code(distributed.run_in_group(device_type, train))

#----------------------------------------------------------------------------

def option(names: str, help: str, **settings: Any):
    """A click option that shows its default. `names` may hold a short one: '-n --name'."""
    return click.option(*names.split(), help=help, show_default=settings.get("default") is not None, **settings)


@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
# Required.
@option("--outdir", "Where to save the results", metavar="DIR", required=True)
@option("--cfg", "Base configuration: translation-equivariant T or rotation-equivariant R; a recipe has its own",
        type=click.Choice(["stylegan3-t", "stylegan3-r"]))
@option("--data", "Training data; with --recipe a path with {resolution} in it, or a folder of <name><resolution>.zip",
        metavar="ZIP|DIR", required=True)
@option("--gpus", "Number of local processes, one per GPU; under torchrun leave it out", metavar="INT",
        type=click.IntRange(min=1))
@option("--max-restarts", "With --gpus: start all processes again from the last state when one died, so often",
        metavar="INT", type=click.IntRange(min=0), default=0)
@option("--batch", "Total batch size", metavar="INT", type=click.IntRange(min=1))
# Recipes.
@option("--recipe", "Train all stages of a published run in order; options typed beside it go first",
        type=click.Choice(list(RECIPES)))
@option("--stages", "Only these stages of the recipe, by resolution  [default: all]", metavar="LIST",
        type=cli.IntList())
# Optional features.
@option("--preset", "Widths and depths for the options that are left out", type=click.Choice(list(PRESETS)),
        default="paper")
@option("--cond", "Train with class labels", metavar="BOOL", type=bool, default=False)
@option("--mirror", "Enable x-flips of the data", metavar="BOOL", type=bool, default=False)
@option("--init-from", "Start a new run with those weights of this snapshot that fit", metavar="PKL|DIR", type=str)
@option("--resume", "Start a new run with the weights of this snapshot, all of which must fit", metavar="PKL|DIR",
        type=str)
@option("--freezed", "Freeze layers of D: has no effect here, see --backbones", metavar="INT", default=0,
        type=click.IntRange(min=0))
@option("--backbones", "Feature networks of D: official names, any timm model, NAME:random, or a .safetensors file",
        metavar="NAME,...", type=cli.StrList(), default=",".join(OFFICIAL_BACKBONES))
@option("--embedding", "Class table: from the data, random, or a file", metavar="data|random|FILE", default="data")
@option("--san", "SAN heads; 0 for plain hinge heads", metavar="BOOL", type=bool, default=True)
# Hyperparameters.
@option("--batch-gpu", "Images per micro-batch; auto: what fits and is fast  [default: batch/gpus, if 32 bits reach]",
        metavar="INT|auto", type=cli.IntOrAuto())
@option("--cbase", "Capacity multiplier  [default: by preset]", metavar="INT", type=click.IntRange(min=1))
@option("--cmax", "Max. feature maps  [default: by preset]", metavar="INT", type=click.IntRange(min=1))
@option("--glr", "G learning rate", metavar="FLOAT", default=0.0025, type=click.FloatRange(min=0, min_open=True))
@option("--dlr", "D learning rate", metavar="FLOAT", default=0.002, type=click.FloatRange(min=0, min_open=True))
@option("--diversity", "Weight of the diversity term, for small data sets  [default: by preset]", metavar="FLOAT",
        type=click.FloatRange(min=0))
@option("--split-group", "Normalise in D over this many consecutive images, so that results do not depend on how a "
        "batch is split  [default: over a micro-batch]", metavar="INT", type=click.IntRange(min=0), default=0)
@option("--map-depth", "Mapping network depth", metavar="INT", default=2, type=click.IntRange(min=1))
# Super-resolution.
@option("--stem", "Train a stem (what happens without --superres)", is_flag=True)
@option("--syn_layers", "Layers of the stem  [default: by preset]", metavar="INT", type=click.IntRange(min=3))
@option("--superres", "Train a super-resolution stage on --path_stem", is_flag=True)
@option("--path_stem", "Run folder or snapshot of the stage before", metavar="PKL|DIR", type=str)
@option("--head_layers", "Layers of the super-resolution head  [default: by preset]", metavar="INT",
        type=click.IntRange(min=3))
@option("--cls_weight", "Weight of classifier guidance", metavar="FLOAT", default=0.0, type=click.FloatRange(min=0))
@option("--classifier", "Network of the guidance: a timm model of the classes of --data, or a .safetensors file",
        metavar="NAME|FILE", default="deit_small_distilled_patch16_224")
@option("--up_factor", "Resolution of the stage over the stem's", metavar="INT", default=2, type=click.IntRange(min=2))
# Misc.
@option("--desc", "String to include in the folder name", metavar="STR", type=str)
@option("--metrics", "Quality metrics at snapshots", metavar="[NAME|A,B,C|none]", type=cli.StrList(),
        default="fid50k_full")
@option("--detector", "Network for the metrics fid, kid, pr, is, sfid, accuracy", metavar="NAME|FILE", type=str)
@option("--num", "Images that metrics generate, instead of the number that a name such as fid50k_full says",
        metavar="INT", type=click.IntRange(min=1))
@option("--kimg", "Total training duration", metavar="KIMG", default=25000, type=click.FloatRange(min=0))
@option("--tick", "How often to print progress", metavar="KIMG", default=4, type=click.FloatRange(min=0, min_open=True))
@option("--snap", "How often to save snapshots", metavar="TICKS", default=50, type=click.IntRange(min=1))
@option("--seed", "Random seed", metavar="INT", default=0, type=click.IntRange(min=0))
@option("--fp32", "Disable mixed precision: the official name of --precision=fp32", metavar="BOOL", type=bool,
        default=False)
@cli.precision_option()
@option("--feature-precision", "Of the frozen networks: tf32 (on GPUs) and bf16 are faster where the hardware has them "
        "(docs/performance.md)", type=click.Choice(["fp32", "tf32", "bf16"]), default="fp32")
@option("--nobench", "Disable cuDNN benchmarking", metavar="BOOL", type=bool, default=False)
@option("--workers", "Loader processes", metavar="INT", default=3, type=click.IntRange(min=0))
@option("--stage-to", "Copy --data to this folder of a local disk first, once per node, and read it there",
        metavar="DIR", type=str)
@cli.device_option()
@option("--keep", "Network snapshots that stay beside the best one; 0: all", metavar="INT", default=10,
        type=click.IntRange(min=0))
@option("--keep-every", "Of each so many kimg one snapshot stays for good", metavar="KIMG", default=0.0,
        type=click.FloatRange(min=0))
@option("--snap-state", "Minutes between training states; 0: only with snapshots", metavar="MINUTES", default=10.0,
        type=click.FloatRange(min=0))
@option("--save-in-background", "Write files while training goes on; needs memory for a copy of the state",
        metavar="BOOL", type=bool, default=True)
@option("--best-metric", "Which of --metrics decides on best_model.pkl  [default: the first]", metavar="NAME", type=str)
@option("--stop-patience", "The stage ends after so many evaluations without a better one; 0: never", metavar="INT",
        default=0, type=click.IntRange(min=0))
@option("--continue-changed", "Continue a run although batch, learning rates or losses differ", is_flag=True)
@option("--restart_every", "Save and exit with code 3 after this many seconds; 0: never", metavar="SECONDS", default=0,
        type=click.IntRange(min=0))
@option("--on-collapse", "After a verdict of collapse: go on, or save and exit with code 5",
        type=click.Choice(["warn", "stop"]), default="warn")
@option("--wandb", "Also log to this project of Weights & Biases (pip install wandb)", metavar="PROJECT", type=str)
@option("--bench", "Run a few iterations, print the time that the run will take, and exit", is_flag=True)
@option("--diagnose", f"At snapshots measure what D's last layers know, on so many images per side (0: off; without a "
        f"number {DIAGNOSIS_IMAGES})", metavar="[INT]", type=click.IntRange(min=0), default=0,
        is_flag=False, flag_value=str(DIAGNOSIS_IMAGES))
@option("-n --dry-run", "Print the settings and exit", is_flag=True)
def main(**kwargs: Any) -> None:
    """Train StyleGAN-XL with SAN heads.

    The same command again continues where the last state was saved (docs/running.md).

    \b
    Examples:
      # A 16-pixel class-conditional stem on one machine with 8 GPUs, as in the paper.
      python train.py --outdir=runs --cfg=stylegan3-t --data=data/imagenet16.zip --gpus=8 --batch=2048 \\
          --batch-gpu=8 --cond=1 --mirror=1 --syn_layers=10 --snap=10

    \b
      # The next stage: 32 pixels on top of it.
      python train.py --outdir=runs --cfg=stylegan3-t --data=data/imagenet32.zip --gpus=8 --batch=2048 \\
          --batch-gpu=8 --cond=1 --mirror=1 --superres --up_factor=2 --head_layers=7 \\
          --path_stem=runs/00000-stylegan3-t-imagenet16-gpus8-batch2048
    """
    ctx = click.get_current_context()
    typed = {n for n in kwargs if ctx.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE}
    ctx.exit(run(EasyDict(kwargs), typed))


if __name__ == "__main__":
    main()
