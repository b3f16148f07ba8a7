# SPDX-License-Identifier: Apache-2.0
"""A folder that can be uploaded to the Hugging Face hub as it is: weights, samples, page."""
from pathlib import Path

import torch

from dnnlib.hub import WEIGHTS_FILE
from dnnlib.util import atomic_file, atomic_folder
from inference.export.model_card import SHEET_FILE, Subject, model_card
from inference.sampling import generate, seed_latent
from torch_utils.images import image_grid, png_bytes, to_uint8_sample
from training.networks_stylegan3 import Generator
from training.run.exported import generator_bytes

CARD_FILE = "README.md"
SHEET_PIXELS = 2048         # Of a side of the samples' picture, at most, where a row has two images.
SHEET_SIDE = 8              # Images in a row, and rows, at most.


def sample_sheet(G: Generator) -> bytes:
    """A PNG of the first seeds, a column each; a row per class, or rows of further seeds."""
    side = min(max(SHEET_PIXELS // G.img_resolution, 2), SHEET_SIDE)
    rows = min(G.c_dim or side, side)
    labels = torch.arange(rows).repeat_interleave(side) if G.c_dim else torch.zeros(rows * side, dtype=torch.int64)
    seeds = [column if G.c_dim else row * side + column for row in range(rows) for column in range(side)]
    z = torch.stack([seed_latent(seed, G.z_dim) for seed in seeds])
    images = torch.cat([to_uint8_sample(part).cpu() for part in generate(G, z, labels, side)])
    return png_bytes(image_grid(images, side))


def hub_files(subject: Subject, name: str, licence: str) -> dict[str, bytes]:
    """What is in the folder, by name.

    Args:
        name: What the model is called.
        licence: An identifier of the hub.
    """
    return {SHEET_FILE: sample_sheet(subject.G), WEIGHTS_FILE: generator_bytes(subject.snapshot),
            CARD_FILE: model_card(subject, name, licence).encode("utf-8", "backslashreplace")}


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder. A new folder gets its name when all of them are there; in one that is there they take
    the place of those of these names, and nothing else is touched."""
    if folder.exists():
        for name, content in files.items():
            with atomic_file(folder / name) as file:
                file.write(content)
        return
    with atomic_folder(folder) as temp:
        write_folder(temp, files)
