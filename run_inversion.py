# SPDX-License-Identifier: Apache-2.0
"""Find the latents of pictures, and tune the generator to them if asked for."""
import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import tqdm

from dnnlib import UserError, cli
from dnnlib.util import atomic_folder, printable
from inference.inversion.distances import Distance, default_distance, make_distance
from inference.inversion.goals import Goal
from inference.inversion.pivotal import TuningSettings, tune
from inference.inversion.projection import SPACES, ProjectionSettings, Step, Watch, project
from inference.inversion.results import (
    COMPARISON_FILE,
    LATENTS_FILE,
    Comparison,
    Inverted,
    as_picture,
    save_latents,
    save_picture,
)
from inference.inversion.start import Start, default_count, given_start, nearest_start
from inference.inversion.targets import Target, list_targets
from inference.latents import load_latents, mapping_sha256, origin_notes
from inference.sampling import find_class
from inference.video_files import Write, open_video
from legacy import LoadedNetwork, load_network
from torch_utils import checkpoint, misc
from torch_utils.images import from_uint8
from torch_utils.ops import dispatch
from training.generator.layer_schedule import largest_batch
from training.generator.synthesis import require_finite, synthesize_ws
from training.networks_stylegan3 import Generator
from training.run.snapshots import generator_snapshot

FPS = 60                    # Of the video, which has a frame per step.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class InversionOptions:
    """The command line."""

    network: str
    target: tuple[str, ...]
    outdir: str
    class_name: str | None
    seed: int
    save_video: bool | None
    inv_steps: int
    w_init: str | None
    starts: int | None
    space: str
    distance: str | None
    mask: str | None
    run_pti: bool
    pti_steps: int
    batch_sz: int
    device: str

    def check(self) -> None:
        """What can be said without the network. Raises UserError."""
        if os.path.exists(self.outdir) and not os.path.isdir(self.outdir):
            raise UserError(f"--outdir={self.outdir}: is a file: name a new folder")
        if os.path.isdir(self.outdir) and os.listdir(self.outdir):
            raise UserError(f"--outdir={self.outdir}: this folder is not empty, and old results would mix with new "
                            "ones: name a new folder")
        if self.w_init is not None and self.starts is not None:
            raise UserError(f"--starts={self.starts}: --w-init says where to begin: leave one of the two out")
        if self.save_video and not has_encoder():
            raise UserError("--save-video: needs the package imageio-ffmpeg: pip install imageio-ffmpeg, or give "
                            "--save-video=0")

    @property
    def wants_video(self) -> bool:
        """Whether there is to be one: asked for, or not forbidden and possible."""
        return has_encoder() if self.save_video is None else self.save_video

    @property
    def tuning(self) -> TuningSettings:
        return TuningSettings(self.pti_steps, self.seed)

    @property
    def projection(self) -> ProjectionSettings:
        return ProjectionSettings(self.inv_steps, self.space, self.seed)


def has_encoder() -> bool:
    """Whether videos can be written."""
    return importlib.util.find_spec("imageio_ffmpeg") is not None

#----------------------------------------------------------------------------
# What is asked for.

def read_mask(path: str, resolution: int, device: torch.device) -> torch.Tensor:
    """A picture as weights [R, R]: white counts, black does not. Raises UserError."""
    if os.path.isdir(path):
        raise UserError(f"--mask={path}: is a folder: name one picture, white where the targets count")
    (picture,) = list_targets([path], "--mask")
    weights = picture.load(resolution).pixels.float().mean(dim=0) / 255
    if not weights.any():
        raise UserError(f"--mask={path}: is black everywhere, so nothing counts: paint white what does")
    return weights.to(device)


def read_start(G: Generator, options: InversionOptions, class_idx: int | None, count: int) -> Start | None:
    """The latents that were given for `count` targets; None if there are none. Raises UserError: they do not fit."""
    if options.w_init is None:
        return None
    ws = load_latents(options.w_init, G.num_ws, G.w_dim, "--w-init")
    cli.tell(origin_notes([options.w_init], G, "--w-init"))
    if len(ws) not in (1, count):
        raise UserError(f"--w-init={options.w_init}: holds {len(ws)} latents for {count} targets: give one for all, "
                        "or one for each")
    if options.space == "w" and not torch.equal(ws, ws[:, :1].expand_as(ws)):
        raise UserError(f"--w-init={options.w_init}: its layers have latents of their own: give --space=w+")
    return given_start(G, ws.expand(count, -1, -1), class_idx)


class Inversion:
    """The network, and what is to be done with every target."""

    def __init__(self, loaded: LoadedNetwork, distance: Distance, options: InversionOptions, targets: list[Target]):
        self.loaded, self.G, self.distance, self.options = loaded, loaded.G_ema, distance, options
        self.targets = targets
        self.class_idx: int | None = None
        if options.class_name is not None:
            self.class_idx = find_class(options.class_name, loaded.class_names, self.G.c_dim)
        self.device = next(self.G.parameters()).device
        self.mask = None
        if options.mask is not None:
            self.mask = read_mask(options.mask, self.G.img_resolution, self.device)
        self.given = read_start(self.G, options, self.class_idx, len(targets))
        self.comparison = Comparison(self.G.img_resolution, 4 if options.run_pti else 3)
        self.bar = tqdm.tqdm(total=self._num_steps(), unit="step", disable=None)

    def _num_steps(self) -> int:
        batches = -(-len(self.targets) // self.batch_size)
        return batches * self.options.inv_steps + len(self.targets) * self.options.run_pti * self.options.pti_steps

    @property
    def batch_size(self) -> int:
        """Targets whose latents are searched for at once."""
        return min(self.options.batch_sz, largest_batch(self.G.config))

    def place(self, target: Target) -> Path:
        """The folder of a target's results: a single one has all."""
        return Path(self.options.outdir) / (target.name if len(self.targets) > 1 else "")

    def settings(self) -> dict[str, Any]:
        """What the results of all targets have in common."""
        return {"seed": self.options.seed, "steps": self.options.inv_steps, "space": self.options.space,
                "network": str(self.loaded.path), "network_sha256": self.loaded.sha256,
                "mapping_sha256": mapping_sha256(self.G), "distance": self.distance.name,
                "distance_sha256": self.distance.sha256 or "", "options": dataclasses.asdict(self.options)}

    def start(self, goal: Goal, first: int) -> Start:
        """Where the search for some targets begins; `first` is the number of the first of them."""
        if self.given is not None:
            part = slice(first, first + len(goal))
            return Start(self.given.ws[part], self.given.labels[part])
        classes = [self.class_idx] if self.class_idx is not None else list(range(max(self.G.c_dim, 1)))
        count = self.options.starts or default_count(classes, self.class_idx is not None)
        return nearest_start(self.G, goal, classes, count)

    def class_in_words(self, label: int) -> str:
        """', class cat' behind the name of a target."""
        names = self.loaded.class_names
        return "" if self.G.c_dim == 0 else f", class {names[label] if names else label}"

    #------------------------------------------------------------------------
    # The work.

    def run(self) -> None:
        """Invert all targets and write what comes out."""
        found: list[Inverted] = []
        with self.bar:
            for first in range(0, len(self.targets), self.batch_size):
                found += self._batch(first)
        outdir = Path(self.options.outdir)
        if len(self.targets) > 1:
            save_latents(outdir / LATENTS_FILE, found, self.settings())
        self.comparison.save(outdir / COMPARISON_FILE)
        if self.comparison.left_out:
            click.echo(f"NOTE: {COMPARISON_FILE} leaves out the last {self.comparison.left_out} targets", err=True)

    def _batch(self, first: int) -> list[Inverted]:
        """The targets from `first` on that are searched for at once."""
        targets = self.targets[first:first + self.batch_size]
        pictures = [target.load(self.G.img_resolution) for target in targets]
        pixels = torch.stack([picture.pixels for picture in pictures])
        goal = Goal(from_uint8(pixels).to(self.device), self.distance, self.mask)
        with contextlib.ExitStack() as stack:
            places = [stack.enter_context(atomic_folder(self.place(target))) for target in targets]
            videos = [stack.enter_context(self._video(place)) for place in places] if self.options.wants_video else []
            start = self.start(goal, first)
            ws = project(self.G, goal, start, self.options.projection, self._watch(videos, pixels))
            distances, errors = self._measure(self.G, goal, ws)
            found = [Inverted(target.path.name, pictures[i].sha256, int(start.labels[i]), start.ws[i], ws[i],
                              distances[i], errors[i]) for i, target in enumerate(targets)]
            for i, place in enumerate(places):
                words = self._finish(place, goal[i], found[i], pixels[i], self._watch(videos[i:i + 1], pixels[i:i + 1]))
                tqdm.tqdm.write(printable(f"{targets[i].name}{self.class_in_words(found[i].label)}: {words}"))
        return found

    def _video(self, place: Path) -> contextlib.AbstractContextManager[Write]:
        return open_video(str(place / "proj.mp4"), 2 * self.G.img_resolution, self.G.img_resolution, FPS)

    def _watch(self, videos: Sequence[Write], pixels: torch.Tensor) -> Watch:
        """A function that moves the bar, and adds a frame to each video: the target, and what was made."""
        def watch(step: Step) -> None:
            self.bar.update()
            if self.bar.n % 10 == 0 and not self.bar.disable:
                self.bar.set_postfix(distance=f"{step.distances.mean():.4f}", refresh=False)
            for write, target, image in zip(videos, pixels, step.images if videos else (), strict=False):
                write(np.asarray(torch.cat([target, as_picture(image)], dim=2).permute(1, 2, 0)))
        return watch

    def _measure(self, G: Generator, goal: Goal, ws: torch.Tensor) -> tuple[list[float], list[float]]:
        """Distances and mean squared errors [N] of what a generator makes of latents. Raises UserError."""
        images = synthesize_ws(G, ws, "fp32")
        require_finite(images.isfinite().all())
        with torch.no_grad(), misc.full_precision():
            return goal.distances(images).tolist(), goal.squared_errors(images).tolist()

    def _finish(self, place: Path, goal: Goal, one: Inverted, pixels: torch.Tensor, watch: Watch) -> str:
        """Tune if asked for, and write the results of one target; says how near they come."""
        made = {"target": pixels, "start": self._picture(self.G, one.start), "proj": self._picture(self.G, one.ws)}
        words = f"mean squared error {one.mse:.5f}"
        if self.options.run_pti:
            tuned = tune(self.G, goal, one.ws[None], one.label, self.options.tuning, watch)
            made["tuned"] = self._picture(tuned, one.ws)
            _, (error,) = self._measure(tuned, goal, one.ws[None])
            self._save_tuned(place / "G.pkl", tuned, one, error)
            words += f", tuned {error:.5f}"
        for name, image in made.items():
            save_picture(place / f"{name}.png", image)
        save_latents(place / LATENTS_FILE, [one], self.settings())
        self.comparison.add(list(made.values()))
        return words

    def _picture(self, G: Generator, ws: torch.Tensor) -> torch.Tensor:
        return as_picture(synthesize_ws(G, ws[None], "fp32")[0])

    def _save_tuned(self, path: Path, tuned: Generator, one: Inverted, error: float) -> None:
        record = self.settings() | {"target": one.target, "target_sha256": one.sha256, "class": one.label,
                                    "mse": error, "w": one.ws}
        checkpoint.save(path, generator_snapshot(tuned, self.loaded.class_names, self.loaded.progress,
                                                 {"tuned_to": record}))

#----------------------------------------------------------------------------

@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
              type=cli.PathType(addresses=True), required=True)
@click.option("--target", help="Picture, or folder of pictures; may be given several times", metavar="FILE|DIR",
              type=cli.PathType(), multiple=True, required=True)
@click.option("--outdir", help="Where to save the results: a new folder", metavar="DIR", type=cli.PathType(),
              required=True)
@click.option("--class", "class_name", help="Begin at the mean of this class  [default: at the nearest of many "
              "samples of all classes]", metavar="NAME|INT")
@click.option("--seed", help="Random seed of the noise", type=cli.Seed(), default=42, show_default=True)
@click.option("--save-video", help="Show every step in proj.mp4  [default: if imageio-ffmpeg is installed]",
              metavar="BOOL", type=bool)
@click.option("--inv-steps", help="Steps of the search for latents", metavar="INT", type=cli.IntRange(min=0),
              default=1000, show_default=True)
@click.option("--w-init", help="Begin at the latents in this .npz (array w) or .npy", metavar="FILE",
              type=cli.PathType())
@click.option("--starts", help="Begin at the nearest of so many latents  [default: 1, the mean, with --class; else "
              "256 or twice the classes]", metavar="INT", type=cli.IntRange(min=1, max=100_000))
@click.option("--space", help="One w for all layers, or one for each", type=click.Choice(SPACES), default="w",
              show_default=True)
@click.option("--distance", help="lpips, timm:NAME, a network of your own (.safetensors) or pixels  [default: the "
              "first of lpips, timm:tf_efficientnet_lite0 and pixels that is on this machine]", metavar="NAME|FILE",
              type=cli.PathType())
@click.option("--mask", help="Picture that is white where the targets count", metavar="FILE", type=cli.PathType())
@click.option("--run-pti", help="Tune the generator to each target", is_flag=True)
@click.option("--pti-steps", help="Steps of tuning", metavar="INT", type=cli.IntRange(min=1), default=350,
              show_default=True)
@click.option("--batch-sz", help="Targets at once; the results depend on it by rounding only", metavar="INT",
              type=cli.IntRange(min=1), default=1, show_default=True)
@cli.device_option()
def main(**values: Any) -> None:
    """Find latents of which a trained network makes given pictures.

    \b
    Examples:
      # A photo, and a generator that is tuned to it.
      python run_inversion.py --network=best_model.pkl --target=cat.jpg --class=cat --run-pti --outdir=inverted

    \b
      # All pictures of a folder, eight at once, with a w for each layer.
      python run_inversion.py --network=best_model.pkl --target=photos --space=w+ --batch-sz=8 --outdir=inverted
    """
    options = InversionOptions(**values)
    options.check()
    targets = list_targets(options.target)
    target = misc.select_device(options.device)
    click.echo(dispatch.start_lines(target), err=True)
    loaded = load_network(options.network, target)
    resolution = loaded.G_ema.img_resolution
    for picture in targets:                 # What cannot be read is told before anything is computed.
        picture.load(resolution)
    distance = make_distance(options.distance or default_distance(), resolution, torch.device(target))
    click.echo(f"--distance={distance.name}{': ' + distance.source if distance.source else ''}", err=True)
    Inversion(loaded, distance, options, targets).run()
    click.echo(f"{options.outdir}: {len(targets)} picture(s)")


if __name__ == "__main__":
    main()
