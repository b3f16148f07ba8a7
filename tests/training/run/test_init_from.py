"""--init-from and --resume: what of another network a new run begins with."""
import dataclasses

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from legacy import open_snapshot
from tests.closeness import assert_close
from tests.conftest import write_dataset
from tests.parity import DATA
from train import main
from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig, to_dict
from training.discriminators.projected import ProjectedDiscriminator
from training.generator.layer_schedule import stem_config, superres_config
from training.networks_stylegan3 import Generator
from training.run.init_from import (
    check_generator,
    loaded_share,
    match_classes,
    start_from,
    transfer,
)
from training.run.networks import Stem
from training.run.plan import follow_stem
from training.trainer import Progress, Trainer

NAMES = ["cat", "dog", "owl"]


def generator(c_dim: int = 3, resolution: int = 16, **more):
    return stem_config(resolution, 4, 64, 8, 2, c_dim=c_dim, **({"w_dim": 16, "embed_dim": 8} | more))


def settings(config, init_from: str | None = "file.pkl", resume: str | None = None) -> TrainConfig:
    D = DiscriminatorConfig(("local:random",), config.img_resolution, config.c_dim, proj_channels=4, max_channels=64)
    return TrainConfig(DataConfig("data.zip", config.img_resolution, config.c_dim), config, D, LossConfig(),
                       OptimConfig.official(8), 8, 8, 1, 1, 1, resume=resume, init_from=init_from)


def make_trainer(config, seed: int, **options) -> Trainer:
    torch.manual_seed(seed)
    G, D = Generator(config), ProjectedDiscriminator(settings(config).discriminator)
    with torch.no_grad():
        G.mapping.w_avg.normal_()
    return Trainer(settings(config, **options), G, D, None, torch.device("cpu"))


def snapshot_of(state: Trainer, names: list[str] | None) -> dict:
    with torch.no_grad():
        for p in state.G_ema.parameters():
            p.add_(1)                       # G and G_ema differ.
    return {"generator_config": to_dict(state.G.config), "G": state.G.state_dict(), "G_ema": state.G_ema.state_dict(),
            "D": state.D.own_state_dict(), "class_names": names}


@pytest.fixture(scope="module")
def snapshot():
    return snapshot_of(make_trainer(generator(), 0), NAMES)


def begin(config, snapshot: dict, names: list[str], **options) -> tuple[Trainer, dict, str]:
    """A new run from the snapshot: its state, a copy of what it drew, the table."""
    state = make_trainer(config, 1, **options)
    drawn = {name: value.clone() for name, value in state.G.state_dict().items()}
    return state, drawn, start_from(state, snapshot, names)


def cells(table: str, network: str, module: str) -> list[str]:
    """Loaded, skipped, re-initialised."""
    (line,) = (x.split() for x in table.splitlines() if x.split()[:2] == [network, module])
    return [line[2], *line[-2:]]

#----------------------------------------------------------------------------

@pytest.mark.numeric
def test_the_same_network_on_other_data_takes_everything(snapshot):
    state, drawn, table = begin(generator(), snapshot, NAMES)
    for net, module in (("G", state.G), ("G_ema", state.G_ema)):
        for name, value in module.state_dict().items():
            assert torch.equal(value, snapshot[net][name]), name
    for name, value in state.D.own_state_dict().items():
        assert_close(value.float(), snapshot["D"][name].float(), atol=1e-6, rtol=1e-5)
    assert "(100.0 %)" in table
    assert (state.progress, float(state.loss.pl_mean)) == (Progress(), 0)
    total = sum(p.numel() for p in state.G.mapping.fc0.parameters())
    assert cells(table, "G", "mapping.fc0") == [f"{total:,}", "0", "0"]


def test_other_number_of_unnamed_classes(snapshot):
    state, drawn, table = begin(generator(5), snapshot, [str(i) for i in range(5)])
    for name, value in state.G.state_dict().items():
        source = drawn if name in ("mapping.embed.weight", "mapping.w_avg") else snapshot["G"]
        assert torch.equal(value, source[name]), name
    assert cells(table, "G", "mapping.embed") == ["0", str(3 * 8), str(5 * 8)]
    heads = [name for name in snapshot["D"] if name.endswith("main.0.main.0.weight_orig")]
    tables = [name for name in snapshot["D"] if name.endswith("embed.weight")]
    assert tables
    own = state.D.own_state_dict()
    assert all(torch.equal(own[name], snapshot["D"][name]) for name in heads)
    assert all(own[name].shape[0] == 5 for name in tables)


@pytest.mark.parametrize("c_dim", [2, 3, 4])
def test_classes_with_equal_names_keep_their_rows(snapshot, c_dim):
    names = ["owl", "fox", "cat", "hen"][:c_dim]
    state, drawn, table = begin(generator(c_dim), snapshot, names)
    for name in ("mapping.embed.weight", "mapping.w_avg"):
        value = state.G.state_dict()[name]
        for i, label in enumerate(names):
            if label in NAMES:
                assert torch.equal(value[i], snapshot["G"][name][NAMES.index(label)]), (name, label)
            else:
                assert torch.equal(value[i], drawn[name][i]), (name, label)
    shared = len(set(names) & set(NAMES))
    assert cells(table, "G", "mapping.embed") == [str(8 * shared), str(8 * (3 - shared)), str(8 * (c_dim - shared))]
    for name, value in state.D.own_state_dict().items():
        if name.endswith("embed.scale"):
            assert torch.equal(value[0], snapshot["D"][name][2])


def test_which_classes_are_equal():
    assert match_classes(["0", "1"], ["0", "1"], 2, 2).here == [0, 1]
    assert match_classes(["0", "1", "2"], ["0", "1"], 3, 2).here == []      # Numbers are no names.
    assert match_classes(["a", "b"], None, 2, 2).there == [0, 1]            # Official files have no names.
    assert match_classes(["a", "b"], ["b", "a"], 2, 2).there == [1, 0]
    assert match_classes(["3", "7"], None, 2, 10).there == [3, 7]           # Numbers are the same numbers elsewhere.
    assert match_classes(["0", "1", "2"], ["0", "2", "1"], 3, 3).there == [0, 2, 1]
    assert match_classes(["cafe\u0301"], ["x", "caf\u00e9"], 1, 2).there == [1]


@pytest.mark.parametrize(("here", "there"), [(0, 3), (3, 0)])
def test_conditional_and_unconditional(here, there):
    source = snapshot_of(make_trainer(generator(there), 0), NAMES[:there] or None)
    state, drawn, table = begin(generator(here), source, NAMES[:here])
    for name, value in state.G.state_dict().items():
        fresh = name.startswith(("mapping.embed", "mapping.w_avg", "mapping.fc0.weight"))
        assert torch.equal(value, (drawn if fresh else source["G"])[name]), name
    own = state.D.own_state_dict()
    shared = [name for name in own if name in source["D"] and ".main." in name and "num_batches" not in name]
    assert shared
    assert all(torch.equal(own[name], source["D"][name]) for name in shared)
    assert int(cells(table, "D", "all")[2].replace(",", "")) > 0


def test_stem_into_a_super_resolution_stage(snapshot):
    config = superres_config(generator(), 2, 4)
    state, drawn, table = begin(config, snapshot, NAMES)
    frozen = state.G.frozen_prefixes()
    for net, module in (("G", state.G), ("G_ema", state.G_ema)):
        for name, value in module.state_dict().items():
            if name.startswith(frozen):     # From the average, in both.
                assert torch.equal(value, snapshot["G_ema"][name]), name
            elif name.startswith("synthesis.input."):
                assert torch.equal(value, snapshot[net][name]), name
            else:
                assert torch.equal(value, drawn[name]), name
    assert cells(table, "G", f"synthesis.{config.layers[-2].name}")[0] == "0"
    assert cells(table, "D", "all")[2] == "0"           # Heads do not depend on the resolution.


def test_frozen_part_is_taken_whole_or_not_at_all(snapshot):
    config = superres_config(generator(2), 2, 4)        # Other classes: the mapping does not fit.
    state, drawn, table = begin(config, snapshot, ["0", "1"])
    for name, value in state.G.state_dict().items():
        if name.startswith(state.G.frozen_prefixes()):
            assert torch.equal(value, drawn[name]), name
    assert torch.equal(state.G.synthesis.input.weight, snapshot["G"]["synthesis.input.weight"])
    assert cells(table, "G", "mapping.fc0")[0] == "0"
    assert table.endswith("The frozen part stays as --path_stem has it: not all of it is in the file.")


def test_other_resolution_keeps_its_own_filters(snapshot):
    config = generator(resolution=32)
    own = Generator(config).state_dict()
    other = dict(snapshot["G"])
    for name in list(own):
        if name.endswith("_filter"):
            other[name] = torch.full_like(own[name], 9.0)
    state, report = transfer(own, other, match_classes(NAMES, NAMES, 3, 3))
    assert 0 < loaded_share(report) < 1
    assert not [name for name in state if name.endswith("_filter") and (state[name] == 9).all()]
    assert not [item for item in report if item.name.endswith(("_filter", "transform"))]


def test_nothing_that_fits_is_refused(snapshot):
    config = generator(0, z_dim=5, w_dim=7)
    wide = stem_config(16, 4, 512, 24, 2, z_dim=5, w_dim=7)
    with pytest.raises(UserError, match="--init-from=file.pkl: 0 % of G's weights fit this run") as err:
        begin(wide, {**snapshot, "G": None}, [])
    assert "in the file" in str(err.value)
    with pytest.raises(UserError, match="0 % of G's weights fit"):
        check_generator(settings(wide), snapshot, [])
    assert "re-initialised" in check_generator(settings(config), snapshot, [])      # Convolutions fit.


def test_resume_wants_all_of_it(snapshot):
    with pytest.raises(UserError, match=r"--resume=a.pkl: 2 tensors of G do not fit this run, e.g. "
                                        r"mapping.w_avg is \[5, 16\] here and \[3, 16\] in the file \(--cond") as err:
        begin(generator(5), snapshot, [], init_from=None, resume="a.pkl")
    assert "--init-from takes what fits" in str(err.value)
    state, _, table = begin(generator(), snapshot, NAMES, init_from=None, resume="a.pkl")
    assert "(100.0 %)" in table


@pytest.mark.parametrize(("name", "c_dim"), [("snapshot_stem16_t_cond.pkl", 5), ("snapshot_stem16_r_uncond.pkl", 3),
                                             ("snapshot_superres32_t_cond.pkl", 4)])
def test_official_pickles(name, c_dim):
    official = open_snapshot(DATA / name)
    config = TrainConfig(**{**vars(settings(generator())), "generator": None})
    from training.run.snapshots import generator_config
    theirs = generator_config(official)
    kept = check_generator(dataclasses.replace(config, generator=theirs), official, [])
    assert "(100.0 %)" in kept
    changed = dataclasses.replace(theirs, c_dim=c_dim)
    if not theirs.num_frozen_layers:
        state, _, table = begin(changed, official, [str(i) for i in range(c_dim)])
        last = f"synthesis.{theirs.layers[-1].name}.weight"
        assert torch.equal(state.G_ema.state_dict()[last], official["G_ema"][last])
        assert int(cells(table, "G", "mapping.w_avg")[2].replace(",", "")) == c_dim * theirs.w_dim
    else:
        table = check_generator(dataclasses.replace(config, generator=changed), official, [])
    assert "100.0 %" not in table

#----------------------------------------------------------------------------
# The command.

OPTIONS = ("--cfg=stylegan3-t --preset=demo --cbase=64 --cmax=8 --batch=8 --device=cpu --workers=0 --metrics=none "
           "--backbones=local:random --kimg=0.008").split()


def train(*more) -> str:
    result = CliRunner().invoke(main, [*OPTIONS, *map(str, more)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_command(data16, tmp_path):
    train("--cond=1", f"--data={data16}", f"--outdir={tmp_path}/a")
    (first,) = (tmp_path / "a").iterdir()
    other = write_dataset(tmp_path / "six.zip", 16, 12, 6, seed=1)
    command = ["--cond=1", f"--data={other}", f"--outdir={tmp_path}/b", f"--init-from={first}"]
    assert "re-initialised" in train(*command, "--dry-run")
    assert not (tmp_path / "b").exists()
    output = train(*command)
    assert "Starts:" in output
    assert "mapping.w_avg" in output
    (second,) = (tmp_path / "b").iterdir()
    start, source = open_snapshot(second / "network-snapshot-000000.pkl"), open_snapshot(first)
    assert start["progress"]["cur_nimg"] == 0
    assert torch.equal(start["G_ema"]["synthesis.input.weight"], source["G_ema"]["synthesis.input.weight"])
    assert start["G_ema"]["mapping.w_avg"].shape[0] == 6
    log = (second / "log.txt").read_text()
    assert "re-initialised" in log
    assert "resuming" in train(*command, "--kimg=0.016")        # Again: its own state, not the file's weights.


def test_options_exclude_each_other(data16, tmp_path):
    result = CliRunner().invoke(main, [*OPTIONS, f"--data={data16}", f"--outdir={tmp_path}", "--init-from=a",
                                       "--resume=b"])
    assert result.exit_code == 2
    assert "--init-from and --resume exclude each other" in result.output

#----------------------------------------------------------------------------
# Stages, which keep the classes of their stem.

class Data:
    """What `follow_stem` and `follow_classes` need of a data set with an image of each class."""

    path = "data.zip"

    def __init__(self, names):
        self.class_names, self.c_dim, self.label_counts = names, len(names), np.ones(len(names))

    def renumber(self, indices, names):
        self.indices, self.class_names = list(indices), names


def stem_of(c_dim, *names) -> Stem:
    return Stem(generator(c_dim), names)


@pytest.mark.parametrize(("stem", "here", "said"), [
    (stem_of(3), ["a", "b"], "3 classes, --data has 2: moving a stage to other classes is not supported"),
    (stem_of(3), ["a", "b"], "--init-from takes what fits"),
    (stem_of(2, "a", "b"), ["a", "d"], "none called d: use the data set that it was trained on"),
    (stem_of(2), [], "use --cond=1 and data with labels"), (stem_of(0), ["a", "b"], "use --cond=0, as for the stem"),
])
def test_a_stage_keeps_the_classes_of_its_stem(stem, here, said):
    with pytest.raises(UserError, match=said):
        follow_stem(Data(here), stem)


def test_a_stage_numbers_classes_as_its_stem_does():
    for stem, here, indices in ((stem_of(2), ["a", "b"], [0, 1]), (stem_of(2, "b", "a"), ["a", "b"], [1, 0]),
                                (stem_of(2, "caf\u00e9", "x"), ["cafe\u0301", "x"], [0, 1])):
        data = Data(here)
        follow_stem(data, stem)
        assert data.indices == indices
    follow_stem(Data([]), stem_of(0))
