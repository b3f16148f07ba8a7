# SPDX-License-Identifier: Apache-2.0
"""Compile native code, at first use or ahead of time (`build`), and find what is compiled already.

A library is stored as `<kind>-<key>-<compiler>/library.so` in $STYLESAN_OPS_CACHE (`ops` in the cache folder), where
the key covers the sources, the flags, PyTorch and the processor or GPU. It is made in a folder of its own and renamed,
so that one is either whole or absent. Processes that need the same library wait for a lock which the operating system
frees when its holder ends, however it ends.
"""
import contextlib
import dataclasses
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from dnnlib.download import cache_dir
from dnnlib.util import file_lock
from torch_utils.ops import strips
from torch_utils.ops.descriptions import Strips

SOURCES = Path(__file__).resolve().parent / "csrc"
KINDS = ("cpu", "cuda")
COMPILE_SECONDS = 600       # A compiler that takes longer is stopped.
WAIT_SECONDS = 900          # For another process that compiles the same; then this one does it, too.
FAILURE_SECONDS = 120       # Other processes of a run do not repeat a failure that is younger.
CPU_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi")
CUDA_FLAGS = ("-O3", "-std=c++17", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr", "-cudart=none")


class BuildError(Exception):
    """Why there is no library, in one line."""


def ops_cache() -> Path:
    """The folder of compiled libraries."""
    return Path(os.environ.get("STYLESAN_OPS_CACHE") or cache_dir() / "ops")

#----------------------------------------------------------------------------
# What is compiled with what.

@dataclasses.dataclass(frozen=True)
class Source:
    """One call of the compiler. A file can be compiled several times with different definitions."""

    file: str
    flags: tuple[str, ...] = ()
    name: str = ""              # The object file has this name, or that of the source.

    @property
    def object(self) -> str:
        return f"{self.name or Path(self.file).stem}.o"


@dataclasses.dataclass(frozen=True)
class Target:
    """One library of one kind for one machine."""

    kind: str
    compiler: str | None        # Path; None where there is none.
    flags: tuple[str, ...]
    sources: tuple[Source, ...]
    link: tuple[str, ...]

    @property
    def name(self) -> str:
        """The part of the folder's name that does not depend on the compiler."""
        content = hashlib.sha256()
        for path in sorted(SOURCES.iterdir()):
            content.update(path.name.encode() + b"\0" + path.read_bytes())
        machine = _processor() if self.kind == "cpu" else ""
        told = self.kind, self.flags, self.sources, self.link, torch.__version__, sys.platform, machine
        content.update(repr(told).encode())
        return f"{self.kind}-{content.hexdigest()[:16]}"

    def folder(self) -> Path:
        """Where the library is. Without a compiler one that was made by any."""
        root = ops_cache()
        if self.compiler is None:
            return next((path for path in sorted(root.glob(f"{self.name}-*")) if (path / LIBRARY).is_file()),
                        root / f"{self.name}-none")
        return root / f"{self.name}-{_compiler_version(self.compiler)}"


LIBRARY = "library.so"


@functools.cache
def _processor() -> str:
    """The machine, its C library and the instructions it has: a folder may be shared by different ones."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return " ".join([platform.machine(), *platform.libc_ver(), *sorted(line.split(":", 1)[1].split())])
    return " ".join([platform.machine(), *platform.libc_ver(), platform.processor()])


@functools.cache
def _compiler_version(compiler: str) -> str:
    """A short hash of what the compiler says about itself."""
    try:
        text = subprocess.run([compiler, "--version"], capture_output=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{compiler} --version failed: {error}") from None
    return hashlib.sha256(compiler.encode() + text).hexdigest()[:8]


def _find_program(names: tuple[str, ...], places: tuple[Path, ...] = ()) -> str | None:
    for place in places:
        if os.access(place, os.X_OK):
            return str(place)
    return next(filter(None, map(shutil.which, names)), None)


def cpu_target() -> Target:
    """C++ for this machine's processor. $CXX names another compiler."""
    torch_root = Path(torch.__file__).parent
    flags = (*CPU_FLAGS, "-march=native", f"-I{torch_root}/include")
    # No OpenMP library is named: that of PyTorch is taken, so that there is one set of threads.
    link = (f"-L{torch_root}/lib", "-ltorch_cpu", "-lc10")
    compiler = _find_program((os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++"))
    return Target("cpu", compiler, flags, (Source("cpu.cpp"), Source("threads.cpp")), link)


def cuda_target(archs: str | None = None) -> Target:
    """All operations for this machine's GPU, or for `archs` ('80,90')."""
    return _cuda_target("cuda", (Source("cuda.cu"),), archs)


def strips_target(family: str, dtype: torch.dtype, archs: str | None = None) -> Target:
    """The fast programs of filtered_lrelu for one family of rates and one type: a run needs few of them."""
    kind = f"cuda-{family}-{str(dtype).removeprefix('torch.')}"
    sources = tuple(strips_source(k, dtype) for k in strips.KINDS.values() if k.family == family)
    return _cuda_target(kind, sources, archs)


def strips_source(kind: Strips, dtype: torch.dtype) -> Source:
    """The programs of one kind of layer."""
    flags = f"-DSTYLESAN_STRIPS={kind.name}", f"-DSTYLESAN_TYPE={strips.TYPES[dtype]}"
    return Source("strips.cu", flags, f"strips-{kind.name}")


def _cuda_target(kind: str, sources: tuple[Source, ...], archs: str | None) -> Target:
    """The compiler: $CUDA_HOME's, pip's, or on PATH."""
    if archs is None:
        major, minor = torch.cuda.get_device_capability()
        archs = f"{major}{minor}"
    places = [Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc"] if os.environ.get("CUDA_HOME") else []
    compiler = _find_program(("nvcc",), (*places, *_pip_compilers()))
    flags = (*CUDA_FLAGS, *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs.split(",")))
    runtime = tuple(f"-Xlinker={path}" for path in _cuda_runtimes(compiler)[:1])
    return Target(kind, compiler, flags, sources, ("-cudart=none", "-Xlinker=--no-as-needed", *runtime))


def all_targets(kind: str, archs: str | None) -> list[Target]:
    """Everything there is to compile for a kind of device."""
    if kind == "cpu":
        return [cpu_target()]
    return [cuda_target(archs), *(strips_target(family, dtype, archs)
                                  for family in strips.FAMILIES for dtype in strips.TYPES)]


def _pip_compilers() -> tuple[Path, ...]:
    """nvcc from the packages nvidia-cuda-nvcc, -crt and nvidia-nvvm."""
    return tuple(Path(torch.__file__).parents[1].glob("nvidia/*/bin/nvcc"))


def _cuda_runtimes(compiler: str | None) -> list[Path]:
    """libcudart under its versioned name, which is all that pip installs; PyTorch's own comes first."""
    folders = list(Path(torch.__file__).parents[1].glob("nvidia/*/lib"))
    if compiler:
        root = Path(compiler).resolve().parents[1]
        folders += [root / "lib64", root / "lib"]
    return [path for folder in folders for path in sorted(folder.glob("libcudart.so.[0-9]*"))]

#----------------------------------------------------------------------------
# Compile, one process at a time. Where locks do not work processes may do it side by side; the first result is kept.

def library(target: Target, retry: bool = False) -> Path:
    """Path of the shared library, compiled if it is not there.

    Args:
        retry: Compile although another process failed a moment ago.

    Raises:
        BuildError: it is not there and cannot be made.
    """
    folder = target.folder()
    if (folder / LIBRARY).is_file():
        return folder / LIBRARY
    if target.compiler is None:
        raise BuildError("no C++ compiler on PATH" if target.kind == "cpu" else "no nvcc on PATH")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_suffix(".lock"), WAIT_SECONDS):
            if not (folder / LIBRARY).is_file():
                failure = folder.with_suffix(".failed")
                if not retry and failure.is_file() and time.time() - failure.stat().st_mtime < FAILURE_SECONDS:
                    raise BuildError(failure.read_text(encoding="utf-8"))
                _compile(target, folder, failure)
    except OSError as error:
        raise BuildError(f"cannot write to {folder.parent}: {error.strerror or error}") from None
    return folder / LIBRARY


def _compile(target: Target, folder: Path, failure: Path) -> None:
    """Compile in a temporary folder and rename it to `folder`."""
    for left_over in folder.parent.glob(f"tmp-{folder.name}-*"):    # Processes that were killed.
        # Where locks do not work another process may be at it.
        with contextlib.suppress(OSError):
            if time.time() - left_over.stat().st_mtime > COMPILE_SECONDS:
                shutil.rmtree(left_over, ignore_errors=True)
    print(f"Compiling the native {target.kind} ops (once, less than a minute) ...", file=sys.stderr, flush=True)
    temp = Path(tempfile.mkdtemp(prefix=f"tmp-{folder.name}-", dir=folder.parent))
    try:
        (temp / "build.ninja").write_text(_ninja_file(target), encoding="utf-8")
        _run_ninja(temp)
        for path in [*temp.glob("*.o"), *temp.glob(".ninja*")]:
            path.unlink()
        with contextlib.suppress(OSError):      # Another process without locks may have been first.
            temp.rename(folder)
        failure.unlink(missing_ok=True)
    except BuildError as error:
        failure.write_text(str(error), encoding="utf-8")
        raise
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _ninja_file(target: Target) -> str:
    def quoted(words: tuple[str, ...]) -> str:
        return " ".join(f"'{word}'".replace("$", "$$") for word in words)
    def path(name: Path | str) -> str:
        return str(name).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
    assert target.compiler is not None, "`library` has refused targets without a compiler"
    compiler = quoted((target.compiler,))
    edges = [f"build {source.object}: compile {path(SOURCES / source.file)}\n  more = {quoted(source.flags)}"
             for source in target.sources]
    return "\n".join([
        f"rule compile\n  command = {compiler} {quoted(target.flags)} $more -c $in -o $out",
        f"rule link\n  command = {compiler} -shared $in -o $out {quoted(target.link)}",
        *edges, f"build {LIBRARY}: link {' '.join(source.object for source in target.sources)}", ""])


def _run_ninja(folder: Path) -> None:
    """Raises BuildError with the first line that looks like a message of the compiler."""
    ninja = shutil.which("ninja")
    command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
    try:
        done = subprocess.run([*command, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              encoding="utf-8", errors="replace", timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired:
        raise BuildError(f"the compiler took more than {COMPILE_SECONDS} s") from None
    if done.returncode:
        raise BuildError(f"compilation failed: {first_message(done.stdout)}")


def first_message(text: str) -> str:
    """The first line of a compiler's output that looks like a message."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith(("ninja: Entering", "[", "FAILED:"))] or lines
    words = "error", "fatal", "not found", "no module"
    told = [line for line in lines if any(word in line.lower() for word in words)]
    return (told or lines or ["no message"])[0][:300]
