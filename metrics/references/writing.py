# SPDX-License-Identifier: Apache-2.0
"""Write a file of statistics: an .npz with ADM's keys, which ADM's, pytorch-fid's and EDM's readers take."""
import importlib.metadata
import json
import os
import re
import zipfile
from collections.abc import Sequence
from typing import IO, Any

import numpy as np
import PIL

from dnnlib import UserError
from dnnlib.util import atomic_file
from metrics.references.reading import OUR_FORMAT
from metrics.references.statistics import DINOV2, INCEPTION, Statistics
from metrics.sources import ImageSource, seeded_subset

# Names that others read; everything else is mu@<detector> or mu@<detector>@<output>.
KNOWN_SUFFIXES = {(INCEPTION, "pool"): "", (INCEPTION, "spatial"): "_s", (DINOV2, "pool"): "_dinov2"}
IMAGES_SEED = 0
READ_BATCH = 64
DATE = (1980, 1, 1, 0, 0, 0)    # Every member has the same date, so that equal statistics make equal files.

#----------------------------------------------------------------------------

def save_statistics(path: str | os.PathLike[str], statistics: Sequence[Statistics], metadata: dict[str, Any],
                    images: ImageSource | None = None, num_images: int = 0) -> None:
    """Write statistics of one set of images. Covariances are divided by N - 1, as in the foreign files.

    Args:
        path: File, by custom *.npz.
        statistics: All of the same images, at most one per detector and output, with `num_images`.
        metadata: JSON-able; detectors, the fingerprint of the images and versions are added.
        images: Where images for precision and recall are taken from.
        num_images: How many, at most, a seeded choice; 0: none. They are streamed.

    Raises:
        UserError: fewer than two images, or no statistics.
    """
    if not statistics:
        raise UserError(f"--save-ref={path}: there are no statistics to save")
    num = statistics[0].num_images or 0
    if num < 2:
        raise UserError(f"--save-ref={path}: {num} images have no covariance: use two or more")
    keys = [_keys(entry) for entry in statistics]
    if len(set(keys)) != len(keys) or any(entry.num_images != num for entry in statistics):
        raise ValueError("statistics of different images, or twice of one detector")
    metadata = {**metadata, **_describe(statistics, keys)}
    with atomic_file(path) as f, zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
        for (mean, covariance), entry in zip(keys, statistics, strict=True):
            _write_array(archive, mean, entry.mean)
            _write_array(archive, covariance, entry.covariance_at(1))
        if images is not None and num_images:
            chosen = seeded_subset(images, min(num_images, images.num_images), IMAGES_SEED)
            metadata["arr_0"] = {"num_images": chosen.num_images, "of": images.num_images, "seed": IMAGES_SEED}
            _write_images(archive, chosen)
        _write_array(archive, "num_images", np.array(num))
        _write_array(archive, "ddof", np.array(1))
        _write_array(archive, "metadata", np.array(json.dumps(metadata, sort_keys=True)))


def _keys(entry: Statistics) -> tuple[str, str]:
    suffix = KNOWN_SUFFIXES.get((str(entry.detector), entry.output))
    if suffix is None:
        parts = [str(entry.detector)] + ([entry.output] if entry.output != "pool" else [])
        suffix = "".join("@" + re.sub(r"[^A-Za-z0-9_.-]", "_", part) for part in parts)
    return f"mu{suffix}", f"sigma{suffix}"


def _describe(statistics: Sequence[Statistics], keys: list[tuple[str, str]]) -> dict[str, Any]:
    """What a reader needs to know besides the numbers."""
    first = statistics[0]
    return {
        "format": OUR_FORMAT, "ddof": 1, "num_images": first.num_images, "images_fingerprint": first.fingerprint,
        "resolution": first.resolution, "crop": first.crop,
        "statistics": [{"keys": list(names), "detector": entry.detector, "detector_sha256": entry.detector_sha256,
                        "output": entry.output, "dimensions": len(entry.mean)}
                       for names, entry in zip(keys, statistics, strict=True)],
        "decoded_by": {"Pillow": PIL.__version__, "numpy": np.__version__,
                       "torch": importlib.metadata.version("torch")}}

#----------------------------------------------------------------------------

def _open(archive: zipfile.ZipFile, key: str) -> IO[bytes]:
    info = zipfile.ZipInfo(f"{key}.npy", DATE)
    info.external_attr = 0o644 << 16            # Or a program that unpacks the file makes unreadable ones.
    return archive.open(info, "w", force_zip64=True)


def _write_array(archive: zipfile.ZipFile, key: str, array: np.ndarray) -> None:
    with _open(archive, key) as f:
        np.lib.format.write_array(f, np.ascontiguousarray(array) if array.ndim else array, allow_pickle=False)


def _write_images(archive: zipfile.ZipFile, source: ImageSource) -> None:
    """arr_0, uint8 [N, H, W, 3], a batch at a time."""
    with _open(archive, "arr_0") as f:
        written = 0
        for images, _labels in source.batches(READ_BATCH):
            pixels = images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
            if not written:
                np.lib.format.write_array_header_1_0(f, {
                    "descr": np.lib.format.dtype_to_descr(pixels.dtype), "fortran_order": False,
                    "shape": (source.num_images, *pixels.shape[1:])})
            f.write(pixels.data)
            written += len(pixels)
        if written != source.num_images:
            raise RuntimeError(f"{written} images were read, {source.num_images} expected")
