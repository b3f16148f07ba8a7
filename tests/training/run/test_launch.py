"""Launchers' environments, processes that must agree, groups of samples: what of many nodes needs none."""
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dnnlib import UserError
from tests.closeness import assert_close
from tests.training.test_loop import SMALL
from torch_utils import launch, peer_monitor
from torch_utils.launch import Launch, first_host, read_launch
from train import main
from training.discriminators.blocks import DownBlock, begin_step, end_step, set_ghost_batch
from training.run import preflight

ROOT = Path(__file__).resolve().parents[3]
SLURM = {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_ID": "2",
         "SLURM_JOB_ID": "1000", "SLURM_STEP_NODELIST": "gpu[07-08]"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "head", "MASTER_PORT": "1234",
            "TORCHELASTIC_USE_AGENT_STORE": "True"}


def test_environments_of_launchers():
    assert read_launch({}) is None
    assert read_launch(TORCHRUN) == Launch("torchrun", 3, 4, 1, "head", 1234, hosts_store=False)
    assert read_launch(TORCHRUN | {"RANK": "0"}).hosts_store is False       # The agent does.
    assert read_launch({"RANK": "0", "WORLD_SIZE": "2"}).hosts_store is True
    assert read_launch(SLURM) == Launch("slurm", 9, 16, 1, "gpu07", 10000 + (1000 * 16 + 2) % 20000, False)
    assert read_launch(SLURM | {"SLURM_PROCID": "0", "MASTER_ADDR": "x", "MASTER_PORT": "5"}) == Launch(
        "slurm", 0, 16, 1, "x", 5, hosts_store=True)
    assert read_launch(SLURM | TORCHRUN).launcher == "torchrun"             # srun torchrun.


@pytest.mark.parametrize("missing", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID"])
def test_batch_script_of_slurm_is_no_launcher(missing):
    assert read_launch({k: v for k, v in SLURM.items() if k != missing}) is None
    assert read_launch(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) is None


def test_broken_environment_is_named():
    with pytest.raises(UserError, match="RANK='x'"):
        read_launch(TORCHRUN | {"RANK": "x"})
    with pytest.raises(UserError, match="SLURM_LOCALID"):
        read_launch({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"})


@pytest.mark.parametrize(("nodes", "first"), [
    ("gpu07", "gpu07"), ("gpu[07-09,12],login1", "gpu07"), ("a,b", "a"), ("r[3,5]n1", "r3n1"),
    ("n-1.x[10-11]", "n-1.x10"),
])
def test_first_host(nodes, first):
    assert first_host(nodes) == first


def test_exit_code_that_torchrun_would_swallow(monkeypatch, tmp_path):
    for name, value in (TORCHRUN | {"RANK": "0"}).items():
        monkeypatch.setenv(name, value)
    assert launch.leave_exit_code(3) == 3           # Nobody waits for a file.
    monkeypatch.setenv(launch.EXIT_FILE, str(tmp_path / "code"))
    assert launch.leave_exit_code(0) == 0
    assert not (tmp_path / "code").exists()
    assert launch.leave_exit_code(3) == 0
    assert (tmp_path / "code").read_text() == "3\n"

#----------------------------------------------------------------------------

class Store(dict):
    """The part of a store that monitors use."""

    def check(self, names):
        return all(name in self for name in names)

    def get(self, name):
        return self[name].encode()

    def set(self, name, value):
        self[name] = value

    def compare_set(self, name, expected, value):
        if self.get_text(name) == expected:
            self[name] = value
        return self[name].encode()

    def get_text(self, name):
        return dict.get(self, name, "")


def test_first_failure_is_the_one_that_is_told():
    store, said = Store(), []
    monitors = [peer_monitor.PeerMonitor(store, rank, 3, f"host{rank}", end=said.append) for rank in range(3)]
    assert monitors[2].report(ValueError("first"))
    assert not monitors[1].report(ValueError("second"))
    assert json.loads(store["failure"])["rank"] == 2
    monitors[2]._look()
    assert said == []                                   # It ends by itself, with its own traceback.
    monitors[0]._look()
    assert "rank 0 on host0 ends, because rank 2 on host2 failed" in said[0]
    assert "ValueError: first" in said[0]


def test_silent_neighbour_is_reported():
    """Looks are counted: a job that was stopped as a whole goes on."""
    store, said = Store({"here/1": "host1"}), []
    w = peer_monitor.PeerMonitor(store, 0, 2, "host0", end=said.append)
    looks = int(2 * peer_monitor.SILENT_SECONDS / peer_monitor.BEAT_SECONDS)
    w._look()                                           # Not begun yet.
    for beat in ("1", "2"):
        store["beat/1"] = beat
        for _ in range(looks):
            w._look()
    assert "failure" not in store
    for _ in range(3):
        w._look()
    assert json.loads(store["failure"])["host"] == "host1"
    assert "rank 1 on host1 failed" in said[0]
    assert "no sign of life for 122 s" in said[0]


def test_a_broken_connection_blames_the_silent_one(monkeypatch):
    """Of three processes the last one is gone, and the second one finds its connection broken."""
    store = Store({f"here/{r}": f"host{r}" for r in range(3)} | {f"beat/{r}": "5" for r in range(3)})
    w = peer_monitor.PeerMonitor(store, 1, 3, "host1")
    monkeypatch.setattr(peer_monitor.time, "sleep", lambda seconds: store.update({"beat/0": "6"}))
    assert w.blame_the_silent() == "rank 2 on host2"
    assert json.loads(store["failure"])["rank"] == 2
    del store["failure"]
    monkeypatch.setattr(peer_monitor.time, "sleep", lambda seconds: store.update({"beat/0": "7", "beat/2": "6"}))
    assert w.blame_the_silent() is None                 # All live: its own fault.


def test_one_process_tells_a_mistake_and_the_others_are_quiet(monkeypatch, tmp_path):
    store, said = Store(), []
    watches = [peer_monitor.PeerMonitor(store, rank, 2, f"host{rank}", end=lambda *how: said.append(how))
               for rank in range(2)]
    assert watches[1].report(UserError("no such file"))
    watches[0]._look()
    assert "UserError: no such file" in said[0][0]      # Nobody waits for a code.
    for name, value in (TORCHRUN | {launch.EXIT_FILE: str(tmp_path / "code")}).items():
        monkeypatch.setenv(name, value)
    said.clear()
    watches[0]._look()
    assert said[0] == ("", 0)


def test_a_stopped_process_is_killed_by_its_sentinel():
    program = ("import os, signal, sys; sys.path.insert(0, '.'); from torch_utils.peer_monitor import Sentinel; "
               "s = Sentinel('rank 1 on here', 0.4); s.beat(); os.kill(os.getpid(), signal.SIGSTOP)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert "rank 1 on here: process" in done.stderr
    assert "no sign of life for 0 s: it is stopped or hangs, and is killed" in done.stderr


def test_children_end_with_the_one_that_started_them(tmp_path):
    """The pipe that only the first process writes to, and what is left of the job when it is gone."""
    os.mkfifo(tmp_path / launch.ALIVE)
    writer = os.open(tmp_path / launch.ALIVE, os.O_RDWR | os.O_NONBLOCK)
    program = ("import sys, time; sys.path.insert(0, '.'); from torch_utils.launch import end_with_launcher; "
               "end_with_launcher(); print('begun', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               stderr=subprocess.PIPE, env=os.environ | {launch.LAUNCHER_FOLDER: str(tmp_path)})
    assert process.stdout.readline() == "begun\n"
    os.close(writer)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "is gone" in errors
    assert not tmp_path.exists()

#----------------------------------------------------------------------------

def test_ranks_that_differ_are_named():
    same = {"code": "a", "torch": "2", "loss.pl_weight": 2.0, "data.path": "/x"}
    assert preflight.differences([same, same | {"data.path": "/y"}], ["n0", "n1"]) == []
    lines = preflight.differences([same, same | {"code": "b"}, same | {"loss.pl_weight": 1.0}], ["n0", "n1", "n2"])
    assert lines == ["code is 'a' on rank 0 (n0), 'b' on rank 1 (n1)",
                     "loss.pl_weight is 2.0 on rank 0 (n0), 1.0 on rank 2 (n2)"]
    many = preflight.differences([same] + [same | {"torch": "1"}] * 5, ["n0"] * 6)
    assert many[0].endswith("and 2 more")


def test_full_disk_is_refused_before_training(monkeypatch, tmp_path):
    usage = dataclasses.make_dataclass("Usage", ["free"])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(3000))
    preflight.check_disk(tmp_path, 1000)
    with pytest.raises(UserError, match="--outdir"):
        preflight.check_disk(tmp_path, 1001)


@pytest.mark.parametrize(("options", "message"), [
    (["--ghost-batch=3"], "--ghost-batch=3 must be at least 2 and divide the micro-batch of 8"),
    (["--split-group=1"], "--ghost-batch=1"),           # Its former name.
    (["--max-restarts=2"], "--max-restarts=2 has an effect only with --gpus"),
])
def test_options_are_checked(data16, tmp_path, options, message):
    from click.testing import CliRunner
    result = CliRunner().invoke(main, [*SMALL, f"--outdir={tmp_path}", f"--data={data16}", "--dry-run", *options])
    assert result.exit_code == 2
    assert message in result.output

#----------------------------------------------------------------------------

def blocks(group: int) -> torch.nn.Module:
    torch.manual_seed(0)
    net = torch.nn.Sequential(DownBlock(3, 5), DownBlock(5, 4)).double()
    set_ghost_batch(net, group)
    return net


def step(net: torch.nn.Module, x: torch.Tensor, parts: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Forward and backward in so many parts; outputs and gradients."""
    begin_step(net)
    y = torch.cat([net(part) for part in x.chunk(parts)])
    (y.square() * torch.arange(len(x))[:, None, None, None]).sum().backward()
    end_step(net)
    return y.detach(), {name: p.grad for name, p in net.named_parameters()}


@pytest.mark.numeric
def test_groups_make_blocks_independent_of_the_cut():
    x = torch.randn(8, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, cut = blocks(2), blocks(2)
    for _ in range(2):
        (y1, g1), (y2, g2) = step(whole, x, 1), step(cut, x, 4)
        assert_close(y1, y2, rtol=0, atol=1e-12)
        for name in g1:
            assert_close(g1[name], g2[name], rtol=0, atol=1e-10)
    for name, value in whole.state_dict().items():
        assert_close(value, cut.state_dict()[name], rtol=0, atol=1e-12)
    official, also = blocks(0), blocks(0)
    assert not torch.allclose(step(official, x, 1)[0], step(also, x, 4)[0])


@pytest.mark.numeric
def test_one_group_is_torch_batch_norm():
    """A group of all samples normalises as BatchNorm does, and moves its running statistics the same way."""
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = blocks(4), blocks(0)
    (y1, g1), (y2, g2) = step(ours, x, 1), step(theirs, x, 1)
    assert_close(y1, y2, rtol=1e-7, atol=1e-7)
    biases = {"0.main.0.bias", "1.main.0.bias"}         # Without effect, and so without gradient but for rounding.
    for name in set(g1) - biases:
        assert_close(g1[name], g2[name], rtol=1e-7, atol=1e-7)
    assert all(g1[name].count_nonzero() == 0 for name in biases)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    for name, value in ours.state_dict().items():
        assert_close(value, theirs.state_dict()[name], rtol=1e-7, atol=1e-7)
    assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-7, atol=1e-7)
