"""Miniatures of the archives that data sets come in, in exactly their layouts."""
import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.data_prep.samples import encoded, pixels

WNIDS = ("n01440764", "n01443537", "n15075141")


def tar_bytes(content: dict[str, bytes], **options: Any) -> bytes:
    """A tar archive of files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def imagenet_files(per_class: int = 3, size: int = 12) -> dict[str, bytes]:
    """Files as in the unpacked ILSVRC training set: photos of several shapes, one of them grayscale."""
    found = {}
    for k, wnid in enumerate(WNIDS):
        for i in range(per_class):
            image = pixels(10 * k + i, size)[: size - i]
            found[f"{wnid}/{wnid}_{10 * i + k}.JPEG"] = encoded(image, "JPEG")
    found[f"{WNIDS[0]}/{WNIDS[0]}_7.JPEG"] = encoded(pixels(5, size)[:, :, 0], "JPEG")
    return found


def ilsvrc_tar(path: Path, content: dict[str, bytes]) -> Path:
    """ILSVRC2012_img_train.tar: a tar of one tar per class, whose members have no folder."""
    inner = {}
    for wnid in sorted({name.split("/")[0] for name in content}):
        inner[f"{wnid}.tar"] = tar_bytes({name.split("/")[1]: data for name, data in content.items()
                                          if name.startswith(wnid)}, format=tarfile.GNU_FORMAT)
    path.write_bytes(tar_bytes(inner, format=tarfile.GNU_FORMAT))
    return path


def web_shards(folder: Path, kind: str = "cls", shards: int = 2, each: int = 4) -> Path:
    """WebDataset shards: key.jpg beside key.cls or key.json; labels 0, 1, 2, 0, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for s in range(shards):
        content = {}
        for i in range(each):
            number = s * each + i
            content[f"{number:06d}.png"] = encoded(pixels(number))
            content[f"{number:06d}.{kind}"] = (str(number % 3).encode() if kind == "cls"
                                               else json.dumps({"label": number % 3, "caption": "x"}).encode())
        (folder / f"shard-{s:06d}.tar").write_bytes(tar_bytes(content))
    return folder

#----------------------------------------------------------------------------
# Pickles as Python 2 wrote them: byte strings are SHORT_BINSTRING and BINSTRING, which Python 3 cannot write.

def _python2(value: Any) -> bytes:
    if isinstance(value, bytes):
        return (b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))) + value
    if isinstance(value, np.ndarray):
        start = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85U\1b\x87R"
        dtype = b"cnumpy\ndtype\nU\x02u1K\0K\1\x87R(K\3U\1|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tb"
        shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in value.shape) + b"t"
        return start + b"(K\1" + shape + dtype + b"\x89" + _python2(value.tobytes()) + b"tb"
    if isinstance(value, list):
        return b"](" + b"".join(_python2(v) for v in value) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(k) + _python2(v) for k, v in value.items()) + b"u"
    return b"J" + struct.pack("<i", value)


def python2_pickle(value: Any) -> bytes:
    """Protocol 2 as cPickle of Python 2.7 wrote it."""
    return b"\x80\x02" + _python2(value) + b"."


def cifar_files(classes: int = 10, each: int = 2) -> dict[str, bytes]:
    """The files of CIFAR-10 or, with 100 classes, CIFAR-100. Image i is pixels(i, 32); test images begin at 1000."""
    def batch(start: int) -> bytes:
        images = np.stack([pixels(start + i, 32).transpose(2, 0, 1).reshape(-1) for i in range(each)])
        labels = [(start + i) % classes for i in range(each)]
        named = {b"labels": labels} if classes == 10 else {b"fine_labels": labels, b"coarse_labels": [0] * each}
        return python2_pickle({b"data": images, **named, b"batch_label": b"x", b"filenames": [b"a.png"] * each})

    if classes == 10:
        files = {f"data_batch_{k}": batch((k - 1) * each) for k in range(1, 6)}
        return {"batches.meta": python2_pickle({b"label_names": [b"class%d" % i for i in range(10)]}), **files,
                "test_batch": batch(1000), "readme.html": b"<html>"}
    return {"meta": python2_pickle({b"fine_label_names": [b"class%d" % i for i in range(100)]}),
            "train": batch(0), "test": batch(1000)}


def cifar_archive(path: Path, classes: int = 10) -> Path:
    """cifar-10-python.tar.gz or cifar-100-python.tar.gz."""
    folder = "cifar-10-batches-py" if classes == 10 else "cifar-100-python"
    path.write_bytes(gzip.compress(tar_bytes({f"{folder}/{k}": v for k, v in cifar_files(classes).items()}), mtime=0))
    return path


def plain_pickle(value: Any) -> bytes:
    """As today's Python writes it."""
    return pickle.dumps(value)


def idx(array: np.ndarray) -> bytes:
    """MNIST's format."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_folder(folder: Path, packed: bool = True, count: int = 6) -> Path:
    """MNIST's four files, images of 8x8 pixels, labels 0, 1, ..."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, start in (("train", 0), ("t10k", 100)):
        images = np.stack([pixels(start + i)[:, :, 0] for i in range(count)])
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in ((f"{split}-images-idx3-ubyte", images), (f"{split}-labels-idx1-ubyte", labels)):
            (folder / (name + ".gz" * packed)).write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    return folder
