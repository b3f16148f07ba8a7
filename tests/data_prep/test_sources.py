"""Sources of dataset_tool.py: ImageNet's archives, tars, shards, CIFAR, MNIST, databases."""
import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile

import numpy as np
import pytest

from data_prep import sources
from data_prep.sources import SourceOptions, open_source, tars
from dnnlib import UserError
from tests.data_prep.archives import (
    WNIDS,
    cifar_archive,
    cifar_files,
    idx,
    ilsvrc_tar,
    imagenet_files,
    mnist_folder,
    plain_pickle,
    tar_bytes,
    web_shards,
)
from tests.data_prep.samples import encoded, files, metadata, pixels, write_folder, write_zip
from tests.data_prep.test_dataset_tool import made, refused
from training.dataset import ImageDataset


def content(path):
    """Images and labels of a data set."""
    dataset = ImageDataset(path, use_labels=True)
    items = [(image.tobytes(), label) for image, label in dataset]
    names = dataset.class_names
    dataset.close()
    return items, names


@pytest.fixture
def dest(tmp_path):
    return tmp_path / "out" / "set.zip"

#----------------------------------------------------------------------------
# Tar archives.

def test_ilsvrc_tar_equals_the_unpacked_folder(tmp_path):
    photos = imagenet_files()
    options = {"transform": "center-crop", "resolution": 8}
    tar = ilsvrc_tar(tmp_path / "ILSVRC2012_img_train.tar", photos)
    output = made(source=tar, dest=tmp_path / "tar.zip", **options)
    assert "9 images of 8x8 pixels, 3 classes" in output
    assert "1 grayscale files left out" in output
    folder = write_folder(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "train", photos)
    made(source=tmp_path / "ILSVRC", dest=tmp_path / "folder.zip", **options)
    class_tars = tmp_path / "tars"
    class_tars.mkdir()
    for wnid in WNIDS:
        (class_tars / f"{wnid}.tar").write_bytes(
            tar_bytes({n.split("/")[1]: data for n, data in photos.items() if n.startswith(wnid)}))
    made(source=class_tars, dest=tmp_path / "tars.zip", **options)
    assert (tmp_path / "tar.zip").read_bytes() == (tmp_path / "folder.zip").read_bytes()
    assert (tmp_path / "tar.zip").read_bytes() == (tmp_path / "tars.zip").read_bytes()
    assert content(tmp_path / "tar.zip")[1] == list(WNIDS)
    assert folder.is_dir()


def test_imagenet_classes_are_in_the_standard_order(tmp_path):
    timm_data = pytest.importorskip("timm.data")
    data = encoded(pixels(0, 4), "JPEG")
    wnids = timm_data.ImageNetInfo().label_names()
    assert len(wnids) == 1000
    source = open_source(str(write_zip(tmp_path / "s.zip", {f"train/{wnid}/{wnid}_1.JPEG": data
                                                            for wnid in reversed(wnids)})))
    assert source.is_imagenet
    assert source.classes == wnids
    assert source.labels == list(range(1000))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_names(tmp_path, form):
    long = "/".join(["folder" * 5] * 4)
    names = ["cat/1.png", "cat/a b.png", f"dog/{long}/2.png"]
    if form != tarfile.USTAR_FORMAT:
        names += ["dog/" + "n" * 180 + ".png", "owl/\u00e4\u65e5\u672c.png"]
    photos = {name: encoded(pixels(i)) for i, name in enumerate(names)}
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes({**photos, "readme.txt": b"hello"}, format=form))
    source = open_source(str(path))
    assert list(source.store.names) == sorted(names)
    assert [source.store.read(i) for i in source.indices] == [photos[name] for name in sorted(names)]
    assert source.classes == sorted({name.split("/")[0] for name in names})
    source.store.close()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_images_that_are_no_plain_files_of_a_tar_are_not_lost(tmp_path, kind):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("evil.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"s\.tar: 'evil.png' is a link, .*--dereference"):
        open_source(str(path))


def test_links_and_folders_in_a_tar_that_are_no_images(tmp_path):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("readme", tarfile.SYMTYPE), ("folder.png", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("good.png")
        info.size = len(encoded(pixels(0)))
        tar.addfile(info, io.BytesIO(encoded(pixels(0))))
    assert list(open_source(str(path)).store.names) == ["good.png"]


def test_sizes_in_base_256(tmp_path):
    header = bytearray(tar_bytes({"a.png": b"x" * 700}, format=tarfile.GNU_FORMAT)[:512])
    header[124:136] = b"\x80" + (700).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data = bytes(header) + b"x" * 700 + bytes(1024 - 700) + bytes(1024)
    assert [m[1:] for m in tars.members("x", io.BytesIO(data))] == [(512, 700)]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_packed_tars(tmp_path, dest, pack):
    photos = {f"{c}/{i}.png": encoded(pixels(i)) for c in "ab" for i in range(2)}
    path = tmp_path / {gzip.compress: "s.tar.gz", bz2.compress: "s.tar.bz2", lzma.compress: "s.tar.xz"}[pack]
    packed = pack(tar_bytes(photos))
    path.write_bytes(packed)
    assert "4 images of 8x8 pixels, 2 classes" in made(source=path, dest=dest)
    path.write_bytes(packed[:len(packed) // 2])
    refused("--overwrite", source=path, dest=dest, match=[f"{path}: not a whole archive", "copy it again"])


def test_packed_bomb(tmp_path, dest, monkeypatch):
    monkeypatch.setattr(tars, "FREE_EXPANSION", 1 << 20)
    path = tmp_path / "s.tgz"
    path.write_bytes(gzip.compress(bytes(32 << 20)))
    refused(source=path, dest=dest, match=[f"{path}: unpacks to more than", "refused"])


def test_dataset_json_in_a_tar(tmp_path, dest):
    path = tmp_path / "s.tar"
    path.write_bytes(tar_bytes({**files(), "dataset.json": json.dumps(metadata(classes=["a", "b", "c"])).encode()}))
    made(source=path, dest=dest)
    made(source=write_zip(tmp_path / "s.zip", files(), metadata(classes=["a", "b", "c"])), dest=tmp_path / "z.zip")
    assert dest.read_bytes() == (tmp_path / "z.zip").read_bytes()

#----------------------------------------------------------------------------
# WebDataset.

@pytest.mark.parametrize("kind", ["cls", "json"])
@pytest.mark.parametrize("how", ["folder", "braces", "stars"])
def test_web_shards(tmp_path, dest, kind, how):
    folder = web_shards(tmp_path / "shards", kind)
    source = {"folder": folder, "braces": folder / "shard-{000000..000001}.tar", "stars": folder / "*.tar"}[how]
    assert "8 images of 8x8 pixels, 3 classes" in made(source=source, dest=dest)
    items, _names = content(dest)
    assert items == [(pixels(i).transpose(2, 0, 1).tobytes(), i % 3) for i in range(8)]


def test_web_shards_that_lack_something(tmp_path, dest):
    folder = web_shards(tmp_path / "s")
    refused(source=folder / "shard-{000000..000009}.tar", dest=dest,
            match=["8 of 10 files are missing", "shard-000002.tar", "and 3 more"])
    refused(source=folder / "*.tgz", dest=dest, match=["no file fits the pattern"])
    (folder / "shard-000002.tar").write_bytes(tar_bytes({"9.png": encoded(pixels(9))}))
    refused(source=folder, dest=dest, match=["no label for 1 of 9 images: shard-000002/9.png", "--no-labels"])
    assert "9 images of 8x8 pixels, no labels" in made("--no-labels", source=folder, dest=dest)


def test_shards_without_labels_are_no_classes(tmp_path, dest):
    for s in range(2):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / f"{s}.tar").write_bytes(tar_bytes({f"{i}.png": encoded(pixels(i)) for i in range(2)}))
    assert "4 images of 8x8 pixels, no labels" in made(source=tmp_path / "s", dest=dest)
    (tmp_path / "s" / "2.tar").write_bytes(tar_bytes({"cat/1.png": encoded(pixels(1))}))
    refused("--overwrite", source=tmp_path / "s", dest=dest, match=["4 of 5 images are in none"])

#----------------------------------------------------------------------------
# CIFAR and MNIST.

@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("where", ["archive", "folder", "parent"])
def test_cifar(tmp_path, dest, classes, where):
    folder = tmp_path / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    if where == "archive":
        source = cifar_archive(tmp_path / f"cifar-{classes}-python.tar.gz", classes)
    else:
        write_folder(folder, cifar_files(classes))
        source = folder if where == "folder" else tmp_path
        dest = tmp_path.with_name(f"{tmp_path.name}.zip")
    count = 10 if classes == 10 else 2
    told = "train (5 files), test (1 file)" if classes == 10 else "train (1 file), test (1 file)"
    refused(source=source, dest=dest, match=[f"has the splits {told}: choose one with --split=train"])
    assert f"{count} images of 32x32 pixels, {classes} classes" in made(source=source, dest=dest, split="train")
    items, names = content(dest)
    assert items == [(pixels(i, 32).transpose(2, 0, 1).tobytes(), i % classes) for i in range(count)]
    assert names == [f"class{i}" for i in range(classes)]
    made("--overwrite", source=source, dest=dest, split="test")
    assert content(dest)[0][0] == (pixels(1000, 32).transpose(2, 0, 1).tobytes(), 1000 % classes)
    assert f"{count + 2} images of 32x32" in made("--overwrite", source=source, dest=dest, split="all")


def test_cifar_that_is_damaged_or_evil(tmp_path, dest):
    folder = write_folder(tmp_path / "c", cifar_files())
    (folder / "test_batch").unlink()
    (folder / "data_batch_3").unlink()
    refused(source=folder, dest=dest, match=["data_batch_3 is missing"])
    (folder / "data_batch_3").write_bytes(b"cos\nsystem\n(S'touch /tmp/evil'\ntR.")
    refused(source=folder, dest=dest, match=["data_batch_3", "nothing was run"])
    (folder / "data_batch_3").write_bytes(plain_pickle({"data": np.zeros((2, 10), np.uint8), "labels": [0, 1]}))
    refused(source=folder, dest=dest, match=["data_batch_3: not a file of CIFAR"])
    images = np.zeros((2, 3072), np.uint8)
    (folder / "data_batch_3").write_bytes(plain_pickle({"data": images, "labels": [0, 77]}))
    refused(source=folder, dest=dest, match=["10 class names do not fit the labels (77)"])
    (folder / "data_batch_3").write_bytes(plain_pickle({b"data": images, b"labels": [0, 7]}))
    assert "10 images" in made(source=folder, dest=dest)


@pytest.mark.parametrize("packed", [True, False])
def test_mnist(tmp_path, dest, packed):
    folder = mnist_folder(tmp_path / "MNIST" / "raw", packed)
    suffix = ".gz" if packed else ""
    dest = tmp_path.with_name(f"{tmp_path.name}.zip")
    refused(source=folder, dest=dest, match=["has the splits train (6 images), test (6 images)"])
    for source in (folder, tmp_path, folder / f"train-images-idx3-ubyte{suffix}"):
        assert "6 images of 8x8 pixels, 6 classes" in made("--overwrite", source=source, dest=dest, split="train")
        items, names = content(dest)
        assert items == [(np.stack([pixels(i)[:, :, 0]] * 3).tobytes(), i) for i in range(6)]
    made("--overwrite", source=folder, dest=dest, split="test", resolution=16)
    (folder / f"train-labels-idx1-ubyte{suffix}").unlink()
    assert "no labels" in made("--overwrite", source=folder, dest=dest, split="train")
    refused("--overwrite", source=write_folder(tmp_path / "x", files()), dest=dest, split="test",
            match=["--split=test:", "has no splits"])


def test_mnist_that_is_damaged(tmp_path, dest):
    folder = mnist_folder(tmp_path / "m", packed=False)
    for file in folder.glob("t10k*"):
        file.unlink()
    path = folder / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for data, match in ((whole[:-5], "379 bytes of 384"), (b"\0\0\x0d\3" + whole[4:], "not an idx file"), (b"", "idx"),
                        (idx(np.zeros((0, 8, 8), np.uint8)), "0 bytes of 0"),
                        (b"\0\0\x08\3" + b"\xff" * 12, "refused")):
        path.write_bytes(data)
        refused(source=folder, dest=dest, match=["train-images-idx3-ubyte", match])
    path.write_bytes(whole)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    refused(source=folder, dest=dest, match=["3 labels for 6 images"])

#----------------------------------------------------------------------------
# Databases.

def lmdb_folder(folder, count=4):
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(folder), map_size=1 << 20) as env, env.begin(write=True) as writer:
        for i in range(count):
            writer.put(f"key{i:03d}".encode(), encoded(pixels(i), "WEBP", lossless=True))
        writer.put(b"key\xff", b"not an image")
    return folder


def test_lsun(tmp_path, dest):
    output = made(source=lmdb_folder(tmp_path / "church_train_lmdb"), dest=dest)
    assert "4 images of 8x8 pixels, no labels" in output
    assert f"church_train_lmdb: {b'key'.hex()}ff: not an image" in output
    dataset = ImageDataset(dest)
    assert np.array_equal(dataset[3][0], pixels(3).transpose(2, 0, 1))
    dataset.close()
    (tmp_path / "church_train_lmdb" / "data.mdb").write_bytes(b"junk" * 100)
    refused("--overwrite", source=tmp_path / "church_train_lmdb", dest=dest, match=["cannot be read as an lmdb"])


def parquet_file(path, count=4, start=0, struct=True, labels="names"):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = [encoded(pixels(start + i)) for i in range(count)]
    columns = {"image": [{"bytes": d, "path": None} for d in data] if struct else data}
    schema = None
    if labels:
        columns["label"] = [(start + i) % 2 for i in range(count)]
    table = pyarrow.table(columns, schema)
    if labels == "names":
        features = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    parquet.write_table(table, path, row_group_size=3)
    return path


@pytest.mark.parametrize("struct", [True, False])
def test_parquet(tmp_path, dest, struct):
    folder = tmp_path / "p"
    folder.mkdir()
    for s in range(2):
        parquet_file(folder / f"train-{s:05d}-of-00002.parquet", start=4 * s, struct=struct)
    for source in (folder, folder / "*.parquet"):
        assert "8 images of 8x8 pixels, 2 classes" in made("--overwrite", source=source, dest=dest)
        assert content(dest) == ([(pixels(i).transpose(2, 0, 1).tobytes(), i % 2) for i in range(8)], ["cat", "dog"])
    assert "no labels" in made("--overwrite", "--no-labels", source=folder, dest=dest)


def test_parquet_that_is_damaged(tmp_path, dest):
    path = parquet_file(tmp_path / "a.parquet", labels="")
    assert "4 images of 8x8 pixels, no labels" in made(source=path, dest=dest)
    whole = path.read_bytes()
    path.write_bytes(whole[:len(whole) // 2])
    refused("--overwrite", source=path, dest=dest, match=["a.parquet: cannot be read as Parquet", "copy it again"])
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    refused("--overwrite", source=path, dest=dest, match=["no column of images among text"])
    parquet.write_table(pyarrow.table({"image": [{"bytes": None, "path": "a.png"},
                                                 {"bytes": encoded(pixels(0)), "path": None}]}), path)
    assert "row 0: the row holds no image" in made("--overwrite", source=path, dest=dest)


def test_parquet_with_lists_of_labels(tmp_path, dest):
    """A list of one is that label; several labels per image are refused by name."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": encoded(pixels(i))} for i in range(2)]
    parquet.write_table(pyarrow.table({"image": images, "label": [["1"], ["0"]]}), tmp_path / "a.parquet")
    made(source=tmp_path / "a.parquet", dest=dest)
    assert [label for _image, label in content(dest)[0]] == [1, 0]
    parquet.write_table(pyarrow.table({"image": images, "label": [[1, 0], [0]]}), tmp_path / "b.parquet")
    refused("--overwrite", source=tmp_path / "b.parquet", dest=dest,
            match=["column label: 1 labels hold more than one value: [1, 0]", "not supported", "--no-labels"])


@pytest.mark.parametrize(("package", "name"), [("lmdb", "data.mdb"), ("pyarrow", "a.parquet")])
def test_optional_packages_are_named(tmp_path, dest, monkeypatch, package, name):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "pyarrow":
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(source=write_folder(tmp_path / "s", {name: b"x"}), dest=dest,
            match=[f"needs the package {package}", f"pip install {package}"])

#----------------------------------------------------------------------------
# Untrusted archives.

@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "C:\\evil.png", "..\\evil.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_out(tmp_path, dest, name, kind):
    photos = {"good.png": encoded(pixels(0)), name: encoded(pixels(1))}
    path = tmp_path / f"s.{kind}"
    if kind == "zip":
        write_zip(path, photos)
    else:
        path.write_bytes(tar_bytes(photos))
    before = sorted(p.name for p in tmp_path.rglob("*"))
    refused(source=path, dest=dest, match=[str(path), "leads out of the data set"])
    assert not [p for p in tmp_path.rglob("*evil*")]
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "out") == before


def test_damaged_tars(tmp_path, dest):
    whole = tar_bytes({f"c/{i}.png": encoded(pixels(i)) for i in range(3)})
    broken = bytearray(whole)
    broken[5] ^= 1
    end = whole.rindex(b"IEND")
    nested = tar_bytes({"n01440764.tar": whole[:700]})
    path = tmp_path / "s.tar"
    for data, match in ((broken, "checksum"), (whole[:end], "cut off"), (whole[:1024], "cut off"), (b"", "cut off"),
                        (nested, "n01440764.tar: its last file is cut off"), (bytes(1024), "no images in it")):
        path.write_bytes(data)
        refused(source=path, dest=dest, match=[str(path), match])
    path.write_bytes(tar_bytes({"a.png": b"x"})[:1024] + tar_bytes({"a.png": b"y"}))
    refused(source=path, dest=dest, match=["holds a.png twice"])


def test_files_that_are_too_large_are_never_read(tmp_path, dest, monkeypatch):
    source = write_folder(tmp_path / "s", files(3))
    with open(source / "huge.png", "wb") as f:
        f.truncate(3 << 30)                 # A hole: it takes no space, and reading it would take 3 GiB.
    output = made("--no-labels", source=source, dest=dest)
    assert "huge.png: 3.0 GiB, more than the 512.0 MiB that one image may have" in output


def test_huge_member_of_a_tar_is_never_read(tmp_path, dest):
    path = tmp_path / "s.tar"
    with open(path, "wb") as f:
        info = tarfile.TarInfo("huge.png")
        info.size = 3 << 30
        f.write(info.tobuf(tarfile.GNU_FORMAT))
        f.truncate(512 + info.size)
        f.seek(0, 2)
        f.write(tar_bytes({"small.png": encoded(pixels(0))}))
    output = made(source=path, dest=dest)
    assert "1 images of 8x8" in output
    assert "huge.png: 3.0 GiB, more than" in output


def test_unicode_names(tmp_path, dest):
    names = ["\u732b/\u00e9.png", "\u732b/\U0001f600.png", "hund/\u00fc \u00df.png"]
    source = write_zip(tmp_path / "s.zip", {name: encoded(pixels(i)) for i, name in enumerate(names)})
    made(source=source, dest=dest)
    assert content(dest)[1] == ["hund", "\u732b"]
    folder = write_folder(tmp_path / "s", {name: encoded(pixels(i)) for i, name in enumerate(names)})
    made(source=folder, dest=dest.with_name("f.zip"))
    assert dest.read_bytes() == dest.with_name("f.zip").read_bytes()


def test_a_source_is_told_by_its_content(tmp_path):
    path = tmp_path / "no_suffix"
    path.write_bytes(tar_bytes({"a/1.png": encoded(pixels(0)), "b/1.png": encoded(pixels(0))}))
    assert open_source(str(path)).classes == ["a", "b"]
    assert open_source(str(path), SourceOptions(use_labels=False)).labels is None
    with pytest.raises(UserError, match="unknown"):
        open_source("sklearn:faces")
    assert sources.source_stamp(str(path))
