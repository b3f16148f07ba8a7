# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the fast CUDA programs: `python benchmarks/kernel_report.py` (no GPU needed, some minutes).

Writes benchmarks/results/kernels.json, which a test holds against the bounds and the sources, and kernels.md.
"""
import json
import subprocess
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dnnlib import UserError, cli
from dnnlib.util import atomic_write_text
from torch_utils.ops import kernel_report
from torch_utils.ops.compilation import BuildError, cuda_target

RESULTS = Path(__file__).resolve().parent / "results"

HEAD = """# What the compiler makes of the fast CUDA programs

Made by `python benchmarks/kernel_report.py` with {compiler}. No GPU was needed, and none has run
them for this table. [docs/ops.md](../../docs/ops.md) says what the columns are. Bounds that a test
holds: no spilled and no local bytes; 240 instructions per value for 2/2 with 12/12 taps, 330 for 4/2
with 24/12, 1.3 times as many for their gradients; 45 % of the instructions multiply and add.

| program | GPU | registers | spilled, local bytes | instructions per value | multiply-adds |
|---|---|---|---|---|---|
"""


@click.command(cls=cli.Command)
def main() -> None:
    """Compile the fast CUDA programs for three generations of GPUs and write down what came of it."""
    try:
        rows = kernel_report.make_report(kernel_report.ARCHS.split(","))
    except BuildError as error:
        raise UserError(str(error)) from None
    told = subprocess.run([cuda_target("80").compiler, "--version"], capture_output=True, encoding="utf-8", check=True)
    compiler = told.stdout.strip().splitlines()[-1]
    content = {"compiler": compiler, "sources": kernel_report.sources_hash(), "rows": rows}
    atomic_write_text(RESULTS / "kernels.json", json.dumps(content, indent=1) + "\n")
    lines = []
    for row in rows:
        cells = (row["kernel"].removeprefix("filtered_lrelu "), row["arch"], row["registers"],
                 f"{row['spill_bytes']}, {row['local_bytes']}", row["instructions_per_output"],
                 f"{row['ffma_share']:.0%}")
        lines.append("".join(f"| {cell} " for cell in cells) + "|\n")
    atomic_write_text(RESULTS / "kernels.md", HEAD.format(compiler=f"nvcc ({compiler})") + "".join(lines))
    click.echo(f"{RESULTS / 'kernels.md'}: {len(rows)} programs")


if __name__ == "__main__":
    main()
