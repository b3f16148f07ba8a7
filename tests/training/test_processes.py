"""Two processes on one machine, started by --gpus=2 and by torchrun."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from legacy import open_snapshot

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ("--cfg=stylegan3-t --preset=demo --cbase=64 --cmax=8 --batch=8 --batch-gpu=2 --device=cpu --workers=0 "
           "--metrics=none --backbones=local:random --cond=1 --kimg=0.016 --tick=0.008").split()

pytestmark = pytest.mark.slow


def run(launcher: list[str], outdir: Path, data: Path) -> dict:
    command = [*launcher, str(ROOT / "train.py"), *OPTIONS, f"--outdir={outdir}", f"--data={data}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("training for") == 1       # Only the first process speaks.
    (folder,) = outdir.iterdir()
    return open_snapshot(folder)


def test_two_processes_train_what_one_trains(data16, tmp_path):
    """Equal micro-batches on one or two processes: the same start, the same samples, the same averages of w.

    Spectral norm takes a power iteration per forward, and a process sees only its own forwards: so gradients differ a
    little, and Adam's first steps, which are signs, differ where a gradient is about zero.
    """
    one = run([sys.executable], tmp_path / "one", data16)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--"]
    two = run(torchrun, tmp_path / "two", data16)
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


def test_gpus_option_starts_processes(data16, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *OPTIONS, "--gpus=2", "--num=8", f"--outdir={tmp_path}",
               f"--data={data16}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "2 process(es)" in done.stdout
    (folder,) = tmp_path.iterdir()
    assert "gpus2" in folder.name
