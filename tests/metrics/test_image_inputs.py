# SPDX-License-Identifier: Apache-2.0
"""Readers of images: every kind of input, its labels, and one clear line for every wrong one."""
import io
import json
import os
import subprocess
import time
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch

from dnnlib import UserError
from inference import image_inputs
from inference.image_inputs import kind_of, open_images
from tests.metrics.helpers import random_images, write_folder
from torch_utils.launch import children_of


def read(source, batch_size=3, indices=None):
    parts = list(source.batches(batch_size) if indices is None else source.batches_at(batch_size, indices))
    labels = [labels for _, labels in parts]
    return torch.cat([images for images, _ in parts]), None if labels[0] is None else torch.cat(labels).tolist()


def write_zip(path, images, labels=None):
    with zipfile.ZipFile(path, "w") as archive:
        names = [f"00000/img{i:08d}.png" for i in range(len(images))]
        for name, image in zip(names, images, strict=True):
            data = io.BytesIO()
            PIL.Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(data, format="PNG")
            archive.writestr(name, data.getvalue())
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": list(zip(names, labels, strict=True)),
                                                         "classes": ["cat", "dog", "owl"]}))
    return path


@pytest.fixture
def images():
    return random_images(10)


@pytest.fixture
def nhwc(images):
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))

#----------------------------------------------------------------------------

class TestDatasets:
    def test_flat_folder(self, tmp_path, images):
        source = open_images(write_folder(tmp_path / "flat", images), labels=True)
        got, labels = read(source)
        assert labels is None
        assert got.dtype == torch.uint8
        assert torch.equal(got, torch.from_numpy(images))
        assert source.description["resolution"] == 8

    def test_class_folders(self, tmp_path, images):
        classes = ["zebra", "ant", "moth", "ant", "zebra"] * 2
        path = write_folder(tmp_path / "classes", images, classes)
        source = open_images(path, labels=True)
        got, labels = read(source)
        order = sorted(range(10), key=lambda i: (classes[i], i))
        assert torch.equal(got, torch.from_numpy(images[order]))
        assert labels == [["ant", "moth", "zebra"].index(classes[i]) for i in order]
        assert source.description["class_names"] == ["ant", "moth", "zebra"]
        assert read(open_images(path))[1] is None

    def test_zip_with_labels(self, tmp_path, images):
        path = write_zip(tmp_path / "x.dat", images, [i % 3 for i in range(10)])    # The name says nothing.
        source = open_images(path, labels=True)
        got, labels = read(source)
        assert torch.equal(got, torch.from_numpy(images))
        assert labels == [i % 3 for i in range(10)]
        assert source.description["class_names"] == ["cat", "dog", "owl"]

    def test_official_folders_without_labels_are_not_classes(self, tmp_path, images):
        source = open_images(write_zip(tmp_path / "x.zip", images), labels=True)
        assert read(source)[1] is None

    @pytest.mark.parametrize("workers", [0, 2])
    def test_any_images_by_number(self, tmp_path, images, workers):
        state = torch.get_rng_state()
        source = open_images(write_zip(tmp_path / "x.zip", images, [0] * 10), True, workers)
        got, labels = read(source, 2, [1, 4, 9])
        assert torch.equal(got, torch.from_numpy(images[[1, 4, 9]]))
        assert labels == [0, 0, 0]
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("workers", [0, 1])
    def test_damaged_image_is_named(self, tmp_path, images, workers):
        path = write_folder(tmp_path / "flat", images)
        source = open_images(path, workers=workers)
        (path / "000004.png").write_bytes(b"not an image")
        with pytest.raises(UserError, match="000004.png"):
            read(source)

    def test_workers_outlive_a_signal_to_every_process_of_the_job(self, tmp_path, images):
        """Else the process that they work for, which may be about to save its state, ends with their error."""
        before = set(children_of(os.getpid()))
        batches = open_images(write_folder(tmp_path / "flat", images), workers=1).batches(1)
        first = next(batches)
        workers = set(children_of(os.getpid())) - before
        assert workers
        subprocess.run(["kill", "-TERM", *map(str, workers)], check=True)
        time.sleep(0.2)
        assert len([first, *batches]) == len(images)

    @pytest.mark.parametrize(("kind", "options", "lossy"), [
        ("JPEG", {}, "JPEG"), ("WEBP", {}, "lossy WebP"), ("WEBP", {"lossless": True}, ""), ("PNG", {}, ""),
        ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}, "lossy WebP"), ("AVIF", {}, "AVIF"),
        ("JPEG2000", {}, ""), ("JPEG2000", {"irreversible": True}, "lossy JPEG 2000"),
        ("TIFF", {"compression": "jpeg"}, "TIFF with lossy compression"), ("TIFF", {"compression": "tiff_lzw"}, "")])
    @pytest.mark.parametrize("suffix", ["png", "jpg"])
    def test_lossy_files_are_noted_by_their_content(self, tmp_path, images, kind, options, lossy, suffix):
        path = write_folder(tmp_path / "flat", images[:2])
        PIL.Image.fromarray(images[0].transpose(1, 2, 0).copy()).save(path / f"0.{suffix}", kind, **options)
        assert open_images(path).description["lossy"] == lossy

    def test_the_only_file_of_its_kind_is_looked_at(self, tmp_path, images, monkeypatch):
        monkeypatch.setattr("inference.image_files.CHECKED_AT_START", 2)
        path = write_folder(tmp_path / "flat", images)
        PIL.Image.fromarray(images[0].transpose(1, 2, 0).copy()).save(path / "000004.jpg")
        assert open_images(path).description["lossy"] == "JPEG"

#----------------------------------------------------------------------------

@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
class TestNpz:
    def test_all_and_some(self, tmp_path, images, nhwc, save):
        save(tmp_path / "x.npz", nhwc)
        source = open_images(tmp_path / "x.npz")
        for batch_size in (1, 3, 64):
            got, labels = read(source, batch_size)
            assert torch.equal(got, torch.from_numpy(images))
            assert labels is None
        assert torch.equal(read(source, 2, [0, 5, 6, 9])[0], torch.from_numpy(images[[0, 5, 6, 9]]))

    def test_labels(self, tmp_path, nhwc, save):
        save(tmp_path / "x.npz", nhwc, np.arange(10, dtype=np.int32))
        assert read(open_images(tmp_path / "x.npz", labels=True), 4, [2, 3, 8])[1] == [2, 3, 8]

    def test_never_whole(self, tmp_path, monkeypatch, save):
        save(tmp_path / "x.npz", np.zeros([2000, 16, 16, 3], dtype=np.uint8))
        largest = []
        original = zipfile.ZipExtFile.read
        monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: largest.append(n) or original(self, n))
        assert sum(len(x) for x, _ in open_images(tmp_path / "x.npz").batches(64)) == 2000
        assert -1 not in largest
        assert max(largest) < 1 << 14


class TestNpzErrors:
    def check(self, path, match):
        with pytest.raises(UserError, match=match):
            read(open_images(path))

    def test_float(self, tmp_path, nhwc):
        np.savez(tmp_path / "x.npz", nhwc / 255)
        self.check(tmp_path / "x.npz", r"x\.npz: arr_0 is float64, but images must be uint8")

    @pytest.mark.parametrize("array", [np.zeros([2, 3, 8, 8], np.uint8), np.zeros([8, 8], np.uint8),
                                       np.zeros([2, 8, 8, 4], np.uint8),
                                       np.asfortranarray(np.zeros([2, 8, 8, 3], np.uint8))])
    def test_shape(self, tmp_path, array):
        np.savez(tmp_path / "x.npz", array)
        self.check(tmp_path / "x.npz", r"must be \[N, H, W, 3\], \[N, H, W, 1\] or \[N, H, W\] in C order")

    @pytest.mark.parametrize("shape", [[0, 8, 8, 3], [2, 8, 16, 3], [8, 8, 3]])
    def test_none_or_not_square(self, tmp_path, shape):
        np.savez(tmp_path / "x.npz", np.zeros(shape, np.uint8))
        self.check(tmp_path / "x.npz", "must be square|at least one is needed|looks like one image")

    def test_other_key(self, tmp_path, nhwc):
        np.savez(tmp_path / "x.npz", samples=nhwc, masks=nhwc[..., 0])
        self.check(tmp_path / "x.npz", r"holds masks\.npy, samples\.npy, and it is not clear which .*arr_0")
        np.savez(tmp_path / "x.npz", features=np.zeros([10, 4]))
        self.check(tmp_path / "x.npz", r"holds features\.npy, but images are expected in an array arr_0")

    def test_pickled(self, tmp_path):
        np.savez(tmp_path / "x.npz", np.array([{}], dtype=object))
        self.check(tmp_path / "x.npz", "arr_0 is object")

    def test_damaged(self, tmp_path, nhwc):
        np.savez(tmp_path / "x.npz", np.tile(nhwc, [200, 1, 1, 1]))
        data = bytearray((tmp_path / "x.npz").read_bytes())
        data[len(data) // 2] ^= 255
        (tmp_path / "x.npz").write_bytes(data)
        self.check(tmp_path / "x.npz", "arr_0: image .*the array is damaged")

#----------------------------------------------------------------------------

def test_kinds(tmp_path, images, nhwc):
    np.savez(tmp_path / "a", nhwc)
    np.savez(tmp_path / "b", mu=np.zeros(2), sigma=np.eye(2))
    np.savez(tmp_path / "c", nhwc, mu=np.zeros(2), sigma=np.eye(2))
    write_zip(tmp_path / "d.zip", images)
    kinds = [kind_of(tmp_path / name) for name in ("a.npz", "b.npz", "c.npz", "d.zip")]
    assert kinds == ["images", "statistics", "statistics", "images"]
    assert [image_inputs.has_samples(tmp_path / name) for name in ("b.npz", "c.npz")] == [False, True]
    with pytest.raises(UserError, match="no such file"):
        kind_of(tmp_path / "absent")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="neither a folder, a zip archive nor"):
        kind_of(tmp_path / "text")


def test_fingerprint_follows_content(tmp_path, nhwc):
    for name, array in (("a", nhwc), ("b", nhwc), ("c", nhwc[:9]), ("d", nhwc ^ 1)):
        np.savez(tmp_path / name, array)
    a, b, c, d = (open_images(tmp_path / f"{name}.npz").fingerprint for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
