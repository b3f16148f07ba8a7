"""The report about one GPU: steps that hang or crash cost their own time limit, and the table is always there."""
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from torch_utils.ops import tune

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_report.py"
LAYER = "148 -> 148, 2/2, 12/12, 861"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("gpu_report", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules["gpu_report"] = module      # Dataclasses look their module up.
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    del sys.modules["gpu_report"]


@pytest.fixture
def make_runner(report, tmp_path, monkeypatch):
    """A runner of fake steps: (name, limit, Python code) each."""
    monkeypatch.setattr(report, "GRACE", 0.5)
    monkeypatch.setattr(report, "LEAST", 0.5)

    def make(*steps: tuple[str, float, str], seconds: float = 60):
        prepared = [report.Step(name, f"step {name}", limit, (sys.executable, "-S", "-c", code))
                    for name, limit, code in steps]
        runner = report.Runner(prepared, tmp_path, tmp_path / "gpu.md", seconds)
        runner.run(prepared)
        return {name: outcome["outcome"] for name, outcome in runner.outcomes.items()}, \
            (tmp_path / "gpu.md").read_text()

    return make


def writes(path: Path, found: str, values: dict) -> str:
    """Code of a step that leaves results."""
    content = json.dumps({"found": found, "skipped": "", "values": values})
    return f"open({str(path)!r}, 'w').write({content!r}); "


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_step_that_hangs_costs_its_limit_and_what_it_found_stays(make_runner, tmp_path):
    child = tmp_path / "child"
    hangs = writes(tmp_path / "ops.json", "one layer", {f"{LAYER}/cuda/contiguous/forward": 0.00125}) + (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']); "
        f"open({str(child)!r}, 'w').write(str(child.pid)); time.sleep(100)")
    began = time.monotonic()
    outcomes, table = make_runner(("ops", 2, hangs), ("sampling", 20, "print('fine')"))
    assert time.monotonic() - began < 15
    assert outcomes == {"ops": "ended at its limit of 2 s", "sampling": "ok"}
    assert "| step ops | ended at its limit of 2 s | " in table
    assert f"| {LAYER} | not measured | 1.25 / not measured | not measured | " in table
    assert not is_alive(int(child.read_text()))


def test_a_step_that_crashes_is_reported_with_its_last_line(make_runner, tmp_path):
    outcomes, table = make_runner(
        ("build", 20, "import sys; print('first'); print('no | compiler'); sys.exit(3)"),
        ("ops", 20, "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"),
        ("stem", 20, "import sys; sys.exit(1)"),
        ("tests", 20, f"open({str(tmp_path / 'tests.json')!r}, 'w').write("
                      "'{\"found\": \"\", \"skipped\": \"no GPU\", \"values\": {}}')"))
    assert outcomes == {"build": "failed (exit code 3): no | compiler", "ops": "failed (signal SIGSEGV): before",
                        "stem": "failed (exit code 1): it printed nothing", "tests": "skipped: no GPU"}
    assert "| step build | failed (exit code 3): no / compiler | " in table


@pytest.mark.slow
def test_the_time_is_kept(make_runner):
    began = time.monotonic()
    outcomes, table = make_runner(("ops", 100, "import time; time.sleep(100)"), ("stem", 100, ""), seconds=3)
    assert time.monotonic() - began < 10
    assert outcomes["ops"].startswith("ended at its limit of ")
    assert outcomes["stem"] == "not run: no time left"
    assert "| step stem | not run: no time left | 0 |  |" in table


def test_half_a_file_is_no_result(make_runner, tmp_path):
    outcomes, _ = make_runner(("ops", 20, f"open({str(tmp_path / 'ops.json')!r}, 'w').write('{{')"))
    assert outcomes == {"ops": "ok"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_an_interrupted_report_has_its_table(tmp_path, number):
    command = [sys.executable, "-u", str(SCRIPT), "--device=cpu", "--quick", "--only=versions,build",
               f"--folder={tmp_path}", f"--dest={tmp_path}/table.md"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().startswith("[1/2] versions and device (at most 60 s)")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "[1/2] versions and device: interrupted after " in out
    assert err.startswith("interrupted; the table has what was found: ")
    assert "| versions and device | interrupted | " in (tmp_path / "table.md").read_text()


def test_a_table_without_measurements_has_the_aims(report, tmp_path):
    result = CliRunner().invoke(report.main, ["--only=none", "--device=cpu", f"--folder={tmp_path}",
                                              f"--dest={tmp_path}/table.md"])
    assert result.exit_code == 0, result.output
    table = (tmp_path / "table.md").read_text()
    assert "has not run yet" in table
    for row in ("| micro-batch 8, one iteration | not measured | 601 ms | 200 ms |",
                "| all filtered_lrelu of it, the form that runs | not measured |  | 40 ms |",
                f"| {LAYER} | {'not measured | ' * 5}1.3 / 3.5 | 17.9 / 37.7 | 8.13 / 19.9 |",
                f"| 148, 3x3, 861 -> 724 | {'not measured | ' * 5} |  |",
                f"| 256, 1x1, 256 -> 3, trained | {'not measured | ' * 6} |"):
        assert row in table


def test_results_of_other_steps_stay_with_only(report, tmp_path):
    def runner(device: str):
        return report.Runner(report.STEPS, tmp_path, tmp_path / "gpu.md", 60, [f"--device={device}"])

    first = runner("cpu")
    first.outcomes["ops"] = {"outcome": "ok", "seconds": 1.0}
    (tmp_path / "ops.json").write_text(json.dumps({"found": "old", "skipped": "", "values": {}}))
    first.write()
    again = runner("cpu")
    again.continue_from_folder()
    assert again.outcomes["ops"]["outcome"] == "ok"
    other = runner("cuda")                      # What another device found does not belong beside it.
    other.continue_from_folder()
    assert other.outcomes == {}
    assert not (tmp_path / "ops.json").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--only=ops,none"], "--only=none: no such step: choose from versions, build,"),
    (["--device=cpu"], "add --quick"),
])
def test_mistakes(report, tmp_path, options, message):
    result = CliRunner().invoke(report.main, ["--device=cpu", f"--folder={tmp_path}", *options])
    assert result.exit_code == 2
    assert message in result.output


def run_here(arguments, on_line=lambda line: None):
    """In place of `gpu_steps.run`: a program of the project in this process, which has imported everything."""
    name = arguments[1] if arguments[0] == "-m" else Path(arguments[0]).stem
    began = time.perf_counter()
    done = CliRunner().invoke(importlib.import_module(name).main, arguments[2 if arguments[0] == "-m" else 1:],
                              catch_exceptions=False)
    assert done.exit_code == 0, done.output
    for line in done.output.splitlines():
        on_line(line)
    return time.perf_counter() - began


@pytest.mark.slow
def test_everything_in_miniature(report, tmp_path, monkeypatch):
    """All steps and the programs that they run, in this process: each would import the same for seconds."""
    import gpu_steps

    def outcome(runner, step, limit):
        done = CliRunner().invoke(gpu_steps.main, [step.name, f"--out={runner.results_of(step)}",
                                                   f"--folder={runner.folder}", *runner.options],
                                  catch_exceptions=False)
        assert done.exit_code == 0, f"{step.name}: {done.output}"
        reason = report.read_results(runner.results_of(step))["skipped"]
        return f"skipped: {reason}" if reason else "ok"

    monkeypatch.setattr(gpu_steps, "run", run_here)
    monkeypatch.setattr(report.Runner, "_outcome", outcome)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)       # Steps set it.
    try:
        done = CliRunner().invoke(report.main, ["--device=cpu", "--quick", "--minutes=14", f"--folder={tmp_path}/work",
                                                f"--dest={tmp_path}/gpu.md"], catch_exceptions=False)
    finally:
        tune.use(torch.device("cpu"), None)
    assert done.exit_code == 0, done.output
    outcomes = {name: x["outcome"] for name, x in json.loads((tmp_path / "work/report.json").read_text())[
        "outcomes"].items()}
    assert list(outcomes) == [step.name for step in report.STEPS]
    assert outcomes == dict.fromkeys(outcomes, "ok") | {"tests": outcomes["tests"]}
    assert outcomes["tests"] == "ok" or outcomes["tests"].startswith("skipped: no CUDA device: ")
    table = (tmp_path / "gpu.md").read_text()
    assert "In miniature" in table
    assert "| micro-batch 2, one iteration | not measured" not in table
    assert "fid by " in table
    assert len([line for line in done.output.splitlines() if line.startswith("[")]) == 2 * len(report.STEPS)


@pytest.mark.slow
def test_a_step_runs_in_its_process(report, tmp_path):
    """As the report starts it."""
    done = CliRunner().invoke(report.main, ["--device=cpu", "--quick", "--only=build", f"--folder={tmp_path}/work",
                                            f"--dest={tmp_path}/gpu.md"])
    assert done.exit_code == 0, done.output
    assert "[1/1] compiling the operations: ok after " in done.output
    assert json.loads((tmp_path / "work/build.json").read_text())["found"] == "cpu was there"
