# SPDX-License-Identifier: Apache-2.0
"""Parsers and the command class that every script shares."""
import errno
import re
from collections.abc import Callable
from typing import Any, TypeVar

import click

from dnnlib.errors import UserError

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

#----------------------------------------------------------------------------

class _Mistake(click.ClickException):
    """One line on stderr, and the exit code of mistakes that the user can mend."""

    def __init__(self, message: str, exit_code: int = UserError.exit_code):
        super().__init__(message)
        vars(self)["exit_code"] = exit_code         # click has one per class.


class Command(click.Command):
    """A click command that turns `UserError` and a full disk into one line on stderr and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as err:
            raise _Mistake(" ".join(str(err).split("\n")), err.exit_code) from err
        except OSError as err:
            if err.errno != errno.ENOSPC:
                raise
            raise _Mistake(f"{err.filename or 'writing a file'}: {err.strerror}: make room, then run the same command "
                           "again") from err

#----------------------------------------------------------------------------

class IntList(click.ParamType):
    """'1,2,5-10' -> [1, 2, 5, 6, 7, 8, 9, 10]."""

    name = "[LIST|RANGE]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        if isinstance(value, list):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
            if match is None:
                self.fail(f"{value!r} is not a list such as 0,3,5-10", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"the range {part.strip()!r} runs backwards", param, ctx)
            numbers.extend(range(first, last + 1))
        return numbers


class IntOrAuto(click.ParamType):
    """'8' -> 8; 'auto' stays."""

    name = "INT|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == "auto":
            return "auto"
        return int(click.IntRange(min=1).convert(value, param, ctx))


class StrList(click.ParamType):
    """'a,b' -> ['a', 'b']; '' or 'none' -> []."""

    name = "[NAME,NAME...|none]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[str]:
        if isinstance(value, list):
            return value
        if value.strip().lower() in ("", "none"):
            return []
        return [part.strip() for part in value.split(",") if part.strip()]


class Vec2(click.ParamType):
    """'0.3,1' -> (0.3, 1.0)."""

    name = "X,Y"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        if isinstance(value, tuple):
            return value
        try:
            x, y = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a pair of numbers such as 0.3,1", param, ctx)
        return x, y


class Resolution(click.ParamType):
    """'32' or '32x32' -> 32."""

    name = "N|WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", value)
        if match is None or (match[2] and match[1] != match[2]) or int(match[1]) < 1:
            self.fail(f"{value!r} is not a square size such as 32 or 32x32", param, ctx)
        return int(match[1])

#----------------------------------------------------------------------------

def precision_option() -> Callable[[Decorated], Decorated]:
    """The `--precision` option, the same for every script: keys of `training.networks_stylegan3.PRECISIONS`."""
    return click.option("--precision", metavar="auto|fp32|bf16", type=click.Choice(["auto", "fp32", "bf16"]),
                        default="auto", show_default=True, help="Of the generator; auto: fp16 on GPUs in the layers "
                        "that are trained so, else fp32; bf16: in these layers, faster on processors that have it")


def device_option() -> Callable[[Decorated], Decorated]:
    """The `--device` option, the same for every script; resolve it with `torch_utils.misc.select_device`."""
    return click.option("--device", metavar="auto|cuda|cpu|mps", type=click.Choice(["auto", "cuda", "cpu", "mps"]),
                        default="auto", show_default=True, help="Where to compute; auto takes a GPU if there is one")
