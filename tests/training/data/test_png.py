# SPDX-License-Identifier: Apache-2.0
"""The plain PNG files against Pillow."""
import io
import zlib

import hypothesis
import hypothesis.extra.numpy
import numpy as np
import PIL.Image
import pytest
from hypothesis import strategies

from tests.data_prep.samples import encoded, pixels, write_folder
from training.data.images import open_image
from training.data.png import decode_plain_png, encode_plain_png
from training.dataset import ImageDataset

images = strategies.integers(1, 40).flatmap(lambda size: hypothesis.extra.numpy.arrays(
    np.uint8, strategies.sampled_from([(size, size), (size, size, 3)])))


def by_pillow(data):
    return np.asarray(open_image(data))


@hypothesis.settings(max_examples=100, deadline=None, database=None, derandomize=True)
@hypothesis.given(image=images)
def test_pillow_reads_them(image):
    data = encode_plain_png(image)
    assert np.array_equal(by_pillow(data), image)
    assert PIL.Image.open(io.BytesIO(data)).mode == ("L" if image.ndim == 2 else "RGB")
    assert np.array_equal(decode_plain_png(data, len(image)).reshape(image.shape), image)


@pytest.mark.parametrize("shape", [(256, 256, 3), (256, 255), (148, 148, 3)])
def test_several_blocks(shape):
    image = np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)     # Sizes around multiples of 65535.
    assert np.array_equal(by_pillow(encode_plain_png(image)), image)


def test_bytes_are_fixed():
    """They go into hashes of data sets, so they must not depend on a library's version."""
    image = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    assert zlib.crc32(encode_plain_png(image)) == CRC_OF_ARANGE


CRC_OF_ARANGE = 0x317e5f05


@pytest.mark.parametrize("make", [
    lambda: encoded(pixels(0)), lambda: encoded(pixels(0), compress_level=0), lambda: encoded(pixels(0), "JPEG"),
    lambda: encoded(PIL.Image.new("RGBA", (8, 8))), lambda: encoded(PIL.Image.new("P", (8, 8))),
    lambda: encoded(PIL.Image.new("I;16", (8, 8))), lambda: encode_plain_png(np.zeros((8, 4, 3), np.uint8)),
    lambda: encode_plain_png(np.zeros((16, 16, 3), np.uint8)), lambda: b"", lambda: b"junk" * 99])
def test_other_files_are_left_to_pillow(make):
    assert decode_plain_png(make(), 8) is None


@hypothesis.settings(max_examples=1000, deadline=None, database=None, derandomize=True)
@hypothesis.given(at=strategies.integers(0, 300), value=strategies.binary(max_size=6), keep=strategies.integers(0, 330))
def test_damaged_files(at, value, keep):
    """Whatever is accepted has the pixels that Pillow finds."""
    whole = encode_plain_png(pixels(1))
    data = (whole[:at] + value + whole[at + len(value):])[:max(keep, at)]
    found = decode_plain_png(data, 8)
    if found is not None:
        assert np.array_equal(found, by_pillow(data))


def test_in_a_data_set(tmp_path):
    content = {"0.png": encode_plain_png(pixels(0)), "1.png": encode_plain_png(pixels(1)[:, :, 0]),
               "2.png": encoded(pixels(2)), "3.png": encoded(pixels(3)[:, :, 0], compress_level=0)}
    dataset = ImageDataset(write_folder(tmp_path / "set", content), xflip=True)
    for i in range(8):
        want = pixels(i % 4) if i % 2 == 0 else np.stack([pixels(i % 4)[:, :, 0]] * 3, axis=2)
        want = want[:, ::-1] if i >= 4 else want
        assert np.array_equal(dataset[i][0], want.transpose(2, 0, 1))
        assert dataset[i][0].flags.c_contiguous
