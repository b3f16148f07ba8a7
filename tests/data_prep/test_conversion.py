# SPDX-License-Identifier: Apache-2.0
"""Every kind of file that people put into data sets: converted, or listed with the reason."""

import numpy as np
import PIL.Image
import pytest

from tests.data_prep.samples import encoded, files, pixels, write_folder, write_zip
from tests.data_prep.test_dataset_tool import made, refused
from training.data.images import open_image, to_rgb
from training.data.labels import clean_name, is_image_name
from training.data.report import read_report
from training.dataset import ImageDataset

RGB = pixels(1)
GRAY = RGB[:, :, 0]
ALPHA = pixels(2)[:, :, 0]


def over_white(color, alpha):
    """Reference compositing, to within rounding."""
    a = alpha[:, :, None] / 255
    return color * a + 255 * (1 - a)


def rotated_exif():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6        # The camera was turned: show it rotated by 90 degrees clockwise.
    return exif


def palette_with_transparency():
    image = PIL.Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 2).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    return encoded(image, transparency=1)


# Name, content of the file, the RGB image that must come out, tolerance, note in the report.
CASES = [
    ("rgb.png", encoded(RGB), RGB, 0, None),
    ("gray.png", encoded(GRAY), np.stack([GRAY] * 3, 2), 0, "mode L converted"),
    ("bits.png", encoded(PIL.Image.fromarray(GRAY > 127)), np.stack([(GRAY > 127) * 255] * 3, 2), 0,
     "mode 1 converted"),
    ("rgba.png", encoded(np.dstack([RGB, ALPHA])), over_white(RGB, ALPHA), 1, "transparency laid over white"),
    ("la.png", encoded(PIL.Image.merge("LA", [PIL.Image.fromarray(x) for x in (GRAY, ALPHA)])),
     over_white(np.stack([GRAY] * 3, 2), ALPHA), 1, "transparency laid over white"),
    ("palette.png", encoded(PIL.Image.fromarray(RGB).quantize(256)), RGB, 0, "mode P converted"),
    ("clear.png", palette_with_transparency(),
     np.where(np.arange(64).reshape(8, 8, 1) % 2, 255, [[[10, 20, 30]]]), 0, "transparency laid over white"),
    ("cmyk.tif", encoded(PIL.Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB, 2, "mode CMYK converted"),
    ("16bit.png", encoded(GRAY.astype(np.uint16) * 257), np.stack([GRAY] * 3, 2), 0, "16 bits reduced to 8"),
    ("16bit.tif", encoded(GRAY.astype(np.uint16) * 257, "TIFF"), np.stack([GRAY] * 3, 2), 0, "16 bits reduced to 8"),
    ("32bit.tif", encoded(PIL.Image.fromarray(GRAY.astype(np.int32) * 257), "TIFF"), np.stack([GRAY] * 3, 2), 0,
     "16 bits reduced to 8"),
    ("turned.png", encoded(RGB, exif=rotated_exif()), np.rot90(RGB, -1), 0, "turned upright by its EXIF orientation"),
    ("moving.png", encoded(RGB, save_all=True, append_images=[PIL.Image.fromarray(pixels(3))]), RGB, 0,
     "animated: first frame taken"),
    ("lossless.webp", encoded(RGB, "WEBP", lossless=True), RGB, 0, None),
    ("bitmap.BMP", encoded(RGB, "BMP"), RGB, 0, None),
]

# Name, content, what the reason must say.
BROKEN = [
    ("empty.png", b"", "empty"),
    ("text.png", b"not an image at all", "not an image"),
    ("cut.png", encoded(pixels(0, 64))[:5000], ""),
    ("cut.jpg", encoded(pixels(0, 64), "JPEG")[:1200], "truncated"),
    ("float.tif", encoded(PIL.Image.fromarray(GRAY.astype(np.float32)), "TIFF"), "no defined range"),
    ("deep.tif", encoded(PIL.Image.fromarray(GRAY.astype(np.int32) << 16), "TIFF"), "no defined range"),
]


@pytest.mark.parametrize(("name", "data", "want", "tolerance", "note"), CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("packed", [False, True])
def test_converted(tmp_path, name, data, want, tolerance, note, packed):
    source = write_zip(tmp_path / "s.zip", {name: data}) if packed else write_folder(tmp_path / "s", {name: data})
    dest = tmp_path / "out.zip"
    output = made("--strict", source=source, dest=dest)
    dataset = ImageDataset(dest)
    got = dataset[0][0].transpose(1, 2, 0)
    dataset.close()
    assert np.abs(got - np.asarray(want, dtype=np.float64)).max() <= tolerance
    report = read_report(dest)
    assert report["conversions"] == ({} if note is None else {note: 1})
    assert note is None or f"1 images: {note}" in output


@pytest.mark.parametrize(("name", "data", "reason"), BROKEN, ids=[case[0] for case in BROKEN])
def test_unreadable_files_are_listed(tmp_path, name, data, reason):
    source = write_folder(tmp_path / "s", {**files(), f"00000/{name}": data})
    where, dest = str(source / "00000" / name), tmp_path / "out.zip"
    output = made("--no-labels", source=source, dest=dest)
    assert "6 images of 8x8" in output
    assert f"1 files skipped: {where}" in output
    report = read_report(dest)
    assert report["num_images"] == 6
    assert [item["file"] for item in report["skipped"]] == [f"00000/{name}"]
    assert reason in report["skipped"][0]["reason"]
    assert report["skipped"][0]["reason"]
    strict = tmp_path / "strict.zip"
    refused("--strict", "--no-labels", source=source, dest=strict, match=[where, "cannot be converted", "--strict"])
    assert not strict.exists()


def test_all_kinds_in_one_run(tmp_path):
    content = {name: data for name, data, *_rest in [*CASES, *BROKEN]}
    output = made(source=write_zip(tmp_path / "s.zip", content), dest=tmp_path / "out.zip")
    assert f"{len(CASES)} images" in output
    assert f"{len(BROKEN)} files skipped" in output


def test_nothing_could_be_converted(tmp_path):
    source = write_folder(tmp_path / "s", {name: data for name, data, _reason in BROKEN})
    refused(source=source, dest=tmp_path / "out.zip",
            match=["no image could be converted", "cut.jpg", "and 1 more", "nothing was written"])
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_damaged_member_of_an_archive_is_listed(tmp_path):
    path = write_zip(tmp_path / "s.zip", files())
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    path.write_bytes(data)
    output = made(source=path, dest=tmp_path / "out.zip")
    assert "s.zip: 00000/img00000000.png: the archive is damaged here" in output


def test_colors_of_a_palette_with_transparency():
    image, notes = to_rgb(open_image(palette_with_transparency()))
    assert image.mode == "RGB"
    assert notes == ["transparency laid over white"]


@pytest.mark.parametrize(("name", "clean"), [("a/b.png", "a/b.png"), ("a\\b.png", "a/b.png"), ("./a.png", "a.png")])
def test_clean_name(name, clean):
    assert clean_name(name) == clean


@pytest.mark.parametrize(("name", "yes"), [("a/b.PNG", True), ("a.jpeg", True), ("a.txt", False), (".a.png", False),
                                           ("__MACOSX/a.png", False), (".git/a.png", False), ("png", False)])
def test_is_image_name(name, yes):
    assert is_image_name(name) is yes
