"""train.py --bench: how long a run will take, and nothing left behind."""
import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from data_prep import random_data
from tests.training.test_processes import OPTIONS, ROOT, environment
from train import main
from training import trainer
from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig
from training.dataset import ImageDataset
from training.generator.layer_schedule import stem_config
from training.run import bench
from training.step.batches import BatchSource

SMALL = ("--cfg=stylegan3-t --preset=demo --cbase=64 --cmax=8 --batch=16 --batch-gpu=2 --device=cpu --workers=0 "
         "--metrics=none --backbones=local:random --cond=1").split()


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "WARM_UP", 1)


def invoke(*args):
    return CliRunner().invoke(main, [str(a) for a in args])


def run_bench(*args) -> dict:
    result = invoke(*args, "--bench")
    assert result.exit_code == 0, result.output
    assert "Expected time" in result.output
    return json.loads(result.output.splitlines()[-1])

#----------------------------------------------------------------------------

@pytest.mark.slow
def test_a_stem(data16, tmp_path):
    out = tmp_path / "runs"
    found = run_bench(*SMALL, f"--outdir={out}", f"--data={data16}", "--kimg=100")
    assert not out.exists()
    (stage,) = found["stages"]
    assert (stage["resolution"], stage["processes"], stage["batch"], stage["batch_gpu"]) == (16, 1, 16, 2)
    assert stage["runs"] == {"Gmain": 6250, "Dmain": 6250, "EMA": 6250}       # The preset has no path lengths.
    total = sum(6250 * seconds for seconds in stage["phases"].values())
    assert stage["total_seconds"] == pytest.approx(total) == pytest.approx(found["total_seconds"])
    assert stage["sec_per_kimg"] == pytest.approx(total / 100)
    assert stage["images_per_sec"] == pytest.approx(1e5 / total)
    assert stage["sec_per_iteration"] == pytest.approx(total / 6250)
    assert stage["total_days"] == pytest.approx(total / 86400)
    assert 0 <= stage["data_wait"] <= 1
    assert stage["peak_memory"] > 1 << 27


@pytest.mark.slow
def test_a_recipe_before_anything_is_trained(tmp_path):
    """The last stage needs no stem: the ones below are resolved only."""
    data = tmp_path / "none{resolution}.zip"
    result = CliRunner().invoke(random_data.main, [f"--dest={data}", "--resolutions=16,32,64,128,256", "--classes=3"])
    assert result.exit_code == 0, result.output
    small = ("--recipe=imagenet256 --preset=demo --batch=2 --batch-gpu=2 --device=cpu --workers=0 --metrics=none "
             "--backbones=local:random --cbase=64 --cmax=8 --syn_layers=4 --head_layers=4 --cls_weight=0 "
             "--kimg=4").split()
    found = run_bench(*small, f"--data={data}", f"--outdir={tmp_path}/runs", "--stages=16,32")
    assert [stage["resolution"] for stage in found["stages"]] == [16, 32]
    assert found["total_seconds"] == pytest.approx(sum(stage["total_seconds"] for stage in found["stages"]))
    assert [stage["total_kimg"] for stage in found["stages"]] == [4, 4]
    assert not (tmp_path / "runs").exists()
    found = run_bench(*small, f"--data={data}", f"--outdir={tmp_path}/runs", "--stages=32")
    assert [stage["resolution"] for stage in found["stages"]] == [32]


def test_mistakes(data16, tmp_path):
    result = invoke(*SMALL, f"--outdir={tmp_path}/runs", f"--data={data16}", "--bench", "--kimg=0")
    assert result.exit_code == 2
    assert "Error: --kimg=0 beside --bench" in result.output
    result = invoke(*SMALL, f"--outdir={tmp_path}/runs", f"--data={data16}", "--bench", "--dry-run")
    assert result.exit_code == 2
    assert "--dry-run" in result.output
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_processes(data16, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *OPTIONS, "--gpus=2", f"--outdir={tmp_path}/runs",
               f"--data={data16}", "--kimg=1", "--bench"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Expected time") == 1
    (stage,) = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert (stage["processes"], stage["batch_gpu"], stage["runs"]["EMA"]) == (2, 2, 125)
    assert not (tmp_path / "runs").exists()

#----------------------------------------------------------------------------

def config_for(data, **loss) -> TrainConfig:
    return TrainConfig(
        data=DataConfig(str(data), 16, 4, workers=0), generator=stem_config(16, 4, 64, 8, margin_size=2, c_dim=4),
        discriminator=DiscriminatorConfig(("local:random",), 16, 4, diffaug=()), loss=LossConfig(**loss),
        optim=OptimConfig.official(16), batch=16, batch_gpu=2, total_kimg=1.6, kimg_per_tick=4, snapshot_ticks=50)


@pytest.mark.parametrize(("start", "runs"), [(0.0, 25), (0.8, 12), (1.0, 9), (1.6, None), (1000.0, None)])
def test_path_lengths_count_from_their_start_on(data16, start, runs):
    """Against the loop's own condition, iteration by iteration."""
    config = config_for(data16, pl_start_kimg=start)
    rehearsal = bench.Rehearsal(config, ImageDataset(data16, use_labels=True), torch.device("cpu"))
    due = sum(i % 4 == 0 and rehearsal.trainer.loss.path_length_is_active(i * 16) for i in range(100))
    assert rehearsal.runs.get("Greg", 0) == due
    assert rehearsal.runs.get("Greg") == runs
    assert rehearsal.runs["Gmain"] == rehearsal.runs["Dmain"] == rehearsal.runs["EMA"] == 100
    assert set(rehearsal.iteration(rehearsal.data.batches(1), 0)) == set(rehearsal.runs)


def test_large_batches_are_computed_from_few_micro_batches(data16, monkeypatch):
    """A clock that only micro-batches, steps and waiting move: the result is exact."""
    now = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    costs = {"Gmain": 2.0, "Greg": 8.0, "Dmain": 3.0}

    def run_phase(phase, batches, global_batch, guard):
        num = sum(1 for _ in batches)
        assert global_batch == 2 * num
        seen.append(num)
        now[0] += 0.5 + num * costs[phase.name]

    seen = []
    monkeypatch.setattr(trainer, "run_phase", run_phase)
    monkeypatch.setattr(trainer, "update_ema", lambda *args: now.__setitem__(0, now[0] + 0.25))
    monkeypatch.setattr(BatchSource, "wait_seconds", lambda self: 0.01 * 3 * self.num_micro_batches)
    stage = bench.time_stage(config_for(data16, pl_start_kimg=0.0), ImageDataset(data16, use_labels=True),
                             torch.device("cpu"))
    assert max(seen) == bench.MICRO_BATCHES < 8
    assert stage.phases == pytest.approx({"Gmain": 16.5, "Greg": 64.5, "Dmain": 24.5, "EMA": 0.25})
    assert stage.total_seconds == pytest.approx(100 * (16.5 + 24.5 + 0.25) + 25 * 64.5)
    assert stage.data_wait == pytest.approx(0.08 / (stage.total_seconds / 100))
