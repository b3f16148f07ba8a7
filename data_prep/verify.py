# SPDX-License-Identifier: Apache-2.0
"""Read and decode a whole data set, and say which files are bad."""
import contextlib
import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path

import tqdm

from data_prep import labels
from data_prep.images import decode_quietly, pixel_digest
from data_prep.journal import FIRST_LINK, last_link, next_link
from data_prep.parallel import chunks, default_workers, ordered_map
from data_prep.sources.base import read_image
from data_prep.transforms import is_usable
from dnnlib import UserError
from dnnlib.util import list_some
from training.data.labels import METADATA_NAME
from training.data.report import read_report
from training.data.stores import FolderStore, ZipStore


@dataclasses.dataclass(frozen=True)
class Look:
    """One decoded file, or the reason why it is bad."""

    reason: str = ""
    resolution: int = 0
    digest: bytes = b""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What is known of a data set after it was read whole."""

    num_images: int
    resolution: int
    num_classes: int
    hash_matches: bool | None       # None: it has no hash of its content.


def look(data: bytes | str) -> Look:
    """The content of one file, or the reason why it could not be read, as training would take it."""
    if isinstance(data, str):
        return Look(data)
    try:
        image = decode_quietly(data).image
    except ValueError as err:
        return Look(str(err))
    if image.width != image.height or not is_usable(image.width):
        return Look(f"{image.width}x{image.height} pixels, but the size must be square and a power of two")
    return Look("", image.width, pixel_digest(image))


def look_chunk(chunk: list[bytes | str]) -> list[Look]:
    """`look` for several files."""
    return [look(data) for data in chunk]


def _looks(store: FolderStore | ZipStore, workers: int) -> Generator[Look, None, None]:
    files = (read_image(store, i) for i in range(len(store.names)))
    for block in ordered_map(look_chunk, chunks(files, len), workers):
        yield from block


def verify(path: str, workers: int | None = None, tell: Callable[[str], None] = print) -> Verdict:
    """Decode every image of a data set and compare labels and content with what it says of itself.

    Args:
        path: Archive or folder in the official format.
        workers: Processes; None: all cores for large sets.
        tell: Is given one line for every bad file.

    Raises:
        UserError: something is wrong; the message counts and names it.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such archive or folder: check the path")
    try:
        store = FolderStore(path) if Path(path).is_dir() else ZipStore(path)
    except OSError as err:
        raise UserError(f"{path}: cannot be read ({err.strerror or err}): check its permissions") from err
    if not len(store.names):
        raise UserError(f"{path}: no images in it")
    found, classes = labels.from_metadata(f"{path}: {METADATA_NAME}", store.metadata, store.names)
    bad, chain, resolution, first = [], FIRST_LINK, 0, ""
    steps = _looks(store, workers or default_workers(len(store.names)))
    with contextlib.closing(store), contextlib.closing(steps):
        for i, seen in enumerate(tqdm.tqdm(steps, total=len(store.names), unit="images", disable=None)):
            reason = seen.reason
            if not reason and not resolution:
                resolution, first = seen.resolution, store.names[i]
            if not reason and seen.resolution != resolution:
                reason = f"{seen.resolution}x{seen.resolution} pixels, but {first} has {resolution}x{resolution}"
            if reason:
                bad.append(store.names[i])
                tell(f"{store.where(i)}: {reason}")
            chain = next_link(chain, seen.digest, None if found is None else found[i])
    if bad:
        raise UserError(f"{path}: {len(bad)} of {len(store.names)} images are bad: {list_some(bad)}: make the data set "
                        f"again, or copy it again if it was good where it came from")
    said = (read_report(path) or {}).get("content_sha256")
    matches = None if said is None else said == last_link(chain, classes)
    if matches is False:
        raise UserError(f"{path}: all images can be decoded, but images or labels are not those that were written: "
                        f"the hash of the content does not fit the report: copy or make it again")
    num_classes = 0 if found is None else len(classes) if classes is not None else max(found) + 1
    return Verdict(len(store.names), resolution, num_classes, matches)
