# SPDX-License-Identifier: Apache-2.0
"""Layer tables of StyleGAN3 stems and of StyleGAN-XL super-resolution stages.

Karras et al. 2021, section 3.2 and appendix: cutoff and stopband frequencies grow geometrically from layer to layer.
Sauer et al. 2022, section 3.3: a stage keeps its stem but for the critically sampled end and appends a head that
follows the same rule from where the kept part stops.
"""
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from dnnlib import UserError
from training.config import GeneratorConfig, InputSpec, LayerSpec

NUM_CRITICAL = 2                        # So many layers at the end are critically sampled, not counting ToRGB.
FIRST_CUTOFF = 2.0
FIRST_STOPBAND = 2 ** 2.1
LAST_STOPBAND_REL = 2 ** 0.3            # Stopband of the last layer over its cutoff.
NUM_FP16_RES = 4                        # Layers within this many octaves of the output may run in half precision.
UP_FACTORS = (2, 4, 8, 16)
MAX_ELEMENTS = 2 ** 31                  # Convolutions, interpolation and native kernels index a tensor with 32 bits.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class _Bands:
    """What the schedule says at the output of each layer; all arrays have num_layers + 1 entries."""

    cutoffs: np.ndarray
    half_widths: np.ndarray
    rates: np.ndarray
    sizes: np.ndarray
    channels: np.ndarray


def _bands(first_cutoff: float, first_stopband: float, num_layers: int, resolution: int, channel_base: int,
           channel_max: int, margin: int, first_rate: float | None = None, first_channels: int | None = None) -> _Bands:
    """Geometric progression to the critically sampled end; `first_*` pin entry 0 to what a kept layer has."""
    last_cutoff = resolution / 2
    last_stopband = last_cutoff * LAST_STOPBAND_REL
    exponents = np.minimum(np.arange(num_layers + 1) / (num_layers - NUM_CRITICAL), 1)
    cutoffs = first_cutoff * (last_cutoff / first_cutoff) ** exponents
    stopbands = first_stopband * (last_stopband / first_stopband) ** exponents
    rates = np.exp2(np.ceil(np.log2(np.minimum(stopbands * 2, resolution))))
    channels = np.rint(np.minimum((channel_base / 2) / cutoffs, channel_max))
    if first_rate is not None:
        rates[0] = first_rate
    if first_channels is not None:
        channels[0] = first_channels
    half_widths = np.maximum(stopbands, rates / 2) - cutoffs
    sizes = rates + margin * 2
    sizes[-2:] = resolution
    return _Bands(cutoffs, half_widths, rates, sizes, channels)


def _layers(bands: _Bands, num_layers: int, resolution: int, img_channels: int, first_index: int,
            before: LayerSpec | None, rotation: bool, full_precision: bool) -> tuple[LayerSpec, ...]:
    """One LayerSpec per layer; `before` is the kept layer in front of the first one, if any."""
    layers = []
    for i in range(num_layers + 1):
        prev = max(i - 1, 0)
        in_channels, in_size = int(bands.channels[prev]), int(bands.sizes[prev])
        if i == 0 and before is not None:
            in_channels, in_size = before.out_channels, before.out_size
        out_channels = img_channels if i == num_layers else int(bands.channels[i])
        layers.append(LayerSpec(
            name=f"L{first_index + i}_{int(bands.sizes[i])}_{out_channels}",
            in_channels=in_channels,
            out_channels=out_channels,
            in_size=in_size,
            out_size=int(bands.sizes[i]),
            in_sampling_rate=float(bands.rates[prev]),
            out_sampling_rate=float(bands.rates[i]),
            in_cutoff=float(bands.cutoffs[prev]),
            out_cutoff=float(bands.cutoffs[i]),
            in_half_width=float(bands.half_widths[prev]),
            out_half_width=float(bands.half_widths[i]),
            is_torgb=i == num_layers,
            is_critically_sampled=i >= num_layers - NUM_CRITICAL,
            use_fp16=bool(bands.rates[i] * 2 ** NUM_FP16_RES > resolution) and not full_precision,
            conv_kernel=1 if rotation or i == num_layers else 3,
            use_radial_filters=rotation,
            is_clamped=not full_precision,
        ))
    return tuple(layers)

#----------------------------------------------------------------------------

def stem_config(img_resolution: int, num_layers: int, channel_base: int, channel_max: int, margin_size: int = 10,
                rotation: bool = False, full_precision: bool = False, **settings: Any) -> GeneratorConfig:
    """Configuration of a first-stage generator.

    Args:
        img_resolution: Output size R, a power of two of at least 8.
        num_layers: Layers without ToRGB (`--syn_layers`), at least 3.
        channel_base, channel_max: A layer has min(channel_base / 2 / cutoff, channel_max) channels.
        margin_size: Extra pixels on every side of the feature maps.
        rotation: Layers of config R (1x1 convolutions, radial filters) instead of T.
        full_precision: No layer may run in half precision, and none is clamped, as --fp32=1 officially means.
        settings: Further fields of GeneratorConfig (c_dim, w_dim, ...).
    """
    if img_resolution < 8 or img_resolution & (img_resolution - 1):
        raise UserError(f"resolution {img_resolution}: must be a power of two of at least 8: convert "
                        "the images with dataset_tool.py --resolution=8 or more")
    if num_layers <= NUM_CRITICAL:
        raise UserError(f"--syn_layers={num_layers}: at least {NUM_CRITICAL + 1} layers are needed")
    bands = _bands(FIRST_CUTOFF, FIRST_STOPBAND, num_layers, img_resolution, channel_base, channel_max, margin_size)
    layers = _layers(bands, num_layers, img_resolution, settings.get("img_channels", 3), 0, None, rotation,
                     full_precision)
    first = InputSpec(int(bands.channels[0]), int(bands.sizes[0]), float(bands.rates[0]), float(bands.cutoffs[0]))
    return GeneratorConfig(img_resolution=img_resolution, input=first, layers=layers, margin_size=margin_size,
                           channel_base=channel_base, channel_max=channel_max, **settings)


def kept_layers(stem: GeneratorConfig) -> tuple[LayerSpec, ...]:
    """The layers of a stage that the next one keeps: all but the critically sampled ones and ToRGB."""
    return tuple(layer for layer in stem.layers if not layer.is_critically_sampled)


def is_rotation(config: GeneratorConfig) -> bool:
    """Whether the layers that a stage added last are of config R."""
    return config.layers[-1].use_radial_filters


def superres_config(stem: GeneratorConfig, up_factor: int, head_layers: int,
                    rotation: bool | None = None, full_precision: bool = False) -> GeneratorConfig:
    """Configuration of the super-resolution stage grown on `stem`.

    Args:
        up_factor: New resolution over the stem's: 2, 4, 8 or 16.
        head_layers: Layers appended before ToRGB (`--head_layers`), at least 3.
        rotation: Head of config R (True) or T (False); None: like the stem. Widths follow the rule that R is twice as
            wide as T.
        full_precision: For the head, as in `stem_config`; kept layers stay what they are.
    """
    if up_factor not in UP_FACTORS:
        raise UserError(f"--up_factor={up_factor}: choose from {', '.join(map(str, UP_FACTORS))}")
    if head_layers <= NUM_CRITICAL:
        raise UserError(f"--head_layers={head_layers}: at least {NUM_CRITICAL + 1} layers are needed")
    was_rotation = is_rotation(stem)
    rotation = was_rotation if rotation is None else rotation
    widen = 2.0 ** (int(rotation) - int(was_rotation))
    channel_base, channel_max = int(stem.channel_base * widen), int(stem.channel_max * widen)
    kept = kept_layers(stem)
    last = kept[-1]
    resolution = stem.img_resolution * up_factor
    bands = _bands(last.out_cutoff, last.out_cutoff + last.out_half_width, head_layers, resolution, channel_base,
                   channel_max, stem.margin_size, last.out_sampling_rate, last.out_channels)
    # Names count on from len(kept) + 1, because officially one index is skipped, once.
    head = _layers(bands, head_layers, resolution, stem.img_channels, len(kept) + 1, last, rotation,
                   full_precision)
    return dataclasses.replace(stem, img_resolution=resolution, layers=kept + head, num_frozen_layers=len(kept),
                               channel_base=channel_base, channel_max=channel_max)

#----------------------------------------------------------------------------

def map_sizes(config: GeneratorConfig) -> Iterator[tuple[str, int]]:
    """(layer, elements per image) of the tensors that synthesis layers make for a whole batch.

    The upsampled maps inside the nonlinearity are not among them: they are made in pieces.
    """
    for layer in config.layers:
        yield layer.name, layer.in_channels * layer.in_size ** 2
        yield layer.name, layer.out_channels * (layer.in_size + layer.conv_kernel - 1) ** 2
        yield layer.name, layer.out_channels * layer.out_size ** 2


def largest_batch(config: GeneratorConfig) -> int:
    """Images that the generator can make at once before a tensor outgrows 32-bit indices; at least 1."""
    return max((MAX_ELEMENTS - 1) // max(size for _, size in map_sizes(config)), 1)
