# SPDX-License-Identifier: Apache-2.0
"""Score a generator or a set of images: metrics as a table for people and as JSON lines for programs."""
import sys
from typing import Any

import click
import numpy as np
import torch

import dnnlib.cli
from dnnlib import EasyDict, UserError
from inference import image_inputs
from metrics import metric_main, records
from metrics.detectors import load_detector
from metrics.options import MetricOptions
from metrics.real_side import compute_statistics
from metrics.references import Reference, load_statistics, save_statistics
from metrics.sources import ImageSource, seeded_subset
from torch_utils import distributed, misc
from torch_utils.ops import dispatch
from training.dataset import ImageDataset

CUDA_WORKERS = 3        # Decoding processes where a GPU would wait for images.

#----------------------------------------------------------------------------
# The two sides.

def open_reference(path: str, labels: bool, workers: int) -> Reference:
    """The real side: images, statistics, or both (ADM's files).

    Raises:
        UserError: nothing usable at `path`.
    """
    if image_inputs.kind_of(path) != "statistics":
        return Reference(image_inputs.open_images(path, ImageDataset, labels, workers))
    images = image_inputs.NpzSource(path) if image_inputs.has_samples(path) else None
    return Reference(images, load_statistics(path))


def label_probs(opts: EasyDict, c_dim: int, reference: Reference | None) -> np.ndarray | None:
    """Shares of the classes in the reference data set, float64 [c_dim]; None where no class is drawn by them.

    Raises:
        UserError: the data set has no labels, or more classes than the network.
    """
    if c_dim == 0 or opts.labels != "dataset":
        return None
    labels = getattr(reference.source, "labels", None) if reference else None
    if labels is None:
        raise UserError("--labels=dataset: classes are drawn as the reference data set has them, but it has no labels: "
                        "name a data set with labels by --data, or use --labels=uniform or --labels=balanced")
    counts = np.bincount(labels, minlength=c_dim)
    if len(counts) > c_dim:
        raise UserError(f"--data={opts.data or opts.ref}: has the label {len(counts) - 1}, but the network knows "
                        f"{c_dim} classes: use the data set it was trained on, or --labels=uniform")
    return counts / counts.sum()


def network_source(opts: EasyDict, network: Any, reference: Reference | None) -> metric_main.SourceFactory:
    """Makes sources of images from the loaded network."""
    from inference.sampling import GeneratorSource

    G = network.G_ema
    probs = label_probs(opts, G.c_dim, reference)

    def make(num: int) -> ImageSource:
        source = GeneratorSource(G, num, opts.seed, opts.labels, probs, opts.trunc, fingerprint=network.sha256)
        source.description.update(path=str(network.path), num_images=num, resolution=G.img_resolution,
                                  class_names=network.class_names)
        return source

    return make


def image_source(opts: EasyDict, names: list[str], workers: int) -> metric_main.SourceFactory:
    """Makes seeded subsets of the images that are to be scored."""
    if image_inputs.kind_of(opts.images) == "statistics" and not image_inputs.has_samples(opts.images):
        raise UserError(f"--images={opts.images}: holds statistics, not images: give them by --ref")
    source = image_inputs.open_images(opts.images, ImageDataset, metric_main.needs_labels(names), workers)
    if source.description.get("has_jpeg"):
        distributed.print0(f"Warning: {opts.images} holds JPEG files, whose compression moves every metric: save "
                           "samples as PNG", file=sys.stderr)
    return lambda num: seeded_subset(source, num, opts.seed, what=f"--images={opts.images}")

#----------------------------------------------------------------------------
# The command.

def check_options(opts: EasyDict) -> None:
    """Refuse flags that do not go together. Raises UserError."""
    if opts.network is not None and opts.images is not None:
        raise UserError("--network and --images: name one of them, the generator or the images to score")
    if opts.data is not None and opts.ref is not None:
        raise UserError("--data and --ref: both name the real images: give one of them")
    reference = opts.data or opts.ref
    if opts.network is None and opts.images is None and opts.save_ref is None:
        raise UserError("nothing to score: name a generator by --network or images by --images")
    if opts.save_ref is not None and reference is None:
        raise UserError(f"--save-ref={opts.save_ref}: name the images to take statistics of by --data or --ref")
    if opts.network is None and opts.trunc != 1:
        raise UserError(f"--trunc={opts.trunc}: has no effect without --network: leave it out")
    launched = distributed.launched_world_size()
    if launched is not None and opts.gpus not in (1, launched):
        raise UserError(f"--gpus={opts.gpus}: torchrun started {launched} processes: leave --gpus out")


def metric_options(opts: EasyDict, device: torch.device, network: Any) -> MetricOptions:
    """Flags as the metrics take them."""
    record = {} if network is None else {"snapshot_pkl": str(network.path), "network_sha256": network.sha256}
    return MetricOptions(
        device=device, batch_size=opts.batch, num=opts.num, seed=opts.seed, detector=opts.detector,
        weights_dir=opts.weights, offline=opts.offline or None, mirror=opts.mirror, out_dir=opts.out,
        verbose=opts.verbose, use_cache=not opts.no_cache, record=record)


def save_reference(opts: EasyDict, reference: Reference, options: MetricOptions) -> None:
    """Statistics of the reference images by one detector, to a file."""
    if reference.source is None:
        raise UserError(f"--save-ref={opts.save_ref}: {opts.data or opts.ref} holds statistics already: name images")
    detector = load_detector(opts.detector or metric_main.INCEPTION, options.device, opts.weights, options.offline)
    statistics = compute_statistics(reference.source, detector, opts.mirror, options)
    if statistics is not None:
        save_statistics(opts.save_ref, statistics, {"mirror": opts.mirror, "version": records.code_version()})
        print(f"{opts.save_ref}: statistics of {statistics.num_images} images by {detector.name}", file=sys.stderr)


def preflight(opts: EasyDict) -> list[str]:
    """Everything that can be refused cheaply; returns the metrics to compute.

    Raises:
        UserError: a path where nothing is, an unknown name, weights that cannot be had.
    """
    for path in (opts.images, opts.data, opts.ref):
        if path is not None:
            image_inputs.kind_of(path)
    names = opts.metrics if opts.network is not None or opts.images is not None else []
    metric_main.preflight(names, metric_options(opts, torch.device("cpu"), None))
    return names


def run(opts: EasyDict, device: torch.device) -> list[dict[str, Any]]:
    """Everything after the flags are read. All processes call it.

    Raises:
        UserError: see `preflight` and `metrics.metric_main.evaluate`.
    """
    names = preflight(opts)
    workers = opts.workers if opts.workers is not None else CUDA_WORKERS if device.type == "cuda" else 0
    network = None
    if opts.network is not None:
        from legacy import load_network
        distributed.print0(dispatch.describe(device), file=sys.stderr)
        network = load_network(opts.network, device)
    wants_labels = network is not None and network.G_ema.c_dim > 0 and opts.labels == "dataset"
    path = opts.data or opts.ref
    reference = None if path is None else open_reference(path, wants_labels, workers)
    options = metric_options(opts, device, network)
    if (warning := metric_main.unused_mirror(names, options)) is not None:
        distributed.print0(f"Warning: {warning}", file=sys.stderr)
    results = []
    if opts.network is not None or opts.images is not None:
        generated = (image_source(opts, names, workers) if network is None
                     else network_source(opts, network, reference))
        results = metric_main.evaluate(names, generated, reference, options)
    if opts.save_ref is not None:
        save_reference(opts, reference, options)
    return results


@click.command(cls=dnnlib.cli.Command)
@click.option("--metrics", metavar="[NAME,NAME...|none]", type=dnnlib.cli.StrList(), default="fid50k_full",
              show_default=True, help="fid50k_full, fid10k_full, kid50k_full, pr50k3_full, is50k; or with --num and "
              "--detector of your choice: fid, kid, pr, is, accuracy")
@click.option("--network", metavar="PKL|DIR", help="Generator to score: a snapshot, an official pickle, or a run")
@click.option("--images", metavar="ZIP|DIR|NPZ", help="Images to score instead of a generator")
@click.option("--data", metavar="ZIP|DIR", help="Real images to compare with")
@click.option("--ref", metavar="NPZ|ZIP|DIR", help="The same, or stored statistics (keys mu and sigma)")
@click.option("--save-ref", metavar="NPZ", help="Write the statistics of --data or --ref to this file")
@click.option("--detector", metavar="NAME|PATH", help="Feature network of fid, kid, pr, is, accuracy and --save-ref: "
              "inception-2015-12-05, vgg16, or a judge's .safetensors  [default: inception; for pr vgg16]")
@click.option("--num", metavar="INT", type=click.IntRange(min=1),
              help="Images to score with fid, kid, pr, is, accuracy  [default: 50000]")
@click.option("--seed", metavar="INT", type=click.IntRange(min=0), default=0, show_default=True,
              help="Of latents, classes and every random choice of a metric")
@click.option("--labels", metavar="dataset|uniform|balanced", default="dataset", show_default=True,
              type=click.Choice(["dataset", "uniform", "balanced"]), help="How classes of generated images are drawn: "
              "as often as in --data, all alike, or equally many of each")
@click.option("--trunc", metavar="FLOAT", type=float, default=1, show_default=True, help="Truncation psi")
@click.option("--mirror", metavar="BOOL", type=bool, default=False, show_default=True,
              help="fid, kid, pr, --save-ref: add the mirror images of the real images")
@click.option("--batch", metavar="INT", type=click.IntRange(min=1), default=64, show_default=True,
              help="Images generated or read at a time; moves no result")
@click.option("--gpus", metavar="INT", type=click.IntRange(min=1), default=1, show_default=True,
              help="Processes to start on this machine (torchrun works too)")
@click.option("--workers", metavar="INT", type=click.IntRange(min=0),
              help="Processes that decode real images  [default: 3 with a GPU, else 0]")
@dnnlib.cli.device_option()
@click.option("--weights", metavar="DIR", help="Folder with files of detector weights")
@click.option("--offline", is_flag=True, help="Never download")
@click.option("--no-cache", is_flag=True, help="Neither use nor keep statistics of real images")
@click.option("--out", metavar="DIR", help="Append results to metric-<name>.jsonl in this folder")
@click.option("--verbose", metavar="BOOL", type=bool, default=True, show_default=True, help="Progress bars")
@click.pass_context
def main(ctx: click.Context, **kwargs: Any) -> None:
    """Compute metrics of a generator or of images.

    The table goes to stderr; stdout gets one line of JSON per metric with everything that made the number.

    Examples:

    \b
      # FID of a snapshot against its data set
      python calc_metrics.py --network=best_model.pkl --data=datasets/cifar10.zip --metrics=fid50k_full
    \b
      # A folder of samples against ADM's reference file
      python calc_metrics.py --images=samples/ --ref=VIRTUAL_imagenet256_labeled.npz --metrics=fid,is --num=50000
    \b
      # Statistics for later, by a judge trained on the same classes; then a score
      python calc_metrics.py --data=data.zip --detector=judge.safetensors --save-ref=ref.npz
      python calc_metrics.py --images=out.npz --ref=ref.npz --detector=judge.safetensors --metrics=fid --num=1000
    """
    opts = EasyDict(kwargs)
    check_options(opts)
    if opts.gpus > 1 and distributed.launched_world_size() is None:
        preflight(opts)     # Once and in one line, before several processes fail with as many.
        ctx.exit(distributed.run_local_processes(opts.gpus, sys.argv))

    def score(device: torch.device) -> int:
        results = run(opts, device)
        if results:
            distributed.print0(records.table(results), file=sys.stderr)
        for record in results:
            distributed.print0(records.json_line(record))
        return 0

    distributed.run_in_group(misc.select_device(opts.device), score)


if __name__ == "__main__":
    main()
