# SPDX-License-Identifier: Apache-2.0
"""Copies of archives on a local disk, for data on a network drive: an epoch is a million small reads."""
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from dnnlib import UserError
from dnnlib.util import atomic_file, atomic_write_text, format_bytes
from training.data.zip_index import Signature, index_files, load_index

CHUNK = 16 << 20


def copy_to_local_disk(path: str | os.PathLike[str], folder: str | os.PathLike[str],
                       say: Callable[[str], None] = print) -> Path:
    """The copy of an archive below `folder`, made now unless it is there.

    It keeps the archive's name, in a sub-folder that is named by the archive's size, time and end, so that changed
    archives get new copies. A new copy is read back and its SHA-256 compared. In a group of processes let one per node
    go first (`distributed.node_first`).

    Args:
        path: A zip archive.
        folder: On a fast disk; is made if need be.
        say: Told about a copy that is made.

    Raises:
        UserError: not a file; no room; not readable or writable; the copy differs; the archive changes meanwhile.
    """
    path, folder = Path(path), Path(folder)
    if not path.is_file():
        raise UserError(f"--stage-to={folder}: copies zip archives, and {path} is none: make one with dataset_tool.py, "
                        "or leave the option out")
    try:
        with open(path, "rb") as file:
            signature = Signature.of(file)
        key = hashlib.sha256(json.dumps([signature.size, signature.mtime_ns, signature.tail]).encode()).hexdigest()[:16]
        target = folder / key / path.name
        if not is_copied(target, signature):
            _copy(path, target, signature, say)
    except OSError as err:
        if err.errno == errno.ENOSPC:
            raise _no_room(path, folder) from err
        raise UserError(f"--stage-to={folder}: {path} cannot be copied there ({err.strerror or err}): name a folder "
                        "that you may write to") from err
    return target


def is_copied(target: Path, signature: Signature) -> bool:
    """Whether a whole copy is there: its size, time and end are those of the archive, and it was once read back."""
    if not _hash_file(target).is_file() or not target.is_file():
        return False
    with open(target, "rb") as file:
        return Signature.of(file) == signature


def _hash_file(target: Path) -> Path:
    return target.with_name(f"{target.name}.sha256")


def _no_room(path: Path, folder: Path) -> UserError:
    free = shutil.disk_usage(folder).free
    return UserError(f"--stage-to={folder}: {format_bytes(free)} free, but {path.name} needs "
                     f"{format_bytes(path.stat().st_size)}: make room (copies of older data may be deleted), or name "
                     "another disk")


def _copy(path: Path, target: Path, signature: Signature, say: Callable[[str], None]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _hash_file(target).unlink(missing_ok=True)
    folder = target.parent.parent
    if shutil.disk_usage(folder).free < signature.size:
        raise _no_room(path, folder)
    say(f"copying {path} ({format_bytes(signature.size)}) to {target}")
    digest = hashlib.sha256()
    with open(path, "rb") as source, atomic_file(target) as file:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
        if Signature.of(source) != signature:
            raise UserError(f"{path}: changed while it was copied to --stage-to={folder}: start again when it is whole")
    with open(target, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != digest.hexdigest():
            target.unlink()
            raise UserError(f"--stage-to={folder}: the copy of {path} differs from it: check the disk, or name another")
    os.utime(target, ns=(signature.mtime_ns, signature.mtime_ns))
    _copy_index(path, target, signature)
    atomic_write_text(_hash_file(target), f"{digest.hexdigest()}  {target.name}\n")     # The last: now it is whole.


def _copy_index(path: Path, target: Path, signature: Signature) -> None:
    """The list of the archive fits the copy, too, for that has the same time."""
    for place in index_files(path):
        if load_index(place, signature) is not None:
            with open(place, "rb") as source, atomic_file(index_files(target)[0]) as file:
                shutil.copyfileobj(source, file)
            return
