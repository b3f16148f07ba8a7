# SPDX-License-Identifier: Apache-2.0
"""Whatever dataset_tool.py reads can be scored and compared with: a source and the archive made of it are the same
images, with the same labels, as metrics see them."""
import json
import pickle

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from inference.image_inputs import kind_of, open_images
from tests.data_prep.archives import cifar_archive, mnist_folder, tar_bytes, web_shards
from tests.data_prep.samples import encoded, files, metadata, pixels, write_folder, write_zip
from tests.data_prep.test_conversion import CASES
from tests.data_prep.test_dataset_tool import made
from tests.data_prep.test_sources import parquet_file
from tests.metrics.test_calc_metrics import refused, run
from training.dataset import ImageDataset

TINY = ("--detector=tiny", "--num=4")
CLASSES = {f"{c}/{i}.png": encoded(pixels(10 * i + len(c) + (c == "bee"))) for c in ("ant", "bee") for i in range(2)}
ARRAY = np.stack([pixels(i) for i in range(6)])


def numpy_file(path, array):
    np.save(path, array)
    return path


def npz_file(path, *arrays, **named):
    np.savez(path, *arrays, **named)
    return path


def a_folder(tmp_path, write):
    (tmp_path / "s").mkdir()
    write(tmp_path / "s")
    return tmp_path / "s"


# What makes a source, and the split to take of it.
SOURCES = {
    "folder": (lambda p: write_folder(p / "s", CLASSES), None),
    "zip": (lambda p: write_zip(p / "s.zip", files(), metadata()), None),
    "zip in a folder": (lambda p: write_zip(p / "s.zip", {f"x/{n}": d for n, d in files().items()}), None),
    "tar": (lambda p: (p / "s").write_bytes(tar_bytes(CLASSES)) and p / "s", None),
    "shards": (lambda p: web_shards(p / "s"), None),
    "pattern": (lambda p: web_shards(p / "s") / "shard-{000000..000001}.tar", None),
    "cifar": (lambda p: cifar_archive(p / "renamed", 100), "test"),
    "idx": (lambda p: mnist_folder(p / "m"), "train"),
    "idx file": (lambda p: mnist_folder(p / "m") / "t10k-images-idx3-ubyte.gz", None),
    "parquet": (lambda p: parquet_file(p / "a.parquet"), None),
    "parquet splits": (lambda p: a_folder(p, lambda s: [parquet_file(s / f"{n}-0.parquet") for n in ("train", "dev")]),
                       "val"),
    "digits": (lambda p: "sklearn:digits", None),
    "npz": (lambda p: npz_file(p / "a.npz", ARRAY, np.arange(6)), None),
    "npz splits": (lambda p: npz_file(p / "a.npz", x_train=ARRAY[..., 0], y_train=np.arange(6),
                                      x_test=ARRAY[:2, ..., 0], y_test=np.eye(2)), "all"),
    "npy colours": (lambda p: numpy_file(p / "a.npy", ARRAY), None),
    "npy [N, H, W]": (lambda p: numpy_file(p / "a.npy", ARRAY[..., 0].copy()), None),
    "npy [N, H, W, 1]": (lambda p: numpy_file(p / "a.npy", ARRAY[..., :1].copy()), None),
    "splits": (lambda p: write_folder(p / "s", {f"{s}/{n}": d for s in ("train", "val") for n, d in CLASSES.items()}),
               "all"),
}


def content(source):
    batches = list(source.batches(4))
    labels = [labels for _, labels in batches]
    return torch.cat([images for images, _ in batches]), None if labels[0] is None else torch.cat(labels).tolist()


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_equals_its_archive(tmp_path, kind):
    make, split = SOURCES[kind]
    path = make(tmp_path)
    made(source=path, dest=tmp_path / "set.zip", **({} if split is None else {"split": split}))
    assert kind_of(path) == "images"
    source, archive = open_images(path, True, split=split), open_images(tmp_path / "set.zip", True)
    images, labels = content(source)
    archive_images, archive_labels = content(archive)
    assert torch.equal(images, archive_images)
    assert labels == archive_labels
    numbers = [str(i) for i in range(source.num_images)]
    assert (source.description["class_names"] or numbers)[:2] == (archive.description["class_names"] or numbers)[:2]
    some = [0, source.num_images - 1]
    assert torch.equal(torch.cat([x for x, _ in source.batches_at(1, some)]), images[some])
    copy = pickle.loads(pickle.dumps(source.dataset))           # As for processes that decode.
    assert np.array_equal(copy[1][0], images[1])
    assert len(source.fingerprint) == 64


@pytest.mark.parametrize("kind", ["tar", "parquet", "shards", "cifar", "npz"])
def test_several_processes_read_the_same(tmp_path, kind):
    make, split = SOURCES[kind]
    path = make(tmp_path)
    alone, together = (content(open_images(path, split=split, workers=workers))[0] for workers in (0, 2))
    assert torch.equal(alone, together)


@pytest.mark.parametrize(("name", "data", "want", "tolerance", "note"), CASES, ids=[case[0] for case in CASES])
def test_every_kind_of_file_is_the_same_everywhere(tmp_path, name, data, want, tolerance, note):
    """EXIF, depth, transparency, palettes: data preparation, training and metrics, with the same words."""
    folder = write_folder(tmp_path / "s", {name: data})
    made(source=folder, dest=tmp_path / "set.zip")
    dataset, source = ImageDataset(folder), open_images(folder)
    images = [content(source)[0][0].numpy(), content(open_images(tmp_path / "set.zip"))[0][0].numpy(), dataset[0][0]]
    assert all(np.array_equal(images[0], image) for image in images)
    assert np.abs(images[0].transpose(1, 2, 0) - np.asarray(want, dtype=np.float64)).max() <= tolerance
    said = "" if note in (None, "mode L converted") else f"of 1 files looked at 1: {note}"
    assert dataset.changes == source.description["changes"] == said


def test_colours_and_grayscale_in_one_set(tmp_path):
    folder = write_folder(tmp_path / "s", {"a.png": encoded(pixels(0)), "b.png": encoded(pixels(1)[:, :, 0])})
    for images in (content(open_images(folder))[0].numpy(), [image for image, _ in ImageDataset(folder)]):
        assert np.array_equal(images[0], pixels(0).transpose(2, 0, 1))
        assert np.array_equal(images[1], np.stack([pixels(1)[:, :, 0]] * 3))


def test_a_size_is_that_of_the_upright_picture(tmp_path):
    """A wide picture that EXIF turns is high, in every message."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 8
    folder = write_folder(tmp_path / "s", {"a.png": encoded(np.zeros((4, 8, 3), np.uint8), exif=exif)})
    for use in (open_images, ImageDataset):
        with pytest.raises(UserError, match="a.png: 4x8 pixels, but images must be square"):
            use(folder)


def test_files_that_are_too_large_are_not_read(tmp_path):
    folder = write_folder(tmp_path / "s", {"a.png": encoded(pixels(0))})
    with open(folder / "b.png", "wb") as f:
        f.truncate(3 << 30)                 # A hole: it takes no space, and reading it would take 3 GiB.
    for use in (open_images, ImageDataset):
        with pytest.raises(UserError, match="b.png: cannot be decoded .3.0 GiB, more than the 512.0 MiB"):
            use(folder)


def test_splits_of_both_sides(tmp_path):
    path = SOURCES["splits"][0](tmp_path)
    (record,) = run(f"--images={path}", f"--ref={path}", "--images-split=val", "--split=train", "--metrics=fid", *TINY)
    assert (record["generated"]["split"], record["reference"]["split"]) == ("val", "train")
    assert abs(record["results"]["fid"]) < 1e-6         # Both hold the same images.
    refused("has the splits train (4 images), val (4 images): choose one with --images-split=train",
            f"--images={path}", f"--ref={path}", "--split=val", "--metrics=fid", *TINY)
    refused("has the splits train (4 images), val (4 images): choose one with --split=train",
            f"--images={path}", f"--ref={path}", "--metrics=fid", *TINY)
    refused("--split=val: has no effect without --data or --ref", f"--images={path}", "--split=val", "--metrics=is")
    refused("--images-split=val: has no effect without --images", f"--ref={path}", "--images-split=val",
            f"--save-ref={tmp_path}/x.npz")


def test_what_was_understood_is_said(tmp_path):
    path = SOURCES["splits"][0](tmp_path)
    (path / "x.zip").write_bytes(b"PK")
    source = open_images(path, split="val")
    assert source.understood == ("split val of train (4 images), val (4 images); 2 classes: ant (2), bee (2); "
                                 "not read: x.zip")
    assert json.dumps(source.description["split"]) == '"val"'
