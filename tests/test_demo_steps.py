# SPDX-License-Identifier: Apache-2.0
"""demo.py without its work: which commands both demos type, and what the same command again does."""
import json
from pathlib import Path

import click.testing
import pytest

import demo
from training.run.options import DEFAULTS


def scores(command):
    """The lines of calc_metrics.py, where a network of timm is in the names of the results."""
    (metrics,) = (word.removeprefix("--metrics=") for word in command if word.startswith("--metrics="))
    judge = "_net" if any(word.startswith("--detector=timm:") for word in command) else ""
    parts = {"pr": ("_precision", "_recall"), "probe_accuracy": ("", "_held_out")}
    for name in metrics.split(","):
        yield {"metric": name + judge, "asked_for": name,
               "results": {f"{name}{judge}{part}": 0.5 for part in parts.get(name, ("",))}}


class Machine:
    """Takes the place of `run_step`: notes commands, leaves the files that they would, and may break off."""

    def __init__(self):
        self.commands: list[list[str]] = []
        self.breaks_at = ""

    def __call__(self, progress, log, title, seconds, command, fraction):
        if title == self.breaks_at:
            raise KeyboardInterrupt
        self.commands.append(command)
        if command[0] == "train.py":
            options = dict(word.removeprefix("--").partition("=")[::2] for word in command[1:])
            assert {name.replace("-", "_") for name in options} - {"path_stem"} <= {*DEFAULTS, "outdir", "data"}
            run = Path(options["outdir"]) / "00000-run"
            run.mkdir(parents=True)
            (run / "best_model.pkl").write_bytes(b"")
        if command[0] == "calc_metrics.py":
            return "".join(json.dumps(line) + "\n" for line in scores(command))
        # train.py prints its settings, and the training of a network its accuracy.
        return '{\n  "batch": 32\n}\n{"accuracy": 0.9}\n'


@pytest.fixture
def machine(monkeypatch, tmp_path):
    machine = Machine()
    monkeypatch.setattr(demo, "run_step", machine)
    monkeypatch.chdir(tmp_path)
    return machine


def run(*args):
    result = click.testing.CliRunner().invoke(demo.main, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result.exit_code, result.output


def words_of(machine, script):
    return [set(command) for command in machine.commands if command[0] == script]


def test_the_digits_begin_anew(machine):
    for _ in range(2):
        assert run()[0] == 0
        assert len(machine.commands) == 8
        stem, superres = words_of(machine, "train.py")
        assert {"--preset=demo", "--kimg=12.8", "--glr=0.005"} <= stem
        assert {"--superres", "--diversity=2", f"--path_stem={Path('runs/demo/stem/00000-run').resolve()}"} <= superres
        machine.commands.clear()
    summary = json.loads(Path("runs/demo/summary.json").read_text())
    assert {"fid_init", "fid", "kid", "precision", "recall", "accuracy_init", "accuracy", "minutes", "seed", "san",
            "quick", "paths"} == set(summary)


def test_the_emoji_follow_the_official_recipe(machine):
    code, output = run("--data=emoji")
    assert code == 0, output
    stages = words_of(machine, "train.py")
    assert len(stages) == 3
    for stage in stages:
        assert {"--backbones=tf_efficientnet_lite0", "--san=1", "--diversity=0", "--mirror=1", "--cond=1"} <= stage
        assert not any(word.startswith("--embedding") for word in stage)        # From the data, by default.
    assert ["--cls_weight=8" in stage for stage in stages] == [False, True, True]
    judged = words_of(machine, "calc_metrics.py")[1]
    assert {"--detector=timm:tf_efficientnet_lite2", "--metrics=fd,kid,pr,probe_accuracy", "--num=4442"} <= judged
    assert f"--out={Path('runs/demo-emoji').resolve()}" in judged       # export.py reads the scores there.


def test_the_emoji_go_on_where_they_were_broken_off(machine):
    machine.breaks_at = "32-pixel super-resolution stage"
    assert run("--data=emoji", "--seed=1")[0] != 0
    before = len(machine.commands)
    machine.breaks_at = ""
    assert run("--data=emoji", "--seed=1")[0] == 0
    assert any("--superres" in command for command in machine.commands[before:before + 1])
    assert len(words_of(machine, "train.py")) == 3
    count = len(machine.commands)
    assert run("--data=emoji", "--seed=1")[0] == 0
    assert len(machine.commands) == count


def test_a_demo_of_other_settings_is_not_lost(machine):
    assert run("--data=emoji", "--outdir=here")[0] == 0
    code, output = run("--data=emoji", "--outdir=here", "--san=0")
    assert code == 2
    assert "holds a demo of other settings" in output
    assert run("--data=emoji", "--san=0")[0] == 0           # In a folder of its own.
    assert Path("runs/demo-emoji-san0/summary.json").is_file()


def test_other_things_in_the_folder_stay(machine, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    for data in demo.DEMOS:
        code, output = run(f"--data={data}", f"--outdir={tmp_path}")
        assert code == 2
        assert "holds other things" in output
    assert (tmp_path / "thesis.txt").exists()
