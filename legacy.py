# SPDX-License-Identifier: Apache-2.0
"""Snapshots as networks: our own files, exported ones included, and official StyleGAN-XL and StyleSAN-XL pickles.

Official pickles hold whole objects with the source text of their classes. Nothing of that is run: `safe_pickle` reads
the object graph as notes, and this module picks the layers' attributes and tensors out of it. What comes out is the
dict that our own snapshots hold, so that everything else knows one format only.
"""
import contextlib
import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.download import local_file
from dnnlib.hub import WEIGHTS_FILE
from dnnlib.util import file_sha256, list_some
from torch_utils import checkpoint, safe_pickle
from torch_utils.pickle_modules import (
    ModuleRecord,
    as_module,
    as_number,
    as_plain,
    as_positive,
    as_size,
    load_tensors,
    state_records,
    walk,
)
from torch_utils.pickle_values import TensorRecord
from torch_utils.schema import Unfit, check_finite, compare_shapes
from torch_utils.weights import is_safetensors
from training.config import DiscriminatorConfig, GeneratorConfig, InputSpec, LayerSpec, to_dict
from training.generator.fitting import LAYER_NAME, generator_from
from training.networks_stylegan3 import Generator
from training.run.exported import read_generator
from training.run.formats import NETWORK_FORMAT, read_snapshot
from training.run.snapshots import build_generator, snapshots_by_age

#----------------------------------------------------------------------------
# Public.

@dataclasses.dataclass(frozen=True)
class LoadedNetwork:
    """A generator ready to make images."""

    G_ema: Generator                    # In eval mode, without gradients.
    class_names: list[str] | None
    generator_config: GeneratorConfig
    progress: dict[str, Any]            # Counters of the training run, as far as the file has them.
    path: Path                          # The file, also where a folder was given.
    sha256: str


def find_snapshot(path: str | os.PathLike[str]) -> Path:
    """The snapshot that `path` names: the file itself, or of a run's folder the best model, else the newest snapshot.

    The folder may also be one that was made for the Hugging Face hub. Of an address, https://host/file or
    hf://user/name[@revision][/file], the file is downloaded once, to the cache.

    Raises:
        UserError: nothing there.
    """
    path = local_file(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    best = path / "best_model.pkl"
    if best.is_file():
        return best
    files = snapshots_by_age(path)
    if not files and (path / WEIGHTS_FILE).is_file():
        return path / WEIGHTS_FILE
    if not files:
        raise UserError(f"{path}: no best_model.pkl and no network-snapshot-*.pkl in this folder, nor a "
                        f"{WEIGHTS_FILE}: give the folder of a run, or a snapshot file")
    return files[-1]


def open_snapshot(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """Read a snapshot of any kind, told apart by content, to the CPU.

    Args:
        path: A file, or the folder of a run (see `find_snapshot`).
        mmap: Read tensors of our own files only when they are used.

    Returns:
        A dict with 'format', 'version', 'generator_config', 'G_ema', 'G', 'discriminator_config', 'D', 'class_names'
        and 'progress'; of an exported file 'G' and 'D' are None, and there is a 'source'; of an official pickle also
        'source', 'training_set_kwargs' and 'notes'.

    Raises:
        UserError: no such file, damaged or cut off, not a snapshot, or a network of another kind; settings and tensors
            that do not fit each other; weights that are not finite.
    """
    file = find_snapshot(path)
    if checkpoint.is_checkpoint(file):
        return read_snapshot(file, mmap)
    if is_safetensors(file):
        return read_generator(file)
    return read_official_pickle(file)


def load_network(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LoadedNetwork:
    """The generator of a snapshot (`G_ema`), from whatever `find_snapshot` finds.

        images = load_network("hf://user/name").G_ema(z, c, truncation_psi=0.7)

    Raises:
        UserError: as `open_snapshot`.
    """
    file = find_snapshot(path)
    snapshot = open_snapshot(file)
    G = build_generator(snapshot).eval().requires_grad_(False).to(device)
    return LoadedNetwork(G, snapshot.get("class_names"), G.config, dict(snapshot.get("progress") or {}), file,
                         file_sha256(file))


def read_official_pickle(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an official pickle into the schema of our own snapshots, without running anything from it.

    Returns:
        The schema of `open_snapshot`. 'G' is None where the file has only G_ema. 'D' and 'discriminator_config' are
        None, with a reason in 'notes', where the discriminator is absent or of another make.

    Raises:
        UserError: no such file; damaged; asks for code; holds no StyleGAN-XL generator.
    """
    root = safe_pickle.read(path)
    try:
        content = _convert(root)
        check_finite(content)
        return content
    except Unfit as err:
        raise UserError(f"{path}: {err}") from err

#----------------------------------------------------------------------------
# Generator.

def _layer(module: ModuleRecord, name: str) -> LayerSpec:
    """One synthesis layer from its own attributes: tables kept elsewhere are stale after super-resolution."""
    # Layers that were made with --fp32=1 have no clamp; those that they were grown on may have one.
    values: dict[str, Any] = {"name": name, "is_clamped": module.get("conv_clamp") is not None}
    for field in dataclasses.fields(LayerSpec):
        if field.name in values:
            continue
        value, what = module.get(field.name), f"{name}.{field.name}"
        if field.type is bool:
            values[field.name] = bool(as_number(value, what))
        elif field.type is int:
            values[field.name] = as_size(value, what)
        else:
            values[field.name] = as_positive(value, what)
    return LayerSpec(**values)


def _common(layers: list[ModuleRecord], name: str) -> int:
    """An attribute that all layers but ToRGB share.

    Raises:
        Unfit: they differ, and the layer table has no place for that.
    """
    values = {as_size(layer.get(name), name) for layer in layers}
    if len(values) != 1:
        raise Unfit(f"its layers differ in {name} ({list_some(sorted(values))})")
    return values.pop()


def _generator_config(G: ModuleRecord) -> GeneratorConfig:
    if G.class_name not in ("Generator", "SuperresGenerator") or "mapping" not in G.group("_modules"):
        raise Unfit(f"its generator is a {G.class_name[:40]!a}, not one of StyleGAN-XL or StyleSAN-XL")
    synthesis, mapping = G.child("synthesis"), G.child("mapping")
    if synthesis.class_name != "SynthesisNetwork" or "input" not in synthesis.group("_modules"):
        raise Unfit("its generator is not of the StyleGAN3 family (StyleGAN2 and FastGAN are not supported)")
    names = synthesis.get("layer_names")
    if not isinstance(names, list) or not names or not all(
            isinstance(name, str) and LAYER_NAME.fullmatch(name) for name in names):
        raise Unfit("its layer names are not those of StyleGAN3")
    modules = [synthesis.child(name) for name in names]
    layers = tuple(_layer(module, name) for module, name in zip(modules, names, strict=True))
    shared = [m for m, layer in zip(modules, layers, strict=True) if not layer.is_torgb] or modules
    first = synthesis.child("input")
    head = G.state.get("head_layer_names") or names
    if not isinstance(head, list) or head != names[-len(head):]:
        raise Unfit("its head layers are not the last ones")

    table, c_dim = None, as_size(mapping.get("c_dim"), "mapping.c_dim", low=0)
    if c_dim > 0:
        table = mapping.child("embed").group("_parameters").get("weight")
        if not isinstance(table, TensorRecord) or len(table.shape) != 2:
            raise Unfit("its class embedding is no table")
    clamps = {as_positive(m.get("conv_clamp"), "conv_clamp") for m, layer in zip(modules, layers, strict=True)
              if layer.is_clamped}
    if len(clamps) > 1:
        raise Unfit(f"its layers differ in conv_clamp ({list_some(sorted(clamps))})")
    return GeneratorConfig(
        img_resolution=as_size(G.get("img_resolution"), "img_resolution"),
        input=InputSpec(as_size(first.get("channels"), "input.channels"), as_size(first.get("size"), "input.size"),
                        as_positive(first.get("sampling_rate"), "input.sampling_rate"),
                        as_positive(first.get("bandwidth"), "input.bandwidth")),
        layers=layers,
        img_channels=as_size(G.get("img_channels"), "img_channels"),
        z_dim=as_size(mapping.get("z_dim"), "z_dim"),
        c_dim=c_dim,
        w_dim=as_size(mapping.get("w_dim"), "w_dim"),
        mapping_layers=as_size(mapping.get("num_layers"), "mapping.num_layers"),
        embed_dim=table.shape[1] if table is not None else GeneratorConfig.embed_dim,
        filter_size=_common(shared, "filter_size"),
        lrelu_upsampling=_common(shared, "lrelu_upsampling"),
        conv_clamp=clamps.pop() if clamps else GeneratorConfig.conv_clamp,
        # Unused in training; kept layers have their stem's value and new ones the default.
        magnitude_ema_beta=as_positive(shared[-1].get("magnitude_ema_beta"), "magnitude_ema_beta"),
        output_scale=as_positive(synthesis.get("output_scale"), "output_scale"),
        margin_size=as_size(synthesis.get("margin_size"), "margin_size", low=0),
        channel_base=as_size(G.state.get("channel_base", synthesis.get("channel_base")), "channel_base"),
        channel_max=as_size(G.state.get("channel_max", synthesis.get("channel_max")), "channel_max"),
        num_frozen_layers=len(names) - len(head),
    )


def _generator(G: ModuleRecord) -> tuple[GeneratorConfig, dict[str, TensorRecord]]:
    """Settings and tensors, compared with each other and with what our layers work out themselves."""
    config = _generator_config(G)
    records = state_records(G)
    if config.c_dim == 0:
        records.pop("mapping.embed.weight", None)       # Unconditional networks carry an unused table.
    for name in ("mapping.embed.weight", "mapping.w_avg"):
        if config.c_dim > 0 and name in records:
            records[name] = _first_rows(records[name], config.c_dim)
    _, built = generator_from(to_dict(config), "its generator")
    compare_shapes(records, "its generator", built.state_dict())
    synthesis = G.child("synthesis")
    for layer in config.layers:
        theirs, ours = synthesis.child(layer.name), getattr(built.synthesis, layer.name)
        for name, value in (("up_factor", ours.up), ("down_factor", ours.down), ("padding", ours.padding)):
            if name in theirs.state and as_plain(theirs.state[name]) != value:
                raise Unfit(f"{layer.name}.{name} is not {value}, as the rates and sizes demand")
    return config, records


def _first_rows(record: TensorRecord, rows: int) -> TensorRecord:
    """A table's rows in use: official tables have ImageNet's 1000 rows whatever the number of classes."""
    if len(record.shape) == 2 and record.shape[0] > rows:
        return dataclasses.replace(record, shape=(rows, record.shape[1]))
    return record

#----------------------------------------------------------------------------
# Discriminator.

def _discriminator(D: ModuleRecord, generator: GeneratorConfig) -> tuple[DiscriminatorConfig, dict[str, TensorRecord]]:
    """Settings and tensors without those of the frozen backbones, which are known by name.

    Raises:
        Unfit: not a projected discriminator with SAN heads, or its arrays do not have the sizes that it states.
    """
    networks, heads = D.child("feature_networks"), dict(walk(D.child("discriminators")))
    backbones = tuple(networks.group("_modules"))
    if not backbones:
        raise Unfit("it has no feature networks")
    if not any(module.class_name.startswith("SAN") for module in heads.values()):
        raise Unfit("it has no SAN heads (StyleGAN-XL)")
    tables = [module for module in heads.values() if module.class_name == "SANEmbedding"]
    if any(as_size(table.get("num_embeddings"), "num_embeddings") < generator.c_dim for table in tables):
        raise Unfit("it has fewer classes than the generator")
    # The stages of a convolutional backbone are layer0 to layer3, the reassembly of a transformer is layer1 to layer4.
    transformers = {name for name in backbones
                    if "layer0" not in networks.child(name).child("pretrained").group("_modules")}
    config = DiscriminatorConfig(
        backbones=backbones,
        img_resolution=generator.img_resolution,
        c_dim=generator.c_dim if tables else 0,
        cmap_dim=as_size(tables[0].get("embedding_dim"), "embedding_dim") if tables else DiscriminatorConfig.cmap_dim,
        proj_channels=as_size(networks.child(backbones[0]).get("cout"), "cout"),
        diffaug=DiscriminatorConfig.diffaug if as_plain(D.get("diffaug")) else ())
    records: dict[str, TensorRecord] = {}
    for prefix, module in walk(D):
        if _is_kept(prefix, transformers):
            _check_layer(prefix, module)
            is_table = config.c_dim > 0 and module.class_name == "SANEmbedding"
            records.update((f"{prefix}{name}", _first_rows(value, config.c_dim) if is_table else value)
                           for name, value in module.tensors().items())
    return config, records


def _is_kept(prefix: str, transformers: set[str]) -> bool:
    """Heads and random projections, but no backbone. A transformer's reassembly sits beside the transformer."""
    place = prefix.split(".")[:-1]
    if place[:1] == ["discriminators"]:
        return True
    if len(place) < 3 or place[0] != "feature_networks":
        return False
    reassembly = place[1] in transformers and re.fullmatch(r"pretrained\.layer[1-4]\.[34]", ".".join(place[2:]))
    return place[2] == "scratch" or bool(reassembly)


def _check_layer(prefix: str, module: ModuleRecord) -> None:
    """Arrays have the sizes that the layer's attributes state: stripped files have cut arrays."""
    state, expected = module.state, {}
    if "kernel_size" in state:
        kernel = state["kernel_size"] if isinstance(state["kernel_size"], tuple) else ()
        ways = [as_size(module.get(name), name) for name in ("out_channels", "in_channels")]
        if as_plain(state.get("transposed")):
            ways.reverse()
        shape = (*ways, *(as_size(k, "kernel_size") for k in kernel))
        expected = {"weight": shape, "weight_orig": shape}
    elif "num_features" in state:
        expected = dict.fromkeys(("weight", "bias", "running_mean", "running_var"),
                                 (as_size(state["num_features"], "num_features"),))
    elif "num_embeddings" in state:
        rows = as_size(state["num_embeddings"], "num_embeddings")
        expected = {"weight": (rows, as_size(module.get("embedding_dim"), "embedding_dim")), "scale": (rows, 1)}
    for name, value in module.tensors().items():
        if name in expected and value.shape != expected[name]:
            raise Unfit(f"{ascii(prefix[:120])[1:-1]}{name} is {list(value.shape)}, expected {list(expected[name])}")

#----------------------------------------------------------------------------
# The whole file.

def _convert(root: Any) -> dict[str, Any]:
    if not isinstance(root, dict) or (ema := as_module(root.get("G_ema"))) is None:
        keys = sorted(key[:20] for key in root if isinstance(key, str)) if isinstance(root, dict) else []
        found = ascii(list_some(keys, 6)) if keys else type(root).__name__
        raise Unfit(f"is no network snapshot: it holds no object G_ema (found {found})")
    config, records = _generator(ema)
    G_ema = load_tensors(records)
    notes: list[str] = []
    G = None
    if root.get("G") is root["G_ema"]:
        G = G_ema
    elif (raw := as_module(root.get("G"))) is not None:
        raw_config, records = _generator(raw)
        if raw_config != config:
            raise Unfit("its G and G_ema have different settings")
        G = load_tensors(records)
    d_config, D = None, None
    if (disc := as_module(root.get("D"))) is not None:
        try:
            d_config, records = _discriminator(disc, config)
            D = load_tensors(records)
        except Unfit as err:
            d_config = None
            notes.append(f"the discriminator was left out: {err}")
    kwargs = as_plain(root.get("training_set_kwargs"))
    return {
        "format": NETWORK_FORMAT,
        "version": 1,
        "generator_config": to_dict(config),
        "G_ema": G_ema,
        "G": G,
        "discriminator_config": to_dict(d_config) if d_config else None,
        "D": D,
        "class_names": None,
        "progress": _progress(root.get("progress")),
        "source": "official pickle",
        "training_set_kwargs": kwargs if isinstance(kwargs, dict) else {},
        "notes": notes,
    }


def _progress(counters: Any) -> dict[str, int | float]:
    """The counters of the run that are numbers."""
    found: dict[str, int | float] = {}
    for key, value in counters.items() if isinstance(counters, dict) else ():
        with contextlib.suppress(Unfit):
            if isinstance(key, str):
                found[key] = as_number(value, key)
    return found
