"""Ends before the end: signals, --restart_every, a STOP file, patience; and that nothing is lost by them."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import train
from tests.training.test_loop import SMALL, assert_equal_states, only_run
from torch_utils import checkpoint, distributed, peer_monitor
from training import trainer
from training.data.loading import start_loading
from training.run import stopping
from training.run.folder import STATE_FILE
from training.run.formats import STATE_FORMAT
from training.run.stopping import STOP_FILE, StopRequests

ROOT = Path(__file__).resolve().parents[3]


def run(outdir, data, *more) -> tuple[int, str]:
    args = [*SMALL, f"--outdir={outdir}", f"--data={data}", "--kimg=0.032", "--tick=0.016", "--snap=1", *more]
    result = CliRunner().invoke(train.main, args)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def counters(folder) -> dict:
    return checkpoint.load(folder / STATE_FILE, STATE_FORMAT)["counters"]


def at_iteration(monkeypatch, number: int, action) -> None:
    """Call `action` once, in the given iteration, as if from outside."""
    update, seen = trainer.update_ema, []

    def update_and_act(*args):
        seen.append(1)
        if len(seen) == number:
            action()
        return update(*args)
    monkeypatch.setattr(trainer, "update_ema", update_and_act)

#----------------------------------------------------------------------------
# Noticing and agreeing.

@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_signals_are_noticed_inside_only(name):
    before = signal.getsignal(getattr(signal, name))
    with StopRequests() as stop:
        assert stop.poll() == stopping.NOTHING
        os.kill(os.getpid(), getattr(signal, name))
        assert name in stop.poll().restart
        assert name in stop.poll().restart          # It stays asked for.
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_second_ctrl_c_ends_at_once_whatever_the_main_thread_does(capsys):
    ends = []
    with StopRequests(end=lambda *how: ends.append(how)) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)         # The same one, from terminal and launcher.
        deadline = time.monotonic() + 10
        while not stop.is_asked():
            assert time.monotonic() < deadline
        assert "SIGINT" in stop.poll().restart
        stop._hear(signal.SIGINT)
        assert ends == []
        stop._interrupted -= 1
        stop._hear(signal.SIGTERM)
        assert ends == []
        stop._hear(signal.SIGINT)
        assert ends[0][1] == 130
        assert "SIGINT" in stop.poll().restart      # The first one counts.
    assert "a second Ctrl-C ends at once" in capsys.readouterr().err


def test_ignored_signals_stay_ignored():
    """nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.poll() == stopping.NOTHING
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_that_ends_does_not_end_the_run(monkeypatch):
    """`train.py | tee` and Ctrl-C, or a closed terminal."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", broken)
        with stopping.unbreakable_output():
            print("lost", flush=True)
            print("lost, too", flush=True)
            assert sys.stdout.encoding == broken.encoding
        assert sys.stdout is broken


def test_output_that_was_closed_before_the_start(monkeypatch):
    """`train.py >&-`: Python has None in place of the stream."""
    monkeypatch.setattr(sys, "stdout", None)
    with stopping.unbreakable_output():
        print("nowhere", flush=True)
    assert sys.stdout is None


@pytest.mark.parametrize("stream", [None, "stuck", "closed"])
def test_a_process_ends_whatever_its_output_does(monkeypatch, stream):
    """The main thread may hold stdout's lock for ever: it writes into `less`, which does not read."""
    class Stream:
        def flush(self):
            if stream == "closed":
                raise ValueError("I/O operation on closed file")
            threading.Event().wait()
    codes = []
    monkeypatch.setattr(peer_monitor, "LAST_WORDS_SECONDS", 0.05)
    monkeypatch.setattr(peer_monitor.os, "_exit", codes.append)
    monkeypatch.setattr(sys, "stdout", stream and Stream())
    peer_monitor.end_process("", 7)
    assert codes == [7]


def test_out_of_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    with StopRequests(restart_every=60) as stop:
        assert stop.poll().restart is None
        now[0] += 60
        assert "--restart_every=60" in stop.poll().restart


def test_stop_file(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stop = StopRequests()
    stop.folder = tmp_path
    assert stop.poll().finish is None
    (tmp_path / STOP_FILE).touch()
    assert stop.poll().finish is None               # Looked a moment ago.
    now[0] += 1
    assert STOP_FILE in stop.poll().finish
    stop.remove_file()
    assert not (tmp_path / STOP_FILE).exists()


def test_several_processes_agree_and_meet_rarely(monkeypatch):
    """Three processes in turn: a signal on the last one stops all, after the same iteration."""
    now, messages = [0.0], []
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    stops = [StopRequests() for _ in range(3)]
    tables = [[0, 0, 0, 1]] * 3
    monkeypatch.setattr(distributed, "world_size", lambda: 3)

    def all_gather(row):
        messages.append(row.tolist()[0])
        return torch.tensor(tables)
    monkeypatch.setattr(distributed, "all_gather", all_gather)

    for _ in range(200):        # Iterations of half a second.
        now[0] += 0.5
        tables = [[stop._signal, 0, 0, 10] for stop in stops]
        answers = [stop.poll() for stop in stops]
        assert answers == [stopping.NOTHING] * 3
    assert len(messages) // 3 < 200 / (stopping.POLL_SECONDS / 0.5) + 5
    assert messages[-1][3] == 10                    # What it takes to meet every five seconds.
    stops[2]._notice(signal.SIGUSR1, None)
    late = 0
    while answers[0].restart is None:
        now[0] += 0.5
        late += 1
        tables = [[stop._signal, 0, 0, 10] for stop in stops]
        answers = [stop.poll() for stop in stops]
        assert len(set(answers)) == 1
    assert "SIGUSR1" in answers[0].restart
    assert late <= 10

#----------------------------------------------------------------------------
# Runs.

@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data16):
    """Four iterations, two ticks."""
    out = tmp_path_factory.mktemp("unbroken")
    assert run(out, data16)[0] == 0
    return only_run(out)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "iteration"), [("SIGTERM", 1), ("SIGINT", 2), ("SIGHUP", 3), ("SIGUSR1", 4)])
def test_a_signal_at_any_iteration_loses_nothing(unbroken, data16, tmp_path, monkeypatch, name, iteration):
    """Exit code 3 after the iteration; started again the run is the unbroken one, bit by bit, snapshots included."""
    with monkeypatch.context() as patch:
        at_iteration(patch, iteration, lambda: os.kill(os.getpid(), getattr(signal, name)))
        code, output = run(tmp_path, data16)
    assert code == 3
    assert f"stopped by {name}" in output
    folder = only_run(tmp_path)
    assert counters(folder)["cur_nimg"] == 8 * iteration
    code, output = run(tmp_path, data16)
    assert code == 0
    assert "resuming at kimg 0.0" in output
    assert_equal_states(*(checkpoint.load(f / STATE_FILE, STATE_FORMAT) for f in (folder, unbroken)))
    assert {p.name for p in unbroken.glob("*.pkl")} == {p.name for p in folder.glob("*.pkl")}
    ticks = [json.loads(line)["Progress/tick"] for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert ticks == [1, 2]
    log = (folder / "log.txt").read_text()
    assert log.count("training for") == 2           # Appended to.


SIGNAL_ALL = """
import os, subprocess, sys, time
import train
from torch_utils.launch import children_of
from training import trainer
update, seen = trainer.update_ema, []
def update_and_signal(*args):
    seen.append(1)
    if len(seen) == 1:
        pids = [os.getpid(), *children_of(os.getpid())]
        assert len(pids) > 1
        subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)
        time.sleep(0.5)
    return update(*args)
trainer.update_ema = update_and_signal
train.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_signal_to_every_process_of_the_job_leaves_the_loaders_alive(data16, tmp_path):
    """Slurm sends it to loader processes, too, and training still finishes its iteration and saves.

    In a process of its own, as a job is: children and threads that other tests left over are no part of it.
    """
    args = [*SMALL, f"--outdir={tmp_path}", f"--data={data16}", "--kimg=0.032", "--tick=0.016", "--snap=1",
            "--workers=1"]
    done = subprocess.run([sys.executable, "-c", SIGNAL_ALL, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 3, done.stdout[-2000:] + done.stderr[-4000:]
    assert counters(only_run(tmp_path))["cur_nimg"] == 8


class _Mask(torch.utils.data.Dataset):
    """Serves whether SIGTERM was blocked when the loader process came into being."""
    blocked = False

    def __len__(self):
        return 1

    def __getitem__(self, _index):
        return self.blocked


def _read_mask(_worker):
    _Mask.blocked = signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_are_born_with_signals_blocked(workers):
    loader = torch.utils.data.DataLoader(_Mask(), num_workers=workers, worker_init_fn=_read_mask)
    assert [bool(blocked) for blocked in start_loading(loader)] == [workers > 0]
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
def test_stop_file_ends_the_stage_and_the_same_command_goes_on(data16, tmp_path, monkeypatch):
    at_iteration(monkeypatch, 1, lambda: (only_run(tmp_path) / STOP_FILE).touch())
    code, output = run(tmp_path, data16)
    assert code == 0
    assert "stopped by the file STOP" in output
    folder = only_run(tmp_path)
    assert not (folder / STOP_FILE).exists()
    assert counters(folder)["cur_nimg"] == 8
    assert (folder / "network-snapshot-000000.008.pkl").is_file()
    assert run(tmp_path, data16)[0] == 0
    assert counters(folder)["cur_nimg"] == 32


def evaluator(values: list[float], monkeypatch, seen: list | None = None) -> None:
    """Metrics that come out as `values`."""
    rest = iter(values)

    def evaluate(G_ema):
        if seen is not None:
            seen.append(1)
        return [{"metric": "fid", "lower_is_better": True, "results": {"fid": next(rest)}}]
    monkeypatch.setattr(train, "make_evaluator", lambda *args: evaluate)


@pytest.mark.slow
def test_patience_ends_the_stage(data16, tmp_path, monkeypatch):
    """The count survives a restart; a larger patience goes on."""
    evaluator([9.0, 5.0, 6.0, 7.0, 8.0], monkeypatch)
    options = ("--metrics=fid", "--tick=0.008", "--stop-patience=2", "--kimg=100")
    with monkeypatch.context() as patch:
        at_iteration(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert run(tmp_path, data16, *options)[0] == 3
    folder = only_run(tmp_path)
    code, output = run(tmp_path, data16, *options)
    assert code == 0
    assert "2 evaluations without a better fid than that at kimg 0.008 (--stop-patience=2)" in output
    assert (counters(folder)["cur_nimg"], counters(folder)["bad_evals"]) == (24, 2)
    score = checkpoint.load(folder / "best_model.pkl", "stylesan-xl-network")
    assert (score["score"]["value"], score["progress"]["cur_nimg"]) == (5.0, 8)
    assert run(tmp_path, data16, *options)[0] == 0
    assert counters(folder)["cur_nimg"] == 24       # Ended before; nothing was trained.
    options = ("--metrics=fid", "--tick=0.008", "--stop-patience=3", "--kimg=100")
    assert run(tmp_path, data16, *options)[0] == 0
    assert counters(folder)["cur_nimg"] == 32


@pytest.mark.slow
def test_killed_while_metrics_are_computed(data16, tmp_path, monkeypatch):
    """The state is on disk before the evaluation, which the next start makes up for."""
    class Killed(BaseException):
        pass

    def die(G_ema):
        if (counters(only_run(tmp_path))["cur_nimg"]) == 8:
            raise Killed
        return [{"metric": "fid", "lower_is_better": True, "results": {"fid": 5.0}}]

    options = ("--metrics=fid", "--tick=0.008", "--kimg=0.008", "--save-in-background=0")
    with monkeypatch.context() as patch:
        patch.setattr(train, "make_evaluator", lambda *args: die)
        with pytest.raises(Killed):
            CliRunner().invoke(train.main, [*SMALL, f"--outdir={tmp_path}", f"--data={data16}", "--snap=1", *options],
                               catch_exceptions=False)
    folder = only_run(tmp_path)
    assert not (folder / "network-snapshot-000000.008.pkl").exists()
    seen = []
    evaluator([4.0], monkeypatch, seen)
    code, output = run(tmp_path, data16, *options)
    assert code == 0
    assert "resuming at kimg 0.0" in output
    assert len(seen) == 1
    assert checkpoint.load(folder / "best_model.pkl", "stylesan-xl-network")["score"]["value"] == 4.0


@pytest.mark.parametrize(("more", "message"), [
    ("--best-metric=kid --metrics=fid", "--best-metric=kid is not among --metrics=fid"),
    ("--best-metric=fid --metrics=adm", "not among --metrics=adm_is50k,adm_fid50k,adm_sfid50k,adm_pr50k: add"),
    ("--stop-patience=3 --metrics=none", "--stop-patience=3 counts evaluations"),
])
def test_mistakes(data16, tmp_path, more, message):
    result = CliRunner().invoke(train.main, [*SMALL, f"--outdir={tmp_path}", f"--data={data16}", *more.split()])
    assert result.exit_code == 2
    assert message in result.output
