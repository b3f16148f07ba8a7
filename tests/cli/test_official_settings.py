"""Every setting that the official train.py resolves, against ours for the same command.

`tests/parity/data/settings.json` has the commands and the official trees of settings. A leaf is either found in our
settings (OURS) and equal, or it stands in the table of `docs/recipes.md`, which says where it went and why it differs.
"""
import functools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli.full_size import pretend_snapshot
from tests.cli.test_train_options import dry_run
from tests.closeness import rel_error
from tests.conftest import write_dataset
from tests.parity import DATA, load_json
from training.config import GeneratorConfig, OptimConfig, TrainConfig, gradient_scale
from training.generator.layer_schedule import stem_config, superres_config
from training.run.snapshots import generator_config
from training.step.guard import GradientGuard
from training.step.phases import lazy_adam

RECORDED = load_json("settings.json")
NUM_IMAGES, NUM_CLASSES = {1024: 2}, 10     # Images at a size, else 20; as many classes as in the recorded snapshots.

#----------------------------------------------------------------------------
# Where a leaf of the official tree is in our settings, in the official form.


def head(config: GeneratorConfig):
    """The layers that this stage has of its own, without ToRGB."""
    return config.layers[config.num_frozen_layers:-1]


def is_stage(config: TrainConfig) -> bool:
    return config.generator.num_frozen_layers > 0


def every(values):
    """The value that all of them are."""
    (value,) = set(values)
    return value


OURS = {
    "G_kwargs.z_dim": lambda c: c.generator.z_dim,
    "G_kwargs.w_dim": lambda c: c.generator.w_dim,
    "G_kwargs.mapping_kwargs.num_layers": lambda c: c.generator.mapping_layers,
    "G_kwargs.mapping_kwargs.rand_embedding": lambda c: c.embedding == "random",
    "G_kwargs.channel_base": lambda c: c.generator.channel_base,
    "G_kwargs.channel_max": lambda c: c.generator.channel_max,
    "G_kwargs.conv_kernel": lambda c: every(layer.conv_kernel for layer in head(c.generator)),
    "G_kwargs.use_radial_filters": lambda c: every(layer.use_radial_filters for layer in head(c.generator)),
    "G_kwargs.num_layers": lambda c: len(c.generator.layers) - 1,
    "G_kwargs.head_layers": lambda c: len(head(c.generator)),
    "G_kwargs.up_factor": lambda c: c.generator.img_resolution / head(c.generator)[0].in_sampling_rate,
    "G_kwargs.path_stem": lambda c: Path(c.path_stem).stem,
    "G_kwargs.num_fp16_res": lambda c: int(any(layer.use_fp16 for layer in c.generator.layers)),
    "G_kwargs.conv_clamp": lambda c: every(c.generator.conv_clamp if layer.is_clamped else None
                                           for layer in c.generator.layers),
    "G_opt_kwargs.betas": lambda c: list(c.optim.betas),
    "G_opt_kwargs.eps": lambda c: c.optim.eps / gradient_scale(c.batch),
    "G_opt_kwargs.lr": lambda c: c.optim.G_lr,
    "D_opt_kwargs.betas": lambda c: list(c.optim.betas),
    "D_opt_kwargs.eps": lambda c: c.optim.eps / gradient_scale(c.batch),
    "D_opt_kwargs.lr": lambda c: c.optim.D_lr,
    "data_loader_kwargs.num_workers": lambda c: c.data.workers,
    "training_set_kwargs.path": lambda c: Path(c.data.path).name,
    "training_set_kwargs.use_labels": lambda c: c.data.c_dim > 0,
    "training_set_kwargs.xflip": lambda c: c.data.mirror,
    "training_set_kwargs.resolution": lambda c: c.data.resolution,
    "training_set_kwargs.random_seed": lambda c: c.seed,
    "batch_size": lambda c: c.batch,
    "batch_gpu": lambda c: c.batch_gpu,
    "metrics": lambda c: list(c.metrics),
    "total_kimg": lambda c: c.total_kimg,
    "kimg_per_tick": lambda c: c.kimg_per_tick,
    "image_snapshot_ticks": lambda c: c.snapshot_ticks,
    "network_snapshot_ticks": lambda c: c.snapshot_ticks,
    "random_seed": lambda c: c.seed,
    "ema_kimg": lambda c: c.optim.ema_kimg,
    "ema_rampup": lambda c: c.optim.ema_rampup,
    "resume_pkl": lambda c: Path(c.resume).name,
    "cudnn_benchmark": lambda c: c.cudnn_benchmark,
    "D_kwargs.backbones": lambda c: list(c.discriminator.backbones),
    "D_kwargs.diffaug": lambda c: c.discriminator.diffaug == ("color", "translation", "cutout"),
    "D_kwargs.interp224": lambda c: c.discriminator.img_resolution < 224,
    "D_kwargs.backbone_kwargs.cout": lambda c: c.discriminator.proj_channels,
    "D_kwargs.backbone_kwargs.cond": lambda c: c.discriminator.c_dim > 0,
    "loss_kwargs.blur_init_sigma": lambda c: c.loss.blur_init_sigma,
    "loss_kwargs.blur_fade_kimg": lambda c: c.loss.blur_fade_kimg,
    "loss_kwargs.pl_weight": lambda c: 0.0 if is_stage(c) else c.loss.pl_weight,    # Stages have no path lengths.
    "loss_kwargs.cls_weight": lambda c: c.loss.cls_weight,
    "loss_kwargs.cls_model": lambda c: c.loss.cls_model,
    "loss_kwargs.train_head_only": is_stage,
}
# Commands for which a leaf differs on purpose, although it is equal for the others.
ON_PURPOSE = {"G_kwargs.mapping_kwargs.num_layers": {"fp32_seed_lr"}}       # It has --map-depth=4.


def leaves(tree, prefix: str = ""):
    """(dotted name, value) of every leaf."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@functools.cache
def documented() -> dict[str, str]:
    """Leaf -> what `docs/recipes.md` says of it."""
    text = (Path(__file__).resolve().parents[2] / "docs" / "recipes.md").read_text()
    section = text.split("## Settings of the official code that are not found here\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ", 1) for line in section.splitlines() if line.startswith("| `")]
    return {name: why for names, why in rows for name in re.findall(r"`([^`]+)`", names)}

#----------------------------------------------------------------------------
# The recorded commands, run with this project's train.py on small files of its own.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data sets called as in the recording, with classes and, in a folder of their own, without."""
    folder = tmp_path_factory.mktemp("official")
    (folder / "uncond").mkdir()
    for size in (16, 32, 64, 256):
        write_dataset(folder / f"set{size}.zip", size, NUM_IMAGES.get(size, 20), NUM_CLASSES)
    for size in (16, 32, 64, 1024):
        write_dataset(folder / "uncond" / f"set{size}.zip", size, NUM_IMAGES.get(size, 20), 0)
    return folder


def stem_for(folder: Path, name: str, options: dict[str, str]) -> Path:
    """What a stage is grown on, called STEM.pkl: a recorded snapshot where one has the resolution and classes."""
    from legacy import open_snapshot
    resolution = int(re.search(r"\d+", options["--data"])[0]) // 2
    cond, rotation = "--cond" in options, options["--cfg"] == "stylegan3-r"
    place = folder / name / "STEM.pkl"
    place.parent.mkdir()
    recorded = {(16, True, False): "snapshot_stem16_t_cond.pkl", (32, True, False): "snapshot_superres32_t_cond.pkl"}
    if (resolution, cond, rotation) in recorded:
        place.write_bytes((DATA / recorded[resolution, cond, rotation]).read_bytes())
        return place
    if cond and not rotation:
        config = generator_config(open_snapshot(DATA / recorded[32, True, False]))
    else:
        config = stem_config(16, 6, 512, 32, rotation=rotation, c_dim=NUM_CLASSES if cond else 0)
    while config.img_resolution < resolution:
        config = superres_config(config, 2, 4)
    return pretend_snapshot(place, config)


def command_here(folder: Path, name: str) -> str:
    """The recorded command with our files."""
    words = RECORDED[name]["command"]
    options = dict(word.partition("=")[::2] for word in words)
    places = {"--data": folder / ("" if "--cond" in options else "uncond") / options["--data"]}
    if "--path_stem" in options:
        places["--path_stem"] = stem_for(folder, name, options)
    if "--resume" in options:
        places["--resume"] = folder / options["--resume"]
        pretend_snapshot(places["--resume"], stem_config(16, 14, 65536, 1024))
    kept = [word for word in words if word.partition("=")[0] not in places]
    return " ".join([*kept, *(f"{option}={place}" for option, place in places.items()), f"--outdir={folder}/out"])


@pytest.mark.parametrize("name", RECORDED)
def test_every_setting(name, folder):
    config, text = dry_run(command_here(folder, name))
    where, unequal = documented(), set()
    for leaf, official in leaves(RECORDED[name]["settings"]):
        if leaf not in OURS:
            assert leaf in where, f"{leaf}={official}: neither among our settings nor in the table of docs/recipes.md"
            continue
        ours = json.loads(json.dumps(OURS[leaf](config)))
        equal = ours == pytest.approx(official, rel=1e-12) if isinstance(official, float) else ours == official
        if not equal:
            unequal.add(leaf)
            assert leaf in where, f"{leaf}: {ours}, officially {official}, and docs/recipes.md does not say why"
    assert unequal == {leaf for leaf, names in ON_PURPOSE.items() if name in names}
    # All images are used, as the official max_size says, and mirrored ones count.
    shown = NUM_IMAGES.get(config.data.resolution, 20) * (2 if config.data.mirror else 1)
    assert f"{shown} images of {config.data.resolution} pixels" in text


def test_the_table_has_no_old_rows():
    """A row is about a setting that exists and that is not simply equal."""
    official = {leaf for recorded in RECORDED.values() for leaf, _ in leaves(recorded["settings"])}
    assert set(documented()) == (official - set(OURS)) | set(ON_PURPOSE)
    assert set(OURS) <= official

#----------------------------------------------------------------------------
# What depends on the size of gradients.


@pytest.mark.parametrize("batch", [64, 256, 2048])
@pytest.mark.parametrize("size", [1e-10, 1e-8, 1e-5])
def test_adam_moves_by_tiny_gradients_as_officially(batch, size):
    """Officially a gradient is summed over the samples of a process and averaged over 8 of them."""
    per_sample = np.random.RandomState(0).randn(3, batch, 16) * size
    ours = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    theirs = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    mine = lazy_adam([ours], 0.0025, OptimConfig.official(batch), 4)
    official = torch.optim.Adam([theirs], lr=0.0025 * 4 / 5, betas=(0.0, 0.99 ** (4 / 5)), eps=1e-8)
    for samples in per_sample:
        ours.grad = torch.from_numpy(samples.mean(axis=0))
        theirs.grad = torch.from_numpy(samples.reshape(8, -1, 16).sum(axis=1).mean(axis=0))
        mine.step()
        official.step()
    assert rel_error(ours, theirs) < 1e-12
    # With the official number itself the step would be another one.
    wrong = torch.nn.Parameter(torch.zeros(16, dtype=torch.float64))
    unscaled = lazy_adam([wrong], 0.0025, OptimConfig(eps=1e-8, ema_kimg=10), 4)
    for samples in per_sample:
        wrong.grad = torch.from_numpy(samples.mean(axis=0))
        unscaled.step()
    if size == 1e-10:
        assert float(wrong.detach().norm() / theirs.detach().norm()) < 0.5


@pytest.mark.parametrize("batch", [64, 2048])
def test_infinite_gradients_become_what_they_officially_become(batch):
    guard = GradientGuard(batch)
    gradient = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0])
    guard.sanitize_("Gmain", gradient)
    officially = torch.tensor([1e5, -1e5, 0.0, batch / 8])
    assert rel_error(gradient, officially * gradient_scale(batch)) < 1e-6
