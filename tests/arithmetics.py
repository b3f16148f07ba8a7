# SPDX-License-Identifier: Apache-2.0
"""Run the numeric tests under arithmetics that round differently: `make test-arithmetics`.

One processor rounds in one way, and a test that passes on it may still depend on it. The libraries can be told to
compute as on other processors (older instructions, other block sizes and so other orders of summation) and with more
threads. Under each of these settings the tests with the marker `numeric` run, and every comparison that goes through
`tests.closeness` tells what share of its bound its error used up. A share above 1 is a failure; one above a third means
that yet another processor might fail, so that the bound has to be derived anew.
"""
import collections
import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402

MAX_SHARE = 1 / 3
MAX_SECONDS = 3600          # For one setting: the tests take some minutes.
FOLDER = ROOT / "build" / "arithmetics"
RESULT = ROOT / "docs" / "arithmetics.md"

#----------------------------------------------------------------------------
# The settings.


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Environment variables that change how numbers are rounded, and what they need."""

    what: str
    threads: int = 1
    needs: str = "DEFAULT"          # torch.backends.cpu.get_cpu_capability(), at least.
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def is_possible(self) -> bool:
        """Whether this machine has the instructions."""
        order = ["DEFAULT", "AVX2", "AVX512"]
        has = torch.backends.cpu.get_cpu_capability()
        return self.needs == "DEFAULT" or (has in order and order.index(has) >= order.index(self.needs))


AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OPENBLAS_CORETYPE": "Haswell"}
OLDEST = {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
          "OPENBLAS_CORETYPE": "Nehalem"}

ARITHMETICS = {
    "default": Arithmetic("the machine as it is"),
    "threads": Arithmetic("the machine as it is, two threads", threads=2),
    "avx2": Arithmetic("oneDNN, PyTorch and OpenBLAS as on a processor with AVX2", needs="AVX2", variables=AVX2),
    "avx512": Arithmetic("oneDNN and OpenBLAS as on a processor with AVX-512 and without AMX, two threads", threads=2,
                         needs="AVX512",
                         variables={"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "OPENBLAS_CORETYPE": "SkylakeX"}),
    "onednn-sse41": Arithmetic("oneDNN with SSE4.1, two threads", threads=2,
                               variables={"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "aten": Arithmetic("PyTorch's own loops without vector instructions", variables={"ATEN_CPU_CAPABILITY": "default"}),
    "mkl": Arithmetic("MKL's oldest code path", variables={"MKL_CBWR": "COMPATIBLE"}),
    "reference": Arithmetic("operations in plain PyTorch", variables={"STYLESAN_OPS": "reference"}),
    "oldest": Arithmetic("all of them on their oldest path, operations in plain PyTorch",
                         variables={**OLDEST, "STYLESAN_OPS": "reference"}),
}


def environment(arithmetic: Arithmetic) -> dict[str, str]:
    """The environment of the tests: of what changes rounding only what the setting says."""
    changing = {name for a in ARITHMETICS.values() for name in a.variables}
    kept = {name: value for name, value in os.environ.items() if name not in changing}
    return kept | arithmetic.variables | {"OMP_NUM_THREADS": str(arithmetic.threads)}

#----------------------------------------------------------------------------
# Running and reading.


def run_tests(name: str, jobs: int, more: tuple[str, ...]) -> Path:
    """Run the numeric tests under one setting; returns the file with a record per test.

    Raises:
        UserError: they do not end, or leave no records.
    """
    arithmetic = ARITHMETICS[name]
    FOLDER.mkdir(parents=True, exist_ok=True)
    records, log = FOLDER / f"{name}.json", FOLDER / f"{name}.log"
    records.unlink(missing_ok=True)
    jobs = max(jobs // arithmetic.threads, 1)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "numeric", f"--closeness={records}", "-n", str(jobs),
               "--dist", "loadfile", *more]
    with log.open("w", encoding="utf-8") as file:
        try:
            subprocess.run(command, cwd=ROOT, env=environment(arithmetic), stdout=file, stderr=subprocess.STDOUT,
                           timeout=MAX_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise UserError(f"{name}: the tests did not end within {MAX_SECONDS // 60} minutes; see {log}") from None
    if not records.exists():
        raise UserError(f"{name}: the tests left no records; see {log}")
    return records


Records = list[dict[str, Any]]


def failures(records: Records) -> list[str]:
    """Tests that failed."""
    return [record["test"] for record in records if record["outcome"] == "failed"]


def above(records: Records) -> Records:
    """Tests with a comparison that used more than a third of its bound."""
    return [record for record in records if record["share"] is not None and not record["share"] <= MAX_SHARE]


def by_file(records: Records) -> dict[str, float]:
    """Largest share of the comparisons in every test file that has any."""
    shares: dict[str, float] = collections.defaultdict(float)
    for record in records:
        if record["share"] is not None:
            name = record["test"].split("::")[0]
            shares[name] = max(shares[name], record["share"])
    return dict(shares)


def table(results: dict[str, Records]) -> str:
    """The page `docs/arithmetics.md`."""
    files = {name: by_file(records) for name, records in results.items()}
    tests = collections.Counter(record["test"].split("::")[0] for record in next(iter(results.values()), [])
                                if record["share"] is not None)
    lines = [
        "# Arithmetics that round differently", "",
        "What a test computes depends a little on the processor: on the order in which sums are taken, and on fused",
        "multiplications. `make test-arithmetics` runs every numeric test under the settings below and writes this",
        "page. A number is the largest error of the file's tests in units of their bound: 1 would fail, and what is",
        "above a third has to be derived anew. `tests/closeness.py` says how it is measured. What rounding does not",
        "decide by its size only passes or fails: statistics, trained results, and gradients in single precision that",
        "pass through a leaky ReLU, whose slope changes at zero. `build/arithmetics/<setting>.json` has all tests.",
        "Continuous integration runs a part of them under `avx2` and `aten` (`make test-arithmetics-quick`).", "",
        f"Measured on {processor()}, torch {torch.__version__}, numpy {np.__version__}.", "",
        "| setting | what | variables | tests | failed | above a third |", "|---|---|---|---|---|---|"]
    for name, records in results.items():
        a = ARITHMETICS[name]
        variables = {**a.variables, "OMP_NUM_THREADS": str(a.threads)}
        told = " ".join(f"`{key}={value}`" for key, value in variables.items())
        lines.append(f"| {name} | {a.what} | {told} | {len(records)} | {len(failures(records))} | "
                     f"{len(above(records))} |")
    lines += ["", f"| test file | tests with comparisons | {' | '.join(results)} |", "|---" * (2 + len(results)) + "|"]
    for file in sorted({file for shares in files.values() for file in shares}):
        cells = [f"{shares[file]:.2g}" if file in shares else "" for shares in files.values()]
        lines.append(f"| `{file}` | {tests.get(file, 0)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The name of the processor, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()

#----------------------------------------------------------------------------


@click.command(cls=cli.Command)
@click.option("--only", metavar="NAME,...", type=cli.StrList(), help=f"Some of: {', '.join(ARITHMETICS)}")
@click.option("--jobs", metavar="INT", type=click.IntRange(min=1), default=os.cpu_count() or 1,
              help="Processor cores to use  [default: all]")
@click.option("--reuse", is_flag=True, help="Take records that are there already instead of running those tests again")
@click.option("--dest", metavar="FILE", type=click.Path(path_type=Path), help="Write the page here")
@click.argument("more", nargs=-1)
def main(only: list[str] | None, jobs: int, reuse: bool, dest: Path | None, more: tuple[str, ...]) -> None:
    """Run the numeric tests under arithmetics that round differently. MORE goes to pytest: files, or -k."""
    if unknown := sorted(set(only or ()) - set(ARITHMETICS)):
        raise UserError(f"--only={unknown[0]}: choose from {', '.join(ARITHMETICS)}")
    results: dict[str, Records] = {}
    is_well = True
    for name in only or ARITHMETICS:
        if not ARITHMETICS[name].is_possible():
            print(f"{name}: this processor has no {ARITHMETICS[name].needs}: left out", flush=True)
            continue
        start, records = time.time(), FOLDER / f"{name}.json"
        if not (reuse and records.exists()):
            records = run_tests(name, jobs, more)
        results[name] = found = json.loads(records.read_text())
        failed, near = failures(found), above(found)
        is_well &= not failed and not near and bool(found)
        print(f"{name}: {len(found)} tests, {len(failed)} failed, {len(near)} above a third of their bound, "
              f"{time.time() - start:.0f} s", flush=True)
        for test in failed:
            print(f"    failed: {test}", flush=True)
        for record in sorted(near, key=lambda r: -r["share"]):
            print(f"    {record['share']:.2f}: {record['error']:.2e} of {record['bound']:.2e} at {record['place']} in "
                  f"{record['test']}", flush=True)
    if dest is not None:
        atomic_write_text(dest, table(results))
    sys.exit(0 if is_well else 1)


if __name__ == "__main__":
    main()
