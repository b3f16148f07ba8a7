# SPDX-License-Identifier: Apache-2.0
"""The tables of the kept runs of `python -m transport.san_dcgan`.

    python benchmarks/san_dcgan_table.py

Reads the folders in benchmarks/results/transport_san_dcgan, each of which has the finished runs of one command (what
its --outdir holds in `runs`), and writes benchmarks/results/transport_san_dcgan.md.
"""
import dataclasses
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text, first_line, parse_json  # noqa: E402
from transport.san.adversarial import MODELS  # noqa: E402
from transport.san.dcgan import Config, Measurement, Run, load_run  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
FILE_NAME = re.compile(r"(\w+)-(\w+)-(\d+)\.json")          # Loss, model and seed.
# Runs know images by a hash, not by a name.
ARCHIVES = {"images with the hash f6a237b2bf3446fd": "emoji16.zip"}
STEPS = (1000, 2000, 3000, 5000, 10_000)                    # That are shown of longer histories.

INTRODUCTION = """# SAN on a DCGAN of small images

Made by `python benchmarks/san_dcgan_table.py` of the runs in the folder of the same name. A file is one run, with its
settings, 50 samples of the last step and all measurements; a command with `--outdir=OUT` goes on with the runs that are
missing once the files of its folder lie in `OUT/runs`. The runs were made on x86-64 with torch 2.15, one thread each.

Score: as many samples as there are real images, in the 64 features of a classifier that was trained on every second
image. Precision and recall have k = 3. For the digits the classifier has 96.7 % right on the other half, and one half
of the digits against the other reads 6.25, 0.934, 0.925, all classes; for the emoji 77.4 % and 5.00, 0.937, 0.917, all
classes. `emoji16.zip` is what `dataset_tool.py --source=openmoji --dest=emoji --resolutions=16` writes. The columns
after the recall are SAN's conditions ([docs/transport.md](../../docs/transport.md#san-on-any-gan)). Where two values
stand, the first is the GAN's and the second SAN's; a deviation is that over seeds."""

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Folder:
    """The runs of one command."""

    name: str
    config: Config
    runs: list[Run]

    @property
    def losses(self) -> list[str]:
        """In the order of the files."""
        return list(dict.fromkeys(run.loss for run in self.runs))

    def of(self, loss: str, model: str) -> dict[int, Run]:
        """Seed -> run."""
        return {run.seed: run for run in self.runs if (run.loss, run.model) == (loss, model)}

    def command(self) -> str:
        """What it takes to make these runs."""
        default = Config(loss=self.losses[0] if len(self.losses) == 1 else "all")
        config = dataclasses.replace(self.config, data=ARCHIVES.get(self.config.data, self.config.data))
        words = [f"--{field.name}={getattr(config, field.name)}" for field in dataclasses.fields(Config)
                 if getattr(config, field.name) != getattr(default, field.name) and field.name != "loss"]
        words += [] if default.loss == Config().loss else [f"--loss={default.loss}"]
        return " ".join(["python -m transport.san_dcgan", *words])


def read_folder(folder: Path) -> Folder:
    """Raises UserError: a file is no run, or was made with other settings than the first."""
    runs: list[Run] = []
    config, settings = Config(), {}
    for path in sorted(folder.iterdir()):
        match = FILE_NAME.fullmatch(path.name)
        if match is None:
            raise UserError(f"{path}: is no run of transport.san_dcgan: move it away")
        if not runs:
            try:
                settings = parse_json(path.read_bytes())["settings"]
                config = Config(**settings)
            except (OSError, ValueError, KeyError, TypeError) as err:
                raise UserError(f"{path}: damaged ({first_line(err)}): copy it again") from err
        runs.append(load_run(config, settings, path, match[1], match[2], int(match[3])))
    if not runs:
        raise UserError(f"{folder}: has no runs: remove it")
    return Folder(folder.name, config, runs)

#----------------------------------------------------------------------------

def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def both(pair: Sequence[float], digits: int) -> str:
    """Two values, the GAN's and SAN's."""
    return " / ".join(f"{value:.{digits}f}" for value in pair)


def by_step(runs: dict[int, Run]) -> dict[int, dict[int, Measurement]]:
    """Step -> seed -> measurement."""
    found: dict[int, dict[int, Measurement]] = {}
    for seed, run in runs.items():
        for measurement in run.history:
            found.setdefault(measurement.iteration, {})[seed] = measurement
    return found


def tables_of(folder: Folder, loss: str) -> str:
    """Means over seeds, then every seed that both models have."""
    gan, san = (by_step(folder.of(loss, model)) for model in MODELS)
    means, rows = [], []
    for step in [step for step in gan if step in san and (step in STEPS or step == max(gan))]:
        seeds = sorted(gan[step].keys() & san[step].keys())
        pairs = [(gan[step][seed], san[step][seed]) for seed in seeds]
        for seed, pair in zip(seeds, pairs, strict=True):
            scores, conditions = zip(*((m.score, m.conditions) for m in pair), strict=True)
            rows.append([f"{step:,}", str(seed), both([s.fid for s in scores], 1), both([s.classes for s in scores], 0),
                         both([s.precision for s in scores], 2), both([s.recall for s in scores], 2),
                         both([c.inner_product for c in conditions], 2), both([c.separability for c in conditions], 2),
                         both([c.pair_ratio for c in conditions], 2), both([c.stretch for c in conditions], 2),
                         both([c.slope for c in conditions], 1)])
        if len(seeds) > 1:
            columns = list(zip(*pairs, strict=True))
            better = sum(b.score.fid < a.score.fid for a, b in pairs)
            means.append([f"{step:,}", *(f"{statistics.fmean(m.score.fid for m in column):.1f} "
                                         f"({statistics.stdev(m.score.fid for m in column):.1f})"
                                         for column in columns), f"{better} of {len(seeds)}",
                          both([statistics.fmean(m.score.classes for m in column) for column in columns], 1),
                          both([statistics.fmean(m.conditions.inner_product for m in column) for column in columns], 2),
                          both([statistics.fmean(m.conditions.slope for m in column) for column in columns], 1)])
    parts = [table(["steps", "seed", "Frechet distance", "classes", "precision", "recall", "inner product",
                    "separability", "pair ratio", "stretch", "slope"], rows)]
    if means:
        parts.insert(0, table(["steps", "GAN, mean (deviation)", "SAN, mean (deviation)", "SAN is better", "classes",
                               "inner product", "slope"], means))
    return "\n\n".join(parts)


def page(folders: Sequence[Folder]) -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for folder in folders:
        parts.append(f"## {folder.name}\n\n`{folder.command()}`")
        for loss in folder.losses:
            parts += ([f"### {loss}"] if len(folder.losses) > 1 else []) + [tables_of(folder, loss)]
    return "\n\n".join(parts) + "\n"


@click.command(cls=cli.Command)
@click.option("--runs", metavar="DIR", type=cli.PathType(), default=str(RESULTS / "transport_san_dcgan"),
              help="Folder with a folder of runs per command")
@click.option("--dest", metavar="FILE", type=cli.PathType(), default=str(RESULTS / "transport_san_dcgan.md"),
              help="The page")
def main(runs: str, dest: str) -> None:
    """Write the tables of kept runs."""
    if not Path(runs).is_dir():
        raise UserError(f"--runs={runs}: is no folder: name the one that has the folders of runs")
    folders = [read_folder(path) for path in sorted(Path(runs).iterdir()) if path.is_dir()]
    atomic_write_text(dest, page(folders))
    print(json.dumps({folder.name: len(folder.runs) for folder in folders}))


if __name__ == "__main__":
    main()
