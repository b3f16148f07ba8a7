# SPDX-License-Identifier: Apache-2.0
"""What a data set consists of, file by file: to know it again where it moved, and to say what changed in it.

An archive lists sizes and checksums. A folder does not, and reading it whole at every start would take too long: so its
files are known by their names and sizes, and of a few the content is read.
"""
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import numpy as np

from dnnlib.util import atomic_file, list_some, parse_json
from training.data.stores import FolderStore, ZipStore

SIZES_READ = 50_000         # Files of a folder whose size is asked for,
CONTENTS_READ = 256         # and whose content is read: those whose names come first by their checksums.
RELATED = 0.5               # Share of the old files that a data set still has which only grew or was repaired.


class Inventory(TypedDict):
    """What `inventory` finds, as it is written to a file."""

    labels: str                 # A hash of all labels and of the names of their classes; "" without labels.
    files: dict[str, str]       # Name -> what is known of the file.


def inventory(store: FolderStore | ZipStore, labels: np.ndarray, class_names: list[str]) -> Inventory:
    """Names of all files, each with its size and CRC-32 in hex digits, as far as they are known; and what labels are.

    Args:
        store: Where the files lie.
        labels: One per image that is served.
        class_names: Theirs; none without labels.
    """
    digest = hashlib.sha256(labels.astype("<i8").tobytes() + json.dumps(class_names).encode())
    files = _folder(store) if isinstance(store, FolderStore) else {
        name: f"{size:x} {crc:08x}" for name, (size, crc) in
        zip(store.names, map(store.content_key, range(len(store.names))), strict=True)}
    return {"labels": digest.hexdigest()[:16] if class_names else "", "files": files}


def _folder(store: FolderStore) -> dict[str, str]:
    chosen = sorted(range(len(store.names)), key=lambda i: zlib.crc32(store.names[i].encode()))
    files = dict.fromkeys(store.names, "")
    for i in chosen[:SIZES_READ]:
        files[store.names[i]] = f"{(store.path / store.names[i]).stat().st_size:x}"
    for i in chosen[:CONTENTS_READ]:
        size, crc = store.content_key(i)
        files[store.names[i]] = f"{size:x} {crc:08x}"
    return files


def inventory_fingerprint(content: Inventory, xflip: bool) -> str:
    """64 hex digits of an inventory whose images are served mirrored, too, or not."""
    return hashlib.sha256(json.dumps([content, xflip], sort_keys=True).encode()).hexdigest()


def write_inventory(path: Path, content: Inventory) -> None:
    """Write it, compressed."""
    with atomic_file(path) as f:
        f.write(gzip.compress(json.dumps(content).encode(), compresslevel=1, mtime=0))


def read_inventory(path: Path) -> Inventory | None:
    """What `write_inventory` wrote; None where it is missing or damaged."""
    try:
        content = parse_json(gzip.decompress(path.read_bytes()))
        labels, files = content["labels"], content["files"]
        return Inventory(labels=labels, files=files) if isinstance(labels, str) and isinstance(files, dict) else None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zlib.error):
        return None

#----------------------------------------------------------------------------

def _agree(old: str, new: str) -> bool:
    """Whether what is known of a file on both sides is equal."""
    return all(a == b for a, b in zip(old.split(), new.split(), strict=False))


def compare(old: Inventory, new: Inventory) -> tuple[str, bool]:
    """What changed, in words ('' for nothing), and whether it can still be called the same data set."""
    before, after = old["files"], new["files"]
    added = [name for name in after if name not in before]
    removed = [name for name in before if name not in after]
    changed = [name for name in before if name in after and not _agree(before[name], after[name])]
    parts = [_some(what, names) for what, names in (("new", added), ("gone", removed), ("changed", changed)) if names]
    if old["labels"] != new["labels"] and not (added or removed):
        parts.append("other labels")
    if len(before) != len(after):
        parts.insert(0, f"{len(before)} -> {len(after)} images")
    is_related = len(before) - len(removed) - len(changed) >= RELATED * len(before)
    return "; ".join(parts), is_related


def _some(what: str, names: Iterable[str]) -> str:
    names = list(names)
    return f"{len(names)} {what} ({list_some(names, 3)})"
