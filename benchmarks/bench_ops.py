# SPDX-License-Identifier: Apache-2.0
"""The operations at layers of real networks: native code against the reference.

    python benchmarks/bench_ops.py [--quick] [--threads=N]

Reference is the form that the official reference code uses: zero-insertion, padding and grouped convolutions. All forms
are measured in turn within one run; the table gives medians and quartiles. Memory is the peak of one forward and
backward pass above what stood before, in a process of its own. Writes benchmarks/results/ops.md; the last line on
stdout is JSON.
"""
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from torch_utils.ops import dispatch  # noqa: E402
from torch_utils.ops.bias_act import bias_act  # noqa: E402
from torch_utils.ops.filtered_lrelu import filtered_lrelu  # noqa: E402
from torch_utils.ops.upfirdn2d import upfirdn2d  # noqa: E402

SPECS = ROOT / "tests" / "parity" / "data" / "layer_specs.json"     # Layer tables of the published recipes.
RESULT = ROOT / "benchmarks" / "results" / "ops.md"
NUM_LAYERS = 8
VALUES = 1 << 20            # Per input, about: a layer gets as many channels as that allows, at most its own number.
OPS = ("filtered_lrelu", "upfirdn2d", "bias_act")
FORMS = ("ref", "matrix", "cpu")
TARGETS = {"filtered_lrelu": 6.0, "upfirdn2d": 3.0, "bias_act": 1.5}
MEMORY_TARGET = 3.0

#----------------------------------------------------------------------------

def real_layers() -> list[dict]:
    """Different shapes of the recipes, spread over their sizes."""
    found = {}
    for spec in json.loads(SPECS.read_text(encoding="utf-8")):
        for layer in spec["layers"]:
            if layer["torgb"] or layer["radial_down"]:
                continue
            key = (layer["in_size"][0], layer["out_size"][0], layer["up"], layer["down"], *layer["padding"])
            found.setdefault(key, layer)
    layers = [found[key] for key in sorted(found)]
    step = max((len(layers) - 1) / (NUM_LAYERS - 1), 1)
    return [layers[round(i * step)] for i in range(min(NUM_LAYERS, len(layers)))]


def lowpass(taps: int) -> torch.Tensor | None:
    """Any separable filter of that length: its values move no time."""
    return None if taps == 1 else torch.hann_window(taps + 2, periodic=False)[1:-1] * 2 / (taps + 1)


def make_call(op: str, layer: dict, impl: str, values: int = VALUES) -> Callable[[], None]:
    """Forward and backward pass of an operation with one image of the layer's size."""
    h, w = layer["in_size"]
    channels = max(min(layer["out_channels"], values // (h * w)), 16)
    x = torch.randn(1, channels, h, w, requires_grad=True)
    b = torch.randn(channels, requires_grad=True)
    fu, fd, up = lowpass(layer["up_taps"]), lowpass(layer["down_taps"]), layer["up"]
    down, padding = layer["down"], layer["padding"]
    forward = {
        "filtered_lrelu": lambda: filtered_lrelu(x, fu, fd, b, up, down, padding, clamp=256, impl=impl),
        "upfirdn2d": lambda: upfirdn2d(x, fu, up, padding=padding, gain=up**2, impl=impl),
        "bias_act": lambda: bias_act(x, b, act="lrelu", clamp=256, impl=impl),
    }[op]
    with torch.no_grad():
        dy = torch.randn_like(forward())
    inputs = [x] if op == "upfirdn2d" else [x, b]
    return lambda: torch.autograd.grad(forward(), inputs, dy)


def measure(calls: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of each, measured in turn for about that long."""
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def peak_memory(layer: dict, impl: str) -> int:
    """Bytes that a forward and backward pass of filtered_lrelu takes at most, measured in another process."""
    command = [sys.executable, __file__, "--peak", json.dumps([layer, impl])]
    return int(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.split()[-1])


def print_peak(layer: dict, impl: str) -> None:
    """The body of that process."""
    make_call("filtered_lrelu", layer, impl, VALUES // 16)()    # Code is loaded, threads stand.
    call = make_call("filtered_lrelu", layer, impl, 4 * VALUES)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")               # Forget the highest mark.
    before = memory_status("VmRSS")
    call()
    click.echo(memory_status("VmHWM") - before)


def memory_status(name: str) -> int:
    """Bytes in a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"/proc/self/status has no {name}: memory can be measured on Linux only")

#----------------------------------------------------------------------------

def layer_name(layer: dict) -> str:
    return (f"{layer['in_size'][0]} -> {layer['out_size'][0]}, up {layer['up']}, down {layer['down']}, "
            f"{layer['up_taps']}/{layer['down_taps']} taps")


def cell(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{1e3 * middle:.2f} ({1e3 * low:.2f}-{1e3 * high:.2f})"


def time_table(op: str, layers: list[dict], seconds: float) -> tuple[str, list[float]]:
    """Markdown rows, and the speedup of native code over the reference for each layer."""
    forms = [form for form in FORMS if form != "matrix" or op != "bias_act"]
    rows, speedups = [], []
    for layer in layers:
        times = measure({form: make_call(op, layer, form) for form in forms}, seconds)
        speedups.append(statistics.median(times["ref"]) / statistics.median(times["cpu"]))
        cells = " | ".join(cell(times[form]) for form in forms)
        rows.append(f"| {layer_name(layer)} | {cells} | {speedups[-1]:.1f} |")
    head = f"| layer | {' | '.join(f'{form}, ms' for form in forms)} | ref / cpu |\n|---|{'---|' * (len(forms) + 1)}"
    return "\n".join([f"## {op}, forward and backward\n", head, *rows, ""]), speedups


def memory_table(layers: list[dict]) -> tuple[str, list[float]]:
    """Markdown rows, and the ratio of the reference's memory to ours for each layer."""
    rows, ratios = [], []
    for layer in layers:
        peaks = {form: peak_memory(layer, form) for form in FORMS}
        ratios.append(peaks["ref"] / max(peaks["cpu"], 1))
        cells = " | ".join(f"{peaks[form] / 2**20:.0f}" for form in FORMS)
        rows.append(f"| {layer_name(layer)} | {cells} | {ratios[-1]:.1f} |")
    head = "| layer | ref, MiB | matrix, MiB | cpu, MiB | ref / cpu |\n|---|---|---|---|---|"
    return "\n".join(["## Peak memory of filtered_lrelu\n", head, *rows, ""]), ratios


@click.command(cls=cli.Command)
@click.option("--quick", is_flag=True, help="Three layers, short measurements, no file")
@click.option("--threads", metavar="INT", type=cli.IntRange(min=1), help="Threads in use  [default: its own choice]")
@click.option("--peak", hidden=True, default=None)
def main(quick: bool, threads: int | None, peak: str | None) -> None:
    """Measure native operations against the reference at real layer shapes."""
    if peak is not None:
        print_peak(*json.loads(peak))
        return
    torch.set_num_threads(threads or torch.get_num_threads())
    if not dispatch.describe("cpu").endswith("native"):
        raise UserError(f"{dispatch.describe('cpu')}: there is nothing to measure")
    layers = real_layers()[:: 3 if quick else 1]
    parts, speedup = [], {}
    for op in OPS:
        text, ratios = time_table(op, layers, 1 if quick else 2)
        parts.append(text)
        speedup[op] = round(statistics.geometric_mean(ratios), 2)
        click.echo(text)
    text, ratios = memory_table(layers[:1] if quick else layers[::2])
    click.echo(text)
    speedup["memory of filtered_lrelu"] = round(statistics.geometric_mean(ratios), 2)
    targets = {**TARGETS, "memory of filtered_lrelu": MEMORY_TARGET}
    summary = "\n".join(["| what | reference / native, geometric mean | target |", "|---|---|---|",
                         *(f"| {name} | {value} | {targets[name]} |" for name, value in speedup.items())])
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = (f"# Operations\n\n`python benchmarks/bench_ops.py`, {today}, {platform.machine()}, "
            f"{torch.get_num_threads()} thread(s), torch {torch.__version__}. Median (quartiles) in milliseconds, "
            f"float32, one image.\n\n{summary}\n")
    if not quick:
        atomic_write_text(RESULT, "\n".join([head, *parts, text]))
    click.echo(head)
    click.echo(json.dumps({"speedup": speedup}))


if __name__ == "__main__":
    main()
