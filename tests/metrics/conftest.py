# SPDX-License-Identifier: Apache-2.0
"""No test of metrics may read or leave anything outside its own folder, or go online."""
import pytest

from metrics.detectors import DETECTORS
from tests.metrics.helpers import tiny_kind


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("STYLESAN_WEIGHTS", raising=False)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(DETECTORS._items, "tiny", tiny_kind())
    monkeypatch.setitem(DETECTORS._items, "tiny-judge", tiny_kind("logits"))


@pytest.fixture
def tiny_inception(monkeypatch):
    """The official names with a network of a few hundred weights in place of the real ones."""
    for name in ("inception-2015-12-05", "vgg16", "inception-2015-12-05-clean", "inception-2015-12-05-pytorch_fid",
                 "inception-rand", "inception-random-seed0", "dinov2-vitl14"):
        monkeypatch.setitem(DETECTORS._items, name, tiny_kind())
