"""The README's commands: the demo in its quick form, then everything else on what the demo made."""
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()

pytestmark = pytest.mark.slow


def run(command: list[str], cwd: Path, given: str = "") -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, input=given, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the quick demo has run, with some photographs beside it."""
    place = tmp_path_factory.mktemp("readme")
    done = run([sys.executable, str(ROOT / "demo.py"), "--quick", "--outdir=runs/demo"], place)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FID now" in done.stdout
    assert "samples.png" in done.stdout
    rng = np.random.RandomState(0)
    for name in ("cats", "dogs"):
        (place / "photos" / name).mkdir(parents=True)
        for i in range(8):
            pixels = rng.randint(0, 255, [40, 30, 3], dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(place / "photos" / name / f"{i}.jpg")
    return place


def test_summary(place):
    summary = json.loads((place / "runs/demo/summary.json").read_text())
    for key in ("fid_init", "fid", "kid", "precision", "recall", "accuracy", "minutes", "seed", "paths"):
        assert key in summary
    for key in ("fid_init", "fid", "kid", "accuracy"):
        assert np.isfinite(summary[key]), key
    with PIL.Image.open(summary["paths"]["samples"]) as sheet:
        assert sheet.size[1] == 10 * 64


def blocks(kind: str) -> list[str]:
    """Commands in the README's code blocks of one kind; continued lines joined, comments dropped."""
    found = []
    for text in re.findall(rf"^```{kind}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE):
        lines = text.replace("\\\n", " ").splitlines()
        found += [line.split("   #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]
    return found


def test_readme_commands(place):
    commands = [c for c in blocks("sh") if not c.startswith("make ")]     # This test's fixture, and this suite.
    assert len(commands) >= 6
    lists = []
    for command in commands:
        python, script, *words = shlex.split(command)
        assert python == "python", command
        lists.append([str(ROOT / script) if script.endswith(".py") else script, *words])
    done = run([sys.executable, str(ROOT / "tests" / "readme_commands.py")], place, json.dumps(lists))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert done.stderr.count("\n$ python ") + done.stderr.startswith("$ python ") == len(commands)
    assert len(list((place / "out").glob("seed*.png"))) == 8


def test_readme_python(place):
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    done = run([sys.executable, "-c", code + "\nassert image.shape == (1, 3, 32, 32)"], place)
    assert done.returncode == 0, done.stderr


def test_readme_starts_with_the_two_commands():
    first = blocks("sh")[:2]
    assert first == ["make demo", "make test"]


def test_files_and_links_of_the_readme_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
    for name in re.findall(r"^\| (.*?) \|", README.split("## Tour")[1], flags=re.MULTILINE):
        first = re.match(r"`([^`]+)`", name)
        if first:
            assert (ROOT / first[1]).exists(), name


def test_demo_refuses_a_folder_with_other_things(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    done = run([sys.executable, str(ROOT / "demo.py"), f"--outdir={tmp_path}"], tmp_path)
    assert done.returncode == 2
    assert "holds other things" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
