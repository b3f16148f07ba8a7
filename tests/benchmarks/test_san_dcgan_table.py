"""The page of the kept runs of transport.san_dcgan is that of the runs beside it; files that are no runs are named."""
import runpy
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "san_dcgan_table.py"))


def run(*args):
    result = CliRunner().invoke(SCRIPT["main"], [str(arg) for arg in args])
    return result.exit_code, result.output


def test_the_committed_page_is_that_of_the_committed_runs(tmp_path):
    assert run(f"--dest={tmp_path / 'page.md'}")[0] == 0
    assert (tmp_path / "page.md").read_text() == (RESULTS / "transport_san_dcgan.md").read_text()


@pytest.mark.parametrize(("name", "content", "words"), [
    ("notes.txt", "x", "notes.txt: is no run"), ("hinge-gan-1.json", "{", "hinge-gan-1.json: damaged"),
    ("hinge-gan-0.json", "{}", "hinge-gan-0.json: damaged")])
def test_what_is_no_run_is_named(tmp_path, name, content, words):
    shutil.copytree(RESULTS / "transport_san_dcgan" / "batch", tmp_path / "runs" / "batch")
    (tmp_path / "runs" / "batch" / name).write_text(content)
    code, output = run(f"--runs={tmp_path / 'runs'}", f"--dest={tmp_path / 'page.md'}")
    assert code == 2
    assert words in output
    assert not (tmp_path / "page.md").exists()


def test_no_folder(tmp_path):
    code, output = run(f"--runs={tmp_path / 'x'}")
    assert code == 2
    assert f"--runs={tmp_path / 'x'}: is no folder: name the one" in output
