# SPDX-License-Identifier: Apache-2.0
"""Read files of statistics, whoever wrote them. The kind is found from the content, never from the name's ending.

| kind | content | divisor of the covariance |
|---|---|---|
| ours | mu, sigma, mu_s, sigma_s, mu_dinov2..., num_images, ddof, metadata | N - 1 |
| ADM | mu, sigma, mu_s, sigma_s (sFID, order H, W, C), arr_0: images for precision and recall | N - 1, N not said |
| pytorch-fid, clean-fid, EDM | mu, sigma; of others also mean, cov, covariance | N - 1, N not said |
| dgm-eval, clean-fid's KID files | reps or feats: features [N, D] | computed here |
| EDM2, StyleGAN's cache, torch-fidelity's cache | pickles: see `metrics.references.pickles` | |
"""
import os
import zipfile
import zlib
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.classes import whole_number
from dnnlib.npy import npy_header
from dnnlib.util import list_some, parse_json
from metrics.references.limits import check_metadata
from metrics.references.pickles import read_pickle
from metrics.references.statistics import (
    DINOV2,
    INCEPTION,
    Statistics,
    find_pair,
    make_statistics,
    statistics_of_features,
)
from torch_utils.arrays import open_npz

OUR_FORMAT = "stylesan-xl/reference/2"
ADM_CROP = "center-crop-dhariwal"       # How the images of ADM's reference files were cut out.
FEATURE_KEYS = ("reps", "feats")
# Encoders of dgm-eval that are detectors of ours. Its Inception has pytorch-fid's resize.
DGM_EVAL = {"dinov2": DINOV2, "inception": "inception-2015-12-05-pytorch_fid"}
MAX_METADATA = 1 << 24
READ_ERRORS = (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, MemoryError, NotImplementedError,
               RuntimeError, zipfile.BadZipFile, zlib.error)

#----------------------------------------------------------------------------

def is_statistics(path: str | os.PathLike[str]) -> bool:
    """Whether an existing file looks like one of statistics: an .npz with such keys, or any pickle.

    Raises:
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    if _is_pickle(path):
        return True
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")}
        torch_file = any(name.endswith("/data.pkl") for name in archive.namelist())
    ours = any(name.startswith(("mu_", "mu@")) for name in names)
    return torch_file or ours or find_pair(names) is not None or bool({"mu", "sigma", *FEATURE_KEYS} & names)


def _is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file starts as pickles of protocols 2 to 5 do."""
    with open(path, "rb") as f:
        start = f.read(2)
    return len(start) == 2 and start[0] == 0x80 and 2 <= start[1] <= 5


def load_statistics(path: str | os.PathLike[str]) -> tuple[Statistics, ...]:
    """Everything that a file of statistics holds; at least one entry.

    Covariances are converted to ddof 0 where the number of images is known. Foreign .npz files divide by N - 1 but do
    not say N; theirs are used as they are (2e-5 relative at 50,000 images) and the record says so.

    Raises:
        UserError: not such a file, damaged, asks for code, or its arrays do not fit each other.
    """
    path = str(path)
    try:
        if _is_pickle(path) or _is_torch_zip(path):
            return read_pickle(path)
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not a readable file of statistics (neither a whole .npz nor a pickle): make it "
                            "again")
        with open_npz(path) as file:
            return _read_npz(path, file)
    except READ_ERRORS as err:
        raise UserError(f"{path}: not a readable file of statistics ({type(err).__name__}): make it again") from err


def _is_torch_zip(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())

#----------------------------------------------------------------------------

def _read_npz(path: str, file: Any) -> tuple[Statistics, ...]:
    keys = set(file.files)
    metadata = _metadata(path, file) if "metadata" in keys else {}
    if metadata.get("format") == OUR_FORMAT:
        return _read_ours(path, file, metadata)
    if find_pair(keys) is not None:
        return _read_foreign(path, file)
    for key in FEATURE_KEYS:
        if key in keys:
            return (_from_features(path, file, key),)
    raise UserError(f"{path}: holds {list_some(sorted(keys)) or 'nothing'}, but statistics need mu and sigma (or mean "
                    "and cov)")


def _read_foreign(path: str, file: Any) -> tuple[Statistics, ...]:
    """Files of ADM and of pytorch-fid and its relatives."""
    is_adm = {"mu_s", "sigma_s"} <= set(file.files)
    pair = find_pair(file.files)
    assert pair is not None             # Looked at before.
    more: dict[str, Any] = {"format": f"npz with {' and '.join(pair)}"}
    if is_adm:
        more = {"format": "ADM reference npz", "detector": INCEPTION, "crop": ADM_CROP}
        if "arr_0" in file.files:
            more["resolution"] = _side_of_images(file)
    num = _whole(path, file, "num_images") if "num_images" in file.files else None
    ddof = _whole(path, file, "ddof") if "ddof" in file.files else 1
    pool = make_statistics(path, " and ".join(pair), file[pair[0]], file[pair[1]], num, ddof, **more)
    if not is_adm:
        return (pool,)
    return pool, make_statistics(path, "mu_s and sigma_s", file["mu_s"], file["sigma_s"], num, ddof, output="spatial",
                                 **more)


def _whole(path: str, file: Any, key: str) -> int:
    """A whole number in a file. Raises UserError."""
    array = file[key]
    number = whole_number(array.item()) if array.size == 1 else None
    if number is None:
        raise UserError(f"{path}: {key} is {array.dtype} {list(array.shape)}, but must be one whole number: make the "
                        "file again")
    return number


def _side_of_images(file: Any) -> int | None:
    """Side of the images in arr_0, from its header alone."""
    with file.zip.open("arr_0.npy") as f:
        shape = npy_header(f)[0]
    return int(shape[2]) if len(shape) == 4 else None


def _from_features(path: str, file: Any, key: str) -> Statistics:
    """Statistics of features, as dgm-eval keeps them. Its other arrays may hold objects; they are not read."""
    features = file[key]
    encoder = None
    try:
        encoder = str(file["model"]) if "model" in file.files else None
    except ValueError:      # An array of objects.
        encoder = None
    return statistics_of_features(path, key, torch.from_numpy(features), detector=DGM_EVAL.get(encoder or ""),
                                  format="npz of features (dgm-eval)")

#----------------------------------------------------------------------------

def _metadata(path: str, file: Any) -> dict[str, Any]:
    """The JSON object under 'metadata'. Raises ValueError."""
    if file.zip.getinfo("metadata.npy").file_size > MAX_METADATA:
        raise ValueError("metadata of that size")
    metadata = parse_json(str(file["metadata"]))
    if not isinstance(metadata, dict):
        raise UserError(f"{path}: its metadata is no JSON object: make the file again with --save-ref")
    return metadata


def _read_ours(path: str, file: Any, metadata: dict[str, Any]) -> tuple[Statistics, ...]:
    """What `metrics.references.writing` wrote. The list in the metadata says what is where."""
    check_metadata(path, metadata)
    num, ddof = _whole(path, file, "num_images"), _whole(path, file, "ddof")
    entries = []
    for entry in metadata["statistics"]:
        mean, covariance = entry["keys"]
        if missing := {mean, covariance} - set(file.files):
            raise UserError(f"{path}: lacks {', '.join(sorted(missing))}: make the file again with --save-ref")
        entries.append(make_statistics(
            path, f"{mean} and {covariance}", file[mean], file[covariance], num, ddof, detector=entry["detector"],
            detector_sha256=entry["detector_sha256"], output=entry["output"], format="our reference npz",
            fingerprint=metadata.get("images_fingerprint"), resolution=metadata.get("resolution"),
            mirror=metadata.get("mirror"), crop=metadata.get("crop"),
            resize=metadata.get("resize", {}).get(entry["detector"])))
    if not entries:
        raise UserError(f"{path}: holds no statistics: make the file again with --save-ref")
    return tuple(entries)
