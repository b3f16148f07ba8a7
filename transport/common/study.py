# SPDX-License-Identifier: Apache-2.0
"""The frame of all studies: settings as frozen dataclasses, a command line made of them, numbers as one JSON line.

A study is a frozen `Config`, a function `run(config) -> Result`, and a function that draws a result:

    @dataclasses.dataclass(frozen=True)
    class Config:
        steps: int = option(10_000, "Iterations of the critic")

        def quick(self) -> "Config":                # The same study in under two minutes on two cores.
            return dataclasses.replace(self, steps=500)

    main = study_command("congested", Config, run, draw)

A module `transport.<name>`, or a package of this name with a `__main__`, calls `main`.
"""
import dataclasses
import json
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, Self

import click
import torch

from dnnlib import UserError, cli
from dnnlib.util import atomic_write_text
from torch_utils import misc

#----------------------------------------------------------------------------

class StudyConfig(Protocol):
    """Settings of a study: a frozen dataclass whose fields are made with `option`."""

    def quick(self) -> Self:
        """These settings, made smaller: under two minutes on two cores."""
        ...


class StudyResult(Protocol):
    """The findings of a study: numbers and arrays as attributes of a dataclass."""

    def headline(self) -> dict[str, Any]:
        """The numbers to remember, as plain values: the JSON line."""
        ...


Draw = Callable[[Any, Path], list[Path]]        # (result, folder) -> the figures written.


def option(default: Any, text: str, *, choices: tuple[str, ...] = (), min: float | None = None,     # noqa: A002
           max: float | None = None, open_min: bool = False, open_max: bool = False) -> Any:        # noqa: A002
    """A field of a `Config`: its default, what it is (for --help), and what it may be.

    Args:
        default: The value, immutable.
        text: One line with the unit.
        choices: Allowed words.
        min: Smallest number allowed; with `open_min` it must be above that.
        max: Largest number allowed; with `open_max` it must be below that.
    """
    return dataclasses.field(default=default, metadata={
        "text": text, "choices": choices, "min": min, "max": max, "open_min": open_min, "open_max": open_max})


def check(config: Any) -> None:
    """Check that every number of a `Config` is in its range and every word among its choices; `run` begins with this.

    Raises:
        UserError: names the option, the value and what it may be.
    """
    for field in dataclasses.fields(config):
        value, rule, flag = getattr(config, field.name), field.metadata, _flag(field.name)
        if rule.get("choices") and value is not None and value not in rule["choices"]:
            raise UserError(f"{flag}={value}: choose from {', '.join(rule['choices'])}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            if not math.isfinite(value):
                raise UserError(f"{flag}={value}: must be a finite number")
            low, high = rule.get("min"), rule.get("max")
            if low is not None and (value <= low if rule["open_min"] else value < low):
                raise UserError(f"{flag}={value}: must be {'above' if rule['open_min'] else 'at least'} {low}")
            if high is not None and (value >= high if rule["open_max"] else value > high):
                raise UserError(f"{flag}={value}: must be {'below' if rule['open_max'] else 'at most'} {high}")


def seeded(seed: int, stream: str) -> torch.Generator:
    """A generator on the CPU for one purpose: results do not depend on what else was drawn, or on the device."""
    from zlib import crc32
    return torch.Generator().manual_seed(crc32(f"{stream}/{seed}".encode()))

#----------------------------------------------------------------------------

def study_command(name: str, config_class: type, run: Callable[[Any], Any], draw: Draw) -> click.Command:
    """The command `python -m transport.<name>`: an option per field of the settings, --quick and --outdir.

    It prints one JSON line on stdout, and with --outdir writes figures and result.json. `--device` is added where the
    settings have a field `device`. A field `outdir: str | None` gets the folder: for studies that continue from it.
    """
    names = {field.name for field in dataclasses.fields(config_class)}

    def body(quick: bool, outdir: str | None, **values: Any) -> None:
        config = config_class()
        config = config.quick() if quick else config
        given = {key: value for key, value in values.items() if value is not None}
        if "device" in given:
            given["device"] = misc.select_device(given["device"])
        if "outdir" in names:
            given["outdir"] = outdir
        config = dataclasses.replace(config, **given)
        check(config)
        if outdir is not None:
            Path(outdir).mkdir(parents=True, exist_ok=True)         # What cannot be written is said before the work.
        result = run(config)
        line = {"study": name, **result.headline()}
        if outdir is not None:
            folder = Path(outdir)
            for path in draw(result, folder):
                click.echo(f"figure: {path}", err=True)
            record = {"config": dataclasses.asdict(config), **line}
            atomic_write_text(folder / "result.json", json.dumps(record, indent=2))
        click.echo(json.dumps(line))

    options: list[click.Parameter] = [_option_of(field, typing.get_type_hints(config_class)[field.name])
               for field in dataclasses.fields(config_class) if field.name != "outdir"]
    options += [click.Option(["--quick"], is_flag=True, help="Smaller settings: under two minutes on two cores"),
                click.Option(["--outdir"], metavar="DIR", type=cli.PathType(),
                             help="Where figures and result.json go; default: nowhere")]
    return cli.Command(name=f"python -m transport.{name}", callback=body, params=options,
                   help=(config_class.__doc__ or "").split("\n\n")[0],
                   context_settings={"help_option_names": ["-h", "--help"]})


def _flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _bounds(min: float | None, max: float | None, open_min: bool, open_max: bool, **_: Any) -> list[str]:   # noqa: A002
    """What `check` asks of a number, as click writes it: ['0<x<=1'], ['x>=1']; [] where nothing is asked."""
    below, above = ("<" if open_min else "<="), ("<" if open_max else "<=")
    if min is None:
        return [] if max is None else [f"x{above}{max:g}"]
    return [f"x{'>' if open_min else '>='}{min:g}"] if max is None else [f"{min:g}{below}x{above}{max:g}"]


def _option_of(field: dataclasses.Field[Any], hint: Any) -> click.Option:
    """An option without a default of its own: what is not given stays as the (quick) settings have it."""
    shown = [*([] if field.default is None else [f"default: {field.default}"]), *_bounds(**field.metadata)]
    text = field.metadata["text"] + (f"  [{'; '.join(shown)}]" if shown else "")
    if field.name == "device":
        kind: Any = click.Choice(["auto", "cuda", "cpu", "mps"])
    elif field.metadata["choices"]:
        kind = click.Choice(list(field.metadata["choices"]))
    else:
        plain = [t for t in (typing.get_args(hint) or (hint,)) if t is not type(None)]
        # Words without choices may be paths; others pass a path's type unchanged.
        kinds = {int: cli.WholeNumber(), float: cli.Number(), str: cli.PathType()}
        kind = cli.Seed() if field.name == "seed" else kinds.get(plain[0], plain[0])
    return click.Option([_flag(field.name)], type=kind, default=None, help=text)
