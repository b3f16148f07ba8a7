"""train.py: every published command resolves, and every mistake is one clear line."""
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.cli.full_size import pretend_snapshot
from tests.conftest import write_dataset
from train import main
from training.config import TrainConfig, from_dict, to_dict
from training.generator.layer_schedule import stem_config, superres_config


def dry_run(command: str, **places):
    """Settings that a command line resolves to; nothing is written."""
    args = command.format(**places).split()
    result = CliRunner().invoke(main, [*args, "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    text = result.output
    start = text.index("\n{\n") + 1 if not text.startswith("{") else 0
    return from_dict(TrainConfig, json.JSONDecoder().raw_decode(text[start:])[0]), text


def fail(command: str, **places) -> str:
    """The one line that a wrong command line gives."""
    result = CliRunner().invoke(main, command.format(**places).split())
    assert result.exit_code == 2, result.output
    lines = [line for line in result.output.splitlines() if line.startswith("Error:")]
    assert len(lines) == 1, result.output
    return lines[0]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Data sets with the shapes of the real ones, and snapshots of stems that hold settings only."""
    folder = tmp_path_factory.mktemp("recipes")
    places = {"out": folder / "out"}
    names = [f"class{i}" for i in range(1000)]
    for size in (16, 32, 64, 128, 256):
        places[f"imagenet{size}"] = write_dataset(folder / f"imagenet{size}.zip", size, 2, 2, classes=names)
    for size in (16, 32):
        places[f"cifar{size}"] = write_dataset(folder / f"cifar{size}.zip", size, 10, 10)
    for size in (16, 32, 64, 128, 256, 512, 1024):
        places[f"ffhq{size}"] = write_dataset(folder / f"ffhq{size}.zip", size, 2, 0)

    def save(name: str, config, class_names=None):
        places[name] = pretend_snapshot(folder / f"{name}.pkl", config, class_names)

    imagenet = stem_config(16, 10, 65536, 1024, c_dim=1000)
    save("stem16", imagenet)
    for size in (32, 64, 128):
        imagenet = superres_config(imagenet, 2, 7)
        save(f"stem{size}", imagenet)
    save("named_stem16", stem_config(16, 10, 65536, 1024, c_dim=10), [str(i + 3) for i in range(10)])
    save("cifar_stem", stem_config(16, 6, 131072, 2048, rotation=True, c_dim=10))
    ffhq = stem_config(16, 6, 131072, 2048, rotation=True)
    save("ffhq_stem16", ffhq)
    for size in (32, 64, 128, 256, 512):
        ffhq = superres_config(ffhq, 2, 7 if size == 32 else 4, rotation=size == 32)
        save(f"ffhq_stem{size}", ffhq)
    return places

#----------------------------------------------------------------------------
# spec: the real recipes.

def test_imagenet_stem(places):
    config, _ = dry_run("--outdir={out} --data={imagenet16} --gpus=8 --cfg=stylegan3-t --cond 1 --syn_layers 10 "
                        "--batch 2048 --batch-gpu 8 --mirror 1 --snap 10", **places)
    assert config.generator == stem_config(16, 10, 65536, 1024, c_dim=1000)
    assert (config.batch, config.batch_gpu, config.snapshot_ticks, config.data.mirror) == (2048, 8, 10, True)
    assert (config.optim.G_lr, config.optim.D_lr) == (0.0025, 0.002)
    assert config.discriminator.backbones == ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")
    assert config.metrics == ("fid50k_full",)
    assert (config.total_kimg, config.kimg_per_tick) == (25000, 4)


@pytest.mark.parametrize(("size", "weight", "batch"), [(32, 0.0, 2048), (64, 8.0, 256), (128, 8.0, 256)])
def test_imagenet_stages(places, size, weight, batch):
    config, _ = dry_run(f"--outdir={{out}} --data={{imagenet{size}}} --gpus=8 --cfg=stylegan3-t --cond 1 --superres "
                        f"--up_factor 2 --head_layers 7 --path_stem {{stem{size // 2}}} --batch {batch} --batch-gpu 8 "
                        f"--cls_weight {weight}", **places)
    assert config.generator.img_resolution == size
    assert config.loss.cls_weight == weight


def test_imagenet_256_official_command(places):
    config, text = dry_run("--outdir={out} --cfg=stylegan3-t --data={imagenet256} --gpus=8 --batch=256 --batch-gpu 8 "
                           "--kimg 11000 --syn_layers 11 --superres --cls_weight 8.0 --up_factor 2 --head_layers 7 "
                           "--cond True --path_stem={stem128}", **places)
    assert [layer.name for layer in config.generator.layers][-3:] == ["L29_276_256", "L30_256_256", "L31_256_3"]
    assert config.total_kimg == 11000
    assert "--syn_layers has no effect" in text


def test_cifar(places):
    config, _ = dry_run("--outdir={out} --cfg=stylegan3-r --data={cifar16} --gpus=8 --batch=2048 --cond=1 --mirror=1 "
                        "--syn_layers 6 --kimg 300000", **places)
    assert [layer.name for layer in config.generator.layers][-2:] == ["L5_16_2048", "L6_16_3"]
    config, _ = dry_run("--outdir={out} --cfg=stylegan3-r --data={cifar32} --gpus=8 --batch=2048 --cond=1 --superres "
                        "--up_factor 2 --head_layers 7 --path_stem={cifar_stem} --kimg 250000", **places)
    assert config.generator.layers[-1].name == "L12_32_3"
    assert config.generator.layers[-2].conv_kernel == 1


@pytest.mark.parametrize(("size", "kind", "head", "batch"), [
    (32, "r", 7, 2048), (64, "t", 4, 256), (128, "t", 4, 256), (256, "t", 4, 256), (512, "t", 4, 128),
    (1024, "t", 4, 128)])
def test_ffhq(places, size, kind, head, batch):
    config, _ = dry_run(f"--outdir={{out}} --cfg=stylegan3-{kind} --data={{ffhq{size}}} --gpus=8 --batch={batch} "
                        f"--mirror=1 --superres --up_factor 2 --head_layers {head} "
                        f"--path_stem={{ffhq_stem{size // 2}}}", **places)
    assert config.generator.img_resolution == size
    assert config.generator.c_dim == 0
    assert config.generator.layers[-2].conv_kernel == (1 if kind == "r" else 3)


def test_small_data(places):
    config, text = dry_run("--outdir={out} --cfg=stylegan3-t --data={ffhq16} --gpus=8 --batch=64 --cbase 16384 "
                           "--cmax 256 --syn_layers 7", **places)
    assert config.generator == stem_config(16, 7, 32768, 512)
    assert "--preset=small" in text
    preset, _ = dry_run("--outdir={out} --cfg=stylegan3-t --data={ffhq16} --gpus=8 --batch=64 --preset=small", **places)
    assert preset.generator == config.generator


def test_dry_run_writes_nothing_and_settings_survive_json(places):
    config, text = dry_run("--outdir={out} --cfg=stylegan3-t --data={imagenet16} --batch=16 --kimg=0.5 --tick=0.1",
                           **places)
    assert not Path(places["out"]).exists()
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert (config.total_kimg, config.kimg_per_tick) == (0.5, 0.1)
    assert "has class labels but --cond is off" in text


@pytest.mark.parametrize(("options", "precision", "features"), [
    ("", "auto", "fp32"), ("--fp32=1", "fp32", "fp32"), ("--precision=fp32", "fp32", "fp32"),
    ("--precision=bf16", "bf16", "fp32"), ("--feature-precision=bf16", "auto", "bf16"),
    ("--feature-precision=tf32", "auto", "tf32")])
def test_precision(options, precision, features, places):
    config, _ = dry_run(BASE + options, **places)
    assert (config.precision, config.feature_precision) == (precision, features)

#----------------------------------------------------------------------------

BASE = "--outdir={out} --cfg=stylegan3-t --data={imagenet16} --batch=16 --metrics=none --dry-run "


@pytest.mark.parametrize(("more", "message"), [
    ("--superres", "--superres needs --path_stem"),
    ("--superres --stem --path_stem={stem16}", "exclude each other"),
    ("--superres --path_stem={stem16} --cbase=1000", "--cbase has no effect with --superres"),
    ("--superres --path_stem={stem16} --cmax=64", "--cmax has no effect with --superres"),
    ("--superres --path_stem={stem16} --map-depth=3", "--map-depth has no effect with --superres"),
    ("--superres --path_stem={stem16} --embedding=random", "--embedding has no effect with --superres"),
    ("--head_layers=7", "--head_layers has an effect only with --superres"),
    ("--up_factor=2", "--up_factor has an effect only with --superres"),
    ("--path_stem={stem16}", "--path_stem has an effect only with --superres"),
    ("--cls_weight=8", "--cls_weight has an effect only with --superres"),
    ("--freezed=2", "--freezed=2 has no effect"),
    ("--feature-precision=fp16", "'fp16' is not one of 'fp32', 'tf32', 'bf16'"),
    ("--feature-precision=tf32 --fp32=1", "--fp32=1 and --feature-precision=tf32 exclude each other"),
    ("--feature-precision=bf16 --fp32=1", "--fp32=1 and --feature-precision=bf16 exclude each other"),
    ("--precision=bf16 --fp32=1", "--fp32=1 and --precision=bf16 exclude each other"),
    ("--batch=16 --gpus=3", "--batch=16 is not divisible by --gpus=3"),
    ("--batch=16 --batch-gpu=5", "--batch-gpu=5"),
    ("--superres --path_stem={stem16} --cond=1 --data={imagenet64}", "--up_factor=2 makes 32 pixels"),
    ("--superres --path_stem={stem16} --data={imagenet32}", "the stem has 1000 classes"),
    ("--superres --path_stem={named_stem16} --cond=1 --data={cifar32}",
     "cifar32.zip: has the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, but the stem of --path_stem has 3, 4, 5"),
    ("--superres --path_stem=nowhere", "nowhere: no such file or folder"),
    ("--resume=nowhere", "nowhere: no such file or folder"),
    ("--data=nowhere.zip", "nowhere.zip"),
    ("--data={ffhq16} --cond=1", "--cond"),
])
def test_mistakes(places, more, message):
    assert message in fail(BASE + more, **places)
    assert not Path(places["out"]).exists()


def test_batch_is_asked_for(places):
    assert "--batch is missing" in fail("--outdir={out} --cfg=stylegan3-t --data={imagenet16} --dry-run", **places)


def test_unknown_values_list_the_known_ones(places):
    result = CliRunner().invoke(main, ["--cfg=stylegan2", "--outdir=x", "--data=y"])
    assert result.exit_code == 2
    assert "stylegan3-t" in result.output


def test_unwritable_outdir(places, tmp_path):
    (tmp_path / "file").write_text("")
    line = fail("--outdir={there}/runs --cfg=stylegan3-t --data={imagenet16} --batch=16 --metrics=none --device=cpu",
                there=tmp_path / "file", **places)
    assert "--outdir" in line


def test_missing_weights_while_offline(places, tmp_path):
    line = fail("--outdir={here} --cfg=stylegan3-t --data={imagenet16} --batch=16 --metrics=fid50k_full --device=cpu",
                here=tmp_path, **places)
    for part in ("weights-inception-2015-12-05-6726825d.pth", "https://", "sha256", "STYLESAN_WEIGHTS"):
        assert part in line
    line = fail("--outdir={here} --cfg=stylegan3-t --data={imagenet16} --batch=16 --metrics=none --device=cpu",
                here=tmp_path, **places)
    for part in ("deit_base_distilled_patch16_224", "https://", "STYLESAN_WEIGHTS"):
        assert part in line


def test_every_option_has_help():
    for parameter in main.params:
        assert parameter.help, parameter.name
    result = CliRunner().invoke(main, ["--help"])
    assert "Examples" in result.output
