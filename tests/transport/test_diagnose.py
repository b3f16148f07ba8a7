"""The command that diagnoses a snapshot's discriminator: what it prints and draws, and what it refuses."""
import json

import numpy as np
import pytest
from click.testing import CliRunner

from tests.conftest import write_dataset
from tests.training.test_loop import only_run
from tests.training.test_loop import train as train_small
from torch_utils import checkpoint
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from training.run.formats import NETWORK_FORMAT
from transport.diagnose import main


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """96 labelled images of 16 pixels, 4 classes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "many16.zip", 16, 96)


@pytest.fixture(scope="module")
def run(tmp_path_factory, blobs):
    outdir = tmp_path_factory.mktemp("run")
    train_small(outdir, blobs, "--kimg=0.016", "--tick=0.016", "--snap=1")
    return only_run(outdir)


def call(*args):
    return CliRunner().invoke(main, [*map(str, args), "--device=cpu"])


@pytest.mark.slow
def test_command(run, blobs, tmp_path):
    done = call(f"--network={run}", f"--data={blobs}", f"--outdir={tmp_path}/out")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert (line["study"], line["num"], line["batch"], line["classes"], line["san"]) == ("diagnose", 96, 8, 4, True)
    assert len(line["heads"]) == 4
    assert line["inner_product"] == pytest.approx(np.mean([head["inner_product"] for head in line["heads"]]))
    assert "local_random/2" in done.stderr
    assert (tmp_path / "out/diagnosis.png").stat().st_size > 5000
    other = json.loads(call(f"--network={run}", f"--data={blobs}", "--which=G_ema", "--seed=1").stdout)
    assert other["inner_product"] != line["inner_product"]


@pytest.mark.slow
def test_a_snapshot_with_the_former_name_of_a_setting(run, blobs, tmp_path):
    """Ghost batches were called split_group."""
    content = checkpoint.load(run / "best_model.pkl", NETWORK_FORMAT)
    config = {name: value for name, value in content["discriminator_config"].items() if name != "ghost_batch"}
    old = tmp_path / "old.pkl"
    checkpoint.save(old, content | {"discriminator_config": config | {"split_group": 4}})
    assert json.loads(call(f"--network={old}", f"--data={blobs}", "--batch=4").stdout)["batch"] == 4
    done = call(f"--network={old}", f"--data={blobs}", "--batch=6")
    assert "--batch=6: heads normalise over ghost batches of 4 images" in done.stderr


def test_what_cannot_be_diagnosed_gets_one_line(run, blobs, tmp_path):
    snapshot = run / "best_model.pkl"
    content = checkpoint.load(snapshot, NETWORK_FORMAT)
    bare, moved = tmp_path / "bare.pkl", tmp_path / "moved.pkl"
    checkpoint.save(bare, content | {"D": None, "discriminator_config": None, "notes": ["an official one"]})
    config = content["discriminator_config"] | {"backbones": ["/nowhere/net.safetensors"]}
    checkpoint.save(moved, content | {"discriminator_config": config})
    save_own_network(tmp_path / "other.safetensors", OwnNetwork(own_config(4, 16)))
    recorded = content["backbones"] | {"net": {"name": "net", "source": "", "sha256": "0" * 64}}
    checkpoint.save(tmp_path / "recorded.pkl", content | {"discriminator_config": config, "backbones": recorded})
    wide = content["discriminator_config"] | {"proj_channels": 1 << 20}         # Terabytes.
    checkpoint.save(tmp_path / "wide.pkl", content | {"discriminator_config": wide})
    unlabelled = write_dataset(tmp_path / "plain16.zip", 16, 8, 0)
    larger = write_dataset(tmp_path / "large32.zip", 32, 8)
    fewer = write_dataset(tmp_path / "two16.zip", 16, 8, 2)
    for args, said in [
            ((f"--network={bare}", f"--data={blobs}"), "holds no discriminator (an official one)"),
            ((f"--network={moved}", f"--data={blobs}"), "--backbones"),
            ((f"--network={tmp_path}/recorded.pkl", f"--data={blobs}", f"--backbones={tmp_path}/other.safetensors"),
             "SHA-256"),
            ((f"--network={tmp_path}/wide.pkl", f"--data={blobs}"), "does not fit its settings: D has"),
            ((f"--network={snapshot}", f"--data={blobs}", "--backbones=a,b"), "2 given"),
            ((f"--network={snapshot}", f"--data={unlabelled}"), "no class labels"),
            ((f"--network={snapshot}", f"--data={larger}"), "32 pixels"),
            ((f"--network={snapshot}", f"--data={fewer}"), "2 classes"),
            ((f"--network={snapshot}", f"--data={blobs}", "--num=4"), "batch of 8"),
            ((f"--network={snapshot}", f"--data={blobs}", "--batch=4", "--num=4"), "no class has 8"),
            ((f"--network={tmp_path}/none.pkl", f"--data={blobs}"), "no such file")]:
        failed = call(*args)
        assert failed.exit_code == 2, (said, failed.output)
        assert said in failed.stderr
        assert failed.stderr.count("\n") == 1
        assert failed.stdout == ""
