# SPDX-License-Identifier: Apache-2.0
"""The page itself: its controls, and what happens when they move.

Pictures go to the browser as data within the page, and files for download are made when they are asked for, so nothing
is left on this machine. What belongs to one tab (saved points) lies in its `gradio.State`.
"""
import base64
import dataclasses
import functools
import html
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import gradio as gr
import numpy as np

from dnnlib import UserError
from inference.inversion.projection import SPACES
from inference.page.commands import LATENTS_FILE, command_line, latents_file
from inference.page.layers import layer_names, num_channels
from inference.page.scene import (
    BETWEEN,
    LARGEST_SEED,
    PICTURE,
    SEED,
    SOURCES,
    Controls,
    Mixing,
    Point,
)
from inference.page.studio import MOST_STEPS, Found, Request, Studio
from torch_utils.images import png_bytes

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Saved = dict[str, Point]            # What one tab keeps.
Control = gr.Radio | gr.Dropdown | gr.Number | gr.Slider | gr.Checkbox
Values = Mapping[gr.blocks.Block, Any]

NO_LAYER = "none"
DOWNLOAD = """(file) => {
    const link = document.createElement("a");
    link.href = file.url; link.download = file.name;
    link.click();
}"""
STYLE = """
.shown img { width: 100%; max-width: 512px; image-rendering: pixelated; border-radius: 4px; }
.row { display: flex; flex-wrap: wrap; gap: 8px; }
.row figure { margin: 0; flex: 1 1 96px; max-width: 256px; }
.row img { width: 100%; image-rendering: pixelated; }
.row figcaption { font-size: 12px; text-align: center; }
"""

#----------------------------------------------------------------------------
# Values from and to the page.

def picture_html(image: np.ndarray, alt: str) -> str:
    """uint8 [H, W, 3] or [H, W] as an element of a page."""
    data = base64.b64encode(png_bytes(image)).decode()
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">'


def row_html(images: Mapping[str, np.ndarray]) -> str:
    """Pictures side by side, each above its name."""
    figures = [f"<figure>{picture_html(image, name)}<figcaption>{html.escape(name)}</figcaption></figure>"
               for name, image in images.items()]
    return f'<div class="row">{"".join(figures)}</div>'


def download(name: str, kind: str, content: bytes) -> dict[str, str]:
    """What DOWNLOAD saves as a file."""
    return {"name": name, "url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}


def told(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The same function, whose UserError becomes a message on the page."""
    @functools.wraps(function)
    def wrapper(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except UserError as err:
            raise gr.Error(html.escape(str(err)), print_exception=False) from err
    return wrapper


def number(value: object, name: str) -> float:
    """What a field of numbers holds. Raises UserError: it is empty."""
    if not isinstance(value, int | float):
        raise UserError(f"{name}: is empty: type a number")
    return float(value)


def whole(value: object, name: str) -> int:
    """A number without a fraction. Raises UserError: it is none, or there is none."""
    found = number(value, name)
    if not found.is_integer():              # Nor are nan and inf.
        raise UserError(f"{name}: {found:g} is no whole number: type one")
    return int(found)

#----------------------------------------------------------------------------
# Controls.

class Panel:
    """The controls that say what is shown, made within a `gradio.Blocks`."""

    def __init__(self, studio: Studio):
        self.studio = studio
        G = studio.G
        self.source = gr.Radio(SOURCES, value=SEED, label="What is shown")
        choices = studio.class_choices
        self.class_idx = gr.Dropdown(choices, value=0, label="Class", visible=bool(choices), filterable=True)
        self.seed = self._seed("Seed")
        self.psi = gr.Slider(0, 2, value=1, step=0.01, label="Truncation psi (1: none, 0: the mean of the class)")
        with gr.Tabs():
            with gr.Tab("Around"):
                self.noise = gr.Slider(0, 1, value=0, step=0.01, label="Distance from the seed (1: unrelated to it)")
                self.noise_seed = self._seed("Seed of the noise")
                self.around = gr.Button("Show the neighbours of the seed")
                self.neighbours = gr.HTML(elem_id="neighbours")
            with gr.Tab("Mix"):
                self.is_mixed = gr.Checkbox(False, label="Take some layers from another seed")
                self.mix_seed = self._seed("Other seed")
                self.mix_class = gr.Dropdown(choices, value=0, label="Other class", visible=bool(choices))
                self.first = gr.Slider(0, G.num_ws - 1, value=min(3, G.num_ws - 1), step=1, label="First layer")
                self.last = gr.Slider(0, G.num_ws - 1, value=G.num_ws - 1, step=1, label="Last layer")
            with gr.Tab("Move"):
                self.right = gr.Slider(-1, 1, value=0, step=0.01, label="To the right, in image widths")
                self.down = gr.Slider(-1, 1, value=0, step=0.01, label="Down, in image widths")
                self.rotate = gr.Slider(-180, 180, value=0, step=1, label="Turn, in degrees")
            with gr.Tab("Directions"):
                self.strengths = self._strengths()
            with gr.Tab("Between"):
                gr.Markdown("Save two pictures as A and B, then choose 'between A and B' above.")
                self.between = gr.Slider(0, 1, value=0, step=0.01, label="From A to B")

    def layers(self) -> None:
        """The controls of what layers show, which have their place below."""
        G = self.studio.G
        self.layer = gr.Dropdown([NO_LAYER, *layer_names(G)], value=NO_LAYER, label="Layer")
        self.channel = gr.Slider(0, max(num_channels(G, layer_names(G)[0]) - 1, 1), value=0, step=1, label="Channel")
        self.maps = gr.HTML(elem_id="maps")

    def _seed(self, label: str) -> gr.Number:
        return gr.Number(0, label=label, minimum=0, maximum=LARGEST_SEED, precision=0)

    def _strengths(self) -> dict[str, gr.Slider]:
        """A slider per direction."""
        if not self.studio.offsets:
            gr.Markdown("Give --directions=FILE.npz, a file that directions.py has made, for sliders here.")
        for note in self.studio.left_out:
            gr.HTML(html.escape(note))
        return {name: gr.Slider(-5, 5, value=0, step=0.1, label=name) for name in self.studio.offsets}

    @property
    def inputs(self) -> list[Control]:
        """All that decides about the picture."""
        return [self.source, self.class_idx, self.seed, self.psi, self.noise, self.noise_seed, self.is_mixed,
                self.mix_seed, self.mix_class, self.first, self.last, self.right, self.down, self.rotate, self.between,
                *self.strengths.values(), self.layer, self.channel]

    def controls(self, values: Values) -> Controls:
        """What they mean. Raises UserError: a field is empty or holds what it must not."""
        def integer(component: Control) -> int:
            return whole(values[component], str(component.label))

        def real(component: Control) -> float:
            return number(values[component], str(component.label))
        conditional = self.studio.G.c_dim > 0
        mixing = None
        if values[self.is_mixed]:
            mixing = Mixing(integer(self.mix_seed), integer(self.mix_class) if conditional else 0, integer(self.first),
                            integer(self.last))
        return Controls(
            source=values[self.source], class_idx=integer(self.class_idx) if conditional else 0,
            seed=integer(self.seed), psi=real(self.psi), noise=real(self.noise), noise_seed=integer(self.noise_seed),
            mixing=mixing, translate=(real(self.right), real(self.down)), rotate=real(self.rotate),
            between=real(self.between),
            edits=tuple((name, real(slider)) for name, slider in self.strengths.items()))

    def chosen_layer(self, values: Values) -> tuple[str, int] | None:
        """Name and channel. Raises UserError: there is no such layer."""
        name = values[self.layer]
        if name == NO_LAYER:
            return None
        if name not in layer_names(self.studio.G):
            raise UserError(f"layer {str(name)[:40]!r}: the network has none of this name: choose one of the list")
        return name, min(whole(values[self.channel], "Channel"), num_channels(self.studio.G, name) - 1)

#----------------------------------------------------------------------------
# What the page shows.

class Page:
    """The whole page.

    Args:
        studio: Makes the pictures.
        report: Of the training run, if there is one.
        title: Shown above.
    """

    def __init__(self, studio: Studio, report: Path | None = None, title: str = "StyleSAN-XL"):
        self.studio, self.report = studio, report
        with gr.Blocks(title=title, analytics_enabled=False) as self.blocks:
            # A tab's own. Events add to it in place: each of two that overlap would give back what it began with.
            self.saved = gr.State(dict)
            gr.Markdown(f"### {html.escape(title)}")
            with gr.Row():
                with gr.Column():
                    self._picture()
                with gr.Column():
                    self.panel = Panel(studio)
            with gr.Tabs():
                with gr.Tab("Layers"):
                    self.panel.layers()
                with gr.Tab("Invert"):
                    self._inversion()
                with gr.Tab("Report") as self.report_tab:
                    self.report_shown = gr.HTML(elem_id="report")
            self._connect()

    def _picture(self) -> None:
        self.picture = gr.HTML(elem_id="picture", elem_classes="shown")
        with gr.Row():
            self.save = {name: gr.Button(f"Save as {name}") for name in ("A", "B")}
        self.points = gr.HTML(elem_id="points")
        with gr.Row():
            self.get_picture, self.get_latents = gr.Button("Download picture"), gr.Button("Download latents")
        self.command = gr.Textbox(label="The command that makes this picture", buttons=["copy"], lines=3,
                                  interactive=False, elem_id="command")
        self.file = gr.JSON(visible="hidden")       # What DOWNLOAD takes.

    def _inversion(self) -> None:
        self.upload = gr.File(label="Picture", file_count="single", type="filepath", elem_id="upload")
        self.steps = gr.Slider(1, MOST_STEPS, value=200, step=1, label="Steps")
        self.space = gr.Radio(SPACES, value=SPACES[0], label="One w for all layers, or one for each (w+)")
        self.any_class = gr.Checkbox(False, label="Begin at the nearest of all classes instead of the mean of the "
                                     "class above", visible=self.studio.G.c_dim > 0)
        with gr.Row():
            self.find, self.stop = gr.Button("Find its latents", variant="primary"), gr.Button("Stop")
        self.progress = gr.HTML(elem_id="progress")

    def _connect(self) -> None:
        panel = self.panel
        inputs: set[gr.blocks.Block] = {*panel.inputs, self.saved}
        shown = [self.picture, self.command, panel.maps]
        gr.on([self.blocks.load, *(component.change for component in panel.inputs)], self._show, inputs, shown,
              trigger_mode="always_last", show_progress="hidden", api_visibility="private")
        panel.layer.change(self._limit_channel, panel.layer, panel.channel, show_progress="hidden",
                           api_visibility="private")
        panel.around.click(self._neighbours, inputs, panel.neighbours, api_visibility="private")
        for name, button in self.save.items():
            button.click(functools.partial(self._save, name), inputs, None, api_visibility="private").success(
                self._points, inputs, self.points, concurrency_limit=1, concurrency_id="points",
                api_visibility="private").then(self._show, inputs, shown, api_visibility="private")
        for button, make in ((self.get_picture, self._picture_file), (self.get_latents, self._latents_file)):
            button.click(make, inputs, self.file, api_visibility="private").success(
                None, self.file, None, js=DOWNLOAD, api_visibility="private")
        search = self.find.click(
            self._invert, {self.upload, self.steps, self.space, self.any_class, panel.class_idx, self.saved},
            self.progress, concurrency_limit=1, api_visibility="private")
        # Psi of the picture that was shown before would pull the one that was found towards its mean.
        search.success(lambda: (PICTURE, 1), None, [panel.source, panel.psi], api_visibility="private").then(
            self._show, inputs, shown, api_visibility="private")
        self.stop.click(lambda: "Stopped.", None, self.progress, cancels=[search], api_visibility="private")
        self.report_tab.select(self._report, None, self.report_shown, api_visibility="private")

    #------------------------------------------------------------------------
    # Events.

    @told
    def _show(self, values: Values) -> tuple[str, str, str]:
        controls = self.panel.controls(values)
        shown = self.studio.show(controls, values[self.saved], self.panel.chosen_layer(values))
        maps = ""
        if shown.layer is not None:
            names = ("the channel (grey: 0)", "its spectrum", "the mean spectrum of all channels")
            maps = row_html(dict(zip(names, shown.layer, strict=True)))
        return picture_html(shown.image, "the picture"), command_line(self.studio.origin, controls), maps

    @told
    def _limit_channel(self, layer: str) -> gr.Slider:
        count = num_channels(self.studio.G, layer) if layer in layer_names(self.studio.G) else 1
        # A slider has two values at least. Its value stays, which somebody may have changed meanwhile.
        return gr.Slider(maximum=max(count - 1, 1))

    @told
    def _neighbours(self, values: Values) -> str:
        images = self.studio.neighbours(self.panel.controls(values))
        return row_html({f"seed of the noise {k}": image for k, image in enumerate(images)})

    @told
    def _save(self, name: str, values: Values) -> None:
        saved: Saved = values[self.saved]
        saved[name] = self.studio.point(self.panel.controls(values), saved)

    @told
    def _points(self, values: Values) -> str:
        controls, saved = self.panel.controls(values), values[self.saved]
        thumbnails = {key: self.studio.show(dataclasses.replace(controls, source=BETWEEN, between=t, mixing=None),
                                            saved | {other: saved[key]}).image
                      for key, other, t in (("A", "B", 0.0), ("B", "A", 1.0)) if key in saved}
        return row_html(thumbnails)

    @told
    def _picture_file(self, values: Values) -> dict[str, str]:
        shown = self.studio.show(self.panel.controls(values), values[self.saved])
        return download("picture.png", "image/png", png_bytes(shown.image))

    @told
    def _latents_file(self, values: Values) -> dict[str, str]:
        controls = self.panel.controls(values)
        shown = self.studio.show(controls, values[self.saved])
        return download(LATENTS_FILE, "application/octet-stream",
                        latents_file(self.studio.origin, controls, shown.ws))

    def _invert(self, values: Values) -> Iterator[str]:
        try:
            for found in self._found(values):
                words = f"step {found.step} of {whole(values[self.steps], 'Steps')}, distance {found.distance:.4f}"
                if found.point is not None:
                    values[self.saved][PICTURE] = found.point
                    words = f"found, distance {found.distance:.4f}"
                yield row_html({"target": found.target, words: found.image})
        except UserError as err:
            raise gr.Error(html.escape(str(err)), print_exception=False) from err

    def _found(self, values: Values) -> Iterator[Found]:
        path = values[self.upload]
        if path is None:
            raise UserError("picture: none is chosen: choose a file above")
        class_idx = None if values[self.any_class] else 0
        if class_idx is not None and self.studio.G.c_dim > 0:
            class_idx = whole(values[self.panel.class_idx], "Class")
        if values[self.space] not in SPACES:
            raise UserError(f"space: {str(values[self.space])[:40]!r} is none of {', '.join(SPACES)}: choose one")
        yield from self.studio.invert(Request(path, Path(path).name, class_idx, whole(values[self.steps], "Steps"),
                                              values[self.space]))

    def _report(self) -> str:
        if self.report is None:
            return "There is no report.html of the training run beside the network."
        try:
            text = self.report.read_text(encoding="utf-8", errors="replace")
        except OSError as err:
            return html.escape(f"report.html cannot be read: {err.strerror}")
        return (f'<iframe title="report" sandbox="" srcdoc="{html.escape(text)}" '
                'style="width: 100%; height: 80vh; border: 0"></iframe>')
