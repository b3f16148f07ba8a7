# SPDX-License-Identifier: Apache-2.0
"""Compile the native operations ahead of time: `python -m torch_utils.ops.build [cpu|cuda ...]`."""
import concurrent.futures
import json
import os
import time

import click
import torch

from dnnlib import UserError, cli
from torch_utils.ops import kernel_report
from torch_utils.ops.compilation import KINDS, BuildError, Target, all_targets, library


@click.command(cls=cli.Command)
@click.argument("kinds", nargs=-1, type=click.Choice(KINDS))
@click.option("--arch", metavar="LIST", default=None, help="Compile CUDA for these compute capabilities: 80,90")
@click.option("--report", is_flag=True, help=f"Compile no library: print what the compiler makes of the fast CUDA "
                                             f"programs, for --arch or {kernel_report.ARCHS}")
@click.option("--json", "as_json", is_flag=True, help="With --report: a list of objects instead of a table")
def main(kinds: tuple[str, ...], arch: str | None, report: bool, as_json: bool) -> None:
    """Compile the native operations ahead of time: KINDS are cpu and cuda; what the machine has by default."""
    if as_json and not report:
        raise click.UsageError("--json is a form of the report: add --report")
    if report:
        try:
            rows = kernel_report.make_report((arch or kernel_report.ARCHS).split(","))
        except BuildError as error:
            raise UserError(str(error)) from None
        click.echo(json.dumps(rows, indent=1) if as_json else kernel_report.table(rows))
        return
    kinds = kinds or ("cpu", *(["cuda"] if torch.cuda.is_available() or arch else []))
    def make(target: Target) -> str:
        start = time.perf_counter()
        try:
            path = library(target, retry=True)
        except BuildError as error:
            raise UserError(f"{target.kind}: {error}") from None
        return f"{target.kind}: {path} ({time.perf_counter() - start:.1f} s)"

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for line in pool.map(make, [target for kind in kinds for target in all_targets(kind, arch)]):
            click.echo(line)


if __name__ == "__main__":
    main()
