# SPDX-License-Identifier: Apache-2.0
"""The network behind the page: one for all who look at it, so that everybody waits for a turn."""
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import list_some, printable
from inference.directions.edits import find_offset
from inference.directions.files import Directions
from inference.frames import View, pictures
from inference.inversion.distances import Distance, default_distance, make_distance
from inference.inversion.goals import Goal
from inference.inversion.projection import ProjectionSettings, Step, project
from inference.inversion.start import default_count, nearest_start
from inference.inversion.targets import Target
from inference.page.commands import Origin
from inference.page.layers import map_picture, num_channels, power_spectrum, spectrum_picture, synthesize_with_maps
from inference.page.scene import NUM_NEIGHBOURS, Controls, Point, find_point, seed_point, truncated
from inference.page.turns import Turns, Watched
from inference.sampling import class_means
from torch_utils.images import from_uint8, to_uint8_sample
from torch_utils.misc import full_precision
from training.generator.synthesis import Offset, combined, require_finite
from training.networks_stylegan3 import Generator

MOST_STEPS = 2000           # Of a search for latents.
MOST_SLIDERS = 40           # Of directions.

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Shown:
    """What a request sees."""

    image: np.ndarray                       # uint8 [R, R, 3]
    ws: torch.Tensor                        # [1, num_ws, w_dim], of which it was made.
    layer: tuple[np.ndarray, np.ndarray, np.ndarray] | None     # A channel, its spectrum, the mean one of all channels.


@dataclasses.dataclass(frozen=True)
class Request:
    """Which picture becomes latents, and how."""

    path: str               # The file.
    name: str               # As people call it, for messages.
    class_idx: int | None   # Whose mean the search begins at; None: the nearest of many samples of all classes.
    steps: int = 200
    space: str = "w"        # A key of inference.inversion.projection.SPACES.


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search for latents has come to."""

    step: int
    distance: float
    target: np.ndarray                  # uint8 [R, R, 3]
    image: np.ndarray                   # uint8 [R, R, 3]
    point: Point | None = None          # At the end.

#----------------------------------------------------------------------------

class Studio:
    """Pictures of one generator for any number of pages.

    Args:
        G: The generator.
        origin: Where it comes from.
        files: Directions that fit it.
        precision: A key of `PRECISIONS`.
        distance: Name of the distance for searches; None: the best one at hand.
    """

    def __init__(self, G: Generator, origin: Origin, files: Sequence[Directions] = (), precision: str = "auto",
                 distance: str | None = None):
        self.G, self.origin, self.precision = G, origin, precision
        self.distance = distance
        self.offsets: dict[str, Offset] = {}                # Of each direction that has a slider, by name.
        self.left_out: list[str] = []                       # Why some directions are not offered.
        no_room: list[str] = []
        for name in dict.fromkeys(name for directions in files for name in directions.names):
            try:
                offset = find_offset(files, name)
            except UserError as err:
                self.left_out.append(str(err))
                continue
            if len(self.offsets) < MOST_SLIDERS:
                self.offsets[name] = offset
            else:
                no_room.append(name)
        if no_room:
            self.left_out.append(f"--directions: the page has {MOST_SLIDERS} sliders, and {len(no_room)} more "
                                 f"directions have none ({list_some(no_room)}): give files with fewer, or take "
                                 "gen_images.py for these")
        self._turns = Turns()

    @property
    def class_choices(self) -> list[tuple[str, int]]:
        """Classes as people choose them: names and numbers."""
        names = self.origin.class_names or [str(k) for k in range(self.G.c_dim)]
        return [(name, k) for k, name in enumerate(names)]

    def edit(self, controls: Controls) -> Offset:
        """What the directions add. Raises UserError: there is none so called."""
        for name, strength in controls.edits:
            if strength != 0 and name not in self.offsets:
                raise UserError(f"direction {name}: there is none of this name: choose one of the list")
        return combined([(strength, self.offsets[name]) for name, strength in controls.edits if strength != 0])

    def show(self, controls: Controls, saved: Mapping[str, Point], layer: tuple[str, int] | None = None) -> Shown:
        """The picture that the controls ask for, and a layer's channel if one is asked for.

        Raises:
            UserError: there is no such picture or channel.
        """
        controls.check(self.G)
        if layer is not None and not 0 <= layer[1] < num_channels(self.G, layer[0]):
            raise UserError(f"channel {layer[1]}: the layer {layer[0]} has 0 to {num_channels(self.G, layer[0]) - 1}: "
                            "choose one of them")
        with self._turns.turn():
            edit = self.edit(controls)
            ws = truncated(find_point(self.G, controls, saved), controls.psi, edit)
            image, maps = synthesize_with_maps(self.G, ws, controls.transform(), None if layer is None else layer[0],
                                               self.precision, edit.styles)
            require_finite(image.isfinite().all())
        parts = None
        if maps is not None and layer is not None:
            spectra = power_spectrum(maps)
            parts = (map_picture(maps[layer[1]]), spectrum_picture(spectra[layer[1]]),
                     spectrum_picture(spectra.mean(dim=0)))
        return Shown(_as_array(to_uint8_sample(image)), ws, parts)

    def point(self, controls: Controls, saved: Mapping[str, Point]) -> Point:
        """The point that is shown, before truncation and directions. Raises UserError: there is none."""
        controls.check(self.G)
        with self._turns.turn():
            return find_point(self.G, controls, saved)

    def neighbours(self, controls: Controls) -> list[np.ndarray]:
        """What lies as far from the seed as the picture that is shown: of the first seeds of noise. Raises UserError.
        """
        controls.check(self.G)
        edit = self.edit(controls)
        with self._turns.turn():
            near = [seed_point(self.G, controls.seed, controls.class_idx, controls.noise, k)
                    for k in range(NUM_NEIGHBOURS)]
            ws = torch.cat([truncated(point, controls.psi, edit) for point in near])
            places = controls.transform().expand(len(ws), -1, -1)
            styles = None if edit.styles is None else edit.styles.expand(len(ws), -1)
            view = View(ws, places, styles)
            return [_as_array(image) for image in pictures(self.G, [view], len(ws), self.precision)]

    #------------------------------------------------------------------------
    # From pictures to latents.

    def invert(self, request: Request) -> Iterator[Found]:
        """Search for the latents of a picture and say how far that is, while others have their turns, too.

        Raises:
            UserError: the file is no picture; the search fails.
        """
        G = self.G
        if not 1 <= request.steps <= MOST_STEPS:
            raise UserError(f"steps: {request.steps} is beyond the limits: give 1 to {MOST_STEPS}")
        if request.class_idx is not None and not 0 <= request.class_idx < max(G.c_dim, 1):
            raise UserError(f"class: the network has no number {request.class_idx}: choose one of the list")
        pixels = Target(request.name, Path(request.path), f"the picture {printable(request.name)}").load(
            G.img_resolution).pixels

        def work(show: Callable[[Found], None]) -> Found:
            return self._search(request, pixels, show)
        watched = Watched(work)
        with contextlib.closing(watched.looks()) as looks:
            yield from looks
        yield watched.outcome()

    @property
    def _device(self) -> torch.device:
        return next(self.G.parameters()).device

    @functools.cached_property
    def _distance(self) -> Distance:
        return make_distance(self.distance or default_distance(), self.G.img_resolution, self._device)

    def _search(self, request: Request, pixels: torch.Tensor, show: Callable[[Found], None]) -> Found:
        G = self.G
        distance, done = self._distance, 0          # Its network is read before others have to wait.

        def watch(step: Step) -> None:
            nonlocal done
            done += 1
            show(Found(done, float(step.distances[0]), _as_array(pixels), _as_array(to_uint8_sample(step.images[0]))))
            self._turns.let_others_in()
        with self._turns.turn():
            goal = Goal(from_uint8(pixels)[None].to(self._device), distance)
            given = request.class_idx is not None
            classes = [request.class_idx or 0] if given else list(range(max(G.c_dim, 1)))
            start = nearest_start(G, goal, classes, default_count(classes, given))
            ws = project(G, goal, start, ProjectionSettings(request.steps, request.space), watch)[0]
            centers = class_means(G, start.labels).expand(G.num_ws, -1)
            image, _ = synthesize_with_maps(G, ws[None], Controls().transform(), None, self.precision)
            with torch.no_grad(), full_precision():
                left = float(goal.distances(image[None])[0])
        return Found(done, left, _as_array(pixels), _as_array(to_uint8_sample(image)), Point(ws, centers))


def _as_array(image: torch.Tensor) -> np.ndarray:
    """uint8 [3, R, R] -> [R, R, 3]."""
    return np.asarray(image.permute(1, 2, 0).cpu())
