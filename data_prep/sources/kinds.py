# SPDX-License-Identifier: Apache-2.0
"""What a file is, told from its first bytes; its name only decides where these say nothing."""
import zipfile
from pathlib import Path

from data_prep.sources.arrays import IDX_IMAGES, IDX_LABELS
from data_prep.sources.tars import first_bytes, is_tar_name, starts_like_a_tar
from dnnlib import UserError
from dnnlib.npy import MAGIC
from training.data.labels import IMAGE_SUFFIXES

PARQUET, LMDB = b"PAR1", b"\xde\xc0\xef\xbe"
LMDB_AT = 16                    # Where a database has its magic number: behind the head of its first page.
# What is not read, and what makes something of it that is.
FOREIGN = {b"\x28\xb5\x2f\xfd": "unpack the compression with unzstd", b"7z\xbc\xaf\x27\x1c": "unpack it with 7z",
           b"Rar!": "unpack it with unrar", b"\x89HDF": "save its images as .npy, uint8 [N, H, W, 3]"}
OTHER_IMAGES = (".cr2", ".cr3", ".dng", ".exr", ".hdr", ".heic", ".heif", ".ico", ".jxl", ".nef", ".psd", ".svg")
BY_NAME = {".zip": "zip", ".parquet": "parquet", ".npz": "npz", ".npy": "npy"}
KINDS = {"zip": "zip archives", "tar": "tar archives", "parquet": "Parquet files", "idx": "idx files",
         "npy": ".npy arrays", "npz": ".npz files", "lmdb": "lmdb databases"}


def kind_of_file(path: Path) -> str | None:
    """A key of KINDS, 'idx labels', or None for anything else.

    Raises:
        OSError: it cannot be read.
        UserError: it is an archive of a kind that is not read.
    """
    start = first_bytes(path)
    for magic, remedy in FOREIGN.items():
        if start.startswith(magic):
            raise UserError(f"{path}: a kind of archive that is not read: {remedy}")
    if start.startswith(MAGIC):
        return "npy"
    if start.startswith(PARQUET):
        return "parquet"
    if start.startswith((IDX_IMAGES, IDX_LABELS)):
        return "idx" if start.startswith(IDX_IMAGES) else "idx labels"
    if start[LMDB_AT:LMDB_AT + 4] == LMDB:
        return "lmdb"
    if starts_like_a_tar(start):
        return "tar"
    if zipfile.is_zipfile(path):
        return "npz" if _is_npz(path) else "zip"
    return _kind_by_name(path.name)


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError):
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _kind_by_name(name: str) -> str | None:
    """What a file would be that is damaged or empty, so that it can be said."""
    if is_tar_name(name):
        return "tar"
    if "idx3-ubyte" in name:
        return "idx"
    if name == "data.mdb":
        return "lmdb"
    return next((kind for suffix, kind in BY_NAME.items() if name.lower().endswith(suffix)), None)


def may_be_data(name: str) -> bool:
    """Whether a file's name speaks of one of KINDS."""
    return _kind_by_name(name.rpartition("/")[2]) is not None


def is_worth_a_word(name: str) -> bool:
    """Whether somebody may think that a file is read, which is not."""
    return may_be_data(name) or name.lower().endswith(OTHER_IMAGES)


def is_image_file(path: Path) -> bool:
    """Whether a single file is an image, by its name."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)
