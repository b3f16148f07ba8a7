# SPDX-License-Identifier: Apache-2.0
"""Train StyleGAN-XL with SAN heads: a stem, or a super-resolution stage on top of one.

Options -> training.config.TrainConfig -> training.training_loop. Under torchrun every process runs this file.
"""
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from dnnlib import EasyDict, UserError, cli
from torch_utils import distributed, misc

OFFICIAL_BACKBONES = ["deit_base_distilled_patch16_224", "tf_efficientnet_lite0"]
SMALL_DATA = 50_000         # Images below which --preset=small is worth a thought.

#----------------------------------------------------------------------------
# Presets fill options that were left out; `overrides` reach settings that have no option of their own.

PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(cbase=32768, cmax=512, syn_layers=10, head_layers=7, margin=10, w_dim=512, diversity=0.0),
    "small": dict(cbase=16384, cmax=256, syn_layers=7,  head_layers=4, margin=10, w_dim=512, diversity=0.0),
    "demo":  dict(cbase=256,   cmax=16,  syn_layers=4,  head_layers=4, margin=2,  w_dim=128, diversity=8.0,
                  batch=32, overrides={
        "discriminator.diffaug": (), "discriminator.max_channels": 128,
        "loss.blur_init_sigma": 0.0, "loss.pl_weight": 0.0, "optim.ema_kimg": 2.0}),
}

STEM_ONLY = ("cbase", "cmax", "map_depth", "embedding")
SUPERRES_ONLY = ("path_stem", "up_factor", "head_layers", "cls_weight", "classifier")

#----------------------------------------------------------------------------
# Checks that need nothing but the options.

def check_options(opts: EasyDict, given: set[str]) -> None:
    """Refuse options that would have no effect: a user who sets one expects one.

    `--syn_layers` beside `--superres` is let through with a note, because published commands have it.
    """
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
    if opts.freezed:
        raise UserError(f"--freezed={opts.freezed} has no effect: the features of a projected discriminator are always "
                        "frozen and its heads are trained: leave it out")


def split_batch(batch: int, batch_gpu: int | None, gpus: int) -> int:
    """Images per micro-batch, checked against the batch and the number of processes."""
    if batch % gpus:
        raise UserError(f"--batch={batch} is not divisible by --gpus={gpus}: take a multiple of {gpus}")
    batch_gpu = batch // gpus if batch_gpu is None else batch_gpu
    if batch % (gpus * batch_gpu):
        raise UserError(f"--batch={batch} is not divisible by --gpus={gpus} x --batch-gpu={batch_gpu}: take a multiple "
                        f"of {gpus * batch_gpu}, or another --batch-gpu")
    return batch_gpu


def check_diversity(diversity: float, batch_gpu: int) -> None:
    """The diversity term compares images two by two."""
    if diversity > 0 and batch_gpu % 2:
        raise UserError(f"--diversity={diversity:g} compares pairs of images, but a micro-batch has {batch_gpu}: take "
                        "an even --batch-gpu")

#----------------------------------------------------------------------------
# Options -> settings.

def open_dataset(opts: EasyDict):
    """The data set of `--data`, with labels when `--cond` asks for them."""
    from training.dataset import ImageDataset
    dataset = ImageDataset(opts.data, use_labels=opts.cond, xflip=opts.mirror)
    if dataset.has_labels and not opts.cond:
        distributed.print0(f"NOTE: {opts.data} has class labels but --cond is off: training without classes. "
                           "Add --cond=1 for a class-conditional generator.")
    return dataset


def generator_settings(opts: EasyDict, dataset: Any, stem: dict[str, Any] | None):
    """GeneratorConfig of the stem or stage that the options describe."""
    from training.layer_schedule import stem_config, superres_config
    from training.snapshots import generator_config
    rotation = opts.cfg == "stylegan3-r"
    if stem is None:
        widen = 4 if rotation else 2        # Config T doubles the widths of the command line, R doubles them again.
        return stem_config(dataset.resolution, opts.syn_layers, opts.cbase * widen, opts.cmax * widen, opts.margin,
                           rotation, c_dim=dataset.c_dim, w_dim=opts.w_dim, mapping_layers=opts.map_depth)
    below = generator_config(stem)
    if below.c_dim != dataset.c_dim:
        raise UserError(f"--path_stem: the stem has {below.c_dim} classes, --data with --cond={int(opts.cond)} has "
                        f"{dataset.c_dim}: use the data set that the stem was trained on, at the new resolution")
    config = superres_config(below, opts.up_factor, opts.head_layers, rotation)
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


def setup_config(opts: EasyDict, given: set[str], gpus: int) -> EasyDict:
    """Resolve the options.

    Returns:
        config (TrainConfig), dataset, stem (snapshot or None), start (snapshot or None), desc.
    """
    from legacy import open_snapshot
    from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig
    check_options(opts, given)
    preset = PRESETS[opts.preset]
    for name, value in preset.items():
        opts[name] = value if opts.get(name) is None else opts[name]
    if opts.batch is None:
        raise UserError(f"--batch is missing: --preset={opts.preset} does not set it; the paper's stems use 2048")
    if opts.superres and "syn_layers" in given:
        distributed.print0("NOTE: --syn_layers has no effect with --superres: the kept layers are those of --path_stem")

    dataset = open_dataset(opts)
    stem = open_snapshot(opts.path_stem) if opts.superres else None
    start = open_snapshot(opts.resume) if opts.resume else None
    generator = generator_settings(opts, dataset, stem)
    config = TrainConfig(
        data=DataConfig(str(opts.data), dataset.resolution, dataset.c_dim, opts.mirror, opts.workers),
        generator=generator,
        discriminator=DiscriminatorConfig(tuple(opts.backbones), dataset.resolution, dataset.c_dim, opts.san),
        loss=LossConfig(cls_weight=opts.cls_weight, cls_model=opts.classifier, diversity_weight=opts.diversity),
        optim=OptimConfig(G_lr=opts.glr, D_lr=opts.dlr),
        batch=opts.batch, batch_gpu=split_batch(opts.batch, opts.batch_gpu, gpus), total_kimg=opts.kimg,
        kimg_per_tick=opts.tick, snapshot_ticks=opts.snap, metrics=tuple(opts.metrics), embedding=opts.embedding,
        path_stem=opts.path_stem, resume=opts.resume, seed=opts.seed, fp32=opts.fp32, cudnn_benchmark=not opts.nobench,
        restart_every=opts.restart_every)
    check_diversity(opts.diversity, config.batch_gpu)
    config = apply_overrides(config, preset.get("overrides", {}))
    return EasyDict(config=config, dataset=dataset, stem=stem, start=start,
                    desc="-".join([opts.cfg, dataset.name, f"gpus{gpus}", f"batch{opts.batch}"]
                                  + ([opts.desc] if opts.desc else [])))

#----------------------------------------------------------------------------
# Running.

def make_evaluator(opts: EasyDict, dataset: Any, device: Any):
    """Metrics of G_ema against the training data, for the loop; None without metrics."""
    if not opts.metrics:
        return None
    from inference.evaluation import network_evaluator
    return network_evaluator(opts.metrics, dataset, opts.detector, opts.num, device, seed=opts.seed)


def print_setup(setup: EasyDict, folder: Path, resumed: bool, gpus: int) -> None:
    """All settings, and what will happen with them."""
    from training.config import to_dict
    distributed.print0(json.dumps(to_dict(setup.config), indent=2))
    distributed.print0(f"\n{'Continues' if resumed else 'Starts'}: {folder}\n"
                       f"Data:      {setup.dataset.name}, {len(setup.dataset)} images of {setup.dataset.resolution} "
                       f"pixels, {setup.dataset.c_dim or 'no'} classes\n"
                       f"Batch:     {setup.config.batch} = {gpus} process(es) x {setup.config.batch_gpu} x "
                       f"{setup.config.batch // (setup.config.batch_gpu * gpus)} micro-batches\n")
    if len(setup.dataset) < SMALL_DATA and setup.stem is None:
        distributed.print0(f"NOTE: fewer than {SMALL_DATA} images: --preset=small has widths and depth for such data\n")


def run(opts: EasyDict, given: set[str]) -> int:
    """Resolve, launch or join the processes, train. Returns the exit code."""
    from training.run_folder import create_run, find_run
    launched = distributed.launched_world_size()
    gpus = launched or opts.gpus or 1
    if launched is not None and opts.gpus not in (None, launched):
        raise UserError(f"--gpus={opts.gpus}, but the launcher started {launched} processes: leave --gpus out")
    device_type = misc.select_device(opts.device)
    if launched is None and gpus > 1 and not opts.dry_run:
        setup_config(EasyDict(opts), given, gpus)       # Mistakes show here once, and not from every process.
        return distributed.run_local_processes(gpus, sys.argv)

    device = distributed.init(device_type)
    try:
        setup = setup_config(opts, given, gpus)
        folder, resumed = find_run(Path(opts.outdir), setup.desc, setup.config)
        folder, resumed = distributed.broadcast_object((folder, resumed))
        print_setup(setup, folder, resumed, gpus)
        if opts.dry_run:
            distributed.print0("Dry run: nothing was written.")
            return 0
        if distributed.rank() == 0:
            create_run(folder, setup.config)
        distributed.barrier()
        from training.training_loop import training_loop
        evaluate = make_evaluator(opts, setup.dataset, device)
        return training_loop(setup.config, folder, device, setup.dataset, setup.stem, setup.start, evaluate)
    finally:
        distributed.shutdown()

#----------------------------------------------------------------------------

def option(names: str, help: str, **settings: Any):
    """A click option that shows its default. `names` may hold a short one: '-n --name'."""
    return click.option(*names.split(), help=help, show_default=settings.get("default") is not None, **settings)


@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
# Required.
@option("--outdir", "Where to save the results", metavar="DIR", required=True)
@option("--cfg", "Base configuration: translation-equivariant T or rotation-equivariant R", required=True,
        type=click.Choice(["stylegan3-t", "stylegan3-r"]))
@option("--data", "Training data", metavar="ZIP|DIR", required=True)
@option("--gpus", "Number of local processes, one per GPU; under torchrun leave it out", metavar="INT",
        type=click.IntRange(min=1))
@option("--batch", "Total batch size", metavar="INT", type=click.IntRange(min=1))
# Optional features.
@option("--preset", "Widths and depths for the options that are left out", type=click.Choice(list(PRESETS)),
        default="paper")
@option("--cond", "Train with class labels", metavar="BOOL", type=bool, default=False)
@option("--mirror", "Enable x-flips of the data", metavar="BOOL", type=bool, default=False)
@option("--resume", "Start a new run with the weights of this snapshot", metavar="PKL|DIR", type=str)
@option("--freezed", "Freeze layers of D: has no effect here, see --backbones", metavar="INT", default=0,
        type=click.IntRange(min=0))
@option("--backbones", "Feature networks of D: official names, any timm model, NAME:random, or a .safetensors file",
        metavar="NAME,...", type=cli.StrList(), default=",".join(OFFICIAL_BACKBONES))
@option("--embedding", "Class table: from the data, random, or a file", metavar="data|random|FILE", default="data")
@option("--san", "SAN heads; 0 for plain hinge heads", metavar="BOOL", type=bool, default=True)
# Hyperparameters.
@option("--batch-gpu", "Images per micro-batch  [default: batch/gpus]", metavar="INT", type=click.IntRange(min=1))
@option("--cbase", "Capacity multiplier  [default: by preset]", metavar="INT", type=click.IntRange(min=1))
@option("--cmax", "Max. feature maps  [default: by preset]", metavar="INT", type=click.IntRange(min=1))
@option("--glr", "G learning rate", metavar="FLOAT", default=0.0025, type=click.FloatRange(min=0, min_open=True))
@option("--dlr", "D learning rate", metavar="FLOAT", default=0.002, type=click.FloatRange(min=0, min_open=True))
@option("--diversity", "Weight of the diversity term, for small data sets  [default: by preset]", metavar="FLOAT",
        type=click.FloatRange(min=0))
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
@option("--detector", "Network for the metrics fid, kid, pr, is, accuracy", metavar="NAME|FILE", type=str)
@option("--num", "Generated images for the metrics fid, kid, pr, is, accuracy", metavar="INT",
        type=click.IntRange(min=1))
@option("--kimg", "Total training duration", metavar="KIMG", default=25000, type=click.FloatRange(min=0))
@option("--tick", "How often to print progress", metavar="KIMG", default=4, type=click.FloatRange(min=0, min_open=True))
@option("--snap", "How often to save snapshots", metavar="TICKS", default=50, type=click.IntRange(min=1))
@option("--seed", "Random seed", metavar="INT", default=0, type=click.IntRange(min=0))
@option("--fp32", "Disable mixed precision", metavar="BOOL", type=bool, default=False)
@option("--nobench", "Disable cuDNN benchmarking", metavar="BOOL", type=bool, default=False)
@option("--workers", "Loader processes", metavar="INT", default=3, type=click.IntRange(min=0))
@cli.device_option()
@option("--restart_every", "Save and exit with code 3 after this many seconds; 0: never", metavar="SECONDS", default=0,
        type=click.IntRange(min=0))
@option("-n --dry-run", "Print the settings and exit", is_flag=True)
def main(**kwargs: Any) -> None:
    """Train StyleGAN-XL with SAN heads.

    The same command again continues where the last snapshot was saved.

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
