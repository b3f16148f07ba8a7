# SPDX-License-Identifier: Apache-2.0
"""Splits in every kind of source: recognised, told with their sizes, never mixed unasked; and other layouts that were
guessed."""
import gzip
import json
import os
import shutil

import numpy as np
import pytest

from data_prep.sources import SourceOptions, open_source
from dnnlib import UserError
from tests.data_prep.archives import cifar_archive, cifar_files, idx, mnist_folder, tar_bytes, web_shards
from tests.data_prep.samples import encoded, files, metadata, pixels, write_folder, write_zip
from tests.data_prep.test_dataset_tool import made, photos, refused
from tests.data_prep.test_sources import lmdb_folder, parquet_file
from training.data.splits import find_splits
from training.dataset import ImageDataset

TRAIN, VAL = 4, 2       # Images in the splits of most tests.


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "out" / "set.zip"


def images(folder, count, first=0):
    """Files of two classes below a folder."""
    return {f"{folder}/{'cat' if i % 2 else 'dog'}/{i}.png": encoded(pixels(first + i)) for i in range(count)}


def both(train="train", val="val"):
    return {**images(train, TRAIN), **images(val, VAL, 100)}


def read(path, split=None, **options):
    source = open_source(str(path), SourceOptions(split=split, **options))
    try:
        contents = [source.store.read(i) for i in source.indices]
        assert [source.store.content_key(i)[0] for i in source.indices] == [len(data) for data in contents]
        return source, contents
    finally:
        source.store.close()


def check_splits(path, train, val, first="train", second="val"):
    """A source of two splits: none is taken unasked, each can be chosen, and all."""
    with pytest.raises(UserError, match=rf"has the splits {first} \(.*\), {second} \(.*\): choose one with --split="
                                        rf"{first}, or take all with --split=all$"):
        open_source(str(path))
    found = {split: len(read(path, split)[1]) for split in (first, second, second.upper(), "all")}
    assert found == {first: train, second: val, second.upper(): val, "all": train + val}
    with pytest.raises(UserError, match=rf"--split=other: .* has the splits {first} .*, {second} .*: choose one"):
        open_source(str(path), SourceOptions(split="other"))

#----------------------------------------------------------------------------
# Folders of images.

@pytest.mark.parametrize("packed", ["folder", "zip", "tar", "tgz"])
@pytest.mark.parametrize(("train", "val"), [("train", "val"), ("Training", "VALID"), ("train", "validation"),
                                            ("trainset", "dev"), ("photos/train", "photos/val"),
                                            ("train2017", "val2017"), ("birds_train", "birds_val"),
                                            ("train_32x32", "valid_32x32")])
def test_folders(tmp_path, packed, train, val):
    content = both(train, val)
    if packed == "folder":
        path = write_folder(tmp_path / "s", content)
    elif packed == "zip":
        path = write_zip(tmp_path / "s.zip", content)
    else:
        path = tmp_path / f"s.{packed}"
        path.write_bytes(tar_bytes(content) if packed == "tar" else gzip.compress(tar_bytes(content)))
    check_splits(path, TRAIN, VAL)
    for split in ("train", "val", "all"):
        assert read(path, split)[0].classes == ["cat", "dog"]
    source, contents = read(path, "val")
    assert sorted(contents) == sorted(images(val, VAL, 100).values())
    assert (source.splits, source.chosen) == ({"train": TRAIN, "val": VAL}, ("val",))


@pytest.mark.parametrize(("names", "counts", "inner"), [
    (["train/1.png", "test/1.png", "test/2.png"], {"train": 1, "test": 2}, "1.png"),
    (["cat/train/1.png", "cat/test/2.png", "dog/test/3.png"], {"train": 1, "test": 2}, "cat/1.png"),
    (["a/b/train/1.png", "a/b/testing/2.png"], {"train": 1, "test": 1}, "1.png"),
    (["train/1.png", "train/2.png"], {"train": 2}, "1.png"),
    (["x/train/cat/1.png", "x/train/dog/2.png"], {"train": 2}, "cat/1.png"),
    (["train2014/1.png", "train2017/2.png", "val2017/3.png"], {"train2014": 1, "train2017": 1, "val": 1}, "1.png"),
    (["train/1.png", "val/2.png", "extra/3.png"], {"train": 1, "val": 1}, "1.png"),
])
def test_what_is_a_split(names, counts, inner):
    found = find_splits(sorted(names))
    assert found.counts == counts
    assert found.inner[sorted(names).index(names[0])] == inner


@pytest.mark.parametrize("names", [
    [], ["1.png"], ["cat/1.png", "dog/2.png"],
    ["bus/1.png", "train/2.png", "tram/3.png"],                         # A class of PASCAL VOC.
    ["test_tube/1.png", "train_station/2.png"],                         # Other words differ.
    ["test1/1.png", "test2/2.png"], ["validity/1.png", "trained/2.png"],
    ["train.png", "val.png"],                                           # Files are no folders.
    ["cat/train/1.png", "cat/test/2.png", "dog/3.png"],
    ["00000/img00000000.png", "00001/img00001000.png"]])
def test_what_is_none(names):
    assert find_splits(sorted(names)) is None


def test_files_beside_splits_are_not_lost(tmp_path):
    path = write_folder(tmp_path / "s", {**both(), "extra/1.png": encoded(pixels(0)), "2.png": encoded(pixels(1))})
    with pytest.raises(UserError, match=r"val \(2 images\), and beside them 2.png, extra/1.png: choose one"):
        open_source(str(path))
    assert len(read(path, "train")[1]) == TRAIN
    with pytest.raises(UserError, match=r"--split=all: .* which belong to none of them: choose one split, or move"):
        open_source(str(path), SourceOptions(split="all"))


def test_a_single_split_needs_no_choice_and_is_no_class(tmp_path):
    source, _ = read(write_zip(tmp_path / "s.zip", {f"train/{i}.png": encoded(pixels(i)) for i in range(3)}))
    assert (source.labels, source.splits, source.chosen) == (None, {"train": 3}, ("train",))
    with pytest.raises(UserError, match="--split=val: .* has the splits train"):
        read(tmp_path / "s.zip", "val")


def test_a_source_without_splits(tmp_path):
    path = photos(tmp_path / "s", ["cat/1.png", "dog/1.png"])
    assert len(read(path, "all")[1]) == 2
    with pytest.raises(UserError, match="--split=train: .* has no splits: leave the option out"):
        read(path, "train")


def test_labels_of_a_dataset_json_over_splits(tmp_path):
    path = write_folder(tmp_path / "s", both(), {"labels": [[name, i % 2] for i, name in enumerate(sorted(both()))]})
    check_splits(path, TRAIN, VAL)
    assert read(path, "val")[0].labels == [0, 1]


def test_classes_are_numbered_over_all_splits(tmp_path):
    """A class that one split lacks does not move the others."""
    names = ["train/cat/1.png", "train/dog/1.png", "train/owl/1.png", "val/cat/1.png", "val/owl/1.png"]
    path = photos(tmp_path / "s", names)
    for split, labels in (("train", [0, 1, 2]), ("val", [0, 2]), ("all", [0, 1, 2, 0, 2])):
        source, _ = read(path, split)
        assert (source.labels, source.classes) == (labels, ["cat", "dog", "owl"])
    photos(path, ["test/5.png"])
    assert read(path, "train")[0].labels == [0, 1, 2]
    assert read(path, "test")[0].labels is None
    with pytest.raises(UserError, match="1 of 6 images are in none"):
        read(path, "all")


def test_what_was_understood_is_said(tmp_path, dest):
    path = write_folder(tmp_path / "s", both())
    (path / "old.zip").write_bytes(write_zip(tmp_path / "old.zip", files(1)).read_bytes())
    output = made(source=path, dest=dest, split="train")
    assert output.startswith(f"{path}: folder, one sub-folder per class: 4 images split train of train (4 images), "
                             "val (2 images) 2 classes: 0 = cat (2), 1 = dog (2) not read: old.zip")
    refused(source=path, dest=dest.with_name("b.zip"), match=["has the splits train (4 images), val (2 images)"])
    assert not dest.with_name("b.zip").exists()


def test_training_does_not_mix_splits_either(tmp_path):
    path = write_folder(tmp_path / "s", both())
    with pytest.raises(UserError, match=r"has the splits train \(4 images\), val \(2 images\): name the folder of one, "
                                        "or make a data set with dataset_tool.py --split=train"):
        ImageDataset(path)
    assert len(ImageDataset(path / "train")) == TRAIN
    listed = write_folder(tmp_path / "l", both(), {"labels": [[name, 0] for name in both()]})
    assert len(ImageDataset(listed)) == TRAIN + VAL             # Its maker has listed all of them.

#----------------------------------------------------------------------------
# Files that hold images.

def test_parquet(tmp_path):
    folder = tmp_path / "p"
    for place, split, count, start in ((folder, "train-00000-of-00002", 3, 0), (folder, "train-00001-of-00002", 1, 3),
                                       (folder, "validation-00000-of-00001", 2, 100)):
        place.mkdir(exist_ok=True)
        parquet_file(place / f"{split}.parquet", count, start)
    check_splits(folder, TRAIN, VAL)
    check_splits(folder / "*.parquet", TRAIN, VAL)
    assert read(folder, "val")[0].classes == ["cat", "dog"]
    with pytest.raises(UserError, match=r"train \(4 images\), val \(2 images\)"):
        open_source(str(folder))
    nested = tmp_path / "n" / "data"
    for split, count in (("train", 4), ("test", 2)):
        (nested / split).mkdir(parents=True)
        shutil.copy(parquet_file(tmp_path / f"{split}.parquet", count), nested / split / "0000.parquet")
    check_splits(tmp_path / "n", 4, 2, second="test")
    assert len(set(read(tmp_path / "n", "all")[0].store.names)) == 6


@pytest.mark.parametrize("how", ["folder", "stars"])
def test_shards(tmp_path, how):
    for split, number in (("train", 2), ("test", 1)):
        web_shards(tmp_path / split, shards=number, each=2)
        for tar in (tmp_path / split).iterdir():
            (tmp_path / "s").mkdir(exist_ok=True)
            tar.rename(tmp_path / "s" / f"set-{split}-{tar.name}")
    path = tmp_path / "s" / ("*.tar" if how == "stars" else "")
    check_splits(path, TRAIN, VAL, second="test")
    (tmp_path / "s" / "more.tar").write_bytes(tar_bytes({"a.png": encoded(pixels(0))}))
    with pytest.raises(UserError, match=r"train \(2 files\), test \(1 file\), and beside them more.tar"):
        open_source(str(path))


def test_shards_in_folders_of_splits(tmp_path):
    web_shards(tmp_path / "train", shards=2, each=2)
    web_shards(tmp_path / "val", shards=1, each=2)
    check_splits(tmp_path, TRAIN, VAL)


def test_many_shards_are_all_read(tmp_path):
    """More than files without a telling name are looked at."""
    data = tar_bytes({"a.png": encoded(pixels(0))})
    for i in range(250):
        (tmp_path / f"{i:03d}.tar").write_bytes(data)
        (tmp_path / f"{i:03d}.txt").write_bytes(b"")
    assert len(read(tmp_path)[1]) == 250


def test_labels_from_a_file_of_one_split(tmp_path, dest):
    path = write_folder(tmp_path / "s", {**images("train", 4), "test/1.png": encoded(pixels(0))})
    (tmp_path / "l.csv").write_text("file,label\ntest/1.png,owl\n")
    assert "1 classes: 0 = owl (1)" in made(source=path, dest=dest, split="test", labels=tmp_path / "l.csv")


def test_archives_in_a_folder(tmp_path):
    (tmp_path / "s").mkdir()
    write_zip(tmp_path / "s" / "train.zip", {f"{c}/{i}.png": encoded(pixels(i)) for c in "ab" for i in range(2)})
    write_zip(tmp_path / "s" / "val.zip", {f"{c}/1.png": encoded(pixels(1)) for c in "ab"})
    check_splits(tmp_path / "s", TRAIN, VAL)
    assert read(tmp_path / "s", "all")[0].classes == ["a", "b"]
    write_zip(tmp_path / "s" / "val2.zip", files(1))
    with pytest.raises(UserError, match=r"holds 2 zip archives \(val.zip, val2.zip\): name one of them"):
        read(tmp_path / "s", "val")


def test_cifar(tmp_path):
    """Also renamed: what it is, stands in it."""
    check_splits(cifar_archive(tmp_path / "images.bin", 100), 2, 2, second="test")
    check_splits(write_folder(tmp_path / "anything", cifar_files(10)), 10, 2, second="test")
    check_splits(write_folder(tmp_path / "a" / "b" / "c", cifar_files(10)).parents[1], 10, 2, second="test")


def test_a_file_called_meta_makes_no_cifar(tmp_path):
    path = tmp_path / "cifar.tar"
    path.write_bytes(tar_bytes({"a/1.png": encoded(pixels(0)), "meta": b"hello"}))
    assert read(path)[0].kind == "tar archive"


def test_idx_files(tmp_path):
    check_splits(mnist_folder(tmp_path / "m"), 6, 6, second="test")
    folder = tmp_path / "renamed"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}_x").write_bytes(idx(np.zeros((3, 8, 8), np.uint8)))
        (folder / f"{split}_y.bin").write_bytes(gzip.compress(idx(np.arange(3).astype(np.uint8))))
    check_splits(folder, 3, 3, second="test")
    assert read(folder, "test")[0].labels == [0, 1, 2]
    assert read(folder / "train_x")[0].labels == [0, 1, 2]
    (folder / "train_z").write_bytes(idx(np.zeros((3, 8, 8), np.uint8)))
    with pytest.raises(UserError, match="train_x, train_z are several sets of images: name one"):
        read(folder, "test")


def test_numpy_files(tmp_path):
    data = np.random.RandomState(0).randint(0, 256, (6, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", x_train=data[:4], y_train=np.arange(4), x_test=data[4:], y_test=np.arange(2))
    np.savez(tmp_path / "medmnist.npz", train_images=data[:4], train_labels=np.arange(4)[:, None],
             test_images=data[4:], test_labels=np.arange(2)[:, None])
    for name in ("mnist", "medmnist"):
        check_splits(tmp_path / f"{name}.npz", TRAIN, VAL, second="test")
        assert read(tmp_path / f"{name}.npz", "all")[0].labels == [0, 1, 2, 3, 0, 1]
    folder = tmp_path / "s"
    folder.mkdir()
    np.save(folder / "train.npy", data[:4])
    np.save(folder / "val.npy", data[4:])
    check_splits(folder, TRAIN, VAL)


def test_lmdb(tmp_path):
    (tmp_path / "s").mkdir()
    for split in ("train", "val"):
        lmdb_folder(tmp_path / "s" / f"church_{split}_lmdb", 3 if split == "train" else 1)     # And one that is none.
    check_splits(tmp_path / "s", TRAIN, VAL)

#----------------------------------------------------------------------------
# Other layouts.

@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
@pytest.mark.parametrize("wrap", ["set/", "a/b/"])
def test_labels_survive_a_folder_around_everything(tmp_path, dest, kind, wrap):
    content = {wrap + name: data for name, data in files().items()}
    content[wrap + "dataset.json"] = json.dumps(metadata(classes=["a", "b", "c"])).encode()
    content["__MACOSX/x/._dataset.json"] = b"junk"
    path = tmp_path / f"s.{kind}"
    if kind == "zip":
        write_zip(path, content)
    elif kind == "tar":
        path.write_bytes(tar_bytes(content))
    else:
        write_folder(path, content)
    source, _ = read(path)
    assert (source.labels, source.classes, source.layout) == ([0, 1, 2] * 2, ["a", "b", "c"], "dataset.json")
    if kind != "tar":
        dataset = ImageDataset(path, use_labels=True)
        assert dataset.labels.tolist() == [0, 1, 2] * 2
        dataset.close()


@pytest.mark.parametrize("kind", ["zip", "tar", "folder"])
def test_data_sets_inside_of_a_source_are_no_classes(tmp_path, kind):
    inner = {f"out/{name}": data for name, data in files(2).items()}
    content = {"cat/1.png": encoded(pixels(0)), **inner, "out/dataset.json": json.dumps(metadata(2)).encode()}
    path = tmp_path / f"s.{kind}"
    if kind == "folder":
        write_folder(path, content)
    elif kind == "zip":
        write_zip(path, content)
    else:
        path.write_bytes(tar_bytes(content))
    with pytest.raises(UserError, match="parts of it are data sets of their own: out/dataset.json: name one"):
        open_source(str(path))


@pytest.mark.parametrize("name", ["out", "out.zip", "cat/out.zip"])
def test_a_destination_inside_of_the_source(tmp_path, name):
    path = photos(tmp_path / "s", ["cat/1.png", "dog/1.png"])
    refused(source=path, dest=path / name, match=["lies inside of --source", "choose a place outside"])
    assert sorted(p.name for p in path.rglob("*")) == ["1.png", "1.png", "cat", "dog"]


def test_links_to_one_folder_are_classes_each(tmp_path):
    path = photos(tmp_path / "s", ["cat/1.png"])
    (path / "dog").symlink_to("cat")
    (path / "owl").symlink_to(path / "cat")
    source, _ = read(path)
    assert (source.classes, source.labels) == (["cat", "dog", "owl"], [0, 1, 2])


def test_links_in_circles(tmp_path):
    path = photos(tmp_path / "s", ["cat/1.png", "dog/2.png"])
    (path / "cat" / "up").symlink_to(path)
    (path / "dog" / "self").symlink_to(".")
    (path / "dog" / "loop.png").symlink_to("loop.png")
    (path / "dog" / "loop").symlink_to("loop")
    source = open_source(str(path))
    assert list(source.store.names) == ["cat/1.png", "dog/2.png", "dog/loop.png"]
    assert os.path.lexists(path / "dog" / "loop")


def test_links_that_multiply(tmp_path):
    """Twenty folders with two links each to the next are a million paths."""
    for i in range(20):
        (tmp_path / f"{i}").mkdir()
        for name in "ab":
            (tmp_path / f"{i}" / name).symlink_to(tmp_path / f"{i + 1}")
    photos(tmp_path / "20", ["1.png"])
    with pytest.raises(UserError, match="links lead to this folder more than 100 times"):
        open_source(str(tmp_path / "0"))


def test_hidden_files_and_suffixes(tmp_path):
    path = photos(tmp_path / "s", ["cat/1.PNG", "dog/2.Png"])
    write_folder(path, {"cat/.DS_Store": b"x", ".git/a.png": b"x", "__MACOSX/cat/._1.png": b"x", "cat/Thumbs.db": b"x",
                        "dog/._2.png": b"x"})
    source, _ = read(path)
    assert (list(source.store.names), source.classes) == (["cat/1.PNG", "dog/2.Png"], ["cat", "dog"])


def test_names_that_lie(tmp_path):
    """Kinds are told from the content."""
    content = {f"{c}/1.png": encoded(pixels(0), kind) for c, kind in (("a", "JPEG"), ("b", "BMP"))}
    write_zip(tmp_path / "z.tar", content)
    (tmp_path / "t.zip").write_bytes(tar_bytes(content))
    (tmp_path / "g.png").write_bytes(gzip.compress(tar_bytes(content)))
    np.save(tmp_path / "n.npy", np.zeros((2, 8, 8), np.uint8))
    (tmp_path / "n.npy").rename(tmp_path / "n.parquet")
    shutil.copy(parquet_file(tmp_path / "p.parquet", 2, labels=""), tmp_path / "p")
    kinds = {"z.tar": "zip archive", "t.zip": "tar archive", "g.png": "tar archive", "n.parquet": "npy array",
             "p": "Parquet"}
    for name, kind in kinds.items():
        source, contents = read(tmp_path / name)
        assert (source.kind, len(contents)) == (kind, 2)


@pytest.mark.parametrize("packed", [False, True])
def test_images_that_are_not_read_are_named(tmp_path, dest, packed):
    content = {"a.png": encoded(pixels(0)), "b.heic": b"x", "c.txt": b"x", "d.jfif": encoded(pixels(0), "JPEG")}
    path = write_zip(tmp_path / "s.zip", content) if packed else write_folder(tmp_path / "s", content)
    output = made(source=path, dest=dest)
    assert "2 images no labels not read: b.heic" in output


def test_mixed_kinds_are_not_guessed(tmp_path):
    path = photos(tmp_path / "s", ["preview.png"])
    parquet_file(path / "a.parquet")
    with pytest.raises(UserError, match=r"holds 1 images \(preview.png, ...\) and a.parquet: name what is to be read"):
        open_source(str(path))
    (path / "preview.png").unlink()
    np.save(path / "b.npy", np.zeros((2, 8, 8), np.uint8))
    with pytest.raises(UserError, match=r"holds 1 Parquet files \(a.parquet, ...\) and 1 .npy arrays \(b.npy, ...\)"):
        open_source(str(path))


@pytest.mark.parametrize(("name", "data", "match"), [
    ("a.7z", b"7z\xbc\xaf\x27\x1c" + bytes(600), "unpack it with 7z"), ("a.rar", b"Rar!" + bytes(600), "unrar"),
    ("a.tar.zst", b"\x28\xb5\x2f\xfd" + bytes(600), "unzstd"), ("a.h5", b"\x89HDF\r\n\x1a\n" + bytes(600), "as .npy"),
    ("a.png", encoded(pixels(0)), "is one image: name a folder"), ("a.txt", b"hello", "nothing that holds images"),
    ("labels", idx(np.zeros(3, np.uint8)), "is a file of labels")])
def test_files_that_are_no_sources(tmp_path, name, data, match):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=match):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize(("split", "found"), [("train", [0, 1, 2, 0]), ("all", [0, 1, 2, 0, 1, 0]), ("test", [1, 0])])
def test_a_column_of_parquet_says_the_split(tmp_path, split, found):
    """Classes are those of all rows, as for folders."""
    path = parquet_with_splits(tmp_path / "a.parquet", [0, 1, 2, 0, 1, 0])
    with pytest.raises(UserError, match=r"has the splits train \(4 images\), test \(2 images\): choose one"):
        open_source(str(path))
    source = open_source(str(path), SourceOptions(split=split))
    assert source.labels == found
    assert source.classes == (None if split == "all" else ["0", "1", "2"])


def test_a_split_without_labels_leaves_the_others_theirs(tmp_path):
    path = parquet_with_splits(tmp_path / "a.parquet", [0, 1, 2, 0, -1, -1])
    assert open_source(str(path), SourceOptions(split="train")).labels == [0, 1, 2, 0]
    with pytest.raises(UserError, match="2 labels are wrong: .*correct them, or add --no-labels"):
        open_source(str(path), SourceOptions(split="test"))
    assert len(open_source(str(path), SourceOptions(False, split="test")).indices) == 2


def test_names_of_parquet_files_and_their_columns_must_both_say_it(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        parquet_with_splits(tmp_path / f"{name}.parquet", [0, 1, 2, 0, 1, 0])
    assert len(open_source(str(tmp_path), SourceOptions(split="train")).indices) == 8
    assert len(open_source(str(tmp_path), SourceOptions(split="all")).indices) == 18


@pytest.mark.parametrize(("splits", "word"), [
    ([0, 0, 0, 0, 1, 1], "0"), ([False] * 4 + [True] * 2, "false"), ([b"train"] * 4 + [b"test"] * 2, "train")])
def test_a_column_of_numbers_or_bytes_says_the_split_too(tmp_path, splits, word):
    path = parquet_with_splits(tmp_path / "a.parquet", [0, 1, 2, 0, 1, 0], splits)
    with pytest.raises(UserError, match=rf"{word} \(4 images\).*choose one"):
        open_source(str(path))
    assert open_source(str(path), SourceOptions(split=word)).labels == [0, 1, 2, 0]


def test_a_column_of_splits_that_holds_lists_is_refused(tmp_path):
    path = parquet_with_splits(tmp_path / "a.parquet", [0, 1, 2, 0, 1, 0], [["train"]] * 6)
    with pytest.raises(UserError, match="the column 'split' holds list<.*: give it a word or number per row"):
        open_source(str(path))


def parquet_with_splits(path, labels, splits=("train",) * 4 + ("test",) * 2):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": encoded(pixels(i)), "path": None} for i in range(6)]
    columns = {"image": images, "label": labels, "split": list(splits)}
    parquet.write_table(pyarrow.table(columns), path)
    return path
