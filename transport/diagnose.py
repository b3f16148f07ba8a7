# SPDX-License-Identifier: Apache-2.0
"""Diagnosis of a snapshot's discriminator: `python -m transport.diagnose --network=... --data=...`.

training/watch/discriminator_diagnosis.py says what is measured. The table goes to stderr, one line of JSON to stdout.
"""
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from dnnlib import UserError, cli
from dnnlib.classes import Classes
from legacy import find_snapshot, open_snapshot
from torch_utils import misc
from torch_utils.schema import Unfit, check_tensors
from training.config import DiscriminatorConfig, LossConfig, from_dict
from training.dataset import ImageDataset, follow_classes
from training.discriminators.projected import ProjectedDiscriminator, module_keys
from training.feature_networks.registry import load_backbone
from training.networks_stylegan3 import Generator
from training.run.snapshots import build_generator
from training.step.blur import blur_sigma
from training.watch.discriminator_diagnosis import LEVELS, Diagnosis, Settings, diagnose
from transport.common import plotting

DEFAULT_BATCH = 8           # The published runs had this micro-batch; it stands in for files that do not name theirs.
COLUMNS = {"inner_product": "ip", "floor": "floor", "gap": "gap", "separability": "S", "separability_optimal": "S opt",
           "w1_learned": "W1", "w1_optimal": "W1 opt", "w1_max": "max-ASW", "w1_floor": "W1 floor",
           "pair_ratio": "pairs", "tangent_ratio": "tangent"}

#----------------------------------------------------------------------------
# Reading.

def _check_backbone(name: str, found: str | None, recorded: dict[str, Any] | None) -> None:
    expected = (recorded or {}).get("sha256")
    if expected is not None and found is not None and found != expected:
        raise UserError(f"--backbones={name}: its SHA-256 begins with {found[:12]}, but the snapshot's discriminator "
                        f"was trained on {expected[:12]}: name that file")


def load_discriminator(snapshot: dict[str, Any], file: Path, names: Sequence[str] = ()) -> ProjectedDiscriminator:
    """D of a snapshot, on the CPU.

    Args:
        snapshot: The result of `legacy.open_snapshot`.
        file: The file that it came from, for messages.
        names: Where the backbones are now, in the order of the snapshot; none: where they were.

    Raises:
        UserError: there is no D; it does not fit its settings; backbones are missing, or are not those of the snapshot.
    """
    if not snapshot.get("D") or not snapshot.get("discriminator_config"):
        notes = "; ".join(snapshot.get("notes") or [])
        raise UserError(f"--network={file}: holds no discriminator{f' ({notes})' if notes else ''}: "
                        "name a network snapshot of a training run of this project")
    config = from_dict(DiscriminatorConfig, snapshot["discriminator_config"])
    if names and len(names) != len(config.backbones):
        raise UserError(f"--backbones: {len(names)} given, the snapshot's discriminator has {len(config.backbones)}: "
                        f"{', '.join(config.backbones)}")
    backbones = {}
    for old, new, key in zip(config.backbones, names or config.backbones, module_keys(config.backbones), strict=True):
        if old.endswith(".safetensors") and not names and not Path(old.removeprefix("local:")).is_file():
            raise UserError(f"--network={file}: its feature network {old} is not there any more: name it with "
                            "--backbones")
        backbones[old] = load_backbone(new)
        _check_backbone(new, backbones[old].sha256, snapshot.get("backbones", {}).get(key))
    # Without memory first: a file may state widths that its tensors do not have. The warm-up needs a real network.
    with torch.device("meta"):
        claimed = ProjectedDiscriminator(dataclasses.replace(config, bn_warmup=False), backbones).own_state_dict()
    try:
        check_tensors(snapshot["D"], "D", claimed)
    except Unfit as err:
        raise UserError(f"--network={file}: its discriminator does not fit its settings: {err}: take another snapshot "
                        "of the run") from err
    D = ProjectedDiscriminator(config, backbones)
    D.load_own_state_dict(snapshot["D"])
    return D.eval().requires_grad_(False)


def load_data(path: str, G: Generator, class_names: Sequence[str] | None) -> ImageDataset:
    """Real images for a generator, labelled as it numbers its classes.

    Raises:
        UserError: the images have another size, no labels, or other classes.
    """
    size, conditional = G.config.img_resolution, G.c_dim > 0
    dataset = ImageDataset(path)
    if conditional and not dataset.has_labels:
        raise UserError(f"--data={path}: has no class labels, but the network has {G.c_dim} classes: name the data "
                        "that it was trained on")
    dataset = ImageDataset(path, use_labels=conditional)
    if dataset.resolution != size:
        raise UserError(f"--data={path}: images of {dataset.resolution} pixels, but the network makes {size}: name the "
                        "data that it was trained on")
    if conditional and dataset.c_dim != G.c_dim:
        raise UserError(f"--data={path}: has {dataset.c_dim} classes, the network {G.c_dim}: name the data that it was "
                        "trained on")
    follow_classes(dataset, "the network", Classes(class_names, G.c_dim))
    return dataset


@dataclasses.dataclass(frozen=True)
class DiagnoseOptions:
    """What a command line says; `python -m transport.diagnose --help` explains each."""

    network: str
    data: str
    which: str
    backbones: list[str]
    num: int
    batch: int | None
    seed: int
    device: str
    outdir: str | None


def settings_of(snapshot: dict[str, Any], D: ProjectedDiscriminator, opts: DiagnoseOptions) -> Settings:
    """Settings that do to images what the run did at this snapshot, as far as the file says it."""
    options = snapshot.get("options") or {}
    batch = opts.batch or options.get("batch_gpu") or D.config.ghost_batch or DEFAULT_BATCH
    if D.config.ghost_batch and batch % D.config.ghost_batch:
        raise UserError(f"--batch={batch}: heads normalise over ghost batches of {D.config.ghost_batch} images: take a "
                        "multiple")
    sigma = 0.0
    if "loss" in options:
        loss, seen = from_dict(LossConfig, options["loss"]), snapshot.get("progress", {}).get("cur_nimg", 0)
        sigma = blur_sigma(seen, loss.blur_init_sigma, loss.blur_fade_kimg)
    return Settings(opts.num, batch, opts.seed, sigma)

#----------------------------------------------------------------------------
# Showing.

def table(diagnosis: Diagnosis) -> str:
    """A row per head, and their means."""
    rows = [(head.name, head.numbers()) for head in diagnosis.heads] + [("mean", diagnosis.means())]
    width = max(len(name) for name, _ in rows)
    lines = ["  ".join([f"{'head':<{width}}", *(f"{label:>8}" for label in COLUMNS.values())])]
    for name, numbers in rows:
        lines.append("  ".join([f"{name:<{width}}", *(f"{numbers[key]:8.3f}" for key in COLUMNS)]))
    return "\n".join([*lines, f"{diagnosis.num} images per side, {diagnosis.classes} class(es); learned directions see "
                      f"{diagnosis.means()['w1_share']:.1%} of max-ASW"])


def draw(diagnosis: Diagnosis, path: Path) -> Path:
    """A panel of distribution functions per head, and one of all inner products beside what they could be."""
    columns = min(len(diagnosis.heads) + 1, 4)
    rows = -(-(len(diagnosis.heads) + 1) // columns)
    figure, axes = plotting.panels(rows, columns, 3.0, 2.6)
    places = list(axes.flat)
    for axis, head in zip(places, diagnosis.heads, strict=False):
        for values, label, color in zip(head.quantiles, ("real", "generated"), ("#1f6fb4", "#d1602a"), strict=True):
            axis.plot(values, LEVELS, label=label, color=color)
        low, high = head.quantiles[:, 2].min(), head.quantiles[:, -3].max()
        axis.set_xlim(low, high)
        axis.set_title(f"{head.name}: S {head.separability:.2f}", fontsize=9)
        axis.set_xlabel(r"$\langle\omega, h\rangle$", fontsize=8)
    places[0].set_ylabel("share of positions below", fontsize=8)
    places[0].legend(fontsize=8, frameon=False)
    last, spots = places[len(diagnosis.heads)], range(len(diagnosis.heads))
    last.bar(spots, [head.inner_product for head in diagnosis.heads], color="#3c8d5a", label="learned direction")
    last.hlines([head.floor for head in diagnosis.heads], [k - 0.45 for k in spots], [k + 0.45 for k in spots],
                color="#222222", linestyle=":", label="an optimal one would read")
    last.set_xticks(list(spots), [head.name for head in diagnosis.heads], fontsize=7, rotation=30, ha="right")
    last.set_ylim(min(0, *(head.inner_product for head in diagnosis.heads)), 1.3)
    last.set_title("inner product with the optimal direction", fontsize=9)
    last.legend(fontsize=7, frameon=False, loc="upper right")
    for axis in places:
        axis.tick_params(labelsize=7)
    for axis in places[len(diagnosis.heads) + 1:]:
        axis.set_axis_off()
    return plotting.save(figure, path)

#----------------------------------------------------------------------------

def run(opts: DiagnoseOptions) -> tuple[Diagnosis, dict[str, Any]]:
    """The diagnosis that the options ask for, and the facts about the snapshot that stand beside it."""
    file, device = find_snapshot(opts.network), torch.device(misc.select_device(opts.device))
    snapshot = open_snapshot(file)
    D = load_discriminator(snapshot, file, opts.backbones).to(device)
    if snapshot.get(opts.which) is None:
        raise UserError(f"--which={opts.which}: {file} does not hold it: take --which=G_ema")
    G = build_generator(snapshot, opts.which).eval().requires_grad_(False).to(device)
    dataset, settings = load_data(opts.data, G, snapshot.get("class_names")), settings_of(snapshot, D, opts)
    about = {"study": "diagnose", "network": str(file), "which": opts.which, "san": D.config.san,
             "kimg": snapshot.get("progress", {}).get("cur_nimg", 0) / 1e3, "batch": settings.batch,
             "seed": settings.seed}
    return diagnose(G, D, dataset, settings), about


@click.command(cls=cli.Command, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--network", metavar="PKL|DIR", type=cli.PathType(addresses=True), required=True,
              help="A network snapshot with its discriminator, or a run")
@click.option("--data", metavar="ZIP|DIR", type=cli.PathType(), required=True, help="The images that it was trained on")
@click.option("--which", type=click.Choice(["G", "G_ema"]), default="G", show_default=True,
              help="Whose images: D was trained against those of G")
@click.option("--backbones", metavar="NAME,...", type=cli.PathList(), default="",
              help="Where the feature networks of D are now  [default: where they were]")
@click.option("--num", metavar="INT", type=cli.IntRange(min=1), default=2048, show_default=True,
              help="Images per side, at most those of --data")
@click.option("--batch", metavar="INT", type=cli.IntRange(min=1),
              help="Images over which heads normalise  [default: the run's micro-batch]")
@click.option("--seed", metavar="INT", type=cli.Seed(), default=0, show_default=True,
              help="Decides images, latents and augmentation")
@cli.device_option()
@click.option("--outdir", metavar="DIR", type=cli.PathType(), help="Where diagnosis.png goes; default: nowhere")
def main(**kwargs: Any) -> None:
    """Diagnose a discriminator's last layers: is each direction optimal, the slice separable, the features injective?

    The table goes to stderr, one line of JSON to stdout; docs/transport.md explains the numbers.
    """
    opts = DiagnoseOptions(**kwargs)
    diagnosis, about = run(opts)
    click.echo(table(diagnosis), err=True)
    if opts.outdir is not None:
        click.echo(f"figure: {draw(diagnosis, Path(opts.outdir) / 'diagnosis.png')}", err=True)
    click.echo(json.dumps(about | diagnosis.record()))


if __name__ == "__main__":
    main()
