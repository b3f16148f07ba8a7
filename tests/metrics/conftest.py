# SPDX-License-Identifier: Apache-2.0
"""No test of metrics may read or leave anything outside its own folder, or go online."""
import contextlib

import pytest

from metrics.detectors import DETECTORS
from tests.metrics.helpers import tiny_kind


@pytest.fixture(autouse=True)
def _isolated(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("STYLESAN_WEIGHTS", raising=False)


@pytest.fixture
def replace():
    """Replaces an entry of a registry until the end of the test: `replace(METRICS, "fid", metric)`."""
    with contextlib.ExitStack() as stack:
        yield lambda registry, name, item: stack.enter_context(registry.replaced(name, item))


@pytest.fixture(autouse=True)
def _tiny(replace):
    replace(DETECTORS, "tiny", tiny_kind())
    replace(DETECTORS, "tiny-judge", tiny_kind("logits"))


@pytest.fixture
def tiny_inception(replace):
    """The official names with a network of a few hundred weights in place of the real ones."""
    for name in ("inception-2015-12-05", "vgg16", "inception-2015-12-05-clean", "inception-2015-12-05-pytorch_fid",
                 "inception-rand", "inception-random-seed0", "dinov2-vitl14"):
        replace(DETECTORS, name, tiny_kind())
