# SPDX-License-Identifier: Apache-2.0
"""Train StyleGAN-XL with SAN heads: a stem, a super-resolution stage on top of one, or all stages of a recipe.

Options -> training.run.plan.RunPlan -> training.training_loop. Under torchrun every process runs this file.
"""
import gc
import json
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click
import torch

from dnnlib import UserError, cli
from dnnlib.util import format_time
from torch_utils import distributed, misc
from training.run.options import DEFAULTS, PRESETS, TrainOptions
from training.run.recipes import RECIPES, command_line

if TYPE_CHECKING:           # The rest is imported where it is used: `--help` and mistakes in options need not wait.
    from training.run.plan import RunPlan
    from training.run.stopping import StopRequests
    from training.watch.ticks import Evaluator

Command = TypeVar("Command", bound=Callable[..., Any])

DIAGNOSIS_IMAGES = 1024     # Per side, of --diagnose without a number.

#----------------------------------------------------------------------------
# One stage.

def train_stage(plan: "RunPlan", gpus: int, device: torch.device, stop: "StopRequests") -> int:
    """Train what is planned, until `stop` says so. Returns the exit code."""
    from training.run.plan import owned, print_layers, print_plan, with_local_data, with_micro_batch
    from training.run.preflight import check_processes, check_shared_memory
    from training.run.stages import mark_finished
    from training.training_loop import training_loop
    plan = with_micro_batch(plan, gpus, device)
    check_processes(plan.config, plan.dataset, plan.info)
    check_shared_memory(plan.config)
    print_plan(plan, gpus)
    if plan.options.dry_run:
        print_layers(plan)
        return 0
    plan = with_local_data(plan)
    with owned(plan) as plan:
        code = training_loop(plan, device, stop, make_evaluator(plan, device))
        if code == 0 and distributed.rank() == 0:
            mark_finished(plan.folder, plan.config.total_kimg)
    return code


def make_evaluator(plan: "RunPlan", device: torch.device) -> "Evaluator | None":
    """Metrics of G_ema against the training data, for the loop; None without metrics."""
    if not plan.config.metrics:
        return None
    from inference.evaluation import network_evaluator
    options = plan.options
    return network_evaluator(list(plan.config.metrics), plan.dataset, options.detector, options.num, device,
                             seed=options.seed)

#----------------------------------------------------------------------------
# All of them.

def plans(options: TrainOptions, gpus: int) -> Iterator["RunPlan"]:
    """What the command asks for: the stages of a recipe, in order, or one run."""
    from legacy import find_snapshot, open_snapshot
    from training.run.plan import plan_run
    from training.run.stages import plan_recipe, plan_untrained
    if options.recipe is None:
        yield plan_run(options, gpus, open_snapshot, find_snapshot=find_snapshot)
    else:
        yield from (plan_untrained if options.bench else plan_recipe)(options, gpus, open_snapshot, find_snapshot)


def check(options: TrainOptions, gpus: int) -> None:
    """Make every plan, so that the mistakes of the last stage show before the first is trained."""
    for _ in plans(options, gpus):
        pass


def train(options: TrainOptions, gpus: int, device: torch.device, stop: "StopRequests") -> int:
    """Train every stage that is not finished. Returns the exit code of the one that did not end with 0, else 0."""
    from training.run.stages import is_finished
    if options.recipe:
        check(options, gpus)
    for plan in plans(options, gpus):
        if plan.title:
            if distributed.broadcast_object(is_finished(plan.folder, plan.config.total_kimg)):
                distributed.print0(f"{plan.title}: finished, in {plan.folder}")
                continue
            distributed.print0(f"\n{plan.title}\n{command_line(plan.options)}\n")
        code = train_stage(plan, gpus, device, stop)
        if code != 0:
            return code
        distributed.barrier()
        gc.collect()                        # The networks of a stage must be gone before the next one's come.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    return 0


def bench(options: TrainOptions, gpus: int, device: torch.device) -> int:
    """How long the stage, or those of the recipe, will take, from a few iterations of each. Nothing is written."""
    from training.run.bench import time_stage
    from training.run.plan import with_local_data, with_micro_batch
    from training.run.preflight import check_processes
    stages = []
    for plan in plans(options, gpus):
        plan = with_micro_batch(plan, gpus, device)
        check_processes(plan.config, plan.dataset, plan.info)
        stages.append(time_stage(plan.config, with_local_data(plan).dataset, device))
        distributed.print0(*stages[-1].lines(), sep="\n")
    total = sum(stage.total_seconds for stage in stages)
    distributed.print0(f"\nExpected time: {format_time(total)}, without the start, snapshots, states and metrics")
    distributed.print0(json.dumps({"stages": [stage.as_dict() for stage in stages], "total_seconds": total}))
    return 0


def run(options: TrainOptions) -> int:
    """Launch or join the processes, and train. Returns the exit code."""
    from training.run.stopping import StopRequests
    launched = distributed.launched_world_size()
    gpus = launched or options.gpus or 1
    if launched is not None and options.gpus not in (None, launched):
        raise UserError(f"--gpus={options.gpus}, but the launcher started {launched} processes: leave --gpus out")
    if launched is None and gpus == 1 and options.max_restarts:
        raise UserError(f"--max-restarts={options.max_restarts} has an effect only with --gpus of 2 or more; torchrun "
                        "has an option of this name: leave it out")
    device_type = misc.select_device(options.device)
    if launched is None and gpus > 1 and not options.dry_run:
        check(options, gpus)                # Mistakes show here once, and not from every process.
        return distributed.run_local_processes(gpus, sys.argv, options.max_restarts)

    def main_of_process(device: torch.device) -> int:
        if options.bench:
            return bench(options, gpus, device)
        with StopRequests(options.restart_every) as stop:      # One for all stages: the time is that of this process.
            return train(options, gpus, device, stop)

    return distributed.leave_exit_code(distributed.run_in_group(device_type, main_of_process))

#----------------------------------------------------------------------------

def parse(values: dict[str, Any], typed: set[str]) -> TrainOptions:
    """The options as click gives them, of which `typed` were typed."""
    from metrics.protocols import METRICS, expand
    if values["best_metric"] is not None and values["best_metric"] not in METRICS:
        raise UserError(f"--best-metric={values['best_metric']}: no metric of this name: take one of --metrics")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return TrainOptions(**values | {"metrics": tuple(expand(list(values["metrics"])))}, given=frozenset(typed))


def option(names: str, help: str, **settings: Any) -> Callable[[Command], Command]:
    """A click option with the default of `TrainOptions`. `names` may hold a short or a former one: '-n --name',
    '--former-name --name name'."""
    default = DEFAULTS.get(names.split()[-1].lstrip("-").replace("-", "_"))
    if isinstance(default, tuple):
        default = ",".join(default)
    is_shown = default is not None and not settings.get("is_flag")
    return click.option(*names.split(), help=help, default=default, show_default=is_shown, **settings)


@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
# Required.
@option("--outdir", "Where to save the results", metavar="DIR", type=cli.PathType(), required=True)
@option("--cfg", "Base configuration: translation-equivariant T or rotation-equivariant R; a recipe has its own",
        type=click.Choice(["stylegan3-t", "stylegan3-r"]))
@option("--data", "Training data; with --recipe a path with {resolution} in it, or a folder of <name><resolution>.zip",
        metavar="ZIP|DIR", type=cli.PathType(), required=True)
@option("--gpus", "Number of local processes, one per GPU; under torchrun leave it out", metavar="INT",
        type=cli.IntRange(min=1))
@option("--max-restarts", "With --gpus: start all processes again from the last state when one died, so often",
        metavar="INT", type=cli.IntRange(min=0))
@option("--batch", "Total batch size", metavar="INT", type=cli.IntRange(min=1))
# Recipes.
@option("--recipe", "Train all stages of a published run in order; options typed beside it go first",
        type=click.Choice(list(RECIPES)))
@option("--stages", "Only these stages of the recipe, by resolution  [default: all]", metavar="LIST",
        type=cli.IntList())
# Optional features.
@option("--preset", "Widths and depths for the options that are left out", type=click.Choice(list(PRESETS)))
@option("--cond", "Train with class labels", metavar="BOOL", type=bool)
@option("--mirror", "Enable x-flips of the data", metavar="BOOL", type=bool)
@option("--init-from", "Start a new run with those weights of this snapshot that fit", metavar="PKL|DIR",
        type=cli.PathType(addresses=True))
@option("--resume", "Start a new run with the weights of this snapshot, all of which must fit", metavar="PKL|DIR",
        type=cli.PathType(addresses=True))
@option("--freezed", "Freeze layers of D: has no effect here, see --backbones", metavar="INT",
        type=cli.IntRange(min=0))
@option("--backbones", "Feature networks of D: official names, any timm model, NAME:random, or a .safetensors file",
        metavar="NAME,...", type=cli.PathList())
@option("--embedding", "Class table: from the data; the same about its mean, for classes that look alike; random; or a "
        "file", metavar="data|centred|random|FILE",
        type=cli.PathType())
@option("--feature-size", "Enlarge smaller images to this side for the --backbones, 0: to the side that each was "
        "trained with; 112 takes less than half the time", metavar="PIXELS", type=cli.IntRange(min=0, max=1024))
@option("--san", "SAN heads; 0 for plain hinge heads", metavar="BOOL", type=bool)
# Hyperparameters.
@option("--batch-gpu", "Images per micro-batch; auto: what fits and is fast  [default: batch/gpus, if 32 bits reach]",
        metavar="INT|auto", type=cli.IntOrAuto())
@option("--cbase", "Capacity multiplier  [default: by preset]", metavar="INT", type=cli.IntRange(min=1))
@option("--cmax", "Max. feature maps  [default: by preset]", metavar="INT", type=cli.IntRange(min=1))
@option("--glr", "G learning rate", metavar="FLOAT", type=cli.FloatRange(min=0, min_open=True))
@option("--dlr", "D learning rate", metavar="FLOAT", type=cli.FloatRange(min=0, min_open=True))
@option("--diversity", "Weight of the diversity term, for small data sets  [default: by preset]", metavar="FLOAT",
        type=cli.FloatRange(min=0))
@option("--split-group --ghost-batch ghost_batch", "Normalise in D over this many consecutive images, so that results "
        "do not depend on how a batch is split; 0: over a micro-batch", metavar="INT", type=cli.IntRange(min=0))
@option("--map-depth", "Mapping network depth", metavar="INT", type=cli.IntRange(min=1))
# Super-resolution.
@option("--stem", "Train a stem (what happens without --superres)", is_flag=True)
@option("--syn_layers", "Layers of the stem  [default: by preset]", metavar="INT", type=cli.IntRange(min=3))
@option("--superres", "Train a super-resolution stage on --path_stem", is_flag=True)
@option("--path_stem", "Run folder or snapshot of the stage before", metavar="PKL|DIR",
        type=cli.PathType(addresses=True))
@option("--head_layers", "Layers of the super-resolution head  [default: by preset]", metavar="INT",
        type=cli.IntRange(min=3))
@option("--cls_weight", "Weight of classifier guidance", metavar="FLOAT", type=cli.FloatRange(min=0))
@option("--classifier", "Network of the guidance: a timm model of the classes of --data, or a .safetensors file",
        metavar="NAME|FILE", type=cli.PathType())
@option("--up_factor", "Resolution of the stage over the stem's", metavar="INT", type=cli.IntRange(min=2))
# Misc.
@option("--desc", "String to include in the folder name", metavar="STR", type=str)
@option("--metrics", "Quality metrics at snapshots", metavar="[NAME|A,B,C|none]", type=cli.StrList())
@option("--detector", "Network for the metrics fid, kid, pr, is, sfid, accuracy, fd, probe_accuracy",
        metavar="NAME|FILE", type=cli.PathType(addresses=True))
@option("--num", "Images that metrics generate, instead of the number that a name such as fid50k_full says",
        metavar="INT", type=cli.IntRange(min=1))
@option("--kimg", "Total training duration", metavar="KIMG", type=cli.FloatRange(min=0))
@option("--tick", "How often to print progress", metavar="KIMG", type=cli.FloatRange(min=0, min_open=True))
@option("--snap", "How often to save snapshots", metavar="TICKS", type=cli.IntRange(min=1))
@option("--seed", "Random seed", metavar="INT", type=cli.Seed())
@option("--fp32", "Disable mixed precision: the official name of --precision=fp32", metavar="BOOL", type=bool)
@cli.precision_option()
@option("--feature-precision", "How the frozen networks compute: tf32 (on GPUs) and bf16 are faster where the hardware "
        "has them (docs/performance.md)", type=click.Choice(["fp32", "tf32", "bf16"]))
@option("--nobench", "Disable cuDNN benchmarking", metavar="BOOL", type=bool)
@option("--workers", "Loader processes", metavar="INT", type=cli.IntRange(min=0))
@option("--stage-to", "Copy --data to this folder of a local disk first, once per node, and read it there",
        metavar="DIR", type=cli.PathType())
@cli.device_option()
@option("--keep", "Network snapshots that stay beside the best one; 0: all", metavar="INT",
        type=cli.IntRange(min=0))
@option("--keep-every", "One snapshot of every so many kimg stays for good; 0: none does", metavar="KIMG",
        type=cli.FloatRange(min=0))
@option("--snap-state", "Minutes between training states; 0: only with snapshots", metavar="MINUTES",
        type=cli.FloatRange(min=0))
@option("--save-in-background", "Write files while training goes on; needs memory for a copy of the state",
        metavar="BOOL", type=bool)
@option("--best-metric", "Which of --metrics decides on best_model.pkl  [default: the first]", metavar="NAME", type=str)
@option("--stop-patience", "The stage ends after so many evaluations without a better one; 0: never", metavar="INT",
        type=cli.IntRange(min=0))
@option("--continue-changed", "Continue a run although batch, learning rates or losses differ", is_flag=True)
@option("--restart_every", "Save and exit with code 3 after this many seconds; 0: never", metavar="SECONDS",
        type=cli.IntRange(min=0))
@option("--on-collapse", "After a verdict of collapse: go on, or save and exit with code 5",
        type=click.Choice(["warn", "stop"]))
@option("--wandb", "Also log to this project of Weights & Biases (pip install wandb)", metavar="PROJECT", type=str)
@option("--bench", "Run a few iterations, print the time that the run will take, and exit", is_flag=True)
@option("--diagnose", f"At snapshots measure what D's last layers know, on so many images per side (0: off; without a "
        f"number {DIAGNOSIS_IMAGES})", metavar="[INT]", type=cli.IntRange(min=0),
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
    if kwargs["wandb"]:
        from training.watch.reporting import import_wandb
        import_wandb(kwargs["wandb"])
    ctx.exit(run(parse(kwargs, typed)))


if __name__ == "__main__":
    main()
