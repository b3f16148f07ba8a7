# SPDX-License-Identifier: Apache-2.0
"""report.html of a run: curves, sample sheets, settings, in one file that needs no network.

The loop draws it at every snapshot; `python -m training.watch.html_report RUNDIR` draws it by hand.
"""
import base64
import contextlib
import dataclasses
import datetime
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
import PIL.Image

from dnnlib import UserError, cli
from dnnlib.util import atomic_write_text, format_time, parse_json
from training.run.folder import OPTIONS_FILE, RUN_INFO, read_options
from training.run.snapshots import images_shown

REPORT_FILE = "report.html"
MAX_SHEETS = 6          # Sample sheets over time that are shown.
SHEET_PIXELS = 512      # Side of a shown sheet, at most.
MAX_POINTS = 400        # A curve has no more; neighbours are averaged.
LOG_SPREAD = 30         # Metrics that move by this factor get a logarithmic axis.

Item = TypeVar("Item")

REAL, FAKE, OTHER = "#1f6fb4", "#d1602a", "#3c8d5a"     # Colours: what belongs to real images, to G, to neither.

#----------------------------------------------------------------------------
# Reading.

def read_objects(path: Path) -> list[dict[str, Any]]:
    """The objects in the lines of a .jsonl file; none if there is no file.

    A line that a kill cut off, or a disk damaged, is passed over.
    """
    found = []
    for text in path.read_bytes().split(b"\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = parse_json(text)
            if isinstance(line, dict):
                found.append(line)
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a .jsonl file that count, objects with a number cur_nimg; none if there is no file.

    Lines hold cur_nimg and run_start (how often the run had been started). What a killed run wrote after its last state
    is written again by the next start: the later line counts.
    """
    lines: list[dict[str, Any]] = []
    for line in read_objects(path):
        if not isinstance(line.get("cur_nimg"), int):
            continue
        while lines and _is_void(lines[-1], line):
            lines.pop()
        lines.append(line)
    return lines


def _is_void(line: dict[str, Any], later: dict[str, Any]) -> bool:
    """Whether a later start was not yet as far, or writes the same again."""
    return (line.get("run_start") != later.get("run_start")
            and line["cur_nimg"] >= later["cur_nimg"])


@dataclasses.dataclass
class Run:
    """What the files of a run folder say."""

    folder: Path
    stats: list[dict[str, Any]]                             # Lines of stats.jsonl, by images shown.
    metrics: dict[str, tuple[np.ndarray, np.ndarray]]       # Name of a number -> kimg, values.
    verdicts: list[dict[str, Any]]
    options: dict[str, Any]

    def names(self) -> list[str]:
        """All numbers in the statistics, sorted."""
        return sorted({name for line in self.stats for name in line})

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """kimg and values of a statistic; ticks without it are left out."""
        pairs = [(line["cur_nimg"] / 1e3, line[name]) for line in self.stats if line.get(name) is not None]
        values = [value["mean"] if isinstance(value, dict) else value for _, value in pairs]
        return np.array([kimg for kimg, _ in pairs]), np.array(values, dtype=float)


def read_metrics(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numbers of metric-*.jsonl; of two lines for one snapshot the later counts."""
    curves: dict[str, dict[float, float]] = {}
    for path in sorted(folder.glob("metric-*.jsonl")):
        for line in read_lines(path):
            results, snapshot = line.get("results"), line.get("snapshot_pkl")
            nimg = images_shown(snapshot) if isinstance(snapshot, str) else None
            if isinstance(results, dict) and nimg is not None:      # Not of a line cut and joined by hand.
                for name, value in results.items():
                    curves.setdefault(name, {})[nimg / 1e3] = value
    return {name: (np.array(sorted(points)), np.array([points[k] for k in sorted(points)], dtype=float))
            for name, points in curves.items()}


def read_run(folder: Path) -> Run:
    """Everything that the report shows.

    Raises:
        UserError: not the folder of a run.
    """
    options = read_options(folder)
    if options is None:
        raise UserError(f"{folder}: no readable {OPTIONS_FILE} in it: name the folder of a run, such as runs/00000-...")
    return Run(folder, read_lines(folder / "stats.jsonl"), read_metrics(folder),
               read_lines(folder / "health.jsonl"), options)

#----------------------------------------------------------------------------
# Curves.

@dataclasses.dataclass(frozen=True)
class Curve:
    """A line of a panel."""

    name: str           # Name of the statistic.
    label: str = ""
    color: str = OTHER
    thin: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of curves over kimg."""

    title: str
    curves: tuple[Curve, ...]
    caption: str = ""
    limits: tuple[float | None, float | None] = (None, None)    # Range of the axis; None: what the values need.
    log: bool = False
    marks: tuple[float, ...] = ()       # Values with a dotted line.
    scale: float = 1                    # Values are multiplied by it.


def head_curves(names: Sequence[str], prefix: str, color: str) -> tuple[Curve, ...]:
    """A thin line per scale of each backbone: names are <prefix>/<backbone>/<scale>."""
    return tuple(Curve(name, "", color, thin=True) for name in names
                 if name.startswith(f"{prefix}/") and name.count("/") == prefix.count("/") + 2)


def diagnosis_panels(names: Sequence[str]) -> list[Panel]:
    """What `--diagnose` measures of D at snapshots."""
    return [
        Panel("Directions of D", (*head_curves(names, "Diagnosis/inner_product", REAL),
                                  Curve("Diagnosis/inner_product", "learned", REAL),
                                  Curve("Diagnosis/floor", "an optimal one would read", OTHER)),
              "Inner product with the optimal direction; thin: each head. 1: the last layer sees what there is to see.",
              (None, 1.05), marks=(0, 1)),
        Panel("Separability of D", (*head_curves(names, "Diagnosis/separability", REAL),
                                    Curve("Diagnosis/separability", "", REAL)),
              "Mean difference over W1 along the learned direction. 1: one law lies below the other.", (0, 1.05),
              marks=(1,)),
        Panel("Distances that D sees", (Curve("Diagnosis/w1_max", "max-ASW", OTHER),
                                        Curve("Diagnosis/w1_optimal", "along the optimal direction", FAKE),
                                        Curve("Diagnosis/w1_learned", "along the learned direction", REAL),
                                        Curve("Diagnosis/w1_floor", "of equal laws", "#888888")),
              "W1 of the slices, mean over heads, held-out images.", (0, None)),
    ]


def panels(names: Sequence[str]) -> list[Panel]:
    """Those of the statistics; panels without a value are passed over when drawn."""
    return [
        Panel("Losses", (Curve("Loss/G/loss", "G", FAKE), Curve("Loss/D/loss", "D", REAL)),
              "Per sample. They need not fall: G and D pull against each other."),
        Panel("Scores of D", (Curve("Loss/scores/real", "real", REAL), Curve("Loss/scores/fake", "generated", FAKE)),
              "Mean logit over all heads."),
        Panel("Sign rates of D", (*head_curves(names, "Loss/signs/real", REAL),
                                  *head_curves(names, "Loss/signs/fake", FAKE),
                                  Curve("Loss/signs/real", "real", REAL), Curve("Loss/signs/fake", "generated", FAKE)),
              "Thick: all heads. Thin: each scale of each backbone. Pinned at +1 and -1: D has won.", (-1.05, 1.05)),
        *diagnosis_panels(names),
        Panel("Diversity", (Curve("Progress/diversity", "", FAKE),),
              "Difference of generated images of one class over that of real ones. Below 0.05: collapse.",
              (0, None), marks=(0.05, 1)),
        Panel("Other terms of G", (Curve("Loss/G/adversarial", "adversarial", FAKE),
                                   Curve("Loss/G/guidance_loss", "guidance", REAL),
                                   Curve("Loss/G/diversity", "diversity", OTHER),
                                   Curve("Loss/G/reg", "path length", "#7d5ba6")),
              "Before their weights, but path length."),
        Panel("Gradient norms", (Curve("Gradients/Gmain", "G", FAKE), Curve("Gradients/Greg", "G path length", OTHER),
                                 Curve("Gradients/Dmain", "D", REAL)), "Of the whole batch, before Adam.", log=True),
        Panel("Non-finite gradients", (Curve("Progress/nonfinite/G", "G", FAKE),
                                       Curve("Progress/nonfinite/D", "D", REAL)),
              "Elements replaced since the start of the process. Should stay at 0.", (0, None)),
        Panel("Speed", (Curve("Progress/sec_per_kimg"),), "Seconds per 1000 images, without metrics and saves.",
              (0, None)),
        Panel("Not training", (Curve("Progress/data_wait", "waiting for data", REAL),
                               Curve("Progress/maintenance_share", "metrics and saves", FAKE)),
              "Share of the time, in percent.", (0, 100), scale=100),
        Panel("Memory", (Curve("Progress/cpu_mem_gb", "CPU", REAL), Curve("Progress/gpu_mem_gb", "GPU", FAKE)),
              "Peak of the first process, GiB.", (0, None)),
    ]


def thinned(kimg: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: means of neighbours."""
    if len(kimg) <= MAX_POINTS:
        return kimg, values
    groups = np.array_split(np.arange(len(kimg)), MAX_POINTS)
    return np.array([kimg[g].mean() for g in groups]), np.array([values[g].mean() for g in groups])


def draw(title: str, lines: Sequence[tuple[Curve, np.ndarray, np.ndarray]], panel: Panel) -> bytes:
    """One panel as PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    # Without pyplot there is no window and no global state.
    figure = Figure(figsize=(5, 3), dpi=120)
    axes = figure.add_axes((0.11, 0.14, 0.86, 0.76))    # Fixed: twice as fast as a layout engine.
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("kimg", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    for mark in panel.marks:
        axes.axhline(mark, color="#888888", linewidth=0.8, linestyle=":")
    for curve, x, y in lines:
        x, y = thinned(x, y)
        axes.plot(x, y * panel.scale, color=curve.color, label=curve.label or None,
                  linewidth=0.7 if curve.thin else 1.6, alpha=0.35 if curve.thin else 1,
                  marker="." if len(x) < 30 and not curve.thin else None)
    if panel.log and all((y > 0).any() for _, _, y in lines):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    bottom, top = panel.limits
    if bottom == 0 and not any(y.any() for _, _, y in lines):
        top = 1
    axes.set_ylim(bottom, top)
    if any(curve.label for curve, _, _ in lines):
        axes.legend(fontsize=8, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def figures(run: Run) -> list[tuple[Panel, bytes]]:
    """Metrics first, then the statistics; panels without a number are left out."""
    drawn = []
    for name, (kimg, values) in run.metrics.items():
        spread = values.max() > LOG_SPREAD * values.min() > 0       # Such as FID from its start on.
        panel = Panel(name, (Curve(name),), "Of the averaged generator, at snapshots.", log=bool(spread))
        drawn.append((panel, draw(name, [(panel.curves[0], kimg, values)], panel)))
    for panel in panels(run.names()):
        lines = [(curve, *run.curve(curve.name)) for curve in panel.curves]
        lines = [line for line in lines if len(line[1])]
        if lines:
            drawn.append((panel, draw(panel.title, lines, panel)))
    return drawn

#----------------------------------------------------------------------------
# Sample sheets.

def pick(items: list[Item], count: int) -> list[Item]:
    """`count` of the items: the first, the last, and evenly between."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def shown_sheet(path: Path) -> bytes:
    """A sheet as PNG of a side near SHEET_PIXELS: small ones enlarged without smoothing, large ones reduced."""
    with PIL.Image.open(path) as opened:
        image = opened.convert("RGB")
    longer = max(image.size)
    if longer > SHEET_PIXELS:
        image = image.resize([round(side * SHEET_PIXELS / longer) for side in image.size], PIL.Image.Resampling.LANCZOS)
    elif SHEET_PIXELS // longer > 1:
        factor = SHEET_PIXELS // longer
        image = image.resize([side * factor for side in image.size], PIL.Image.Resampling.NEAREST)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def sheets(folder: Path) -> list[tuple[str, bytes]]:
    """Titles and pictures: samples over time, and real images of the same classes."""
    fakes = sorted((nimg, path) for path in folder.glob("fakes*.png") if (nimg := images_shown(path.name)) is not None)
    shown = [(f"generated, {nimg / 1e3:g} kimg", shown_sheet(path)) for nimg, path in pick(fakes, MAX_SHEETS)]
    reals = folder / "reals.png"
    return shown + ([("real", shown_sheet(reals))] if reals.is_file() else [])

#----------------------------------------------------------------------------
# The page.

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1500px; margin: 2em auto; padding: 0 1.5em; }
h1 { font-size: 1.3em; overflow-wrap: anywhere; } h2 { font-size: 1.1em; margin: 1.6em 0 .5em; }
.row { display: flex; flex-wrap: wrap; gap: 1.2em; } figure { margin: 0; max-width: 460px; }
figure img { width: 100%; } .sheet img { image-rendering: pixelated; }
figcaption { font-size: .85em; color: #666; } .bad { color: #a11; font-weight: bold; } .ok { color: #276b3e; }
table { border-collapse: collapse; font-size: .88em; } td { border-bottom: 1px solid #e4e4e4;
padding: .15em 1em .15em 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: #666; white-space: nowrap; }
.facts td { font-variant-numeric: tabular-nums; }
"""


def data_uri(png: bytes) -> str:
    """A picture inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def figure_html(png: bytes, caption: str, title: str, kind: str = "") -> str:
    """A picture with a line below it."""
    return (f'<figure class="{kind}"><img src="{data_uri(png)}" alt="{html.escape(title)}">'
            f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def table_html(rows: Sequence[tuple[str, str]], kind: str = "") -> str:
    """Names and values."""
    cells = "".join(f"<tr><td>{html.escape(name)}</td><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="{kind}">{cells}</table>'


def settings(options: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted names and values; the layer table is one row of names."""
    rows: list[tuple[str, str]] = []
    for name, value in options.items():
        if isinstance(value, dict):
            rows += settings(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            rows.append((prefix + name, ", ".join(v["name"] if isinstance(v, dict) and "name" in v else str(v)
                                                  for v in value) or "none"))
        else:
            rows.append((prefix + name, "none" if value is None else f"{value:g}" if isinstance(value, float)
                         else str(value)))
    return rows


def facts(run: Run) -> list[tuple[str, str]]:
    """The newest numbers in words."""
    rows = []
    if run.stats:
        last = run.stats[-1]
        total = run.options.get("total_kimg")
        rows.append(("progress", f"{last['cur_nimg'] / 1e3:g}" + (f" of {total:g} kimg" if total else " kimg")))
        rows.append(("time", format_time(last["Progress/elapsed"])))
        known = [("to go", "Progress/eta_sec", format_time), ("sec/kimg", "Progress/sec_per_kimg", "{:.3g}".format),
                 ("img/s", "Progress/img_per_sec", "{:.4g}".format),
                 ("diversity", "Progress/diversity", "{:.2f}".format)]
        rows += [(label, show(last[name])) for label, name, show in known if name in last]
    rows += [(name, f"{values[-1]:.4g} (kimg {kimg[-1]:g}); lowest {values.min():.4g}, highest {values.max():.4g}")
             for name, (kimg, values) in run.metrics.items()]
    credit = (run.options.get(RUN_INFO) or {}).get("credit")
    if credit:
        rows.append(("images", credit))
    rows.append(("drawn", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")))
    return rows


def health_html(run: Run) -> str:
    """Verdicts and dumps, or that there is none."""
    said = [f'<p class="{"bad" if v["is_bad"] else "ok"}">kimg {v["cur_nimg"] / 1e3:g}: {html.escape(v["verdict"])}: '
            f"{html.escape(v['text'])}</p>" for v in run.verdicts]
    said += [f'<p class="bad">Stopped for non-finite gradients: see {html.escape(path.name)}</p>'
             for path in sorted(run.folder.glob("nonfinite-*.json"))]
    return "".join(said) or '<p class="ok">No verdicts.</p>'


def page(run: Run) -> str:
    """The whole document."""
    name = html.escape(run.folder.resolve().name)
    curves = "".join(figure_html(png, panel.caption, panel.title) for panel, png in figures(run))
    samples = "".join(figure_html(png, title, title, "sheet") for title, png in sheets(run.folder))
    return (f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
            f"<style>{STYLE}</style></head><body><h1>{name}</h1>{table_html(facts(run), 'facts')}"
            f"<h2>Health</h2>{health_html(run)}"
            f'<h2>Curves</h2><div class="row">{curves or "No ticks yet."}</div>'
            f'<h2>Samples</h2><div class="row">{samples or "None yet."}</div>'
            f"<h2>Settings</h2>{table_html(settings(run.options))}</body></html>\n")


def write_report(folder: Path) -> Path:
    """Draw report.html of a run folder.

    Raises:
        UserError: not the folder of a run.
    """
    path = folder / REPORT_FILE
    atomic_write_text(path, page(read_run(folder)))
    return path

#----------------------------------------------------------------------------

@click.command(cls=cli.Command)
@click.argument("rundir", type=cli.PathType())
def main(rundir: str) -> None:
    """Draw report.html of the run folder RUNDIR."""
    click.echo(write_report(Path(rundir)))


if __name__ == "__main__":
    main()
