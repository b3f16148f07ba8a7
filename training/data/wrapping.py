# SPDX-License-Identifier: Apache-2.0
"""A folder that lies around everything else in a folder or archive, as many tools leave one: it means nothing."""
import bisect
import os
from collections.abc import Collection, Sequence

from dnnlib import UserError
from dnnlib.util import list_some
from training.data.labels import METADATA_NAME


def wrapping_folder(names: Sequence[str]) -> str:
    """'a/b/' if all files lie in that folder, else ''. The names are sorted."""
    if not len(names):
        return ""
    first, last = names[0].split("/")[:-1], names[-1].split("/")[:-1]
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return "".join(part + "/" for part in first[:shared])


def metadata_folder(path: str | os.PathLike[str], files: Collection[str], names: Sequence[str]) -> str | None:
    """'' or 'a/': where the dataset.json of sorted images lies, at the top or in a folder around all of them.

    Args:
        path: Folder or archive, for messages.
        files: Names in it, at least all that end in dataset.json.
        names: Its images.

    Raises:
        UserError: there is none, but parts of it are data sets of their own, whose labels would be lost.
    """
    found = sorted(name for name in files if name.rpartition("/")[2] == METADATA_NAME)
    parts = wrapping_folder(names).split("/")
    for depth in range(len(parts)):
        folder = "".join(part + "/" for part in parts[:depth])
        if folder + METADATA_NAME in found:
            return folder
    if inner := [name for name in found if _has_images(names, name.removesuffix(METADATA_NAME))]:
        raise UserError(f"{path}: parts of it are data sets of their own: {list_some(inner)}: name one of these "
                        f"folders (unpack an archive for it), or take the {METADATA_NAME} away")
    return None


def _has_images(names: Sequence[str], folder: str) -> bool:
    """Whether any of the sorted images lies in a folder."""
    at = bisect.bisect_left(names, folder)
    return at < len(names) and names[at].startswith(folder)


def put_in_folder(metadata: dict[str, object], folder: str) -> dict[str, object]:
    """A dataset.json with names as they are seen from outside of its folder. What is odd in it stays as it is."""
    labels = metadata.get("labels")
    if not folder or not isinstance(labels, list):
        return metadata
    return {**metadata, "labels": [[folder + entry[0], *entry[1:]] if isinstance(entry, list) and entry
                                   and isinstance(entry[0], str) and _is_inside(entry[0]) else entry
                                   for entry in labels]}


def _is_inside(name: str) -> bool:
    """Whether a name is relative. An absolute one must stay recognisable as such."""
    return not name.startswith(("/", "\\")) and ":" not in name[:2]
