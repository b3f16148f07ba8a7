# SPDX-License-Identifier: Apache-2.0
"""Writes snapshots in the official layout, out of our own networks: for tests of the reader.

Objects of the official classes are stood in for by stubs under the official names, so that the files name what official
files name, while none of those classes exists here.
"""
import collections
import contextlib
import pickle
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.config import LayerSpec
from training.networks_stylegan3 import Generator, SynthesisLayer

HOOKS = ("_backward_pre_hooks", "_backward_hooks", "_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks",
         "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


@contextlib.contextmanager
def modules(*names: str) -> Iterator[list[types.ModuleType]]:
    """Empty modules that can be found under these names, with the packages around them, until the block ends."""
    packages = {name.rpartition(".")[0] for name in names if "." in name}
    made = {name: types.ModuleType(name) for name in (*packages, *names)
            if name in names or name not in sys.modules}
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    children = [(sys.modules[parent], child) for parent, _, child in (name.rpartition(".") for name in names) if parent]
    for (parent, child), name in zip(children, (name for name in names if "." in name), strict=True):
        setattr(parent, child, made[name])
    try:
        yield [made[name] for name in names]
    finally:
        for parent, child in children:
            delattr(parent, child)
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def stub(module: types.ModuleType, name: str, *bases: type) -> type:
    """A class that pickles as `module.name`."""
    made = type(name, bases or (torch.nn.Module,), {"__module__": module.__name__})
    setattr(module, name, made)
    return made


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("a reader called a function that the file names")


class Persistent:
    """An object as the official persistence decorator pickles it."""

    def __init__(self, class_name: str, state: dict[str, Any], module_src: str = "# elided"):
        self.meta = {"type": "class", "version": 6, "module_src": module_src, "class_name": class_name, "state": state}

    def __reduce__(self) -> tuple:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def dump(path: Path, content: Any, module: Any = pickle) -> Path:
    """Write `content` with `pickle` or `dill`."""
    with modules("torch_utils.persistence") as (persistence,):
        persistence._reconstruct_persistent_obj = types.FunctionType(
            _reconstruct_persistent_obj.__code__, {}, "_reconstruct_persistent_obj")
        persistence._reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
        path.write_bytes(module.dumps(content, protocol=4))
    return path

#----------------------------------------------------------------------------

def module_state(module: torch.nn.Module, **attributes: Any) -> dict[str, Any]:
    """__dict__ of a module, in the order of the official files."""
    return {
        "training": False,
        "_parameters": collections.OrderedDict(module._parameters),
        "_buffers": collections.OrderedDict(module._buffers),
        "_non_persistent_buffers_set": set(),
        **{name: collections.OrderedDict() for name in HOOKS},
        "_modules": collections.OrderedDict(),
    } | attributes


def official_generator(G: Generator, class_rows: int | None = None, head: list[str] | None = None,
                       module_src: str = "# elided") -> Persistent:
    """`G` as a stem, or as a super-resolution stage with the given head layers.

    Args:
        class_rows: Rows of the class table; None: as many as classes.
    """
    def linear(layer: torch.nn.Module) -> Persistent:
        return Persistent("FullyConnectedLayer", module_state(layer, weight_gain=np.float64(layer.weight_gain)))

    config = G.config
    mapping = module_state(G.mapping, z_dim=config.z_dim, c_dim=config.c_dim, w_dim=config.w_dim,
                           num_ws=config.num_ws, num_layers=config.mapping_layers)
    rows = class_rows or max(config.c_dim, 7)
    table = torch.nn.Embedding(rows, config.embed_dim)
    if config.c_dim > 0:
        with torch.no_grad():
            table.weight[: config.c_dim] = G.mapping.embed.weight
        mapping["_modules"]["embed_proj"] = linear(G.mapping.embed_proj)
    mapping["_modules"]["embed"] = table
    for i in range(config.mapping_layers):
        mapping["_modules"][f"fc{i}"] = linear(getattr(G.mapping, f"fc{i}"))

    spec = config.input
    first = module_state(G.synthesis.input, channels=spec.channels, size=np.array([spec.size] * 2),
                         sampling_rate=np.float64(spec.sampling_rate), bandwidth=np.float64(spec.bandwidth))
    first["_modules"]["affine"] = linear(G.synthesis.input.affine)
    synthesis = module_state(G.synthesis, layer_names=[layer.name for layer in config.layers],
                             output_scale=config.output_scale, margin_size=config.margin_size, num_ws=config.num_ws,
                             channel_base=config.channel_base, channel_max=config.channel_max,
                             sampling_rates=np.full(3, 4.0))        # Stale, as after super-resolution.
    synthesis["_modules"]["input"] = Persistent("SynthesisInput", first)
    for layer in config.layers:
        synthesis["_modules"][layer.name] = _layer(getattr(G.synthesis, layer.name), layer, G, linear)
    state = module_state(G, img_resolution=config.img_resolution, img_channels=config.img_channels)
    state["_modules"] |= {"synthesis": Persistent("SynthesisNetwork", synthesis),
                          "mapping": Persistent("MappingNetwork", mapping)}
    if head is not None:
        state |= {"head_layer_names": head, "channel_base": config.channel_base, "channel_max": config.channel_max}
    return Persistent("Generator" if head is None else "SuperresGenerator", state, module_src)


def _layer(layer: SynthesisLayer, spec: LayerSpec, G: Generator, linear: Any) -> Persistent:
    state = module_state(
        layer, is_torgb=spec.is_torgb, is_critically_sampled=spec.is_critically_sampled,
        use_fp16=np.bool_(spec.use_fp16), in_channels=spec.in_channels, out_channels=spec.out_channels,
        in_size=np.array([spec.in_size] * 2), out_size=np.array([spec.out_size] * 2),
        in_sampling_rate=int(spec.in_sampling_rate), out_sampling_rate=int(spec.out_sampling_rate),
        in_cutoff=np.float64(spec.in_cutoff), out_cutoff=np.float64(spec.out_cutoff),
        in_half_width=np.float64(spec.in_half_width), out_half_width=np.float64(spec.out_half_width),
        conv_kernel=spec.conv_kernel, use_radial_filters=spec.use_radial_filters, conv_clamp=layer.conv_clamp,
        magnitude_ema_beta=G.config.magnitude_ema_beta, filter_size=G.config.filter_size,
        lrelu_upsampling=G.config.lrelu_upsampling, up_factor=layer.up, down_factor=layer.down,
        padding=list(layer.padding))
    state["_modules"]["affine"] = linear(layer.affine)
    return Persistent("SynthesisLayer", state)
