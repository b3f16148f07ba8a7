# SPDX-License-Identifier: Apache-2.0
"""The main job on real images in minutes: data, stem, super-resolution stage, samples, scores.

Every step is the command that a user would type; `make demo` runs this file. The images are the 1,797 handwritten
digits that scikit-learn ships.
"""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import tqdm

from dnnlib import UserError, cli
from dnnlib.util import atomic_write_text

HERE = Path(__file__).resolve().parent
MARKER = "demo.json"        # Says that a folder is ours and may be replaced.

# Per length: kimg of the stem and of the super-resolution stage, generated images per metric.
# As many generated images as there are real ones: recall and precision then mean the same for both sides.
FULL = {"stem_kimg": 12.8, "superres_kimg": 27.2, "epochs": 15, "num": 1797, "tick": 0.8}
QUICK = {"stem_kimg": 0.64, "superres_kimg": 0.32, "epochs": 4, "num": 500, "tick": 0.16}

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
        UserError: it failed; the end of its output is printed.
    """
    progress.start(title)
    lines = []
    with open(log, "a", encoding="utf-8") as f:
        f.write(f"\n$ {' '.join(command)}\n")
        process = subprocess.Popen([sys.executable, *command], cwd=HERE, env=os.environ | {"PYTHONIOENCODING": "utf-8"},
                                   encoding="utf-8", errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert process.stdout is not None       # It is a pipe.
        for line in process.stdout:
            lines.append(line)
            f.write(line)
            f.flush()
            share = fraction(line)
            if share is not None:
                progress.inside(seconds, share)
        process.stdout.close()
        code = process.wait()
    if code != 0:
        progress.bar.close()
        sys.stderr.write("".join(lines[-20:]))
        raise UserError(f"the step '{title}' failed with exit code {code}: its whole output is in {log}")
    progress.end(seconds)
    return "".join(lines)


def kimg_fraction(total_kimg: float) -> Callable[[str], float | None]:
    """Reads how far a training run is from its status line."""
    def fraction(line: str) -> float | None:
        match = re.match(r"tick \S+\s+kimg (\S+)", line)
        return float(match[1]) / total_kimg if match else None
    return fraction


def metric_values(output: str) -> dict[str, float]:
    """The values in the JSON lines that calc_metrics.py prints."""
    values: dict[str, float] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            values |= json.loads(line)["results"]
    return values

#----------------------------------------------------------------------------

def prepare_folder(folder: Path) -> None:
    """An empty folder; one of an earlier demo is replaced, anything else is refused."""
    if folder.exists():
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise UserError(f"--outdir={folder} holds other things: name a new folder")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def newest_run(folder: Path) -> Path:
    """The run that train.py made below `folder`."""
    return max(p for p in folder.iterdir() if p.is_dir())


def train_commands(folder: Path, size: dict[str, float], seed: int, san: bool) -> tuple[list[str], list[str]]:
    """Command lines of the two stages; the second lacks --path_stem."""
    features = folder / "features.safetensors"
    common = ["train.py", "--cfg=stylegan3-t", "--preset=demo", "--cond=1", f"--seed={seed}", f"--san={int(san)}",
              f"--backbones={features}", "--metrics=none",
              f"--tick={size['tick']}", "--snap=1000", "--workers=0"]
    stem = [*common, f"--outdir={folder / 'stem'}", f"--data={folder / 'digits16.zip'}", "--glr=0.005", "--dlr=0.004",
            f"--kimg={size['stem_kimg']}"]
    superres = [*common, f"--outdir={folder / 'superres'}", f"--data={folder / 'digits32.zip'}", "--superres",
                "--up_factor=2", "--glr=0.008", "--dlr=0.0064", "--diversity=2", "--cls_weight=8",
                f"--classifier={features}", f"--kimg={size['superres_kimg']}"]
    return stem, superres


def run_demo(folder: Path, seed: int, san: bool, quick: bool) -> dict[str, Any]:
    """All steps; returns what summary.json holds."""
    size = QUICK if quick else FULL
    started = time.time()
    prepare_folder(folder)
    settings = {"seed": seed, "san": san, "quick": quick}
    atomic_write_text(folder / MARKER, json.dumps(settings) + "\n")
    log = folder / "log.txt"
    speed = 0.36                                        # Seconds per iteration of 32 images: for the bar only.
    seconds = {"data": 10.0, "nets": 30.0, "stem": size["stem_kimg"] * 1e3 / 32 * speed,
               "superres": size["superres_kimg"] * 1e3 / 32 * speed * 1.3, "score": 45.0}
    progress = Progress(sum(seconds.values()))

    def step(title: str, share: float, command: list[str], fraction: Any = lambda line: None) -> str:
        return run_step(progress, log, title, share, command, fraction)

    for resolution in (16, 32):
        step(f"digits at {resolution} pixels", seconds["data"] / 2,
             ["dataset_tool.py", "--source=sklearn:digits", f"--dest={folder}/digits{resolution}.zip",
              f"--resolution={resolution}"])
    # Half 0 guides the training, half 1 judges the result.
    for half, name, resolution, widths in ((0, "features", 16, "64,128,256"), (1, "judge", 32, "48,96,192")):
        step(f"{name} network on half the digits", seconds["nets"] / 2,
             ["-m", "training.feature_networks.train", f"--data={folder}/digits{resolution}.zip",
              f"--dest={folder}/{name}.safetensors", f"--split={half}/2", f"--seed={seed}", f"--widths={widths}",
              f"--resolution={resolution}", f"--epochs={size['epochs']}"])
    stem, superres = train_commands(folder, size, seed, san)
    step("16-pixel stem", seconds["stem"], stem, kimg_fraction(size["stem_kimg"]))
    stem_run = newest_run(folder / "stem")
    step("32-pixel super-resolution stage", seconds["superres"], [*superres, f"--path_stem={stem_run}"],
         kimg_fraction(size["superres_kimg"]))
    run = newest_run(folder / "superres")

    step("sample sheet", seconds["score"] / 9, ["gen_images.py", f"--network={run}", "--seeds=0-15", "--batch-sz=32",
                                                f"--sheet={folder}/samples.png"])
    judged = ["calc_metrics.py", f"--detector={folder}/judge.safetensors", f"--num={size['num']}"]
    before = metric_values(step("score of the untrained generator", seconds["score"] * 3 / 9, [
        *judged, "--metrics=fid,accuracy", f"--network={stem_run}/network-snapshot-000000.pkl",
        f"--data={folder}/digits16.zip"]))
    after = metric_values(step("score of the trained generator", seconds["score"] * 5 / 9, [
        *judged, "--metrics=fid,kid,pr,accuracy", f"--network={run}", f"--data={folder}/digits32.zip"]))
    progress.bar.close()

    shutil.copyfile(run / "best_model.pkl", folder / "best_model.pkl")
    summary = settings | {
        "fid_init": before["fid"], "fid": after["fid"], "kid": after["kid"], "precision": after["pr_precision"],
        "recall": after["pr_recall"], "accuracy_init": before["accuracy"], "accuracy": after["accuracy"],
        "minutes": (time.time() - started) / 60,
        "paths": {"samples": str(folder / "samples.png"), "network": str(folder / "best_model.pkl"), "log": str(log)}}
    atomic_write_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def print_summary(summary: dict[str, Any]) -> None:
    """Where the sheet is, and the table."""
    print(f"\nSamples, a row per class:  {summary['paths']['samples']}\n")
    rows = [("FID at start", f"{summary['fid_init']:.1f}"), ("FID now", f"{summary['fid']:.3f}"),
            ("accuracy at start", f"{summary['accuracy_init']:.1%}"), ("accuracy now", f"{summary['accuracy']:.1%}"),
            ("precision", f"{summary['precision']:.2f}"), ("recall", f"{summary['recall']:.2f}"),
            ("KID", f"{summary['kid']:.2e}"), ("minutes", f"{summary['minutes']:.1f}")]
    for name, value in rows:
        print(f"  {name:<20s}{value:>10s}")
    print()


@click.command(cls=cli.Command)
@click.option("--outdir", metavar="DIR", type=cli.PathType(), default="runs/demo", show_default=True,
              help="Where everything goes")
@click.option("--seed", metavar="INT", type=cli.Seed(), default=0, show_default=True, help="Random seed")
@click.option("--san", metavar="BOOL", type=bool, default=True, show_default=True,
              help="SAN heads; 0: plain hinge heads")
@click.option("--quick", is_flag=True, help="The same path in about two minutes, without quality to expect")
def main(outdir: str, seed: int, san: bool, quick: bool) -> None:
    """Train on handwritten digits, sample and score: the main job in minutes on a CPU.

    \b
    Examples:
      python demo.py
      python demo.py --san=0 --outdir=runs/demo-hinge
    """
    print_summary(run_demo(Path(outdir).resolve(), seed, san, quick))


if __name__ == "__main__":
    main()
