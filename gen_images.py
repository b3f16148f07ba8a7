# SPDX-License-Identifier: Apache-2.0
"""Generate images, or a sample sheet with a row per class, from a snapshot or an official pickle."""
from pathlib import Path
from typing import Any

import click
import PIL.Image
import PIL.ImageDraw
import torch
import tqdm

from dnnlib import UserError, cli
from dnnlib.util import atomic_file
from inference.frames import make_transform
from inference.latents import load_centroids, load_latents
from inference.sampling import find_class, generate, seed_label, seed_latent
from torch_utils import misc
from torch_utils.images import save_image, to_uint8_sample
from torch_utils.ops import dispatch
from training.generator.synthesis import require_finite, synthesize_ws
from training.networks_stylegan3 import Generator

SHEET_CLASSES = 40          # Rows of a sheet at most.
SHEET_CELL = 64             # Smaller images are enlarged to about this many pixels.
SHEET_PIXELS = 1 << 27      # A whole sheet has no more; Pillow warns of larger pictures when it opens them.
NAME_WIDTH = 96             # Room for class names, in pixels.

#----------------------------------------------------------------------------

def write_images(network: Any, seeds: list[int], class_idx: int | None, outdir: Path, batch_size: int,
                 **settings: Any) -> list[Path]:
    """One file seed<NNNN>.png per seed; returns their paths. Without a class every seed draws its own."""
    G = network.G_ema
    paths = [outdir / f"seed{seed:04d}.png" for seed in seeds]
    bar = tqdm.tqdm(total=len(seeds), unit="image", disable=None)
    done = iter(paths)
    for first in range(0, len(seeds), batch_size):      # Latents of a million seeds would fill the memory.
        part = seeds[first:first + batch_size]
        labels = torch.zeros(len(part), dtype=torch.int64)
        if G.c_dim > 0:
            labels = torch.tensor([seed_label(s, G.c_dim) if class_idx is None else class_idx for s in part])
        z = torch.stack([seed_latent(s, G.z_dim) for s in part])
        for images in generate(G, z, labels, batch_size, **settings):
            for image in to_uint8_sample(images).permute(0, 2, 3, 1).cpu().numpy():
                save_image(next(done), image)
                bar.update()
    bar.close()
    return paths


def write_given(G: Generator, files: list[str], outdir: Path, batch_size: int, precision: str) -> list[Path]:
    """One file w<NNNN>.png per latent of the files, which are used as they are; returns their paths.

    Raises:
        UserError: the latents are not those of this network.
    """
    ws = torch.cat([load_latents(path, G.num_ws, G.w_dim) for path in files])
    paths = [outdir / f"w{i:04d}.png" for i in range(len(ws))]
    done = iter(paths)
    for part in ws.split(batch_size):
        images = synthesize_ws(G, part, precision)
        require_finite(torch.isfinite(images).all())
        for image in to_uint8_sample(images).permute(0, 2, 3, 1).cpu().numpy():
            save_image(next(done), image)
    return paths


def make_sheet(network: Any, seeds: list[int], classes: list[int], batch_size: int, **settings: Any) -> PIL.Image.Image:
    """A row per class, a column per seed, names on the left.

    Raises:
        UserError: the picture would be too large.
    """
    G = network.G_ema
    zoom = max(round(SHEET_CELL / G.img_resolution), 1)
    cell = G.img_resolution * zoom
    if len(seeds) * len(classes) * cell ** 2 > SHEET_PIXELS:
        most = SHEET_PIXELS // (len(classes) * cell ** 2)
        raise UserError(f"--sheet: {len(classes)} row(s) of {len(seeds)} samples of {cell} pixels are more than fit "
                        f"into one picture: give {f'at most {most} --seeds' if most else 'one --class'}, or --outdir "
                        "for single images")
    z = torch.stack([seed_latent(s, G.z_dim) for _ in classes for s in seeds])
    labels = torch.tensor([k for k in classes for _ in seeds])
    images = torch.cat([to_uint8_sample(x).cpu() for x in generate(G, z, labels, batch_size, **settings)])
    names = network.class_names if G.c_dim > 0 and network.class_names else [str(k) for k in range(max(G.c_dim, 1))]
    left = NAME_WIDTH if G.c_dim > 0 else 0
    sheet = PIL.Image.new("RGB", (left + len(seeds) * cell, len(classes) * cell), "white")
    draw = PIL.ImageDraw.Draw(sheet)
    for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(i, len(seeds))
        tile = PIL.Image.fromarray(image).resize((cell, cell), PIL.Image.Resampling.NEAREST)
        sheet.paste(tile, (left + column * cell, row * cell))
        if left and column == 0:
            draw.text((6, row * cell + cell // 2 - 6), str(names[classes[row]])[:14], fill="black")
    return sheet

#----------------------------------------------------------------------------

def check_source(seeds: list[int] | None, files: list[str] | None, choices: dict[str, bool]) -> None:
    """Images come from seeds or from latents, and with latents some options have no meaning.

    Args:
        seeds: That were given.
        files: Of latents that were given.
        choices: Those options, and whether they were given.

    Raises:
        UserError: neither or both are there, or an option has no meaning.
    """
    if bool(seeds) == bool(files):
        raise UserError("give --seeds, or latents in files with --w, one of the two")
    if files and (given := [option for option, is_given in choices.items() if is_given]):
        raise UserError(f"--w: its latents are used as they are, and {', '.join(given)} would change nothing: leave it "
                        "out")

#----------------------------------------------------------------------------

@click.command(cls=cli.Command, context_settings={"max_content_width": 120})
@click.option("--network", help="Snapshot, official pickle or run folder", metavar="PKL|DIR|URL",
              type=cli.PathType(addresses=True), required=True)
@click.option("--seeds", help="Random seeds, e.g. 0,1,4-6", type=cli.IntList(cli.MAX_SEED))
@click.option("--w", help="Instead of seeds: latents in .npz (array w) or .npy files, used as they are",
              metavar="FILE,FILE...", type=cli.PathList())
@click.option("--class", "class_name", help="Class by name or index  [default: drawn from each seed]",
              metavar="NAME|INT")
@click.option("--trunc", help="Truncation psi: 1 is none, 0 the mean", metavar="FLOAT", type=cli.FloatRange(),
              default=1.0, show_default=True)
@click.option("--batch-sz", help="Seeds per batch; the images do not depend on it", metavar="INT",
              type=cli.IntRange(min=1), default=1, show_default=True)
@click.option("--centroids-path", help="Truncate towards the nearest of these centres of w", metavar="FILE",
              type=cli.PathType())
@click.option("--translate", help="Shift of the picture in image widths", type=cli.Vec2(), default="0,0",
              show_default=True)
@click.option("--rotate", help="Rotation of the picture in degrees", metavar="ANGLE", type=cli.FloatRange(), default=0,
              show_default=True)
@click.option("--noise-mode", help="Accepted for old commands: these generators have no noise inputs",
              type=click.Choice(["const", "random", "none"]), default="const", show_default=True)
@click.option("--outdir", help="Where to save the images", metavar="DIR", type=cli.PathType())
@click.option("--sheet", help="Write one sheet instead: a row per class, a column per seed", metavar="PNG",
              type=cli.PathType())
@cli.precision_option()
@cli.device_option()
def main(network: str, seeds: list[int] | None, w: list[str] | None, class_name: str | None, trunc: float,
         batch_sz: int, centroids_path: str | None, translate: tuple[float, float], rotate: float, noise_mode: str,
         outdir: str | None, sheet: str | None, precision: str, device: str) -> None:
    """Generate images from a trained network.

    \b
    Examples:
      # Four images of class 207, truncated.
      python gen_images.py --network=best_model.pkl --seeds=0-3 --class=207 --trunc=0.7 --outdir=out

    \b
      # A sample sheet of all classes.
      python gen_images.py --network=runs/00000-stylegan3-t-digits16-gpus1-batch32 --seeds=0-9 --sheet=samples.png
    """
    from legacy import load_network
    check_source(seeds, w, {"--class": class_name is not None, "--trunc": trunc != 1, "--sheet": sheet is not None,
                            "--centroids-path": centroids_path is not None})
    if (outdir is None) == (sheet is None):
        raise UserError("give --outdir for single images or --sheet for one picture of all classes, one of the two")
    if noise_mode != "const":
        click.echo(f"NOTE: --noise-mode={noise_mode} has no effect: these generators have no noise inputs", err=True)
    seeds = list(dict.fromkeys(seeds or []))        # A seed that was typed twice is one image.
    target = misc.select_device(device)
    click.echo(dispatch.start_lines(target), err=True)
    loaded = load_network(network, target)
    G = loaded.G_ema
    class_idx = None if class_name is None else find_class(class_name, loaded.class_names, G.c_dim)
    if class_idx is not None and loaded.class_names and loaded.class_names[class_idx] != class_name:
        click.echo(f"--class={class_name}: the class {class_idx}, {loaded.class_names[class_idx]}", err=True)
    transform = G.synthesis.input.get_buffer("transform")
    transform.copy_(make_transform(translate, rotate))
    centroids = None
    if centroids_path is not None:
        centroids = load_centroids(centroids_path, G.w_dim).to(transform.device)
    settings: dict[str, Any] = {"batch_size": batch_sz, "truncation_psi": trunc, "centroids": centroids,
                                "precision": precision}
    if sheet is not None:
        classes = [class_idx] if class_idx is not None else list(range(min(max(G.c_dim, 1), SHEET_CLASSES)))
        picture = make_sheet(loaded, seeds, classes, **settings)
        with atomic_file(sheet) as f:
            picture.save(f, format="PNG")
        click.echo(f"{sheet}: {len(classes)} row(s) of {len(seeds)} samples")
    elif outdir is not None:
        if w:
            paths = write_given(G, w, Path(outdir), batch_sz, precision)
        else:
            paths = write_images(loaded, seeds, class_idx, Path(outdir), **settings)
        click.echo(f"{outdir}: {len(paths)} images")


if __name__ == "__main__":
    main()
