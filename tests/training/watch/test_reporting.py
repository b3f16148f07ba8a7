"""The same numbers everywhere: status line, stats.jsonl, TensorBoard, W&B; sign rates per scale."""
import io
import json
import sys
import time
import types

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import training.watch.reporting
from tests.training.test_loop import SMALL, only_run
from torch_utils.training_stats import Stat
from train import main
from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig
from training.discriminators.heads import MultiScaleD
from training.generator.layer_schedule import stem_config
from training.watch.health import Verdict
from training.watch.html_report import read_lines
from training.watch.reporting import Reporter, status_line


def config(**more) -> TrainConfig:
    return TrainConfig(DataConfig("d", 16, 0), stem_config(16, 4, 64, 8, 2, False), DiscriminatorConfig(), LossConfig(),
                       OptimConfig.official(8), 8, 8, 1, 1, 1, **more)


STATS = {"Loss/G/loss": Stat(8, 1.5, 0.1), "Loss/signs/real": Stat(8, 0.25, 0.9), "Loss/signs/fake": Stat(8, -0.5, 0.9),
         "Loss/signs/real/net/0": Stat(8, 0.75, 0.9)}
PROGRESS = {"tick": 3, "elapsed": 60.0, "sec_per_tick": 20.0, "sec_per_kimg": 10.0, "data_wait": 0.02,
            "maintenance": 5.0, "diversity": 0.91, "nonfinite": 0, "nonfinite/G": 0, "nonfinite/D": 0}

#----------------------------------------------------------------------------

def test_same_numbers_on_the_screen_in_the_file_and_in_tensorboard(tmp_path, capsys):
    report = Reporter(tmp_path, config())
    report.tick(STATS, 4000, 10_000, PROGRESS)
    report.metrics([{"metric": "fid", "results": {"fid": 12.5}}], 4000, "network-snapshot-000004.pkl")
    report.close()
    shown = capsys.readouterr().out
    assert (tmp_path / "log.txt").read_text().startswith(shown.splitlines()[0])
    for said in ("tick 3", "kimg 4.0", "sec/kimg 10", "img/s 100", "wait 2.0 %", "upkeep 20.0%", "sign real +0.25",
                 "sign fake -0.50", "diversity 0.91", "cpumem", "metric fid", "fid 12.5"):
        assert said in shown, said
    assert "eta 1m 15s" in shown                # 6 kimg of 12.5 s: the time for upkeep is in it.
    assert "nonfinite" not in shown

    (line,) = read_lines(tmp_path / "stats.jsonl")
    assert line["Loss/signs/real/net/0"] == {"num": 8, "mean": 0.75, "std": 0.9}
    assert line["Progress/img_per_sec"] == 100
    assert line["Progress/maintenance_share"] == 0.2
    assert line["Progress/eta_sec"] == 75
    assert line["cur_nimg"] == 4000
    assert line["Progress/cpu_mem_gb"] > 0
    events = EventAccumulator(str(tmp_path)).Reload()
    drawn = {name: events.Scalars(name)[0] for name in events.Tags()["scalars"]}
    expected = {name: value["mean"] if isinstance(value, dict) else value
                for name, value in line.items() if "/" in name}
    assert set(drawn) == set(expected) | {"Metrics/fid"}
    for name, value in expected.items():
        assert drawn[name].value == pytest.approx(value, rel=1e-6), name
        assert drawn[name].step == 4000


def test_what_is_not_known_is_left_out(tmp_path):
    report = Reporter(tmp_path, config())
    report.tick({}, 4000, 10_000, PROGRESS | {"diversity": None, "nonfinite": 7})
    report.close()
    (line,) = read_lines(tmp_path / "stats.jsonl")
    assert "Progress/diversity" not in line
    text = status_line({}, 4000, PROGRESS | {"diversity": None, "nonfinite": 7, "eta_sec": 1, "img_per_sec": 1,
                                             "maintenance_share": 0})
    assert "diversity" not in text
    assert "sign" not in text
    assert "nonfinite 7" in text


def test_report_html_cannot_stop_a_run(tmp_path, capsys, monkeypatch):
    def broken(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.watch.reporting, "write_report", broken)
    monkeypatch.setattr(training.watch.reporting, "REPORT_SECONDS", -1)
    report = Reporter(tmp_path, config())
    report.snapshot("fakes000000", 0)
    report.close()
    assert capsys.readouterr().out.count("NOTE: report.html was not refreshed: OSError") == 2

#----------------------------------------------------------------------------
# Weights & Biases, as a stand-in.

class FakeRun:
    def __init__(self, settings: dict):
        self.settings, self.logged, self.metrics, self.finished = settings, [], [], False

    def define_metric(self, name, **settings):
        self.metrics.append((name, settings))

    def log(self, values):
        if self.settings["project"] == "broken":
            raise ConnectionError("no route")
        self.logged.append(values)

    def finish(self):
        self.finished = True


@pytest.fixture
def wandb(monkeypatch):
    module = types.ModuleType("wandb")
    module.runs = []
    module.init = lambda **settings: module.runs.append(FakeRun(settings)) or module.runs[-1]
    module.Image = lambda path: ("image", path)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_the_same_numbers_and_keeps_its_id(tmp_path, wandb):
    for nimg in (4000, 8000):                   # Started twice.
        report = Reporter(tmp_path, config(wandb="xl"))
        report.tick(STATS, nimg, 10_000, PROGRESS)
        report.snapshot("fakes000004", nimg)
        report.metrics([{"metric": "fid", "results": {"fid": 12.5}}], nimg, "network-snapshot-000004.pkl")
        report.close()
    first, second = wandb.runs
    assert first.settings["id"] == second.settings["id"] == json.loads((tmp_path / "wandb-run.json").read_text())["id"]
    assert {run.settings["resume"] for run in wandb.runs} == {"allow"}
    assert first.settings["project"] == "xl"
    assert first.settings["config"]["batch"] == 8
    assert ("*", {"step_metric": "kimg"}) in first.metrics
    tick, picture, metric = second.logged
    assert tick["kimg"] == 8
    line = read_lines(tmp_path / "stats.jsonl")[1]
    assert tick["Progress/eta_sec"] == line["Progress/eta_sec"]
    assert tick["Loss/signs/real/net/0"] == 0.75
    assert picture["fakes"] == ("image", str(tmp_path / "fakes000004.png"))
    assert metric == {"Metrics/fid": 12.5, "kimg": 8}
    assert first.finished


def test_wandb_that_fails_is_given_up(tmp_path, wandb, capsys):
    report = Reporter(tmp_path, config(wandb="broken"))
    for nimg in (4000, 8000):
        report.tick(STATS, nimg, 10_000, PROGRESS)
    report.close()
    assert capsys.readouterr().out.count("WeightsAndBiases gets no more numbers") == 1
    assert len(read_lines(tmp_path / "stats.jsonl")) == 2


def refuse(error):
    def action(*args, **more):
        raise error
    return action


@pytest.mark.parametrize("error", [RuntimeError("api_key not configured\n(no-tty)"), TypeError("x"), SystemExit(1)])
def test_wandb_that_does_not_start_costs_one_note(tmp_path, wandb, capsys, error):
    wandb.init = refuse(error)
    report = Reporter(tmp_path, config(wandb="xl"))
    report.continue_at(2000)
    report.tick(STATS, 4000, 10_000, PROGRESS)
    report.close()
    out = capsys.readouterr().out
    assert out.count("NOTE: WeightsAndBiases gets no numbers") == out.count("gets no") == 1
    assert "no-tty" not in out
    assert len(read_lines(tmp_path / "stats.jsonl")) == 1


@pytest.mark.parametrize("error", [ImportError("No module named 'tensorboard'"), RuntimeError("version"),
                                   TypeError("Descriptors cannot be created directly.\nIf this call came from ...")])
def test_tensorboard_that_cannot_be_imported_costs_one_note(tmp_path, capsys, monkeypatch, error):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise error

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("torch.utils.tensorboard"))
    report = Reporter(tmp_path, config())
    report.tick(STATS, 4000, 10_000, PROGRESS)
    report.close()
    out = capsys.readouterr().out
    assert out.count("NOTE: TensorBoard gets no numbers") == out.count("gets no") == 1
    assert ("pip install tensorboard" in out) == isinstance(error, ImportError)
    assert len(read_lines(tmp_path / "stats.jsonl")) == 1


def test_a_damaged_id_of_wandb_is_made_anew(tmp_path, wandb):
    for content in ("{", "[1]", "{}"):
        (tmp_path / "wandb-run.json").write_text(content)
        Reporter(tmp_path, config(wandb="xl"))
    ids = [run.settings["id"] for run in wandb.runs]
    assert len(set(ids)) == 3
    assert json.loads((tmp_path / "wandb-run.json").read_text())["id"] == ids[-1]


def test_steps_of_tensorboard_run_forwards_after_a_restart(tmp_path, monkeypatch):
    """What a killed run drew after its last state is void: the next start draws it again."""
    starts = ((1.0, None, (4000, 8000, 12_000)), (2.0, 6000, (10_000, 14_000)), (3.0, 14_000, (18_000,)))
    for value, start, nimgs in starts:
        monkeypatch.setattr(time, "time", lambda value=value: 1e9 + value)      # Event files are read in this order.
        report = Reporter(tmp_path, config())
        if start is not None:
            report.continue_at(start)
        for nimg in nimgs:
            report.tick({"Loss/G/loss": Stat(8, value, 0.1)}, nimg, 20_000, PROGRESS)
        report.close()
    found = EventAccumulator(str(tmp_path)).Reload().Scalars("Loss/G/loss")
    assert [(event.step, event.value) for event in found] == [(4000, 1), (10_000, 2), (14_000, 2), (18_000, 3)]


def test_a_line_that_a_crash_cut_off_swallows_no_other(tmp_path):
    for name in ("stats.jsonl", "log.txt"):
        (tmp_path / name).write_bytes(b'{"cur_nimg": 2000, "Loss')
    report = Reporter(tmp_path, config())
    report.tick(STATS, 4000, 10_000, PROGRESS)
    with open(tmp_path / "stats.jsonl", "ab") as f:
        f.write(b'{"cur_nimg": \xff\xfe\n17\n[]\n{"x": 1}\n\n')
    report.tick(STATS, 8000, 10_000, PROGRESS)
    report.close()
    assert [line["cur_nimg"] for line in read_lines(tmp_path / "stats.jsonl")] == [4000, 8000]
    first, second = (tmp_path / "log.txt").read_text().splitlines()[:2]
    assert first.endswith('"Loss')
    assert second.startswith("tick 3")


def test_a_closed_terminal_stops_no_run(tmp_path, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    report = Reporter(tmp_path, config())
    report.say("one")
    report.say("caf\u00e9 \udcff")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "one\ncaf\u00e9 \\udcff\n"


def test_wandb_that_is_not_installed_is_named_before_anything_is_written(tmp_path, data16, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    result = CliRunner().invoke(main, [*SMALL, f"--data={data16}", f"--outdir={tmp_path / 'out'}", "--wandb=xl"])
    assert result.exit_code == 2
    assert "--wandb=xl" in result.output
    assert "pip install wandb" in result.output
    assert not (tmp_path / "out").exists()

#----------------------------------------------------------------------------
# Sign rates.

@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("sizes", [(64, 32, 16, 8), (56, 28, 14, 7), (9, 5, 3, 1)])
@pytest.mark.parametrize("larger", [1, 2])
def test_logits_of_a_scale_can_be_told_apart(c_dim, sizes, larger):
    disc = MultiScaleD([4] * 4, sizes, c_dim).eval()
    maps = [torch.randn(2, 4, size * larger, size * larger) for size in sizes]
    c = torch.eye(3)[:2] if c_dim else torch.zeros(2, 0)
    logits = disc(maps, c)
    counts = disc.scale_sizes(maps)
    assert sum(counts) == logits.shape[1]
    for part, one, x in zip(logits.split(counts, dim=1), disc.mini_discs.values(), maps, strict=True):
        assert torch.equal(part, one(x, c).flatten(1))


@pytest.mark.slow
def test_a_run_reports_signs_per_scale_and_gradient_norms(data16, tmp_path, reports):
    result = CliRunner().invoke(main, [*SMALL, f"--data={data16}", f"--outdir={tmp_path}", "--kimg=0.016"],
                                catch_exceptions=False)
    assert result.exit_code == 0
    (line,) = read_lines(only_run(tmp_path) / "stats.jsonl")
    for kind in ("real", "fake"):
        scales = [line[f"Loss/signs/{kind}/local_random/{i}"] for i in range(4)]
        whole = line[f"Loss/signs/{kind}/local_random"]
        assert sum(s["num"] for s in scales) == whole["num"]
        assert np.average([s["mean"] for s in scales], weights=[s["num"] for s in scales]) == pytest.approx(
            whole["mean"], abs=1e-9)
    for phase in ("Gmain", "Dmain"):
        assert line[f"Gradients/{phase}"]["mean"] > 0
    assert line["Progress/diversity"] > 0
    assert (only_run(tmp_path) / "report.html").is_file()


def test_verdicts_are_lines(tmp_path, capsys):
    report = Reporter(tmp_path, config())
    report.verdict(Verdict("collapse", True, "all the same"), 1500)
    report.close()
    assert "VERDICT at kimg 1.5: collapse: all the same" in capsys.readouterr().out
    (line,) = read_lines(tmp_path / "health.jsonl")
    assert (line["cur_nimg"], line["verdict"], line["is_bad"]) == (1500, "collapse", True)
