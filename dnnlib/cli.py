# SPDX-License-Identifier: Apache-2.0
"""Types of options and the command class that every script shares.

Every number, seed and path on a command line has its type here, so that what no script can use is refused in one place:
numbers that are not finite, numbers without end, addresses where a file must lie on this machine.
"""
import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from dnnlib.errors import UserError
from dnnlib.util import existing_spelling, is_address, is_special, printable

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

MAX_FLOAT = 3.4e38          # The largest float32: beyond it a tensor holds infinity.
MAX_INT = 2 ** 31 - 1
MAX_SEED = 2 ** 64 - 1      # What PyTorch and the counter-based generators take.
MAX_STRENGTH = 1000         # Of an edit, in units of its direction.
MAX_PSI = 1000              # Of truncation. Beyond, and beyond the next two, there is no precision left.
MAX_SHIFT = 1000            # Image widths that a picture is shifted.
MAX_TURN = 360_000          # Degrees that it is turned.
MAX_LIST = 1_000_000        # Numbers in a list on the command line.

#----------------------------------------------------------------------------
# The command.

# What helps against the errors that a path on a command line can meet.
REMEDIES = {
    errno.ENOENT: "name one that is there",
    errno.ENOTDIR: "a part of this path is a file: name a path that leads through folders",
    errno.EISDIR: "this is a folder: name a file",
    errno.EEXIST: "something else has this name: name another place",
    errno.EACCES: "name a place that you may read and write",
    errno.EPERM: "name a place that you may read and write",
    errno.EROFS: "name a place on a disk that can be written to",
    errno.ENAMETOOLONG: "name a shorter path",
    errno.ELOOP: "its links lead in a circle: name the file itself",
    errno.ENOSPC: "make room, then run the same command again",
    errno.EDQUOT: "your share of the disk is used up: make room, then run the same command again",
    errno.EFBIG: "name a place on a disk that takes large files",
    errno.EIO: "the disk fails: check it, then run the same command again",
    errno.ESTALE: "the server of this disk lost it: mount it again, then run the same command again",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files: close other programs",
}
# Errors that belong to a file also where Python does not say which file it was.
WITHOUT_NAME = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, errno.EROFS, errno.EMFILE,
                          errno.ENFILE})


class _Mistake(click.ClickException):
    """One line on stderr, and the exit code of mistakes that the user can mend."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code):
        super().__init__(message)
        vars(self)["exit_code"] = exit_code         # click has one per class.


class Command(click.Command):
    """A click command that turns `UserError`, and an error of a file, into one line on stderr and exit code 2."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _print_every_name()
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            _refuse_lost_files(ctx)
            return super().invoke(ctx)
        except UserError as err:
            raise _Mistake(printable(str(err)), err.exit_code) from err
        except OSError as err:
            if (line := _explain(err, ctx)) is None:
                raise
            raise _Mistake(printable(line)) from err


def _print_every_name() -> None:
    """Names of files and classes may have letters that the terminal's encoding lacks: they are shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _explain(error: OSError, ctx: click.Context) -> str | None:
    """An error of a file in a line that names the option, the path and a remedy; None where no file is concerned."""
    name = error.filename if isinstance(error.filename, str | bytes | os.PathLike) else None
    if error.errno is None or (name is None and error.errno not in WITHOUT_NAME):
        return None
    path = None if name is None else os.fsdecode(name)
    in_the_way = error.errno in (errno.EEXIST, errno.ENOTDIR)
    what = "writing a file" if path is None else _with_option(path, ctx, in_the_way)
    return f"{what}: {error.strerror}: {REMEDIES.get(error.errno, 'name another place')}"


def _refuse_lost_files(ctx: click.Context) -> None:
    """Refuse to write a file in the place of one that the same command reads or writes. Raises UserError."""
    named = list(_named_paths(ctx))
    for option, path in named:
        for other, name in named:
            if isinstance(option.type, OutputFile) and other is not option and _is_same_file(path, name):
                raise UserError(f"{_flag(option, path)}: is the file of {_flag(other, name)}, too, which would get "
                                "lost: name another file")


def _is_same_file(first: str, second: str) -> bool:
    """Whether two paths lead to one place."""
    if os.path.isfile(first) and os.path.isfile(second):
        return os.path.samefile(first, second)
    return os.path.realpath(first) == os.path.realpath(second)


def _named_paths(ctx: click.Context) -> Iterator[tuple[click.Option, str]]:
    """The options that name paths, with each path that they name."""
    for param in ctx.command.params:
        if isinstance(param, click.Option) and isinstance(param.type, PathType | PathList):
            value = ctx.params.get(param.name or "")
            yield from ((param, path) for path in ([value] if isinstance(value, str) else value or ()))


def _flag(option: click.Option, value: str) -> str:
    """'--outdir=runs'."""
    return f"{max(option.opts, key=len)}={value}"


def _with_option(path: str, ctx: click.Context, in_the_way: bool) -> str:
    """'--outdir=runs: runs/00000': the path, with the option that names it, a folder above it, or a place below it.

    Args:
        path: The path.
        ctx: Has the options.
        in_the_way: Whether the path hinders another one, so that a place below it comes first.
    """
    exact: list[str] = []
    above: list[tuple[int, str]] = []
    below: list[str] = []
    for option, value in _named_paths(ctx):
        flag = _flag(option, value)
        if Path(value) == Path(path):
            exact.append(flag)
        elif Path(value) in Path(path).parents:
            above.append((len(value), f"{flag}: {path}"))
        elif Path(path) in Path(value).parents:
            below.append(f"{flag}: {path}")
    if in_the_way and len(below) == 1:
        return below[0]
    if exact:
        return exact[0]
    if above:
        return max(above)[1]
    return below[0] if len(below) == 1 else path


def tell(notes: Iterable[str]) -> None:
    """Tell people what they may not expect: a line for each note, on stderr."""
    for note in notes:
        click.echo(printable(f"NOTE: {note}"), err=True)

#----------------------------------------------------------------------------
# Numbers.

class Number(click.ParamType):
    """A finite number: neither nan nor inf, nor one that only a float64 holds."""

    name = "FLOAT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(click.FLOAT.convert(value, param, ctx))
        if not abs(number) <= MAX_FLOAT:        # Also nan.
            self.fail(f"{value} is not a finite number (at most {MAX_FLOAT:g})", param, ctx)
        return number


class FloatRange(click.FloatRange):
    """A finite number with a bound, which --help shows. Without a bound it would show `x<=None`: take `Number`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        return float(super().convert(Number().convert(value, param, ctx), param, ctx))


class WholeNumber(click.ParamType):
    """A whole number of 32 bits.

    Args:
        highest: The largest number that is taken, also with a minus before it.
    """

    name = "INT"

    def __init__(self, highest: int = MAX_INT):
        self.highest = highest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = int(click.INT.convert(value, param, ctx))
        if abs(number) > self.highest:
            self.fail(f"{value} is too large: at most {self.highest}", param, ctx)
        return number


class Psi(FloatRange):
    """Truncation."""

    def __init__(self) -> None:
        super().__init__(min=-MAX_PSI, max=MAX_PSI)


class Angle(FloatRange):
    """Degrees."""

    def __init__(self) -> None:
        super().__init__(min=-MAX_TURN, max=MAX_TURN)


class IntRange(click.IntRange):
    """A whole number of 32 bits with a bound, which --help shows. Without a bound take `WholeNumber`."""

    highest = MAX_INT

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return WholeNumber(self.highest).convert(super().convert(value, param, ctx), param, ctx)


class Seed(IntRange):
    """A random seed: 0 to 2^64 - 1."""

    highest = MAX_SEED

    def __init__(self) -> None:
        super().__init__(min=0)


class IntList(click.ParamType):
    """'1,2,5-10' -> [1, 2, 5, 6, 7, 8, 9, 10].

    Args:
        highest: The largest number that is taken.
    """

    name = "[LIST|RANGE]"

    def __init__(self, highest: int = MAX_INT):
        self.highest = highest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        ranges: list[range] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{1,40})(?:-(\d{1,40}))?\s*", part)
            if match is None:
                self.fail(f"{value!r} is not a list such as 0,3,5-10", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"the range {part.strip()!r} runs backwards", param, ctx)
            if last > self.highest:
                self.fail(f"{last} is too large: at most {self.highest}", param, ctx)
            ranges.append(range(first, last + 1))
        if (count := sum(numbers.stop - numbers.start for numbers in ranges)) > MAX_LIST:
            self.fail(f"{value!r} is {count} numbers, at most {MAX_LIST} are taken at once: give a part of them",
                      param, ctx)
        return [number for numbers in ranges for number in numbers]


class IntOrAuto(click.ParamType):
    """'8' -> 8; 'auto' stays."""

    name = "INT|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        return IntRange(min=1).convert(value, param, ctx)


class Vec2(click.ParamType):
    """'0.3,1' -> (0.3, 1.0).

    Args:
        largest: What neither number may exceed, nor its negative.
    """

    name = "X,Y"

    def __init__(self, largest: float = MAX_FLOAT):
        self.largest = largest

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        parts = value.split(",")
        if len(parts) != 2:
            self.fail(f"{value!r} is not a pair of numbers such as 0.3,1", param, ctx)
        x, y = (FloatRange(-self.largest, self.largest).convert(part, param, ctx) for part in parts)
        return x, y


class Grid(click.ParamType):
    """'4x3' -> (4, 3): columns and rows."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"\s*(\d{1,4})\s*[xX]\s*(\d{1,4})\s*", value)
        if match is None or 0 in (columns_rows := (int(match[1]), int(match[2]))):
            self.fail(f"{value!r} is not columns x rows such as 4x3", param, ctx)
        return columns_rows


class Edit(click.ParamType):
    """'smile:1.5' -> ('smile', 1.5): the name of a direction, which may hold colons, and a strength."""

    name = "NAME:STRENGTH"
    example = "smile:1.5"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, colon, strength = value.rpartition(":")
        if not colon or not name:
            self.fail(f"{value!r} is not the name of a direction and a strength such as {self.example}", param, ctx)
        return name, self.strength(strength, param, ctx)

    def strength(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What stands behind the colon, as a number."""
        return FloatRange(min=-MAX_STRENGTH, max=MAX_STRENGTH).convert(value, param, ctx)


class EditSweep(Edit):
    """'smile:-2,2' -> ('smile', (-2.0, 2.0))."""

    name = "NAME:FROM,TO"
    example = "smile:-2,2"

    def strength(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        first, last = Vec2().convert(value, param, ctx)
        return super().strength(str(first), param, ctx), super().strength(str(last), param, ctx)

#----------------------------------------------------------------------------
# Names and paths.

class StrList(click.ParamType):
    """'a,b' -> ['a', 'b']; '' or 'none' -> []."""

    name = "[NAME,NAME...|none]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if isinstance(value, list):
            return value
        if value.strip().lower() in ("", "none"):
            return []
        return [part.strip() for part in value.split(",") if part.strip()]


class PathType(click.ParamType):
    """A file or folder: '~/x' is below the home folder, and a name that is there is found in both forms of Unicode.

    What is neither file nor folder is refused here, for reading as for writing.
    A name may stand beside paths ('data|random|FILE'): it passes unchanged.

    Args:
        addresses: Also take https:// and hf:// addresses, which `dnnlib.download.local_file` turns into a file.
    """

    name = "PATH"

    def __init__(self, addresses: bool = False):
        self.addresses = addresses

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        text: str = os.fspath(value)
        if not text.strip():
            self.fail("is empty: name a file or folder (a variable of the shell may be unset)", param, ctx)
        if "\0" in text:
            self.fail(f"{text!r} has a zero byte, which no path has", param, ctx)
        if is_address(text):
            if self.addresses and text.startswith(("https://", "http://", "hf://")):
                return text
            self.fail(f"{text} is an address, and here a file or folder on this machine is needed: "
                      "download or mount it first", param, ctx)
        path = os.path.expanduser(text)
        if path.startswith("~") and not os.path.lexists(path):
            self.fail(f"{text}: there is no such home folder: write ./{text} if the name begins with ~", param, ctx)
        with contextlib.suppress(OSError):      # Whoever opens it says what is wrong.
            path = existing_spelling(path)
        if is_special(path):
            self.fail(f"{text} is a pipe, a socket or a device: name an ordinary file or a folder (what comes out of "
                      "a pipe can be written to a file first)", param, ctx)
        return path


class OutputFile(PathType):
    """A file that is written, or a folder that a file name stands for: no other option may name it."""


class PathList(StrList):
    """Names and paths, separated by commas, which files that are there may have; each becomes what `PathType` makes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        parts = super().convert(value, param, ctx)
        if not isinstance(value, list) and parts:
            parts = _joined_names(value.split(","))
        return [PathType().convert(part, param, ctx) for part in parts]


def _joined_names(parts: list[str]) -> list[str]:
    """The names of a list that was cut at its commas: where a part is no file, the longest one that begins with it."""
    found: list[str] = []
    while parts:
        lengths = [1, *range(len(parts), 1, -1)]
        names = [",".join(parts[:length]).strip() for length in lengths]
        there = next((i for i, name in enumerate(names) if name and os.path.lexists(os.path.expanduser(name))), 0)
        found += [names[there]] if names[there] else []
        parts = parts[lengths[there]:]
    return found

#----------------------------------------------------------------------------

def precision_option() -> Callable[[Decorated], Decorated]:
    """The `--precision` option, the same for every script: keys of `training.networks_stylegan3.PRECISIONS`."""
    return click.option("--precision", metavar="auto|fp32|bf16", type=click.Choice(["auto", "fp32", "bf16"]),
                        default="auto", show_default=True, help="How the generator computes; auto: fp16 on "
                        "GPUs in the layers that are trained so, else fp32; bf16: in these layers, faster on "
                        "processors that have it")


def edit_options() -> Callable[[Decorated], Decorated]:
    """The options `--directions` and `--edit`, the same for every script that shows pictures."""
    def add(command: Decorated) -> Decorated:
        files = click.option("--directions", metavar="FILE,FILE...", type=PathList(), default="",
                             help="Files of directions for --edit, as directions.py makes them")
        edits = click.option("--edit", "edits", type=Edit(), multiple=True, help="Move the pictures along a "
                             "direction, after truncation, by so many of its units, which are standard deviations of w "
                             "unless it belongs to a text; may be given several times")
        return files(edits(command))
    return add


def device_option() -> Callable[[Decorated], Decorated]:
    """The `--device` option, the same for every script; resolve it with `torch_utils.misc.select_device`."""
    return click.option("--device", metavar="auto|cuda|cpu|mps", type=click.Choice(["auto", "cuda", "cpu", "mps"]),
                        default="auto", show_default=True, help="Where to compute; auto takes a GPU if there is one")
