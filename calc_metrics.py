# SPDX-License-Identifier: Apache-2.0
"""Score a generator or a set of images: metrics as a table for people and as JSON lines for programs."""
import dataclasses
import functools
import sys
from typing import Any

import click
import numpy as np
import torch
from click.core import ParameterSource

import dnnlib.cli
from dnnlib import UserError
from dnnlib.download import local_file
from inference import image_inputs
from inference.samples import class_shares
from metrics import metric_main, protocols, records
from metrics.latents import check_untruncated
from metrics.options import MetricOptions
from metrics.real_side import compute_statistics
from metrics.references import Reference, load_statistics, save_statistics
from metrics.sources import ImageSource, seeded_subset
from torch_utils import distributed, misc
from torch_utils.ops import dispatch

CUDA_WORKERS = 3        # Decoding processes where a GPU would wait for images.
OFFICIAL = [name for name in protocols.METRICS if protocols.METRICS[name].is_official]
FREE = [name for name in protocols.METRICS if not protocols.METRICS[name].is_official]

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ScoreOptions:
    """What a command line says; `calc_metrics.py --help` explains each."""

    paths: tuple[str, ...]
    metrics: list[str]
    network: str | None
    images: str | None
    images_split: str | None
    data: str | None
    ref: str | None
    split: str | None
    save_ref: str | None
    save_ref_images: int | None
    detector: str | None
    num: int | None
    seed: int
    labels: str
    trunc: float
    mirror: bool
    batch: int
    gpus: int
    workers: int | None
    precision: str
    device: str
    weights: str | None
    offline: bool
    allow_unverified_weights: bool
    no_cache: bool
    out: str | None
    verbose: bool

#----------------------------------------------------------------------------
# The two sides.

def open_reference(path: str, labels: bool, workers: int, split: str | None = None) -> Reference:
    """The real side: images, statistics, or both (ADM's files).

    Raises:
        UserError: nothing usable at `path`, or a split must be chosen.
    """
    if image_inputs.kind_of(path) != "statistics":
        source = image_inputs.open_images(path, labels, workers, split)
        say_source(path, source)
        return Reference(source)
    if split is not None:
        raise UserError(f"--split={split}: {path} holds statistics, which have no splits: leave it out")
    images = image_inputs.open_images(path) if image_inputs.has_samples(path) else None
    reference = Reference(images, load_statistics(path))
    say_kind(path, f"{reference.statistics[0].format}, {reference.holdings()}"
             + (f", {images.num_images} images" if images else ""))
    return reference


def say_kind(path: str, kind: str) -> None:
    """Tell what a path was taken for: it is found from the content, so a surprise is worth a line."""
    distributed.print0(f"Reading {path}: {kind}", file=sys.stderr)


def say_source(path: str, source: image_inputs.DatasetSource) -> None:
    """The same of images: also splits, classes, and what is done to files when they are read."""
    said = (image_inputs.summary(source), source.understood, source.description.get("changes"))
    say_kind(path, "; ".join(part for part in said if part))


def label_probs(opts: ScoreOptions, network: Any, reference: Reference | None) -> np.ndarray | None:
    """Shares of the network's classes in the reference data set, float64 [c_dim]; None where no class is drawn by them.

    Raises:
        UserError: the data set has no labels, or classes that the network does not know.
    """
    c_dim = network.G_ema.c_dim
    if c_dim == 0 or opts.labels != "dataset":
        return None
    labels = getattr(reference.source, "labels", None) if reference else None
    if labels is None or reference is None or reference.source is None:
        raise UserError("--labels=dataset: classes are drawn as the reference data set has them, but it has no labels: "
                        "name a data set with labels by --data, or use --labels=uniform or --labels=balanced")
    shares, note = class_shares(f"--{'data' if opts.data else 'ref'}={opts.data or opts.ref}", labels,
                                reference.source.description.get("class_names"), f"--network={opts.network}",
                                network.class_names, c_dim)
    if note:
        distributed.print0(f"Note: {note}", file=sys.stderr)
    return shares


def network_source(opts: ScoreOptions, network: Any, reference: Reference | None) -> metric_main.SourceFactory:
    """Makes sources of images from the loaded network."""
    from inference.sampling import GeneratorSource

    G = network.G_ema
    probs = label_probs(opts, network, reference)

    def make(num: int) -> ImageSource:
        source = GeneratorSource(G, num, opts.seed, opts.labels, probs, opts.trunc, fingerprint=network.sha256,
                                 precision=opts.precision, class_names=network.class_names)
        source.description.update(path=str(network.path), num_images=num, resolution=G.img_resolution)
        return source

    return make


def image_source(opts: ScoreOptions, names: list[str], workers: int) -> ImageSource:
    """The images that are to be scored."""
    assert opts.images is not None, "check_options has seen it"
    if image_inputs.kind_of(opts.images) == "statistics" and not image_inputs.has_samples(opts.images):
        raise UserError(f"--images={opts.images}: holds statistics, not images: give them by --ref")
    source = image_inputs.open_images(opts.images, metric_main.needs_labels(names), workers, opts.images_split,
                                      "--images-split")
    say_source(opts.images, source)
    if lossy := source.description.get("lossy"):
        distributed.print0(f"Warning: {opts.images} holds files compressed by {lossy}, which moves every metric: save "
                           "samples as PNG", file=sys.stderr)
    return source

#----------------------------------------------------------------------------
# The command.

def adopt_paths(opts: ScoreOptions, has_metrics: bool) -> ScoreOptions:
    """The options with `REF SAMPLES`, as ADM's evaluator takes them, in --ref, --images and --metrics=adm. Raises
    UserError."""
    if not opts.paths:
        return opts
    if len(opts.paths) != 2:
        raise UserError(f"{' '.join(opts.paths)}: without flags there are two files, REF SAMPLES: the reference, then "
                        "the images to score")
    for name in ("network", "images", "data", "ref", "save_ref"):
        if (value := getattr(opts, name)) is not None:
            raise UserError(f"--{name.replace('_', '-')}={value}: does not go with REF SAMPLES: name all by flags")
    if has_metrics:
        raise UserError(f"--metrics={','.join(opts.metrics)}: REF SAMPLES stands for --metrics=adm: name the files by "
                        "--ref and --images for other metrics")
    return dataclasses.replace(opts, ref=opts.paths[0], images=opts.paths[1], metrics=["adm"])


def check_options(opts: ScoreOptions) -> None:
    """Refuse flags that do not go together. Raises UserError."""
    if opts.network is not None and opts.images is not None:
        raise UserError("--network and --images: name one of them, the generator or the images to score")
    if opts.data is not None and opts.ref is not None:
        raise UserError("--data and --ref: both name the real images: give one of them")
    reference = opts.data or opts.ref
    if opts.network is None and opts.images is None and opts.save_ref is None:
        raise UserError("nothing to score: name a generator by --network or images by --images")
    if opts.save_ref is None and not opts.metrics:
        raise UserError("--metrics=none: leaves nothing to compute: name a metric, or a file by --save-ref")
    if opts.save_ref is None and opts.save_ref_images is not None:
        raise UserError(f"--save-ref-images={opts.save_ref_images}: has no effect without --save-ref: leave it out")
    if opts.save_ref is not None and reference is None:
        raise UserError(f"--save-ref={opts.save_ref}: name the images to take statistics of by --data or --ref")
    for split, paths in (("split", ("data", "ref")), ("images_split", ("images",))):
        if getattr(opts, split) is not None and not any(getattr(opts, name) for name in paths):
            raise UserError(f"--{split.replace('_', '-')}={getattr(opts, split)}: has no effect without "
                            f"{' or '.join('--' + name for name in paths)}: leave it out")
    if opts.network is None and opts.trunc != 1:
        raise UserError(f"--trunc={opts.trunc}: has no effect without --network: leave it out")
    if opts.network is None and opts.precision != "auto":
        raise UserError(f"--precision={opts.precision}: has no effect without --network: leave it out")
    launched = distributed.launched_world_size()
    if launched is not None and opts.gpus not in (1, launched):
        raise UserError(f"--gpus={opts.gpus}: torchrun started {launched} processes: leave --gpus out")


def metric_options(opts: ScoreOptions, device: torch.device, network: Any) -> MetricOptions:
    """Flags as the metrics take them."""
    record = {} if network is None else {"snapshot_pkl": str(network.path), "network_sha256": network.sha256}
    return MetricOptions(
        device=device, batch_size=opts.batch, num=opts.num, seed=opts.seed, detector=opts.detector,
        weights_dir=opts.weights, offline=opts.offline or None, allow_unverified=opts.allow_unverified_weights,
        mirror=opts.mirror, out_dir=opts.out, verbose=opts.verbose, use_cache=not opts.no_cache, record=record)


def save_reference(opts: ScoreOptions, reference: Reference, options: MetricOptions) -> None:
    """What the named metrics need of the reference images, to a file: statistics, and images for adm_pr50k."""
    assert opts.save_ref is not None, "run has seen it"
    if reference.source is None or reference.statistics:
        raise UserError(f"--save-ref={opts.save_ref}: {opts.data or opts.ref} holds statistics already: name images")
    statistics, resize = [], {}
    for spec, outputs in metric_main.statistics_to_save(opts.metrics, options).items():
        detector = metric_main.detector_for(spec, options)
        statistics += compute_statistics(reference.source, detector, outputs, opts.mirror, options)
        resize[detector.name] = detector.resize
    if statistics:
        images = opts.save_ref_images
        if images is None:
            images = protocols.ADM_REAL_FEATURES if "adm_pr50k" in protocols.expand(opts.metrics) else 0
        metadata = {"mirror": opts.mirror, "resize": resize, "version": records.code_version()}
        save_statistics(opts.save_ref, statistics, metadata, reference.source, images)
        names = ", ".join(dict.fromkeys(str(x.detector) for x in statistics))
        print(f"{opts.save_ref}: statistics of {statistics[0].num_images} images by {names}", file=sys.stderr)


def preflight(opts: ScoreOptions) -> tuple[ScoreOptions, list[str]]:
    """Everything that can be refused cheaply; returns the options, an address fetched, and the metrics to compute.

    Raises:
        UserError: a path where nothing is, an unknown name, weights that cannot be had.
    """
    if opts.ref is not None:
        opts = dataclasses.replace(opts, ref=str(local_file(opts.ref)))
    for path in (opts.images, opts.data, opts.ref):
        if path is not None:
            image_inputs.kind_of(path)
    names = protocols.expand(opts.metrics) if opts.network is not None or opts.images is not None else []
    if opts.network is None and (generator_only := metric_main.needs_generator(names)):
        raise UserError(f"--metrics={','.join(generator_only)}: measures the generator itself: name it with --network "
                        "(images alone are not enough)")
    for name in metric_main.needs_generator(names):
        check_untruncated(opts.trunc, name)
    metric_main.preflight(names, metric_options(opts, torch.device("cpu"), None))
    return opts, names


def run(opts: ScoreOptions, device: torch.device) -> list[dict[str, Any]]:
    """Everything after the flags are read. All processes call it.

    Raises:
        UserError: see `preflight` and `metrics.metric_main.evaluate`.
    """
    opts, names = preflight(opts)
    workers = opts.workers if opts.workers is not None else CUDA_WORKERS if device.type == "cuda" else 0
    network = None
    if opts.network is not None:
        from legacy import load_network
        network = load_network(opts.network, device)
        distributed.print0(dispatch.start_lines(device), file=sys.stderr)
    wants_labels = metric_main.needs_real_labels(names) or (
        network is not None and network.G_ema.c_dim > 0 and opts.labels == "dataset")
    path = opts.data or opts.ref
    reference = None if path is None else open_reference(path, wants_labels, workers, opts.split)
    options = metric_options(opts, device, network)
    if (warning := metric_main.unused_mirror(names, options)) is not None:
        distributed.print0(f"Warning: {warning}", file=sys.stderr)
    results = []
    if network is not None:
        results = metric_main.evaluate(names, network_source(opts, network, reference), reference, options)
    elif opts.images is not None:
        source = image_source(opts, names, workers)
        some = functools.partial(seeded_subset, source, seed=opts.seed, what=f"--images={opts.images}")
        options = dataclasses.replace(options, num_images=source.num_images)
        results = metric_main.evaluate(names, some, reference, options)
    if opts.save_ref is not None:
        assert reference is not None        # Asked for before: see `check_options`.
        save_reference(opts, reference, options)
    return results


def show(results: list[dict[str, Any]], like_adm: bool) -> None:
    """Results on stdout: JSON lines, or the lines of ADM's evaluator. With the former, ADM's lines go to stderr."""
    lines = records.adm_lines(results)
    if lines:
        distributed.print0(*lines, sep="\n", file=sys.stdout if like_adm else sys.stderr)
    if not like_adm:
        for record in results:
            distributed.print0(records.json_line(record))


@click.command(cls=dnnlib.cli.Command, context_settings={"max_content_width": 120})
@click.argument("paths", metavar="[REF SAMPLES]", nargs=-1, type=dnnlib.cli.PathType())
@click.option("--metrics", metavar="[NAME,NAME...|none]", type=dnnlib.cli.StrList(), default="fid50k_full",
              show_default=True, help=f"Protocols: {', '.join(OFFICIAL)}; groups: {', '.join(protocols.GROUPS)}; with "
              f"--detector of your choice: {', '.join(FREE)}")
@click.option("--network", metavar="PKL|DIR", type=dnnlib.cli.PathType(addresses=True),
              help="Generator to score: a snapshot, an official pickle, or a run")
@click.option("--images", metavar="DIR|FILE", type=dnnlib.cli.PathType(),
              help="Images to score instead of a generator: a folder, zip, tar, .npz, .npy, "
              "shards, Parquet, ... as dataset_tool.py reads them")
@click.option("--images-split", metavar="train|val|test|all", help="Which part of --images, if it has several")
@click.option("--data", metavar="DIR|FILE", type=dnnlib.cli.PathType(),
              help="Real images to compare with, of any kind that --images takes")
@click.option("--ref", metavar="DIR|FILE", type=dnnlib.cli.PathType(addresses=True),
              help="Real images as for --data, or stored statistics: ours, ADM's, EDM's...")
@click.option("--split", metavar="train|val|test|all", help="Which part of --data or --ref, if it has several")
@click.option("--save-ref", metavar="NPZ", type=dnnlib.cli.PathType(),
              help="Write the statistics of --data or --ref to this file")
@click.option("--save-ref-images", metavar="INT", type=dnnlib.cli.IntRange(min=0), help="Keep so many of its images in "
              "--save-ref, for precision and recall  [default: 10000 if --metrics has adm_pr50k, else none]")
@click.option("--detector", metavar="NAME|PATH", type=dnnlib.cli.PathType(addresses=True),
              help=f"Feature network of {', '.join(FREE)} and --save-ref: "
              "inception-2015-12-05, vgg16, ..., timm:tf_efficientnet_lite2 or another of timm, or a judge's "
              ".safetensors  [default: inception; for pr vgg16]")
@click.option("--num", metavar="INT", type=dnnlib.cli.IntRange(min=1),
              help="Images to score instead of the number that the name says; the result's name then says it  "
              "[default: of the protocol; for pytorch_fid all there are; else 50000]")
@click.option("--seed", metavar="INT", type=dnnlib.cli.Seed(), default=0, show_default=True,
              help="Random seed of latents, classes and every random choice of a metric")
@click.option("--labels", metavar="dataset|uniform|balanced", default="dataset", show_default=True,
              type=click.Choice(["dataset", "uniform", "balanced"]), help="How classes of generated images are drawn: "
              "as often as in --data, all alike, or equally many of each")
@click.option("--trunc", metavar="FLOAT", type=dnnlib.cli.Psi(), default=1, show_default=True,
              help="Truncation psi")
@click.option("--mirror", metavar="BOOL", type=bool, default=False, show_default=True,
              help="Add mirrored real images, for fid, kid, pr, sfid, the names without _full and --save-ref")
@click.option("--batch", metavar="INT", type=dnnlib.cli.IntRange(min=1), default=64, show_default=True,
              help="Images generated or read at a time; moves no result")
@click.option("--gpus", metavar="INT", type=dnnlib.cli.IntRange(min=1), default=1, show_default=True,
              help="Processes to start on this machine (torchrun works too)")
@click.option("--workers", metavar="INT", type=dnnlib.cli.IntRange(min=0),
              help="Processes that decode real images  [default: 3 with a GPU, else 0]")
@dnnlib.cli.precision_option()
@dnnlib.cli.device_option()
@click.option("--weights", metavar="DIR", type=dnnlib.cli.PathType(), help="Folder with files of detector weights")
@click.option("--offline", is_flag=True, help="Never download")
@click.option("--allow-unverified-weights", is_flag=True, help="Take files of weights that are not the published ones; "
              "such results are for testing")
@click.option("--no-cache", is_flag=True, help="Neither use nor keep statistics of real images")
@click.option("--out", metavar="DIR", type=dnnlib.cli.PathType(),
              help="Append results to metric-<name>.jsonl in this folder")
@click.option("--verbose", metavar="BOOL", type=bool, default=True, show_default=True, help="Progress bars")
@click.pass_context
def main(ctx: click.Context, /, **kwargs: Any) -> None:
    """Compute metrics of a generator or of images.

    The table goes to stderr; stdout gets one line of JSON per metric with everything that made the number.

    REF SAMPLES, two files without flags, is the command line of ADM's evaluator and stands for --metrics=adm --ref=REF
    --images=SAMPLES; stdout then gets ADM's five lines instead.

    Examples:

    \b
      # FID of a snapshot against its data set
      python calc_metrics.py --network=best_model.pkl --data=datasets/cifar10.zip --metrics=fid50k_full
    \b
      # Samples against ADM's reference file: the five numbers of papers on ImageNet
      python calc_metrics.py --images=samples.npz --ref=VIRTUAL_imagenet256_labeled.npz --metrics=adm
      python calc_metrics.py VIRTUAL_imagenet256_labeled.npz samples.npz
    \b
      # Statistics for later, by a judge trained on the same classes; then a score
      python calc_metrics.py --data=data.zip --detector=judge.safetensors --save-ref=ref.npz
      python calc_metrics.py --images=out.npz --ref=ref.npz --detector=judge.safetensors --metrics=fid --num=1000
    """
    opts = adopt_paths(ScoreOptions(**kwargs), ctx.get_parameter_source("metrics") is not ParameterSource.DEFAULT)
    check_options(opts)
    if opts.gpus > 1 and distributed.launched_world_size() is None:
        preflight(opts)     # Once and in one line, before several processes fail with as many.
        ctx.exit(distributed.run_local_processes(opts.gpus, sys.argv))

    def score(device: torch.device) -> int:
        results = run(opts, device)
        if results:
            distributed.print0(records.table(results), file=sys.stderr)
        show(results, bool(opts.paths))
        return 0

    ctx.exit(distributed.leave_exit_code(distributed.run_in_group(misc.select_device(opts.device), score)))


if __name__ == "__main__":
    main()
