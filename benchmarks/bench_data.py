# SPDX-License-Identifier: Apache-2.0
"""Reading data sets, beside the plain way: an open ZipFile, and Pillow for every image.

    python benchmarks/bench_data.py --out=benchmarks/results/data.md
    python benchmarks/bench_data.py --quick

Makes an archive of 1.3 million images of 16 pixels and two small ones of 64 pixels in a temporary folder. The plain
way is what readers of StyleGAN's data sets commonly do: every process opens the archive with zipfile, makes a set of
its names and a dict of its labels, and hands each member to Pillow as a file object. Times are those of one core, in
fresh processes with the archives in the page cache. The last line is JSON.
"""
import concurrent.futures
import io
import json
import multiprocessing
import os
import platform
import shutil
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import PIL.Image
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dnnlib import cli  # noqa: E402
from dnnlib.util import atomic_write_text, format_bytes  # noqa: E402
from training.data.png import encode_plain_png  # noqa: E402
from training.data.zip_index import index_files  # noqa: E402
from training.dataset import EpochOrder, ImageDataset, TrainingStream  # noqa: E402

MANY, QUICK = 1_300_000, 50_000
BATCH = 64
WORKERS = 8
CLASSES = 1000

#----------------------------------------------------------------------------
# Archives.

def picture(index: int, size: int) -> np.ndarray:
    """uint8 [size, size, 3]: a gradient with some noise, as compressible as a photograph."""
    rng = np.random.RandomState(index)
    ramp = np.linspace(rng.randint(100), 155 + rng.randint(100), size)
    waves = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], (ramp + ramp[:, None]) / 2], axis=2)
    return np.clip(waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)


def pillow_png(image: np.ndarray) -> bytes:
    """As the official data sets are written."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def write_archive(path: Path, count: int, size: int, encode: Callable[[np.ndarray], bytes]) -> Path:
    """A data set of `count` images, 256 different ones, with labels. zipfile would take minutes for a million."""
    contents = [encode(picture(i, size)) for i in range(256)]
    crcs = [zlib.crc32(content) for content in contents]
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(count)]
    labels = json.dumps({"labels": [[name, i % CLASSES] for i, name in enumerate(names)]}).encode()
    directory, at = [], 0
    with open(path, "wb") as file:
        for i, name in enumerate([*names, "dataset.json"]):
            content = contents[i % 256] if i < count else labels
            crc, raw = crcs[i % 256] if i < count else zlib.crc32(labels), name.encode()
            fields = struct.pack("<5H3L2H", 20, 0, 0, 0, 33, crc, len(content), len(content), len(raw), 0)
            file.write(b"PK\3\4" + fields + raw + content)
            directory.append(b"PK\1\2" + struct.pack("<H", 20) + fields + struct.pack("<3H2L", 0, 0, 0, 0, at) + raw)
            at += 30 + len(raw) + len(content)
        file.writelines(directory)
        length, entries = sum(map(len, directory)), len(directory)
        file.write(struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, length, at))
        file.write(struct.pack("<4sLQL", b"PK\6\7", 0, at + length, 1))
        few = min(entries, 0xFFFF)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, few, few, length, at, 0))
    return path

#----------------------------------------------------------------------------
# The plain way.

class PlainDataset(torch.utils.data.Dataset):
    """A ZipFile per process; Pillow reads from the member."""

    def __init__(self, path: Path):
        PIL.Image.init()        # Else it knows few suffixes.
        self.path, self._archive, self._pid = path, None, None
        names = set(self._open().namelist())
        self.names = sorted(name for name in names if os.path.splitext(name)[1].lower() in PIL.Image.EXTENSION)
        with self._open().open("dataset.json") as file:
            labels = dict(json.load(file)["labels"])
        self.labels = np.array([labels[name.replace("\\", "/")] for name in self.names])

    def _open(self) -> zipfile.ZipFile:
        if self._archive is None or self._pid != os.getpid():
            self._archive, self._pid = zipfile.ZipFile(self.path), os.getpid()
        return self._archive

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        with self._open().open(self.names[index], "r") as file:
            image = np.array(PIL.Image.open(file))
        return image.transpose(2, 0, 1).copy(), self.labels[index]


def plain_batches(path: Path, workers: int) -> Any:
    """Shuffled batches of the plain data set."""
    dataset = PlainDataset(path)
    order = np.random.RandomState(0).permutation(len(dataset)).tolist()
    return iter(torch.utils.data.DataLoader(dataset, batch_size=BATCH, sampler=order, num_workers=workers))


def our_batches(path: Path, workers: int) -> Any:
    """Shuffled batches as training has them."""
    dataset = ImageDataset(path, use_labels=True)
    return TrainingStream(dataset, EpochOrder(len(dataset)), batch_gpu=BATCH, workers=workers)


def our_dataset(path: Path) -> ImageDataset:
    return ImageDataset(path, use_labels=True)


BATCHES = {"plain": plain_batches, "ours": our_batches}
DATASETS = {"plain": PlainDataset, "ours": our_dataset}

#----------------------------------------------------------------------------
# Measurements, each for a process of its own.

def first_batch(who: str, path: Path) -> float:
    """Seconds of one core until the first batch is there, with no loader processes."""
    PIL.Image.init()
    torch.set_num_threads(1)
    start = time.process_time()
    images, labels = next(BATCHES[who](path, 0))
    seconds = time.process_time() - start
    assert images.shape[0] == labels.shape[0] == BATCH
    return seconds


def seconds_per_image(who: str, path: Path, count: int) -> float:
    """Seconds of one core per image, items in random order; the best of five."""
    torch.set_num_threads(1)
    dataset = DATASETS[who](path)
    items = np.random.RandomState(1).permutation(len(dataset))[:count].tolist()
    times = []
    for _ in range(5):
        start = time.process_time()
        for i in items:
            dataset[i]
        times.append(time.process_time() - start)
    return min(times) / count


def worker_bytes(who: str, path: Path, workers: int) -> int | None:
    """Memory of the loader processes together, pages that several share counted in parts; None if unknown."""
    if "fork" in multiprocessing.get_all_start_methods():       # As in training; this process was made otherwise.
        multiprocessing.set_start_method("fork", force=True)
    batches = BATCHES[who](path, workers)
    for _ in range(8 * workers):
        next(batches)
    try:
        total = 0
        for process in multiprocessing.active_children():
            report = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
            total += next(int(line.split()[1]) << 10 for line in report.splitlines() if line.startswith("Pss:"))
        return total
    except OSError:         # Not Linux.
        return None


def same_items(path: Path) -> bool:
    """Whether both ways serve the same pixels and labels."""
    plain, ours = PlainDataset(path), our_dataset(path)
    return 0 < len(plain) == len(ours) and all(
        np.array_equal(plain[i][0], ours[i][0]) and plain[i][1] == ours[i][1] for i in range(0, len(plain), 97))


def apart(function: Callable, *args: Any) -> Any:
    """The function's result in a new process."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as executor:
        result = executor.submit(function, *args).result()
    click.echo(f"{function.__name__} {' '.join(map(str, args))}: {result}", err=True)
    return result


def measure(folder: Path, count: int) -> dict[str, Any]:
    """All numbers."""
    big = write_archive(folder / "big.zip", count, 16, encode_plain_png)
    small = {kind: write_archive(folder / f"{kind}.zip", 4000, 64, encode)
             for kind, encode in (("copied", encode_plain_png), ("filtered", pillow_png))}
    found: dict[str, Any] = {"images": count, "bytes": big.stat().st_size}
    found["same"] = all(apart(same_items, path) for path in small.values())
    found["first_plain"] = min(apart(first_batch, "plain", big) for _ in range(3))
    found["first_made"] = apart(first_batch, "ours", big)
    found["first_kept"] = min(apart(first_batch, "ours", big) for _ in range(3))
    found["index_bytes"] = sum(place.stat().st_size for place in index_files(big) if place.is_file())
    for who in DATASETS:
        for kind, path in small.items():
            found[f"{kind}_{who}"] = apart(seconds_per_image, who, path, 2000)
        found[f"big_{who}"] = apart(seconds_per_image, who, big, 5000)
    found["memory_plain"] = apart(worker_bytes, "plain", big, 1)
    found["memory_ours"] = apart(worker_bytes, "ours", big, WORKERS)
    return found

#----------------------------------------------------------------------------

def speedups(found: dict[str, Any]) -> dict[str, float]:
    """How many times better than the plain way."""
    ratios = {
        "first_batch": found["first_plain"] / found["first_kept"],
        "first_batch_ever": found["first_plain"] / found["first_made"],
        "images_per_core_64": found["copied_plain"] / found["copied_ours"],
        "images_per_core_64_filtered": found["filtered_plain"] / found["filtered_ours"],
        "images_per_core_big": found["big_plain"] / found["big_ours"],
    }
    if found["memory_ours"]:
        ratios["memory_per_worker"] = found["memory_plain"] / (found["memory_ours"] / WORKERS)
    return {name: round(value, 2) for name, value in ratios.items()}


def report(found: dict[str, Any]) -> str:
    """Markdown."""
    ratios = speedups(found)

    def rate(name: str) -> str:
        return f"{1 / found[name]:,.0f} images/s"

    rows = [
        ("first batch, big archive, one core", f"{found['first_plain']:.2f} s", f"{found['first_kept']:.2f} s",
         ratios["first_batch"]),
        ("the same, the very first time (the index is made)", f"{found['first_plain']:.2f} s",
         f"{found['first_made']:.2f} s", ratios["first_batch_ever"]),
        ("one core, 64 pixels, PNG as dataset_tool.py writes it", rate("copied_plain"), rate("copied_ours"),
         ratios["images_per_core_64"]),
        ("one core, 64 pixels, PNG as Pillow writes it (official archives)", rate("filtered_plain"),
         rate("filtered_ours"), ratios["images_per_core_64_filtered"]),
        ("one core, 16 pixels, anywhere in the big archive", rate("big_plain"), rate("big_ours"),
         ratios["images_per_core_big"]),
    ]
    if found["memory_ours"]:
        rows.append((f"memory of {WORKERS} loader processes, big archive", f"{WORKERS} x "
                     f"{format_bytes(found['memory_plain'])}", format_bytes(found["memory_ours"]),
                     ratios["memory_per_worker"]))
    lines = [f"| {what} | {plain} | {ours} | {ratio:g} x |" for what, plain, ours, ratio in rows]
    return "\n".join([
        "# Reading data sets", "",
        f"`python benchmarks/bench_data.py` on {platform.machine()}, {os.cpu_count()} cores, Python "
        f"{platform.python_version()}, Pillow {PIL.__version__}, NumPy {np.__version__}.", "",
        f"The big archive has {found['images']:,} images of 16 pixels and {format_bytes(found['bytes'])}, its index "
        f"{format_bytes(found['index_bytes'])}. Memory is the sum of proportional set sizes. Both ways serve the same "
        "pixels and labels.", "",
        "| what | ZipFile and Pillow | here | |", "|---|---|---|---|", *lines, ""])


@click.command(cls=cli.Command)
@click.option("--quick", help=f"{QUICK:,} images instead of {MANY:,}", is_flag=True)
@click.option("--folder",
              help="Where archives are made  [default: temporary folder]", metavar="DIR", type=cli.PathType())
@click.option("--out", help="Write the table to this file", metavar="FILE", type=cli.PathType())
def main(quick: bool, folder: str | None, out: str | None) -> None:
    """Measure how fast data sets are opened and read."""
    work = Path(tempfile.mkdtemp(dir=folder))
    try:
        found = measure(work, QUICK if quick else MANY)
    finally:
        shutil.rmtree(work)
    text = report(found)
    click.echo(text)
    if not found["same"]:
        raise click.ClickException("the two ways serve different images or labels: the times mean nothing")
    if out is not None:
        atomic_write_text(out, text)
    click.echo(json.dumps({"speedup": speedups(found), "memory_mib": (found["memory_ours"] or 0) >> 20}))


if __name__ == "__main__":
    main()
