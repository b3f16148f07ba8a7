# SPDX-License-Identifier: Apache-2.0
"""What messages advise is tried: whoever follows it gets on."""
import re
import zipfile

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

import dataset_tool
from dnnlib import UserError
from metrics.metric_main import _same_size
from training.dataset import ImageDataset
from training.generator.layer_schedule import stem_config

PIXELS = np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8)


def folder_of(path, image: PIL.Image.Image, name: str = "a.png"):
    path.mkdir()
    image.save(path / name)
    return path


def convert(source, dest, *args: str):
    result = CliRunner().invoke(dataset_tool.main, [f"--source={source}", f"--dest={dest}", "--workers=1", *args])
    assert result.exit_code == 0, result.output
    return dest


def complaint(path) -> str:
    with pytest.raises(UserError) as info:
        ImageDataset(path)
    return str(info.value)


@pytest.mark.parametrize("size", [2, 3, 5, 12, 48, 100])
def test_sizes(size, tmp_path):
    image = PIL.Image.fromarray(PIXELS[:size, :size])
    said = complaint(folder_of(tmp_path / "in", image))
    (option,) = re.findall(r"--resolution=\d+", said)
    dataset = ImageDataset(convert(tmp_path / "in", tmp_path / "out.zip", option))
    stem_config(dataset.resolution, 4, 64, 8, 2)        # Is large enough for a network.
    # dataset_tool.py itself advises a size that it takes.
    result = CliRunner().invoke(dataset_tool.main, [f"--source={tmp_path / 'in'}", f"--dest={tmp_path / 'x.zip'}",
                                                    f"--resolution={size}", "--workers=1"])
    if result.exit_code:
        (other,) = re.findall(r"power of two such as (\d+)", result.output)
        convert(tmp_path / "in", tmp_path / "x.zip", f"--resolution={other}")


def test_the_smallest_size_that_a_network_takes():
    with pytest.raises(UserError, match="--resolution=8 or more"):
        stem_config(4, 4, 64, 8, 2)


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "1", "LA", "I;16", "F"])
def test_kinds_of_pixels(mode, tmp_path):
    image = PIL.Image.fromarray(PIXELS[:16, :16])
    if mode in ("I;16", "F"):
        image = PIL.Image.fromarray(PIXELS[:16, :16, 0].astype(np.uint16 if mode == "I;16" else np.float32))
    elif mode == "LA":
        image = image.convert("RGBA").convert("LA")
    else:
        image = image.convert(mode)
    said = complaint(folder_of(tmp_path / "in", image, "a.tif"))
    assert ("dataset_tool.py" in said) == (mode != "F")
    if mode == "F":
        image.convert("RGB").save(tmp_path / "in" / "a.tif")
        assert "save them as 8-bit RGB yourself" in said
    else:
        convert(tmp_path / "in", tmp_path / "out.zip")
    ImageDataset(tmp_path / "in" if mode == "F" else tmp_path / "out.zip")


def test_an_archive_in_another_compression(tmp_path):
    folder_of(tmp_path / "in", PIL.Image.fromarray(PIXELS[:16, :16]))
    with zipfile.ZipFile(tmp_path / "odd.zip", "w", zipfile.ZIP_BZIP2) as archive:
        archive.write(tmp_path / "in" / "a.png", "a.png")
    said = complaint(tmp_path / "odd.zip")
    assert "unpack the archive and name the folder" in said
    with zipfile.ZipFile(tmp_path / "odd.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    ImageDataset(tmp_path / "unpacked")
    convert(tmp_path / "unpacked", tmp_path / "out.zip")
    assert "without compression" in said
    with zipfile.ZipFile(tmp_path / "stored.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.write(tmp_path / "unpacked" / "a.png", "a.png")
    ImageDataset(tmp_path / "stored.zip")


def test_two_sides_of_different_sizes():
    for ours, theirs, whose, size in ((64, 48, "reference", 64), (48, 64, "generated", 64), (32, 64, "reference", 32)):
        said = _same_size(ours, theirs)
        assert whose in said
        assert f"--resolution={size}" in said
    assert "--resolution" not in _same_size(48, 50)
