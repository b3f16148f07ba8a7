# SPDX-License-Identifier: Apache-2.0
"""Find directions along which the pictures of a trained network change, and show what they do."""
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import tqdm

from dnnlib import UserError, cli
from dnnlib.util import list_some, normalized_name, printable
from inference.directions.clip import DEFAULT as DEFAULT_CLIP
from inference.directions.clip import load_clip
from inference.directions.edits import find_offset
from inference.directions.files import Directions, load_directions, read_directions, save_directions
from inference.directions.labelled import has_latents, invert
from inference.directions.methods import change, class_changes, joined, pca, sefa
from inference.directions.text import (
    PER_STEP,
    TextStep,
    as_directions,
    default_name,
    find_text_direction,
    given_steps,
    movable_layers,
    seed_steps,
    split_prompts,
)
from inference.inversion.distances import default_distance, make_distance
from inference.inversion.projection import ProjectionSettings
from inference.inversion.results import LATENTS_FILE
from inference.inversion.targets import list_targets
from inference.latents import load_latents, origin_notes
from inference.sample_files import Sheet, write_sheet
from inference.samples import Samples, sample_images
from inference.sampling import find_class, find_classes, many_w, seed_label
from legacy import LoadedNetwork, load_network
from torch_utils import misc
from torch_utils.ops import dispatch
from training.generator.synthesis import Offset, combined

MOST_VALUES = 1 << 27       # Of the w that are looked at: 1 GiB in float64.
MOST_DIRECTIONS = 10_000    # In a file.
OFFICIAL_STEPS = ProjectionSettings.steps
DEFAULT_STEPS = 16          # Of the search for a direction of a text.

#----------------------------------------------------------------------------
# What all methods share.

@dataclasses.dataclass(frozen=True)
class Job:
    """Options of every method, and the network."""

    method: str
    options: dict[str, Any]         # The command line.
    loaded: LoadedNetwork

    @property
    def class_names(self) -> list[str]:
        """Names of all classes: their numbers if they have none, or if two have the same one."""
        names, c_dim = self.loaded.class_names, self.loaded.G_ema.c_dim
        distinct = {normalized_name(name) for name in names or ()}
        return names if names and len(distinct) == len(names) else [str(k) for k in range(c_dim)]

    @property
    def layers(self) -> list[int]:
        """Layers that are moved."""
        num_ws, given = self.loaded.G_ema.num_ws, self.options["layers"]
        if given is None:
            return list(range(num_ws))
        if max(given) >= num_ws:
            raise UserError(f"--layers: the network has the layers 0 to {num_ws - 1}: leave out what is beyond")
        return list(dict.fromkeys(given))

    def classes(self, key: str, option: str) -> list[int]:
        """The classes that an option names, each once; all of them, or [0], if it names none. Raises UserError."""
        G, value = self.loaded.G_ema, self.options[key]
        if value is None:
            return list(range(max(G.c_dim, 1)))
        return list(dict.fromkeys(find_classes(value, self.loaded.class_names, G.c_dim, option)))

    def samples(self, classes: Sequence[int]) -> np.ndarray:
        """w [N, w_dim] of these classes, which take turns."""
        G, num = self.loaded.G_ema, self.options["samples"]
        if num * G.w_dim > MOST_VALUES:
            raise UserError(f"--samples={num}: their w do not fit into 1 GiB: give at most {MOST_VALUES // G.w_dim}")
        return many_w(G, num, classes, self.options["seed"], "directions/z")[0]

    @property
    def num(self) -> int:
        """How many directions are asked for. Raises UserError: there are not so many."""
        num, samples, w_dim = self.options["num"], self.options["samples"], self.loaded.G_ema.w_dim
        if num >= samples or num > w_dim:
            raise UserError(f"--num={num}: w has {w_dim} values, and --samples={samples} of them are looked at: give "
                            f"at most {min(samples - 1, w_dim)}")
        return int(num)

    def save(self, found: Directions, **settings: Any) -> None:
        """Write the directions, with what else it takes to make them again, and list them."""
        dest = self.options["dest"]
        save_directions(dest, found, self.loaded.G_ema, {
            "method": self.method, "network": str(self.loaded.path), "network_sha256": self.loaded.sha256,
            "options": self.options, **settings})
        click.echo("\n".join([f"{dest}: {len(found)} direction(s)", *table(found)]))


def start(method: str, options: dict[str, Any]) -> Job:
    """Open the network. Raises UserError."""
    if not options["dest"].endswith(".npz"):
        raise UserError(f"--dest={options['dest']}: becomes an .npz file: name one that ends with .npz")
    if (name := options.get("name")) is not None and not name.strip():
        raise UserError(f"--name={name!r}: is blank, and --edit could not name it: give letters, or leave it out")
    target = misc.select_device(options["device"])
    click.echo(dispatch.start_lines(target), err=True)
    return Job(method, options, load_network(options["network"], target))


def table(directions: Directions, most: int = 20) -> list[str]:
    """Names and what is known of them, a line for each."""
    names, notes = ([printable(text) for text in texts[:most]] for texts in (directions.names, directions.notes))
    width = max(map(len, names))
    lines = [f"  {name:{width}}  {note}" for name, note in zip(names, notes, strict=True)]
    return lines if len(directions) <= most else [*lines, f"  and {len(directions) - most} more"]


def method_options(command: cli.Decorated) -> cli.Decorated:
    """The options that all methods of w have."""
    for option in (
        click.option("--seed", help="Random seed of the latents", metavar="INT", type=cli.Seed(), default=0,
                     show_default=True),
        click.option("--samples", help="How many random w to look at", metavar="INT", type=cli.IntRange(min=2),
                     default=10_000, show_default=True),
        click.option("--layers", help="Layers that are moved, e.g. 3-7  [default: all]", type=cli.IntList()),
    ):
        command = option(command)
    return file_options(command)


def file_options(command: cli.Decorated) -> cli.Decorated:
    """The options that all methods have."""
    for option in (
        cli.device_option(),
        click.option("--dest", help="Where to write the directions, .npz", metavar="FILE", type=cli.OutputFile(),
                     required=True),
        click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
                     type=cli.PathType(addresses=True), required=True),
    ):
        command = option(command)
    return command


def num_option(command: cli.Decorated) -> cli.Decorated:
    """How many directions, and what they are called."""
    named = click.option("--name", help="What the names of the directions begin with  [default: the method]",
                         metavar="TEXT")
    return named(click.option("--num", help="How many directions", metavar="INT",
                              type=cli.IntRange(min=1), default=10, show_default=True)(command))


def class_option(command: cli.Decorated) -> cli.Decorated:
    """Whose w is looked at."""
    return click.option("--class", "--classes", "class_name", help="Look at w of these classes, by name or index, e.g. "
                        "cat,3,5-7  [default: all]", metavar="NAME,INT...")(command)

#----------------------------------------------------------------------------

@click.group(context_settings={"max_content_width": 120})
def main() -> None:
    """Find directions in the space of w or of styles, and show what they do.

    gen_images.py and gen_video.py move pictures along them: --directions=FILE --edit=NAME:STRENGTH. A strength of 1 is
    one standard deviation of w; along a direction of a text it is the whole of what was found.

    \b
    Examples:
      python directions.py classes --network=best_model.pkl --from=cat --to=dog --dest=cat.npz
      python gen_images.py --network=best_model.pkl --seeds=0-9 --directions=cat.npz --edit=cat-to-dog:1.5 --outdir=out
    """


@main.command("sefa", cls=cli.Command)
@method_options
@num_option
@class_option
def sefa_command(**options: Any) -> None:
    """Find directions along which styles change most, from the weights alone (SeFa).

    \b
    Example:
      python directions.py sefa --network=best_model.pkl --layers=1-5 --dest=sefa.npz
    """
    job = start("sefa", options)
    num, layers = job.num, job.layers
    w = job.samples(job.classes("class_name", "--class"))
    job.save(sefa(job.loaded.G_ema, w, num, layers, options["name"] or "sefa"))


@main.command("pca", cls=cli.Command)
@method_options
@num_option
@class_option
@click.option("--per-class", help="Find --num components of each class by itself, called "
              "CLASS-pca0 and so on", is_flag=True)
def pca_command(**options: Any) -> None:
    """Find principal components of w (GANSpace).

    \b
    Examples:
      python directions.py pca --network=best_model.pkl --dest=pca.npz
      python directions.py pca --network=best_model.pkl --class=cat,dog --per-class --num=5 --dest=pets.npz
    """
    job = start("pca", options)
    G, classes, name = job.loaded.G_ema, job.classes("class_name", "--class"), options["name"] or "pca"
    num, layers = job.num, job.layers
    if not options["per_class"]:
        job.save(pca(G, job.samples(classes), num, layers, name))
        return
    if G.c_dim == 0:
        raise UserError("--per-class: the network is unconditional: leave it out")
    if num * len(classes) > MOST_DIRECTIONS:
        raise UserError(f"--num={num}: {num * len(classes)} directions in all, at most {MOST_DIRECTIONS} are kept in a "
                        "file: give fewer, or fewer classes by --class")
    job.save(joined([pca(G, job.samples([k]), num, layers, f"{job.class_names[k]}-{name}")
                     for k in tqdm.tqdm(classes, unit="class", disable=None)]))


@main.command("classes", cls=cli.Command)
@method_options
@click.option("--from", "first", help="Classes where the ways begin  [default: the mean of all]",
              metavar="NAME,INT...")
@click.option("--to", "second", help="Classes where they end  [default: all]", metavar="NAME,INT...")
def classes_command(**options: Any) -> None:
    """Find directions from the mean w of one class to that of another, called CLASS-to-CLASS.

    \b
    Examples:
      python directions.py classes --network=best_model.pkl --from=cat --to=dog,owl --dest=cat.npz
      python directions.py classes --network=best_model.pkl --dest=all.npz
    """
    job = start("classes", options)
    G = job.loaded.G_ema
    if G.c_dim < 2:
        raise UserError(f"--network={options['network']}: has fewer than two classes: take sefa, pca or folders")
    first, second, layers = job.classes("first", "--from"), job.classes("second", "--to"), job.layers
    if first == second and len(first) == 1:
        raise UserError(f"--from={options['first']}: is the class of --to: name another one")
    if len(first) * len(second) > MOST_DIRECTIONS and options["first"] is not None:
        raise UserError(f"--from={options['first']}: {len(first) * len(second)} directions in all, at most "
                        f"{MOST_DIRECTIONS} are kept in a file: name fewer classes")
    w = job.samples(sorted({*first, *second}))
    begins = None if options["first"] is None else first
    job.save(class_changes(G, w, begins, second, job.class_names, layers))


def read_latents(job: Job, layers: Sequence[int]) -> list[np.ndarray]:
    """w [N, w_dim] of --from and of --to: from files, or found for the pictures of folders. Raises UserError."""
    G, options, names = job.loaded.G_ema, job.options, ("--from", "--to")
    paths = [options["first"], options["second"]]
    pictures = [[] if has_latents(path) else list_targets([path], option)
                for path, option in zip(paths, names, strict=True)]
    for target in [target for targets in pictures for target in targets]:
        target.load(G.img_resolution)       # What cannot be read is told before anything is computed.
    steps, name = options["inv_steps"], options["distance"]
    if not any(pictures) and (steps is not None or name is not None):
        raise UserError("--inv-steps and --distance: --from and --to bring latents, so there is nothing to search for: "
                        "leave them out")
    classes = job.classes("class_name", "--class")
    settings = ProjectionSettings(OFFICIAL_STEPS if steps is None else steps, "w", options["seed"])
    found = [load_latents(path, G.num_ws, G.w_dim, option) if has_latents(path) else torch.empty(0)
             for path, option in zip(paths, names, strict=True)]
    for path, option in zip(paths, names, strict=True):
        cli.tell(origin_notes([path], G, option) if has_latents(path) else ())
    if any(pictures):
        distance = make_distance(name or default_distance(), G.img_resolution, next(G.parameters()).device)
        click.echo(f"--distance={distance.name}{': ' + distance.source if distance.source else ''}", err=True)
        found = [invert(G, targets, distance, classes, settings, options["batch_sz"]) if targets else w
                 for targets, w in zip(pictures, found, strict=True)]
    return [w[:, list(layers)].mean(dim=1).numpy() for w in found]


def called(path: str) -> str:
    """What the pictures of a folder or of a file of latents are called: after the folder that says what they are."""
    place = Path(path)
    if place.name == LATENTS_FILE:
        return place.absolute().parent.name
    return place.name if place.is_dir() else place.stem


@main.command("folders", cls=cli.Command)
@method_options
@class_option
@click.option("--from", "first", help="Pictures without something: a folder, or their latents (.npz with an array w, "
              "or .npy)", metavar="DIR|FILE", type=cli.PathType(), required=True)
@click.option("--to", "second", help="Pictures with it, or their latents", metavar="DIR|FILE", type=cli.PathType(),
              required=True)
@click.option("--name", help="What the direction is called  [default: after --from and --to]", metavar="TEXT")
@click.option("--inv-steps", help=f"Steps of the search for latents of pictures  [default: {OFFICIAL_STEPS}]",
              metavar="INT", type=cli.IntRange(min=0))
@click.option("--distance", help="Distance between pictures, as in run_inversion.py  [default: as there]",
              metavar="NAME|FILE", type=cli.PathType())
@click.option("--batch-sz", help="Pictures whose latents are searched for at once", metavar="INT",
              type=cli.IntRange(min=1), default=8, show_default=True)
def folders_command(**options: Any) -> None:
    """Find a direction from the mean w of some pictures to that of others.

    Latents of pictures are searched for as run_inversion.py does it, whose projected_w.npz is taken, too.

    \b
    Examples:
      python directions.py folders --network=best_model.pkl --from=plain --to=smiling --name=smile --dest=smile.npz
      python directions.py folders --network=best_model.pkl --from=plain.npz --to=smiling.npz --dest=smile.npz
    """
    job = start("folders", options)
    G, layers = job.loaded.G_ema, job.layers
    w = job.samples(job.classes("class_name", "--class"))
    before, after = read_latents(job, layers)
    name = options["name"] or f"{called(options['first'])}-to-{called(options['second'])}"
    job.save(change(G, w, before, after, name, layers))


def text_steps(job: Job) -> tuple[int, Iterator[torch.Tensor]]:
    """How many steps a search for a direction of a text takes, and the latents of each. Raises UserError."""
    G, options, psi = job.loaded.G_ema, job.options, job.options["trunc"]
    seeds = range(PER_STEP * DEFAULT_STEPS) if options["seeds"] is None else options["seeds"]
    if options["w"]:
        choices = {"--seeds": options["seeds"] is not None, "--class": options["class_name"] is not None,
                   "--trunc": psi != 1}
        if given := [option for option, is_given in choices.items() if is_given]:
            raise UserError(f"--w: its latents are used as they are, and {', '.join(given)} would change nothing: "
                            "leave it out")
        ws = torch.cat([load_latents(path, G.num_ws, G.w_dim) for path in options["w"]])
        cli.tell(origin_notes(options["w"], G))
        num_steps = options["steps"] or DEFAULT_STEPS
        return num_steps, given_steps(ws, PER_STEP * num_steps)
    if options["class_name"] is None:
        labels = [seed_label(seed, G.c_dim) if G.c_dim > 0 else 0 for seed in seeds]
    else:
        classes = job.classes("class_name", "--class")
        labels = [classes[i % len(classes)] for i in range(len(seeds))]
    num_pictures = len(seeds) if options["steps"] is None else PER_STEP * options["steps"]
    return -(-num_pictures // PER_STEP), seed_steps(G, seeds, labels, psi, num_pictures)


@main.command("text", cls=cli.Command)
@file_options
@click.option("--prompt", help="What the pictures are to become; several texts with | between them", metavar="TEXT",
              required=True)
@click.option("--name", help="What the direction is called  [default: after the text]", metavar="TEXT")
@click.option("--layers", help="Layers whose styles are moved, e.g. 3-7  [default: all but the input and the last "
              "ones, which are critically sampled]", type=cli.IntList())
@click.option("--seeds", help=f"Pictures to look at, {PER_STEP} in each step  [default: 0-"
              f"{PER_STEP * DEFAULT_STEPS - 1}]", type=cli.IntList(cli.MAX_SEED))
@click.option("--w", help="Instead of seeds: latents in .npz (array w) or .npy files", metavar="FILE,FILE...",
              type=cli.PathList())
@click.option("--steps", help=f"Seeds or latents are repeated for so many steps  [default: once through all seeds; "
              f"{DEFAULT_STEPS} with --w]", metavar="INT", type=cli.IntRange(min=1, max=100_000))
@click.option("--class", "--classes", "class_name", help="Classes of the pictures, by name or index, which take turns  "
              "[default: drawn from each seed]", metavar="NAME,INT...")
@click.option("--trunc", help="Truncation psi of the pictures: 1 is none, 0 the mean", metavar="FLOAT",
              type=cli.Psi(), default=1.0, show_default=True)
@click.option("--clip", help="A network of open_clip, or NAME:WEIGHTS", metavar="NAME", default=DEFAULT_CLIP,
              show_default=True)
@click.option("--clip-weights", help="Its weights  [default: looked for on this machine, or downloaded]",
              metavar="FILE", type=cli.PathType())
@click.option("--batch-sz", help="Pictures at once: less takes less memory", metavar="INT", type=cli.IntRange(min=1),
              default=4, show_default=True)
def text_command(**options: Any) -> None:
    """Find a direction of styles along which pictures become what a text says (StyleMC, with CLIP).

    \b
    Example:
      python directions.py text --network=best_model.pkl --prompt="a smiling face" --name=smile --dest=smile.npz
    """
    prompts = split_prompts(options["prompt"])
    job = start("text", options)
    G = job.loaded.G_ema
    layers = movable_layers(G, options["layers"])
    num_steps, steps = text_steps(job)
    clip = load_clip(options["clip"], options["clip_weights"], next(G.parameters()).device)
    click.echo(f"--clip={clip.name}: {clip.source}", err=True)
    with tqdm.tqdm(total=num_steps, unit="step", disable=None) as bar:
        def watch(step: TextStep) -> None:
            bar.set_postfix_str(f"distance {step.distance:.3f}", refresh=False)
            bar.update()
        found = find_text_direction(G, clip, prompts, steps, layers, options["batch_sz"], watch=watch)
    job.save(as_directions(G, found, options["name"] or default_name(options["prompt"])), clip=clip.name,
             clip_sha256=clip.sha256 or "")

#----------------------------------------------------------------------------

@main.command("list", cls=cli.Command)
@click.argument("file", metavar="FILE", type=cli.PathType())
def list_command(file: str) -> None:
    """List the directions of a file.

    \b
    Example:
      python directions.py list pca.npz
    """
    directions = read_directions(file, "FILE")
    click.echo("\n".join([f"{file}: {len(directions)} direction(s)", *table(directions, most=MOST_DIRECTIONS)]))


def chosen(files: Sequence[Directions], names: Sequence[str]) -> dict[str, Offset]:
    """Some directions of some files, or all of them if none is named, and what one unit of each adds.

    Raises:
        UserError: there is no such direction, or there are two.
    """
    known = {normalized_name(name): name for directions in files for name in directions.names}
    wanted = [normalized_name(name) for name in names]
    if missing := [name for name in wanted if name not in known]:
        raise UserError(f"--name={missing[0]}: --directions has none of this name, but "
                        f"{list_some(list(known.values()), 10)}: give one of these")
    return {name: find_offset(files, name) for key, name in known.items() if key in wanted or not names}


def pictures_along(loaded: LoadedNetwork, offsets: Sequence[Offset], strengths: Sequence[float],
                   options: dict[str, Any]) -> Iterator[np.ndarray]:
    """The picture of a seed, uint8 [R, R, 3], moved by each strength along each direction. Raises UserError."""
    G, seed = loaded.G_ema, options["seed"]
    label = seed_label(seed, G.c_dim) if G.c_dim > 0 else 0
    if options["class_name"] is not None:
        label = find_class(options["class_name"], loaded.class_names, G.c_dim)
    for offset in offsets:
        for strength in strengths:
            yield next(sample_images(G, Samples([seed], [label]), 1, options["trunc"], None, options["precision"],
                                     combined([(strength, offset)])))


@main.command("show", cls=cli.Command)
@click.option("--directions", "paths", help="The files", metavar="FILE,FILE...", type=cli.PathList(), required=True)
@click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
              type=cli.PathType(addresses=True), required=True)
@click.option("--sheet", help="The picture to write", metavar="PNG", type=cli.OutputFile(), required=True)
@click.option("--name", "names", help="Only this direction; may be given several times", metavar="TEXT", multiple=True)
@click.option("--seed", help="Random seed of the picture", metavar="INT", type=cli.Seed(), default=0, show_default=True)
@click.option("--class", "class_name", help="Class of the picture  [default: drawn from the seed]", metavar="NAME|INT")
@click.option("--trunc", help="Truncation psi: 1 is none, 0 the mean", metavar="FLOAT", type=cli.Psi(),
              default=1.0, show_default=True)
@click.option("--strength", help="Strength at the end of each row", metavar="FLOAT",
              type=cli.FloatRange(min=-cli.MAX_STRENGTH, max=cli.MAX_STRENGTH), default=3.0, show_default=True)
@click.option("--from", "first", help="Strength at the beginning  [default: as far to the other side]", metavar="FLOAT",
              type=cli.FloatRange(min=-cli.MAX_STRENGTH, max=cli.MAX_STRENGTH))
@click.option("--steps", help="Pictures in a row; without --from an odd number has the unchanged one in the middle",
              metavar="INT", type=cli.IntRange(min=2, max=101), default=7, show_default=True)
@cli.precision_option()
@cli.device_option()
def show_command(**options: Any) -> None:
    """Draw a picture that moves along each direction of some files, a row for each.

    \b
    Example:
      python directions.py show --directions=pca.npz --network=best_model.pkl --sheet=pca.png
    """
    last = options["strength"]
    first = -last if options["first"] is None else options["first"]
    if first == last:
        raise UserError(f"--strength={last:g}: is where the rows begin, so that all their pictures would be the same: "
                        "give another one, or another --from")
    target = misc.select_device(options["device"])
    click.echo(dispatch.start_lines(target), err=True)
    loaded = load_network(options["network"], target)
    files, notes = load_directions(options["paths"], loaded.G_ema)
    cli.tell(notes)
    offsets = chosen(files, options["names"])
    strengths = np.linspace(first, last, options["steps"]).tolist()
    sheet = Sheet(loaded.G_ema.img_resolution, len(strengths), len(offsets), names=list(offsets))
    if sheet.is_too_large:
        raise UserError(f"--sheet={options['sheet']}: {len(offsets)} directions are more than fit into one picture: "
                        "name some of them by --name")
    write_sheet(options["sheet"], sheet, pictures_along(loaded, list(offsets.values()), strengths, options))
    click.echo(f"{options['sheet']}: {sheet.rows} row(s), from {strengths[0]:g} to {strengths[-1]:g}")


if __name__ == "__main__":
    main()
