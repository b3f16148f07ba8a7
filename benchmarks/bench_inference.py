# SPDX-License-Identifier: Apache-2.0
"""Images per second of the ImageNet-256 generator: ours beside the official structure.

    python benchmarks/bench_inference.py [--quick] [--threads=N] [--batch=N] [--device=auto]

The reference computes as the official code does without its CUDA extensions: a weight per sample and grouped
convolutions, resampling by zero-insertion, padding and convolution; on processors in float32, on GPUs in float16 where
the network is marked for it. Weights are random, latents and classes are the same for all forms, which take turns
within one run. Everything runs without gradients and with the memory settings of this project, from which the reference
gains, too. Writes benchmarks/results/inference.md; the last line on stdout is JSON.
"""
import contextlib
import datetime
import functools
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from torch_utils import misc  # noqa: E402
from torch_utils.images import to_uint8_metric  # noqa: E402
from torch_utils.ops import dispatch  # noqa: E402
from training import networks_stylegan3 as networks  # noqa: E402
from training.config import GeneratorConfig  # noqa: E402
from training.generator.layer_schedule import stem_config, superres_config  # noqa: E402
from training.generator.synthesis import synthesize  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "inference.md"
TURNS = 5
TARGET = 3.0
CLASSES = 1000
PARTS = ("modulated_conv2d", "filtered_lrelu")

#----------------------------------------------------------------------------
# The network, and the reference form of it.

def recipe_config(quick: bool) -> GeneratorConfig:
    """ImageNet-256: a stem at 16 pixels and four stages; quick: a narrow one at 64."""
    sizes = (16, 7, 8192, 128) if quick else (16, 10, 65536, 1024)
    config = stem_config(*sizes, c_dim=CLASSES)
    for _ in range(2 if quick else 4):
        config = superres_config(config, 2, 4 if quick else 7)
    return config


def grouped_modulated_conv2d(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool,
                             padding: int, input_gain: torch.Tensor) -> torch.Tensor:
    """A weight for every sample, convolved in groups: arguments as in `modulated_conv2d`."""
    n = len(x)
    if demodulate:
        weight = weight * weight.square().mean(dim=[1, 2, 3], keepdim=True).rsqrt()
        styles = styles * styles.square().mean().rsqrt()
    weights = weight[None] * styles[:, None, :, None, None]                             # [N, O, I, k, k]
    if demodulate:
        weights = weights * (weights.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    weights = (weights * input_gain).to(x.dtype).flatten(0, 1)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weights, padding=padding, groups=n)
    return y.reshape(n, -1, *y.shape[2:])


@contextlib.contextmanager
def replaced(**functions: Any) -> Iterator[None]:
    """Other functions in the generator's module, for the block."""
    before = {name: getattr(networks, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(networks, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(networks, name, function)


def reference_form() -> Any:
    """The block computes as the official code."""
    return replaced(modulated_conv2d=grouped_modulated_conv2d,
                    filtered_lrelu=functools.partial(networks.filtered_lrelu, impl="ref"),
                    bias_act=functools.partial(networks.bias_act, impl="ref"))


def has_bf16() -> bool:
    """Whether the processor multiplies in bfloat16."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return any(f" {name}" in text for name in ("avx512_bf16", "amx_bf16"))


def forms_of(device: torch.device) -> dict[str, tuple[Callable[[], Any], str]]:
    """Name -> (context in which the form runs, precision)."""
    if device.type == "cuda":
        return {"reference": (reference_form, "auto"), "fp32": (contextlib.nullcontext, "fp32"),
                "fp16": (contextlib.nullcontext, "auto")}
    forms = {"reference": (reference_form, "fp32"), "fp32": (contextlib.nullcontext, "fp32")}
    return forms | ({"bf16": (contextlib.nullcontext, "bf16")} if has_bf16() else {})

#----------------------------------------------------------------------------
# Measuring.

def timed(seconds: dict[str, float], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its time added up under a name."""
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result
    return call


def run_once(run: Callable[[], torch.Tensor], device: torch.device) -> tuple[float, torch.Tensor]:
    """(seconds, images)."""
    start = time.perf_counter()
    images = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, images


def measure(G: networks.Generator, z: torch.Tensor, labels: torch.Tensor, turns: int,
            device: torch.device) -> dict[str, dict[str, Any]]:
    """Per form: seconds of each turn, of all turns and parts together, and images. One image before is not counted."""
    forms = forms_of(device)
    found: dict[str, dict[str, Any]] = {name: {"times": [], "parts": {}} for name in forms}
    for turn in range(turns + 1):
        for name, (context, precision) in forms.items():
            part = slice(None) if turn else slice(1)
            run = functools.partial(synthesize, G, z[part], labels[part], precision=precision)
            form = found[name]
            with context(), replaced(**{f: timed(form["parts"], f, getattr(networks, f)) for f in PARTS}):
                seconds, images = run_once(run, device)
            if turn == 0:
                form["parts"].clear()
                continue
            form["times"].append(seconds)
            form["images"] = to_uint8_metric(images).cpu()
            click.echo(f"turn {turn}, {name}: {seconds:.2f} s", err=True)
    return found


def table(found: dict[str, dict[str, Any]], batch: int, device: torch.device) -> tuple[str, dict[str, float]]:
    """Markdown, and the ratio of times to the reference's."""
    rows, speedup = [], {}
    reference = found["reference"]
    for name, form in found.items():
        low, middle, high = (batch / s for s in statistics.quantiles(form["times"], n=4))
        ratio = statistics.median(reference["times"]) / statistics.median(form["times"])
        if name != "reference":
            speedup[name] = round(ratio, 2)
        off = (form["images"].int() - reference["images"].int()).abs()
        rows.append(f"| {name} | {middle:.4g} ({high:.4g}-{low:.4g}) | {1 / middle:.4g} | {ratio:.2f} | "
                    f"{off.max()} | {off.double().mean():.2g} |")
    lines = ["| form | images/s: median (quartiles) | s per image | against the reference | largest difference of a "
             "pixel (of 255) | mean difference |", "|---|---|---|---|---|---|", *rows, ""]
    if device.type == "cpu":            # On a GPU calls return before the work is done.
        lines += ["Shares of the time:", "", "| form | modulated convolution | filtered leaky "
                  "ReLU | the rest |", "|---|---|---|---|"]
        for name, form in found.items():
            shares = [100 * form["parts"][part] / sum(form["times"]) for part in PARTS]
            lines.append(f"| {name} | " + " | ".join(f"{x:.0f} %" for x in [*shares, 100 - sum(shares)]) + " |")
    return "\n".join(lines), speedup


@click.command(cls=cli.Command)
@click.option("--quick", is_flag=True, help="A narrow generator of 64 pixels, two turns, no file")
@click.option("--threads", metavar="INT", type=cli.IntRange(min=1), help="Threads in use  [default: its own choice]")
@click.option("--batch", metavar="INT", type=cli.IntRange(min=1),
              help="Images at a time  [default: 2 on a processor, where the reference then takes 8 GB; 32 on a GPU]")
@cli.device_option()
def main(quick: bool, threads: int | None, batch: int | None, device: str) -> None:
    """Measure the generator against the official structure."""
    torch.set_num_threads(threads or torch.get_num_threads())
    target = torch.device(misc.select_device(device))
    batch = batch or (2 if quick else 32 if target.type == "cuda" else 2)
    torch.manual_seed(0)
    config = recipe_config(quick)
    G = networks.Generator(config).eval().requires_grad_(False).to(target)
    z, labels = torch.randn(batch, G.z_dim), torch.randint(CLASSES, [batch])
    found = measure(G, z, labels, 2 if quick else TURNS, target)
    text, speedup = table(found, batch, target)
    memory = torch.cuda.max_memory_allocated(target) if target.type == "cuda" else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    where = torch.cuda.get_device_name(target) if target.type == "cuda" else \
        f"{platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} processors"
    turns = len(found["reference"]["times"])
    notes = "" if target.type == "cuda" or has_bf16() else "\nThis processor has no bfloat16: not measured.\n"
    head = (f"# Generating images\n\n`python benchmarks/bench_inference.py`, {now}, {where}, "
            f"torch {torch.__version__}, {dispatch.describe(target)}. {config.img_resolution} pixels, "
            f"{len(config.layers)} layers, {misc.count_parameters(G):,} parameters, batches of {batch}, "
            f"{turns} turns. Peak memory of all forms: {memory / 2**30:.1f} GiB. Target: {TARGET:g} times.\n{notes}")
    if not quick:
        atomic_write_text(RESULT, f"{head}\n{text}\n")
    click.echo(f"{head}\n{text}")
    click.echo(json.dumps({"speedup": speedup}))


if __name__ == "__main__":
    main()
