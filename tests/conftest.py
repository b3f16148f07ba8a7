"""Small data sets that many tests share, and a machine without downloads."""
import json
import os
import zipfile

import numpy as np
import PIL.Image
import pytest

# Files that take minutes: begun last, they would have one process work alone at the end.
LONG_FILES = ("test_demo.py", "test_nodes.py", "test_resume.py", "test_processes.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONG_FILES)


def pytest_configure(config):
    """Native operations are compiled once, not by every test that starts a script."""
    if "STYLESAN_OPS_CACHE" not in os.environ and getattr(config, "cache", None) is not None:
        os.environ["STYLESAN_OPS_CACHE"] = str(config.cache.mkdir("ops"))


def pytest_sessionstart(session):
    from torch_utils.ops import native
    native.load("cpu")


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    """Nothing is downloaded, and nothing outside the test's folders is written."""
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def write_dataset(path, resolution: int, num_images: int = 16, num_classes: int = 4, seed: int = 0,
                  classes: list[str] | None = None):
    """A data set zip of smooth coloured blobs whose colour tells the class; `num_classes` 0: no labels."""
    rng = np.random.RandomState(seed)
    labels = []
    y, x = np.mgrid[:resolution, :resolution] / resolution
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(num_images):
            label = i % num_classes if num_classes else 0
            centre, colour = rng.rand(2), np.random.RandomState(label).rand(3)
            blob = np.exp(-8 * ((x - centre[0]) ** 2 + (y - centre[1]) ** 2))[:, :, None]
            image = (255 * blob * colour).astype(np.uint8)
            name = f"00000/img{i:08d}.png"
            with archive.open(name, "w") as f:
                PIL.Image.fromarray(image).save(f, format="PNG")
            labels.append([name, label])
        if num_classes:
            archive.writestr("dataset.json", json.dumps({"labels": labels, "classes": classes}
                                                        if classes else {"labels": labels}))
    return path


@pytest.fixture(scope="session")
def data16(tmp_path_factory):
    """16 labelled images of 16 pixels, 4 classes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "blobs16.zip", 16)


@pytest.fixture(scope="session")
def data32(tmp_path_factory):
    """16 labelled images of 32 pixels, 4 classes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "blobs32.zip", 32)
