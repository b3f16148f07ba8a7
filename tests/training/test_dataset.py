# SPDX-License-Identifier: Apache-2.0
"""ImageDataset: what it serves and what it refuses."""
import json
import pickle
import zipfile

import numpy as np
import PIL.Image
import pytest

from dnnlib import UserError
from dnnlib.classes import Classes
from tests.data_prep.samples import encoded, files, metadata, pixels, write_folder, write_zip
from training.dataset import ImageDataset, follow_classes


@pytest.fixture(params=["stored", "deflated", "folder"])
def write(request, tmp_path):
    """A function (content, dataset.json) -> path, for each kind of data set."""
    def make(content, meta=None):
        if request.param == "folder":
            return write_folder(tmp_path / "set", content, meta)
        method = zipfile.ZIP_STORED if request.param == "stored" else zipfile.ZIP_DEFLATED
        return write_zip(tmp_path / "set.zip", content, meta, method)
    return make

#----------------------------------------------------------------------------
# Served.

def test_items_and_properties(write):
    path = write(files(), metadata())
    dataset = ImageDataset(path, use_labels=True)
    assert (dataset.name, dataset.path) == ("set", str(path))
    assert (len(dataset), dataset.resolution, dataset.c_dim) == (6, 8, 3)
    assert dataset.class_names == ["0", "1", "2"]
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert dataset.label_counts.tolist() == [2, 2, 2]
    for i, (image, label) in enumerate(dataset):
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous
        assert np.array_equal(image, pixels(i).transpose(2, 0, 1))
        assert label == i % 3
        assert type(label) is int
    assert dataset.file_name(4) == "00000/img00000004.png"
    dataset.close()


def test_without_labels(write):
    dataset = ImageDataset(write(files(), metadata()))
    assert dataset.has_labels
    assert (dataset.c_dim, dataset.class_names, dataset[4][1]) == (0, [], 0)
    assert dataset.labels.tolist() == [0] * 6
    assert dataset.label_counts.shape == dataset.label_distribution().shape == (0,)
    dataset.close()


def test_xflip_appends_mirrored_items(write):
    dataset = ImageDataset(write(files(), metadata()), use_labels=True, xflip=True)
    assert len(dataset) == 12
    for i in range(6):
        assert np.array_equal(dataset[i + 6][0], dataset[i][0][:, :, ::-1])
        assert dataset[i + 6][1] == dataset[i][1] == dataset.labels[i + 6]
    assert dataset.file_name(7) == dataset.file_name(1)
    assert dataset.label_counts.tolist() == [4, 4, 4]
    with pytest.raises(IndexError):
        dataset[12]
    dataset.close()


def test_names_are_sorted_and_foreign_files_left_out(write):
    content = {"b/2.png": encoded(pixels(2)), "a/10.png": encoded(pixels(10)), "a/9.PNG": encoded(pixels(9)),
               "readme.txt": b"hello", "__MACOSX/a/._9.png": b"junk", ".hidden.png": b"junk"}
    dataset = ImageDataset(write(content))
    assert [dataset.file_name(i) for i in range(len(dataset))] == ["a/10.png", "a/9.PNG", "b/2.png"]
    assert np.array_equal(dataset[1][0], pixels(9).transpose(2, 0, 1))
    dataset.close()


def test_grayscale_has_three_equal_channels(write):
    gray = pixels(0)[:, :, 0]
    dataset = ImageDataset(write({"0.png": encoded(gray), "1.png": encoded(pixels(1))}))
    assert np.array_equal(dataset[0][0], np.stack([gray] * 3))
    assert np.array_equal(dataset[1][0], pixels(1).transpose(2, 0, 1))
    dataset.close()


def test_class_names_and_empty_classes(tmp_path):
    names = ["cat", "dog", "owl", "yak"]
    dataset = ImageDataset(write_zip(tmp_path / "a.zip", files(), metadata(classes=names)), use_labels=True)
    assert dataset.class_names == names
    assert dataset.c_dim == 4
    assert dataset.label_counts.tolist() == [2, 2, 2, 0]
    assert dataset.label_distribution()[3] == 0
    dataset.close()


@pytest.mark.parametrize("mirror", [False, True])
def test_classes_as_somebody_else_numbers_them(tmp_path, mirror):
    path = write_zip(tmp_path / "a.zip", files(), metadata(classes=["cat", "dog", "owl", "yak"]))
    dataset = ImageDataset(path, use_labels=True, xflip=mirror)
    fingerprint = dataset.fingerprint
    follow_classes(dataset, "the stem", Classes(["owl", "cat", "cow", "dog"]))
    assert dataset.labels.tolist() == [1, 3, 0] * (4 if mirror else 2)
    assert dataset[2][1] == 0
    assert (dataset.class_names, dataset.c_dim) == (["owl", "cat", "cow", "dog"], 4)
    assert pickle.loads(pickle.dumps(dataset)).labels.tolist() == dataset.labels.tolist()
    assert dataset.fingerprint == fingerprint
    with pytest.raises(UserError, match=r"a\.zip: has the classes cat, dog, owl, but the stem has ant, bee, and"):
        follow_classes(ImageDataset(path, use_labels=True), "the stem", Classes(["ant", "bee"]))


@pytest.mark.parametrize("classes", [1, 3, 1001])
def test_number_of_classes(tmp_path, classes):
    labels = [[name, classes - 1] for name in files()]
    meta = {"labels": labels, "classes": [f"c{i}" for i in range(classes)]}
    dataset = ImageDataset(write_zip(tmp_path / "a.zip", files(), meta), use_labels=True)
    assert dataset.c_dim == classes
    assert dataset.label_distribution().dtype == np.float64
    assert dataset.label_distribution()[-1] == 1
    assert dataset.label_distribution().sum() == 1
    dataset.close()


def test_windows_label_names(tmp_path):
    meta = {"labels": [[name.replace("/", "\\"), i] for i, name in enumerate(files())]}
    dataset = ImageDataset(write_zip(tmp_path / "a.zip", files(), meta), use_labels=True)
    assert dataset.labels.tolist() == list(range(6))
    dataset.close()


def test_max_size_takes_a_seeded_choice(tmp_path):
    path = write_zip(tmp_path / "a.zip", files(), metadata())
    want = np.arange(6)
    np.random.RandomState(1).shuffle(want)
    dataset = ImageDataset(path, use_labels=True, xflip=True, max_size=3, seed=1)
    assert len(dataset) == 6
    assert [dataset.file_name(i) for i in range(3)] == [f"00000/img{k:08d}.png" for k in sorted(want[:3])]
    assert dataset.labels.tolist() == [k % 3 for k in sorted(want[:3])] * 2
    assert len(ImageDataset(path, max_size=100)) == 6
    dataset.close()


def test_pickled_with_an_open_archive(write):
    dataset = ImageDataset(write(files(), metadata()), use_labels=True)
    first = dataset[1]
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy[1][0], first[0])
    assert copy.labels.tolist() == dataset.labels.tolist()
    assert copy.fingerprint == dataset.fingerprint
    copy.close()
    dataset.close()
    assert np.array_equal(dataset[1][0], first[0])      # Opens again.
    dataset.close()


def test_fingerprint(tmp_path):
    a = ImageDataset(write_zip(tmp_path / "a.zip", files(), metadata()))
    b = ImageDataset(write_zip(tmp_path / "b.zip", files(), metadata(), zipfile.ZIP_DEFLATED), use_labels=True)
    c = ImageDataset(write_folder(tmp_path / "c", files(), metadata()))
    assert len(a.fingerprint) == 64
    assert a.fingerprint == b.fingerprint == c.fingerprint
    changed = {**files(), "00000/img00000003.png": encoded(pixels(99))}
    moved = {name.replace("3", "7"): data for name, data in files().items()}
    others = [
        ImageDataset(write_zip(tmp_path / "d.zip", changed, metadata())),
        ImageDataset(write_zip(tmp_path / "e.zip", moved, metadata())),
        ImageDataset(write_zip(tmp_path / "f.zip", files(), metadata(num_classes=2))),
        ImageDataset(write_zip(tmp_path / "g.zip", files())),
        ImageDataset(tmp_path / "a.zip", max_size=5),
        ImageDataset(tmp_path / "a.zip", xflip=True),
    ]
    assert len({a.fingerprint, *(other.fingerprint for other in others)}) == 7

#----------------------------------------------------------------------------
# Refused.

def refused(path, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        ImageDataset(path, **options)
    assert "\n" not in str(caught.value)


def test_missing_path(tmp_path):
    refused(tmp_path / "none.zip", r"none\.zip: no such folder or zip archive")


def test_no_images(write):
    refused(write({"readme.txt": b"hello"}), "no images in it")


def test_not_an_archive(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"junk" * 100)
    refused(tmp_path / "a.zip", r"a\.zip: not a whole zip archive")


def test_truncated_archive(tmp_path):
    whole = write_zip(tmp_path / "a.zip", files()).read_bytes()
    (tmp_path / "b.zip").write_bytes(whole[:len(whole) // 2])
    refused(tmp_path / "b.zip", r"b\.zip: not a whole zip archive")


@pytest.mark.parametrize("shape", [(8, 16), (16, 8)])
def test_non_square(write, shape):
    refused(write({"x.png": encoded(np.zeros((*shape, 3), np.uint8))}), r"x\.png: \d+x\d+ pixels.*center-crop")


@pytest.mark.parametrize(("size", "remedy"), [(12, 8), (2, 8), (3, 8)])
def test_not_a_power_of_two(write, size, remedy):
    refused(write({"x.png": encoded(pixels(0, size))}), rf"x\.png: .*power of two.*--resolution={remedy}")


def test_mixed_sizes(write):
    path = write({**files(), "00000/odd.png": encoded(pixels(0, 16))})
    refused(path, r"odd\.png: 16x16 pixels, but 00000/img00000000\.png has 8x8")


def test_other_kinds_are_converted_by_the_rule_of_dataset_tool(write):
    """Upright, transparency over white, and it is said."""
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    clear = PIL.Image.new("RGBA", (8, 8), (10, 20, 30, 0))
    dataset = ImageDataset(write({"a.png": encoded(pixels(0), exif=exif), "b.png": encoded(clear)}))
    assert np.array_equal(dataset[0][0], np.rot90(pixels(0), -1).transpose(2, 0, 1))
    assert (dataset[1][0] == 255).all()
    assert dataset.changes == ("of 2 files looked at 1: turned upright by its EXIF orientation, "
                               "1: transparency laid over white")
    dataset.close()


@pytest.mark.parametrize("data", [b"", b"junk" * 9, encoded(pixels(0))[:60]])
def test_undecodable(write, data):
    refused(write({**files(), "00000/bad.png": data}), r"bad\.png: cannot be decoded")


def test_damage_is_found_by_the_checksum(tmp_path):
    path = write_zip(tmp_path / "a.zip", files())
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 8] ^= 255
    path.write_bytes(data)
    refused(path, r"a\.zip: 00000/img00000000\.png: cannot be decoded .*checksum")


def test_late_damage_names_the_file(tmp_path):
    path = write_folder(tmp_path / "set", files())
    dataset = ImageDataset(path)
    (path / "00000/img00000004.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"img00000004\.png: cannot be decoded"):
        dataset[4]


def test_labels_asked_for_but_not_there(write):
    refused(write(files()), "has no labels .*--cond=0", use_labels=True)


def test_null_labels(tmp_path):
    path = write_zip(tmp_path / "a.zip", files(), {"labels": None})
    assert not ImageDataset(path).has_labels
    refused(path, "has no labels .*--cond=0", use_labels=True)


def test_partly_missing_labels(write):
    names = list(files(9))
    path = write(files(9), {"labels": [[names[0], 0], [names[1], 1]]})
    refused(path, r"no label for 7 of 9 images: 00000/img00000002\.png, .*06\.png and 2 more", use_labels=True)
    assert ImageDataset(path).c_dim == 0


@pytest.mark.parametrize("label", [-1, 1.5, "cat", None, True, 10 ** 9])
def test_labels_that_are_no_class_index(tmp_path, label):
    meta = metadata()
    meta["labels"][2][1] = label
    path = write_zip(tmp_path / "a.zip", files(), meta)
    refused(path, r"label .* of 00000/img00000002\.png must be a whole number", use_labels=True)


def test_numbers_as_labels(tmp_path):
    """Written as text or as a float they are the same numbers; several are none."""
    meta = metadata()
    meta["labels"] = [[name, form(label)] for (name, label), form in zip(meta["labels"], 2 * [int, float, str],
                                                                         strict=True)]
    dataset = ImageDataset(write_zip(tmp_path / "a.zip", files(), meta), use_labels=True)
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2]
    meta["labels"][2][1] = [0, 1]
    refused(write_zip(tmp_path / "b.zip", files(), meta), r"label \[0, 1\] of .*02\.png holds more than one value: .* "
            "not supported", use_labels=True)


def test_the_first_five_wrong_labels_are_listed(write):
    meta = metadata(9)
    for k in range(1, 8):
        meta["labels"][k][1] = -k
    refused(write(files(9), meta), r"label -1 of 00000/img00000001\.png, .*-5 of 0.*05\.png and 2 more must be",
            use_labels=True)


def test_gaps_between_labels(write):
    meta = {"labels": [[name, 2 * i] for i, name in enumerate(files(9))]}
    refused(write(files(9), meta), r"go up to 16, but no image has the label 1, 3, 5, 7, 9 and 3 more: .*--allow-gaps",
            use_labels=True)


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "a/../../x.png", "..\\x.png", "C:\\x.png"])
def test_label_names_that_lead_out(tmp_path, name):
    path = write_zip(tmp_path / "a.zip", files(), {"labels": [*metadata()["labels"], [name, 0]]})
    refused(path, "leads out of the data set", use_labels=True)


def test_archive_names_that_lead_out(tmp_path):
    refused(write_zip(tmp_path / "a.zip", {"../x.png": b""}), "leads out of the data set")


@pytest.mark.parametrize(("meta", "match"), [
    ({"labels": {"a": 1}}, '"labels" must be a list'),
    ({"labels": ["a.png"]}, "must look like"),
    ({"labels": [["a.png", 1, 2]]}, "must look like"),
    ({"labels": [["a.png", 1], ["./a.png", 2]]}, "a.png has two labels, 1 and 2"),
    (metadata(classes=["a", "b"]), r"label 2 of 0.*02\.png, 2 of 0.*05\.png has no name \(2 images\)"),
    ({"labels": [["a.png", 1], ["../c.png", 0], ["/d.png", 0]]}, r"'\.\./c\.png' leads .*'/d\.png' leads"),
    (metadata(classes=["a", "b", "b"]), "lists a name twice"),
    (metadata(classes="abc"), '"classes" must be a list'),
])
def test_malformed_metadata(tmp_path, meta, match):
    refused(write_zip(tmp_path / "a.zip", files(), meta), match, use_labels=True)


@pytest.mark.parametrize(("text", "match"), [("{", "not valid JSON"), ("[]", "must be an object")])
def test_metadata_that_is_no_object(tmp_path, text, match):
    path = write_folder(tmp_path / "set", files())
    (path / "dataset.json").write_text(text)
    refused(path, match)
    refused(write_zip(tmp_path / "a.zip", {**files(), "dataset.json": text.encode()}), match)


def test_max_size_of_nothing(tmp_path):
    refused(write_zip(tmp_path / "a.zip", files()), "max_size is 0", max_size=0)


def test_json_survives_a_byte_order_mark(tmp_path):
    content = {**files(), "dataset.json": b"\xef\xbb\xbf" + json.dumps(metadata()).encode()}
    assert ImageDataset(write_zip(tmp_path / "a.zip", content), use_labels=True).c_dim == 3
