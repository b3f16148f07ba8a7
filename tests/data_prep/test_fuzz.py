"""Damaged and hostile files: 10,000 of them, made from good ones, must end in a message or be skipped, never crash.

The databases, lmdb and Parquet, are left out: other people's C++ parses them (see data_prep/sources/tables.py).
"""
import gzip
import json
import zipfile

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from data_prep.images import Plan, convert
from data_prep.labels import from_file
from data_prep.sources import SourceOptions, open_source
from data_prep.sources.base import read_image
from data_prep.transforms import Size
from dnnlib import UserError
from tests.data_prep.archives import WNIDS, cifar_files, mnist_folder, plain_pickle, tar_bytes, web_shards
from tests.data_prep.samples import encoded, metadata, pixels, write_folder, write_zip

CASES = 10_000
PLAN = Plan((Size(4, 4),), "center-crop")
PNG = encoded(pixels(0, 4))

pytestmark = pytest.mark.slow


def png_files():
    return {f"00000/img{i:08d}.png": encoded(pixels(i, 4)) for i in range(3)}


def seeds(folder):
    """Kind -> (content of a good file, where it lies, what is opened)."""
    meta = metadata(3)
    inner = tar_bytes({f"{WNIDS[0]}_1.JPEG": encoded(pixels(0), "JPEG")})
    tar = tar_bytes({**png_files(), "dataset.json": json.dumps(meta).encode()})
    write_folder(folder / "cifar", cifar_files(100, 1))
    mnist_folder(folder / "mnist", packed=False, count=2)
    shards = web_shards(folder / "web", "json", 1, 2)
    shard = shards / "shard-000000.tar"
    npz, npy, array = folder / "a.npz", folder / "a.npy", np.zeros((3, 8, 8, 3), np.uint8)
    np.savez_compressed(npz, array, np.arange(3))
    np.save(npy, array)
    images = (folder / "mnist" / "train-images-idx3-ubyte")
    labels = (folder / "mnist" / "train-labels-idx1-ubyte")
    return {
        "zip": (write_zip(folder / "a.zip", png_files(), meta).read_bytes(), "a.zip", "a.zip"),
        "deflated": (write_zip(folder / "d.zip", png_files(), meta, zipfile.ZIP_DEFLATED).read_bytes(), "d.zip",
                     "d.zip"),
        "tar": (tar, "a.tar", "a.tar"),
        "pax": (tar_bytes({"\u732b/" + "n" * 120 + ".png": PNG, "b/1.png": PNG}), "p.tar", "p.tar"),
        "tar in tar": (tar_bytes({f"{wnid}.tar": inner for wnid in WNIDS[:2]}), "t.tar", "t.tar"),
        "packed tar": (gzip.compress(tar), "a.tgz", "a.tgz"),
        "webdataset": (shard.read_bytes(), "web/shard-000000.tar", "web"),
        "cifar": ((folder / "cifar" / "train").read_bytes(), "cifar/train", "cifar"),
        "cifar names": ((folder / "cifar" / "meta").read_bytes(), "cifar/meta", "cifar"),
        "pickle": (plain_pickle({"data": np.zeros((1, 3072), np.uint8), "fine_labels": [3]}), "cifar/train", "cifar"),
        "npz": (npz.read_bytes(), "a.npz", "a.npz"),
        "npy": (npy.read_bytes(), "a.npy", "a.npy"),
        "idx": (images.read_bytes(), "mnist/train-images-idx3-ubyte", "mnist"),
        "idx labels": (labels.read_bytes(), "mnist/train-labels-idx1-ubyte", "mnist"),
    }


KINDS = ("zip", "deflated", "tar", "pax", "tar in tar", "packed tar", "webdataset", "cifar", "cifar names", "pickle",
         "npz", "npy", "idx", "idx labels")
IMAGE_KINDS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000")
SHARE = CASES // (len(KINDS) + len(IMAGE_KINDS) + 1)
SETTINGS = hypothesis.settings(max_examples=SHARE, deadline=None, database=None, derandomize=True,
                               suppress_health_check=list(hypothesis.HealthCheck))

# Where (as a share of the length, weighted to the ends), what is done there, with which bytes.
CHANGES = st.lists(st.tuples(st.floats(0, 1), st.sampled_from(["set", "insert", "cut", "end", "number"]),
                             st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)


def damaged(data, changes):
    """A good file after some changes."""
    for place, how, new in changes:
        at = min(int(place * len(data)), len(data))
        if how == "set":
            data = data[:at] + new + data[at + len(new):]
        elif how == "insert":
            data = data[:at] + new + data[at:]
        elif how == "cut":
            data = data[:at] + data[at + 50 * len(new):]
        elif how == "end":
            data = data[:at]
        else:
            data = data[:at] + (b"\xff" * 4 if new[0] & 1 else b"\0" * 4) + data[at + 4:]
    return data


def use(path, options):
    """Open a source and convert what is in it, as dataset_tool.py does. UserError is the only exception allowed."""
    try:
        source = open_source(str(path), options)
    except UserError:
        return
    try:
        for i in list(source.indices)[:4]:
            outcome = convert(PLAN, source.store.where(i), read_image(source.store, i))
            assert outcome.reason or outcome.pngs or outcome.dropped
    finally:
        source.store.close()


@pytest.mark.parametrize("kind", KINDS)
def test_archives(tmp_path, kind):
    good, place, opened = seeds(tmp_path)[kind]
    use(tmp_path / opened, SourceOptions(split="all"))

    @SETTINGS
    @hypothesis.given(CHANGES, st.booleans())
    def check(changes, use_labels):
        (tmp_path / place).write_bytes(damaged(good, changes))
        use(tmp_path / opened, SourceOptions(use_labels=use_labels, split="all"))

    check()


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_images(kind):
    good = encoded(pixels(0, 8), kind)
    assert convert(PLAN, "x", good).pngs

    @SETTINGS
    @hypothesis.given(CHANGES)
    def check(changes):
        outcome = convert(PLAN, "x", damaged(good, changes))
        assert outcome.reason or outcome.pngs or outcome.dropped

    check()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
                    max_leaves=12)


def test_label_files(tmp_path):
    names = ["a/1.png", "b/2.png"]
    label = st.one_of(st.integers(-2, 9), st.text(max_size=4), st.floats(), st.none(), st.booleans())
    near = st.fixed_dictionaries({"labels": st.lists(st.lists(st.sampled_from(names) | label, max_size=3), max_size=4)},
                                 optional={"classes": st.lists(st.text(max_size=3), max_size=3) | JSON})
    lines = st.lists(st.tuples(st.sampled_from([*names, "1", "file", "..\\x"]), st.text(max_size=5)), max_size=5)

    @SETTINGS
    @hypothesis.given(st.one_of(JSON.map(json.dumps), near.map(json.dumps), st.text(),
                                lines.map(lambda rows: "\n".join(",".join(row) for row in rows))),
                      st.sampled_from(["l.json", "l.csv"]), st.booleans())
    def check(text, name, allow_gaps):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            labels, classes = from_file(str(tmp_path / name), names, allow_gaps)
        except UserError:
            return
        assert len(labels) == 2
        assert all(0 <= v < len(classes) if classes is not None else v >= 0 for v in labels)

    check()
