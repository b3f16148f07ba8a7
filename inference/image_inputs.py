# SPDX-License-Identifier: Apache-2.0
"""Images to be scored, whatever a user has them in: a folder, a folder per class, a zip, a tar, or an .npz of samples.

Each reader numbers its images and serves them as `metrics.sources` describes: uint8 batches with or without labels.
What a path holds is found from its content, not from its name.
"""
import os
import zipfile

from dnnlib import UserError
from inference.image_files import DatasetSource as DatasetSource
from inference.image_files import folder_labels as folder_labels
from inference.image_files import open_files
from inference.npz_source import NpzSource as NpzSource
from inference.tar_store import TarStore, is_tar
from metrics.references import is_statistics
from training.data.stores import open_store

#----------------------------------------------------------------------------

def kind_of(path: str | os.PathLike[str]) -> str:
    """'statistics' (see `metrics.references`), 'samples' (other .npz) or 'dataset' (folder or archive of images).

    Raises:
        UserError: nothing is there, or it is none of these.
    """
    if os.path.isdir(path):
        return "dataset"
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file or folder: check the path")
    try:
        with open(path, "rb") as f:
            start = f.read(4)
        if is_statistics(path):
            return "statistics"
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
            return "samples" if names and all(name.endswith(".npy") for name in names) else "dataset"
        if is_tar(path):
            return "dataset"
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as err:
        raise UserError(f"{path}: a damaged zip archive or .npz ({err}): copy or make it again") from err
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror or err}): check the path and its permissions") from err
    if start == b"PK\x03\x04":
        raise UserError(f"{path}: a zip archive or .npz that is cut off: copy or make it again")
    raise UserError(f"{path}: neither a folder, a zip archive nor an .npz file, a tar archive or stored statistics: "
                    "name one of these")


def has_samples(path: str | os.PathLike[str]) -> bool:
    """Whether a file of statistics also holds images, as ADM's reference files do."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def open_images(path: str | os.PathLike[str], labels: bool = False, workers: int = 0) -> DatasetSource | NpzSource:
    """The images at `path`, whichever kind it is.

    Args:
        path: Folder, zip or tar archive, or .npz.
        labels: Read labels where there are any.
        workers: Processes that decode.

    Raises:
        UserError: nothing there, or no images in it.
    """
    if kind_of(path) != "dataset":
        return NpzSource(path, labels)
    if os.path.isdir(path):
        return open_files(open_store(path), "folder", labels, workers)
    if zipfile.is_zipfile(path):
        return open_files(open_store(path), "zip archive", labels, workers)
    return open_files(TarStore(path), "tar archive", labels, workers)


def summary(source: DatasetSource | NpzSource) -> str:
    """What was found, in a few words: 'tar archive, 50000 images of 256x256 pixels, ordered by class'."""
    about = source.description
    order = ", ordered by class" if about.get("labels_sorted") else ""
    size = about["resolution"]
    return f"{about['format']}, {about['num_images']} images of {size}x{size} pixels{order}"
