# SPDX-License-Identifier: Apache-2.0
"""Whether settings that came with a file make a generator, and whether its tensors are that generator's.

Nothing is allocated before both are known: the network is built without memory (on the meta device), and settings that
no tensor bears out (sizes of maps, rates, widths of a next stage) must lie in ranges and agree with each other.
"""
import functools
import re
from typing import Any

import torch

from torch_utils.schema import Unfit, check_tensors, items, nothing_or, number, settings_of, shown, whole
from training.config import GeneratorConfig, InputSpec, LayerSpec, from_dict
from training.generator.layer_schedule import MAX_ELEMENTS, map_sizes
from training.networks_stylegan3 import Generator

LAYER_NAME = re.compile(r"L\d{1,3}_\d{1,5}_\d{1,5}")
MAX_LAYERS = 256
MAX_TAPS = 256                  # A longer filter is not believed; published networks have up to 96.
MAX_SIZE = 1 << 20              # Channels, pixels, classes: far above any network, far below trouble.

_SIZE, _POSITIVE = whole(1, MAX_SIZE), number(above=0, high=MAX_SIZE)
_RANGES: dict[str, Any] = dict.fromkeys(("in_channels", "out_channels", "in_size", "out_size", "channels", "size",
                                         "img_resolution", "z_dim", "w_dim", "embed_dim"), _SIZE)
_RANGES |= dict.fromkeys(("in_sampling_rate", "out_sampling_rate", "in_cutoff", "out_cutoff", "in_half_width",
                          "out_half_width", "sampling_rate", "bandwidth", "output_scale"), _POSITIVE)
_LAYER = settings_of(LayerSpec, _RANGES | {"conv_kernel": whole(1, 7)})
_GENERATOR = settings_of(GeneratorConfig, _RANGES | {
    "input": settings_of(InputSpec, _RANGES),
    "layers": items(_LAYER, 1, MAX_LAYERS),
    "img_channels": whole(3, 3),
    "c_dim": whole(0, MAX_SIZE),
    "mapping_layers": whole(1, MAX_LAYERS),
    "filter_size": whole(1, MAX_TAPS),
    "lrelu_upsampling": whole(1, 16),
    "conv_clamp": nothing_or(_POSITIVE),
    "magnitude_ema_beta": number(0, 1),
    "margin_size": whole(0, 1024),
    # --cbase and --cmax have no upper bound; what they make of a next stage is compared with the layers below.
    "channel_base": whole(1),
    "channel_max": whole(1),
    "num_frozen_layers": whole(0, MAX_LAYERS)})

#----------------------------------------------------------------------------

def generator_from(settings: Any, place: str = "generator_config") -> tuple[GeneratorConfig, Generator]:
    """Settings of a file, and their generator without memory.

    Args:
        settings: As `training.config.to_dict` made them, if the file is what it says.
        place: Where they stand in the file, for messages.

    Raises:
        Unfit: they are not the settings of a generator.
    """
    _GENERATOR(settings, place)
    config = from_dict(GeneratorConfig, settings)
    try:
        _check_table(config)
        return config, _without_memory(config)
    except Unfit as err:
        raise Unfit(f"{place}: {err}") from None
    except (ValueError, ArithmeticError, RuntimeError, AssertionError, TypeError) as err:
        raise Unfit(f"{place}: the attributes of its layers make no generator ({type(err).__name__})") from err


@functools.lru_cache(maxsize=8)
def _without_memory(config: GeneratorConfig) -> Generator:
    """Only to be looked at: a file and its neighbours have the same settings, and building takes tens of ms."""
    with torch.device("meta"):
        return Generator(config)


def check_generator_state(settings: Any, states: dict[str, Any]) -> GeneratorConfig:
    """Settings and tensors of a file.

    Args:
        settings: See `generator_from`.
        states: Tensors of generators with these settings, by what the file calls them.

    Raises:
        Unfit: the settings are none of a generator; tensors are missing, unknown, or of other shapes or types.
    """
    config, G = generator_from(settings)
    for name, state in states.items():
        check_tensors(state, name, G.state_dict())
    return config

#----------------------------------------------------------------------------

def _check_table(config: GeneratorConfig) -> None:
    """Settings that agree with each other. Filters are designed even without memory, so their lengths come first."""
    layers = config.layers
    for layer in layers:
        rates = layer.in_sampling_rate, layer.out_sampling_rate
        if not config.filter_size * config.lrelu_upsampling * max(rates) <= MAX_TAPS * min(rates):
            raise Unfit(f"{layer.name[:20]!a} needs filters of more than {MAX_TAPS} taps")
    names = [layer.name for layer in layers]
    if not all(LAYER_NAME.fullmatch(name) for name in names) or len(set(names)) != len(names):
        raise Unfit("the names of its layers are not those of StyleGAN3")
    if [layer.is_torgb for layer in layers] != [False] * (len(layers) - 1) + [True]:
        raise Unfit("its last layer, and no other, must be ToRGB")
    critical = [layer.is_critically_sampled for layer in layers]
    if critical[0] or critical != sorted(critical):
        raise Unfit("its critically sampled layers must be the last ones, and not all")
    ways = [(config.input.channels, config.input.size), *((layer.out_channels, layer.out_size) for layer in layers)]
    for (channels, size), layer in zip(ways, layers, strict=False):
        if (layer.in_channels, layer.in_size) != (channels, size):
            raise Unfit(f"{layer.name} takes {layer.in_channels} maps of {layer.in_size} pixels, but gets {channels} "
                        f"of {size}")
    if ways[-1] != (config.img_channels, config.img_resolution):
        raise Unfit(f"its layers make images {list(ways[-1])}, not [{config.img_channels}, {config.img_resolution}]")
    largest, elements = max(map_sizes(config), key=lambda entry: entry[1])
    if elements >= MAX_ELEMENTS:
        raise Unfit(f"the maps of {largest} have {elements} elements, more than can be computed")
    if config.input.bandwidth >= config.input.sampling_rate / 2:
        raise Unfit(f"the bandwidth of its input, {shown(config.input.bandwidth)}, is not below half the rate")
    _check_stage(config)


def _check_stage(config: GeneratorConfig) -> None:
    """What the stage above this one is made of: kept layers, and widths that are not far above those of this stage."""
    kept = config.num_frozen_layers
    if kept >= len(config.layers):
        raise Unfit(f"{kept} of its {len(config.layers)} layers are frozen")
    if 2 * config.margin_size > config.input.size:
        raise Unfit(f"its margins of {config.margin_size} pixels are wider than its input")
    for layer in config.layers[kept + 1 if kept else 0:-1]:        # The first layer of a head is as wide as the stem.
        width = min(config.channel_base / 2 / layer.out_cutoff, config.channel_max)
        if not width <= 4 * layer.out_channels + 4:
            raise Unfit(f"channel_base and channel_max would make {width:.0f} channels of the {layer.out_channels} of "
                        f"{layer.name}")
