# SPDX-License-Identifier: Apache-2.0
"""What a file of statistics may say: the metadata of our own format as a schema, and bounds of what numbers mean.

Arrays are bounded where they are read (`torch_utils.arrays`, `torch_utils.safe_pickle`).
"""
from typing import Any

from dnnlib import UserError
from torch_utils.schema import Unfit, entries, items, label, nothing_or, plain, record, shown, text, whole

MAX_ENTRIES = 100               # Detectors and outputs in a file.
# D of features: a covariance has D^2 numbers, whatever the file has. VGG16's, the widest in use, have 4096.
MAX_DIMENSIONS = 8192
MAX_IMAGES = 10 ** 12

_ENTRY = record({"keys": items(label, 2, 2), "detector": nothing_or(label), "detector_sha256": nothing_or(label),
                 "output": label}, others=plain)
_METADATA = record({"statistics": items(_ENTRY, 0, MAX_ENTRIES)},
                   {"images_fingerprint": nothing_or(label), "resolution": nothing_or(whole(1, 1 << 20)),
                    "crop": nothing_or(label), "resize": entries(text)}, others=plain)

#----------------------------------------------------------------------------

def check_metadata(path: str, metadata: Any) -> None:
    """Refuse metadata that `metrics.references.writing` does not write.

    Raises:
        UserError: other keys or types; an array that is used twice.
    """
    try:
        _METADATA(metadata, "its metadata")
        keys = [tuple(entry["keys"]) for entry in metadata["statistics"]]
        if len(set(keys)) != len(keys):
            raise Unfit("its metadata name the same statistics twice")
    except Unfit as err:
        raise UserError(f"{path}: not a readable file of statistics: {err}: make it again with --save-ref") from err


def check_width(path: str, names: str, width: int) -> None:
    """Refuse features that are wider than any detector's, before a covariance of them is made.

    Raises:
        UserError: they are.
    """
    if width > MAX_DIMENSIONS:
        raise UserError(f"{path}: {names} are of {width} features, but no detector has more than {MAX_DIMENSIONS}: "
                        "make the file again")


def check_count(path: str, num: int | None, ddof: int) -> None:
    """Refuse numbers of images, and divisors N - ddof, that no statistics have.

    Raises:
        UserError: such numbers.
    """
    if ddof not in (0, 1):
        raise UserError(f"{path}: ddof is {shown(ddof)}, but must be 0 or 1: make the file again")
    if num is not None and not ddof < num <= MAX_IMAGES:
        raise UserError(f"{path}: num_images is {shown(num)} with ddof {ddof}: make the file again")
