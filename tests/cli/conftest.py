# SPDX-License-Identifier: Apache-2.0
"""Networks in their real size without their weights."""
import pytest

import legacy
from tests.cli.full_size import SNAPSHOTS


@pytest.fixture(autouse=True)
def full_size_snapshots(monkeypatch):
    read = legacy.open_snapshot
    monkeypatch.setattr(legacy, "open_snapshot",
                        lambda path, mmap=False: SNAPSHOTS[str(path)] if str(path) in SNAPSHOTS else read(path, mmap))
