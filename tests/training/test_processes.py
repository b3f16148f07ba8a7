"""Two processes on one machine, started by --gpus=2, by torchrun and as srun starts them."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from legacy import open_snapshot
from tests.ops.cases import needs_compiler
from torch_utils.launch import children_of

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--cfg=stylegan3-t --preset=demo --cbase=64 --cmax=8 --batch=8 --batch-gpu=2 --device=cpu --workers=0 "
           "--metrics=none --backbones=local:random --cond=1 --tick=0.008").split()

pytestmark = pytest.mark.slow


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "STYLESAN_START_SECONDS": "300"} | more


def train(launcher: list[str], outdir: Path, data: Path, *more: str) -> tuple[subprocess.CompletedProcess, Path]:
    command = [*launcher, str(ROOT / "train.py"), *OPTIONS, f"--outdir={outdir}", f"--data={data}", *more]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("training for") == 1       # Only the first process speaks.
    (folder,) = outdir.iterdir()
    return done, folder


@pytest.mark.numeric
def test_two_processes_train_what_one_trains(data16, tmp_path):
    """Equal micro-batches on one or two processes: the same start, the same samples, the same averages of w.

    Spectral norm takes a power iteration per forward, and a process sees only its own forwards: so gradients differ a
    little, and Adam's first steps, which are signs, differ where a gradient is about zero. (`--ghost-batch` takes this
    difference away: test_nodes.py.)
    """
    _, folder = train([sys.executable], tmp_path / "one", data16, "--kimg=0.016")
    one = open_snapshot(folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    _, folder = train(torchrun, tmp_path / "two", data16, "--kimg=0.016", "--num=8")
    two = open_snapshot(folder)
    assert two["progress"]["cur_nimg"] == 16
    assert one["progress"]["batch_idx"] == two["progress"]["batch_idx"] == 2
    w_one, w_two = one["G"]["mapping.w_avg"], two["G"]["mapping.w_avg"]
    assert torch.equal(w_one.abs().sum(dim=1) > 0, w_two.abs().sum(dim=1) > 0)      # The same classes were drawn.
    assert (w_one - w_two).norm() < 0.2 * w_one.norm()
    rates = {"G": 0.0025, "D": 0.002}
    for net, rate in rates.items():
        names = [k for k in one[net] if k.endswith(".weight") and "scratch" not in k]
        moved = max((one[net][k] - two[net][k]).abs().max() for k in names)
        assert moved < 4 * 2 * rate, net                # Two steps of Adam move an element by about twice the rate.

#----------------------------------------------------------------------------

class Job:
    """`train.py --gpus=2`, with its output in a file."""

    def __init__(self, outdir: Path, data: Path, *more: str):
        self.log = outdir.with_suffix(".log")
        command = [sys.executable, str(ROOT / "train.py"), *OPTIONS, "--gpus=2", "--num=8", f"--outdir={outdir}",
                   f"--data={data}", *more]
        with open(self.log, "w") as f:
            self.process = subprocess.Popen(command, env=environment(), stdout=f, stderr=subprocess.STDOUT)

    def wait_for(self, pattern: str) -> None:
        """Until the output has it."""
        end = time.monotonic() + 900
        while not re.search(pattern, self.log.read_text()):
            assert time.monotonic() < end, self.log.read_text()[-4000:]
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            time.sleep(0.1)

    def workers(self) -> list[int]:
        """Process ids of the ranks."""
        (torchrun,) = children_of(self.process.pid)
        return children_of(torchrun)


def test_killed_worker_is_replaced_and_training_goes_on(data16, tmp_path):
    """--max-restarts: all processes start again from the last state when one is killed."""
    job = Job(tmp_path / "out", data16, "--kimg=0.04", "--snap=1", "--max-restarts=1")
    job.wait_for("tick 2 ")
    before = job.workers()
    assert len(before) == 2
    os.kill(before[1], signal.SIGKILL)
    assert job.process.wait(timeout=900) == 0, job.log.read_text()[-4000:]
    assert "resuming at kimg" in job.log.read_text()
    (folder,) = (tmp_path / "out").iterdir()
    assert "gpus2" in folder.name
    assert open_snapshot(folder)["progress"]["cur_nimg"] == 40


def test_signal_reaches_all_and_the_exit_code_comes_back(data16, tmp_path):
    """SIGUSR1 to the command: every process saves and stops, and the command ends with 3 although torchrun knows 1."""
    job = Job(tmp_path / "out", data16, "--kimg=100")
    job.wait_for("tick 1 ")
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(timeout=900) == 3, job.log.read_text()[-4000:]
    assert "stopped by SIGUSR1" in job.log.read_text()

#----------------------------------------------------------------------------
# The group itself, started as Slurm's srun does it.

def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def group(case: str, ranks: range = range(2), **env: str) -> list[tuple[int, str]]:
    """Run a case of group_run.py; returns (exit code, output) of every rank."""
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "MASTER_ADDR": "127.0.0.1",
             "SLURM_STEP_NODELIST": "node[07-08]", "MASTER_PORT": str(free_port())}
    script = str(ROOT / "tests" / "training" / "group_run.py")
    started = [subprocess.Popen([sys.executable, script, case], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True, env=environment(**slurm, SLURM_PROCID=str(r), SLURM_LOCALID=str(r)) | env)
               for r in ranks]
    outputs = [p.communicate(timeout=600)[0] for p in started]
    return [(p.returncode, out) for p, out in zip(started, outputs, strict=True)]


def test_a_group_works():
    """Long work of rank 0, downloads one by one, gradients exchanged during the backward pass."""
    for rank, (code, output) in enumerate(group("works")):
        assert code == 0, output
        assert f"rank {rank} of 2 is happy" in output


@needs_compiler
def test_forms_are_chosen_by_the_first_process(tmp_path):
    for rank, (code, output) in enumerate(group("chooses_forms", STYLESAN_CACHE=str(tmp_path))):
        assert code == 0, output
        assert f"rank {rank} of 2 is happy" in output


def test_exception_of_one_rank_ends_all():
    (code0, output0), (code1, output1) = group("raises")
    assert code0 != 0
    assert code1 != 0
    assert "Traceback" in output1
    assert "ValueError: the second iteration went wrong" in output1
    assert "because rank 1 on" in output0
    assert "ValueError: the second iteration went wrong" in output0


def test_killed_rank_ends_all():
    (code0, output0), (code1, _) = group("dies")
    assert code1 == -signal.SIGKILL
    assert code0 == 1
    assert "rank 1 on" in output0
    assert "no sign of life" in output0


def test_silent_rank_is_named():
    ((code, output),) = group("works", range(1), STYLESAN_START_SECONDS="3")
    assert code != 0
    assert "rank(s) 1 of 2 did not come within 3 s" in output
