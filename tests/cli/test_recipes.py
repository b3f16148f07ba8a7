"""--recipe: what every stage resolves to, what is refused, and a recipe run for real.

The settings of all recipes are recorded in recipes.json. After an intended change write them anew, and look at the
difference: STYLESAN_UPDATE_RECIPES=1 python -m pytest tests/cli/test_recipes.py -k recorded
"""
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import train
from legacy import open_snapshot
from tests.conftest import write_dataset
from training.config import to_dict
from training.run.folder import read_options
from training.run.networks import Stem
from training.run.options import DEFAULTS, TrainOptions, spelled
from training.run.plan import RunPlan, plan_run
from training.run.recipes import RECIPES, command_line, find_data, select_stages
from training.run.stages import plan_recipe

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).with_name("recipes.json")
CLASSES = {"imagenet256": 1000, "cifar10": 10, "ffhq1024": 0, "small": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Per recipe a folder with a data set of every stage, of the real number of classes."""
    folder = tmp_path_factory.mktemp("recipes")
    for recipe, stages in RECIPES.items():
        (folder / recipe).mkdir()
        for stage in stages:
            names = [f"class{i}" for i in range(CLASSES[recipe])] or None
            write_dataset(folder / recipe / f"{recipe}-{stage.resolution}.zip", stage.resolution, 2,
                          min(CLASSES[recipe], 2), classes=names)
    return folder


def parse(*args: str) -> TrainOptions:
    """The options of a command line."""
    with train.main.make_context("train.py", list(args)) as ctx:
        typed = {n for n in ctx.params if ctx.get_parameter_source(n) is click.core.ParameterSource.COMMANDLINE}
        return train.parse(ctx.params, typed)


def resolve(recipe: str, data: Path, *more: str) -> list[RunPlan]:
    """The plans of all stages that are asked for."""
    options = parse(f"--recipe={recipe}", f"--data={data / recipe}", "--outdir=runs", "--gpus=8", *more)
    return list(plan_recipe(options, 8, open_snapshot))


def recorded_form(config: dict) -> dict:
    """Settings without places, and with layers as one line each."""
    config = json.loads(json.dumps(config))
    del config["data"]["path"]
    if config["path_stem"]:
        config["path_stem"] = Path(config["path_stem"]).parent.name
    config["generator"]["layers"] = [
        f"{x['name']} from {x['in_channels']} at {x['in_size']}, cutoff {x['out_cutoff']:.3f} of "
        f"{x['out_sampling_rate']:g}, kernel {x['conv_kernel']}{', fp16' if x['use_fp16'] else ''}"
        for x in config["generator"]["layers"]]
    return config


def test_every_recipe_resolves_as_recorded(data):
    now = {recipe: {str(plan.config.data.resolution): recorded_form(to_dict(plan.config))
                    for plan in resolve(recipe, data)} for recipe in RECIPES}
    if os.environ.get("STYLESAN_UPDATE_RECIPES"):
        RECORDED.write_text(json.dumps(now, indent=1) + "\n")
    recorded = json.loads(RECORDED.read_text())
    for recipe, stages in now.items():
        for resolution, config in stages.items():
            assert config == recorded[recipe][resolution], (recipe, resolution)
    assert {recipe: list(stages) for recipe, stages in recorded.items()} == {
        recipe: [str(stage.resolution) for stage in stages] for recipe, stages in RECIPES.items()}


def test_published_settings():
    """The recipes against the table of published commands, as far as it names numbers."""
    def of(recipe: str, *names: str) -> list[tuple]:
        return [(stage.resolution, *(stage.options.get(name) for name in names)) for stage in RECIPES[recipe]]

    assert of("imagenet256", "batch", "batch_gpu", "cls_weight", "head_layers", "syn_layers", "kimg") == [
        (16, 2048, 8, None, None, 10, None), (32, 2048, 8, 0.0, 7, None, None), (64, 256, 8, 8.0, 7, None, None),
        (128, 256, 8, 8.0, 7, None, None), (256, 256, 8, 8.0, 7, None, 11000)]
    assert of("cifar10", "cfg", "batch", "syn_layers", "head_layers", "kimg") == [
        (16, "stylegan3-r", 2048, 6, None, 300000), (32, "stylegan3-r", 2048, None, 7, 250000)]
    assert of("ffhq1024", "cfg", "batch", "head_layers") == [
        (16, "stylegan3-r", 2048, None), (32, "stylegan3-r", 2048, 7), (64, "stylegan3-t", 256, 4),
        (128, "stylegan3-t", 256, 4), (256, "stylegan3-t", 256, 4), (512, "stylegan3-t", 128, 4),
        (1024, "stylegan3-t", 128, 4)]
    assert of("small", "preset", "syn_layers", "head_layers")[:2] == [(16, "small", 7, None), (32, "small", None, 4)]


def test_typed_options_go_before_the_recipes(data):
    stages = resolve("imagenet256", data, "--kimg=5", "--batch=64", "--batch-gpu=4", "--metrics=none",
                     "--cls_weight=2", "--syn_layers=7", "--cbase=1024", "--stages=16,32")
    stem, up = (plan.config for plan in stages)
    assert (stem.total_kimg, stem.batch, stem.batch_gpu, stem.metrics) == (5, 64, 4, ())
    assert (up.total_kimg, up.batch, up.batch_gpu, up.metrics) == (5, 64, 4, ())
    assert (stem.loss.cls_weight, up.loss.cls_weight) == (0, 2)     # Where it has an effect.
    assert len(stem.generator.layers) == 8
    assert stem.generator.channel_base == up.generator.channel_base == 2048
    assert up.path_stem == "runs/stage16/00000-stylegan3-t-imagenet256-16-gpus8-batch64"


def test_command_line_of_a_stage_gives_the_stage(data):
    """What is printed before a stage trains the same."""
    below = None
    for plan in resolve("imagenet256", data, "--metrics=none", "--stages=16,32"):
        words = command_line(plan.options).split()
        assert words[:2] == ["python", "train.py"]
        assert plan_run(parse(*words[2:]), 8, open_snapshot, below).config == plan.config
        below = Stem(plan.config.generator, tuple(plan.dataset.class_names))


def test_options_are_typed_as_they_are_spelled():
    assert {p.name: p.opts[-1] for p in train.main.params} == {name: spelled(name) for name in (
        "outdir", "data", *DEFAULTS)}
    options = parse("--outdir=x", "--data=y")
    assert options == TrainOptions("x", "y", given=frozenset({"outdir", "data"}))

#----------------------------------------------------------------------------
# Mistakes.

def fail(*args: str) -> str:
    """The one line that a wrong command line gives."""
    result = CliRunner().invoke(train.main, [*map(str, args), "--dry-run"])
    assert result.exit_code == 2, result.output
    (line,) = (line for line in result.output.splitlines() if line.startswith("Error:"))
    return line


@pytest.mark.parametrize(("more", "message"), [
    ("--superres", "--superres beside --recipe=cifar10"),
    ("--path_stem=x", "--path_stem beside --recipe=cifar10"),
    ("--up_factor=4", "--up_factor beside --recipe=cifar10"),
    ("--stages=64", "64 is no stage of --recipe=cifar10: choose from 16, 32"),
    ("--stages=32", "stage 32 is grown on stage 16, which has no snapshot in"),
    ("--stages=32 --syn_layers=4", "--syn_layers has an effect in stage 16 only"),
    ("--gpus=3", "--batch=2048 is not divisible by --gpus=3"),
])
def test_mistakes(data, tmp_path, more, message):
    line = fail("--recipe=cifar10", f"--data={data / 'cifar10'}", f"--outdir={tmp_path}/out", *more.split())
    assert message in line
    assert not (tmp_path / "out").exists()


def test_stages_follow_each_other():
    assert [s.resolution for s in select_stages("imagenet256", [64, 32])] == [32, 64]
    assert "leaves out 32" in fail("--recipe=imagenet256", "--stages=16,64", "--data=x{resolution}", "--outdir=y")
    assert "only with --recipe" in fail("--cfg=stylegan3-t", "--stages=16", "--data=x", "--outdir=y")
    assert "--cfg is missing" in fail("--data=x", "--outdir=y", "--batch=8")


def test_data_of_a_stage(tmp_path):
    for name in ("cats16.zip", "cats32.zip", "cats1016.zip"):
        (tmp_path / name).touch()
    assert find_data(str(tmp_path), 16) == str(tmp_path / "cats16.zip")
    assert find_data(f"{tmp_path}/cats{{resolution}}.zip", 32) == str(tmp_path / "cats32.zip")
    assert find_data(f"{tmp_path}/cats16.zip", 16, is_only=True) == str(tmp_path / "cats16.zip")
    for place in (str(tmp_path), f"{tmp_path}/cats{{resolution}}.zip"):
        line = fail("--recipe=small", f"--data={place}", "--outdir=out")
        assert f"{tmp_path}/cats64.zip is missing" in line
        assert f"python dataset_tool.py --source=IMAGES --dest={tmp_path}/cats64.zip --resolution=64" in line
    assert "needs a data set for every stage" in fail("--recipe=small", f"--data={tmp_path}/cats16.zip", "--outdir=out")
    (tmp_path / "dogs16.zip").touch()
    assert "cats16.zip and dogs16.zip both" in fail("--recipe=small", f"--data={tmp_path}", "--outdir=out")

#----------------------------------------------------------------------------
# For real.

TINY = ("--recipe=small --stages=16,32 --preset=demo --cbase=64 --cmax=8 --syn_layers=4 --batch=8 --device=cpu "
        "--workers=0 --metrics=none --backbones=local:random --cond=1 --kimg=0.016 --tick=0.008 --snap=1").split()


@pytest.fixture
def blobs(tmp_path):
    folder = tmp_path / "blobs"
    folder.mkdir()
    for resolution in (16, 32):
        write_dataset(folder / f"blobs{resolution}.zip", resolution, 16, 4)
    return folder


class Killed(BaseException):
    """As sudden as a signal."""


@pytest.mark.slow
def test_two_stages_killed_and_started_again(blobs, tmp_path, monkeypatch):
    import training.trainer as loop
    command = [*TINY, f"--data={blobs}/blobs{{resolution}}.zip", f"--outdir={tmp_path}/out"]

    def start(*more: str, without: tuple[str, ...] = ("--none",)) -> str:
        args = [word for word in command if not word.startswith(without)]
        result = CliRunner().invoke(train.main, [*args, *more], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    plan = start("--dry-run")
    assert plan.count("Dry run") == 2
    assert "cut from the stem" in plan
    assert "Stage 2 of 2 of small: 32 pixels" in plan
    assert not (tmp_path / "out").exists()

    update, calls = loop.update_ema, []

    def update_and_die(*args):
        calls.append(1)
        if len(calls) == 4:                             # Two iterations of stage 16, and the second of stage 32.
            raise Killed
        update(*args)

    monkeypatch.setattr(loop, "update_ema", update_and_die)
    with pytest.raises(Killed):
        start()
    monkeypatch.undo()
    (stem,) = (tmp_path / "out" / "stage16").iterdir()
    stem_files = {p.name: p.stat().st_mtime_ns for p in stem.iterdir()}

    again = start()
    assert "Stage 1 of 2 of small: 16 pixels: finished" in again
    assert "resuming at kimg 0.0" in again
    assert again.count("training for 0.016 kimg") == 1
    assert {p.name: p.stat().st_mtime_ns for p in stem.iterdir()} == stem_files
    (up,) = (tmp_path / "out" / "stage32").iterdir()
    before, after = open_snapshot(stem), open_snapshot(up)
    assert after["progress"]["cur_nimg"] == 16
    assert after["generator_config"]["img_resolution"] == 32
    assert read_options(up)["path_stem"] == str(stem)
    name = f"synthesis.{before['generator_config']['layers'][0]['name']}.weight"
    assert (before["G_ema"][name] == after["G_ema"][name]).all()

    # Once more: nothing is left to do. A longer second stage is a continued one. A single stage finds its stem.
    assert start().count(": finished") == 2
    longer = start("--stages=32", "--kimg=0.024", without=("--cbase", "--cmax", "--syn_layers"))
    assert "Stage 1 of 1 of small: 32 pixels" in longer
    assert "resuming at kimg" in longer

    # The folder of the first stage is moved: the second has everything, and the first does not begin again.
    (tmp_path / "out" / "stage16").rename(tmp_path / "moved")
    alone = start("--kimg=0.032")
    assert "Stage 2 of 2 of small: 32 pixels (of the stage before it no run is left" in alone
    assert not (tmp_path / "out" / "stage16").exists()
    assert open_snapshot(up)["progress"]["cur_nimg"] == 32


@pytest.mark.slow
def test_two_processes_go_through_the_stages_together(blobs, tmp_path):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *TINY, "--gpus=2", "--batch-gpu=auto", f"--data={blobs}",
               f"--outdir={tmp_path}/out"]
    run = functools.partial(subprocess.run, env=env, capture_output=True, text=True, timeout=300)
    done = run(command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("training for") == 2
    assert done.stdout.count("--batch-gpu=auto: 4") == 2
    for stage in ("stage16", "stage32"):
        (folder,) = (tmp_path / "out" / stage).iterdir()
        assert open_snapshot(folder)["progress"]["cur_nimg"] == 16
        assert read_options(folder)["batch_gpu"] == 4


@pytest.mark.slow
def test_asked_to_stop_exits_with_3_and_goes_on(blobs, tmp_path):
    command = [*TINY, "--kimg=0.4", "--restart_every=1", f"--data={blobs}", f"--outdir={tmp_path}/out"]
    result = CliRunner().invoke(train.main, command)
    assert result.exit_code == 3, result.output
    assert not (tmp_path / "out" / "stage32").exists()
    result = CliRunner().invoke(train.main, command)
    assert "resuming" in result.output
