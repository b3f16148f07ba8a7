# SPDX-License-Identifier: Apache-2.0
"""Centres of w for multi-modal truncation (Mokady et al. 2022, "Self-Distilled StyleGAN"): k-means of many latents.

Plain truncation pulls every w towards the mean of its class, and with it every picture towards one and the same. Where
a class has several kinds of pictures, that mean may be none of them. With centres of clusters every w is pulled towards
the middle of its own kind.
"""
import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import click
import numpy as np
import torch
import tqdm

from dnnlib import UserError, cli
from dnnlib.util import atomic_file
from inference.frames import View, pictures
from inference.sample_files import Sheet
from inference.sampling import class_means, find_classes, many_w
from legacy import LoadedNetwork, load_network
from torch_utils import misc
from torch_utils.ops import dispatch
from training.generator.synthesis import distances
from training.networks_stylegan3 import Generator

NUM, NUM_PER_CLASS = 50000, 5000        # Latents, if nobody says how many.
LATENTS_AT_ONCE = 4096                  # Whose distances to all centres are in memory.
STREAM = "centroids/z"                  # Of the latents.
MOST_VALUES = 1 << 29                   # Of all w of one k-means, 2 GiB.
STARTS = 4                              # K-means ends where its start leads it, so the best of several counts.
CHECKED_PER_CLASS = 32                  # w of each class whose nearest centres are looked at in the end.

#----------------------------------------------------------------------------

def find_centers(w: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Centres float32 [clusters, w_dim] of the clusters of w [N, w_dim], that of the largest one first.

    K-means with the k-means++ start (Arthur and Vassilvitskii 2007), by scikit-learn. In one thread: several would add
    up in the order in which they are done, and the same seed would give other last digits.

    Raises:
        UserError: the w are too much alike, or scikit-learn is not there.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as err:
        raise UserError("centres of w: need scikit-learn: pip install scikit-learn") from err
    kmeans = KMeans(clusters, init="k-means++", n_init=STARTS, random_state=misc.random_state(seed))
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)         # It is about what is refused below.
        labels = kmeans.fit_predict(w)
    sizes = np.bincount(labels, minlength=clusters)
    if sizes.min() == 0:
        raise UserError(f"--clusters={clusters}: the {len(w)} latents have only {np.count_nonzero(sizes)} different w: "
                        "give fewer clusters, or a network whose mapping has not collapsed")
    centers: np.ndarray = kmeans.cluster_centers_[np.argsort(-sizes, kind="stable")].astype(np.float32)
    return centers

#----------------------------------------------------------------------------

def mean_distance(w: torch.Tensor, centers: torch.Tensor) -> float:
    """Mean of the distances from each w [N, w_dim] to the nearest of the centres [K, w_dim]."""
    return float(torch.cat([distances(part, centers).amin(dim=1) for part in w.split(LATENTS_AT_ONCE)]).mean())


@dataclasses.dataclass(frozen=True)
class Found:
    """The centres, and how near some w are to them."""

    centers: np.ndarray             # float32 [K, w_dim].
    to_centers: float               # Mean distance to the nearest of them,
    to_means: float                 # and to the mean of the class, where plain truncation pulls.
    own: float | None = None        # Share of w whose nearest centre is one of their own class.

    def __str__(self) -> str:
        text = (f"{len(self.centers)} centres; on average a w is {self.to_centers:.3g} from the nearest one and "
                f"{self.to_means:.3g} from the mean of its class")
        return text if self.own is None else f"{text}; {self.own:.1%} of w are nearest to a centre of their own class"


def centers_over_all(G: Generator, num: int, clusters: int, classes: list[int], seed: int) -> Found:
    """Clusters of the w of all these classes together. Raises UserError."""
    w, labels = many_w(G, num, classes, seed, STREAM)
    centers = find_centers(w, clusters, seed)
    some = torch.from_numpy(w)
    to_means = (some - class_means(G, labels)).norm(dim=1).mean()
    return Found(centers, mean_distance(some, torch.from_numpy(centers)), float(to_means))


def centers_per_class(G: Generator, num: int, clusters: int, classes: list[int], seed: int) -> Found:
    """Clusters of the w of each class by itself, in the order of the classes. Raises UserError."""
    centers, some = [], []
    for k in tqdm.tqdm(classes, unit="class", disable=None):
        of_class, _ = many_w(G, num, [k], seed, STREAM)
        centers.append(find_centers(of_class, clusters, seed))
        some.append(of_class[:CHECKED_PER_CLASS].copy())        # A view would keep all of them.
    owners = torch.tensor(classes).repeat_interleave(len(some[0]))
    w, every = torch.from_numpy(np.concatenate(some)), torch.from_numpy(np.concatenate(centers))
    nearest = torch.cat([distances(part, every).argmin(dim=1) for part in w.split(LATENTS_AT_ONCE)])
    own = torch.tensor(classes)[nearest // clusters] == owners
    to_means = (w - class_means(G, owners)).norm(dim=1).mean()
    return Found(every.numpy(), mean_distance(w, every), float(to_means), float(own.float().mean()))

#----------------------------------------------------------------------------

def center_images(G: Generator, centers: np.ndarray, precision: str) -> Iterator[np.ndarray]:
    """The pictures of the centres, uint8 [R, R, 3]."""
    ws = torch.from_numpy(centers).unsqueeze(1).expand(-1, G.num_ws, -1)
    places = torch.eye(3).expand(len(ws), -1, -1)
    for picture in pictures(G, [View(ws, places)], batch_size=1, precision=precision):
        yield picture.permute(1, 2, 0).numpy()


def sheet_of_centers(loaded: LoadedNetwork, clusters: int, classes: list[int] | None) -> Sheet:
    """A row per class, or a grid for centres over all. Raises UserError: it would be too large."""
    G = loaded.G_ema
    if classes is None:
        columns = int(np.ceil(clusters ** 0.5))
        sheet = Sheet(G.img_resolution, columns, -(-clusters // columns))
    else:
        names = loaded.class_names or [str(k) for k in range(G.c_dim)]
        sheet = Sheet(G.img_resolution, clusters, len(classes), names=[names[k] for k in classes])
    if sheet.is_too_large:
        raise UserError("--sheet: the centres are more than fit into one picture: leave it out, or name some classes "
                        "by --class")
    return sheet


def check_numbers(G: Generator, num: int, clusters: int) -> None:
    """Refuse what cannot be. Raises UserError."""
    if clusters > num:
        raise UserError(f"--clusters={clusters}: more than the {num} latents of --num: give fewer, or more latents")
    if num * G.w_dim > MOST_VALUES:
        raise UserError(f"--num={num}: their w do not fit into 2 GiB: give at most {MOST_VALUES // G.w_dim}")

#----------------------------------------------------------------------------

@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
              type=cli.PathType(addresses=True), required=True)
@click.option("--dest", help="Where to write the centres, .npy", metavar="FILE", type=cli.OutputFile(),
              required=True)
@click.option("--clusters", help="Centres; with --per-class of each class", metavar="INT", type=cli.IntRange(min=1),
              required=True)
@click.option("--num", help=f"Latents to look at; with --per-class of each class  [default: {NUM}, or {NUM_PER_CLASS} "
              "of each class]", metavar="INT", type=cli.IntRange(min=1))
@click.option("--per-class", help="Clusters of each class by itself", is_flag=True)
@click.option("--class", "--classes", "class_name", help="Only these classes, by name or index, e.g. cat,3,5-7  "
              "[default: all]", metavar="NAME,INT...")
@click.option("--seed", help="Random seed of the latents and of the starts of k-means", metavar="INT",
              type=cli.Seed(), default=0, show_default=True)
@click.option("--sheet", help="Also draw the pictures of the centres", metavar="PNG", type=cli.OutputFile())
@cli.precision_option()
@cli.device_option()
def main(network: str, dest: str, clusters: int, num: int | None, per_class: bool, class_name: str | None, seed: int,
         sheet: str | None, precision: str, device: str) -> None:
    """Find centres of w, by k-means, that truncation pulls towards: gen_images.py --centroids-path.

    \b
    Example:
      python -m inference.centroids --network=best_model.pkl --clusters=8 --per-class --dest=centres.npy
      python gen_images.py --network=best_model.pkl --centroids-path=centres.npy --trunc=0.5 --seeds=0-9 --outdir=out
    """
    if not dest.endswith(".npy"):
        raise UserError(f"--dest={dest}: is read by its suffix: name a file that ends with .npy")
    target = misc.select_device(device)
    click.echo(dispatch.start_lines(target), err=True)
    loaded = load_network(network, target)
    G = loaded.G_ema
    if per_class and G.c_dim == 0:
        raise UserError("--per-class: the network is unconditional: leave it out")
    classes = list(range(max(G.c_dim, 1)))
    if class_name is not None:
        classes = list(dict.fromkeys(find_classes(class_name, loaded.class_names, G.c_dim)))
    count = num or (NUM_PER_CLASS if per_class else NUM)
    check_numbers(G, count, clusters)
    form = None if sheet is None else sheet_of_centers(loaded, clusters, classes if per_class else None)
    find = centers_per_class if per_class else centers_over_all
    # That files can be written shows before anything is computed.
    with contextlib.nullcontext() if sheet is None else atomic_file(sheet) as picture:
        with atomic_file(dest) as f:
            found = find(G, count, clusters, classes, seed)
            np.save(f, found.centers)
        if picture is not None and form is not None:
            form.draw(center_images(G, found.centers, precision)).save(picture, format="PNG")
    click.echo(f"{dest}: {found}")


if __name__ == "__main__":
    main()
