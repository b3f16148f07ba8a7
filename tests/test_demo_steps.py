# SPDX-License-Identifier: Apache-2.0
"""demo.py without its work: which commands both demos type, and what the same command again does."""
import json
import shutil
import sys
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
        options = dict(word.partition("=")[::2] for word in command)
        if command[0] == "train.py":
            names = {word.removeprefix("--").partition("=")[0].replace("-", "_") for word in command[1:]}
            assert names - {"path_stem"} <= {*DEFAULTS, "outdir", "data"}
            run = Path(options["--outdir"]) / "00000-run"
            run.mkdir(parents=True, exist_ok=True)
            (run / "best_model.pkl").write_bytes(b"")
        sizes = [f"{size}.zip" for size in options["--resolutions"].split(",")] if "--resolutions" in options else [""]
        for made in [options["--dest"] + size for size in sizes] if "--dest" in options else ():
            Path(made).touch()
        if "--sheet" in options:
            Path(options["--sheet"]).touch()
        if command[0] == "calc_metrics.py":
            for word in command:
                if word.startswith("--out="):
                    Path(word.removeprefix("--out="), "metric-fid.jsonl").touch()
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
    assert {"fid_init", "fid", "kid", "precision", "recall", "accuracy_init", "accuracy", "minutes", "data", "seed",
            "san", "quick", "paths"} == set(summary)


def test_the_emoji_follow_the_official_recipe_with_a_few_changes(machine):
    code, output = run("--data=emoji")
    assert code == 0, output
    stages = words_of(machine, "train.py")
    assert len(stages) == 3
    for stage in stages:
        assert {"--backbones=tf_efficientnet_lite0", "--san=1", "--mirror=1", "--cond=1", "--feature-size=112"} <= stage
    assert ["--embedding=centred" in stage for stage in stages] == [True, False, False]
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


@pytest.mark.parametrize(("data", "folder"), [("digits", "runs/demo-san0"), ("emoji", "runs/demo-emoji-san0")])
def test_a_demo_of_other_settings_is_not_lost(machine, data, folder):
    assert run(f"--data={data}", "--outdir=here")[0] == 0
    code, output = run(f"--data={data}", "--outdir=here", "--san=0")
    assert code == 2
    assert "holds a demo of other settings" in output
    assert run(f"--data={data}", "--san=0")[0] == 0         # In a folder of its own.
    assert Path(folder, "summary.json").is_file()


def emoji_commands(machine, *args):
    """The scripts that a second start of the emoji demo in `here` calls, or its refusal."""
    machine.commands.clear()
    code, output = run("--data=emoji", "--outdir=here", *args)
    return [command[0] for command in machine.commands] if code == 0 else output


def test_demos_do_not_take_each_others_steps(machine):
    """Some steps of both are called alike; the one that begins anew does not delete the other, which took a night."""
    for first, second in (("digits", "emoji"), ("emoji", "digits")):
        assert run(f"--data={first}", f"--outdir={first}")[0] == 0
        code, output = run(f"--data={second}", f"--outdir={first}")
        assert code == 2
        assert "holds a demo of other settings" in output
        assert Path(first, "summary.json").is_file()


@pytest.mark.parametrize("content", ['{"seed": 0', "[]", '{"seed": 0, "san": true, "quick": false, "done": {}}',
                                     '{"name": "a demo of somebody else", "version": 1}'])
@pytest.mark.parametrize("data", demo.DEMOS)
def test_a_marker_that_says_nothing_deletes_nothing(machine, content, data):
    assert run(f"--data={data}", "--outdir=here")[0] == 0
    Path("here/demo.json").write_text(content)
    code, output = run(f"--data={data}", "--outdir=here")
    assert code == 2
    assert "demo.json: is damaged, or of another version" in output
    assert Path("here/summary.json").is_file()


def test_what_somebody_put_beside_the_digits_stays(machine):
    assert run()[0] == 0
    Path("runs/demo/notes").mkdir()
    code, output = run()
    assert code == 2
    assert "holds other things, too (notes)" in output
    Path("runs/demo/notes").rmdir()
    assert run()[0] == 0


def test_one_demo_at_a_time(machine):
    assert run("--data=emoji", "--outdir=here")[0] == 0
    with open("here/demo.lock", "ab") as file:
        demo.try_lock(file.fileno())
        assert "another demo is running in it" in emoji_commands(machine)


def test_what_is_gone_is_made_again_with_all_that_follows(machine):
    assert run("--data=emoji", "--outdir=here")[0] == 0
    shutil.rmtree("here/stage32")
    assert emoji_commands(machine) == ["train.py", "train.py", "gen_images.py", "calc_metrics.py", "calc_metrics.py"]
    Path("here/samples.png").unlink()
    assert emoji_commands(machine) == ["gen_images.py", "calc_metrics.py", "calc_metrics.py"]


def test_steps_of_another_version(machine, monkeypatch):
    assert run("--data=emoji", "--outdir=here")[0] == 0
    assert emoji_commands(machine) == []
    longer = demo.dataclasses.replace(demo.DEMOS["emoji"].full, kimg=(100.0, 60.0, 70.0))
    monkeypatch.setitem(demo.DEMOS, "emoji", demo.dataclasses.replace(demo.DEMOS["emoji"], full=longer))
    output = emoji_commands(machine)
    assert "'64-pixel super-resolution stage' was made by another version of this demo" in output


def test_a_command_that_is_stopped_can_say_that_it_saves(tmp_path):
    """It gets Ctrl-C as the demo does, and writes more than a pipe holds before it ends."""
    code = "print('begun', flush=True)\nfor i in range(9000): print('saving', i)\nopen('saved', 'w')"
    def stop(line):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        demo.run_step(demo.Progress(1), tmp_path / "log.txt", "training", 1,
                      ["-c", code.replace("'saved'", repr(str(tmp_path / "saved")))], stop)
    assert (tmp_path / "log.txt").read_text().endswith("saving 8999\n")
    assert (tmp_path / "saved").exists()


def test_a_command_that_saved_after_ctrl_c_is_believed(tmp_path):
    def stop(line):
        raise KeyboardInterrupt
    with pytest.raises(demo.UserError, match="'training' was stopped and has saved its state"):
        demo.run_step(demo.Progress(1), tmp_path / "log.txt", "training", 1, ["-c", "print(1)\nraise SystemExit(3)"],
                      stop)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_a_request_to_end_reaches_the_command(tmp_path):
    code = ("import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
            "print('begun', flush=True)\ntime.sleep(60)")
    with pytest.raises(demo.UserError, match="'training' was stopped and has saved its state"):
        demo.run_step(demo.Progress(1), tmp_path / "log.txt", "training", 1, ["-c", code],
                      lambda line: demo.signal.raise_signal(demo.signal.SIGTERM))


def test_other_things_in_the_folder_stay(machine, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    for data in demo.DEMOS:
        code, output = run(f"--data={data}", f"--outdir={tmp_path}")
        assert code == 2
        assert "holds other things" in output
    assert (tmp_path / "thesis.txt").exists()
