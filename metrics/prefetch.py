# SPDX-License-Identifier: Apache-2.0
"""Lists and fetches the files of weights that a run will need: python -m metrics.prefetch.

With `--weights=DIR` downloads go there; on a machine without network, name the copied folder by the same flag.
"""
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import click

import dnnlib.cli
from dnnlib import UserError
from dnnlib.download import Asset, Found, default_place, find_asset, is_offline, locate
from dnnlib.util import format_bytes, list_some
from metrics.detectors import asset_of
from metrics.jobs import plan
from metrics.options import MetricOptions
from metrics.protocols import GeneratorKind

#----------------------------------------------------------------------------

@dataclasses.dataclass
class Need:
    """A file and who needs it."""

    asset: Asset
    users: list[str]            # Metrics.
    place: str                  # Where it is, or would be put.
    state: str
    problem: str | None = None  # Why it cannot be had.


def needed_assets(names: Sequence[str], options: MetricOptions) -> dict[Asset, list[str]]:
    """Files that these metrics need, each with the names of the metrics.

    Raises:
        UserError: unknown metric or detector.
    """
    needs: dict[Asset, list[str]] = {}
    for job in plan(names, options):
        kind = job.metric.kind
        one = None if isinstance(kind, GeneratorKind) else asset_of(job.detector)
        assets = kind.assets if isinstance(kind, GeneratorKind) else (one,) if one else ()
        for asset in assets:
            needs.setdefault(asset, []).append(job.metric.name)
    return needs


def prefetch(names: Sequence[str], options: MetricOptions, dry_run: bool = False) -> list[Need]:
    """Find, or fetch, every file; failures are noted, not raised, so that one does not keep the others.

    Args:
        names: Metrics.
        options: `weights_dir` is looked in first, and downloads go there; else into the cache.
        dry_run: Fetch nothing.

    Raises:
        UserError: unknown metric or detector.
    """
    needs = []
    folders = [options.weights_dir] if options.weights_dir else []
    for asset, users in needed_assets(names, options).items():
        need = Need(asset, users, str(default_place(asset, options.weights_dir)), "to be fetched")
        try:
            found = locate(asset, folders, options.allow_unverified)
            if found is not None:
                need.place, need.state = str(found.path), _state(found)
            elif not dry_run:
                if asset.obstacle is None and not (options.offline or is_offline()):
                    print(f"{asset.filename} ({_size(asset)}): fetching", file=sys.stderr)
                find_asset(asset, folders, options.offline, into=options.weights_dir)
                need.state = "fetched"
            elif asset.obstacle is not None:
                need.state = "missing, and not to be fetched"
        except UserError as err:
            need.state, need.problem = "missing", str(err)
        needs.append(need)
    return needs


def _state(found: Found) -> str:
    return "on this machine" if found.verified else "on this machine, unverified"


def _size(asset: Asset) -> str:
    return format_bytes(asset.size) if asset.size else "size unknown"


def listing(needs: Sequence[Need]) -> str:
    """For people: one block per file."""
    blocks = []
    for need in needs:
        asset = need.asset
        rows = [("size", _size(asset)), ("url", asset.url), ("sha256", asset.sha256 or "not published"),
                ("place", need.place), ("for", ", ".join(need.users)), ("state", need.state)]
        blocks.append("\n".join([asset.filename, *(f"  {key:<8}{value}" for key, value in rows)]))
    return "\n".join(blocks)

#----------------------------------------------------------------------------

@click.command(cls=dnnlib.cli.Command)
@click.option("--metrics", metavar="NAME,NAME...", type=dnnlib.cli.StrList(), required=True,
              help="Metrics of the run, as for calc_metrics.py")
@click.option("--detector", metavar="NAME", type=dnnlib.cli.PathType(),
              help="Detector of the metrics that leave it open")
@click.option("--weights", metavar="DIR", type=dnnlib.cli.PathType(),
              help="Folder to look in first and to put downloads in  [default: the cache]")
@click.option("--offline", is_flag=True, help="Never download")
@click.option("--dry-run", is_flag=True, help="List only")
@click.option("--allow-unverified-weights", is_flag=True, help="Accept files that are not the published ones")
def main(**opts: Any) -> None:
    """List and fetch the files of weights that metrics need.

    Example:

    \b
      python -m metrics.prefetch --metrics=adm,fd_dinov2_50k --weights=weights/
    """
    options = MetricOptions(detector=opts["detector"], weights_dir=opts["weights"], offline=opts["offline"] or None,
                            allow_unverified=opts["allow_unverified_weights"])
    needs = prefetch(opts["metrics"], options, opts["dry_run"])
    print(listing(needs) or f"{', '.join(opts['metrics']) or 'no metrics'}: no files are needed")
    problems = [need.problem for need in needs if need.problem]
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        for problem in problems:
            print(problem, file=sys.stderr)
        names = list_some([need.asset.filename for need in needs if need.problem])
        raise UserError(f"{len(problems)} of {len(needs)} files are missing: {names}")


if __name__ == "__main__":
    main()
