# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of the metrics, side by side with torch-fidelity and SciPy in one run, on the CPU.

    python benchmarks/bench_metrics.py              # about 15 minutes on two cores
    python benchmarks/bench_metrics.py --quick      # small sizes: shows that everything runs

Weights and images are random: speed does not depend on them. The two sides take turns, so that what else the machine
does hits both; tables give the median and, in brackets, the extremes. Writes benchmarks/results/metrics.md (`--out`);
the last line of the output is JSON with all ratios. Peak memory is read from Linux's /proc.
"""
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import scipy.linalg
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from inference.image_inputs import open_images  # noqa: E402
from metrics.detectors import load_detector  # noqa: E402
from metrics.detectors.inception import make_inception  # noqa: E402
from metrics.detectors.random_weights import random_state  # noqa: E402
from metrics.feature_stats import Moments  # noqa: E402
from metrics.frechet import frechet_distance  # noqa: E402
from metrics.kernel_distance import kernel_distance, squared_mmd  # noqa: E402
from metrics.passes import DETECTOR_BATCH, Wants, collect  # noqa: E402
from metrics.precision_recall import precision_recall  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "metrics.md"
CPU = torch.device("cpu")
WHOLE = 10_000      # Images of the FID that is quoted.
DIM = 2048          # Length of Inception's features.
DISTINCT = 300      # Different images in the archive; more repeat them.

#----------------------------------------------------------------------------
# Measuring.

def seconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def by_turns(repeats: int, *actions: Callable[[], float]) -> list[np.ndarray]:
    """What each action returns, `repeats` times, the actions taking turns: one array [repeats] per action."""
    rows = [[action() for action in actions] for _ in range(repeats)]
    return [np.array(column) for column in zip(*rows, strict=True)]


def spread(values: np.ndarray, unit: str, digits: int = 2) -> str:
    """Median and extremes."""
    numbers = [f"{x:.{digits}f}" for x in (np.median(values), values.min(), values.max())]
    return f"{numbers[0]} {unit} ({numbers[1]} to {numbers[2]})"


def ratio(slow: np.ndarray, fast: np.ndarray) -> float:
    return float(np.median(slow) / np.median(fast))


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns in Markdown."""
    return "\n".join(["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""])

#----------------------------------------------------------------------------
# Formulas.

def random_moments(dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of 3 * dim rows whose variances fall off, as those of features do."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal([3 * dim, dim]) @ rng.standard_normal([dim, dim]) * np.arange(1, dim + 1) ** -0.5
    return rows.mean(axis=0), np.cov(rows.T)


def by_matrix_root(mu_a: np.ndarray, sigma_a: np.ndarray, mu_b: np.ndarray, sigma_b: np.ndarray) -> float:
    """Frechet distance as most packages compute it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(sigma_a @ sigma_b)
    return float(np.square(mu_a - mu_b).sum() + np.trace(sigma_a) + np.trace(sigma_b) - 2 * np.trace(root).real)


def bench_frechet(quick: bool, repeats: int) -> tuple[str, dict[str, float], dict[str, np.ndarray]]:
    dim = 512 if quick else DIM
    a, b = random_moments(dim, 0), random_moments(dim, 1)
    values = {}
    ours, theirs = by_turns(
        repeats,
        lambda: seconds(lambda: values.update(ours=frechet_distance(*a, *b))),
        lambda: seconds(lambda: values.update(theirs=by_matrix_root(*a, *b))))
    difference = abs(values["ours"] / values["theirs"] - 1)
    rows = [("this project", spread(ours, "s")), ("scipy.linalg.sqrtm", spread(theirs, "s")),
            ("ratio", f"{ratio(theirs, ours):.1f} x"), ("relative difference of the values", f"{difference:.1e}")]
    return f"## Frechet distance, D = {dim}\n\n{table(rows)}", {"frechet": ratio(theirs, ours)}, {
        "ours": ours, "theirs": theirs}


def bench_covariance(quick: bool, repeats: int) -> tuple[str, dict[str, float]]:
    num = 4096 if quick else 16_384
    features = torch.randn(num, DIM)
    square = torch.randn(DIM, DIM, dtype=torch.float64)

    def ours() -> float:
        moments = Moments(DIM)
        return seconds(lambda: [moments.append(part) for part in features.split(DETECTOR_BATCH)])

    products = num // DIM
    ours_s, theirs_s = by_turns(repeats, ours, lambda: seconds(lambda: [square @ square for _ in range(products)]))
    ours_rate, machine = 2e-9 * num * DIM ** 2 / ours_s, 2e-9 * products * DIM ** 3 / theirs_s
    rows = [(f"`Moments.append`, {num} rows in batches of {DETECTOR_BATCH}", spread(ours_rate, "GFLOP/s", 0)),
            (f"float64 matrix product, D = {DIM}", spread(machine, "GFLOP/s", 0)),
            ("share of the machine's rate", f"{ratio(ours_rate, machine):.2f}")]
    text = (f"## Covariance update, D = {DIM}\n\n{table(rows)}\nThe rate counts 2 N D^2 operations. The lower triangle "
            "is not computed, so the share can exceed 1.\n")
    return text, {"covariance_share_of_matmul": ratio(ours_rate, machine)}


def bench_formulas(quick: bool, repeats: int) -> tuple[str, dict[str, float]]:
    from torch_fidelity.metric_kid import kernel_mmd
    from torch_fidelity.metric_prc import calculate_precision_recall_part
    x, y = (torch.randn(1000, DIM, dtype=torch.float64) for _ in range(2))
    kid = by_turns(repeats, lambda: seconds(lambda: squared_mmd(x, y)),
                   lambda: seconds(lambda: kernel_mmd(x.numpy(), y.numpy(), kid_kernel="poly", kid_kernel_poly_degree=3,
                                                      kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)))
    num = 1000 if quick else 8000
    real, gen = (torch.randn(num, DIM).relu().half().float() for _ in range(2))
    pr = by_turns(repeats, lambda: seconds(lambda: precision_recall(real, gen)),
                  lambda: seconds(lambda: calculate_precision_recall_part(gen, real)))
    rows = [("KID, one subset of 1000: this project", spread(kid[0], "s")), ("torch-fidelity", spread(kid[1], "s")),
            ("ratio", f"{ratio(kid[1], kid[0]):.1f} x"),
            (f"precision and recall, {num} against {num}: this project", spread(pr[0], "s")),
            ("torch-fidelity", spread(pr[1], "s")), ("ratio", f"{ratio(pr[1], pr[0]):.1f} x")]
    return f"## KID, precision and recall, D = {DIM}\n\n{table(rows)}", {
        "kid_subset": ratio(kid[1], kid[0]), "precision_recall": ratio(pr[1], pr[0])}

#----------------------------------------------------------------------------
# Work that runs in a process of its own, so that its peak memory is known.

def worker_peak(result: dict[str, Any]) -> None:
    """Print a result with the peak memory of this process, in MB.

    VmHWM, because ru_maxrss begins with the memory of the process that started this one.
    """
    (peak,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    print(json.dumps({**result, "peak": int(peak) * 1.024e-3}))


def work_large(what: str, num: str) -> None:
    """KID or precision and recall of `num` random rows against `num`."""
    rng = torch.Generator().manual_seed(0)
    real, gen = (torch.empty(int(num), DIM) for _ in range(2))
    for x in (real, gen):
        for part in x.split(1000):
            part.normal_(generator=rng).relu_()
    action = {"kid": kernel_distance, "pr": precision_recall}[what]
    worker_peak({"seconds": seconds(lambda: action(real, gen))})


class Decoded(torch.utils.data.Dataset):
    """The images of an archive as torch-fidelity takes them."""

    def __init__(self, path: str):
        self.items = open_images(path).dataset

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.from_numpy(self.items[i][0])


def work_ours(archive: str, weights: str, out: str) -> None:
    """Mean and covariance of the features of an archive. `weights` is not read: it holds the detector's own."""
    detector = load_detector("inception-2015-12-05:random", CPU)
    source = open_images(archive)
    detector.features(next(source.batches(8))[0])
    start = time.perf_counter()
    got = collect(source, {"x": (detector, Wants(moments=frozenset({"pool"})))}, CPU)
    mean, covariance = got["x"].moments["pool"]
    worker_done(out, time.perf_counter() - start, mean, covariance)


def work_theirs(archive: str, weights: str, out: str) -> None:
    """The same by torch-fidelity with its defaults, from its own data loader to mean and covariance."""
    from torch_fidelity import metric_fid, utils
    dataset = Decoded(archive)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = utils.create_feature_extractor("inception-v3-compat", ["2048"], cuda=False,
                                             feature_extractor_weights_path=weights, verbose=False)
        net(torch.stack([dataset[i] for i in range(8)]))
        start = time.perf_counter()
        found = utils.get_featuresdict_from_dataset(dataset, net, 64, cuda=False, save_cpu_ram=False, verbose=False)
        statistics = metric_fid.fid_features_to_statistics(found["2048"])
    worker_done(out, time.perf_counter() - start, statistics["mu"], statistics["sigma"] * (1 - 1 / len(dataset)))


def worker_done(out: str, passed: float, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Save the moments (ddof 0) for comparison, and print how long they took."""
    np.savez(out, mean=mean, covariance=covariance)
    worker_peak({"seconds": passed})


WORKERS = {"large": work_large, "ours": work_ours, "theirs": work_theirs}


def run_worker(name: str, *args: str) -> dict[str, Any]:
    """One of them in a new process."""
    code = "import sys; from benchmarks.bench_metrics import WORKERS; WORKERS[sys.argv[1]](*sys.argv[2:])"
    done = subprocess.run([sys.executable, "-c", code, name, *args], cwd=ROOT, check=True, stdout=subprocess.PIPE,
                          encoding="utf-8")
    return json.loads(done.stdout.splitlines()[-1])

#----------------------------------------------------------------------------
# Images.

def write_images(path: Path, num: int, resolution: int) -> None:
    """An archive of smooth random pictures."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(min(num, DISTINCT)):
        small = PIL.Image.fromarray(rng.integers(0, 256, [resolution // 8, resolution // 8, 3], dtype=np.uint8))
        name = path.with_name(f"{i}.png")
        small.resize([resolution, resolution], PIL.Image.Resampling.BICUBIC).save(name)
        files.append(name.read_bytes())
        name.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(num):
            archive.writestr(f"{i:06d}.png", files[i % len(files)])


def bench_images(folder: Path, num: int, resolution: int, repeats: int,
                 frechet: dict[str, np.ndarray] | None) -> tuple[str, dict[str, float]]:
    """`frechet`: seconds of the distance itself, where it was measured at full size."""
    archive, weights = folder / "images.zip", folder / "weights.pth"
    write_images(archive, num, resolution)
    torch.save(random_state(make_inception()), weights)
    results = {name: [] for name in ("ours", "theirs")}

    def run(name: str) -> float:
        results[name].append(run_worker(name, str(archive), str(weights), str(folder / f"{name}.npz")))
        return num / results[name][-1]["seconds"]

    ours, theirs = by_turns(repeats, lambda: run("ours"), lambda: run("theirs"))
    peaks = {name: max(x["peak"] for x in found) for name, found in results.items()}
    a, b = (np.load(folder / f"{name}.npz") for name in ("ours", "theirs"))
    differences = [np.linalg.norm(a[key] - b[key]) / np.linalg.norm(b[key]) for key in ("mean", "covariance")]
    rows = [("this project", spread(ours, "images/s")), ("torch-fidelity", spread(theirs, "images/s")),
            ("ratio", f"{ratio(ours, theirs):.2f} x"),
            ("peak memory: this project", f"{peaks['ours']:.0f} MB"),
            ("peak memory: torch-fidelity", f"{peaks['theirs']:.0f} MB"),
            ("relative difference of mean, covariance", f"{differences[0]:.1e}, {differences[1]:.1e}")]
    ratios = {"fid_images": ratio(ours, theirs)}
    if frechet is not None:
        whole = [WHOLE / np.median(x) + np.median(frechet[name]) for name, x in (("ours", ours), ("theirs", theirs))]
        rows += [(f"{WHOLE} images and the distance, from these rates: this project", f"{whole[0]:.0f} s"),
                 ("torch-fidelity", f"{whole[1]:.0f} s"), ("ratio", f"{whole[1] / whole[0]:.2f} x")]
        ratios["fid_10000"] = float(whole[1] / whole[0])
    text = (f"## FID: {num} images of {resolution} pixels from a zip archive\n\n{table(rows)}\nFrom the archive to "
            "mean and covariance: decoding, resize, network (the same random weights), sums. Both decode with the same "
            "code; torch-fidelity runs its own data loader and batches of 64, its default. Loading the network is not "
            "counted.\n")
    return text, ratios


def bench_large(num: int) -> tuple[str, dict[str, float]]:
    rows, peaks = [], {}
    for key, name in (("kid", "KID, 100 subsets of 1000"), ("pr", "precision and recall, k = 3")):
        found = run_worker("large", key, str(num))
        rows.append((name, f"{found['seconds']:.0f} s, peak memory {found['peak']:.0f} MB"))
        peaks[f"{key}_peak_mb"] = found["peak"]
    features = 2 * num * DIM * 4 / 1e6
    text = (f"## KID, precision and recall of {num} against {num}, D = {DIM}\n\n{table(rows)}\nThe features in float32 "
            f"are {features:.0f} MB of that.\n")
    return text, peaks

#----------------------------------------------------------------------------

PARTS = ("frechet", "covariance", "formulas", "images", "large")


@click.command(cls=cli.Command)
@click.option("--quick", is_flag=True, help="Small sizes, one repetition; nothing is written without --out")
@click.option("--parts", metavar="LIST", default=",".join(PARTS), show_default=True, help="What to measure")
@click.option("--images", metavar="INT", type=cli.IntRange(min=64), default=None, help="Images  [default: 512]")
@click.option("--resolution", metavar="INT", type=cli.IntRange(min=8), default=256, show_default=True,
              help="Side of the images, pixels")
@click.option("--repeats", metavar="INT", type=cli.IntRange(min=1), default=None,
              help="Repetitions of each  [default: 5, 3 for images; --quick: 1]")
@click.option("--out", metavar="FILE", type=cli.PathType(), default=None,
              help=f"Where to write  [default: {RESULT.relative_to(ROOT)}]")
def main(quick: bool, parts: str, images: int | None, resolution: int, repeats: int | None, out: str | None) -> None:
    """Measure speed and memory of the metrics against torch-fidelity and SciPy."""
    names = parts.split(",")
    if unknown := set(names) - set(PARTS):
        raise UserError(f"--parts={parts}: no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    texts, ratios, frechet = [], {}, None

    def add(found: tuple) -> None:
        click.echo(found[0])
        texts.append(found[0])
        ratios.update(found[1])

    often, seldom = (repeats or (1 if quick else n) for n in (5, 3))
    if "frechet" in names:
        found = bench_frechet(quick, often)
        add(found)
        frechet = None if quick else found[2]
    if "covariance" in names:
        add(bench_covariance(quick, often))
    if "formulas" in names:
        add(bench_formulas(quick, often))
    if "images" in names:
        with tempfile.TemporaryDirectory() as folder:
            add(bench_images(Path(folder), images or (100 if quick else 512), resolution, seldom, frechet))
    if "large" in names:
        add(bench_large(5000 if quick else 50_000))
    finish(texts, ratios, out or (None if quick else RESULT))


def finish(texts: list[str], ratios: dict[str, float], path: str | Path | None) -> None:
    """Write the page, and print the ratios as JSON."""
    threads = torch.get_num_threads()
    head = (f"# Speed and memory of the metrics\n\n`python benchmarks/bench_metrics.py` on {platform.machine()}, "
            f"{os.cpu_count()} cores, {threads} threads, torch {torch.__version__}, scipy {scipy.__version__}, CPU. "
            "Median and, in brackets, extremes.\n")
    if path is not None:
        atomic_write_text(Path(path), "\n".join([head, *texts]))
    peaks = {key: round(value) for key, value in ratios.items() if key.endswith("_mb")}
    speedup = {key: round(value, 3) for key, value in ratios.items() if not key.endswith("_mb")}
    click.echo(json.dumps({"speedup": speedup, "peak_mb": peaks}))


if __name__ == "__main__":
    main()
