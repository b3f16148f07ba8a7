# SPDX-License-Identifier: Apache-2.0
"""PNG files of the plainest kind: no compression and no filters, so that reading one is copying it.

Every reader of PNG files reads them, and they are as large as others that are not compressed, such as those of the
official data sets. Pillow gives every row a filter, which takes most of the time that decoding such a file takes.

Formats: PNG (W3C, 3rd edition), sections 5, 9 and 11.2; zlib (RFC 1950); deflate (RFC 1951), section 3.2.4.
"""
import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB = 0, 2                            # Colour types.
CHANNELS = {GRAY: 1, RGB: 3}
START = struct.pack(">8sL4s", SIGNATURE, 13, b"IHDR")
PIXELS_AT = 41                              # Where the content of the first IDAT chunk begins.
BLOCK = 65535                               # Bytes in a block that is not compressed.


def encode_plain_png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [H, W] or [H, W, 3]. The same pixels give the same bytes everywhere."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)      # In front of every row its filter: none.
    rows[:, 1:] = pixels.reshape(height, -1)
    data = rows.tobytes()
    parts = [b"\x78\x01"]
    for at in range(0, len(data), BLOCK):
        block = data[at:at + BLOCK]
        parts += [struct.pack("<BHH", at + BLOCK >= len(data), len(block), len(block) ^ 0xFFFF), block]
    parts.append(struct.pack(">L", zlib.adler32(data)))
    header = struct.pack(">2L5B", width, height, 8, RGB if pixels.ndim == 3 else GRAY, 0, 0, 0)
    return SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"".join(parts)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">L", len(content)) + kind + content + struct.pack(">L", zlib.crc32(kind + content))


def decode_plain_png(data: bytes, resolution: int) -> np.ndarray | None:
    """Pixels of a square PNG file, uint8 [resolution, resolution, 1 or 3]; None if it is not of this kind.

    The file then is another one, or damaged: ask Pillow. What is returned is what Pillow would return.
    """
    if len(data) < PIXELS_AT + 12 or not data.startswith(START) or data[37:41] != b"IDAT":
        return None
    width, height, depth, kind, *methods = struct.unpack_from(">2L5B", data, 16)
    end = PIXELS_AT + int.from_bytes(data[33:37], "big")
    if (width != resolution or height != resolution or depth != 8 or kind not in CHANNELS or any(methods)
            or zlib.crc32(data[12:29]) != int.from_bytes(data[29:33], "big") or data[end + 8:end + 12] != b"IEND"):
        return None
    row = 1 + width * CHANNELS[kind]
    inflate = zlib.decompressobj()
    try:
        content = inflate.decompress(memoryview(data)[PIXELS_AT:end], height * row + 1)
    except zlib.error:
        return None
    if len(content) != height * row or not inflate.eof:
        return None
    rows = np.frombuffer(content, dtype=np.uint8).reshape(height, row)
    return None if rows[:, 0].any() else rows[:, 1:].reshape(height, width, -1)
