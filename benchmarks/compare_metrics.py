# SPDX-License-Identifier: Apache-2.0
"""Our features and metrics beside those of torch-fidelity, pytorch-fid and clean-fid.

    python benchmarks/compare_metrics.py

All get the same images (handwritten digits, crops of photographs, uniform noise; 32 pixels) and the same random weights
in the published file layouts. Half of the images of each kind are the real side; the others, with half the contrast,
the generated one. Writes benchmarks/results/compare_metrics.md. Takes about an hour on two CPU cores, half of it VGG16
and the others' matrix square roots of 2048 x 2048.
"""
import dataclasses
import importlib.metadata
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text, list_some  # noqa: E402
from metrics.detectors import load_detector  # noqa: E402
from metrics.frechet import frechet_distance  # noqa: E402
from metrics.inception_score import inception_score  # noqa: E402
from metrics.kernel_distance import kernel_distance  # noqa: E402
from metrics.passes import Collected, Wants, collect  # noqa: E402
from metrics.precision_recall import precision_recall  # noqa: E402
from tests.metrics import others  # noqa: E402
from tests.metrics.helpers import ArraySource  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "compare_metrics.md"
FEATURE_LIMIT, METRIC_LIMIT = 1e-6, 1e-5
CPU = torch.device("cpu")
POOL = frozenset({"pool"})


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison."""

    what: str
    package: str
    ours: float             # For features their length (Euclidean, all images of a kind together).
    theirs: float
    difference: float       # Relative to theirs.
    limit: float

#----------------------------------------------------------------------------

def write_images(folder: Path, images: np.ndarray) -> list[Path]:
    """PNG files 000000.png... of uint8 [N, 3, H, W]."""
    folder.mkdir(parents=True)
    files = [folder / f"{i:06d}.png" for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        PIL.Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file)
    return files


def ours(name: str, weights: Path, images: np.ndarray, wants: Wants) -> Collected:
    """What our pass over the images keeps."""
    detector = load_detector(name, CPU, str(weights), offline=True, allow_unverified=True)
    return collect(ArraySource(images), {"": (detector, wants)}, CPU, progress=name)[""]


def feature_rows(what: str, package: str, a: np.ndarray, b: np.ndarray) -> list[Row]:
    """Per kind of image, the length of the difference over the length of theirs."""
    rows = []
    for i, kind in enumerate(others.KINDS):
        x, y = (np.asarray(values, np.float64)[i :: len(others.KINDS)] for values in (a, b))
        lengths = [float(np.linalg.norm(values)) for values in (x, y, x - y)]
        rows.append(Row(f"{what}, {kind}", package, lengths[0], lengths[1], lengths[2] / lengths[1], FEATURE_LIMIT))
    return rows


def metric_row(what: str, package: str, a: float, b: float) -> Row:
    """One number against another."""
    return Row(what, package, float(a), float(b), abs(float(a) - float(b)) / abs(float(b)), METRIC_LIMIT)


def frechet_of(x: np.ndarray, is_real: np.ndarray) -> float:
    """Fréchet distance of float64 features by our formula, ddof 1."""
    real, gen = x[is_real], x[~is_real]
    return frechet_distance(real.mean(axis=0), np.cov(real.T), gen.mean(axis=0), np.cov(gen.T))

#----------------------------------------------------------------------------

def inception_rows(images: np.ndarray, files: list[Path], weights: Path, is_real: np.ndarray, dims: int) -> list[Row]:
    """torch-fidelity's network, and its FID, KID and inception score."""
    mine = ours("inception-2015-12-05", weights, images,
                Wants(features=frozenset({"pool", "spatial", "logits_unbiased"}), probs=True))
    pool, logits, spatial = others.by_torch_fidelity(images, weights)
    rows = feature_rows("pool", "torch-fidelity", mine.features["pool"], pool)
    rows += feature_rows("logits without bias", "torch-fidelity", mine.features["logits_unbiased"], logits)
    rows += feature_rows("spatial", "torch-fidelity", mine.features["spatial"],
                         spatial.permute(0, 2, 3, 1).flatten(1))
    theirs = pool.numpy()[:, :dims]
    a, b = mine.features["pool"].double().numpy()[:, :dims], theirs.astype(np.float64)
    rows.append(metric_row("FID", "torch-fidelity", frechet_of(a, is_real),
                           others.frechet_distance(theirs[is_real], theirs[~is_real], "torch-fidelity")))
    # In float64: in float32, as they run by default, both others lose three digits of the kernel.
    size = min(is_real.sum(), (~is_real).sum())
    kid = kernel_distance(torch.from_numpy(a[is_real]), torch.from_numpy(a[~is_real]), 1, size).mean
    for package, value in others.kernel_distances(b[is_real], b[~is_real]).items():
        rows.append(metric_row("KID, one subset of all", package, kid, value))
    score = inception_score(mine.probs[~is_real])
    mean, std = others.inception_score(logits[~is_real])
    rows.append(metric_row("inception score, mean", "torch-fidelity", score.mean, mean))
    rows.append(metric_row("inception score, deviation", "torch-fidelity", score.std, std))
    return rows


def resize_rows(package: str, name: str, by_them: Callable[[list[Path], Path], np.ndarray]) -> Callable[..., list[Row]]:
    """The network behind another resize, and the FID that belongs to it."""
    def rows(images: np.ndarray, files: list[Path], weights: Path, is_real: np.ndarray, dims: int) -> list[Row]:
        mine = ours(name, weights, images, Wants(features=POOL)).features["pool"]
        theirs = by_them(files, weights)
        a, b = mine.double().numpy()[:, :dims], theirs[:, :dims]
        value = others.frechet_distance(b[is_real], b[~is_real], package)
        return [*feature_rows("pool", package, mine, theirs),
                metric_row("FID", package, frechet_of(a, is_real), value)]
    return rows


def vgg_rows(images: np.ndarray, files: list[Path], weights: Path, is_real: np.ndarray, dims: int) -> list[Row]:
    """torch-fidelity's VGG16, and its precision and recall."""
    mine = ours("vgg16", weights, images, Wants(features=POOL)).features["pool"]
    theirs = others.by_torch_fidelity_vgg(images, weights)
    # Float32, as theirs; the official names round features to fp16 first.
    found = precision_recall(mine[is_real], mine[~is_real], dtype=torch.float32)
    precision, recall = others.precision_recall(theirs[is_real], theirs[~is_real])
    return [*feature_rows("VGG16 features", "torch-fidelity", mine, theirs),
            metric_row("precision", "torch-fidelity", found.precision, precision),
            metric_row("recall", "torch-fidelity", found.recall, recall)]


PARTS = {
    "torch-fidelity": inception_rows,
    "pytorch-fid": resize_rows("pytorch-fid", "inception-2015-12-05-pytorch_fid", others.by_pytorch_fid),
    "clean-fid": resize_rows("clean-fid", "inception-2015-12-05-clean", others.by_clean_fid),
    "vgg16": vgg_rows,
}

#----------------------------------------------------------------------------

def report(rows: list[Row], num: int, dims: int, seconds: float) -> str:
    """The table, with what it was made with."""
    packages = ("torch", "torch-fidelity", "pytorch-fid", "clean-fid", "scipy", "numpy", "pillow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    lines = [
        "# Metrics beside other implementations", "",
        "`python benchmarks/compare_metrics.py`: the same images and the same random weights, in the published file "
        "layouts, through this project and through others.", "",
        f"{num} images of 32 pixels: digits, crops of photographs, uniform noise; half of each kind is the real side, "
        f"the other half, at half the contrast, the generated one. "
        f"{f'Only the first {dims} of 2048 Inception features in the metrics. ' if dims < 2048 else ''}"
        f"CPU {platform.machine()}, {torch.get_num_threads()} threads, {seconds / 60:.0f} minutes. {versions}.", "",
        "Features: length of all vectors of a kind together, and the length of the difference over it. FID has ddof 1, "
        "inception score keeps the order, precision and recall take distances in float32. clean-fid's own network is a "
        "TorchScript file that cannot be made here: its resize is compared, with torch-fidelity's network behind it.",
        "",
        "| what | against | ours | theirs | relative difference | limit |", "|---|---|---|---|---|---|",
        *(f"| {row.what} | {row.package} | {row.ours:.9g} | {row.theirs:.9g} | {row.difference:.1e} | {row.limit:.0e} |"
          for row in rows)]
    return "\n".join(lines) + "\n"


@click.command(cls=cli.Command)
@click.option("--num", metavar="INT", type=cli.IntRange(min=30), default=2000, show_default=True, help="Images")
@click.option("--parts", metavar="NAME,NAME...", type=cli.StrList(), default=",".join(PARTS), show_default=True)
@click.option("--dims", metavar="INT", type=cli.IntRange(1, 2048), default=2048, show_default=True,
              help="Inception features that metrics use; fewer make a quick trial")
@click.option("--out", metavar="MD", type=cli.PathType(), default=str(RESULT), show_default=True, help="File to write")
def main(num: int, parts: list[str], dims: int, out: str) -> None:
    """Compare and write the table; fails if a difference is too large."""
    start = time.perf_counter()
    group = 2 * len(others.KINDS)
    num = -(-num // group) * group          # Sides of one size: then KID has one largest subset, and nothing to choose.
    images = others.three_kinds(num)
    is_real = np.arange(num) // len(others.KINDS) % 2 == 0
    images[~is_real] = images[~is_real] // 2 + 64
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temp:
        weights = Path(temp) / "weights"
        others.write_weights(weights, vgg="vgg16" in parts)
        files = write_images(Path(temp) / "images", images)
        for part in parts:
            found = PARTS[part](images, files, weights, is_real, dims)
            print(*found, sep="\n", flush=True)
            rows += found
    atomic_write_text(out, report(rows, num, dims, time.perf_counter() - start))
    wrong = [row for row in rows if not row.difference <= row.limit]
    if wrong:
        raise UserError(f"{out}: {len(wrong)} differences are too large: {list_some([row.what for row in wrong])}")


if __name__ == "__main__":
    main()
