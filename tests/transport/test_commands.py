"""The commands that the documentation names start, and no other module of the package is one."""
import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("congested", "diagnose", "latent1d", "san_dcgan", "san_toy", "trust_the_critics")


def test_these_are_the_documented_ones():
    documented = set(re.findall(r"python -m transport\.(\w+)", (ROOT / "docs/transport.md").read_text()))
    files = {p.stem for p in (ROOT / "transport").glob("*.py")} - {"__init__"}
    folders = {p.parent.name for p in (ROOT / "transport").glob("*/__main__.py")}
    assert documented == files | folders == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_help(name, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, f"transport.{name}", raising=False)        # As in a process of its own.
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"transport.{name}", run_name="__main__")
    assert end.value.code == 0
    assert "--device" in capsys.readouterr().out
