# SPDX-License-Identifier: Apache-2.0
"""The options of train.py, typed, with their defaults: what presets fill in, and which of them go together."""
import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dnnlib import UserError

OFFICIAL_BACKBONES = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")
# Options of the published commands have underscores.
UNDERSCORED = ("cls_weight", "head_layers", "path_stem", "restart_every", "syn_layers", "up_factor")
STEM_ONLY = ("cbase", "cmax", "map_depth", "embedding")
SUPERRES_ONLY = ("path_stem", "up_factor", "head_layers", "cls_weight", "classifier")


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What a command line says; `train.py --help` explains each. None: the preset, or the batch, decides."""

    outdir: str
    data: str
    cfg: str | None = None
    gpus: int | None = None
    max_restarts: int = 0
    batch: int | None = None
    # Recipes.
    recipe: str | None = None
    stages: tuple[int, ...] | None = None
    # Optional features.
    preset: str = "paper"
    cond: bool = False
    mirror: bool = False
    init_from: str | None = None
    resume: str | None = None
    freezed: int = 0
    backbones: tuple[str, ...] = OFFICIAL_BACKBONES
    embedding: str = "data"
    feature_size: int = 0
    san: bool = True
    # Hyperparameters.
    batch_gpu: int | str | None = None      # Also 'auto'.
    cbase: int | None = None
    cmax: int | None = None
    glr: float = 0.0025
    dlr: float = 0.002
    diversity: float | None = None
    ghost_batch: int = 0
    map_depth: int = 2
    # Super-resolution.
    stem: bool = False
    syn_layers: int | None = None
    superres: bool = False
    path_stem: str | None = None
    head_layers: int | None = None
    cls_weight: float = 0.0
    classifier: str = "deit_small_distilled_patch16_224"
    up_factor: int = 2
    # Misc.
    desc: str | None = None
    metrics: tuple[str, ...] = ("fid50k_full",)
    detector: str | None = None
    num: int | None = None
    kimg: float = 25000
    tick: float = 4
    snap: int = 50
    seed: int = 0
    fp32: bool = False
    precision: str = "auto"
    feature_precision: str = "fp32"
    nobench: bool = False
    workers: int = 3
    stage_to: str | None = None
    device: str = "auto"
    keep: int = 10
    keep_every: float = 0.0
    snap_state: float = 10.0
    save_in_background: bool = True
    best_metric: str | None = None
    stop_patience: int = 0
    continue_changed: bool = False
    restart_every: int = 0
    on_collapse: str = "warn"
    wandb: str | None = None
    bench: bool = False
    diagnose: int = 0
    dry_run: bool = False
    # Names of the options that were typed, or that a recipe sets.
    given: frozenset[str] = frozenset()

    def with_values(self, values: Mapping[str, Any]) -> "TrainOptions":
        """These options with some set as if they had been typed."""
        return dataclasses.replace(self, **values, given=self.given | values.keys())


DEFAULTS: Mapping[str, Any] = MappingProxyType({
    field.name: field.default for field in dataclasses.fields(TrainOptions)
    if field.default is not dataclasses.MISSING and field.name != "given"})


def spelled(name: str) -> str:
    """'--path_stem' of 'path_stem', '--batch-gpu' of 'batch_gpu'."""
    return "--" + (name if name in UNDERSCORED else name.replace("_", "-"))

#----------------------------------------------------------------------------
# Presets fill options that were left out.

@dataclasses.dataclass(frozen=True)
class Preset:
    """Widths and depths; `overrides` reach settings that have no option of their own, by their dotted names."""

    cbase: int
    cmax: int
    syn_layers: int
    head_layers: int
    margin: int
    w_dim: int
    diversity: float = 0.0
    batch: int | None = None
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)


PRESETS = {
    "paper": Preset(cbase=32768, cmax=512, syn_layers=14, head_layers=7, margin=10, w_dim=512),
    "small": Preset(cbase=16384, cmax=256, syn_layers=7, head_layers=4, margin=10, w_dim=512),
    "demo": Preset(cbase=256, cmax=16, syn_layers=4, head_layers=4, margin=2, w_dim=128, diversity=4.0, batch=32,
                   overrides={"discriminator.diffaug": (), "discriminator.max_channels": 128,
                              "loss.blur_init_sigma": 0.0, "loss.pl_weight": 0.0, "optim.ema_kimg": 2.0,
                              "optim.eps": 1e-8}),
    # The paper's recipe for a few thousand images and a processor: narrow, with many steps for the images that such a
    # run sees, and blurred for more than two thousand of them.
    "light": Preset(cbase=4096, cmax=64, syn_layers=6, head_layers=4, margin=2, w_dim=128, diversity=2.0, batch=16,
                    overrides={"discriminator.proj_channels": 32, "discriminator.max_channels": 64,
                               "loss.blur_fade_kimg": 40.0}),
}


def filled_preset(options: TrainOptions) -> Preset:
    """The preset with what was typed in place of its own values."""
    names = ("cbase", "cmax", "syn_layers", "head_layers", "diversity", "batch")
    typed = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(PRESETS[options.preset], **typed)

#----------------------------------------------------------------------------
# Checks that need nothing but the options.

def check_options(options: TrainOptions) -> None:
    """Refuse options that would have no effect: a user who sets one expects one.

    `--syn_layers` beside `--superres` is let through with a note, because published commands have it.

    Raises:
        UserError: names the option and what to do.
    """
    if options.cfg is None:
        raise UserError("--cfg is missing: choose stylegan3-t or stylegan3-r")
    if options.bench and options.dry_run:
        raise UserError("--bench and --dry-run exclude each other: --dry-run computes nothing: leave one out")
    if options.stages:
        raise UserError("--stages has an effect only with --recipe: add --recipe or leave it out")
    if options.init_from and options.resume:
        raise UserError("--init-from and --resume exclude each other: --init-from takes what fits, --resume wants all")
    if options.superres and options.stem:
        raise UserError("--stem and --superres exclude each other: train the stem, then grow the next stage on it")
    if options.superres:
        for name in STEM_ONLY:
            if name in options.given:
                raise UserError(f"{spelled(name)} has no effect with --superres: mapping, embedding and "
                                "widths come from the stem: leave it out")
        if options.path_stem is None:
            raise UserError("--superres needs --path_stem: the run folder or snapshot of the stage before")
    else:
        for name in SUPERRES_ONLY:
            if name in options.given:
                raise UserError(f"--{name} has an effect only with --superres: add --superres or leave it out")
    for name, value, neutral in (("precision", options.precision, ("auto", "fp32")),
                                 ("feature-precision", options.feature_precision, ("fp32",))):
        if options.fp32 and value not in neutral:
            raise UserError(f"--fp32=1 and --{name}={value} exclude each other: leave one out")
    if options.freezed:
        raise UserError(f"--freezed={options.freezed} has no effect: the features of a projected discriminator are "
                        "always frozen and its heads are trained: leave it out")
    if options.best_metric is not None and options.best_metric not in options.metrics:
        raise UserError(f"--best-metric={options.best_metric} is not among --metrics="
                        f"{','.join(options.metrics) or 'none'}: add it there, or take one of them")
    if options.stop_patience > 0 and not options.metrics:
        raise UserError(f"--stop-patience={options.stop_patience} counts evaluations, and there are none with "
                        "--metrics=none: add a metric or leave it out")
