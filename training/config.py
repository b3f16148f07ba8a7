# SPDX-License-Identifier: Apache-2.0
"""The typed settings of a run, in frozen dataclasses that go to JSON and back.

The same dictionaries describe networks inside snapshots, so a snapshot needs no other file to be rebuilt.
"""
import dataclasses
import types
import typing
from typing import TYPE_CHECKING, Any, TypeVar

from dnnlib import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

FORMER_NAMES = {"split_group": "ghost_batch"}   # Names of settings in files of earlier versions -> those of now.

#----------------------------------------------------------------------------
# Generator.

@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """One synthesis layer of StyleGAN3 (Karras et al. 2021, section 3.2). Sizes in pixels, rates and cutoffs per
    image width. Images and feature maps are square."""

    name: str                       # L<index>_<out_size>_<out_channels>
    in_channels: int
    out_channels: int
    in_size: int
    out_size: int
    in_sampling_rate: float
    out_sampling_rate: float
    in_cutoff: float
    out_cutoff: float
    in_half_width: float
    out_half_width: float
    is_torgb: bool
    is_critically_sampled: bool
    use_fp16: bool                  # On CUDA devices; elsewhere layers are float32 unless another type is asked for.
    conv_kernel: int = 3            # 3 for config T, 1 for config R and ToRGB. A stage may mix both kinds.
    use_radial_filters: bool = False    # Config R downsamples radially, but not at critically sampled layers.
    is_clamped: bool = True         # The generator's conv_clamp holds here. It does not in layers made with --fp32=1.


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """Fourier features at the bottom of the synthesis network."""

    channels: int
    size: int
    sampling_rate: float
    bandwidth: float                # Cutoff of the first layer.


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Everything about a generator. The layer table is spelled out, so that all stages look alike, whatever they were
    grown from."""

    img_resolution: int
    input: InputSpec
    layers: tuple[LayerSpec, ...]
    img_channels: int = 3
    z_dim: int = 64
    c_dim: int = 0                  # Classes; 0 means unconditional.
    w_dim: int = 512
    mapping_layers: int = 2
    embed_dim: int = 320            # Width of the class-embedding table; ignored when unconditional.
    filter_size: int = 6            # Taps per step of the sampling rate.
    lrelu_upsampling: int = 2
    conv_clamp: float | None = 256
    magnitude_ema_beta: float = 0.999
    output_scale: float = 0.25
    margin_size: int = 10           # Extra pixels around feature maps; a stage grown on this one needs it again.
    channel_base: int = 65536       # Widths of the layers that this stage added (see `stem_config`), and, where heads
    channel_max: int = 1024         # are of the same kind, of those that the next stage adds.
    num_frozen_layers: int = 0      # Leading L* layers that a super-resolution stage keeps from its stem, frozen.

    @property
    def num_ws(self) -> int:
        """One w for the input and one per layer."""
        return len(self.layers) + 1

#----------------------------------------------------------------------------
# Discriminator.

@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """A projected discriminator."""

    backbones: tuple[str, ...] = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")
    img_resolution: int = 256
    c_dim: int = 0
    san: bool = True                # False: a plain last layer and no direction loss.
    cmap_dim: int = 64              # Width of the conditional head.
    proj_channels: int = 64         # Channels of the shallowest mixed map; deeper ones have 1, 2, 4 times as many.
    max_channels: int = 512         # Cap on the channels of the small discriminators.
    diffaug: tuple[str, ...] = ("color", "translation", "cutout")
    bn_warmup: bool = True          # See `training.feature_networks.backbones.warm_up_batch_norm`.
    seed: int = 0                   # Draws the frozen random projections.
    ghost_batch: int = 0            # Samples in a ghost batch, over which heads normalise; 0: over a micro-batch.
    feature_size: int = 0           # Smaller images are enlarged to this side for the backbones; 0: to what each wants.

#----------------------------------------------------------------------------
# Loss, optimisation, data, run.

@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights have their official meaning at micro-batch 8: per sample they are `weight / reference_micro_batch`."""

    blur_init_sigma: float = 2.0
    blur_fade_kimg: float = 300.0
    pl_weight: float = 2.0
    pl_start_kimg: float = 1000.0
    pl_batch_shrink: int = 2
    pl_decay: float = 0.01
    cls_weight: float = 0.0
    cls_model: str = "deit_small_distilled_patch16_224"
    reference_micro_batch: int = 8
    diversity_weight: float = 0.0   # Not official; per sample. See training.step.diversity.


OFFICIAL_PROCESSES = 8              # The published runs had so many, and their effective eps follows from it.


def gradient_scale(batch: int) -> float:
    """A gradient here over the gradient of the same loss in the published runs.

    Official gradients are sums over the samples of a process, averaged over processes: batch / 8 times the mean over
    the global batch that is used here. A number that gradients are compared with must shrink as they do.
    """
    return OFFICIAL_PROCESSES / batch


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Settings of Adam. The interval of lazy regularisation corrects lr and betas even where the regulariser is empty.

    `OptimConfig.official(batch)` has the official rules for what depends on the batch.
    """

    eps: float                      # Adam's, for gradients that are means over the global batch.
    ema_kimg: float                 # Half-life of the average G_ema.
    G_lr: float = 0.0025
    D_lr: float = 0.002
    betas: tuple[float, float] = (0.0, 0.99)
    G_reg_interval: int = 4
    D_reg_interval: int = 16
    ema_rampup: float | None = 0.05 # Half-life is at most this share of the images seen; None: there is no ramp-up.

    @classmethod
    def official(cls, batch: int, **settings: Any) -> "OptimConfig":
        """The official eps 1e-8 in the units of our gradients, and the official half-life of batch * 10 / 32 kimg.

        Args:
            batch: Global batch size.
            settings: Further fields.
        """
        return cls(eps=1e-8 * gradient_scale(batch), ema_kimg=batch * 10 / 32, **settings)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    path: str
    resolution: int
    c_dim: int                      # Classes used for training; 0 when unconditional.
    mirror: bool = False
    workers: int = 2


@dataclasses.dataclass(frozen=True)
class SavingConfig:
    """Settings that say what is kept, when states are written and when a stage ends. None changes a result."""

    keep: int = 10                  # Network snapshots; 0: all.
    keep_every: float = 0.0         # One snapshot per so many kimg stays for ever; 0: none does.
    state_minutes: float = 10.0     # Time between training states; 0: they come only with snapshots.
    background: bool = True         # Files are written while training goes on, if memory has room for a copy.
    best_metric: str | None = None  # Which metric decides; None: the first.
    stop_patience: int = 0          # Evaluations without improvement that end the stage; 0: never.


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A whole run, as printed and saved in training_options.json."""

    data: DataConfig
    generator: GeneratorConfig
    discriminator: DiscriminatorConfig
    loss: LossConfig
    optim: OptimConfig
    batch: int
    batch_gpu: int
    total_kimg: float
    kimg_per_tick: float
    snapshot_ticks: int
    metrics: tuple[str, ...] = ()
    embedding: str = "data"         # data | centred | random | a file.
    path_stem: str | None = None
    resume: str | None = None       # The run begins with the weights of this snapshot, all of which must fit.
    init_from: str | None = None    # The run begins with those weights of this snapshot that fit.
    seed: int = 0
    precision: str = "auto"             # auto | fp32 | bf16, for G; auto: fp16 on GPUs, as officially, else fp32.
    feature_precision: str = "fp32"     # fp32 | tf32 | bf16, inside the frozen feature networks of D.
    cudnn_benchmark: bool = True
    restart_every: int = 0          # Seconds after which the run saves and exits; 0 means never.
    on_collapse: str = "warn"       # warn | stop, with exit code 5.
    wandb: str | None = None        # Project of Weights & Biases.
    diagnose: int = 0               # Images per side in the diagnosis of D at snapshots; 0: no diagnosis.
    saving: SavingConfig = SavingConfig()

    @property
    def has_guidance(self) -> bool:
        """Whether a classifier guides G: in super-resolution stages with classes, if it has a weight."""
        return self.loss.cls_weight > 0 and self.generator.num_frozen_layers > 0 and self.generator.c_dim > 0

#----------------------------------------------------------------------------
# JSON.

def to_dict(config: "DataclassInstance") -> dict[str, Any]:
    """A dataclass as a dict of plain values."""
    return dataclasses.asdict(config)


def present_names(settings: Any) -> Any:
    """A dict of settings with the names that they have now, which files of earlier versions may not have; anything else
    comes back as it is."""
    if not isinstance(settings, dict):
        return settings
    return {FORMER_NAMES.get(name, name): value for name, value in settings.items()}


def from_dict(kind: type[T], values: dict[str, Any]) -> T:
    """A dict of plain values as the dataclass `kind`. Unknown or missing names are an error that lists them."""
    values = present_names(values)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{kind.__name__}: unknown settings {', '.join(unknown)}: "
                        f"the known ones are {', '.join(fields)}")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise UserError(f"{kind.__name__}: settings {', '.join(missing)} are missing")
    return kind(**{name: _convert(hints[name], value) for name, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    """Plain value -> the annotated type: nested dataclasses and tuples."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        return tuple(_convert(kind, item) for kind, item in zip(kinds, value, strict=True))
    if origin is types.UnionType and value is not None:
        return _convert(next(a for a in args if a is not type(None)), value)
    return value
