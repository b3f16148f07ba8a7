# SPDX-License-Identifier: Apache-2.0
"""Export the generator of a network: one .safetensors, a folder for the Hugging Face hub, ONNX, or official names."""
import os
import re
import shlex
from pathlib import Path

import click

from dnnlib import UserError, cli
from dnnlib.hub import WEIGHTS_FILE
from dnnlib.util import atomic_file, file_sha256, format_bytes
from inference.export.hub_folder import hub_files, write_folder
from inference.export.model_card import UNKNOWN_LICENCE, Subject, repository
from inference.export.official import EMBED_DIM, official_bytes
from inference.export.onnx_graph import OPSET, TOLERANCE, largest_deviation, onnx_bytes
from torch_utils import misc
from training.run.exported import generator_bytes
from training.run.snapshots import build_generator

LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}")

#----------------------------------------------------------------------------

def check_options(kind: str, licence: str | None, check: bool) -> None:
    """Refuse options that this format has no use for.

    Raises:
        UserError: there is one.
    """
    if licence is not None and kind != "hub":
        raise UserError(f"--license={licence}: only --format=hub has a page that says it: leave it out")
    if not check and kind != "onnx":
        raise UserError("--check=0: only --format=onnx is checked: leave it out")
    if licence is not None and not LICENCE.fullmatch(licence):
        raise UserError(f"--license={licence}: expected an identifier of the hub, in small letters, such as "
                        "apache-2.0, cc-by-4.0 or other")


def check_dest(dest: Path, kind: str, overwrite: bool, network: Path) -> None:
    """Refuse a place where something is that must stay, or where nothing can be.

    Raises:
        UserError: there is; a part of its path is a file.
    """
    above = next(folder for folder in dest.absolute().parents if folder.exists())
    if not above.is_dir():
        raise UserError(f"--dest={dest}: {above} is a file: name a path that leads through folders")
    if not os.path.lexists(dest) or (kind == "hub" and dest.is_dir() and not any(dest.iterdir())):
        return
    if dest.is_dir() != (kind == "hub"):
        raise UserError(f"--dest={dest}: is a {'folder' if dest.is_dir() else 'file'}: choose another name")
    if not overwrite:
        raise UserError(f"--dest={dest}: exists already: choose another name or add --overwrite")
    inside = dest / WEIGHTS_FILE
    if kind == "hub" and not inside.is_file():
        raise UserError(f"--dest={dest}: is no folder for the hub (it has no {WEIGHTS_FILE}), so --overwrite leaves it "
                        "alone: choose another name")
    written = inside if kind == "hub" else dest
    if written.exists() and written.samefile(network):
        raise UserError(f"--dest={dest}: is the network itself: choose another name")


def write_file(dest: Path, content: bytes) -> str:
    """Write it whole; returns a line that says so."""
    with atomic_file(dest) as file:
        file.write(content)
    return f"{dest}: {format_bytes(len(content))}"

#----------------------------------------------------------------------------

def export_safetensors(subject: Subject, dest: Path) -> str:
    """The generator in one file that all commands take as --network."""
    return write_file(dest, generator_bytes(subject.snapshot))


def export_hub(subject: Subject, dest: Path, licence: str | None, device: str) -> str:
    """A folder for the Hugging Face hub."""
    if licence is None:
        click.echo("NOTE: the page will say that the licence is unknown: name the one of your data and weights by "
                   "--license, such as --license=cc-by-4.0", err=True)
    subject.G.to(device)
    name = dest.resolve().name
    write_folder(dest, hub_files(subject, name, licence or UNKNOWN_LICENCE))
    address = f"USER/{repository(name)}"
    return (f"{dest}: look at its README.md, then upload it: hf upload {address} {shlex.quote(str(dest))}; everybody "
            f"then loads it as hf://{address}")


def export_onnx(subject: Subject, dest: Path, check: bool, device: str) -> str:
    """An ONNX graph, compared with our images if onnxruntime is there.

    Raises:
        UserError: a package is missing; the images differ.
    """
    content = onnx_bytes(subject.G, subject.snapshot.get("class_names"), subject.sha256)
    said = "not compared with our images, because of --check=0"
    if check:
        try:
            deviation = largest_deviation(content, subject.G.to(device))
        except ImportError:
            said = "not compared with our images, because onnxruntime is not installed: pip install onnxruntime"
        else:
            said = f"its images differ from ours by at most {deviation:.2g}"
            if not deviation <= TOLERANCE:
                raise UserError(f"--format=onnx: {said}, more than {TOLERANCE:g}, so nothing was written: add "
                                "--check=0 if this is good enough")
    return f"{write_file(dest, content)}, opset {OPSET}, {said}"


def export_official(subject: Subject, dest: Path) -> str:
    """A state dict for the official code."""
    config = subject.G.config
    if config.c_dim > 0 and config.embed_dim != EMBED_DIM:
        click.echo(f"NOTE: the class table is {config.embed_dim} wide, the official one {EMBED_DIM}: the official code "
                   "must be told of it", err=True)
    return f"{write_file(dest, official_bytes(subject.G))}, a state dict G_ema for the official code"

#----------------------------------------------------------------------------

@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
              type=cli.PathType(addresses=True), required=True)
@click.option("--format", "kind", help="safetensors: one file for this project; hub: a folder for the Hugging Face "
              "hub; onnx: a graph for other programs; official: a state dict with the official names",
              type=click.Choice(["safetensors", "hub", "onnx", "official"]), required=True)
@click.option("--dest", help="File or, with --format=hub, folder to write", metavar="FILE|DIR", type=cli.PathType(),
              required=True)
@click.option("--license", "licence", help="hub: identifier of the licence that the page names, such as cc-by-4.0",
              metavar="NAME")
@click.option("--check", help="onnx: compare its images with ours", metavar="BOOL", type=bool, default=True,
              show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace what is at --dest")
@cli.device_option()
def main(network: str, kind: str, dest: str, licence: str | None, check: bool, overwrite: bool, device: str) -> None:
    """Export the averaged generator (G_ema) of a network, without what only training needs.

    \b
    Examples:
      python export.py --network=runs/00000-stylegan3-t-pets --format=safetensors --dest=pets.safetensors
      python export.py --network=best_model.pkl --format=hub --dest=pets-128 --license=cc-by-4.0
      python export.py --network=best_model.pkl --format=onnx --dest=pets.onnx
    """
    from legacy import find_snapshot, open_snapshot
    check_options(kind, licence, check)
    target = misc.select_device(device)
    file, place = find_snapshot(network), Path(dest)
    check_dest(place, kind, overwrite, file)
    snapshot = open_snapshot(file)
    subject = Subject(build_generator(snapshot).eval().requires_grad_(False), snapshot, file, file_sha256(file))
    if kind == "hub":
        said = export_hub(subject, place, licence, target)
    elif kind == "onnx":
        said = export_onnx(subject, place, check, target)
    else:
        said = (export_safetensors if kind == "safetensors" else export_official)(subject, place)
    click.echo(said)


if __name__ == "__main__":
    main()
