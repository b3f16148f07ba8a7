# SPDX-License-Identifier: Apache-2.0
"""What a call of an operation costs before it computes anything: tiny tensors, beside PyTorch's convolution.

    python benchmarks/bench_overhead.py [--device=cpu|cuda] [--quick]

On a GPU small layers take as long as the processor needs to start them, so this is what the path around the kernels
takes. All calls are measured in turn within one run, on one thread; the table gives medians and quartiles of rounds of
calls. Without a GPU it is CPU time, so that other programs disturb little. With one it is time of day, because backward
passes run in a thread of their own; the processor waits for the GPU only after a round. Writes
benchmarks/results/overhead.md, a section for each device; the last line on stdout is JSON.
"""
import datetime
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from torch_utils.ops import dispatch  # noqa: E402
from torch_utils.ops.bias_act import bias_act  # noqa: E402
from torch_utils.ops.filtered_lrelu import filtered_lrelu  # noqa: E402
from torch_utils.ops.upfirdn2d import upfirdn2d  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "overhead.md"
CALLS = 200                 # A round has few enough for a GPU's queue.
TARGETS = {"forward": 30.0, "forward and backward": 80.0}       # Microseconds of filtered_lrelu.

Call = Callable[[], object]

#----------------------------------------------------------------------------

def make_calls(device: torch.device) -> dict[str, dict[str, Call]]:
    """Operation -> 'without gradient', 'forward' and 'forward and backward'."""
    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, requires_grad=True)
    x, b, weight = tensor(1, 4, 4, 4), tensor(4), tensor(4, 4, 3, 3)
    taps = torch.hann_window(14, periodic=False, device=device)[1:-1] * 2 / 13
    forward: dict[str, tuple[Call, list[torch.Tensor]]] = {
        "F.conv2d": (lambda: F.conv2d(x, weight, b, padding=1), [x, weight, b]),
        "filtered_lrelu": (lambda: filtered_lrelu(x, taps, taps, b, up=2, down=2, padding=[9, 8, 9, 8], clamp=256),
                           [x, b]),
        "upfirdn2d": (lambda: upfirdn2d(x, taps, up=2, padding=[6, 5, 6, 5], gain=4), [x]),
        "bias_act": (lambda: bias_act(x, b, act="lrelu", clamp=256), [x, b]),
    }

    def calls_of(call: Call, inputs: list[torch.Tensor]) -> dict[str, Call]:
        with torch.no_grad():
            dy = torch.ones_like(call())
        def without() -> None:
            with torch.no_grad():
                call()
        return {"without gradient": without, "forward": call,
                "forward and backward": lambda: torch.autograd.grad(call(), inputs, dy)}

    return {name: calls_of(*parts) for name, parts in forward.items()}


def measure(calls: dict[str, dict[str, Call]], device: torch.device, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Microseconds per call in each round, all measured in turn; the first round does not count."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found: dict[str, dict[str, list[float]]] = {name: {what: [] for what in kinds} for name, kinds in calls.items()}
    for number in range(rounds + 1):
        for name, kinds in calls.items():
            for what, call in kinds.items():
                start = clock()
                for _ in range(CALLS):
                    call()
                seconds = clock() - start
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if number:
                    found[name][what].append(1e6 * seconds / CALLS)
    return found


def cell(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Markdown: times, and how many times those of the convolution they are."""
    kinds = list(next(iter(found.values())))
    rows = []
    for name, times in found.items():
        ratios = (statistics.median(times[what]) / statistics.median(found["F.conv2d"][what]) for what in kinds[1:])
        rows.append(f"| {name} | {' | '.join(cell(times[what]) for what in kinds)} | "
                    f"{' | '.join(f'{ratio:.1f}' for ratio in ratios)} |")
    head = [*kinds, *(f"{what}, times F.conv2d" for what in kinds[1:])]
    return "\n".join([f"| microseconds per call | {' | '.join(head)} |", f"|---|{'---|' * len(head)}", *rows])


def with_section(content: str, title: str, section: str) -> str:
    """The result file with the section of this device replaced or added."""
    parts = [part for part in re.split(r"(?m)^(?=## )", content) if part.startswith("## ")]
    parts = sorted([part for part in parts if not part.startswith(f"## {title}\n")] + [section])
    head = ("# Overhead per call\n\n`python benchmarks/bench_overhead.py`: tensors of 64 values, one thread; medians "
            "(quartiles) of rounds of\ncalls. Aimed at for filtered_lrelu: "
            f"{', '.join(f'{what} at most {limit:g}' for what, limit in TARGETS.items())}.\n\n")
    return head + "\n".join(part.rstrip() + "\n" for part in parts)


@click.command(cls=cli.Command)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None,
              help="Where tensors lie  [default: a GPU, if there is one]")
@click.option("--quick", is_flag=True, help="A short measurement, no file")
def main(device: str | None, quick: bool) -> None:
    """Measure what a call of each operation costs at the least."""
    torch.set_num_threads(1)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    found = measure(make_calls(target), target, 3 if quick else 25)
    place = torch.cuda.get_device_name(target) if target.type == "cuda" else "processor"
    medians = {name: {what: round(statistics.median(times), 1) for what, times in kinds.items()}
               for name, kinds in found.items()}
    worst = max(medians["filtered_lrelu"][what] / limit for what, limit in TARGETS.items())
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    section = (f"## {place}\n\n{today}, {platform.machine()}, torch {torch.__version__}, {dispatch.describe(target)}.\n"
               f"filtered_lrelu takes {worst:.2f} of what is aimed at.\n\n{table(found)}\n")
    click.echo(section)
    if not quick:
        content = RESULT.read_text(encoding="utf-8") if RESULT.is_file() else ""
        atomic_write_text(RESULT, with_section(content, place, section))
    click.echo(json.dumps({"device": place, "microseconds": medians}))


if __name__ == "__main__":
    main()
