# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING.md sends people to files and commands that exist."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
FILES = set(re.findall(r"[\w./-]+/[\w.-]+\.(?:py|md|yml)\b", TEXT))
FOLDERS = set(re.findall(r"\btests/\w+(?:/\w+)*(?![\w./])", TEXT))
TARGETS = set(re.findall(r"\bmake ([a-z][a-z-]+)", TEXT))


def test_something_was_found():
    assert len(FILES) > 20
    assert FOLDERS
    assert {"lint", "format", "test", "test-fast"} <= TARGETS


@pytest.mark.parametrize("path", sorted(FILES | FOLDERS))
def test_paths_exist(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_targets_are_in_the_makefile(target):
    assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", (ROOT / "Makefile").read_text(), re.MULTILINE)
