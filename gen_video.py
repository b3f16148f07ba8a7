# SPDX-License-Identifier: Apache-2.0
"""Make a video from a snapshot or an official pickle: what lies between seeds, classes and given latents."""
import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import tqdm

from dnnlib import UserError, cli
from dnnlib.util import atomic_file, list_some, printable
from inference.directions.edits import check_edits, edit_offset
from inference.directions.files import load_directions
from inference.frames import pictures, tiled
from inference.keyframes import EASINGS, Timing
from inference.latents import load_centroids, load_latents, origin_notes
from inference.motion import Keyframes, Motion, Sweep, make_keyframes, style_mixed
from inference.sampling import find_classes, seed_label
from inference.video_files import FOLDER, open_video, video_format
from legacy import LoadedNetwork, load_network
from torch_utils import misc
from torch_utils.images import png_bytes
from torch_utils.ops import dispatch
from training.generator.layer_schedule import is_rotation
from training.networks_stylegan3 import Generator

MOST_FRAMES = 1_000_000         # More than four hours.
MOST_VALUES = 1 << 25           # Of the latents of all keyframes: their path through w takes some 40 bytes for each.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class VideoOptions:
    """The command line."""

    network: str
    output: str
    seeds: list[int] | None
    w: list[str] | None
    class_name: str | None
    shuffle_seed: int | None
    grid: tuple[int, int]
    num_keyframes: int | None
    w_frames: int
    interp: str
    easing: str
    loop: bool
    trunc: float | None
    centroids_path: str | None
    directions: list[str]
    edits: tuple[tuple[str, float], ...]
    sweep_edits: tuple[tuple[str, tuple[float, float]], ...]
    sweep_trunc: tuple[float, float] | None
    sweep_translate: tuple[float, float]
    sweep_rotate: float
    mix_layers: list[int] | None
    fps: int | None
    zoom: int
    first_frame: str | None
    batch_sz: int
    precision: str
    device: str

    def check(self) -> None:
        """What can be said without the network. Raises UserError."""
        form = video_format(self.output)
        if self.first_frame is not None and not self.first_frame.lower().endswith(".png"):
            raise UserError(f"--first-frame={self.first_frame}: becomes a PNG file: name one that ends with .png")
        if form is FOLDER and self.first_frame is not None and \
                Path(self.output).resolve() in Path(self.first_frame).resolve().parents:
            raise UserError(f"--first-frame={self.first_frame}: lies in the folder of --output, where the first "
                            "file is this picture: leave it out, or name another place")
        if not self.seeds and not self.w:
            raise UserError("give --seeds, or latents in files with --w")
        if self.w and self.interp == "z":
            raise UserError("--interp=z: the latents of --w have no z: leave one of the two out")
        if self.trunc is not None and self.sweep_trunc is not None:
            raise UserError(f"--trunc={self.trunc:g}: --sweep-trunc says it for every frame: leave one of the two out")
        check_edits(self.directions, [name for name, _ in (*self.edits, *self.sweep_edits)])

    @property
    def sweep(self) -> Sweep:
        """What changes over the whole video."""
        psi = 1.0 if self.trunc is None else self.trunc
        return Sweep(self.sweep_trunc or (psi, psi), self.sweep_translate, self.sweep_rotate)

    @property
    def num_sequences(self) -> int:
        """Of latents that are interpolated: one for each picture, or for each source of the mixtures."""
        columns, rows = self.grid
        return columns * rows if self.mix_layers is None else columns + rows

    @property
    def shown_grid(self) -> tuple[int, int]:
        """Columns and rows of pictures in a frame: sources of mixtures are shown, too."""
        more = 0 if self.mix_layers is None else 1
        return self.grid[0] + more, self.grid[1] + more

#----------------------------------------------------------------------------
# Keyframes.

def read_sources(G: Generator, options: VideoOptions) -> list[int | torch.Tensor]:
    """The latents that are asked for: ws of files [num_ws, w_dim], then seeds."""
    given = [w for path in options.w or [] for w in load_latents(path, G.num_ws, G.w_dim)]
    cli.tell(origin_notes(options.w or [], G))
    return [*given, *(options.seeds or [])]


def count_keyframes(sources: int, classes: int, options: VideoOptions) -> int:
    """Keyframes of one sequence.

    Raises:
        UserError: sources and sequences do not go together.
    """
    if options.num_keyframes is not None:
        return options.num_keyframes
    count, sequences = max(sources, classes), options.num_sequences
    if count % sequences:
        grid = "x".join(map(str, options.grid))
        what = "sources" if options.mix_layers is not None else "pictures"
        raise UserError(f"--grid={grid}: shows {sequences} {what} side by side, and {count} seeds, latents or classes "
                        f"are no multiple of this: give {-count % sequences} more, or --num-keyframes")
    return count // sequences


def choose_keyframes(loaded: LoadedNetwork, options: VideoOptions) -> Keyframes:
    """Latents of all keyframes.

    Raises:
        UserError: what was asked for does not go together, or not with this network.
    """
    G = loaded.G_ema
    sources = read_sources(G, options)
    classes: list[int] = []
    if options.class_name is not None:
        classes = find_classes(options.class_name, loaded.class_names, G.c_dim)
    total = count_keyframes(len(sources), len(classes), options) * options.num_sequences
    num_ws = G.num_ws if options.w else 1
    if total * num_ws * G.w_dim > MOST_VALUES:
        most = MOST_VALUES // (num_ws * G.w_dim)
        raise UserError(f"{total} keyframes in all: at most {most} are taken of this network: lower --num-keyframes or "
                        "--grid, or give fewer seeds")
    if classes and total % len(classes):
        raise UserError(f"--class={options.class_name}: {len(classes)} classes for {total} keyframes: give one for "
                        f"all, one for each, or a number of them that divides {total}")
    if options.w and not classes and G.c_dim > 0 and options.centroids_path is None and options.sweep.psi != (1, 1):
        raise UserError("--w: truncation of given latents needs the mean of their class: give --class, or --trunc=1")
    if len(sources) > total:
        click.echo(f"NOTE: {len(sources)} seeds or latents for {total} keyframes: the first {total} are shown",
                   err=True)
    order = np.arange(total)
    if options.shuffle_seed is not None:
        misc.random_state(options.shuffle_seed).shuffle(order)
    chosen = [sources[i % len(sources)] for i in order]
    labels = [classes[i % len(classes)] if classes
              else seed_label(source, G.c_dim) if isinstance(source, int) and G.c_dim > 0 else 0
              for i, source in enumerate(chosen)]
    centroids = None if options.centroids_path is None else load_centroids(options.centroids_path, G.w_dim)
    return make_keyframes(G, chosen, labels, options.num_sequences, centroids)

#----------------------------------------------------------------------------
# Frames.

def make_timing(num_keyframes: int, options: VideoOptions) -> Timing:
    """Times of the frames. Raises UserError: there would be too many."""
    timing = Timing(num_keyframes, options.w_frames, options.loop, options.easing)
    if timing.num_frames > MOST_FRAMES:
        raise UserError(f"--w-frames={options.w_frames}: {timing.num_frames} frames, at most {MOST_FRAMES} are made: "
                        "lower it, or the number of keyframes")
    return timing


def make_sweep(G: Generator, options: VideoOptions) -> Sweep:
    """What changes over the whole video, with the edits. Raises UserError."""
    if not options.directions:
        return options.sweep
    files, notes = load_directions(options.directions, G)
    cli.tell(notes)
    ends = [edit_offset(files, [*options.edits, *((name, strengths[i]) for name, strengths in options.sweep_edits)])
            for i in (0, 1)]
    return dataclasses.replace(options.sweep, edits=(ends[0], ends[1]))


def make_frames(G: Generator, keyframes: Keyframes, timing: Timing, sweep: Sweep,
                options: VideoOptions) -> Iterator[np.ndarray]:
    """The frames, uint8 [H, W, 3], as they are asked for."""
    views = Motion(G, keyframes, timing, sweep, between_z=options.interp == "z").views()
    if options.mix_layers is not None:
        views = style_mixed(views, options.grid[0], options.mix_layers)
    cells = pictures(G, views, options.batch_sz, options.precision)
    return tiled(cells, *options.shown_grid, options.zoom, first_is_empty=options.mix_layers is not None)


def write_video(frames: Iterator[np.ndarray], num_frames: int, side: int, options: VideoOptions) -> str:
    """Write all frames; returns what was written, in words."""
    columns, rows = options.shown_grid
    width, height = columns * side * options.zoom, rows * side * options.zoom
    fps = options.fps or video_format(options.output).fps
    with contextlib.ExitStack() as stack:       # That both can be written shows before frames are made.
        first = None if options.first_frame is None else stack.enter_context(atomic_file(options.first_frame))
        write = stack.enter_context(open_video(options.output, width, height, fps))
        for i, frame in enumerate(tqdm.tqdm(frames, total=num_frames, unit="frame", disable=None)):
            if i == 0 and first is not None:
                first.write(png_bytes(frame))
            write(frame)
    return f"{num_frames} frame(s) of {width}x{height} pixels, {num_frames / fps:.1f} s"


def check_network(G: Generator, options: VideoOptions) -> None:
    """Say what this network cannot do well. Raises UserError: or not at all."""
    if options.mix_layers is not None and max(options.mix_layers) >= G.num_ws:
        raise UserError(f"--mix-layers: the network has the layers 0 to {G.num_ws - 1}: leave out what is beyond")
    if options.sweep_rotate and not is_rotation(G.config):
        click.echo("NOTE: --sweep-rotate: the layers of this network are made for shifts (config T): a picture that is "
                   "turned may change; config R is made for turns, too", err=True)

#----------------------------------------------------------------------------

@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
              type=cli.PathType(addresses=True), required=True)
@click.option("--output", help=".mp4, .webp, .gif, or a folder for PNG frames", metavar="FILE|DIR",
              type=cli.OutputFile(), required=True)
@click.option("--seeds", help="Random seeds of the keyframes, e.g. 0,1,4-6", type=cli.IntList(cli.MAX_SEED))
@click.option("--w", help="Latents of keyframes in .npz (array w) or .npy files; they come before the seeds",
              metavar="FILE,FILE...", type=cli.PathList())
@click.option("--class", "class_name", help="Class of all keyframes, or several, e.g. cat,3,5-7, which take turns  "
              "[default: drawn from each seed]", metavar="NAME,INT...")
@click.option("--shuffle-seed", help="Shuffle the seeds by this seed", metavar="INT", type=cli.Seed())
@click.option("--grid", help="Pictures side by side: columns x rows", metavar="WxH", type=cli.Grid(),
              default="1x1", show_default=True)
@click.option("--num-keyframes", help="Keyframes of each picture; seeds are repeated  [default: seeds / pictures]",
              metavar="INT", type=cli.IntRange(min=1))
@click.option("--w-frames", help="Frames from one keyframe to the next", metavar="INT", type=cli.IntRange(min=1),
              default=120, show_default=True)
@click.option("--interp", help="Interpolate w, or z and the vectors of the classes", type=click.Choice(["w", "z"]),
              default="w", show_default=True)
@click.option("--easing", help="Slow down at the keyframes", type=click.Choice(list(EASINGS)), default="none",
              show_default=True)
@click.option("--loop/--no-loop", help="Go back from the last keyframe to the first", default=True, show_default=True)
@click.option("--trunc", help="Truncation psi: 1 is none, 0 the mean  [default: 1]", metavar="FLOAT",
              type=cli.Psi())
@click.option("--centroids-path", help="Truncate towards the nearest of these centres of w", metavar="FILE",
              type=cli.PathType())
@cli.edit_options()
@click.option("--sweep-edit", "sweep_edits", help="Move along a direction from one strength to the other and, in a "
              "loop, back; may be given several times", type=cli.EditSweep(), multiple=True)
@click.option("--sweep-trunc", help="Truncation psi from one value to the other and, in a loop, back",
              metavar="FROM,TO", type=cli.Vec2(cli.MAX_PSI))
@click.option("--sweep-translate", help="Shift the pictures so far, in image widths, and back",
              type=cli.Vec2(cli.MAX_SHIFT), default="0,0", show_default=True)
@click.option("--sweep-rotate", help="Turn the pictures so far in degrees; whole turns go on, others go back",
              metavar="ANGLE", type=cli.Angle(), default=0, show_default=True)
@click.option("--mix-layers", help="Show mixtures: these layers from a source for each column of the grid, the others "
              "from one for each row", type=cli.IntList())
@click.option("--fps", help="Frames per second  [default: 60; 50 for .gif]", metavar="INT",
              type=cli.IntRange(min=1, max=240))
@click.option("--zoom", help="Enlarge pixels to squares of so many", metavar="INT", type=cli.IntRange(min=1, max=64),
              default=1, show_default=True)
@click.option("--first-frame", help="Also save the first frame as a picture", metavar="PNG", type=cli.OutputFile())
@click.option("--batch-sz", help="Pictures per batch; the video depends on it by rounding only (one of 255 "
              "levels)", metavar="INT", type=cli.IntRange(min=1), default=1, show_default=True)
@cli.precision_option()
@cli.device_option()
def main(**values: Any) -> None:
    """Make a video that goes from keyframe to keyframe.

    \b
    Examples:
      # Four digits beside each other, two keyframes each, in a loop.
      python gen_video.py --network=best_model.pkl --seeds=0-7 --grid=4x1 --output=digits.mp4

    \b
      # From class to class, resting at each.
      python gen_video.py --network=best_model.pkl --seeds=0 --class=cat,dog,owl --easing=sine --output=classes.webp
    """
    options = VideoOptions(**values)
    options.check()
    if options.centroids_path is not None and options.sweep.psi == (1, 1):
        cli.tell([f"--centroids-path={options.centroids_path} has no effect without --trunc or --sweep-trunc"])
    target = misc.select_device(options.device)
    click.echo(dispatch.start_lines(target), err=True)
    loaded = load_network(options.network, target)
    G = loaded.G_ema
    check_network(G, options)
    keyframes = choose_keyframes(loaded, options)
    if options.class_name is not None and loaded.class_names:
        names = [loaded.class_names[i] for i in dict.fromkeys(keyframes.classes.T.flatten().tolist())]
        click.echo(printable(f"--class={options.class_name}: {list_some(names, 10)}"), err=True)
    timing = make_timing(len(keyframes.ws), options)
    frames = make_frames(G, keyframes, timing, make_sweep(G, options), options)
    click.echo(f"{options.output}: {write_video(frames, timing.num_frames, G.img_resolution, options)}")


if __name__ == "__main__":
    main()
