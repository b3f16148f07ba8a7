# SPDX-License-Identifier: Apache-2.0
"""The generator's table of class vectors: from the user's own images, from a file, or random; any number of classes.

StyleGAN-XL (Sauer et al., SIGGRAPH 2022, section 3.2) starts from the pooled backbone features of each class, averaged.
It has them for ImageNet alone; here they are computed from the data set at hand. A file of them for several runs:

    python -m training.feature_networks.class_embedding --data=birds32.zip --out=birds.safetensors
    python train.py --data=birds16.zip --embedding=birds.safetensors ...
"""
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.torch
import timm
import torch
import tqdm

from dnnlib import UserError, cli
from dnnlib.classes import Classes, is_unnamed
from dnnlib.util import atomic_file, list_some, parse_json
from torch_utils import checkpoint, misc, safe_pickle
from torch_utils.arrays import open_npz, read_npy
from torch_utils.images import from_uint8
from torch_utils.pickle_values import Call, TensorRecord
from torch_utils.schema import items, nothing_or, text
from torch_utils.weights import open_safetensors, read_weights
from training.data.randomness import permutation
from training.dataset import ImageDataset, load_batches
from training.feature_networks.backbones import Backbone
from training.feature_networks.fast import optimize_frozen
from training.feature_networks.kept_vectors import KeptVectors
from training.feature_networks.registry import load_backbone

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
MAX_PER_CLASS = 256         # Images per class that a mean is taken over.
BATCH = 32
SAY_SECONDS = 30            # Time between two lines about the progress, where there is no terminal for a bar.
KEEP_SECONDS = 10           # A table that took less time is not kept: it is sooner made than found.
SAME = 1e-6                 # Rows closer to the mean than this share of its length are the mean but for rounding.
READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".pkl": lambda path: _pickled(path),
    ".npy": lambda path: {"": torch.as_tensor(read_npy(path))},
    ".npz": lambda path: {name: torch.as_tensor(value) for name, value in _npz_items(path)},
    ".pt": lambda path: _named(checkpoint.load_plain(path)),
    ".safetensors": lambda path: read_weights(path),
}

#----------------------------------------------------------------------------

def class_embedding(kind: str, c_dim: int, dataset: ImageDataset | None = None, backbone: Backbone | str | None = None,
                    seed: int = 0, device: str | torch.device = "cpu", embed_dim: int = 320, workers: int = 0,
                    say: Callable[[str], None] = lambda text: None) -> torch.Tensor:
    """One vector per class, float32 [c_dim, dim], on the CPU.

    Args:
        kind: 'random': standard normal, dim = `embed_dim`. 'data': mean of the backbone's pooled last map over up to
            256 images of the class. 'centred': these by `centred_table`. Otherwise a file with one array of `c_dim`
            rows: .npy, .npz, .pt, .safetensors, or .pkl as officially published (it is read as data, nothing in it is
            run).
        c_dim: Number of classes.
        dataset: For 'data' and 'centred': an `ImageDataset` with labels in use.
        backbone: For the same: the network or its name; None for tf_efficientnet_lite0. What a named network gives of a
            data set on a disk is kept for the next time, if it took long.
        seed: Decides the random vectors, or the choice of images.
        device: Where the backbone computes.
        embed_dim: Width of random vectors.
        workers: Processes that load images.
        say: Takes lines about the progress, because this may take minutes.

    Raises:
        UserError: unknown kind; a file that cannot be read, does not have `c_dim` rows or names other classes.
    """
    if kind == "random":
        return torch.randn(c_dim, embed_dim, generator=torch.Generator().manual_seed(seed))
    if kind in ("data", "centred"):
        backbone = DEFAULT_BACKBONE if backbone is None else backbone
        table = _from_data(kind, c_dim, dataset, backbone, seed, device, workers, say)
        return centred_table(table) if kind == "centred" else table
    if Path(kind).suffix in READERS:
        return _from_file(Path(kind), c_dim, getattr(dataset, "class_names", None))
    raise UserError(f"--embedding={kind}: choose data, centred, random, or a file that ends with "
                    f"{', '.join(READERS)}")


def centred_table(table: torch.Tensor) -> torch.Tensor:
    """The rows [c_dim, dim] without what all of them have in common, each as long as rows were on average before.

    Features of few classes of one style are nearly the same: those of OpenMoji's eleven classes have cosines up to
    0.98, and a generator that is given them is slow to tell the classes apart. Not in the paper. A row that is the mean
    becomes zero; the only row of a table stays as it is.
    """
    if len(table) < 2:
        return table
    rows = table.double()
    length = rows.norm(dim=1).mean()
    rows = rows - rows.mean(dim=0)
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > SAME * length, rows * (length / norms), 0.0).float()

#----------------------------------------------------------------------------
# From images.

@torch.no_grad()
def _from_data(kind: str, c_dim: int, dataset: ImageDataset | None, backbone: Backbone | str, seed: int,
               device: str | torch.device, workers: int, say: Callable[[str], None]) -> torch.Tensor:
    if dataset is None:
        raise UserError(f"--embedding={kind}: needs labelled images: give --data, or take --embedding=random")
    labels = np.asarray(dataset.labels, dtype=np.int64)
    if len(labels) and labels.max() >= c_dim:
        raise UserError(f"--embedding={kind}: the data set has label {labels.max()}, but the model {c_dim} classes")
    if isinstance(backbone, str):
        # float32: bfloat16 would save little more time than layout and folding do, and give vectors that are 4 % off.
        net = load_backbone(backbone).to(device)
        optimize_frozen(net, "fp32")
        kept = _kept(dataset, labels, c_dim, net, seed)
    else:
        net, kept = backbone.to(device), None
    if kept is not None and (table := kept.read(say)) is not None:
        return table
    begun = time.monotonic()
    table = _means(c_dim, dataset, labels, net, seed, device, workers, say)
    if kept is not None and time.monotonic() - begun >= KEEP_SECONDS:
        kept.keep(table, say)
    return table


def _kept(dataset: ImageDataset, labels: np.ndarray, c_dim: int, net: Backbone, seed: int) -> KeptVectors | None:
    """Where the vectors of this data set by this network are kept; None for images that are no data set on a disk."""
    path = getattr(dataset, "path", None)
    if path is None:
        return None
    return KeptVectors({
        "data": dataset.fingerprint, "labels": hashlib.sha256(labels.tobytes()).hexdigest(), "classes": str(c_dim),
        "network": net.name, "weights": net.sha256 or net.source, "seed": str(seed),
        "images_per_class": str(MAX_PER_CLASS), "libraries": f"torch {torch.__version__}, timm {timm.__version__}",
    }, Path(path))


def _means(c_dim: int, dataset: ImageDataset, labels: np.ndarray, net: Backbone, seed: int,
           device: str | torch.device, workers: int, say: Callable[[str], None]) -> torch.Tensor:
    sums = torch.zeros(c_dim, net.channels[-1], dtype=torch.float64)
    batches = list(_batches(_some_of_each(labels, seed)))
    total, done, said = sum(map(len, batches)), 0, time.monotonic()
    say(f"    class vectors: features of {total} images")
    # On a terminal a bar, elsewhere lines: a bar in a file is a heap of its states.
    with tqdm.tqdm(total=total, desc="class vectors", unit="img", disable=None, leave=False) as bar:
        for images, theirs in load_batches(dataset, batches, workers):
            pooled = net.pooled(net.preprocess(from_uint8(images.to(device))))
            sums.index_add_(0, theirs, pooled.cpu().double())
            done += len(images)
            bar.update(len(images))
            if bar.disable and time.monotonic() - said > SAY_SECONDS:
                said = time.monotonic()
                say(f"    class vectors: {done} of {total} images")
    counts = torch.as_tensor(np.minimum(np.bincount(labels, minlength=c_dim), MAX_PER_CLASS))
    means = sums / counts.clamp_min(1)[:, None]
    missing = (counts == 0).nonzero()[:, 0].tolist()
    if missing:
        warnings.warn(f"class embedding: no images of class {list_some(missing)}: the mean of the other classes stands "
                      "in", stacklevel=4)
        means[missing] = means[counts > 0].mean(dim=0)
    if not means.isfinite().all():
        raise UserError("--embedding: the features of the backbone are not finite, so its weights are damaged: "
                        "get them anew, or name another network by --backbones")
    return means.float()


def _some_of_each(labels: np.ndarray, seed: int) -> np.ndarray:
    """Indices of up to MAX_PER_CLASS items per class, in ascending order: a seeded choice."""
    order = permutation(seed, 0, len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]      # Each class in random order.
    sorted_labels = labels[by_class]
    rank = np.arange(len(labels)) - np.searchsorted(sorted_labels, sorted_labels)
    return np.sort(by_class[rank < MAX_PER_CLASS])


def _batches(items: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(items), BATCH):
        yield items[start:start + BATCH]

#----------------------------------------------------------------------------
# From a file.

def _npz_items(path: Path) -> list[tuple[str, np.ndarray]]:
    with open_npz(path) as content:
        return [(name, content[name]) for name in content.files]


def _named(content: Any) -> dict[str, Any]:
    """The content of a .pt file, which is a tensor or a dict of tensors, as a dict."""
    return content if isinstance(content, dict) else {"": content}


def _pickled(path: Path) -> dict[str, Any]:
    """The tables in a pickle: tensors and arrays of two dimensions, whatever objects hold them."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    waiting: list[Any] = [safe_pickle.read(path)]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, TensorRecord) and len(value.shape) == 2:
            found.append(value.load())
        elif isinstance(value, np.ndarray) and value.ndim == 2:
            found.append(torch.as_tensor(value))
        elif isinstance(value, Call):
            waiting += [*value.args, *value.kwargs.values(), *value.states, *value.elements, *value.entries]
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    return {str(i): table for i, table in enumerate(found)}


def _named_classes(path: Path) -> list[str] | None:
    """The class names that a file of `save_table` holds."""
    if path.suffix != ".safetensors":
        return None
    with open_safetensors(path) as file:
        named = parse_json((file.metadata() or {}).get("classes", "null"))
    nothing_or(items(text))(named, "its list of classes")
    classes: list[str] | None = named
    return classes


def _from_file(path: Path, c_dim: int, class_names: list[str] | None) -> torch.Tensor:
    if not path.is_file():
        raise UserError(f"--embedding={path}: no such file")
    try:
        arrays, named = READERS[path.suffix](path), _named_classes(path)
    except UserError as err:
        raise UserError(f"--embedding={path}: cannot be read: {err}") from err
    except Exception as err:        # Damaged files provoke exceptions of every kind.
        raise UserError(f"--embedding={path}: cannot be read ({type(err).__name__}): give one array of numbers, "
                        f"[{c_dim}, width]") from err
    tables = [torch.as_tensor(value) for value in arrays.values() if isinstance(value, torch.Tensor)]
    if len(tables) != 1:
        raise UserError(f"--embedding={path}: holds {len(tables)} arrays: keep the one of shape [{c_dim}, width]")
    table = tables[0].float()
    if table.ndim != 2 or table.shape[0] != c_dim or table.shape[1] < 1:
        raise UserError(f"--embedding={path}: the array has shape {list(table.shape)}, but the data has {c_dim} "
                        f"classes: give one row per class, [{c_dim}, width]")
    if not table.isfinite().all():
        raise UserError(f"--embedding={path}: holds values that are not finite: compute it again")
    _check_names(path, named, class_names)
    return table


def _check_names(path: Path, named: list[str] | None, class_names: list[str] | None) -> None:
    """Raise UserError unless row k is the vector of class k."""
    if named is None or class_names is None or is_unnamed(named) or is_unnamed(class_names) \
            or len(named) != len(class_names):
        return
    found = Classes(named).find_all(class_names)
    other = [f"{named[i]} instead of {name}" for i, name in enumerate(class_names) if found[i] != i]
    if other:
        raise UserError(f"--embedding={path}: made for other classes: {list_some(other)}: compute it from this data")

#----------------------------------------------------------------------------

def save_table(path: str | os.PathLike[str], table: torch.Tensor, facts: dict[str, str]) -> None:
    """Write a table as .npy, or as .safetensors with these facts in its header."""
    with atomic_file(path) as file:
        if Path(path).suffix == ".npy":
            np.save(file, table.numpy())
        else:
            file.write(safetensors.torch.save({"embedding": table}, metadata=facts))


@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--data", help="Images with labels", metavar="ZIP|DIR", type=cli.PathType(), required=True)
@click.option("--backbone", help="Feature network: see --backbones of train.py", metavar="NAME", type=cli.PathType(),
              show_default=True, default=DEFAULT_BACKBONE)
@click.option("--out",
              help="Where to save the table", metavar="FILE.safetensors|FILE.npy", type=cli.PathType(), required=True)
@click.option("--centred", help="Subtract the mean of the classes, as --embedding=centred does", is_flag=True)
@click.option("--seed", help="Chooses the images of large classes", metavar="INT", type=cli.Seed(),
              default=0, show_default=True)
@click.option("--workers", help="Processes that load images", metavar="INT", type=cli.IntRange(min=0), default=3,
              show_default=True)
@cli.device_option()
def main(data: str, backbone: str, out: str, centred: bool, seed: int, workers: int, device: str) -> None:
    """Compute one vector per class: the mean of a backbone's pooled features over up to 256 images of it."""
    if Path(out).suffix not in (".safetensors", ".npy"):
        raise UserError(f"--out={out}: must end in .safetensors or .npy")
    dataset = ImageDataset(data, use_labels=True)
    kind = "centred" if centred else "data"
    table = class_embedding(kind, dataset.c_dim, dataset, backbone, seed, misc.select_device(device), workers=workers,
                            say=lambda text: click.echo(text, err=True))
    save_table(out, table, {"classes": json.dumps(dataset.class_names), "backbone": backbone,
                            "data_fingerprint": dataset.fingerprint})
    click.echo(f"{out}: {table.shape[0]} classes, {table.shape[1]} numbers each, from {dataset.path} by {backbone}")


if __name__ == "__main__":
    main()
