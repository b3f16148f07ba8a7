# SPDX-License-Identifier: Apache-2.0
"""Data sets of no content, to find out with `train.py --bench` how long a run will take before its data is there.

    python -m data_prep.random_data --dest=data/none{resolution}.zip --resolutions=16,32,64 --classes=1000
"""
import io
import json
import zipfile
from pathlib import Path

import click
import numpy as np
import PIL.Image

from dnnlib import UserError, cli
from dnnlib.util import atomic_file

PICTURES = 16               # Different ones; an archive holds each many times.
MIN_IMAGES = 256

#----------------------------------------------------------------------------

def png(index: int, resolution: int) -> bytes:
    """A picture that compresses about as little as a photograph."""
    rng = np.random.RandomState(index)
    ramp = np.linspace(rng.randint(100), 155 + rng.randint(100), resolution)
    smooth = np.stack([ramp[:, None] + 0 * ramp, ramp + 0 * ramp[:, None], (ramp + ramp[:, None]) / 2], axis=2)
    pixels = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_random_dataset(path: Path, resolution: int, classes: int) -> None:
    """An archive as dataset_tool.py makes it, with an image of every class at least; 0 classes: no labels."""
    pictures = [png(i, resolution) for i in range(PICTURES)]
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(max(MIN_IMAGES, classes))]
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for i, name in enumerate(names):
            archive.writestr(zipfile.ZipInfo(name), pictures[i % PICTURES])
        if classes:
            labels = [[name, i % classes] for i, name in enumerate(names)]
            archive.writestr(zipfile.ZipInfo("dataset.json"), json.dumps({"labels": labels}))


@click.command(cls=cli.Command)
@click.option("--dest", metavar="ZIP", type=cli.PathType(), required=True,
              help="Archive to write; with several resolutions a name with {resolution} in it")
@click.option("--resolutions", metavar="LIST", type=cli.IntList(), required=True, help="Sizes, e.g. 16,32,64")
@click.option("--classes", metavar="INT", type=cli.IntRange(min=0), default=0, show_default=True,
              help="Number of classes; 0: no labels")
def main(dest: str, resolutions: list[int], classes: int) -> None:
    """Write data sets of random images."""
    if len(resolutions) > 1 and "{resolution}" not in dest:
        raise UserError(f"--dest={dest}: several --resolutions need {{resolution}} in the name, as in "
                        "data/none{resolution}.zip")
    if min(resolutions) < 1:
        raise UserError(f"--resolutions: {min(resolutions)} is no size: name positive numbers")
    for resolution in resolutions:
        path = Path(dest.replace("{resolution}", str(resolution)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_random_dataset(path, resolution, classes)
        except OSError as err:
            raise UserError(f"--dest={path}: cannot be written ({err.strerror or err}): name a place that you may "
                            "write to") from err
        click.echo(f"{path}: {resolution} pixels, {classes or 'no'} classes")


if __name__ == "__main__":
    main()
