# SPDX-License-Identifier: Apache-2.0
"""The main job on real images: data, stem, super-resolution stages, samples, scores.

Every step is the command that a user would type. `make demo` trains on the 1,797 handwritten digits that scikit-learn
ships, in minutes on a CPU. `make demo-emoji` trains on OpenMoji's pictures, in colours and with pretrained features, in
minutes on a GPU or in a night on a CPU.
"""
import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import tqdm

from dnnlib import UserError, cli
from dnnlib.util import atomic_write_text, list_some, parse_json, try_lock

HERE = Path(__file__).resolve().parent
STOPPED = 3                 # Exit code of a training run that saved its state because it was asked to stop.
MARKER = "demo.json"        # Says which demo a folder holds, and how far it is.
LOCK = "demo.lock"          # Locked by the process whose demo the folder is.
LOG, SHEET, BEST, SUMMARY = "log.txt", "samples.png", "best_model.pkl", "summary.json"
FORWARDED = [number for number in (signal.SIGTERM, getattr(signal, "SIGHUP", None)) if number is not None]

#----------------------------------------------------------------------------
# The demos.

@dataclasses.dataclass(frozen=True)
class Size:
    """How long a demo is."""

    kimg: tuple[float, ...]         # Of each stage.
    epochs: int                     # Of the networks that are trained on the data.
    num: int                        # Generated images per metric: as many as there are real ones, so that recall and
    tick: float                     # precision mean the same for both sides.
    max_images: int | None = None   # Of the data.


@dataclasses.dataclass(frozen=True)
class OwnNet:
    """A network that is trained on the data before anything else."""

    name: str
    resolution: int
    widths: str
    split: str          # Its share of the images. One share guides the training, another one judges the result.


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one train.py command trains; '{folder}' in an option is that of the demo."""

    resolution: int
    folder: str
    options: tuple[str, ...]
    seconds: float                  # Per iteration of 32 images, for the bar only.


@dataclasses.dataclass(frozen=True)
class Demo:
    """Data, networks, stages and judge."""

    title: str
    source: str                     # As dataset_tool.py calls it.
    archive: str                    # How the names of its archives begin.
    data_seconds: float             # That the archives take, for the bar only.
    resumes: bool                   # The same command goes on where it stopped, instead of beginning anew.
    nets: tuple[OwnNet, ...]
    options: tuple[str, ...]        # Of every stage.
    stages: tuple[Stage, ...]
    detector: str
    metrics_at_start: str
    metrics: str
    rows: tuple[tuple[str, str, str, str], ...]     # Of the table: words, key in summary.json, metric, format.
    full: Size
    quick: Size

    def makes(self, name: str) -> bool:
        """Whether a demo leaves a file or folder of this name in its folder."""
        names = {MARKER, LOCK, LOG, SHEET, BEST, SUMMARY, *(f"{net.name}.safetensors" for net in self.nets),
                 *(stage.folder for stage in self.stages)}
        # Archives have indices beside them, and the scores of the network are kept.
        return name in names or name.startswith((self.archive, ".", "metric-"))


EMOJI_GUIDED = ("--cls_weight=8", "--classifier={folder}/guide.safetensors")

DEMOS = {
    "digits": Demo(
        title="digits", source="sklearn:digits", archive="digits", data_seconds=5, resumes=False,
        nets=(OwnNet("features", 16, "64,128,256", "0/2"), OwnNet("judge", 32, "48,96,192", "1/2")),
        options=("--cfg=stylegan3-t", "--preset=demo", "--cond=1", "--backbones={folder}/features.safetensors",
                 "--metrics=none", "--snap=1000", "--workers=0"),
        stages=(Stage(16, "stem", ("--glr=0.005", "--dlr=0.004"), 0.36),
                Stage(32, "superres", ("--glr=0.008", "--dlr=0.0064", "--diversity=2", "--cls_weight=8",
                                       "--classifier={folder}/features.safetensors"), 0.47)),
        detector="{folder}/judge.safetensors", metrics_at_start="fid,accuracy", metrics="fid,kid,pr,accuracy",
        rows=(("FID at start", "fid_init", "fid", ".1f"), ("FID now", "fid", "fid", ".3f"),
              ("accuracy at start", "accuracy_init", "accuracy", ".1%"),
              ("accuracy now", "accuracy", "accuracy", ".1%"),
              ("precision", "precision", "pr_precision", ".2f"), ("recall", "recall", "pr_recall", ".2f"),
              ("KID", "kid", "kid", ".2e")),
        full=Size(kimg=(12.8, 27.2), epochs=15, num=1797, tick=0.8),
        quick=Size(kimg=(0.64, 0.32), epochs=4, num=500, tick=0.16)),
    # The official recipe in widths that a processor can train in a night, with what so few images, classes and steps
    # need (docs/recipes.md). The judge is another network than the discriminator's, and has seen neither these images
    # nor the generator.
    "emoji": Demo(
        title="emoji", source="openmoji", archive="emoji", data_seconds=90, resumes=True,
        nets=(OwnNet("guide", 32, "64,128,256", "0/2"),),
        options=("--cfg=stylegan3-t", "--preset=light", "--cond=1", "--mirror=1", "--feature-size=112",
                 "--backbones=tf_efficientnet_lite0", "--metrics=none", "--snap=25"),
        stages=(Stage(16, "stage16", ("--embedding=centred",), 1.4),
                Stage(32, "stage32", EMOJI_GUIDED, 2.4), Stage(64, "stage64", EMOJI_GUIDED, 3.9)),
        detector="timm:tf_efficientnet_lite2", metrics_at_start="fd", metrics="fd,kid,pr,probe_accuracy",
        rows=(("FD (lite2) at start", "fd_init", "fd", ".1f"), ("FD (lite2) now", "fd", "fd", ".1f"),
              ("probe accuracy now", "accuracy", "probe_accuracy", ".1%"),
              ("... of real images", "accuracy_real", "probe_accuracy_held_out", ".1%"),
              ("precision", "precision", "pr_precision", ".2f"), ("recall", "recall", "pr_recall", ".2f"),
              ("KID (lite2)", "kid", "kid", ".2e")),
        full=Size(kimg=(100.0, 60.0, 60.0), epochs=15, num=4442, tick=0.8),
        quick=Size(kimg=(0.096, 0.064, 0.064), epochs=2, num=64, tick=0.032, max_images=200)),
}

#----------------------------------------------------------------------------

class Progress:
    """One bar over all steps; the share of a step is the time it was seen to take."""

    def __init__(self, total_seconds: float):
        self.total, self.before = total_seconds, 0.0
        self.bar = tqdm.tqdm(total=100, unit="%", disable=None,
                             bar_format="{desc:<34s} {percentage:3.0f}% |{bar}| {elapsed} gone, {remaining} left")

    def start(self, title: str) -> None:
        """Begin a step."""
        if self.bar.disable:
            print(title, flush=True)
        self.bar.set_description_str(title)

    def inside(self, seconds: float, fraction: float) -> None:
        """Show that `fraction` of a step of `seconds` is done."""
        self.bar.n = 100 * (self.before + seconds * min(fraction, 1)) / self.total
        self.bar.refresh()

    def end(self, seconds: float) -> None:
        """End a step."""
        self.before += seconds
        self.inside(0, 0)


def run_step(progress: Progress, log: Path, title: str, seconds: float, command: list[str],
             fraction: Callable[[str], float | None] = lambda line: None) -> str:
    """Run a command, its output into the log; returns the output.

    Raises:
        UserError: it failed, and the end of its output is printed; or it was stopped.
    """
    progress.start(title)
    lines: list[str] = []
    interrupted = False
    with open(log, "a", encoding="utf-8") as f:
        def keep(line: str) -> None:
            lines.append(line)
            f.write(line)
            f.flush()

        f.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen([sys.executable, *command], cwd=HERE, env=os.environ | {"PYTHONIOENCODING": "utf-8"},
                                   encoding="utf-8", errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None       # It is a pipe.
        with process, _forwarded_to(process):
            try:
                for line in process.stdout:
                    keep(line)
                    if (share := fraction(line)) is not None:
                        progress.inside(seconds, share)
            except KeyboardInterrupt:
                interrupted = True
                # The command got Ctrl-C, too, and may be saving: it must not lose whom it tells.
                for line in process.stdout:
                    keep(line)
    code = process.returncode
    if code != 0 or interrupted:
        progress.bar.close()
        if code == STOPPED:
            raise UserError(f"the step '{title}' was stopped and has saved its state in {log.parent}")
        if interrupted:
            raise KeyboardInterrupt
        sys.stderr.write("".join(lines[-20:]))
        raise UserError(f"the step '{title}' failed with exit code {code}: its whole output is in {log}")
    progress.end(seconds)
    return "".join(lines)


@contextlib.contextmanager
def _forwarded_to(process: subprocess.Popen[str]) -> Iterator[None]:
    """For the block, requests to end go to the command, which saves; its exit code then ends the demo."""
    before = {number: signal.signal(number, lambda number, _frame: process.send_signal(number)) for number in FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def kimg_fraction(total_kimg: float) -> Callable[[str], float | None]:
    """Reads how far a training run is from its status line."""
    def fraction(line: str) -> float | None:
        match = re.match(r"tick \S+\s+kimg (\S+)", line)
        return float(match[1]) / total_kimg if match else None
    return fraction


def metric_values(output: str) -> dict[str, float]:
    """The values in the JSON lines that calc_metrics.py prints, by the names that were asked for.

    Names of results may have the detector's in them.
    """
    values: dict[str, float] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            record = parse_json(line)
            values |= {record["asked_for"] + name.removeprefix(record["metric"]): value
                       for name, value in record["results"].items()}
    return values

#----------------------------------------------------------------------------

def newest_run(folder: Path) -> Path:
    """The run that train.py made below `folder`."""
    return max(runs_of(folder))


def runs_of(folder: Path) -> list[Path]:
    """All runs below `folder`, which may be missing."""
    return [run for run in folder.glob("[0-9]*-*") if run.is_dir()]


def read_marker(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]] | None:
    """Settings of the demo in a folder, and the steps that ended with their values; None if it has no demo.

    Raises:
        UserError: it has something else of this name.
    """
    path = folder / MARKER
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_bytes())
        done = found.pop("done")
        if found.keys() != {"data", "seed", "san", "quick"} or found["data"] not in DEMOS:
            raise ValueError("it has other settings")
        if not all(isinstance(step["command"], str) and isinstance(step["seconds"], float) for step in done.values()):
            raise ValueError("it has other steps")
    except (ValueError, AttributeError, KeyError, TypeError) as err:
        raise UserError(f"{path}: is damaged, or of another version: name a new folder with --outdir, or delete "
                        f"{folder}") from err
    return found, done


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder, which is made if it is missing, for this demo alone until the block ends.

    Raises:
        UserError: it holds other things than a demo, or another process works in it.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise UserError(f"--outdir={folder} holds other things: name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "ab") as file:
        if try_lock(file.fileno()) is False:
            raise UserError(f"--outdir={folder}: another demo is running in it: wait until it ends, or name a new "
                            "folder")
        yield


class Steps:
    """The steps of a demo in its folder; those that ended are passed over."""

    def __init__(self, demo: Demo, folder: Path, settings: dict[str, Any], seconds: float):
        """Begin in the folder, or go on in it.

        Raises:
            UserError: it holds a demo of other settings that is not to be lost, or things that are no part of a demo.
        """
        self.folder, self.log, self.settings = folder, folder / LOG, settings
        self.done: dict[str, dict[str, Any]] = {}
        there = read_marker(folder)
        if there is not None:
            self._take_over(demo, *there)
        self._note()
        self.progress = Progress(seconds)

    def _take_over(self, demo: Demo, there: dict[str, Any], done: dict[str, dict[str, Any]]) -> None:
        """Go on with the demo that the folder holds, or delete it if it begins anew. Raises UserError."""
        if there != self.settings:
            raise UserError(f"--outdir={self.folder} holds a demo of other settings ({json.dumps(there)}): name a new "
                            "folder, or delete that one")
        if demo.resumes:
            self.done = done
            return
        names = sorted(path.name for path in self.folder.iterdir())
        if others := [name for name in names if not demo.makes(name)]:
            raise UserError(f"--outdir={self.folder} would be replaced, but holds other things, too "
                            f"({list_some(others)}): move them, or name a new folder")
        # The marker goes last, so that what a broken-off deletion leaves is still known for a demo.
        for path in sorted((self.folder / name for name in names if name != LOCK), key=lambda p: p.name == MARKER):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _note(self) -> None:
        atomic_write_text(self.folder / MARKER, json.dumps(self.settings | {"done": self.done}) + "\n")

    def __call__(self, title: str, seconds: float, command: list[str],
                 fraction: Callable[[str], float | None] = lambda line: None,
                 is_there: Callable[[], object] = lambda: True) -> dict[str, Any]:
        """Run a step, unless it ended before; returns the scores that it printed, and `seconds`, the time it took.

        Args:
            seconds: The time that is expected, for the bar.
            is_there: Whether what the step makes is still there. If it is not, the step and all later ones run again.

        Raises:
            UserError: it ended before, but with another command: that was another version of the demo.
        """
        words = " ".join(command).replace(str(self.folder), "{folder}")
        if title in self.done and is_there():
            if (before := self.done[title]["command"]) != words:
                raise UserError(f"--outdir={self.folder}: its step '{title}' was made by another version of this demo "
                                f"({before}): name a new folder, or delete that one")
            self.progress.end(seconds)
            return self.done[title]
        if title in self.done:
            self.done = dict(list(self.done.items())[:list(self.done).index(title)])
            self._note()
        started = time.time()
        output = run_step(self.progress, self.log, title, seconds, command, fraction)
        # Training prints JSON of its own.
        values = metric_values(output) if command[0] == "calc_metrics.py" else {}
        self.done[title] = values | {"command": words, "seconds": time.time() - started}
        self._note()
        return self.done[title]

#----------------------------------------------------------------------------

def make_data(demo: Demo, size: Size, step: Steps, seed: int) -> None:
    """The archives, and the networks that are trained on them."""
    folder = step.folder
    sizes = ",".join(str(stage.resolution) for stage in demo.stages)
    archives = [folder / f"{demo.archive}{stage.resolution}.zip" for stage in demo.stages]
    if demo.detector.startswith("timm:"):       # What would be missing at the end of a night is missed at once.
        step("weights of the judge", 5, ["-m", "metrics.prefetch", f"--metrics={demo.metrics}",
                                         f"--detector={demo.detector}"])
    step(f"{demo.title} at {sizes} pixels", demo.data_seconds,
         ["dataset_tool.py", f"--source={demo.source}", f"--dest={folder}/{demo.archive}", f"--resolutions={sizes}",
          "--overwrite", *([f"--max-images={size.max_images}"] if size.max_images else [])],
         is_there=lambda: all(archive.is_file() for archive in archives))
    for net in demo.nets:
        path = folder / f"{net.name}.safetensors"
        step(f"{net.name} network on half the {demo.title}", 15,
             ["-m", "training.feature_networks.train", f"--data={folder}/{demo.archive}{net.resolution}.zip",
              f"--dest={path}", f"--split={net.split}", f"--seed={seed}",
              f"--widths={net.widths}", f"--resolution={net.resolution}", f"--epochs={size.epochs}"],
             is_there=path.is_file)


def train_command(demo: Demo, number: int, size: Size, folder: Path, seed: int, san: bool) -> list[str]:
    """The command line of a stage; that of the stem lacks --path_stem."""
    stage = demo.stages[number]
    options = [option.replace("{folder}", str(folder)) for option in (*demo.options, *stage.options)]
    if number:
        options += ["--superres", "--up_factor=2", f"--path_stem={newest_run(folder / demo.stages[number - 1].folder)}"]
    return ["train.py", *options, f"--seed={seed}", f"--san={int(san)}", f"--tick={size.tick}",
            f"--outdir={folder / stage.folder}", f"--data={folder / demo.archive}{stage.resolution}.zip",
            f"--kimg={size.kimg[number]}"]


def stage_title(stage: Stage, number: int) -> str:
    """What the bar calls a stage."""
    return f"{stage.resolution}-pixel {'super-resolution stage' if number else 'stem'}"


def run_demo(demo: Demo, folder: Path, seed: int, san: bool, quick: bool) -> dict[str, Any]:
    """All steps; returns what summary.json holds."""
    size = demo.quick if quick else demo.full
    settings = {"data": demo.title, "seed": seed, "san": san, "quick": quick}
    seconds = [kimg * 1e3 / 32 * stage.seconds for kimg, stage in zip(size.kimg, demo.stages, strict=True)]
    step = Steps(demo, folder, settings, sum(seconds) + demo.data_seconds + 15 * len(demo.nets) + 50)
    make_data(demo, size, step, seed)
    for number, stage in enumerate(demo.stages):
        step(stage_title(stage, number), seconds[number], train_command(demo, number, size, folder, seed, san),
             kimg_fraction(size.kimg[number]), functools.partial(runs_of, folder / stage.folder))
    first, last = demo.stages[0], demo.stages[-1]
    stem_run, run = newest_run(folder / first.folder), newest_run(folder / last.folder)

    step("sample sheet", 5, ["gen_images.py", f"--network={run}", "--seeds=0-15", "--batch-sz=32",
                             f"--sheet={folder / SHEET}"], is_there=(folder / SHEET).is_file)
    judged = ["calc_metrics.py", f"--detector={demo.detector.replace('{folder}', str(folder))}", f"--num={size.num}"]
    before = step("score of the untrained generator", 15, [
        *judged, f"--metrics={demo.metrics_at_start}", f"--network={stem_run}/network-snapshot-000000.pkl",
        f"--data={folder}/{demo.archive}{first.resolution}.zip"])
    after = step("score of the trained generator", 25, [
        *judged, f"--metrics={demo.metrics}", f"--network={run}",
        f"--data={folder}/{demo.archive}{last.resolution}.zip", f"--out={folder}"])
    step.progress.bar.close()

    shutil.copyfile(run / "best_model.pkl", folder / BEST)
    paths = {"samples": folder / SHEET, "network": folder / BEST, "log": step.log,
             "report": run / "report.html"}
    values = {key: (before if key.endswith("_init") else after)[metric] for _, key, metric, _ in demo.rows}
    minutes = sum(found["seconds"] for found in step.done.values()) / 60
    summary = settings | values | {"minutes": minutes, "paths": {name: str(path) for name, path in paths.items()}}
    atomic_write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    return summary


def print_summary(demo: Demo, summary: dict[str, Any]) -> None:
    """Where the sheet is, and the table."""
    print(f"\nSamples, a row per class:  {summary['paths']['samples']}\n")
    rows = [(words, format(summary[key], how)) for words, key, _, how in demo.rows]
    for name, value in [*rows, ("minutes", f"{summary['minutes']:.1f}")]:
        print(f"  {name:<20s}{value:>10s}")
    print()


def default_folder(data: str, seed: int, san: bool, quick: bool) -> str:
    """Where a demo goes: each choice of settings has a folder of its own."""
    parts = ["" if data == "digits" else f"-{data}", f"-seed{seed}" if seed else "", "" if san else "-san0",
             "-quick" if quick else ""]
    return f"runs/demo{''.join(parts)}"


@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--data", type=click.Choice(list(DEMOS)), default="digits", show_default=True,
              help="Handwritten digits, or emoji (needs pip install -e '.[emoji,pretrained]')")
@click.option("--outdir", metavar="DIR", type=cli.PathType(), default=None,
              help="Where everything goes  [default: runs/demo, with the other settings in its name, such as "
                   "runs/demo-emoji-seed1]")
@click.option("--seed", metavar="INT", type=cli.Seed(), default=0, show_default=True, help="Random seed")
@click.option("--san", metavar="BOOL", type=bool, default=True, show_default=True,
              help="SAN heads; 0: plain hinge heads")
@click.option("--quick", is_flag=True, help="The same path in about two minutes, without quality to expect")
def main(data: str, outdir: str | None, seed: int, san: bool, quick: bool) -> None:
    """Train, sample and score: the main job on handwritten digits, in minutes on a CPU, or on emoji.

    The digits begin anew with each command; the emoji go on where the same command was broken off.

    \b
    Examples:
      python demo.py
      python demo.py --san=0
      python demo.py --data=emoji
    """
    demo, folder = DEMOS[data], outdir or default_folder(data, seed, san, quick)
    path = Path(folder).resolve()
    with held(path):
        print_summary(demo, run_demo(demo, path, seed, san, quick))


if __name__ == "__main__":
    main()
