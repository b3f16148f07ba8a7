"""Layer tables of the real recipes, exactly."""
import pytest
import torch

from dnnlib import UserError
from tests.closeness import approx
from tests.parity import load_json
from torch_utils.misc import count_parameters
from training.generator.layer_schedule import stem_config, superres_config
from training.networks_stylegan3 import Generator

pytestmark = pytest.mark.numeric


def build(entry: dict, chain: dict):
    """The configuration that the recipe's command line gives."""
    if entry["stage"].startswith("stem"):
        radial = entry["cfg"] == "r"
        widen = 4 if radial else 2      # Config T doubles the widths of the command line, R doubles them again.
        return stem_config(int(entry["stage"][4:]), entry["syn_layers"], entry["cbase"] * widen, entry["cmax"] * widen,
                           c_dim=entry["c_dim"], rotation=radial)
    resolution = int(entry["stage"][8:])
    stem = chain[entry["preset"], resolution // entry["up_factor"]]
    return superres_config(stem, entry["up_factor"], entry["head_layers"])


def entries():
    return load_json("layer_specs.json")


@pytest.fixture(scope="module")
def configs():
    chain, made = {}, []
    for entry in entries():
        config = build(entry, chain)
        chain[entry["preset"], config.img_resolution] = config
        made.append(config)
    return made


@pytest.mark.parametrize("index", range(len(entries())), ids=[f"{e['preset']}-{e['stage']}" for e in entries()])
def test_table_of_real_recipe(index, configs):
    entry, config = entries()[index], configs[index]
    assert config.num_ws == entry["num_ws"]
    assert config.input.channels == entry["input"]["channels"]
    assert [config.input.size] * 2 == entry["input"]["size"]
    assert config.input.sampling_rate == entry["input"]["sampling_rate"]
    assert config.input.bandwidth == entry["input"]["bandwidth"]
    with torch.device("meta"):
        G = Generator(config)
    assert [layer.name for layer in config.layers] == [row["name"] for row in entry["layers"]]
    for spec, row in zip(config.layers, entry["layers"], strict=True):
        layer = getattr(G.synthesis, spec.name)
        for ours, theirs in [("is_critically_sampled", "critically_sampled"), ("is_torgb", "torgb"),
                             ("use_fp16", "fp16"), ("in_channels",) * 2, ("out_channels",) * 2]:
            assert getattr(spec, ours) == row[theirs], (spec.name, ours)
        assert [spec.in_size] * 2 == row["in_size"]
        assert [spec.out_size] * 2 == row["out_size"]
        for name in ("in_sampling_rate", "out_sampling_rate", "in_cutoff", "out_cutoff", "in_half_width",
                     "out_half_width"):
            assert getattr(spec, name) == approx(row[name], rel=1e-12), (spec.name, name)
        assert (layer.up, layer.down, layer.padding) == (row["up"], row["down"], row["padding"])
        assert layer.conv_kernel == row["conv_kernel"]
        taps = [1 if f is None else f.shape[0] for f in (layer.up_filter, layer.down_filter)]
        assert taps == [row["up_taps"], row["down_taps"]]
        assert (layer.down_filter is not None and layer.down_filter.ndim == 2) == row["radial_down"]
    head = [layer.name for layer in config.layers[config.num_frozen_layers:]]
    assert head == entry.get("head_layer_names", head)
    unused_rows = 1000 - config.c_dim       # The official G holds the ImageNet table whatever the data.
    assert count_parameters(G) + unused_rows * 320 == entry["params"]


@pytest.mark.parametrize(("change", "message"), [
    ({"img_resolution": 24}, "power of two"), ({"num_layers": 2}, "--syn_layers=2")])
def test_bad_stem_settings(change, message):
    settings = {"img_resolution": 16, "num_layers": 6, "channel_base": 512, "channel_max": 32} | change
    with pytest.raises(UserError, match=message):
        stem_config(**settings)


@pytest.mark.parametrize(("up", "head", "message"), [(3, 7, "--up_factor=3"), (2, 2, "--head_layers=2")])
def test_bad_head_settings(up, head, message):
    stem = stem_config(16, 6, 512, 32)
    with pytest.raises(UserError, match=message):
        superres_config(stem, up, head)
