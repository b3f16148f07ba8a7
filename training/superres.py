# SPDX-License-Identifier: Apache-2.0
"""Growing a super-resolution stage on a finished stem (Sauer et al. 2022, section 3.3)."""
import torch

from dnnlib import UserError
from training.config import GeneratorConfig, LayerSpec
from training.layer_schedule import kept_layers, superres_config
from training.networks_stylegan3 import Generator


def kept_names(stem: GeneratorConfig) -> tuple[str, ...]:
    """Prefixes of the tensors that go from a stem into the next stage."""
    return ("mapping.", "synthesis.input.") + tuple(f"synthesis.{layer.name}." for layer in kept_layers(stem))


def load_stem_into(G: Generator, stem: GeneratorConfig, stem_state: dict[str, torch.Tensor]) -> None:
    """Copy the mapping, the input and the kept layers of a stem into a stage that was grown on it."""
    state = G.state_dict()
    prefixes = kept_names(stem)
    for name in state:
        if name.startswith(prefixes):
            if name not in stem_state or stem_state[name].shape != state[name].shape:
                found = "nothing" if name not in stem_state else list(stem_state[name].shape)
                raise UserError(f"--path_stem: tensor {name} should be {list(state[name].shape)}, found {found}")
            state[name] = stem_state[name]
    G.load_state_dict(state)


def grow(stem: GeneratorConfig, stem_state: dict[str, torch.Tensor], up_factor: int, head_layers: int) -> Generator:
    """A new stage on top of a stem's G_ema: the kept part copied, the head freshly drawn (torch's global generator)."""
    G = Generator(superres_config(stem, up_factor, head_layers))
    load_stem_into(G, stem, stem_state)
    return G


def stage_table(config: GeneratorConfig, stem: GeneratorConfig | None = None) -> str:
    """Kept, cut and added layers with their sizes, for the user to read before training."""
    kept = {layer.name for layer in config.layers[: config.num_frozen_layers]}
    rows = [("layer", "size", "channels", "rate", "cutoff", "trained")]
    for layer in config.layers:
        rows.append((*_row(layer), "frozen" if layer.name in kept else "yes"))
    if stem is not None:
        rows += [(*_row(layer), "cut from the stem") for layer in stem.layers if layer.is_critically_sampled]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _row(layer: LayerSpec) -> tuple[str, ...]:
    """Cells of one layer: name, sizes, channels, rate, cutoff."""
    return (layer.name, f"{layer.in_size} -> {layer.out_size}", f"{layer.in_channels} -> {layer.out_channels}",
            f"{layer.out_sampling_rate:g}", f"{layer.out_cutoff:.2f}")
