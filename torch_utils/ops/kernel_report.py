# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the fast CUDA programs: registers, memory, instructions per value. Needs no GPU.

The compiler is nvcc; the disassembler comes with a CUDA toolkit or with Triton, which PyTorch installs for CUDA.
"""
import collections
import concurrent.futures
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_utils.ops import compilation, strips
from torch_utils.ops.compilation import COMPILE_SECONDS, BuildError, first_message
from torch_utils.ops.descriptions import Strips

ARCHS = "80,90,100"             # Compute capabilities of three generations of GPUs.
PROCESSES = 2                   # Compilers at a time.
MODES = ("forward", "forward and codes", "gradient")        # As `StylesanMode` counts them.
KEYS = ("kernel", "arch", "registers", "spill_bytes", "local_bytes", "instructions_per_output", "ffma_share")

_MODE = re.compile(r"Lb[01]ELb[01]EEELi(\d)ELi")         # In the name of a program it stands behind the rates.
_RESOURCES = re.compile(r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
                        r"(\d+) bytes spill loads.*?Used (\d+) registers", re.DOTALL)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);")

#----------------------------------------------------------------------------

def make_report(archs: Sequence[str], dtypes: Sequence[torch.dtype] = tuple(strips.TYPES),
                kinds: Sequence[Strips] = tuple(strips.KINDS.values())) -> list[dict[str, Any]]:
    """A row (KEYS) for every program, type and architecture.

    Instructions are those of the loop that goes down the rows, all of them, also where a border skips some. They are
    counted per value of the layer's result; for a gradient these are the values that it starts from. `ffma_share` is
    the part of them that multiplies and adds single-precision numbers.

    Args:
        archs: Compute capabilities: ["80", "90"].

    Raises:
        BuildError: the compiler or the disassembler is missing or fails.
    """
    compiler = compilation.cuda_target(archs[0]).compiler
    if compiler is None:
        raise BuildError("no nvcc: install a CUDA toolkit, or nvidia-cuda-nvcc, -crt and nvidia-nvvm from PyPI")
    disassembler = find_disassembler(compiler)
    if disassembler is None:
        raise BuildError("no cuobjdump: install a CUDA toolkit, or triton from PyPI")
    jobs = [(kind, dtype, arch) for arch in archs for dtype in dtypes for kind in kinds]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(PROCESSES) as pool:
        found = pool.map(lambda job: list(_rows(compiler, disassembler, Path(folder), *job)), jobs)
        return [row for rows in found for row in rows]


def sources_hash() -> str:
    """A hash of all that decides what is compiled but the compiler."""
    content = hashlib.sha256(repr((compilation.CUDA_FLAGS, strips.KINDS)).encode())
    for path in sorted(compilation.SOURCES.iterdir()):
        if path.suffix in (".h", ".cu"):
            content.update(path.name.encode() + b"\0" + path.read_bytes())
    return content.hexdigest()[:16]


def find_disassembler(compiler: str) -> str | None:
    """Path of cuobjdump: beside the compiler, on PATH, or Triton's."""
    places = [Path(compiler).with_name("cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((str(path) for path in places if os.access(path, os.X_OK)), shutil.which("cuobjdump"))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, in columns."""
    cells = [KEYS, *(tuple(str(row[key]) for key in KEYS) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(KEYS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in cells)

#----------------------------------------------------------------------------

def _rows(compiler: str, disassembler: str, folder: Path, kind: Strips, dtype: torch.dtype,
          arch: str) -> Iterator[dict[str, Any]]:
    source = compilation.strips_source(kind, dtype)
    result = folder / f"{kind.name}-{strips.TYPES[dtype]}-{arch}.cubin"
    flags = [flag for flag in compilation.CUDA_FLAGS if flag != "-cudart=none"]
    told = _run([compiler, *flags, *source.flags, f"-arch=sm_{arch}", "-cubin", "-Xptxas=-v",
                 str(compilation.SOURCES / source.file), "-o", str(result)])
    resources = {name: [int(number) for number in numbers] for name, *numbers in _RESOURCES.findall(told)}
    for part in _run([disassembler, "-sass", str(result)]).split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        stack, stores, loads, registers = resources[name]
        number = _MODE.search(name)
        if number is None:
            raise compilation.BuildError(f"a program of {source.file} does not say its mode in its name: {name}")
        mode = MODES[int(number[1])]
        loop = _main_loop(part)
        counts = collections.Counter(loop)
        yield {"kernel": f"filtered_lrelu {kind.describe()} {str(dtype).removeprefix('torch.')} {mode}",
               "arch": f"sm_{arch}", "registers": registers, "spill_bytes": stores + loads,
               "local_bytes": max(stack, 4 * (counts["LDL"] + counts["STL"])), "instructions_per_output":
                   round(len(loop) / kind.values_per_turn, 1), "ffma_share": round(counts["FFMA"] / len(loop), 3)}


def _main_loop(text: str) -> list[str]:
    """Opcodes of the loop with the most multiply-adds: from where a branch leads back to, up to the branch."""
    instructions = [(int(place, 16), opcode, rest) for place, opcode, rest in _INSTRUCTION.findall(text)]
    position = {place: i for i, (place, _, _) in enumerate(instructions)}
    loops = []
    for i, (place, opcode, rest) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)", rest) if opcode == "BRA" else None
        if target is not None and int(target[1], 16) < place:
            loops.append([name for _, name, _ in instructions[position[int(target[1], 16)] : i + 1]])
    if not loops:
        raise BuildError("the disassembly of a program shows no loop")
    return max(loops, key=lambda loop: loop.count("FFMA"))


def _run(command: list[str]) -> str:
    """What a program prints. Raises BuildError with its first line that looks like a message."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=COMPILE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(command[0]).name}: {error}") from None
    if done.returncode:
        raise BuildError(f"{Path(command[0]).name}: {first_message(done.stdout + done.stderr)}")
    return done.stdout + done.stderr
