# SPDX-License-Identifier: Apache-2.0
"""What a step of gpu_report.py does, in the process of its own that it runs in.

    python benchmarks/gpu_steps.py STEP --out=FILE [--folder=DIR] [--device=auto] [--quick]

Here are the steps that look at the machine and run the project's programs; those that measure speed are in
gpu_speed.py. Programs are started as a user starts them and stay in this process's group, so that they end with it.
"""
import collections
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import gpu_speed  # noqa: E402
from gpu_results import Context, Results, Skip  # noqa: E402

from dnnlib import cli  # noqa: E402
from dnnlib.util import format_bytes  # noqa: E402
from torch_utils import misc  # noqa: E402
from torch_utils.images import from_uint8  # noqa: E402

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "PIL", "click", "requests", "ninja", "safetensors",
            "tqdm", "torch_fidelity", "matplotlib", "sklearn", "pytest")
ITERATIONS, QUICK_ITERATIONS, TICK_ITERATIONS = 20, 4, 2
START_SECONDS = 60          # For two processes to find each other.

#----------------------------------------------------------------------------
# Programs.

def start(arguments: list[str], env: dict[str, str] | None = None, output: Any = subprocess.PIPE) -> subprocess.Popen:
    """A Python program of the project; its output goes into a pipe or a file. Nothing is downloaded."""
    offline = {"STYLESAN_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=os.environ | offline | (env or {}),
                            encoding="utf-8", errors="replace", stdout=output, stderr=subprocess.STDOUT)


def follow(process: subprocess.Popen, on_line: Callable[[str], None] = lambda line: None) -> tuple[int, str]:
    """Pass the output on until the program ends; its exit code and its last line."""
    last = ""
    with process.stdout as lines:
        for line in lines:
            print(line, end="", flush=True)
            last = line.strip() or last
            on_line(line)
    return process.wait(), last


def run(arguments: list[str], on_line: Callable[[str], None] = lambda line: None) -> float:
    """Run a program to its end; the seconds that it took.

    Raises:
        ClickException: it failed; the message is its last line.
    """
    began = time.perf_counter()
    code, last = follow(start(arguments), on_line)
    if code:
        raise click.ClickException(f"{Path(arguments[0]).name} ended with {code}: {last}")
    return time.perf_counter() - began


def random_data(context: Context, resolution: int, classes: int) -> Path:
    """An archive of random images."""
    path = context.folder / f"random{resolution}.zip"
    if not path.is_file():
        run(["-m", "data_prep.random_data", f"--dest={path}", f"--resolutions={resolution}", f"--classes={classes}"])
    return path


def small_run(context: Context, outdir: Path, iterations: int, tick: int, backbone: str) -> list[str]:
    """Arguments of train.py: a stem at 16 pixels, of 4 M parameters or a tiny one, that learns random images."""
    shutil.rmtree(outdir, ignore_errors=True)
    batch = 8 if context.quick else 32
    size = ("--cbase=64", "--cmax=8") if context.quick else ("--cbase=4096", "--cmax=128", "--syn_layers=7")
    return ["--cfg=stylegan3-t", "--preset=demo", f"--outdir={outdir}", f"--data={random_data(context, 16, 10)}",
            "--cond=1", "--embedding=random", f"--backbones={backbone}", "--metrics=none",
            f"--device={context.device.type}", f"--workers={0 if context.quick else 2}", f"--batch={batch}", *size,
            f"--kimg={iterations * batch / 1000:g}", f"--tick={tick * batch / 1000:g}", "--snap=1000"]


def ticks(outdir: Path) -> list[dict[str, float]]:
    """What the run in that folder wrote at every tick."""
    (stats,) = outdir.glob("0*/stats.jsonl")
    return [json.loads(line) for line in stats.read_text(encoding="utf-8").splitlines()]


def seconds_per_iteration(outdir: Path, batch: int) -> float:
    """Median over the ticks; the first one holds the warm-up."""
    found = [tick["Progress/sec_per_kimg"] for tick in ticks(outdir)]
    return statistics.median(found[1:] or found) * batch / 1000

#----------------------------------------------------------------------------
# Steps.

def versions(context: Context) -> None:
    """The machine, its packages and the bandwidth of its memory."""
    results, device = context.results, context.device
    has = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    results.put(torch=torch.__version__, cuda=torch.version.cuda or "none", python=platform.python_version(),
                missing=[name for name, there in has.items() if not there], driver=driver_version())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        results.put(device=properties.name, sms=properties.multi_processor_count, memory=properties.total_memory)
    else:
        results.put(device=f"{platform.machine()} processor, {os.cpu_count()} cores")
    bandwidth = gpu_speed.copy_bandwidth(device)
    results.put(copy_bytes_per_s=bandwidth)
    values = results.content["values"]
    parts = [values["device"], *([f"{values['sms']} SMs, {format_bytes(values['memory'])}"] if "sms" in values else []),
             f"copies {bandwidth / 1e12:.3g} TB/s", f"torch {torch.__version__}",
             *([f"without {', '.join(values['missing'])}"] if values["missing"] else [])]
    results.found(", ".join(parts))


def driver_version() -> str:
    """What nvidia-smi says."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], encoding="utf-8",
                              capture_output=True, timeout=20, check=True)
        return done.stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def kinds(context: Context) -> list[str]:
    """Kinds of native code on the machine, that of the device first."""
    return list(dict.fromkeys([context.device.type, "cpu"]))


def build(context: Context) -> None:
    """Compile the native operations anew; in quick mode only if they are not there."""
    from torch_utils.ops import compilation
    told = []
    for kind in kinds(context):
        target = compilation.cpu_target() if kind == "cpu" else compilation.cuda_target()
        was_there = (target.folder() / compilation.LIBRARY).is_file()
        if was_there and not context.quick:
            shutil.rmtree(target.folder())
        began = time.perf_counter()
        try:
            compilation.library(target, retry=True)
        except compilation.BuildError as error:
            raise click.ClickException(f"{kind}: {error}") from None
        seconds = time.perf_counter() - began
        context.results.put(**{f"{kind}/seconds": seconds})
        told.append(f"{kind} {'was there' if was_there and context.quick else f'{seconds:.1f} s'}")
        context.results.found(", ".join(told))


def self_check(context: Context) -> None:
    """Load the libraries as a program does, which checks them."""
    from torch_utils.ops import dispatch
    told = []
    for kind in kinds(context):
        torch.zeros(1, device=kind)         # The device is up before the clock starts.
        began = time.perf_counter()
        line = dispatch.describe(kind)
        seconds = time.perf_counter() - began
        context.results.put(**{f"{kind}/line": line, f"{kind}/seconds": seconds})
        told.append(f"{line} ({seconds:.1f} s)")
        context.results.found(", ".join(told))


def training(context: Context) -> None:
    """Train, sample and score with the programs."""
    results, outdir = context.results, context.folder / "training"
    batch = 8 if context.quick else 32
    backbone = "local:random" if context.quick else "tf_efficientnet_lite0:random"
    iterations = QUICK_ITERATIONS if context.quick else ITERATIONS
    arguments = small_run(context, outdir, iterations, TICK_ITERATIONS, backbone)
    began, seen = time.perf_counter(), []

    def note_ticks(line: str) -> None:
        if line.startswith("tick "):
            seen.append(time.perf_counter() - began)
            results.put(first_tick=seen[0], iterations=len(seen) * TICK_ITERATIONS)
        elif line.startswith("training for"):
            results.put(start=time.perf_counter() - began)
        elif line.startswith("first iteration done"):
            results.put(first_iteration=float(re.search(r"([\d.]+) s", line)[1]))

    arguments += [] if context.quick else [f"--batch-gpu={batch // 2}"]
    results.put(seconds=run(["train.py", *arguments], note_ticks), iteration=seconds_per_iteration(outdir, batch))
    values = results.content["values"]
    text = (f"first tick ({TICK_ITERATIONS} iterations) after {values['first_tick']:.1f} s, then "
            f"{1e3 * values['iteration']:.0f} ms per iteration")
    results.found(text)
    (network,) = outdir.glob("0*/")
    samples = context.folder / "samples"
    results.put(gen_images=run(["gen_images.py", f"--network={network}", "--seeds=0-7", "--batch-sz=8",
                                f"--outdir={samples}", f"--device={context.device.type}"]))
    results.found(f"{text}; gen_images {values['gen_images']:.1f} s")
    score(context, network, samples)
    results.found(f"{text}; gen_images {values['gen_images']:.1f} s; {values['detector']} "
                  f"{values['calc_metrics']:.1f} s")


def random_detector() -> str:
    """A network for fid that this machine can make; the one that FID is defined by comes from torch-fidelity.

    Raises:
        Skip: there is none.
    """
    for package, detector in (("torch_fidelity", "inception-2015-12-05"), ("torchvision", "vgg16")):
        if importlib.util.find_spec(package) is not None:
            return f"{detector}:random"
    raise click.ClickException("fid was not computed: neither torch-fidelity nor torchvision is installed")


def score(context: Context, network: Path, samples: Path) -> None:
    """fid of generated images by a random network; in quick mode of 8 against 8 other generated ones."""
    detector, num = random_detector(), 8 if context.quick else 200
    real = f"--ref={samples}" if context.quick else f"--data={random_data(context, 16, 10)}"
    found: dict[str, Any] = {}

    def read_line(line: str) -> None:
        if line.startswith("{"):
            found.update(json.loads(line))

    seconds = run(["calc_metrics.py", f"--network={network}", real, "--metrics=fid", f"--num={num}",
                   f"--detector={detector}", "--labels=uniform", "--no-cache", "--verbose=0",
                   f"--device={context.device.type}"], read_line)
    context.results.put(calc_metrics=seconds, detector=f"fid by {detector}", fid=found.get("results"))


def loading(context: Context) -> None:
    """One epoch of random images from their archive to the device, as training reads them."""
    from training.dataset import EpochOrder, ImageDataset, TrainingStream
    resolution, batch, workers = (16, 8, 0) if context.quick else (256, 32, 3)
    dataset = ImageDataset(random_data(context, resolution, 10 if context.quick else 1000), use_labels=True)
    stream = TrainingStream(dataset, EpochOrder(len(dataset)), batch_gpu=batch, workers=workers,
                            pin_memory=context.device.type == "cuda")
    began, first, images = time.perf_counter(), None, 0
    try:
        while images + batch <= len(dataset):
            x, _ = next(stream)
            x = from_uint8(misc.to_device(x, context.device))
            gpu_speed.synchronize(context.device)
            first = time.perf_counter() - began if first is None else first
            images += len(x)
    finally:
        stream.close()
    rate = (images - batch) / (time.perf_counter() - began - first)
    context.results.put(first_batch=first, images=images, images_per_s=rate)
    context.results.found(f"{rate:.0f} images/s of {resolution} pixels with {workers} loader processes, first batch "
                          f"after {first:.1f} s")


def two_processes(context: Context) -> None:
    """Three iterations of two processes, on one GPU over gloo. Both are started here, as torchrun would."""
    outdir = context.folder / "two_processes"
    arguments = small_run(context, outdir, 3, 1, "local:random")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # A launcher would start them in process groups of their own, which would outlive this step's time limit.
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
              "STYLESAN_START_SECONDS": str(START_SECONDS)}
    script = str(ROOT / "benchmarks" / "train_over_gloo.py")
    began = time.perf_counter()
    with open(context.folder / "second_process.log", "w", encoding="utf-8") as log:
        first, second = (start([script, *arguments], shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output)
                         for rank, output in enumerate((subprocess.PIPE, log)))
        code, last = follow(first)
        others = second.wait()
    if code or others:
        raise click.ClickException(f"train.py ended with {code} and {others}: {last}")
    seconds = seconds_per_iteration(outdir, 8 if context.quick else 32)
    context.results.put(seconds=time.perf_counter() - began, iteration=seconds)
    context.results.found(f"{1e3 * seconds:.0f} ms per iteration over gloo, {len(ticks(outdir))} ticks")


def tests(context: Context) -> None:
    """`pytest -m gpu`, in the files that have such tests: others may need packages that are not there.

    In quick mode it is the first of these files.
    """
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")
                   if "\n@pytest.mark.gpu\n" in path.read_text(encoding="utf-8"))
    files = files[:1] if context.quick else files
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []

    def note(line: str) -> None:
        found = re.match(r"(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if found:
            counts[found[2].lower()] += 1
            failures.extend([found[1]] if found[2] in ("FAILED", "ERROR") else [])
            context.results.put(counts=dict(counts), failures=failures)
            context.results.found(", ".join([*(f"{count} {name}" for name, count in counts.items()), *failures]))

    code, last = follow(start(["-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *files],
                              {"PYTEST_ADDOPTS": "", "COLUMNS": "300"}), note)
    if code:
        found = context.results.content["found"]
        raise click.ClickException(found if failures else f"pytest ended with {code}: {last}")
    if not counts["passed"]:
        raise Skip(f"no CUDA device: {counts['skipped']} tests")

#----------------------------------------------------------------------------

STEPS: dict[str, Callable[[Context], None]] = {
    "versions": versions, "build": build, "self_check": self_check, "training": training, "ops": gpu_speed.ops,
    "iteration": gpu_speed.iteration, "convolutions": gpu_speed.convolutions, "stem": gpu_speed.stem,
    "sampling": gpu_speed.sampling, "loading": loading, "two_processes": two_processes, "tests": tests}


@click.command(cls=cli.Command)
@click.argument("name", metavar="STEP", type=click.Choice(list(STEPS)))
@click.option("--out", metavar="FILE", type=cli.PathType(), required=True, help="JSON file of the results")
@click.option("--folder", metavar="DIR", type=cli.PathType(), default="build/gpu_report", show_default=True,
              help="For the step's files")
@click.option("--quick", is_flag=True, help="In miniature")
@cli.device_option()
def main(name: str, out: str, folder: str, quick: bool, device: str) -> None:
    """Run one step of gpu_report.py."""
    place = Path(folder).resolve()
    place.mkdir(parents=True, exist_ok=True)
    results = Results(Path(out).resolve())
    try:
        STEPS[name](Context(torch.device(misc.select_device(device)), quick, place, results))
    except Skip as reason:
        results.skip(str(reason))


if __name__ == "__main__":
    main()
