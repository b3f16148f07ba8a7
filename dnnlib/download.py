# SPDX-License-Identifier: Apache-2.0
"""Cached downloads: verified by SHA-256, resumed after a break, atomic, and refused when offline."""
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import requests

from dnnlib.errors import UserError
from dnnlib.util import file_sha256

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30
ATTEMPTS = 5

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Asset:
    """A file that a run may need."""

    filename: str               # Name under which the file is looked for and cached.
    url: str                    # Where it is published.
    sha256: str | None = None   # Expected content; None where the publisher gives none (then it is printed).


def cache_dir() -> Path:
    """Folder for downloads and computed statistics: $STYLESAN_CACHE, else ~/.cache/stylesan-xl."""
    return Path(os.environ.get("STYLESAN_CACHE") or Path.home() / ".cache" / "stylesan-xl")


def is_offline() -> bool:
    """True when STYLESAN_OFFLINE or HF_HUB_OFFLINE is set to anything but 0 or nothing."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("STYLESAN_OFFLINE", "HF_HUB_OFFLINE"))

#----------------------------------------------------------------------------

def find_or_download(asset: Asset, folders: Sequence[str | os.PathLike] = (), offline: bool | None = None) -> Path:
    """Path of a verified copy of `asset`.

    Looked for in `folders`, then in $STYLESAN_WEIGHTS, then in the cache, then downloaded.

    Raises:
        UserError: the file is absent while offline, cannot be fetched, or has another SHA-256.
    """
    weights = os.environ.get("STYLESAN_WEIGHTS")
    places = [Path(p) for p in folders] + ([Path(weights)] if weights else []) + [cache_dir() / "downloads"]
    for folder in places:
        path = folder / asset.filename
        if path.is_file():
            _verify(path, asset)
            return path
    target = places[-1] / asset.filename
    if is_offline() if offline is None else offline:
        raise UserError(_missing(asset, target, "it is not on this machine and downloads are off (offline)"))
    _download(asset, target)
    return target


def _missing(asset: Asset, target: Path, why: str) -> str:
    return (f"{asset.filename}: {why}. Fetch {asset.url} (sha256 {asset.sha256 or 'not published'}) and put it at "
            f"{target}, or name its folder with --weights or the environment variable STYLESAN_WEIGHTS")


def _verify(path: Path, asset: Asset) -> None:
    if asset.sha256 is not None and (found := file_sha256(path)) != asset.sha256:
        raise UserError(f"{path}: sha256 is {found}, expected {asset.sha256}: delete the file and fetch {asset.url}")


def _download(asset: Asset, target: Path) -> None:
    """Fetch into '<target>.part', continuing what an earlier try left, then verify and rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    error: Exception | None = None
    for _attempt in range(ATTEMPTS):
        try:
            _fetch(asset.url, part)
            break
        except requests.RequestException as err:
            error = err
    else:
        raise UserError(_missing(asset, target, f"the download failed ({type(error).__name__})")) from error
    try:
        _verify(part, asset)
    except UserError:
        part.unlink()           # Resuming a wrong file would never end well.
        raise
    os.replace(part, target)


def _fetch(url: str, part: Path) -> None:
    """One try: ask for the bytes that `part` does not have yet and append them."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as answer:
        if have and answer.status_code == 416:      # Nothing left to send: the part is whole.
            return
        answer.raise_for_status()
        resumed = have and answer.status_code == 206
        with open(part, "ab" if resumed else "wb") as f:
            for chunk in answer.iter_content(CHUNK_BYTES):
                f.write(chunk)
