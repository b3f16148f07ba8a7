# SPDX-License-Identifier: Apache-2.0
"""Compilation: once, whatever is killed; and nothing lost where there is no compiler."""
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.ops.cases import needs_compiler
from torch_utils.ops import build, compilation
from torch_utils.ops.compilation import BuildError, Source, Target

ROOT = Path(__file__).resolve().parents[2]

BUILD = """
import sys
from pathlib import Path
from torch_utils.ops import compilation
from torch_utils.ops.compilation import BuildError, Source, Target
folder = Path(sys.argv[1])
compilation.SOURCES = folder / "src"
try:
    print(compilation.library(Target("cpu", str(folder / "compiler"), ("-fPIC",), (Source("small.cpp"),), ())))
except BuildError as error:
    print("BuildError:", error)
"""
# Notes every call; waits while the file `slow` is there; fails while `broken` is.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec {compiler} --version
echo "$@" >> {folder}/calls
[ -e {folder}/slow ] && sleep 60
[ -e {folder}/broken ] && echo "small.cpp:1: error: broken" && exit 1
exec {compiler} "$@"
"""


@pytest.fixture
def folder(tmp_path):
    """A source, and a compiler that can be made slow or broken."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "small.cpp").write_text('extern "C" int answer() { return 42; }\n')
    (tmp_path / "compiler").write_text(COMPILER.format(folder=tmp_path, compiler=compilation.cpu_target().compiler))
    (tmp_path / "compiler").chmod(0o755)
    return tmp_path


def start(folder: Path) -> subprocess.Popen:
    env = {**os.environ, "STYLESAN_OPS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", BUILD, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=env)


def result(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def answer(path: str) -> int:
    return ctypes.CDLL(path).answer()


@needs_compiler
@pytest.mark.slow
def test_a_killed_build_stops_nothing(folder):
    (folder / "slow").touch()
    first, second = start(folder), start(folder)
    calls = folder / "calls"
    while not calls.is_file():
        time.sleep(0.05)
    first.kill()        # One of them compiles, the other waits; the lock of the dead one is free.
    first.communicate()
    (folder / "slow").unlink()
    begin = time.monotonic()
    third = start(folder)
    if second.poll() is None and calls.read_text().count(" -c ") == 1:
        second.kill()       # It was the second that compiled.
        second.communicate()
    path = result(third)
    assert time.monotonic() - begin < 60
    assert answer(path) == 42
    if second.returncode != -signal.SIGKILL:
        assert result(second) == path


@needs_compiler
@pytest.mark.slow
def test_processes_build_once(folder):
    processes = [start(folder) for _ in range(3)]
    paths = {result(process) for process in processes}
    assert len(paths) == 1
    assert answer(paths.pop()) == 42
    assert len((folder / "calls").read_text().splitlines()) == 2      # One source, one library.
    assert not list((folder / "cache").glob("tmp-*"))
    (folder / "src" / "small.cpp").write_text('extern "C" int answer() { return 43; }\n')
    assert answer(result(start(folder))) == 43


@needs_compiler
def test_two_kinds_of_machine_share_a_cache(folder, monkeypatch):
    """Each finds the library that was compiled for its own instructions, also where it has no compiler itself."""
    monkeypatch.setenv("STYLESAN_OPS_CACHE", str(folder / "cache"))
    monkeypatch.setattr(compilation, "SOURCES", folder / "src")
    paths = {}
    for machine in ("x86_64 avx2", "x86_64 avx2 avx512f"):
        monkeypatch.setattr(compilation, "_processor", lambda machine=machine: machine)
        without = Target("cpu", None, ("-fPIC",), (Source("small.cpp"),), ())
        with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
            compilation.library(without)
        source = Source("small.cpp")
        paths[machine] = compilation.library(Target("cpu", shutil.which("c++"), ("-fPIC",), (source,), ()))
        assert compilation.library(without) == paths[machine]
    assert len(set(paths.values())) == 2
    assert [answer(str(path)) for path in paths.values()] == [42, 42]
    for machine, path in paths.items():
        monkeypatch.setattr(compilation, "_processor", lambda machine=machine: machine)
        assert compilation.library(Target("cpu", None, ("-fPIC",), (Source("small.cpp"),), ())) == path


@pytest.mark.slow
@needs_compiler
def test_a_failure_is_one_line_and_not_repeated(folder, monkeypatch):
    (folder / "broken").touch()
    assert result(start(folder)) == "BuildError: compilation failed: small.cpp:1: error: broken"
    calls = (folder / "calls").read_text()
    assert result(start(folder)) == "BuildError: compilation failed: small.cpp:1: error: broken"
    assert (folder / "calls").read_text() == calls
    (folder / "broken").unlink()
    monkeypatch.setenv("STYLESAN_OPS_CACHE", str(folder / "cache"))
    monkeypatch.setattr(compilation, "SOURCES", folder / "src")
    target = Target("cpu", str(folder / "compiler"), ("-fPIC",), (Source("small.cpp"),), ())
    assert answer(str(compilation.library(target, retry=True))) == 42
    # Elsewhere, without any compiler, the library is found.
    assert compilation.library(Target("cpu", None, ("-fPIC",), (Source("small.cpp"),), ())).is_file()
    with pytest.raises(BuildError, match=r"no C\+\+ compiler on PATH"):
        compilation.library(Target("cpu", None, ("-other",), ("small.cpp",), ()))


def test_a_folder_that_cannot_be_written(folder, monkeypatch):
    (folder / "cache").write_text("in the way")
    monkeypatch.setenv("STYLESAN_OPS_CACHE", str(folder / "cache"))
    with pytest.raises(BuildError, match="cannot write to"):
        compilation.library(Target("cpu", sys.executable, (), ("small.cpp",), ()))

#----------------------------------------------------------------------------

USE = """
import torch
from torch_utils.ops import dispatch
from torch_utils.ops.filtered_lrelu import filtered_lrelu
print(dispatch.describe("cpu"))
print(list(filtered_lrelu(torch.ones(1, 1, 8, 8), up=2, down=2).shape))
"""


@pytest.mark.slow
def test_without_a_compiler(tmp_path):
    env = {"PATH": str(tmp_path), "STYLESAN_OPS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    for choice, code in (("auto", 0), ("native", 1)):
        done = subprocess.run([sys.executable, "-c", USE], env={**env, "STYLESAN_OPS": choice}, capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == code, done.stderr
        if code == 0:
            assert done.stdout == "ops: reference (no C++ compiler on PATH)\n[1, 1, 8, 8]\n"
            assert done.stderr == ""
        else:
            assert "STYLESAN_OPS=native: no cpu ops: no C++ compiler on PATH" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "strips"])
def test_cuda_sources_compile_and_link(tmp_path, monkeypatch, target):
    """For one generation of GPUs: it takes ten seconds for each. They run where there is one (tests marked gpu)."""
    target = compilation.cuda_target("90") if target == "cuda" else compilation.strips_target("t", torch.float32, "80")
    if target.compiler is None:
        pytest.skip("no nvcc: neither a CUDA toolkit nor the package nvidia-cuda-nvcc")
    monkeypatch.setenv("STYLESAN_OPS_CACHE", str(tmp_path))
    library = ctypes.CDLL(str(compilation.library(target)))
    general, fast = ("resample", "filtered_lrelu", "bias_act"), ("strips_22", "strips_42", "strips_24")
    names = general if target.kind == "cuda" else fast
    assert all(hasattr(library, f"stylesan_{name}") for name in names)


@pytest.mark.parametrize(("args", "told"), [
    (["--json"], "--json is a form of the report: add --report"),
    (["--report", "--arch=90"], "no nvcc: install a CUDA toolkit")])
def test_mistakes_of_the_report(args, told, monkeypatch):
    monkeypatch.setattr(compilation, "_find_program", lambda *args: None)
    done = CliRunner().invoke(build.main, args)
    assert done.exit_code == 2
    assert told in done.output
