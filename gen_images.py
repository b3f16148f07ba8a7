# SPDX-License-Identifier: Apache-2.0
"""Generate images from a snapshot or an official pickle: single files, an array file, a sample sheet or a grid."""
import dataclasses
from collections.abc import Iterator
from typing import Any

import click
import numpy as np
import torch
import tqdm

from dnnlib import UserError, cli
from dnnlib.util import list_some, printable
from inference.directions.edits import check_edits, edit_offset
from inference.directions.files import load_directions
from inference.frames import make_transform
from inference.image_inputs import read_labels
from inference.latents import load_centroids, load_latents, origin_notes
from inference.sample_files import (
    SHEET_PIXELS,
    Sheet,
    class_numbers,
    folder_names,
    write_folder,
    write_npz,
    write_sheet,
)
from inference.samples import Samples, class_shares, drawn_classes, each_class, given_images, sample_images
from inference.sampling import find_classes
from legacy import LoadedNetwork, load_network
from torch_utils import misc
from torch_utils.ops import dispatch
from training.generator.synthesis import UNMOVED, Offset
from training.networks_stylegan3 import Generator

SHEET_ROWS = 40             # Rows of a sheet at most, if nobody says which classes it is to have.
OFFICIAL_SEED, OFFICIAL_SAMPLES = 42, 4         # What the official gen_class_samplesheet.py takes unasked.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ImageOptions:
    """The command line."""

    network: str
    seeds: list[int] | None
    w: list[str] | None
    class_name: str | None
    labels: str | None
    data: str | None
    split: str | None
    trunc: float
    batch_sz: int
    centroids_path: str | None
    directions: list[str]
    edits: tuple[tuple[str, float], ...]
    translate: tuple[float, float]
    rotate: float
    noise_mode: str
    outdir: str | None
    npz: str | None
    sheet: str | None
    grid: tuple[int, int] | None
    grid_width: int | None
    samples_per_class: int | None
    seed: int | None
    precision: str
    device: str

    def check(self) -> None:
        """What can be said without the network. Raises UserError."""
        if [self.outdir, self.npz, self.sheet].count(None) != 2:
            raise UserError("give --outdir for single images, --npz for one file of arrays, or --sheet for one "
                            "picture, one of the three")
        if self.grid is not None and self.sheet is None:
            raise UserError(f"--grid={self.shown_grid}: is the form of a picture: name its file by --sheet")
        for name in ("grid_width", "samples_per_class", "seed"):
            if getattr(self, name) is not None and not self.has_class_rows:
                raise UserError(f"--{name.replace('_', '-')}={getattr(self, name)}: belongs to a --sheet of classes: "
                                "leave it out, or --grid")
        if self.labels is not None and self.class_name is not None:
            raise UserError(f"--labels={self.labels}: says how classes are drawn, and --class which are made: leave "
                            "one of the two out")
        if self.labels is not None and self.has_class_rows:
            raise UserError(f"--labels={self.labels}: a sheet has every class: leave it out, or give --grid for a "
                            "picture of the images as they come")
        if (self.data is None) != (self.labels != "dataset"):
            raise UserError("--labels=dataset: needs a data set with labels: name it by --data" if self.data is None
                            else f"--data={self.data}: has no effect without --labels=dataset: leave it out")
        if self.split is not None and self.data is None:
            raise UserError(f"--split={self.split}: has no effect without --data: leave it out")
        check_edits(self.directions, [name for name, _ in self.edits])
        self.check_given()
        self.chosen_seeds()

    def check_given(self) -> None:
        """Given latents are used as they are, so some options have no meaning with them. Raises UserError."""
        if not self.w:
            return
        if self.has_class_rows:
            raise UserError("--sheet: has a row per class, and the latents of --w have none: give --grid, too")
        choices = {"--seeds": self.seeds is not None, "--class": self.class_name is not None,
                   "--labels": self.labels is not None, "--trunc": self.trunc != 1,
                   "--centroids-path": self.centroids_path is not None}
        if given := [option for option, is_given in choices.items() if is_given]:
            raise UserError(f"--w: its latents are used as they are, and {', '.join(given)} would change nothing: "
                            "leave it out")

    @property
    def shown_grid(self) -> str:
        return "x".join(map(str, self.grid or ()))

    @property
    def has_class_rows(self) -> bool:
        """Whether the images are shown by class."""
        return self.sheet is not None and self.grid is None

    def chosen_seeds(self) -> list[int]:
        """Each seed once; none with --w. Raises UserError if it is not clear which."""
        if self.w:
            return []
        if self.seeds is not None:
            if self.seed is not None or self.samples_per_class is not None:
                raise UserError("--seeds: names the samples of each class: leave --seed and --samples-per-class out")
            return list(dict.fromkeys(self.seeds))
        if not self.has_class_rows:
            raise UserError("give --seeds, such as --seeds=0-9, or latents in files with --w")
        first = OFFICIAL_SEED if self.seed is None else self.seed
        last = first + (self.samples_per_class or OFFICIAL_SAMPLES) - 1
        if last > cli.MAX_SEED or last - first >= cli.MAX_LIST:
            raise UserError(f"--samples-per-class={last - first + 1}: at most {cli.MAX_LIST} seeds are taken, and "
                            f"seeds from {first} on end at {cli.MAX_SEED}: give fewer, or a smaller --seed")
        return list(range(first, last + 1))

#----------------------------------------------------------------------------
# What is made.

def named_classes(loaded: LoadedNetwork, options: ImageOptions) -> list[int] | None:
    """The classes of --class, each once; None without it. Raises UserError."""
    if options.class_name is None:
        return None
    classes = list(dict.fromkeys(find_classes(options.class_name, loaded.class_names, loaded.G_ema.c_dim)))
    names = [loaded.class_names[i] for i in classes] if loaded.class_names else []
    if len(classes) > 1 and names:
        click.echo(printable(f"--class={options.class_name}: {list_some(names, 10)}"), err=True)
    elif names and names != [options.class_name]:
        click.echo(printable(f"--class={options.class_name}: the class {classes[0]}, {names[0]}"), err=True)
    return classes


def data_shares(loaded: LoadedNetwork, options: ImageOptions) -> np.ndarray | None:
    """How often the classes come in --data, float64 [c_dim]; None without it. Raises UserError."""
    if options.data is None:
        return None
    labels, names = read_labels(options.data, options.split)
    if labels is None:
        raise UserError(f"--data={options.data}: has no labels: name a data set with labels, or give "
                        "--labels=balanced")
    shares, note = class_shares(f"--data={options.data}", labels, names, f"--network={options.network}",
                                loaded.class_names, loaded.G_ema.c_dim)
    cli.tell([note] if note else ())
    return shares


def choose_samples(loaded: LoadedNetwork, options: ImageOptions, seeds: list[int],
                   classes: list[int] | None) -> Samples:
    """Seeds and classes of the images for --outdir, --npz and --grid. Raises UserError."""
    c_dim = loaded.G_ema.c_dim
    if options.labels is not None and c_dim == 0:
        raise UserError(f"--labels={options.labels}: the network is unconditional: leave --labels out")
    if classes is None:
        return drawn_classes(seeds, c_dim, options.labels or "uniform", data_shares(loaded, options))
    if len(seeds) * len(classes) > cli.MAX_LIST:
        raise UserError(f"--class={options.class_name}: {len(classes)} classes with {len(seeds)} seeds each are "
                        f"{len(seeds) * len(classes)} images, at most {cli.MAX_LIST} are made at once: give fewer "
                        "--seeds")
    return each_class(seeds, classes, by_class=options.grid is not None)


def class_sheet(loaded: LoadedNetwork, options: ImageOptions, seeds: list[int],
                classes: list[int] | None) -> tuple[Sheet, Samples]:
    """A sheet in which no class is folded over two rows, and its images. Raises UserError."""
    G = loaded.G_ema
    per_row = 1 if options.grid_width is None else options.grid_width // len(seeds)
    if per_row == 0:
        raise UserError(f"--grid-width={options.grid_width}: a row has no room for the {len(seeds)} samples of a "
                        "class: give a larger one, or fewer samples")
    if classes is None:
        classes = list(range(min(max(G.c_dim, 1), SHEET_ROWS * per_row)))
    names = loaded.class_names or [str(k) for k in range(G.c_dim)]
    sheet = Sheet(G.img_resolution, len(seeds), len(classes), per_row,
                  [names[k] for k in classes] if G.c_dim > 0 else [])
    if sheet.is_too_large:
        most = sheet.most_per_group
        raise UserError(f"--sheet: {len(classes)} class(es) with {len(seeds)} samples of {sheet.cell} pixels are more "
                        f"than fit into one picture: give {f'at most {most} samples' if most else 'fewer classes'}, or "
                        "--outdir for single images")
    return sheet, each_class(seeds, classes, by_class=True)


def grid_sheet(options: ImageOptions, resolution: int, count: int) -> Sheet:
    """A grid for so many images. Raises UserError."""
    assert options.grid is not None     # Otherwise nobody asks for one.
    columns, rows = options.grid
    sheet = Sheet(resolution, columns, rows)
    if count > columns * rows:
        raise UserError(f"--grid={options.shown_grid}: has room for {columns * rows} images, and {count} are asked "
                        "for: give a larger grid, or fewer seeds and classes")
    if sheet.is_too_large:
        raise UserError(f"--grid={options.shown_grid}: images of {sheet.cell} pixels are more than fit into one "
                        f"picture: give at most {SHEET_PIXELS // sheet.cell ** 2} places, or --outdir for single "
                        "images")
    return sheet

#----------------------------------------------------------------------------
# Where it goes.

def chosen_edit(G: Generator, options: ImageOptions) -> Offset:
    """What --edit adds. Raises UserError."""
    if not options.edits:
        return UNMOVED
    files, notes = load_directions(options.directions, G)
    cli.tell(notes)
    return edit_offset(files, options.edits)


def make_images(loaded: LoadedNetwork, options: ImageOptions, samples: Samples,
                given: torch.Tensor | None) -> Iterator[np.ndarray]:
    """The images, uint8 [R, R, 3], with a bar that shows how far they are.

    Args:
        loaded: The network.
        options: The command line.
        samples: What is made.
        given: ws of --w, [N, num_ws, w_dim], of which it is made then.

    Raises:
        UserError: an image has non-finite values.
    """
    G = loaded.G_ema
    transform = G.synthesis.input.get_buffer("transform")
    transform.copy_(make_transform(options.translate, options.rotate))
    centroids = None
    if options.centroids_path is not None:
        centroids = load_centroids(options.centroids_path, G.w_dim).to(transform.device)
    edit = chosen_edit(G, options)
    if given is None:
        images = sample_images(G, samples, options.batch_sz, options.trunc, centroids, options.precision, edit)
    else:
        images = given_images(G, given, options.batch_sz, options.precision, edit)
    return iter(tqdm.tqdm(images, total=len(samples), unit="image", disable=None))


def write(loaded: LoadedNetwork, options: ImageOptions) -> str:
    """Make what is asked for; returns what was written, in words. Raises UserError."""
    G = loaded.G_ema
    seeds, classes = options.chosen_seeds(), named_classes(loaded, options)
    given = torch.cat([load_latents(path, G.num_ws, G.w_dim) for path in options.w]) if options.w else None
    cli.tell(origin_notes(options.w or [], G))
    sheet: Sheet | None = None
    if options.has_class_rows:
        sheet, samples = class_sheet(loaded, options, seeds, classes)
    else:
        samples = (choose_samples(loaded, options, seeds, classes) if given is None
                   else Samples(range(len(given)), [0] * len(given)))
        if options.grid is not None:
            sheet = grid_sheet(options, G.img_resolution, len(samples))
    images = make_images(loaded, options, samples, given)
    if sheet is not None:
        assert options.sheet is not None        # `check` has seen it.
        write_sheet(options.sheet, sheet, images)
        if sheet.groups_per_row > 1:
            return f"{options.sheet}: {sheet.groups} class(es) of {len(seeds)} samples, {sheet.columns} in a row"
        return f"{options.sheet}: {sheet.rows} row(s) of {sheet.per_group} samples"
    if options.npz is not None:
        numbers = class_numbers(loaded.class_names, G.c_dim) if given is None else []
        write_npz(options.npz, samples, images, G.img_resolution, numbers)
        return f"{options.npz}: {len(samples)} images"
    assert options.outdir is not None
    by_class = len(classes) > 1 if classes is not None else options.labels in ("balanced", "dataset")
    folders = folder_names(loaded.class_names, G.c_dim) if by_class else None
    write_folder(options.outdir, samples, images, folders, "seed" if given is None else "w")
    called = " in a folder per class" if by_class else ""
    if by_class and loaded.class_names and folders == [str(i) for i in range(G.c_dim)] != loaded.class_names:
        called += ", called by its number, because not all names of classes can be names of folders"
    return f"{options.outdir}: {len(samples)} images{called}"

#----------------------------------------------------------------------------

@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
              type=cli.PathType(addresses=True), required=True)
@click.option("--seeds", help="Random seeds, e.g. 0,1,4-6", type=cli.IntList(cli.MAX_SEED))
@click.option("--w", help="Instead of seeds: latents in .npz (array w) or .npy files, used as they are",
              metavar="FILE,FILE...", type=cli.PathList())
@click.option("--class", "--classes", "class_name", help="Class by name or index, or several, e.g. cat,3,5-7: every "
              "seed is made with each  [default: drawn from each seed]", metavar="NAME,INT...")
@click.option("--labels", help="How the class of each seed is drawn instead: all equally likely, the classes in turn, "
              "or as often as --data has them  [default: uniform]", metavar="uniform|balanced|dataset",
              type=click.Choice(["uniform", "balanced", "dataset"]))
@click.option("--data", help="Data set with the labels for --labels=dataset", metavar="DIR|FILE", type=cli.PathType())
@click.option("--split", help="Which part of --data, if it has several", metavar="train|val|test|all")
@click.option("--trunc", help="Truncation psi: 1 is none, 0 the mean", metavar="FLOAT", type=cli.Psi(),
              default=1.0, show_default=True)
@click.option("--batch-sz", "--batch-gpu", "batch_sz", help="Images made at once: more are faster on GPUs and may "
              "round differently (by one of 255 levels)", metavar="INT", type=cli.IntRange(min=1), default=1,
              show_default=True)
@click.option("--centroids-path", help="Truncate towards the nearest of these centres of w (python -m "
              "inference.centroids)", metavar="FILE", type=cli.PathType())
@cli.edit_options()
@click.option("--translate", help="Shift of the picture in image widths", type=cli.Vec2(cli.MAX_SHIFT), default="0,0",
              show_default=True)
@click.option("--rotate", help="Rotation of the picture in degrees", metavar="ANGLE", type=cli.Angle(), default=0,
              show_default=True)
@click.option("--noise-mode", help="Accepted for old commands: these generators have no noise inputs",
              type=click.Choice(["const", "random", "none"]), default="const", show_default=True)
@click.option("--outdir", help="Write single images here; with several classes in a folder per class", metavar="DIR",
              type=cli.PathType())
@click.option("--npz", help="Write all images as arrays to one file, which calc_metrics.py reads", metavar="FILE",
              type=cli.OutputFile())
@click.option("--sheet", help="Write one picture: a row per class, a column per seed", metavar="PNG",
              type=cli.OutputFile())
@click.option("--grid", help="Let --sheet show the images as they come: columns x rows", type=cli.Grid())
@click.option("--grid-width", help="Let rows of --sheet have up to so many images, of as many classes as fit whole",
              metavar="INT", type=cli.IntRange(min=1))
@click.option("--samples-per-class", help="Images of each class on --sheet, if there are no --seeds  "
              f"[default: {OFFICIAL_SAMPLES}]", metavar="INT", type=cli.IntRange(min=1))
@click.option("--seed", help=f"The first seed of --samples-per-class  [default: {OFFICIAL_SEED}]", metavar="INT",
              type=cli.Seed())
@cli.precision_option()
@cli.device_option()
def main(**values: Any) -> None:
    """Generate images from a trained network.

    \b
    Examples:
      # Four images of class 207, truncated.
      python gen_images.py --network=best_model.pkl --seeds=0-3 --class=207 --trunc=0.7 --outdir=out

    \b
      # A sample sheet of all classes.
      python gen_images.py --network=runs/00000-stylegan3-t-digits16-gpus1-batch32 --seeds=0-9 --sheet=samples.png

    \b
      # 50,000 images, equally many of each class, for metrics.
      python gen_images.py --network=best_model.pkl --seeds=0-49999 --labels=balanced --npz=samples.npz
    """
    options = ImageOptions(**values)
    options.check()
    if options.noise_mode != "const":
        click.echo(f"NOTE: --noise-mode={options.noise_mode} has no effect: these generators have no noise inputs",
                   err=True)
    if options.centroids_path is not None and options.trunc == 1:
        cli.tell([f"--centroids-path={options.centroids_path} has no effect with --trunc=1"])
    target = misc.select_device(options.device)
    click.echo(dispatch.start_lines(target), err=True)
    click.echo(write(load_network(options.network, target), options))


if __name__ == "__main__":
    main()
