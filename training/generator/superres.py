# SPDX-License-Identifier: Apache-2.0
"""Growing a super-resolution stage on a finished stem (Sauer et al. 2022, section 3.3)."""
import torch

from dnnlib import UserError
from torch_utils import misc
from training.config import GeneratorConfig, LayerSpec
from training.generator.layer_schedule import kept_layers
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



def stage_table(config: GeneratorConfig, stem: GeneratorConfig | None = None) -> str:
    """Kept, cut and added layers with their sizes and numbers of parameters, for the user to read before training."""
    counts = _parameter_counts(config)
    kept = {layer.name for layer in config.layers[: config.num_frozen_layers]}
    is_stage = config.num_frozen_layers > 0
    rows: list[tuple[str, ...]] = [("layer", "size", "channels", "rate", "cutoff", "parameters", "trained")]
    rows.append(("mapping", "", f"{config.z_dim} -> {config.w_dim}", "", "", f"{counts['mapping']:,}",
                 "frozen" if is_stage else "yes"))
    rows.append(("input", f"{config.input.size}", f"{config.input.channels}", f"{config.input.sampling_rate:g}",
                 f"{config.input.bandwidth:.2f}", f"{counts['input']:,}", "yes"))
    for layer in config.layers:
        state = "frozen, kept" if layer.name in kept else "yes, added" if is_stage else "yes"
        rows.append((*_row(layer), f"{counts[layer.name]:,}", state))
    if stem is not None:
        cut = _parameter_counts(stem)
        rows += [(*_row(layer), f"{cut[layer.name]:,}", "cut from the stem")
                 for layer in stem.layers if layer.is_critically_sampled]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    frozen = sum(counts[name] for name in kept) + (counts["mapping"] if is_stage else 0)
    total = sum(counts.values())
    return "\n".join([*lines, f"generator: {total:,} parameters, {total - frozen:,} trained, {frozen:,} frozen"])


def _parameter_counts(config: GeneratorConfig) -> dict[str, int]:
    """Numbers of parameters of 'mapping', 'input' and every layer; nothing is allocated."""
    with torch.device("meta"):
        G = Generator(config)
    parts = {"mapping": G.mapping} | dict(G.synthesis.named_children())
    return {name: misc.count_parameters(part) for name, part in parts.items()}


def _row(layer: LayerSpec) -> tuple[str, ...]:
    """Cells of one layer: name, sizes, channels, rate, cutoff."""
    return (layer.name, f"{layer.in_size} -> {layer.out_size}", f"{layer.in_channels} -> {layer.out_channels}",
            f"{layer.out_sampling_rate:g}", f"{layer.out_cutoff:.2f}")
