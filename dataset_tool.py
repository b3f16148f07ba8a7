# SPDX-License-Identifier: Apache-2.0
"""Make data sets for training from folders, archives, shards and databases of images; check them."""
import re
from pathlib import Path
from typing import Any

import click

import dnnlib.cli
from data_prep.job import Job, make_datasets
from data_prep.report import describe
from data_prep.sources import SourceOptions
from data_prep.transforms import TRANSFORMS, Size
from data_prep.verify import verify
from dnnlib import UserError

MAX_SIDE = 8192         # The largest power of two whose square is within Pillow's limit of pixels, MAX_IMAGE_PIXELS.
FITS = {"crop": "center-crop", "pad": "pad", "squash": "squash"}

#----------------------------------------------------------------------------
# Parsers.

class SizeType(click.ParamType):
    """'32' -> 32x32; '256x144' -> 256x144."""

    name = "N|WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        if isinstance(value, Size):
            return value
        match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", value.strip())
        if match is None or int(match[1]) < 1 or int(match[2] or 1) < 1:
            self.fail(f"{value!r} is not a size such as 32 or 32x32", param, ctx)
        size = Size(int(match[1]), int(match[2] or match[1]))
        if max(size.width, size.height) > MAX_SIDE:
            self.fail(f"{value} is more than any reader of images here takes: at most {MAX_SIDE}", param, ctx)
        return size


class SizeList(click.ParamType):
    """'16,32' -> [16x16, 32x32]."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Size]:
        return value if isinstance(value, list) else [SizeType().convert(v, param, ctx) for v in value.split(",")]


class MakeOrOther(click.Group):
    """A group whose command `make` needs no name: its options are those of the script."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["make", *(args or ["--help"])]
        return super().parse_args(ctx, args)

#----------------------------------------------------------------------------

def setup_job(opts: dict[str, Any]) -> Job:
    """Options of the command line to a Job. Raises UserError."""
    sizes = [opts["resolution"]] if opts["resolution"] else opts["resolutions"] or []
    if opts["resolution"] and opts["resolutions"]:
        raise UserError("--resolution and --resolutions: give one of them")
    transform = opts["transform"]
    if opts["fit"]:
        if transform not in (None, FITS[opts["fit"]]):
            raise UserError(f"--fit={opts['fit']}: --transform={transform} decides that already: give one of them")
        transform = FITS[opts["fit"]]
    if opts["labels"] and opts["no_labels"]:
        raise UserError("--labels and --no-labels: give one of them")
    options = SourceOptions(not opts["no_labels"], opts["labels"], opts["split"], opts["allow_gaps"])
    return Job(opts["source"], dest_paths(opts["dest"], sizes, bool(opts["resolutions"])), tuple(sizes), transform,
               opts["grayscale"], opts["max_images"], opts["strict"], options)


def dest_paths(dest: str, sizes: list[Size], many: bool) -> tuple[Path, ...]:
    """The data sets to make: `dest` alone, or one archive per size, named after `dest` and the size."""
    if "{resolution}" in dest and sizes:
        return tuple(Path(dest.replace("{resolution}", str(size.width))) for size in sizes)
    if not many:
        return (Path(dest),)
    stem = dest[:-4] if dest.lower().endswith(".zip") else dest
    if stem.endswith(("/", "\\")):
        raise UserError(f"--dest={dest}: give the beginning of the names, such as {dest}images")
    return tuple(Path(f"{stem}{size.width}.zip") for size in sizes)


@click.group(cls=MakeOrOther)
def main() -> None:
    """Make data sets for training, and check them."""


@main.command(cls=dnnlib.cli.Command, options_metavar="[OPTIONS] | verify DATA")
@click.option("--source", metavar="PATH", type=dnnlib.cli.PathType(), required=True,
              help="Folder, zip or tar of images, ImageNet's root folder or ILSVRC2012_img_train.tar, WebDataset "
                   "shards such as 's/{000..099}.tar', Parquet files, the folder or archive of CIFAR or MNIST, an LSUN "
                   "database, .npz or .npy arrays, sklearn:digits, or openmoji")
@click.option("--dest", metavar="PATH", type=dnnlib.cli.PathType(), required=True,
              help="Archive (ending in .zip) or folder to make; with --resolutions the beginning of archive names")
@click.option("--resolution", type=SizeType(), default=None,
              help="Width and height of the result, a power of two  [default: as the source]")
@click.option("--resolutions", type=SizeList(), default=None,
              help="Several sizes in one pass, such as 16,32,64: makes DEST16.zip, DEST32.zip, DEST64.zip")
@click.option("--transform", type=click.Choice(list(TRANSFORMS)), default=None,
              help="How to make images square  [default: they must be square]")
@click.option("--fit", type=click.Choice(list(FITS)), default=None,
              help="The same in short: crop is center-crop; pad adds black bars; squash changes proportions")
@click.option("--grayscale", type=click.Choice(["drop", "rgb"]), default=None,
              help="Leave grayscale files out, or make them RGB  [default: drop for ImageNet, else rgb]")
@click.option("--labels", metavar="FILE", type=dnnlib.cli.PathType(), default=None,
              help="Labels by file name, CSV or JSON  [default: dataset.json, else sub-folders]")
@click.option("--no-labels", is_flag=True, help="Write no labels, whatever the source has")
@click.option("--allow-gaps", is_flag=True, help="Accept class indices that no image has")
@click.option("--split", metavar="train|val|test|all", default=None,
              help="Which images of a source that has such parts, by the names of folders or files; all: all of them  "
                   "[default: there must be no choice]")
@click.option("--max-images", metavar="INT", type=dnnlib.cli.IntRange(min=1), default=None,
              help="Stop after this many images, in the order of the file names  [default: all]")
@click.option("--strict/--skip-bad", default=False, show_default=True,
              help="Stop at the first unreadable file, or skip and list it")
@click.option("--overwrite", is_flag=True, help="Replace the data sets at --dest")
@click.option("--restart", is_flag=True, help="Throw away an unfinished run instead of continuing it")
@click.option("--workers", metavar="INT", type=dnnlib.cli.IntRange(min=1), default=None,
              help="Processes; the result does not depend on it  [default: all cores for large sources]")
def make(overwrite: bool, restart: bool, workers: int | None, **opts: Any) -> None:
    """Make a data set for training: square RGB images of one size and their labels.

    What the source was taken for is said first. Labels come from dataset.json in it, else from its sub-folders: one
    class per sub-folder, in the order of their names, or of their numbers if all are numbers. ImageNet is recognised by
    folders such as n01440764. A source with parts such as train and val needs --split. Files that cannot be read are
    skipped and listed in report.json inside the result. The same command again continues a run that was broken off.
    `dataset_tool.py verify DATA` checks a data set.

    \b
    Examples:
      # One folder per class, cropped to squares of 64 pixels.
      python dataset_tool.py --source=photos --dest=photos64.zip --transform=center-crop --resolution=64
      # ImageNet as it is downloaded, all sizes in one pass: data/imagenet16.zip to data/imagenet256.zip.
      python dataset_tool.py --source=ILSVRC2012_img_train.tar --dest=data/imagenet --transform=center-crop \\
          --resolutions=16,32,64,128,256
    """
    for report, dest, where in make_datasets(setup_job(opts), overwrite, restart, workers):
        click.echo("\n".join(describe(report, dest, where)))


@main.command("verify", cls=dnnlib.cli.Command)
@click.argument("data", metavar="DATA", type=dnnlib.cli.PathType())
@click.option("--workers", metavar="INT", type=dnnlib.cli.IntRange(min=1), default=None,
              help="Processes  [default: all cores for large sets]")
def verify_command(data: str, workers: int | None) -> None:
    """Decode every image of a data set (archive or folder) and name the bad ones; exit code 2 if there are any.

    \b
    Examples:
      python dataset_tool.py verify photos64.zip
      python dataset_tool.py verify data/imagenet256.zip --workers=16
    """
    verdict = verify(data, workers, click.echo)
    labels = f"{verdict.num_classes} classes" if verdict.num_classes else "no labels"
    content = "content as written" if verdict.hash_matches else "no hash of the content to compare with"
    click.echo(f"{data}: {verdict.num_images} images of {verdict.resolution}x{verdict.resolution} pixels, {labels}: "
               f"all can be decoded, {content}")


if __name__ == "__main__":
    main()
