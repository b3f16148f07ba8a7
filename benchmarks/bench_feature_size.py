# SPDX-License-Identifier: Apache-2.0
"""What a training step takes by the side at which the feature network sees images (`train.py --feature-size`).

    python benchmarks/bench_feature_size.py [--turns=N] [--sizes=224,112] [--device=auto]

A 16-pixel stem with the preset `light` and EfficientNet-lite0 (random weights, which take as long as trained ones) on
the digits of scikit-learn, batch 32, timed by `train.py --bench`. The sizes take turns. Writes
benchmarks/results/feature_size.md; the last line on stdout is JSON.
"""
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from torch_utils import misc  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "feature_size.md"
STEM = ("--cfg=stylegan3-t", "--preset=light", "--batch=32", "--cond=1", "--diversity=0",
        "--backbones=tf_efficientnet_lite0:random", "--metrics=none", "--workers=0", "--kimg=1")


def run(*command: str) -> str:
    """Standard output of one of the project's scripts."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def time_step(data: Path, size: int, device: str) -> dict[str, float]:
    """Seconds of one step of G and of D, and of an iteration."""
    output = run("train.py", "--bench", *STEM, f"--outdir={data.parent / 'runs'}", f"--data={data}",
                 f"--feature-size={size}", f"--device={device}")
    (stage,) = json.loads(output.strip().splitlines()[-1])["stages"]
    return {"G": stage["phases"]["Gmain"], "D": stage["phases"]["Dmain"], "iteration": stage["sec_per_iteration"]}


def page(times: dict[int, list[dict[str, float]]], device: str) -> str:
    """The table; ratios are to the first size."""
    now, compared = datetime.datetime.now(datetime.UTC), next(iter(times.values()))
    lines = ["# The side at which the feature network sees images", "",
             f"`python benchmarks/bench_feature_size.py --turns={len(compared)}`, {now:%Y-%m-%d %H:%M} UTC, "
             f"{platform.machine()}, {device}, {torch.get_num_threads()} thread(s), "
             f"torch {torch.__version__}. A 16-pixel stem, preset `light`, "
             "EfficientNet-lite0, batch 32; medians of the turns, seconds.", "",
             "| --feature-size | step of G | step of D | iteration (of each turn) | times as fast |",
             "|---|---|---|---|---|"]
    first = statistics.median(turn["iteration"] for turn in compared)
    for size, turns in times.items():
        median = {name: statistics.median(turn[name] for turn in turns) for name in turns[0]}
        every = ", ".join(f"{turn['iteration']:.2f}" for turn in turns)
        lines.append(f"| {size} | {median['G']:.2f} | {median['D']:.2f} | {median['iteration']:.2f} ({every}) | "
                     f"{first / median['iteration']:.2f} |")
    return "\n".join(lines) + "\n"


@click.command(cls=cli.Command)
@click.option("--turns", help="Measurements of each size", type=cli.IntRange(min=1), default=3, show_default=True)
@click.option("--sizes", help="The first is the one that others are compared with", type=cli.IntList(),
              default="224,112", show_default=True)
@cli.device_option()
def main(turns: int, sizes: list[int], device: str) -> None:
    """Time the sizes in turn and write the table."""
    times: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "digits16.zip"
        run("dataset_tool.py", "--source=sklearn:digits", f"--dest={data}", "--resolution=16")
        for _ in range(turns):
            for size, found in times.items():
                found.append(time_step(data, size, device))
                print(f"{size}: {found[-1]['iteration']:.2f} s per iteration", file=sys.stderr)
    atomic_write_text(RESULT, page(times, misc.select_device(device)))
    print(json.dumps({"sizes": times}))


if __name__ == "__main__":
    main()
