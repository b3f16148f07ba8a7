# SPDX-License-Identifier: Apache-2.0
"""One file to one square RGB image per size: what worker processes do."""
import dataclasses
import hashlib
import warnings

import numpy as np
import PIL.Image

from data_prep.transforms import TRANSFORMS, Size, is_enlarged
from training.data.images import Decoded, decode
from training.data.png import encode_plain_png


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is done to every image."""

    sizes: tuple[Size, ...] = ()        # One image is made for each; empty: one, of the size that it has.
    transform: str | None = None        # A name in TRANSFORMS; None resizes and takes square images only.
    drop_grayscale: bool = False

    @property
    def num_levels(self) -> int:
        return max(len(self.sizes), 1)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The converted images of one file, or the reason why there are none."""

    pngs: tuple[bytes, ...] = ()        # One per size.
    digests: tuple[bytes, ...] = ()     # SHA-256 of the pixels of each.
    size: tuple[int, int] = (0, 0)      # The first one's.
    source_size: tuple[int, int] = (0, 0)       # Upright, before the transform.
    reason: str = ""                    # Cannot be read.
    refused: str = ""                   # Can be read, but does not fit the options.
    notes: tuple[str, ...] = ()         # What was done to it, in words.
    enlarged: tuple[bool, ...] = ()     # For each size.
    dropped: bool = False               # A grayscale file that is not wanted: not a fault.


def pixel_digest(image: PIL.Image.Image) -> bytes:
    """SHA-256 of an RGB image's size and pixels: the same however it is compressed."""
    digest = hashlib.sha256(f"{image.width}x{image.height}".encode())
    digest.update(image.tobytes())
    return digest.digest()


def decode_quietly(data: bytes) -> Decoded:
    """`decode` without Pillow's warnings of odd metadata. Raises ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode(data)


def convert(plan: Plan, where: str, data: bytes | str) -> Outcome:
    """The content of a file, or the reason why it could not be read, as images of the wanted sizes."""
    if isinstance(data, str):
        return Outcome(reason=data)
    try:
        found = decode_quietly(data)
    except ValueError as err:
        return Outcome(reason=str(err))
    if plan.drop_grayscale and found.is_gray:
        return Outcome(dropped=True)
    image = found.image
    if plan.transform is None and image.width != image.height:
        return Outcome(refused=f"{where}: {image.width}x{image.height} pixels, but images must be square: "
                               f"add --transform=center-crop and --resolution=N")
    if not plan.sizes:
        images = [image]
    else:
        make = TRANSFORMS[plan.transform or "squash"]
        images = [make(image, size) for size in plan.sizes]
    return Outcome(
        pngs=tuple(encode_plain_png(np.asarray(made)) for made in images),
        digests=tuple(pixel_digest(made) for made in images), size=images[0].size,
        source_size=image.size, notes=found.notes,
        enlarged=tuple(is_enlarged(image, size, plan.transform) for size in plan.sizes))


def convert_chunk(plan: Plan, chunk: list[tuple[str, bytes | str]]) -> list[Outcome]:
    """`convert` for several files, given as (name for messages, content or reason)."""
    return [convert(plan, where, data) for where, data in chunk]
