# SPDX-License-Identifier: Apache-2.0
"""What no option takes: numbers without end, empty paths. What all take: seeds of 64 bits, ~ and accents."""
import errno
import os
import re
import unicodedata
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

import calc_metrics
import dataset_tool
import demo
import directions
import export
import gen_images
import gen_video
import run_inversion
import train
import visualizer
from data_prep import random_data
from dnnlib import cli, util
from inference import centroids
from metrics import prefetch
from torch_utils.misc import random_state
from torch_utils.ops import build
from training.feature_networks import class_embedding
from training.feature_networks import train as train_local
from training.watch import html_report
from transport import diagnose
from transport.congested import experiment as congested
from transport.latent1d import experiment as latent1d
from transport.san import dcgan, toy
from transport.ttc import experiment as ttc

COMMANDS = {
    "train": train.main, "gen_images": gen_images.main, "gen_video": gen_video.main,
    "run_inversion": run_inversion.main, "visualizer": visualizer.main,
    "calc_metrics": calc_metrics.main, "demo": demo.main, "export": export.main,
    "dataset_tool": dataset_tool.main.commands["make"], "verify": dataset_tool.main.commands["verify"],
    "random_data": random_data.main, "prefetch": prefetch.main, "build": build.main,
    "class_embedding": class_embedding.main, "train_local": train_local.main, "html_report": html_report.main,
    "diagnose": diagnose.main, "congested": congested.main, "latent1d": latent1d.main, "dcgan": dcgan.main,
    "toy": toy.main, "ttc": ttc.main, "centroids": centroids.main,
    **{f"directions {name}": command for name, command in directions.main.commands.items()},
}
NUMBERS = (cli.IntRange, cli.FloatRange, cli.Number, cli.WholeNumber, cli.IntList, cli.IntOrAuto, cli.Vec2)
PATH_WORDS = re.compile(r"DIR|FILE|PATH|ZIP|NPZ|PNG|PKL|RUNDIR|DATA\b")


def params(wanted) -> list[tuple[str, click.Parameter]]:
    return [(name, param) for name, command in COMMANDS.items() for param in command.params if wanted(param)]


def ids(values) -> list[str]:
    return [f"{name} {param.name}" for name, param in values]


def convert(kind: click.ParamType, text: str):
    return kind.convert(text, None, None)

#----------------------------------------------------------------------------
# All options of all scripts.

def test_numbers_and_paths_have_our_types():
    """A type of click's own takes nan, a number of any length, and '~' for a folder of this name."""
    foreign = (click.types.IntParamType, click.types.FloatParamType, click.Path, click.File)
    for name, param in params(lambda p: isinstance(p.type, foreign) and not isinstance(p.type, NUMBERS)):
        pytest.fail(f"{name} {param.name}: {param.type}")
    for name, param in params(lambda p: PATH_WORDS.search(p.metavar or "") and "INT" not in p.metavar):
        assert isinstance(param.type, cli.PathType | cli.PathList), f"{name} {param.name}"
    for name, param in params(lambda p: p.name == "seed"):
        assert isinstance(param.type, cli.Seed), name


def test_no_help_shows_a_range_without_ends_or_two_defaults():
    """click writes `x<=None` for a range without bounds, and its default behind one that the text names."""
    for name, command in COMMANDS.items():
        for param in command.params:
            text = (param.get_help_record(click.Context(command)) or ("", ""))[1]
            assert "None" not in text, f"{name}: {text}"
            assert text.count("[default:") <= 1, f"{name}: {text}"


NUMBER_OPTIONS = params(lambda p: isinstance(p, click.Option) and isinstance(p.type, NUMBERS))


@pytest.mark.parametrize(("name", "param"), NUMBER_OPTIONS, ids=ids(NUMBER_OPTIONS))
def test_no_number_option_takes_what_is_no_number(name, param):
    pair = (lambda x: f"0,{x}") if isinstance(param.type, cli.Vec2 | cli.IntList) else str
    for value in ("nan", "inf", "-inf", "1e400", "-1e400", "1e39", "9" * 30, "9" * 5000):
        if isinstance(param.type, cli.FloatRange | cli.Number | cli.Vec2) and value == "9" * 30:
            continue                            # Large, but a number.
        result = CliRunner().invoke(COMMANDS[name], [f"{param.opts[-1]}={pair(value)}"])
        assert result.exit_code == 2, (value, result.output)
        assert param.opts[-1] in result.output or value.startswith("-"), value


PATH_OPTIONS = params(lambda p: isinstance(p, click.Option) and isinstance(p.type, cli.PathType | cli.PathList))


@pytest.mark.parametrize(("name", "param"), PATH_OPTIONS, ids=ids(PATH_OPTIONS))
def test_every_path_option_knows_the_home_folder(name, param, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    found = param.type.convert("~/x", param, None)
    assert found in (f"{tmp_path}/x", [f"{tmp_path}/x"])
    value = param.type.convert("~", param, None)
    assert value in (str(tmp_path), [str(tmp_path)])

#----------------------------------------------------------------------------
# Paths.

def test_names_in_a_list_may_have_commas(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "a", "c,d,e"):
        (tmp_path / name).touch()
    assert convert(cli.PathList(), "c,d,e, a,b,x,,c,d,e") == ["c,d,e", "a", "b", "x", "c,d,e"]
    (tmp_path / "a").unlink()
    assert convert(cli.PathList(), "a,b") == ["a,b"]
    assert convert(cli.PathList(), "none") == []


def test_paths_that_are_refused():
    for text, said in (("", "is empty"), (" ", "is empty"), ("a\0b", "zero byte"), ("s3://bucket/x", "is an address"),
                       ("https://host/x", "is an address"), ("file:///x", "is an address"),
                       ("~no-such-user/x", "no such home folder")):
        with pytest.raises(click.BadParameter, match=said):
            convert(cli.PathType(), text)
    assert convert(cli.PathType(addresses=True), "https://host/x.pkl") == "https://host/x.pkl"
    for name in ("sklearn:digits", "s/{000..099}.tar", "data{resolution}.zip", "tf_efficientnet_lite0", "x~y"):
        assert convert(cli.PathType(), name) == name


def test_pipes_and_devices_are_refused_at_once(tmp_path):
    """Whoever opens a pipe may wait for ever, and a device may have no end."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link", "/dev/zero"):
        with pytest.raises(click.BadParameter, match="is a pipe, a socket or a device: name an ordinary file"):
            convert(cli.PathType(), str(path))


def test_a_name_that_begins_with_a_tilde_can_be_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~odd").mkdir()
    assert convert(cli.PathType(), "~odd") == "~odd"
    assert convert(cli.PathType(), "./~other") == "./~other"


@pytest.mark.parametrize(("typed", "there"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_names_in_both_forms_of_unicode(tmp_path, typed, there):
    name = "Caf\u00e9/\u00c5ngstr\u00f6m"
    (tmp_path / unicodedata.normalize(there, name)).mkdir(parents=True)
    path = convert(cli.PathType(), f"{tmp_path}/{unicodedata.normalize(typed, name)}")
    assert Path(path).is_dir()
    below = convert(cli.PathType(), f"{tmp_path}/{unicodedata.normalize(typed, name)}/new \u00e9.zip")
    assert Path(below).parent.is_dir()
    assert util.normalized_name(unicodedata.normalize("NFD", name)) == unicodedata.normalize("NFC", name)


def test_names_from_a_command_line_in_ascii():
    typed = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    assert typed != "caf\u00e9"
    assert util.normalized_name(typed) == "caf\u00e9"
    assert util.normalized_name("\udcff") == "\udcff"


def test_a_new_name_stays_as_it_is_typed(tmp_path):
    name = unicodedata.normalize("NFD", "n\u00e9")
    assert convert(cli.PathType(), f"{tmp_path}/{name}") == f"{tmp_path}/{name}"

#----------------------------------------------------------------------------
# Lists and seeds.

def test_a_list_is_counted_before_it_is_made():
    for text in ("0-99999999999", "0-999999,5", "0-18446744073709551615"):
        with pytest.raises(click.BadParameter, match="at most 1000000 are taken at once"):
            convert(cli.IntList(cli.MAX_SEED), text)
    assert convert(cli.IntList(cli.MAX_SEED), "3,18446744073709551614-18446744073709551615") == [
        3, 2 ** 64 - 2, 2 ** 64 - 1]
    with pytest.raises(click.BadParameter, match="too large"):
        convert(cli.IntList(cli.MAX_SEED), "18446744073709551616")


def test_seeds():
    assert convert(cli.Seed(), "18446744073709551615") == 2 ** 64 - 1
    for text in ("18446744073709551616", "-1", "1.5", "nan"):
        with pytest.raises(click.BadParameter):
            convert(cli.Seed(), text)


@pytest.mark.numeric
def test_seeds_of_32_bits_are_numpys():
    """The official scripts give their seeds to RandomState."""
    for seed in (0, 1, 2 ** 32 - 1):
        assert np.array_equal(random_state(seed).randn(3), np.random.RandomState(seed).randn(3))
    others = [random_state(seed).randn() for seed in (0, 2 ** 32, 2 ** 32 + 1, 2 ** 33, 2 ** 64 - 1)]
    assert len(set(others)) == 5

#----------------------------------------------------------------------------
# Errors of files.

@click.command(cls=cli.Command)
@click.option("--outdir", type=cli.PathType())
@click.option("--data", "-d", type=cli.PathType())
@click.option("--how", type=str, default="")
def touch(outdir, data, how):
    """Read --data, or make and write a file in --outdir."""
    if how:
        number = getattr(errno, how)
        raise OSError(number, os.strerror(number), outdir)
    if data:
        Path(data).read_bytes()
    if outdir:
        Path(outdir).mkdir(parents=True, exist_ok=True)
        util.atomic_write_text(Path(outdir) / ("x" * 10), "text")


def one_line(*args: str) -> str:
    result = CliRunner().invoke(touch, list(args))
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1
    return result.output


def test_every_error_of_a_path_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    long = f"{tmp_path}/{'x' * 300}"
    assert one_line(f"--data={tmp_path}/no").startswith(f"Error: --data={tmp_path}/no: No such file or directory: name")
    assert "this is a folder: name a file" in one_line(f"-d{tmp_path}")
    assert "leads through folders" in one_line(f"--data={file}/a")
    assert f"--outdir={file}/a" in one_line(f"--outdir={file}/a")
    assert "something else has this name" in one_line(f"--outdir={file}")
    assert "name a shorter path" in one_line(f"--data={long}")
    assert "name a shorter path" in one_line(f"--outdir={long}")
    assert one_line("--outdir=/proc/none/a/b").startswith("Error: --outdir=/proc/none/a/b: /proc/none: ")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "in a circle" in one_line(f"--data={tmp_path}/a")
    for how, said in (("EACCES", "you may read and write"), ("EROFS", "can be written to"), ("ENOSPC", "make room"),
                      ("EIO", "the disk fails"), ("EBUSY", "name another place")):
        assert said in one_line(f"--outdir={tmp_path}", f"--how={how}")


def test_errors_that_are_not_of_files_stay_what_they_are():
    for error in (ConnectionResetError(errno.ECONNRESET, "reset"), OSError("no number"), ChildProcessError()):
        @click.command(cls=cli.Command)
        def command(error=error):
            raise error
        assert CliRunner().invoke(command).exception is error


def test_a_temporary_name_is_not_what_an_error_shows(tmp_path):
    with pytest.raises(OSError, match="name too long") as info:
        util.atomic_write_text(tmp_path / ("x" * 250), "text")
    assert info.value.filename == str(tmp_path / ("x" * 250))


def test_devices_and_pipes_are_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(OSError, match="no ordinary file"):
            util.atomic_write_text(tmp_path / name, "text")
    assert not (tmp_path / "pipe").is_file()
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


def test_control_characters_do_not_reach_the_terminal():
    assert util.printable("a\nb\x1b[31m\r\u2028c\udcff caf\u00e9") == "a b\\x1b[31m  c\\udcff caf\u00e9"


def test_names_are_printed_where_the_encoding_lacks_their_letters():
    @click.command(cls=cli.Command)
    def command():
        click.echo("caf\u00e9 \u4f60")
        print("na\u00efve")
    result = CliRunner(charset="latin-1").invoke(command)
    assert result.exit_code == 0, result.exception
    assert result.stdout_bytes == b"caf\xe9 \\u4f60\nna\xefve\n"
