# SPDX-License-Identifier: Apache-2.0
"""From the content of an image file to upright 8-bit RGB: the one rule for data preparation, training and metrics.

What a file is, is read from its content; its name says nothing. Channels of 16 bits keep their upper 8 bits, gray or
coloured, in PNG and in TIFF: Pillow decodes colours so, and offers no more of them. Transparency is laid over white,
the first frame of animations is taken, and pictures are turned as their EXIF orientation says.
"""
import dataclasses
import io
from collections.abc import Mapping

import numpy as np
import PIL.Image
import PIL.ImageOps

from training.data.png import SIGNATURE, decode_plain_png

PNG_DEPTH = 24              # Where a PNG file says how many bits a sample has.
BITS_PER_SAMPLE = 258       # TIFF's tag.
ORIENTATION = 0x0112        # EXIF's tag.
GRAY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N")
GRAY_NOTE = "mode L converted"      # Grayscale files get three equal channels, which is no change to speak of.
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
# JPEG 2000 has markers of its start and of the coding style; the style names the wavelet at this place.
J2K_START, J2K_STYLE, J2K_WAVELET = b"\xff\x4f\xff\x51", b"\xff\x52", 13


@dataclasses.dataclass(frozen=True)
class Decoded:
    """An image and how it came to be what it is."""

    image: PIL.Image.Image          # RGB, upright.
    notes: tuple[str, ...] = ()     # What was done to it, in words.
    lossy: str = ""                 # The compression that changed its pixels; "" if there is none.
    is_gray: bool = False           # The file has no colours.


def decode(data: bytes) -> Decoded:
    """The image in the content of a file.

    Raises:
        ValueError: it is no image, is damaged, has too many pixels, or values without a defined range; the text is
            the reason.
    """
    try:
        image = open_image(data)
        rgb, notes = to_rgb(image)
        return Decoded(rgb, tuple(notes), lossy_compression(data, image), image.mode in GRAY_MODES)
    except PIL.Image.DecompressionBombError as err:
        raise ValueError(f"more than the {PIL.Image.MAX_IMAGE_PIXELS} pixels that one image may have") from err
    except Exception as err:        # Pillow's many decoders raise anything for damaged files.
        raise ValueError(str(err) or type(err).__name__) from err


def decode_pixels(data: bytes, resolution: int) -> np.ndarray:
    """The pixels of an image, uint8 [H, W, 3], faster if it is a plain PNG of this resolution. Raises ValueError."""
    pixels = decode_plain_png(data, resolution)
    if pixels is None:
        return np.asarray(decode(data).image)
    return pixels if pixels.shape[2] == 3 else np.broadcast_to(pixels, (*pixels.shape[:2], 3))

#----------------------------------------------------------------------------

def open_image(data: bytes) -> PIL.Image.Image:
    """A decoded image in whatever mode the file has. Raises OSError, and whatever Pillow raises for damaged files."""
    if not data:
        raise OSError("the file is empty")
    try:
        image = PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError as err:
        raise OSError("not an image, or damaged") from err      # The original text only names a memory address.
    limit = PIL.Image.MAX_IMAGE_PIXELS      # Pillow itself only warns up to twice as many.
    if limit is not None and image.width * image.height > limit:
        raise OSError(f"{image.width}x{image.height} pixels, more than the {limit} that one image may have")
    image.load()
    if _has_16_bits(data, image):
        image.info["had_16_bits"] = True
    return image


def _has_16_bits(data: bytes, image: PIL.Image.Image) -> bool:
    """Whether the file has 16 bits per sample, of which Pillow has kept 8 without a word if it has colours."""
    if data.startswith(SIGNATURE):
        return data[PNG_DEPTH] == 16
    tags: Mapping[int, tuple[int, ...]] = getattr(image, "tag_v2", None) or {}
    return max(tags.get(BITS_PER_SAMPLE, (8,)), default=8) == 16


def _orientation(image: PIL.Image.Image) -> int:
    """EXIF's number for how the picture has to be turned; 1 if it is upright or if its EXIF data cannot be read."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except Exception:               # As for the pixels: the parser raises anything for damaged data.
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def to_rgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, list[str]]:
    """Any decoded image as upright RGB, and what was done to it, in words.

    Raises:
        ValueError: the values have no defined range (32-bit integers beyond 16 bits, floats).
    """
    notes = []
    has_16_bits = image.info.get("had_16_bits", False)
    if getattr(image, "n_frames", 1) > 1:
        notes.append("animated: first frame taken")
    if _orientation(image) != 1:
        image = PIL.ImageOps.exif_transpose(image)
        notes.append("turned upright by its EXIF orientation")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range: save them with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no defined range: save them with 8 or 16 bits")
        image = PIL.Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
        has_16_bits = True
    if has_16_bits:
        notes.append("16 bits reduced to 8")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
        notes.append("transparency laid over white")
    elif image.mode != "RGB":
        notes.append(f"mode {image.mode} converted")
    return image.convert("RGB"), notes

def changes_in_words(conversions: Mapping[str, int], looked_at: int) -> str:
    """What is done to files when they are read, '' if nothing: 'of 256 files looked at 3: turned upright ...'."""
    parts = [f"{count}: {note}" for note, count in conversions.items() if note != GRAY_NOTE]
    return f"of {looked_at} files looked at {', '.join(parts)}" if parts else ""

#----------------------------------------------------------------------------

def lossy_compression(data: bytes, image: PIL.Image.Image) -> str:
    """The name of the compression if it changes pixels, else "".

    AVIF counts as lossy: what Pillow writes always is. JPEG 2000 is if it uses the wavelet that rounds.
    """
    kind = image.format
    if kind in ("JPEG", "MPO"):
        return "JPEG"
    if kind == "WEBP":
        return "lossy WebP" if _is_lossy_webp(data) else ""
    if kind == "AVIF":
        return "AVIF"
    if kind == "JPEG2000":
        at = data.find(J2K_STYLE, max(data.find(J2K_START), 0))
        return "lossy JPEG 2000" if data[at + J2K_WAVELET:at + J2K_WAVELET + 1] == b"\0" else ""
    if kind == "TIFF" and image.info.get("compression") in LOSSY_TIFF:
        return "TIFF with lossy compression"
    return ""


def _is_lossy_webp(data: bytes) -> bool:
    """Whether the first picture in a WebP file is compressed by VP8, not by VP8L: RFC 9649, section 2."""
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at:at + 4], int.from_bytes(data[at + 4:at + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        at += 8 + (16 if kind == b"ANMF" else size + size % 2)      # The picture lies behind a frame's 16 bytes.
    return False
