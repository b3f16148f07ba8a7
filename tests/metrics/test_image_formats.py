# SPDX-License-Identifier: Apache-2.0
"""Archives and folders of images as other tools leave them: the same numbers of the same images, or one clear line."""
import io
import json
import pickle
import struct
import tarfile
import tracemalloc
import zipfile
import zlib

import numpy as np
import PIL.Image
import pytest
import torch

from data_prep.sources.shards import TarStore
from dnnlib import UserError
from inference.image_files import crop_of_file
from inference.image_inputs import has_samples, kind_of, open_images, summary
from metrics.crops import crop_warnings
from tests.metrics.helpers import random_images, write_folder
from training.dataset import ImageDataset


def png(image):
    data = io.BytesIO()
    PIL.Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(data, format="PNG")
    return data.getvalue()


def add(archive, name, data, **fields):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(data))


def png_of_16_bits(values):
    """Pillow writes no colours of this depth. uint16 [H, W, 1 or 3]."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if channels == 3 else 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff_of_16_bits(values):
    """The same as TIFF, in the other order of bytes."""
    height, width, channels = values.shape
    data = values.astype("<u2").tobytes()
    after = 8 + len(data)               # Behind the pixels come the bits per sample, then the directory.
    is_rgb = channels == 3
    fields = [(256, width), (257, height), (258, after if is_rgb else 16), (259, 1), (262, 2 if is_rgb else 1),
              (273, 8), (277, channels), (278, height), (279, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 3 if tag != 273 else 4, channels if tag == 258 else 1, value)
                       for tag, value in fields)
    return (b"II*\0" + struct.pack("<I", after + 2 * channels) + data + struct.pack(f"<{channels}H", *[16] * channels)
            + struct.pack("<H", len(fields)) + entries + bytes(4))


def write_tar(path, images, names=None, labels=None, form=tarfile.PAX_FORMAT):
    names = names or [f"{i:06d}.png" for i in range(len(images))]
    with tarfile.open(path, "w", format=form) as archive:
        for name, image in zip(names, images, strict=True):
            add(archive, name, png(image))
        if labels is not None:
            entries = list(map(list, zip(names, labels, strict=True)))
            add(archive, "dataset.json", json.dumps({"labels": entries}).encode())
    return path


def pixels(source, batch_size=4, indices=None):
    parts = source.batches(batch_size) if indices is None else source.batches_at(batch_size, indices)
    return torch.cat([images for images, _ in parts])


def read_all(path):
    return pixels(open_images(path))


def refused(path, match, read=False):
    with pytest.raises(UserError, match=match) as info:
        read_all(path) if read else open_images(path, labels=True)
    assert str(path) in str(info.value)
    assert "\n" not in str(info.value)


@pytest.fixture
def images():
    return random_images(10)

#----------------------------------------------------------------------------

class TestTar:
    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    def test_same_as_folder_and_zip(self, tmp_path, images, form):
        folder = open_images(write_folder(tmp_path / "folder", images))
        names = ["./" + f"{i:06d}.png" for i in range(10)]      # As `tar cf x.tar .` writes them.
        tar = open_images(write_tar(tmp_path / "x.dat", images, names, form=form))
        assert torch.equal(pixels(tar), pixels(folder))
        assert tar.fingerprint == folder.fingerprint
        assert kind_of(tmp_path / "x.dat") == "images"
        assert summary(tar) == "tar archive, 10 images of 8x8 pixels"

    def test_by_number_in_any_order_of_files(self, tmp_path, images):
        order = np.random.RandomState(0).permutation(10)
        path = write_tar(tmp_path / "x.tar", images[order], [f"{i:06d}.png" for i in order])
        for workers in (0, 1):
            source = open_images(path, workers=workers)
            assert torch.equal(pixels(source, 2, [1, 4, 9]), torch.from_numpy(images[[1, 4, 9]]))

    def test_long_names_and_other_files(self, tmp_path, images):
        names = [f"{'deep/' * 40}{i}.png" for i in range(10)]
        path = write_tar(tmp_path / "x.tar", images, names)
        with tarfile.open(path, "a") as archive:
            add(archive, "readme.txt", b"hello")
            add(archive, "folder", b"", type=tarfile.DIRTYPE)
        assert torch.equal(pixels(open_images(path)), torch.from_numpy(images))

    def test_labels(self, tmp_path, images):
        path = write_tar(tmp_path / "x.tar", images, labels=[i % 2 for i in range(10)])
        source = open_images(path, labels=True)
        assert source.labels.tolist() == [i % 2 for i in range(10)]
        names = [f"{'ab'[i // 5]}/{i}.png" for i in range(10)]
        source = open_images(write_tar(tmp_path / "y.tar", images, names), labels=True)
        assert source.labels.tolist() == [0] * 5 + [1] * 5

    @pytest.mark.parametrize(("name", "fields", "match"), [
        ("x.png", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "is a link"),
        ("x.png", {"type": tarfile.LNKTYPE, "linkname": "000000.png"}, "is a link"),
        ("x.png", {"type": tarfile.FIFOTYPE}, "is a link"),
        ("../x.png", {}, "leads out of the data set"), ("/x.png", {}, "leads out of the data set"),
        ("a/../../x.png", {}, "leads out of the data set"), ("000001.png", {}, "holds 000001.png twice")])
    def test_what_is_not_read(self, tmp_path, images, name, fields, match):
        path = write_tar(tmp_path / "x.tar", images)
        with tarfile.open(path, "a") as archive:
            add(archive, name, b"" if fields else png(images[0]), **fields)
        refused(path, match)

    def test_compressed(self, tmp_path, images):
        for mode in ("w:gz", "w:bz2", "w:xz"):
            with tarfile.open(tmp_path / "x.tar", mode) as archive:
                add(archive, "0.png", png(images[0]))
                add(archive, "1.png", png(images[1]))
            for workers in (0, 2):
                got = pixels(open_images(tmp_path / "x.tar", workers=workers), 1)
                assert torch.equal(got, torch.from_numpy(images[:2]))
        (tmp_path / "x.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(100))
        refused(tmp_path / "x.tar.zst", "unzstd")

    def test_damage(self, tmp_path, images):
        data = write_tar(tmp_path / "x.tar", images).read_bytes()
        (tmp_path / "cut.tar").write_bytes(data[:1024 * 3 + 700])
        refused(tmp_path / "cut.tar", "not a usable tar archive .*cut off")
        with tarfile.open(tmp_path / "x.tar") as archive:
            header = archive.getmembers()[4].offset
        broken = bytearray(data)
        broken[header + 5] ^= 255
        (tmp_path / "broken.tar").write_bytes(broken)
        refused(tmp_path / "broken.tar", "a header's checksum is wrong")
        with tarfile.open(tmp_path / "empty.tar", "w") as archive:
            add(archive, "readme.txt", b"hello")
        refused(tmp_path / "empty.tar", "no images in it")

    def test_travels_between_processes(self, tmp_path, images):
        store = TarStore(tmp_path / "x.tar", [write_tar(tmp_path / "x.tar", images)])
        store.read(0)
        assert pickle.loads(pickle.dumps(store)).read(3) == store.read(3) == png(images[3])

#----------------------------------------------------------------------------

class TestSizes:
    @pytest.mark.parametrize("size", [1, 17, 96, 299])
    def test_any_square(self, tmp_path, size):
        images = random_images(3, size)
        source = open_images(write_folder(tmp_path / "x", images))
        assert source.description["resolution"] == size
        assert torch.equal(pixels(source), torch.from_numpy(images))

    def test_not_square(self, tmp_path):
        PIL.Image.new("RGB", (8, 9)).save(tmp_path / "x.png")
        refused(tmp_path, "8x9 pixels, but images must be square: crop them")

    def test_mixed_names_the_first_few(self, tmp_path, images):
        write_folder(tmp_path / "x", images)
        for i in range(4):
            PIL.Image.new("RGB", (9, 9)).save(tmp_path / "x" / f"z{i}.png")
        refused(tmp_path / "x", r"000000.png has 8x8 pixels, but not z0.png \(9x9\), z1.png \(9x9\), z2.png \(9x9\) "
                                "and 1 more")

    def test_mixed_beyond_those_looked_at(self, tmp_path, images, monkeypatch):
        monkeypatch.setattr("inference.image_files.CHECKED_AT_START", 2)
        write_folder(tmp_path / "x", images)
        PIL.Image.new("RGB", (9, 9)).save(tmp_path / "x" / "000003.png")
        refused(tmp_path / "x", "000003.png: 9x9 pixels, but 000000.png has 8x8", read=True)


class TestPixels:
    """What is no 8-bit RGB is converted by the rule of dataset_tool.py, and it is said."""

    def check(self, folder, want, change):
        source = open_images(folder)
        assert np.array_equal(pixels(source)[0].numpy(), np.asarray(want).transpose(2, 0, 1))
        assert source.description["changes"] == f"of 1 files looked at 1: {change}"

    @pytest.mark.parametrize(("mode", "colour", "want", "change"), [
        ("RGBA", (10, 20, 30, 0), (255, 255, 255), "transparency laid over white"),
        ("LA", (40, 255), (40, 40, 40), "transparency laid over white"), ("P", 0, (0, 0, 0), "mode P converted"),
        ("1", 1, (255, 255, 255), "mode 1 converted"), ("I;16", 0x1280, (0x12, 0x12, 0x12), "16 bits reduced to 8")])
    def test_modes(self, tmp_path, mode, colour, want, change):
        PIL.Image.new(mode, (8, 8), colour).save(tmp_path / "x.png")
        self.check(tmp_path, np.full((8, 8, 3), want, np.uint8), change)

    def test_transparent_colour(self, tmp_path):
        PIL.Image.new("RGB", (8, 8)).save(tmp_path / "x.png", transparency=(0, 0, 0))
        self.check(tmp_path, np.full((8, 8, 3), 255, np.uint8), "transparency laid over white")

    def test_cmyk(self, tmp_path):
        PIL.Image.new("CMYK", (8, 8)).save(tmp_path / "x.tif")
        self.check(tmp_path, np.full((8, 8, 3), 255, np.uint8), "mode CMYK converted")

    @pytest.mark.parametrize("kind", ["png", "tif"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_16_bits_keep_the_upper_8(self, tmp_path, kind, channels):
        values = np.random.RandomState(0).randint(0, 1 << 16, (8, 8, channels), dtype=np.uint16)
        (tmp_path / "x.dat.png").write_bytes(png_of_16_bits(values) if kind == "png" else tiff_of_16_bits(values))
        self.check(tmp_path, np.broadcast_to((values >> 8).astype(np.uint8), (8, 8, 3)), "16 bits reduced to 8")

    def test_grayscale_is_three_equal_channels(self, tmp_path):
        values = np.arange(64, dtype=np.uint8).reshape(8, 8)
        PIL.Image.fromarray(values).save(tmp_path / "x.png")
        assert torch.equal(pixels(open_images(tmp_path))[0], torch.from_numpy(values).expand(3, 8, 8))

#----------------------------------------------------------------------------

class TestClasses:
    def test_shared_folders_are_passed_over(self, tmp_path, images):
        write_folder(tmp_path / "out", images, [f"samples/run/{'ba'[i % 2]}" for i in range(10)])
        source = open_images(tmp_path / "out", labels=True)
        assert source.description["class_names"] == ["a", "b"]
        assert source.labels.tolist() == [0] * 5 + [1] * 5
        assert source.description["format"] == "folder with one sub-folder per class"

    def test_one_class(self, tmp_path, images):
        write_folder(tmp_path / "out", images, ["only"] * 10)
        assert open_images(tmp_path / "out", labels=True).description["class_names"] == ["only"]

    def test_deeper_folders_of_a_class_belong_to_it(self, tmp_path, images):
        write_folder(tmp_path / "out", images, [["a/x", "a/y", "b"][i % 3] for i in range(10)])
        assert open_images(tmp_path / "out", labels=True).description["class_names"] == ["a", "b"]

    def test_numbered_folders_of_a_thousand_are_no_classes(self, tmp_path, images):
        """EDM2 writes 000000/000001.png, 001000/001001.png, ..."""
        for i, image in enumerate(images):
            seed = i * 300
            path = tmp_path / "out" / f"{seed // 1000 * 1000:06d}" / f"{seed:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
        source = open_images(tmp_path / "out", labels=True)
        assert source.labels is None
        assert source.description["labels_sorted"] is False
        assert torch.equal(pixels(source), torch.from_numpy(images))

    def test_order_by_class_shows(self, tmp_path, images):
        write_folder(tmp_path / "classes", images, [str(i % 3) for i in range(10)])
        assert open_images(tmp_path / "classes").description["labels_sorted"] is True       # Also when not asked for.
        assert "ordered by class" in summary(open_images(tmp_path / "classes"))
        nhwc = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
        for labels, want in (([0] * 5 + [1] * 5, True), ([0, 1] * 5, False), ([3] * 10, False)):
            np.savez(tmp_path / "x.npz", nhwc, np.array(labels))
            assert open_images(tmp_path / "x.npz").description["labels_sorted"] is want
            write_tar(tmp_path / "x.tar", images, labels=labels)
            assert open_images(tmp_path / "x.tar").description["labels_sorted"] is want

    def test_broken_labels_matter_when_they_are_wanted(self, tmp_path, images):
        write_tar(tmp_path / "x.tar", images, labels=[-1] * 10)
        assert open_images(tmp_path / "x.tar").labels is None
        refused(tmp_path / "x.tar", r"10 labels are wrong: 000000.png \(-1\)")

#----------------------------------------------------------------------------

class TestNpz:
    @pytest.fixture
    def nhwc(self, images):
        return np.ascontiguousarray(images.transpose(0, 2, 3, 1))

    def test_reference_with_a_thousand_images(self, tmp_path):
        """ADM's 512 file has 1,000 images, not 10,000."""
        path = tmp_path / "VIRTUAL_imagenet512.npz"
        np.savez_compressed(path, mu=np.zeros(3, np.float32), sigma=np.eye(3), mu_s=np.zeros(2, np.float32),
                            sigma_s=np.eye(2), arr_0=np.zeros([1000, 32, 32, 3], np.uint8))
        assert kind_of(path) == "statistics"
        assert has_samples(path)
        source = open_images(path)
        assert (source.num_images, source.description["resolution"]) == (1000, 32)

    def test_alpha(self, tmp_path):
        np.savez(tmp_path / "x.npz", np.zeros([2, 8, 8, 4], np.uint8))
        refused(tmp_path / "x.npz", "must be .N, H, W, 3.*drop the alpha channel")

    def test_labels_of_objects_are_not_read(self, tmp_path, nhwc):
        np.savez(tmp_path / "x.npz", nhwc, np.array([{}] * 10, dtype=object))
        assert open_images(tmp_path / "x.npz").labels is None

    def test_array_shorter_than_its_header_says(self, tmp_path, nhwc):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (1000, 8, 8, 3)})
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("arr_0.npy", header.getvalue() + nhwc.tobytes())
        refused(tmp_path / "x.npz", "arr_0 is cut off")

    def test_file_cut_off(self, tmp_path, nhwc):
        np.savez(tmp_path / "x.npz", nhwc)
        data = (tmp_path / "x.npz").read_bytes()
        (tmp_path / "x.npz").write_bytes(data[: len(data) - 100])
        refused(tmp_path / "x.npz", "not a whole .npz file")
        with pytest.raises(UserError, match="a zip archive or .npz that is cut off"):
            kind_of(tmp_path / "x.npz")

    @pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    def test_memory_does_not_grow_with_the_file(self, tmp_path, method):
        """80 MB of images pass through a few batches of memory, all and some of them."""
        num, side = 400, 256
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False,
                                                      "shape": (num, side, side, 3)})
        with zipfile.ZipFile(tmp_path / "x.npz", "w", method, compresslevel=1) as archive:
            with archive.open("arr_0.npy", "w") as f:
                f.write(header.getvalue())
                for i in range(num):
                    f.write(bytes([i % 256]) * (side * side * 3))
        tracemalloc.start()
        try:
            source, seen = open_images(tmp_path / "x.npz"), []
            for images, _ in source.batches(8):
                seen += images[:, 0, 0, 0].tolist()
            for images, _ in source.batches_at(8, [5, 390]):
                seen += images[:, 2, -1, -1].tolist()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert seen == [i % 256 for i in [*range(num), 5, 390]]
        assert peak < 15e6

#----------------------------------------------------------------------------

class TestCrops:
    def test_from_the_report_of_dataset_tool(self, tmp_path, images):
        path = write_folder(tmp_path / "x", images)
        assert open_images(path).description["crop"] is None
        report = tmp_path / "x.report.json"
        report.write_text(json.dumps({"transform": "center-crop", "resolution": 8}))
        assert open_images(path).description["crop"] == "center-crop"
        assert crop_of_file(str(path) + "/") == "center-crop"
        for text in ('{"transform": null}', "[1]", "no json", '{"transform": 3}'):
            report.write_text(text)
            assert crop_of_file(path) is None

    def test_warnings(self):
        ours, adm = {"crop": "center-crop"}, "center-crop-dhariwal"
        assert crop_warnings(["fid"], {}, adm) == []
        assert crop_warnings(["fid"], ours, None) == []
        assert crop_warnings(["adm_fid50k"], {"crop": adm}, adm) == []
        (different,) = crop_warnings(["fid"], ours, adm)
        assert "cut by center-crop, the reference by center-crop-dhariwal" in different
        (not_adm,) = crop_warnings(["fid", "adm_fid50k", "adm_is50k"], ours, "center-crop")
        assert "adm_fid50k, adm_is50k: the reference was cut by center-crop" in not_adm

#----------------------------------------------------------------------------

def test_fingerprint_is_that_of_the_training_data(tmp_path, images):
    """So that statistics computed while training serve afterwards."""
    path = write_folder(tmp_path / "x", images)
    (path / "dataset.json").write_text(json.dumps({"labels": [[f"{i:06d}.png", i % 2] for i in range(10)]}))
    assert open_images(path, labels=True).fingerprint == ImageDataset(path, use_labels=True).fingerprint


def test_damaged_and_unreadable(tmp_path):
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="a zip archive or .npz that is cut off"):
        kind_of(tmp_path / "x.zip")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(UserError, match="neither a folder, a zip archive nor"):
        kind_of(tmp_path / "empty")
    (tmp_path / "zeros").write_bytes(bytes(2000))
    with pytest.raises(UserError, match="neither a folder, a zip archive nor"):
        kind_of(tmp_path / "zeros")
