"""Saving: whole or not at all, in the background, in order; the best model; what is kept; full disks; kills."""
import dataclasses
import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError, cli
from metrics.protocols import METRICS
from torch_utils import checkpoint
from torch_utils.nested import copy_to_cpu, tensor_bytes
from training.config import DiscriminatorConfig, SavingConfig, to_dict
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator
from training.run import saving
from training.run.folder import BEST_FILE, PREVIOUS_STATE_FILE, STATE_FILE
from training.run.formats import NETWORK_FORMAT, STATE_FORMAT
from training.run.resume import load_state
from training.run.saving import (
    NonFiniteState,
    Saver,
    Score,
    Writer,
    pick_score,
    read_score,
    superfluous,
    update_best,
)
from training.run.snapshots import images_shown, snapshot_name
from training.trainer import Progress

ROOT = Path(__file__).resolve().parents[3]
SMALL_G = Generator(stem_config(8, 3, 64, 4, z_dim=8, w_dim=8))

#----------------------------------------------------------------------------

class SmallTrainer:
    """A trainer of which one tensor moves: it holds the number of images."""

    def __init__(self, cur_nimg: int = 0, **counters):
        self.progress = Progress(cur_nimg, **counters)
        self.weight = torch.full([1000], float(cur_nimg))

    def state_dict(self):
        optimizer = {"state": {}, "param_groups": [{"params": []}]}
        return {"G": SMALL_G.state_dict(), "G_ema": SMALL_G.state_dict(), "D": {"w": self.weight},
                "counters": dataclasses.asdict(self.progress), "pl_mean": torch.zeros([]),
                "generator_config": to_dict(SMALL_G.config), "discriminator_config": to_dict(DiscriminatorConfig()),
                "optimizers": {"G": optimizer, "D": optimizer}, "backbones": {}}


@pytest.fixture
def saver(tmp_path, monkeypatch):
    """Makes savers of one folder."""
    monkeypatch.setattr(saving, "network_snapshot", lambda state, config, names, score: {
        "format": NETWORK_FORMAT, "D": state["D"], "progress": state["counters"], "score": score})

    def make(**settings) -> Saver:
        config = types.SimpleNamespace(saving=SavingConfig(**settings))
        return Saver(tmp_path, config, [], lambda text: None)
    return make


def evaluated(saver: Saver, state: SmallTrainer, value: float | None) -> None:
    """What the loop does at a snapshot whose FID is `value`."""
    captured = saver.capture(state)
    score = None if value is None else Score("fid", value)
    if score is not None:
        update_best(state.progress, score)
    state.progress.snapshot_due = False
    saver.save_snapshot(state.progress, captured, score)


def snapshots(folder: Path) -> list[int]:
    return sorted(n for p in folder.iterdir() if (n := images_shown(p.name)) is not None)


def best(folder: Path) -> tuple[float, int]:
    content = checkpoint.load(folder / BEST_FILE, NETWORK_FORMAT)
    assert content["D"]["w"][0] == content["progress"]["cur_nimg"]
    return content["score"]["value"], content["progress"]["cur_nimg"]

#----------------------------------------------------------------------------
# The writer.

def test_jobs_run_in_order_and_one_at_a_time():
    writer, seen, go = Writer(), [], threading.Event()
    writer.submit(lambda: (go.wait(10), seen.append(1)), background=True)
    assert seen == []                                       # Not waited for.
    threading.Timer(0.05, go.set).start()
    writer.submit(lambda: seen.append(2), background=False)
    assert seen == [1, 2]
    writer.close()


def test_an_error_of_the_thread_is_raised_by_the_next_call():
    def fail():
        raise UserError("full")

    for call in (lambda w: w.submit(lambda: None, True), lambda w: w.wait(), lambda w: w.close()):
        writer = Writer()
        writer.submit(fail, background=True)
        with pytest.raises(UserError, match="full"):
            call(writer)
        writer.close()                                      # Told once.


def test_a_copy_does_not_change_with_training():
    state = {"a": torch.ones(3), "b": [torch.zeros(2), (1, "x", None)]}
    copied = copy_to_cpu(state)
    state["a"].add_(1)
    state["b"][0].add_(1)
    assert copied["a"].tolist() == [1, 1, 1]
    assert copied["b"][0].tolist() == [0, 0]
    assert copied["b"][1] == (1, "x", None)
    assert tensor_bytes(state) == 20


def test_training_may_go_on_while_a_state_is_written(saver, tmp_path, monkeypatch):
    """The file holds the moment of the save, not what the tensors became meanwhile."""
    go, save = threading.Event(), checkpoint.save
    monkeypatch.setattr(saving.checkpoint, "save", lambda *args, **more: (go.wait(10), save(*args, **more)))
    state, s = SmallTrainer(8), saver()
    s.save_state(state)
    state.weight += 1
    state.progress.cur_nimg = 9
    go.set()
    s.close()
    content = checkpoint.load(tmp_path / STATE_FILE, STATE_FORMAT)
    assert (content["counters"]["cur_nimg"], content["D"]["w"][0]) == (8, 8)


@pytest.mark.parametrize("settings", [{"background": False}, {}])
def test_without_memory_for_a_copy_files_are_written_at_once(saver, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(saving, "free_memory", lambda: 7000)       # The state has 8,004 bytes.
    s, said = saver(**settings), []
    s.say = said.append
    s.save_state(SmallTrainer(8))
    assert (tmp_path / STATE_FILE).is_file()                # Without waiting for a thread.
    s.save_state(SmallTrainer(16))
    assert len(said) == (0 if settings else 1)              # Said once.
    assert saving.free_memory() == 7000


def test_states_are_due_by_the_clock(saver, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    often, never = saver(state_minutes=10), saver(state_minutes=0)
    assert not often.state_is_due()
    now[0] += 601
    assert often.state_is_due()
    assert not never.state_is_due()
    often.save_state(SmallTrainer(8))
    assert not often.state_is_due()
    often.close()

#----------------------------------------------------------------------------
# Damaged files, full disks, kills.

def damage(path: Path) -> None:
    """Change one byte of a tensor: the archive remains readable."""
    data = bytearray(path.read_bytes())
    position = data.index(torch.full([10], 16.0).numpy().tobytes())
    data[position] ^= 1
    path.write_bytes(data)


def spoiled(path: Path, how: str) -> None:
    """A whole file with content that cannot be continued."""
    content = checkpoint.load(path, STATE_FORMAT)
    if how == "no optimisers":
        del content["optimizers"]
    elif how == "not finite":
        content["D"]["w"][3] = float("nan")
    elif how == "other settings":
        content["generator_config"]["w_dim"] = 9
    checkpoint.save(path, content)


@pytest.mark.parametrize("how", ["cut", "byte", "gone", "no optimisers", "not finite", "other settings"])
def test_a_damaged_state_gives_way_to_the_one_before(saver, tmp_path, how):
    s = saver()
    for nimg in (8, 16):
        s.save_state(SmallTrainer(nimg))
    s.close()
    newest, said = tmp_path / STATE_FILE, []
    assert load_state(tmp_path, said.append)["counters"]["cur_nimg"] == 16
    assert said == []
    if how == "gone":
        newest.unlink()
    elif how == "cut":
        newest.write_bytes(newest.read_bytes()[:-500])
    elif how == "byte":
        damage(newest)
    else:
        spoiled(newest, how)
    assert load_state(tmp_path, said.append)["counters"]["cur_nimg"] == 8
    assert PREVIOUS_STATE_FILE in said[0]
    (tmp_path / PREVIOUS_STATE_FILE).write_bytes(b"")
    with pytest.raises(UserError, match=PREVIOUS_STATE_FILE):
        load_state(tmp_path, said.append)
    assert load_state(tmp_path / "elsewhere", said.append) is None


def test_what_is_not_finite_is_not_written(saver, tmp_path):
    s, state = saver(), SmallTrainer(8)
    s.save_state(state)
    state = SmallTrainer(16)
    state.weight[5] = float("inf")
    s.say = (said := []).append
    s.save_state(state)
    assert "D.w is not finite" in said[0]
    with pytest.raises(NonFiniteState, match=r"D\.w is not finite"):
        s.capture(state)
    s.close()
    assert load_state(tmp_path, said.append)["counters"]["cur_nimg"] == 8
    assert not (tmp_path / PREVIOUS_STATE_FILE).exists()


@pytest.mark.parametrize("room", [0, 100, 2000])
def test_a_full_disk_keeps_the_last_good_files(saver, tmp_path, monkeypatch, room):
    s = saver()
    s.save_state(SmallTrainer(8))
    s.close()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    class FullDisk(checkpoint._ErrorKeeper):
        def __init__(self, file):
            super().__init__(types.SimpleNamespace(write=self.to_disk))
            self.real, self.left = file, room

        def to_disk(self, data):
            self.left -= memoryview(data).nbytes
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.real.write(data)

    monkeypatch.setattr(checkpoint, "_ErrorKeeper", FullDisk)
    s = saver()
    s.save_state(SmallTrainer(16))
    with pytest.raises(UserError, match=r"training-state\.pt: cannot be written \(No space left on device\)"):
        s.close()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_write_that_the_operating_system_cuts_short(tmp_path):
    """Files may not grow beyond 64 KiB. As on a full disk, some bytes are written and then a write fails; but a full
    disk would take a mount, which needs root."""
    checkpoint.save(tmp_path / "x", {"format": "f", "a": torch.zeros(100)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        for size in (20_000, 1_000_000):
            with pytest.raises(UserError, match=r"cannot be written \(File too large\)"):
                checkpoint.save(tmp_path / "x", {"format": "f", "a": torch.zeros(size)})
            assert [p.name for p in tmp_path.iterdir()] == ["x"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load(tmp_path / "x", "f")["a"].shape == (100,)


def test_a_full_disk_anywhere_is_one_line():
    @click.command(cls=cli.Command)
    def command():
        raise OSError(errno.ENOSPC, "No space left on device", "log.txt")
    result = CliRunner().invoke(command)
    assert result.exit_code == 2
    assert "log.txt: No space left on device: make room" in result.output


SLOW_SAVE = """
import sys, time, torch
from pathlib import Path
from torch_utils import checkpoint
from torch_utils.nested import copy_to_cpu, tensor_bytes

class Slow(checkpoint._ErrorKeeper):
    def write(self, data):
        count = super().write(data)
        self.file.flush()
        print("wrote", count, flush=True)
        time.sleep(0.05)
        return count

path, previous = Path(sys.argv[1]), Path(sys.argv[2])
checkpoint.save(path, {"format": "f", "n": 0}, previous)
checkpoint._ErrorKeeper = Slow
for n in range(1, 100):
    checkpoint.save(path, {"format": "f", "n": n, "a": torch.full([1000], float(n))}, previous)
    print("saved", n, flush=True)
"""


@pytest.mark.slow
def test_killed_in_the_middle_of_a_save(tmp_path):
    """SIGKILL after some of the bytes: the file before is still there, and whole."""
    path, previous = tmp_path / "state.pt", tmp_path / "prev.pt"
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", SLOW_SAVE, path, previous], env=env, text=True,
                          stdout=subprocess.PIPE) as process:
        saved = 0
        for line in process.stdout:
            word, number = line.split()
            saved = int(number) if word == "saved" else saved
            if saved == 1 and word == "wrote":
                os.kill(process.pid, signal.SIGKILL)
                break
    assert [p for p in tmp_path.iterdir() if p.suffix == ".tmp"]        # In the middle, really.
    assert checkpoint.load(path, "f")["n"] == 1
    assert checkpoint.load(previous, "f")["n"] == 0

#----------------------------------------------------------------------------
# The best model.

def test_scores():
    assert Score("fid", 2.0).is_better_than(Score("fid", 3.0))
    assert Score("accuracy", 3.0, False).is_better_than(Score("accuracy", 2.0))
    assert not Score("fid", float("nan")).is_better_than(None)
    assert Score("kid", 9.0).is_better_than(Score("fid", 3.0))      # Another metric decides now.
    assert Score("fid", 2.0).replaces(Score("fid", 2.0))
    results = [{"metric": "fid", "results": {"fid": 2.0}, "lower_is_better": True},
               {"metric": "pr", "results": {"pr_precision": 0.5}, "lower_is_better": False}]
    assert pick_score(results, None) == Score("fid", 2.0)
    assert pick_score(results, "pr") == Score("pr", 0.5, False)
    results.append({"metric": "is50k@num=64", "results": {"is50k_mean@num=64": 9.0}, "lower_is_better": False})
    assert pick_score(results, "is50k") == Score("is50k@num=64", 9.0, False)
    for name, lower in (("fd_dinov2_50k", True), ("adm_sfid50k", True), ("ppl2_wend", True), ("rfid_random", True),
                        ("eqr50k", False), ("adm_is50k", False), ("adm_pr50k", False)):
        assert METRICS[name].kind.lower_is_better == lower
        assert Score(name, 1.0, lower).is_better_than(Score(name, 2.0, lower)) == lower


def test_best_and_patience_count(saver, tmp_path):
    s, state = saver(), SmallTrainer()
    for nimg, value, bad in ((0, 9.0, 0), (1000, 5.0, 0), (2000, 6.0, 1), (3000, float("nan"), 2), (4000, 4.0, 0)):
        state.progress.cur_nimg, state.weight = nimg, torch.full([1000], float(nimg))
        evaluated(s, state, value)
        assert state.progress.bad_evals == bad
    s.close()
    assert (state.progress.best_value, state.progress.best_nimg, state.progress.best_metric) == (4.0, 4000, "fid")
    assert best(tmp_path) == (4.0, 4000)


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("where", ["before the link", "after the link", "before the state"])
def test_killed_between_weights_and_state_never_leaves_a_worse_best(saver, tmp_path, monkeypatch, where):
    """The best model's score is in its own file; a later, worse one does not replace it, whatever the state says."""
    s, state = saver(background=False), SmallTrainer(1000)
    evaluated(s, state, 7.0)
    state = SmallTrainer(2000, best_value=7.0, best_nimg=1000, best_metric="fid")

    def killed(*args, **more):
        if where == "after the link":
            link(*args)
        raise Killed

    link = saving.link_or_copy
    name = "_replace_state" if where == "before the state" else "link_or_copy"
    with monkeypatch.context() as patch:
        patch.setattr(s if name == "_replace_state" else saving, name, killed)
        with pytest.raises(Killed):
            evaluated(s, state, 5.0)
    reached = (7.0, 1000) if where == "before the link" else (5.0, 2000)
    assert best(tmp_path) == reached

    # Started again from the state at 1000; with other settings the evaluation at 2000 comes out as 6.
    counters = load_state(tmp_path, print)["counters"]
    assert (counters["cur_nimg"], counters["best_value"]) == (1000, 7.0)
    state = SmallTrainer(2000, best_value=7.0, best_nimg=1000, best_metric="fid")
    evaluated(saver(background=False), state, 6.0)
    value, nimg = best(tmp_path)
    assert value == min(6.0, reached[0])
    # With the same settings it comes out as 5 again.
    evaluated(saver(background=False), SmallTrainer(2000, best_value=7.0, best_nimg=1000, best_metric="fid"), 5.0)
    assert best(tmp_path) == (5.0, 2000)


def test_without_metrics_the_newest_is_the_best_but_no_measured_one_is_lost(saver, tmp_path):
    s = saver(background=False)
    for nimg in (1000, 2000):
        evaluated(s, SmallTrainer(nimg), None)
        assert checkpoint.load(tmp_path / BEST_FILE, NETWORK_FORMAT)["progress"]["cur_nimg"] == nimg
    evaluated(s, SmallTrainer(3000), 5.0)
    evaluated(s, SmallTrainer(4000), None)
    assert best(tmp_path) == (5.0, 3000)
    assert read_score(tmp_path / BEST_FILE) == Score("fid", 5.0)
    (tmp_path / BEST_FILE).write_bytes(b"damaged")
    evaluated(s, SmallTrainer(5000), 9.0)
    assert best(tmp_path) == (9.0, 5000)

#----------------------------------------------------------------------------
# Retention.

def test_which_snapshots_may_go():
    positions = [0, 1000, 2000, 3000, 4000, 5000]
    assert superfluous(positions, 2, 0) == [0, 1000, 2000, 3000]
    assert superfluous(positions, 0, 0) == []
    assert superfluous(positions, 9, 0) == []
    assert superfluous(positions, 1, 2) == [1000, 3000]
    assert superfluous([0, 1024, 2048, 3072, 4096], 1, 2) == [1024, 3072]      # The first in each cell of the grid.


def test_what_is_kept(saver, tmp_path):
    s, state = saver(keep=2, keep_every=3), SmallTrainer()
    for nimg, value in ((0, 9.0), (1000, 1.0), (2000, 5.0), (3000, 5.0), (4000, 5.0), (5000, 6.0), (6008, 7.0)):
        state.progress.cur_nimg, state.weight = nimg, torch.full([1000], float(nimg))
        evaluated(s, state, value)
    s.close()
    assert snapshots(tmp_path) == [0, 1000, 3000, 5000, 6008]           # Grid, best, last two.
    assert best(tmp_path) == (1.0, 1000)
    assert os.stat(tmp_path / BEST_FILE).st_ino == os.stat(tmp_path / snapshot_name(1000)).st_ino   # No second copy.
    assert images_shown(snapshot_name(6008)) == 6008


def test_a_snapshot_is_not_let_go_by_older_files_of_later_moments(saver, tmp_path):
    """After a restart from an older state there are snapshots of what is still to come."""
    s = saver(keep=1, background=False)
    for nimg in (1000, 2000, 3000):
        evaluated(s, SmallTrainer(nimg), None)
    evaluated(s, SmallTrainer(2000), None)
    assert snapshots(tmp_path) == [2000, 3000]
