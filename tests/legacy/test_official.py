# SPDX-License-Identifier: Apache-2.0
"""Official snapshots as our settings and state dicts: recorded files, and files of the same layout written here."""
import collections
import random
import warnings
from pathlib import Path

import dill
import numpy as np
import pytest
import torch

import legacy
from dnnlib import UserError
from tests.closeness import rel_error
from tests.legacy.official_files import Persistent, dump, module_state, modules, official_generator, stub
from tests.parity import DATA, load_json, load_npz
from training.config import DiscriminatorConfig, GeneratorConfig, from_dict
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks.registry import load_backbone
from training.generator.layer_schedule import stem_config, superres_config
from training.networks_stylegan3 import Generator

LITE0, DEIT = "tf_efficientnet_lite0", "deit_base_distilled_patch16_224"

# Snapshot -> recorded generator of the same state.
RECORDED = {
    "snapshot_stem16_t_cond": "generator_t_cond_stem16",
    "snapshot_stem16_r_uncond": "generator_r_uncond_stem16",
    "snapshot_superres32_t_cond": "generator_t_cond_superres32",
}


def recorded_config(name: str) -> GeneratorConfig:
    """Settings of a recorded generator from its constructor's settings, by our own schedule."""
    cases = {case["name"]: case for case in load_json("generators.json")}
    case = cases[name]
    if case["kind"] == "superres":
        return superres_config(recorded_config(case["stem"]), case["up_factor"], case["head_layers"])
    args = case["args"]
    return stem_config(args["img_resolution"], args["num_layers"], args["channel_base"], args["channel_max"],
                       rotation=case["cfg"] == "r", z_dim=args["z_dim"], w_dim=args["w_dim"], c_dim=case["c_dim"],
                       embed_dim=args["embedding"][1] if case["c_dim"] else GeneratorConfig.embed_dim)


@pytest.mark.parametrize("snapshot", RECORDED)
@pytest.mark.numeric
def test_recorded_snapshots(snapshot):
    path, data = DATA / f"{snapshot}.pkl", load_npz(f"{RECORDED[snapshot]}.npz")
    network = legacy.load_network(path)
    assert network.generator_config == recorded_config(RECORDED[snapshot])
    state = network.G_ema.state_dict()
    recorded = {name.removeprefix("state/"): value for name, value in data.items() if name.startswith("state/")}
    if network.generator_config.c_dim == 0:
        del recorded["mapping.embed.weight"]
    assert set(state) == set(recorded)
    assert all(np.array_equal(state[name].numpy(), recorded[name]) for name in state)
    z, c = torch.as_tensor(data["z"]), torch.as_tensor(data["c"])
    assert rel_error(network.G_ema(z, c), data["img"]) < 1e-4
    assert rel_error(network.G_ema(z, c, truncation_psi=0.6), data["img_trunc"]) < 1e-4
    assert not network.G_ema.training
    assert not any(p.requires_grad for p in network.G_ema.parameters())
    assert network.class_names is None
    assert network.path == path


def test_recorded_contents():
    stem = legacy.read_official_pickle(DATA / "snapshot_stem16_t_cond.pkl")
    assert (stem["format"], stem["version"], stem["source"]) == ("stylesan-xl-network", 1, "official pickle")
    assert stem["progress"] == {"cur_nimg": 123456, "cur_tick": 7, "batch_idx": 482, "best_fid": 12.5, "pl_mean": 0.25}
    assert stem["training_set_kwargs"]["use_labels"] is True
    assert stem["training_set_kwargs"]["resolution"] == 16
    assert stem["generator_config"]["num_frozen_layers"] == 0
    # Arrays of its discriminator are cut to one element.
    assert stem["D"] is None
    assert stem["discriminator_config"] is None
    assert "layer0_ccm.weight is [1]" in stem["notes"][0]
    superres = legacy.read_official_pickle(DATA / "snapshot_superres32_t_cond.pkl")
    assert superres["generator_config"]["num_frozen_layers"] == 4
    unconditional = legacy.read_official_pickle(DATA / "snapshot_stem16_r_uncond.pkl")
    assert unconditional["notes"] == []
    assert set(unconditional["G"]) == set(unconditional["G_ema"])

#----------------------------------------------------------------------------
# Files written here.

def small_stem(c_dim: int = 0, **settings) -> GeneratorConfig:
    embed_dim = 6 if c_dim else GeneratorConfig.embed_dim
    return stem_config(8, 3, 64, 4, **{"z_dim": 8, "w_dim": 8} | settings, c_dim=c_dim, embed_dim=embed_dim)


def small_file(path: Path, config: GeneratorConfig | None = None, how=None, **content) -> tuple[Path, Generator]:
    torch.manual_seed(0)
    G = Generator(config or small_stem())
    head = [layer.name for layer in G.config.layers[G.config.num_frozen_layers:]]
    node = official_generator(G, class_rows=12 if G.config.c_dim else None,
                              head=head if G.config.num_frozen_layers else None)
    return dump(path, {"G": None, "D": None, "G_ema": node} | content, *([how] if how else [])), G


def same_network(path: Path, G: Generator) -> dict:
    snapshot = legacy.open_snapshot(path)
    assert from_dict(GeneratorConfig, snapshot["generator_config"]) == G.config
    state = G.state_dict()
    assert set(snapshot["G_ema"]) == set(state)
    assert all(torch.equal(snapshot["G_ema"][name], state[name]) for name in state)
    return snapshot


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("rotation", [True, False])
def test_stages_of_both_configs(tmp_path, c_dim, rotation):
    """A stem, a stage on it, and a stage of the other config on that, as for the published faces."""
    stem = small_stem(c_dim=c_dim, rotation=rotation)
    stage = superres_config(stem, 2, 3)
    mixed = superres_config(stage, 2, 3, rotation=not rotation)
    assert len({layer.conv_kernel for layer in mixed.layers[:-1]}) == 2
    for config in (stem, stage, mixed):
        path, G = small_file(tmp_path / "x.pkl", config)
        same_network(path, G)


def test_a_head_made_with_fp32_has_no_clamp(tmp_path):
    """Officially --fp32=1 makes layers without a clamp, which stand above those of the stem, which have one."""
    stage = superres_config(small_stem(), 2, 3, full_precision=True)
    assert {layer.is_clamped for layer in stage.layers} == {True, False}
    path, G = small_file(tmp_path / "x.pkl", stage)
    same_network(path, G)
    clamps = [getattr(G.synthesis, layer.name).conv_clamp for layer in stage.layers]
    assert clamps == [256 if i < stage.num_frozen_layers else None for i in range(len(clamps))]
    assert not any(layer.use_fp16 for layer in stage.layers[stage.num_frozen_layers:])


def test_class_tables_are_cut_to_the_classes_in_use(tmp_path):
    path, G = small_file(tmp_path / "x.pkl", small_stem(c_dim=5))       # The file's table has 12 rows.
    assert same_network(path, G)["G_ema"]["mapping.embed.weight"].shape == (5, 6)


def test_dill_and_training_mode(tmp_path):
    path, G = small_file(tmp_path / "x.pkl", how=dill)
    same_network(path, G)


def test_networks_of_their_own(tmp_path):
    torch.manual_seed(1)
    G = Generator(small_stem())
    node = official_generator(G)
    path, G_ema = small_file(tmp_path / "x.pkl", G=node, progress={
        "cur_nimg": torch.tensor([5000]), "best_fid": np.float64(3.5), "pl_mean": torch.tensor(0.5), "other": "text"})
    snapshot = same_network(path, G_ema)
    assert all(torch.equal(snapshot["G"][name], value) for name, value in G.state_dict().items())
    assert snapshot["progress"] == {"cur_nimg": 5000, "best_fid": 3.5, "pl_mean": 0.5}
    path, G_ema = small_file(tmp_path / "y.pkl", G=official_generator(Generator(small_stem(w_dim=9))))
    with pytest.raises(UserError, match="different settings"):
        legacy.open_snapshot(path)


def broken(tmp_path: Path, change) -> str:
    torch.manual_seed(0)
    node = official_generator(Generator(small_stem(c_dim=3)))
    state = node.meta["state"]
    change(node, state, state["_modules"]["synthesis"].meta["state"], state["_modules"]["mapping"].meta["state"])
    path = dump(tmp_path / "x.pkl", {"G_ema": node})
    with pytest.raises(UserError) as err:
        legacy.load_network(path)
    assert "\n" not in str(err.value)
    return str(err.value)


def test_other_generators(tmp_path):
    def layer(synthesis, **attributes):
        synthesis["_modules"]["L0_28_4"].meta["state"].update(attributes)

    def drop(where, name):
        del where[name]

    one = torch.nn.Parameter(torch.zeros(1))
    cases = [
        (lambda node, G, s, m: node.meta.update(class_name="DummyGenerator"), "'DummyGenerator', not one of"),
        (lambda node, G, s, m: drop(s["_modules"], "input"), "not of the StyleGAN3 family"),
        (lambda node, G, s, m: drop(G["_modules"], "mapping"), "not one of"),
        (lambda node, G, s, m: drop(G, "img_resolution"), "lacks the attribute img_resolution"),
        (lambda node, G, s, m: drop(s["_modules"], "L0_28_4"), "lacks the module 'L0_28_4'"),
        (lambda node, G, s, m: layer(s, in_channels="many"), "L0_28_4.in_channels is no number"),
        (lambda node, G, s, m: layer(s, out_channels=1 << 40), "out_channels is 1099511627776, which no network has"),
        (lambda node, G, s, m: layer(s, in_size=np.array([28, 29])), "L0_28_4.in_size is not square"),
        (lambda node, G, s, m: layer(s, in_cutoff=np.float64("nan")), "in_cutoff is nan"),
        (lambda node, G, s, m: layer(s, out_channels=5), "L1_28_4 takes 4 maps of 28 pixels, but gets 5 of 28"),
        (lambda node, G, s, m: layer(s, conv_kernel=1), "other shapes"),
        (lambda node, G, s, m: layer(s, padding=[0, 0, 0, 0]), "L0_28_4.padding is not"),
        (lambda node, G, s, m: layer(s, in_sampling_rate=1e-9), "filters of more than"),
        (lambda node, G, s, m: layer(s, filter_size=7), "differ in filter_size"),
        (lambda node, G, s, m: layer(s, in_cutoff=1e5), "make no generator"),
        (lambda node, G, s, m: s.update(layer_names=["../../x"]), "layer names"),
        (lambda node, G, s, m: s.update(layer_names=[]), "layer names"),
        (lambda node, G, s, m: G.update(head_layer_names=["L9_1_1"]), "head layers are not the last"),
        (lambda node, G, s, m: m["_modules"].update(embed=torch.nn.Identity()), "class embedding is no table"),
        (lambda node, G, s, m: m["_parameters"].update(more=one), "unknown tensors: mapping.more"),
        (lambda node, G, s, m: drop(m["_buffers"], "w_avg"), "lacks tensors: mapping.w_avg"),
        (lambda node, G, s, m: m.update(num_layers=10_000), "mapping_layers is 10000, but must be"),
        (lambda node, G, s, m: m.update(c_dim=9), "other shapes"),
    ]
    for change, words in cases:
        assert words in broken(tmp_path, change)


@pytest.mark.parametrize("content", [[], {}, {"G_ema": None}, {"G_ema": 3, "x": 1}, None, {"G_ema": {"a": 1}}])
def test_other_pickles(tmp_path, content):
    with pytest.raises(UserError, match="no network snapshot"):
        legacy.open_snapshot(dump(tmp_path / "x.pkl", content))

#----------------------------------------------------------------------------
# Discriminator.

def tree(shapes: dict[str, list[int]], stubs: dict[str, type]) -> torch.nn.Module:
    """Modules of the official classes with the given state dict."""
    def container(name: str = "") -> torch.nn.Module:
        return stubs.get(name, torch.nn.Sequential)()

    root = container()
    leaves = collections.defaultdict(dict)
    for key, shape in shapes.items():
        prefix, _, name = key.rpartition(".")
        leaves[prefix][name] = shape
    for prefix, own in leaves.items():
        *path, last = prefix.split(".")
        place = root
        for name in path:
            if name not in place._modules:
                place.add_module(name, container(name))
            place = place._modules[name]
        place.add_module(last, leaf(own, stubs))
    return root


def leaf(own: dict[str, list[int]], stubs: dict[str, type]) -> torch.nn.Module:
    if "weight_orig" in own:
        out_channels, in_channels, kernel, _ = own["weight_orig"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.nn.utils.spectral_norm(torch.nn.Conv2d(in_channels, out_channels, kernel, bias="bias" in own))
    if "running_var" in own:
        return torch.nn.BatchNorm2d(own["weight"][0])
    if "scale" in own and len(own["weight"]) == 2:
        layer = stubs["SANEmbedding"](*own["weight"])
    elif "scale" in own:
        layer = stubs["SANConv2d"](own["weight"][1], 1, own["weight"][2], bias=False)
    else:
        return torch.nn.Conv2d(own["weight"][1], own["weight"][0], own["weight"][2])
    layer.scale = torch.nn.Parameter(torch.rand(own["scale"]))
    return layer


def write_discriminator(path: Path, shapes: dict[str, list[int]], config: GeneratorConfig, change=None):
    """A snapshot with a discriminator of this state; returns the state."""
    torch.manual_seed(2)
    with modules("pg_modules.discriminator", "pg_modules.san_modules") as (discriminator, san):
        stubs = {"": stub(discriminator, "ProjectedDiscriminator"),
                 "SANEmbedding": stub(san, "SANEmbedding", torch.nn.Embedding),
                 "SANConv2d": stub(san, "SANConv2d", torch.nn.Conv2d)}
        D = tree(shapes, stubs)
        for network in D.feature_networks.children():
            network.cout = network.scratch.layer0_ccm.out_channels
        D.diffaug = True
        if change is not None:
            change(D)
        G = Generator(config)
        dump(path, {"G": None, "D": D, "G_ema": official_generator(G)})
    return D.state_dict()


def test_discriminator_goes_into_ours(tmp_path):
    shapes = load_json("discriminator_lite0_cond16.json")["state_shapes"]
    frozen = {f"feature_networks.{LITE0}.pretrained.layer{place}.weight": [4, 4, 1, 1] for place in ("0.0", "1.3")}
    state = write_discriminator(tmp_path / "x.pkl", frozen | shapes, small_stem(c_dim=10))
    snapshot = legacy.open_snapshot(tmp_path / "x.pkl")
    assert snapshot["notes"] == []
    config = from_dict(DiscriminatorConfig, snapshot["discriminator_config"])
    assert config == DiscriminatorConfig(backbones=(LITE0,), img_resolution=8, c_dim=10)
    assert set(snapshot["D"]) == set(shapes)
    for name, value in snapshot["D"].items():
        rows = slice(10) if ".embed." in name else slice(None)
        assert torch.equal(value, state[name][rows] if value.ndim else state[name]), name
    D = ProjectedDiscriminator(config, backbones={LITE0: load_backbone(f"{LITE0}:random")})
    D.load_own_state_dict(snapshot["D"])


def uncond_shapes() -> dict[str, list[int]]:
    """A discriminator of both backbones with small arrays."""
    shapes: dict[str, list[int]] = {}
    for name, place in ((LITE0, "layer0.3"), (DEIT, "model.blocks")):
        shapes[f"feature_networks.{name}.pretrained.{place}.weight"] = [2, 2, 1, 1]
        shapes[f"feature_networks.{name}.scratch.layer0_ccm.weight"] = [64, 2, 1, 1]
        shapes[f"feature_networks.{name}.scratch.layer0_ccm.bias"] = [64]
        shapes[f"discriminators.{name}.mini_discs.0.last_layer.weight"] = [1, 3, 4, 4]
        shapes[f"discriminators.{name}.mini_discs.0.last_layer.scale"] = [1]
    shapes[f"feature_networks.{DEIT}.pretrained.layer1.3.weight"] = [5, 2, 1, 1]
    shapes[f"feature_networks.{DEIT}.pretrained.layer1.3.bias"] = [5]
    return shapes


def test_unconditional_discriminator_of_both_backbones(tmp_path):
    shapes = uncond_shapes()
    write_discriminator(tmp_path / "x.pkl", shapes, small_stem())
    snapshot = legacy.open_snapshot(tmp_path / "x.pkl")
    assert snapshot["notes"] == []
    assert snapshot["discriminator_config"]["backbones"] == (LITE0, DEIT)
    assert snapshot["discriminator_config"]["c_dim"] == 0
    assert set(snapshot["D"]) == {name for name in shapes if "layer0.3" not in name and "model" not in name}


def test_discriminators_that_are_left_out(tmp_path):
    def no_san(D):
        for disc in D.discriminators.children():
            disc.mini_discs[0].last_layer = torch.nn.Conv2d(3, 1, 4)

    def cut(D):
        D.discriminators[0].mini_discs[0].last_layer.weight = torch.nn.Parameter(torch.zeros(1))

    def no_networks(D):
        del D.feature_networks

    for change, words in ((no_san, "no SAN heads"), (cut, "last_layer.weight is [1], expected [1, 3, 4, 4]"),
                          (no_networks, "lacks the module 'feature_networks'")):
        write_discriminator(tmp_path / "x.pkl", uncond_shapes(), small_stem(), change)
        snapshot = legacy.open_snapshot(tmp_path / "x.pkl")
        assert snapshot["D"] is None
        assert snapshot["discriminator_config"] is None
        assert words in snapshot["notes"][0]

#----------------------------------------------------------------------------
# Damage.

def outcome(path: Path, data: bytes) -> str:
    """'read' or the one line of the refusal; anything else is an error of the test."""
    path.write_bytes(data)
    try:
        legacy.open_snapshot(path)
    except UserError as err:
        line = str(err)
    else:
        return "read"
    assert "\n" not in line
    assert str(path) in line
    return line


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> bytes:
    path, _G = small_file(tmp_path_factory.mktemp("official") / "x.pkl", small_stem(c_dim=2))
    return path.read_bytes()


def test_truncated_files(tmp_path, small_data):
    whole = [small_data]
    if DATA.is_dir():
        whole.append((DATA / "snapshot_stem16_r_uncond.pkl").read_bytes())
    for data in whole:
        assert outcome(tmp_path / "x.pkl", data) == "read"
        points = random.Random(0).sample(range(len(data)), 20) + [len(data) - 1, len(data) // 2]
        for point in points:
            assert "damaged or cut off" in outcome(tmp_path / "x.pkl", data[:point])


@pytest.mark.slow
def test_flipped_bits(tmp_path, small_data):
    """Damage anywhere gives a network or one line, never anything else."""
    draw = random.Random(0)
    outcomes = collections.Counter()
    for _ in range(300):
        data = bytearray(small_data)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        outcomes[outcome(tmp_path / "x.pkl", bytes(data)) == "read"] += 1
    assert min(outcomes.values()) > 10


def test_state_of_a_module_that_is_none(tmp_path):
    """Attributes of the wrong types everywhere."""
    for wrong in (None, 3, "x", [], {}, torch.zeros(2), Persistent("X", {}), {"a": None}):
        node = Persistent("Generator", module_state(torch.nn.Identity()))
        for name in ("_modules", "_parameters", "_buffers"):
            node.meta["state"][name] = wrong
        assert "x.pkl" in outcome(tmp_path / "x.pkl", dump(tmp_path / "y.pkl", {"G_ema": node}).read_bytes())
