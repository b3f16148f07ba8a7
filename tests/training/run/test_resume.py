"""Continuing a run: killed processes, other settings, other numbers of processes."""
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.training.test_loop import SMALL, assert_equal_states, only_run
from torch_utils import checkpoint
from train import main
from training import dataset
from training.config import (
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    InputSpec,
    LossConfig,
    OptimConfig,
    SavingConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from training.data.randomness import CounterRNG
from training.generator.layer_schedule import stem_config
from training.run.folder import (
    OPTIONS_FILE,
    PREVIOUS_STATE_FILE,
    RUN_INFO,
    STATE_FILE,
    Given,
    RunChoice,
    code_version,
    create_run,
    find_run,
    run_start,
)
from training.run.formats import STATE_FORMAT
from training.run.resume import share

ROOT = Path(__file__).resolve().parents[3]

#----------------------------------------------------------------------------
# Which run a command continues.

DESC = "stylegan3-t-blobs16-gpus8-batch16"


def settings(**changed) -> TrainConfig:
    generator = GeneratorConfig(16, InputSpec(4, 4, 4.0, 1.0), ())
    values = dict(data=DataConfig("blobs16.zip", 16, 4), generator=generator, discriminator=DiscriminatorConfig(),
                  loss=LossConfig(), optim=OptimConfig.official(16), batch=16, batch_gpu=2, total_kimg=100,
                  kimg_per_tick=4, snapshot_ticks=50, metrics=("fid50k_full",))
    return TrainConfig(**(values | changed))


INFO = {"code": "abc", "torch": "2.15", "world_size": 8, "device": "cuda", "data_fingerprint": "f" * 64,
        "class_names": ["a", "b"]}


def make_run(outdir: Path, number: int, config: TrainConfig, desc: str = DESC, state: str | None = STATE_FILE) -> Path:
    folder = outdir / f"{number:05d}-{desc}"
    create_run(RunChoice(folder, False), config, Given(INFO))
    if state is not None:
        (folder / state).touch()
    return folder


def test_the_same_command_continues(tmp_path):
    new = tmp_path / "new"
    assert find_run(new, DESC, settings(), Given(INFO)) == RunChoice(new / f"00000-{DESC}", False)
    folder = make_run(tmp_path, 3, settings())
    assert find_run(tmp_path, DESC, settings(), Given(INFO)) == RunChoice(folder, True)
    make_run(tmp_path, 4, settings(), desc="stylegan3-r-blobs16-gpus8-batch16")
    make_run(tmp_path, 5, settings(), state=None)           # Nothing was saved in it.
    assert find_run(tmp_path, DESC, settings(), Given(INFO)).folder == folder
    mine = DESC + "-mine"
    assert find_run(tmp_path, mine, settings(), Given(INFO)) == RunChoice(tmp_path / f"00006-{mine}", False)
    newer = make_run(tmp_path, 7, settings(), state=PREVIOUS_STATE_FILE)
    assert find_run(tmp_path, DESC, settings(), Given(INFO)).folder == newer


def test_other_processes_micro_batches_reports_and_machines_continue(tmp_path):
    folder = make_run(tmp_path, 0, settings())
    new = settings(batch_gpu=4, total_kimg=200, metrics=("kid50k_full",), data=DataConfig("/b/blobs16.zip", 16, 4,
                   workers=7), saving=SavingConfig(keep=3), restart_every=60)
    choice = find_run(tmp_path, DESC.replace("gpus8", "gpus2"), new, Given(INFO | {"world_size": 2, "code": "def"}))
    assert (choice.folder, choice.resumed) == (folder, True)
    text = "\n".join(choice.notes)
    for line in ("batch_gpu: 2 -> 4", "total_kimg: 100 -> 200", 'metrics: ["fid50k_full"] -> ["kid50k_full"]',
                 "saving.keep: 10 -> 3", "world_size: 8 -> 2", 'code: "abc" -> "def"', "data.workers: 2 -> 7"):
        assert line in text


def test_what_changes_the_result_is_listed_and_needs_a_word(tmp_path):
    folder = make_run(tmp_path, 0, settings())
    new = settings(batch=32, optim=OptimConfig.official(32, G_lr=0.001))
    desc = DESC.replace("batch16", "batch32")
    choice = find_run(tmp_path, desc, new, Given(INFO))
    assert (choice.folder.name, choice.resumed) == (f"00001-{desc}", False)
    text = "\n".join(choice.notes)
    for part in (f"not continued: {folder}", "batch: 16 -> 32", "optim.G_lr: 0.0025 -> 0.001", "--continue-changed"):
        assert part in text
    choice = find_run(tmp_path, desc, new, Given(INFO), continue_changed=True)
    assert (choice.folder, choice.resumed) == (folder, True)
    assert "optim.G_lr: 0.0025 -> 0.001" in "\n".join(choice.notes)


@pytest.mark.parametrize(("changed", "info", "line"), [
    ({"seed": 1}, {}, "seed: 0 -> 1"),
    ({"discriminator": DiscriminatorConfig(san=False)}, {}, "discriminator.san: true -> false"),
    ({"generator": GeneratorConfig(16, InputSpec(8, 4, 4.0, 1.0), ())}, {}, "generator.input.channels: 4 -> 8"),
    ({"data": DataConfig("blobs16.zip", 16, 4, mirror=True)}, {}, "data.mirror: false -> true"),
    ({}, {"class_names": ["b", "a"]}, 'class_names: ["a", "b"] -> ["b", "a"]'),
    ({"data": DataConfig("/b/blobs16", 16, 4)}, {"data_fingerprint": None}, 'data_path: "blobs16.zip" -> "/b/blobs16"'),
])
def test_other_networks_seeds_and_data_never_continue(tmp_path, changed, info, line):
    folder = make_run(tmp_path, 0, settings())
    choice = find_run(tmp_path, DESC, settings(**changed), Given(INFO | info))
    assert not choice.resumed
    assert line in "\n".join(choice.notes)
    assert "--continue-changed" not in "\n".join(choice.notes)
    with pytest.raises(UserError, match=f"{folder.name} cannot be continued") as error:
        find_run(tmp_path, DESC, settings(**changed), Given(INFO | info), continue_changed=True)
    assert line in str(error.value)


def test_precision_of_layers_may_change_as_precision_may(tmp_path):
    """--fp32=1 also changes what the layers say of themselves; runs of older versions say nothing of their clamp."""
    generator = stem_config(16, 4, 64, 8)
    single = settings(generator=stem_config(16, 4, 64, 8, full_precision=True), precision="fp32")
    folder = make_run(tmp_path, 0, settings(generator=generator))
    options = json.loads((folder / OPTIONS_FILE).read_text())
    for layer in options["generator"]["layers"]:
        del layer["is_clamped"]
    (folder / OPTIONS_FILE).write_text(json.dumps(options))
    assert find_run(tmp_path, DESC, settings(generator=generator), Given(INFO)).resumed
    choice = find_run(tmp_path, DESC, single, Given(INFO))
    assert not choice.resumed
    assert "--continue-changed continues it nevertheless" in "\n".join(choice.notes)
    assert find_run(tmp_path, DESC, single, Given(INFO), continue_changed=True).folder == folder


def test_settings_that_an_older_version_did_not_know_have_their_defaults(tmp_path):
    folder = make_run(tmp_path, 0, settings())
    options = json.loads((folder / OPTIONS_FILE).read_text())
    del options["saving"], options["loss"]["diversity_weight"], options[RUN_INFO]
    (folder / OPTIONS_FILE).write_text(json.dumps(options))
    assert find_run(tmp_path, DESC, settings(), Given(INFO)).resumed
    assert not find_run(tmp_path, DESC, settings(loss=LossConfig(diversity_weight=8.0)), Given(INFO)).resumed


def test_settings_under_their_former_names(tmp_path):
    folder = make_run(tmp_path, 0, settings(discriminator=DiscriminatorConfig(ghost_batch=2)))
    options = json.loads((folder / OPTIONS_FILE).read_text())
    options["discriminator"]["split_group"] = options["discriminator"].pop("ghost_batch")
    (folder / OPTIONS_FILE).write_text(json.dumps(options))
    assert find_run(tmp_path, DESC, settings(discriminator=DiscriminatorConfig(ghost_batch=2)), Given(INFO)).resumed
    assert not find_run(tmp_path, DESC, settings(), Given(INFO)).resumed
    assert from_dict(DiscriminatorConfig, {"split_group": 8}).ghost_batch == 8


def test_what_the_options_file_records(tmp_path):
    folder = make_run(tmp_path, 0, settings())
    (folder / ".training-state.pt.abc.tmp").touch()         # A killed process left it.
    create_run(RunChoice(folder, True, ("changed since the last start: x: 1 -> 2",)), settings(), Given(INFO))
    options = json.loads((folder / OPTIONS_FILE).read_text())
    assert options[RUN_INFO] == INFO | {"starts": 2, "files": {}}
    assert run_start(folder) == 2
    del options[RUN_INFO]
    assert options == json.loads(json.dumps(to_dict(settings())))
    assert (folder / "log.txt").read_text() == "changed since the last start: x: 1 -> 2\n"
    assert {p.name for p in folder.iterdir()} == {"log.txt", OPTIONS_FILE, STATE_FILE}
    assert len(code_version()) == 12
    assert code_version() != hashlib.sha256().hexdigest()[:12]      # It has read some sources.


def test_a_state_is_sent_as_a_skeleton_and_tensors():
    content = {"a": torch.ones(2), "b": [torch.zeros([], dtype=torch.int64), (1, None, "x")], "c": {"d": torch.eye(2)}}
    assert_equal_states(share(content), content)

#----------------------------------------------------------------------------
# Runs of one process.

COUNTED = ("--kimg=0.032", "--tick=0.016", "--snap=1")


def run(outdir, data, *more) -> str:
    result = CliRunner().invoke(main, [*SMALL, f"--outdir={outdir}", f"--data={data}", *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def state(folder: Path) -> dict:
    return checkpoint.load(folder / STATE_FILE, STATE_FORMAT)


@pytest.mark.slow
def test_another_micro_batch_keeps_the_place(data16, tmp_path, monkeypatch):
    """kimg, Adam's steps, the order of images and the latents go on where they were."""
    run(tmp_path, data16, "--kimg=0.016", "--tick=0.016", "--snap=1")
    folder, asked, positions = only_run(tmp_path), [], []
    moments = state(folder)["optimizers"]["G"]["state"][0]["exp_avg_sq"].clone()
    indices, normal = dataset.EpochOrder.indices, CounterRNG.normal
    monkeypatch.setattr(dataset.EpochOrder, "indices",
                        lambda self, p: (asked.extend(list(p)), indices(self, p))[1])
    monkeypatch.setattr(CounterRNG, "normal", lambda self, name, p, shape: (
        positions.extend(list(p) if name == "z/Gmain" else []), normal(self, name, p, shape))[1])
    output = run(tmp_path, data16, *COUNTED, "--batch-gpu=2")
    assert "changed since the last start: batch_gpu: 8 -> 2" in output
    assert "resuming at kimg 0.0" in output
    assert [int(p) for p in asked[:16]] == list(range(16, 32))
    assert [int(p) for p in positions] == list(range(16, 32))
    after = state(folder)
    assert after["counters"]["cur_nimg"] == 32
    assert int(after["optimizers"]["G"]["state"][0]["step"]) == 4
    assert not torch.equal(moments, after["optimizers"]["G"]["state"][0]["exp_avg_sq"])


@pytest.mark.slow
def test_changed_learning_rates_are_those_of_the_command(data16, tmp_path):
    run(tmp_path, data16, "--kimg=0.008")
    before = state(only_run(tmp_path))["optimizers"]["G"]["param_groups"][0]["lr"]
    output = run(tmp_path, data16, "--kimg=0.016", "--glr=0.00125", "--continue-changed")
    assert "optim.G_lr: 0.0025 -> 0.00125" in output
    after = state(only_run(tmp_path))
    assert after["optimizers"]["G"]["param_groups"][0]["lr"] == pytest.approx(before / 2)
    assert after["counters"]["cur_nimg"] == 16


@pytest.mark.slow
def test_a_refused_run_is_named(data16, tmp_path):
    run(tmp_path, data16, "--kimg=0.008")
    output = run(tmp_path, data16, "--kimg=0.008", "--seed=1")
    assert f"not continued: {tmp_path}/00000-" in output
    assert "seed: 0 -> 1" in output
    assert (max(tmp_path.iterdir()) / "log.txt").read_text().startswith("not continued:")

#----------------------------------------------------------------------------
# Killed processes, in processes of their own.

def start(outdir: Path, data: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, f"--outdir={outdir}", f"--data={data}", *COUNTED, *more]
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output[-4000:]
    return output


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "kills", "kimg"), [(1, 1, 0.2), (2, 1, 0.2)])
def test_killed_and_continued_is_the_unbroken_run(tmp_path, gpus, kills, kimg):
    """2N iterations == N iterations, SIGKILL, the rest; for every tensor, bit by bit; compared by the benchmark."""
    table = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "benchmarks/soak_kill.py"), f"--kills={kills}", f"--gpus={gpus}",
               f"--kimg={kimg}", f"--dest={table}"]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "equal in all" in done.stdout
    assert "bit by bit" in table.read_text()


@pytest.mark.slow
def test_from_one_process_to_two(data16, tmp_path):
    """Another number of processes goes on in the same folder, at the same place."""
    finish(start(tmp_path, data16, "--kimg=0.016", "--batch-gpu=4"))
    output = finish(start(tmp_path, data16, "--gpus=2", "--batch-gpu=2"))
    for line in ("world_size: 1 -> 2", "batch_gpu: 4 -> 2", "resuming at kimg 0.0"):
        assert line in output
    content = state(only_run(tmp_path))
    assert content["counters"]["cur_nimg"] == 32
    assert int(content["optimizers"]["G"]["state"][0]["step"]) == 4
