# SPDX-License-Identifier: Apache-2.0
"""Files by name: found on this machine or downloaded; verified by SHA-256, resumed after a break, atomic."""
import dataclasses
import errno
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

    filename: str                       # Name under which the file is looked for and cached.
    url: str                            # Where it is published.
    sha256: str | None = None           # Expected content; None where nobody gives it.
    size: int | None = None             # Bytes, for people who plan a download.
    other_names: tuple[str, ...] = ()   # Names others give to the same content; taken only where the hash fits.
    in_torch_hub: bool = False          # Whether torch.hub's folder may hold it.
    obstacle: str | None = None         # Why the published file cannot be used as it is; None: it can.


@dataclasses.dataclass(frozen=True)
class Found:
    """A copy of an asset on this machine."""

    path: Path
    sha256: str | None      # None: not computed, as there is nothing to compare it with.
    verified: bool          # Whether it is the content that the asset names.


def cache_dir() -> Path:
    """Folder for downloads and computed statistics: $STYLESAN_CACHE, else ~/.cache/stylesan-xl."""
    return Path(os.environ.get("STYLESAN_CACHE") or Path.home() / ".cache" / "stylesan-xl")


def torch_hub_dir() -> Path:
    """Where torch.hub keeps weights, by its own rules: below $TORCH_HOME, $XDG_CACHE_HOME/torch or ~/.cache/torch."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TORCH_HOME") or Path(cache) / "torch") / "hub" / "checkpoints"


def is_offline() -> bool:
    """True when STYLESAN_OFFLINE or HF_HUB_OFFLINE is set to anything but 0 or nothing."""
    return any(os.environ.get(name, "0") not in ("", "0") for name in ("STYLESAN_OFFLINE", "HF_HUB_OFFLINE"))

#----------------------------------------------------------------------------
# Looking.

def locate(asset: Asset, folders: Sequence[str | os.PathLike[str]] = (),
           allow_unverified: bool = False) -> Found | None:
    """A copy of `asset` on this machine, or None.

    Looked for in `folders`, then in $STYLESAN_WEIGHTS, in the cache, and in torch.hub's folder where the asset may be
    there. A file under another name, or in torch.hub's folder, is passed over unless its hash fits.

    Raises:
        UserError: a file of that name has another SHA-256 and `allow_unverified` is off.
    """
    places = _own_places(folders)
    for path in (folder / asset.filename for folder in places):
        if path.is_file():
            return _checked(path, asset, allow_unverified)
    hub = [torch_hub_dir()] if asset.in_torch_hub else []
    others = [folder / name for folder in places + hub for name in asset.other_names]
    for path in [folder / asset.filename for folder in hub] + others:
        if path.is_file() and (asset.sha256 is None or file_sha256(path) == asset.sha256):
            return Found(path, asset.sha256, asset.sha256 is not None)
    return None


def find_asset(asset: Asset, folders: Sequence[str | os.PathLike[str]] = (), offline: bool | None = None,
               allow_unverified: bool = False, into: str | os.PathLike[str] | None = None) -> Found:
    """A copy of `asset`: one that is on this machine (see `locate`), else a download.

    Args:
        asset: What is needed.
        folders: Looked in first.
        offline: Never download; None: as the environment says.
        allow_unverified: Take a file that is there although its SHA-256 is another. Downloads always have to fit.
        into: Folder for the download; None: the cache.

    Raises:
        UserError: the file is absent while offline, cannot be fetched, or has another SHA-256.
    """
    found = locate(asset, folders, allow_unverified)
    if found is not None:
        return found
    target = default_place(asset, into)
    if asset.obstacle is not None:
        raise UserError(f"{asset.filename}: it is not on this machine and cannot be fetched: {asset.obstacle}")
    if is_offline() if offline is None else offline:
        raise UserError(_missing(asset, target, "it is not on this machine and downloads are off (offline)"))
    _download(asset, target)
    return Found(target, asset.sha256, asset.sha256 is not None)


def find_or_download(asset: Asset, folders: Sequence[str | os.PathLike[str]] = (), offline: bool | None = None) -> Path:
    """Path of a verified copy of `asset`; see `find_asset`."""
    return find_asset(asset, folders, offline).path


def default_place(asset: Asset, into: str | os.PathLike[str] | None = None) -> Path:
    """Where a download of `asset` goes: the folder `into`; None: the cache."""
    return Path(into or cache_dir() / "downloads") / asset.filename


def _own_places(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    weights = os.environ.get("STYLESAN_WEIGHTS")
    return [Path(p) for p in folders] + ([Path(weights)] if weights else []) + [cache_dir() / "downloads"]


def _checked(path: Path, asset: Asset, allow_unverified: bool) -> Found:
    """The file at `path` if its content may be used."""
    if asset.sha256 is None:
        return Found(path, None, False)
    sha256 = file_sha256(path)
    if sha256 != asset.sha256 and not allow_unverified:
        raise UserError(f"{path}: sha256 is {sha256}, expected {asset.sha256}: delete the file and fetch {asset.url}, "
                        "or use it all the same with --allow-unverified-weights")
    return Found(path, sha256, sha256 == asset.sha256)


def _missing(asset: Asset, target: Path, why: str) -> str:
    return (f"{asset.filename}: {why}. Fetch {asset.url} (sha256 {asset.sha256 or 'not published'}) and put it at "
            f"{target}, or name its folder with --weights or the environment variable STYLESAN_WEIGHTS")

#----------------------------------------------------------------------------
# Downloading.

def _download(asset: Asset, target: Path) -> None:
    """Fetch into '<target>.part', continuing what an earlier try left, then verify and rename."""
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch_patiently(asset.url, part)
    except requests.RequestException as err:
        raise UserError(_missing(asset, target, f"the download failed ({_reason(err)})")) from err
    except OSError as err:
        if err.errno == errno.ENOSPC:
            raise
        raise UserError(_missing(asset, target, f"{target.parent} cannot be written to ({err.strerror})")) from err
    if asset.sha256 is not None and (sha256 := file_sha256(part)) != asset.sha256:
        part.unlink()           # Resuming a wrong file would never end well.
        raise UserError(_missing(asset, target, f"what the server sent has sha256 {sha256}"))
    os.replace(part, target)


def _reason(err: requests.RequestException) -> str:
    """A failure in words: connection, answer or transfer."""
    if isinstance(err, requests.HTTPError) and err.response is not None:
        return f"the server answers {err.response.status_code}"
    if isinstance(err, requests.Timeout):
        return f"no answer within {TIMEOUT_SECONDS} s"
    if isinstance(err, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return "no connection" if isinstance(err, requests.ConnectionError) else type(err).__name__


def _fetch_patiently(url: str, part: Path) -> None:
    """Several tries, except after an answer that would be the same again, such as 404."""
    for attempt in range(ATTEMPTS):
        try:
            _fetch(url, part)
            return
        except requests.RequestException as err:
            answer = err.response if isinstance(err, requests.HTTPError) else None
            final = answer is not None and answer.status_code < 500
            if final or attempt == ATTEMPTS - 1:
                raise


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
