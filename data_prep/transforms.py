# SPDX-License-Identifier: Apache-2.0
"""How an RGB image of any shape becomes a square one of a given size.

`center-crop` is that of StyleGAN: the central square, then Pillow's Lanczos filter. `center-crop-dhariwal` is that of
the reference statistics for ImageNet (Dhariwal and Nichol, 2021): halvings with a box filter, then bicubic, then the
crop. The two give different FID for the same generator. In a pyramid every size is made from the source, never from
another size, so it equals the one made alone.
"""
import dataclasses
from collections.abc import Callable

import PIL.Image

from dnnlib import UserError

LANCZOS = PIL.Image.Resampling.LANCZOS
MIN_RESOLUTION = 4


@dataclasses.dataclass(frozen=True)
class Size:
    """Width and height of what is shown; the image that is made is width x width pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return str(self.width) if self.width == self.height else f"{self.width}x{self.height}"


def is_usable(resolution: int) -> bool:
    """Whether the networks can be trained at this size."""
    return resolution >= MIN_RESOLUTION and resolution & (resolution - 1) == 0


def nearest_usable(resolution: int) -> int:
    """The next smaller power of two that is large enough."""
    return max(1 << (resolution.bit_length() - 1), MIN_RESOLUTION)

#----------------------------------------------------------------------------
# One function per transform: (image, size) -> image of size.width x size.width.

def _central(image: PIL.Image.Image, width: int, height: int) -> PIL.Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def squash(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    """The whole image, its sides resized apart from each other."""
    return image if image.size == (size.width, size.width) else image.resize((size.width, size.width), LANCZOS)


def center_crop(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    """The central square."""
    side = min(image.size)
    return squash(_central(image, side, side), size)


def center_crop_dhariwal(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    """The central square as in the ADM reference sets."""
    side = size.width
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), PIL.Image.Resampling.BICUBIC)
    return _central(image, side, side)


def _on_black(image: PIL.Image.Image, side: int) -> PIL.Image.Image:
    canvas = PIL.Image.new("RGB", (side, side))
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def center_crop_wide(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    """The central part of the shape width:height, resized, between black bars above and below."""
    width = min(image.width, max(round(image.height * size.width / size.height), 1))
    height = min(image.height, max(round(image.width * size.height / size.width), 1))
    part = _central(image, width, height).resize((size.width, size.height), LANCZOS)
    return _on_black(part, size.width)


def pad(image: PIL.Image.Image, size: Size) -> PIL.Image.Image:
    """The whole image with its proportions, between black bars."""
    scale = size.width / max(image.size)
    shape = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    return _on_black(image if image.size == shape else image.resize(shape, LANCZOS), size.width)


TRANSFORMS: dict[str, Callable[[PIL.Image.Image, Size], PIL.Image.Image]] = {
    "center-crop": center_crop,
    "center-crop-dhariwal": center_crop_dhariwal,
    "center-crop-wide": center_crop_wide,
    "pad": pad,
    "squash": squash,
}

# Those that change proportions or add bars: with the sizes of the source images it can be undone.
REVERSIBLE = ("pad", "squash")


def is_enlarged(image: PIL.Image.Image, size: Size, transform: str | None) -> bool:
    """Whether the result shows fewer pixels than it has."""
    return max(image.size) < size.width if transform == "pad" else min(image.size) < size.height

#----------------------------------------------------------------------------

def check_sizes(sizes: list[Size], transform: str | None) -> None:
    """Refuse sizes that training or the transform cannot use. Raises UserError."""
    if not sizes and transform is not None:
        raise UserError(f"--transform={transform}: needs a size: add --resolution=N")
    for size in sizes:
        if not is_usable(size.width):
            raise UserError(f"--resolution={size}: must be a power of two such as {nearest_usable(size.width)}")
        if size.height > size.width:
            raise UserError(f"--resolution={size}: must not be higher than wide")
        if size.height != size.width and transform != "center-crop-wide":
            raise UserError(f"--resolution={size}: is not square: use a size such as {size.width}, or "
                            f"--transform=center-crop-wide")
        if size.height == size.width and transform == "center-crop-wide":
            raise UserError(f"--transform=center-crop-wide: needs a size that is wider than high, such as "
                            f"--resolution={size.width}x{size.width * 9 // 16}")
    if len({size.width for size in sizes}) != len(sizes):
        raise UserError(f"--resolutions={','.join(map(str, sizes))}: names a size twice")
