# SPDX-License-Identifier: Apache-2.0
"""dataset_tool.py: sources, labels, destinations."""
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import click.testing
import numpy as np
import PIL.Image
import pytest

import dataset_tool
from tests.data_prep.samples import encoded, files, metadata, pixels, write_folder, write_zip
from training.data.report import read_report
from training.dataset import ImageDataset


def run(*args, **options):
    """Exit code and output of the command; options become flags."""
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    result = click.testing.CliRunner().invoke(dataset_tool.main, [*args, *flags])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, " ".join(result.output.split())


def made(*args, **options):
    """Output of a run that must succeed."""
    code, output = run(*args, **options)
    assert code == 0, output
    return output


def refused(*args, match, **options):
    """A run that must end with exit code 2 and leave nothing at --dest. Before its error it may say what it reads."""
    code, output = run(*args, **options)
    assert code == 2, output
    assert output.count("Error: ") == 1
    for part in match:
        assert part in output
    return output


def photos(root, names, size=8):
    """A folder of images under the given names, each different."""
    return write_folder(root, {name: encoded(pixels(i, size)) for i, name in enumerate(names)})


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "out" / "set.zip"

#----------------------------------------------------------------------------
# Round trips.

@pytest.mark.parametrize("target", ["set.zip", "set"])
def test_round_trip(tmp_path, target):
    source, dest = write_folder(tmp_path / "source", files(), metadata(classes=["a", "b", "c"])), tmp_path / target
    output = made(source=source, dest=dest)
    assert "6 images of 8x8 pixels, 3 classes" in output
    before, after = ImageDataset(source, use_labels=True), ImageDataset(dest, use_labels=True)
    assert after.class_names == ["a", "b", "c"]
    assert [after.file_name(i) for i in range(6)] == list(files())
    for (a, label_a), (b, label_b) in zip(before, after, strict=True):
        assert np.array_equal(a, b)
        assert label_a == label_b
    after.close()


def test_archives_are_stored_and_equal_for_equal_images(tmp_path):
    source = write_zip(tmp_path / "source.zip", files(), metadata())
    for name in ("a.zip", "b.zip"):
        made(source=source, dest=tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert json.loads(archive.read("dataset.json")) == metadata()
        assert PIL.Image.open(archive.open("00000/img00000000.png")).format == "PNG"
    made(source=tmp_path / "a.zip", dest=tmp_path / "f")
    made(source=tmp_path / "f", dest=tmp_path / "c.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "c.zip").read_bytes()


def test_worker_processes_give_the_same(tmp_path):
    content = {f"{i % 3}/{i}.png": encoded(pixels(i)) for i in range(150)}
    content["1/bad.png"] = b"junk"
    source = write_zip(tmp_path / "source.zip", content)
    for workers in (1, 2):
        made(source=source, dest=tmp_path / f"{workers}.zip", resolution=4, workers=workers)
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    code, output = run("--strict", source=source, dest=tmp_path / "3.zip", workers=2)
    assert (code, "bad.png: cannot be converted" in output) == (2, True)


def test_many_images_go_to_many_folders(tmp_path, dest):
    data = encoded(pixels(0, 4))
    made(source=write_zip(tmp_path / "s.zip", {f"{i}.png": data for i in range(1001)}), dest=dest)
    dataset = ImageDataset(dest)
    assert dataset.file_name(1000) == "00001/img00001000.png"
    assert not dataset.has_labels
    dataset.close()
    assert "1001 images of 4x4 pixels, no labels" in made(source=dest, dest=dest.with_name("again.zip"))

#----------------------------------------------------------------------------
# Geometry.

def test_center_crop_and_resize(tmp_path, dest):
    wide = np.random.RandomState(0).randint(0, 256, (20, 33, 3), dtype=np.uint8)
    tall = np.random.RandomState(1).randint(0, 256, (41, 16, 3), dtype=np.uint8)
    source = write_folder(tmp_path / "s", {"tall.png": encoded(tall), "wide.png": encoded(wide)})
    made(source=source, dest=dest, transform="center-crop", resolution="8x8")
    want = [PIL.Image.fromarray(image).resize((8, 8), PIL.Image.Resampling.LANCZOS)
            for image in (tall[12:28], wide[:, 6:26])]
    dataset = ImageDataset(dest)
    assert all(np.array_equal(dataset[i][0].transpose(1, 2, 0), np.asarray(want[i])) for i in range(2))
    dataset.close()


def test_resolution_alone_resizes_square_images(tmp_path, dest):
    source = write_folder(tmp_path / "s", {"a.png": encoded(pixels(0, 12)), "b.png": encoded(pixels(1, 7))})
    assert "1 images: enlarged" in made(source=source, dest=dest, resolution=8)
    dataset = ImageDataset(dest)
    want = PIL.Image.fromarray(pixels(0, 12)).resize((8, 8), PIL.Image.Resampling.LANCZOS)
    assert np.array_equal(dataset[0][0].transpose(1, 2, 0), np.asarray(want))
    dataset.close()


@pytest.mark.parametrize("options", [{}, {"resolution": 8}])
def test_non_square(tmp_path, dest, options):
    source = write_folder(tmp_path / "s", {**files(), "x/wide.png": encoded(np.zeros((8, 12, 3), np.uint8))})
    refused("--no-labels", source=source, dest=dest, **options,
            match=[str(source / "x/wide.png"), "12x8 pixels", "--transform=center-crop"])
    assert not list(dest.parent.glob("*"))


def test_mixed_sizes(tmp_path, dest):
    source = write_zip(tmp_path / "s.zip", {**files(), "00000/odd.png": encoded(pixels(0, 16))})
    refused("--no-labels", source=source, dest=dest,
            match=["s.zip: 00000/odd.png: 16x16 pixels, but", "img00000000.png has 8x8", "--transform=center-crop"])
    assert not list(dest.parent.glob("*"))


def test_not_a_power_of_two(tmp_path, dest):
    source = photos(tmp_path / "s", ["a.png"], 12)
    refused(source=source, dest=dest, match=["a.png: 12x12 pixels", "power of two", "--resolution=8"])
    refused(source=source, dest=dest, resolution=48, match=["--resolution=48", "such as 32"])
    refused(source=source, dest=dest, transform="center-crop", match=["--transform=center-crop", "--resolution=N"])
    assert run(source=source, dest=dest, resolution="8x16")[0] == 2
    assert run(source=source, dest=dest, transform="center-crop-wide")[0] == 2


def test_max_images(tmp_path, dest):
    made(source=write_zip(tmp_path / "s.zip", {**files(), "00000/bad.png": b""}), dest=dest, max_images=4)
    dataset = ImageDataset(dest)
    assert len(dataset) == 4
    dataset.close()

#----------------------------------------------------------------------------
# Labels.

def test_sub_folders_are_classes(tmp_path, dest):
    source = photos(tmp_path / "s", ["owl/1.png", "cat/a.png", "cat/b/c.png", "dog/x.png"])
    (source / "empty").mkdir()
    assert "4 images of 8x8 pixels, 3 classes" in made(source=source, dest=dest)
    dataset = ImageDataset(dest, use_labels=True)
    assert dataset.class_names == ["cat", "dog", "owl"]
    assert dataset.labels.tolist() == [0, 0, 1, 2]
    assert np.array_equal(dataset[3][0], pixels(0).transpose(2, 0, 1))
    dataset.close()


@pytest.mark.parametrize(("names", "classes"), [
    (["all/cat/1.png", "all/dog/1.png"], ["cat", "dog"]),       # A wrapping folder does not count.
    (["cat/1.png", "cat/2.png"], ["cat"]),
    (["1.png", "2.png"], []),
    (["00000/img00000000.png", "00001/img00001000.png"], []),   # The official format's own folders.
])
def test_what_counts_as_a_class(tmp_path, dest, names, classes):
    source = write_zip(tmp_path / "s.zip", {name: encoded(pixels(0)) for name in names})
    made(source=source, dest=dest)
    dataset = ImageDataset(dest, use_labels=bool(classes))
    assert (dataset.class_names, dataset.has_labels) == (classes, bool(classes))
    dataset.close()


def test_metadata_wins_over_sub_folders(tmp_path, dest):
    source = photos(tmp_path / "s", ["cat/1.png", "dog/1.png"])
    (source / "dataset.json").write_text(json.dumps({"labels": [["cat\\1.png", 4], ["dog\\1.png", 2]]}))
    refused(source=source, dest=dest, match=["3 classes have no images: 0, 1, 3", "--allow-gaps"])
    text = made("--allow-gaps", source=source, dest=dest)
    assert "5 classes classes with their numbers of images: 0 (0), 1 (0), 2 (1), 3 (0), 4 (1)" in text
    assert "3 classes have no images: 0, 1, 3" in text
    dataset = ImageDataset(dest, use_labels=True)
    assert dataset.labels.tolist() == [4, 2]
    dataset.close()
    (source / "dataset.json").write_text('{"labels": null}')
    assert "no labels" in made("--overwrite", source=source, dest=dest)


def test_no_labels(tmp_path, dest):
    source = photos(tmp_path / "s", ["cat/1.png", "dog/1.png", "2.png"])
    refused(source=source, dest=dest, match=["1 of 3 images are in none: 2.png", "--no-labels"])
    assert "no labels" in made("--no-labels", source=source, dest=dest)
    assert "no labels" in made("--no-labels", source="sklearn:digits", dest=dest.with_name("d.zip"), max_images=3)


def test_partly_missing_labels(tmp_path, dest):
    source = write_zip(tmp_path / "s.zip", files(9), {"labels": [["00000/img00000000.png", 0]]})
    refused(source=source, dest=dest,
            match=["no label for 8 of 9 images: 00000/img00000001.png", "img00000005.png and 3 more"])


def test_wrong_labels(tmp_path, dest):
    for i, entry in enumerate([["a", -1], ["a", 1.5], ["../a", 1], "a"]):
        source = write_zip(tmp_path / f"{i}.zip", files(), {"labels": [entry]})
        refused(source=source, dest=dest, match=[f"{i}.zip: dataset.json: "])


@pytest.mark.parametrize("prefix", ["ILSVRC/Data/CLS-LOC/train/", "train/", ""])
@pytest.mark.parametrize("packed", [False, True])
def test_imagenet(tmp_path, dest, prefix, packed):
    content = {f"{prefix}n0{k}440764/{i}.JPEG": encoded(np.full((9, 12, 3), 50 * k, np.uint8), "JPEG")
               for k in (3, 1, 2) for i in range(2)}
    content[f"{prefix}n01440764/gray.JPEG"] = encoded(np.zeros((9, 9), np.uint8), "JPEG")
    if prefix:
        content[prefix.replace("train", "val") + "1.JPEG"] = encoded(pixels(0), "JPEG")
    source = write_zip(tmp_path / "s.zip", content) if packed else write_folder(tmp_path / "s", content)
    if prefix:
        refused(source=source, dest=dest, match=["has the splits train (7 images), val (1 image)", "--split=train",
                                                 "--split=all"])
    split = {"split": "train"} if prefix else {}
    output = made(source=source, dest=dest, transform="center-crop", resolution=4, **split)
    assert "6 images of 4x4 pixels, 3 classes" in output
    assert "1 grayscale files left out" in output
    dataset = ImageDataset(dest, use_labels=True)
    assert dataset.class_names == ["n01440764", "n02440764", "n03440764"]
    assert dataset.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert [int(image.mean().round()) // 50 for image, _label in dataset] == [1, 1, 2, 2, 3, 3]
    dataset.close()
    report = read_report(dest)
    assert (report["layout"], report["dropped_grayscale"], report["num_classes"]) == ("imagenet", 1, 3)


def test_all_gray_imagenet(tmp_path, dest):
    source = write_zip(tmp_path / "s.zip", {"n01440764/a.JPEG": encoded(np.zeros((8, 8), np.uint8), "JPEG")})
    refused(source=source, dest=dest, match=["no image could be converted: all are grayscale"])


def test_digits(dest):
    from sklearn.datasets import load_digits
    assert "1797 images of 16x16 pixels, 10 classes" in made(source="sklearn:digits", dest=dest, resolution=16)
    dataset, digits = ImageDataset(dest, use_labels=True), load_digits()
    assert (len(dataset), dataset.resolution, dataset.c_dim) == (1797, 16, 10)
    assert dataset.class_names == list("0123456789")
    assert dataset.labels.tolist() == digits.target.tolist()
    assert dataset.label_counts.tolist() == np.bincount(digits.target).tolist()
    assert dataset.file_name(1234) == "00001/img00001234.png"      # The name encodes the index: halves can be split.
    for i in (0, 1234, 1796):
        gray = PIL.Image.fromarray(np.rint(digits.images[i] * 255 / 16).astype(np.uint8))
        want = np.asarray(gray.resize((16, 16), PIL.Image.Resampling.LANCZOS))
        assert np.array_equal(dataset[i][0], np.stack([want] * 3))
    dataset.close()


def test_digits_as_they_are(dest):
    assert "1797 images of 8x8 pixels" in made(source="sklearn:digits", dest=dest)
    assert "20 images of 8x8" in made("--overwrite", source="sklearn:digits", dest=dest, max_images=20)


def test_digits_without_scikit_learn(dest, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(source="sklearn:digits", dest=dest, match=["sklearn:digits: needs", "pip install scikit-learn"])

#----------------------------------------------------------------------------
# Sources and destinations that cannot be used.

def test_unusable_sources(tmp_path, dest):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.zip").write_text("hello")
    whole = write_zip(tmp_path / "whole.zip", files()).read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[:len(whole) // 2])
    refused(source=tmp_path / "none", dest=dest, match=["none: no such folder, archive or pattern"])
    refused(source=tmp_path / "empty", dest=dest, match=["empty: no images in it"])
    refused(source=write_zip(tmp_path / "e.zip", {}), dest=dest, match=["e.zip: no images in it"])
    refused(source=tmp_path / "text.zip", dest=dest, match=["text.zip: not a whole zip archive"])
    refused(source=tmp_path / "half.zip", dest=dest, match=["half.zip: not a whole zip archive"])
    refused(source="sklearn:faces", dest=dest, match=["sklearn:faces: unknown"])
    assert not dest.exists()


def test_existing_destination(tmp_path):
    source, other = write_zip(tmp_path / "s.zip", files()), photos(tmp_path / "other", ["1.png"])
    for name in ("a.zip", "a"):
        dest = tmp_path / name
        made(source=source, dest=dest)
        refused(source=other, dest=dest, match=[f"--dest={dest}: exists already", "--overwrite"])
        assert len(ImageDataset(dest)) == 6
        made("--overwrite", source=other, dest=dest)
        assert len(ImageDataset(dest)) == 1
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_failed_overwrite_leaves_the_old_data_set(tmp_path):
    bad = write_zip(tmp_path / "bad.zip", {"a.png": encoded(pixels(0)), "b.png": encoded(pixels(0, 16))})
    for name in ("a.zip", "a"):
        made(source=write_zip(tmp_path / "s.zip", files()), dest=tmp_path / name)
        refused("--overwrite", source=bad, dest=tmp_path / name, match=["b.png: 16x16"])
        assert len(ImageDataset(tmp_path / name)) == 6
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_destinations_that_would_do_harm(tmp_path):
    source = photos(tmp_path / "s" / "in", ["1.png"])
    folder = photos(tmp_path / "f", ["1.png"])
    (tmp_path / "s" / "dataset.json").write_text("{}")
    (tmp_path / "file").write_text("hello")
    (tmp_path / "d.zip").mkdir()
    refused("--overwrite", source=source, dest=source, match=["would replace --source"])
    refused("--overwrite", source=source, dest=tmp_path / "s", match=["would replace --source"])
    refused("--overwrite", source=source, dest=folder, match=["is not a data set"])
    refused("--overwrite", source=source, dest=tmp_path / "file", match=["is a file"])
    refused("--overwrite", source=source, dest=tmp_path / "d.zip", match=["is a folder"])
    refused(source=source, dest=tmp_path / "x.tar", match=["x.tar: name a .zip archive or a folder"])
    refused(source=source, dest=tmp_path / "file" / "x.zip", match=["x.zip: cannot be written"])
    refused(source=source, dest=tmp_path / "file" / "x", match=["x: cannot be written"])
    assert (source / "1.png").exists()
    assert (folder / "1.png").exists()


def test_empty_folder_is_a_destination(tmp_path):
    (tmp_path / "out").mkdir()
    made(source=photos(tmp_path / "s", ["1.png"]), dest=tmp_path / "out")
    assert len(ImageDataset(tmp_path / "out")) == 1


def test_help_has_examples():
    code, output = run("--help")
    assert code == 0
    assert output.count("python dataset_tool.py --source=") == 2


def test_needs_no_torch():
    code = "import sys, dataset_tool; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(dataset_tool.__file__).parent)

#----------------------------------------------------------------------------
# What nobody writes on purpose.

@pytest.mark.parametrize(("text", "said"), [
    ('{"0.png": 1, "0.png": 0}', "'0.png' stands there twice"),
    ("[" * 100_000, "lie too deep in each other"),
    ('[["0.png", "\\ud800"]]', "hold halves of letters"),
    ('{"labels": [["0.png", 0]], "classes": ["\\ud800"]}', "must be a list of names, which are text"),
    ('{"0.png": NaN}', "1 labels are wrong: 0.png (nan)"),
])
def test_odd_label_files(tmp_path, dest, text, said):
    (tmp_path / "l.json").write_text(text)
    refused(source=photos(tmp_path / "s", ["0.png"]), dest=dest, labels=tmp_path / "l.json", match=["--labels=", said])


def test_names_of_classes_stay_in_their_line(tmp_path, dest):
    content = {"labels": [["0.png", 0]], "classes": ["a\nError: b"]}
    source = photos(tmp_path / "s", ["0.png"])
    (source / "dataset.json").write_text(json.dumps(content))
    result = click.testing.CliRunner().invoke(dataset_tool.main, [f"--source={source}", f"--dest={dest}"])
    assert result.exit_code == 0
    assert not [line for line in result.output.splitlines() if line.startswith("Error")]
    assert ImageDataset(dest, use_labels=True).class_names == ["a\nError: b"]


@pytest.mark.parametrize("name", ["1.png", "dataset.json", "notes"])
def test_a_pipe_among_the_files_is_not_waited_for(tmp_path, dest, name):
    source = photos(tmp_path / "s", ["0.png"])
    os.mkfifo(source / ".hidden")
    made(source=source, dest=dest)
    os.mkfifo(source / name)
    refused("--overwrite", source=source, dest=tmp_path / "b.zip",
            match=[f"{source / name}: is a pipe, a socket or a device: move it"])


@pytest.mark.parametrize(("array", "said"), [
    (np.zeros([16, 16, 3], np.uint8), "looks like one image with 3 channels: save images[None]"),
    (np.zeros([2, 16, 16, 3], np.uint8, order="F"), "save numpy.ascontiguousarray(images)"),
])
def test_arrays_of_other_forms(tmp_path, dest, array, said):
    np.save(tmp_path / "a.npy", array)
    refused(source=tmp_path / "a.npy", dest=dest, match=[said])


@pytest.mark.parametrize(("source", "said"), [
    ("x{0..99999999999}.tar", "names 100000000000 files, and at most 1000000 are taken"),
    ("x{0..9999}{0..9999}.tar", "names 100000000 files"),
    ("x{9..1}.tar", "the range {9..1} runs backwards"),
])
def test_ranges_are_counted_before_they_are_made(tmp_path, dest, source, said):
    refused(source=tmp_path / source, dest=dest, match=[said])


def test_no_archive_is_made_that_no_reader_takes(tmp_path, dest):
    source = photos(tmp_path / "s", ["0.png"])
    refused(source=source, dest=dest, resolution=16384,
            match=["16384 is more than any reader of images here takes: at most 8192"])
    assert dataset_tool.MAX_SIDE ** 2 <= PIL.Image.MAX_IMAGE_PIXELS < (2 * dataset_tool.MAX_SIDE) ** 2
