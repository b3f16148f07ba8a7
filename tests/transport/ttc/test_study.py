"""The study of Trust the Critics: exact continuation, the measurement of misalignment, tasks and mistakes."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.closeness import approx
from tests.metrics.generators import stem
from torch_utils import checkpoint
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from training.config import to_dict
from training.run.formats import NETWORK_FORMAT, VERSION
from transport.common.study import seeded
from transport.ttc import misalignment, moves
from transport.ttc.critic_sequence import move, push
from transport.ttc.critic_store import critic_path, load_critics, save_critic
from transport.ttc.experiment import Config, draw, main, run, settled
from transport.ttc.image_critics import make_critic, make_generator
from transport.ttc.laws import open_data
from transport.ttc.settings import TASKS, defaults

POINTS = ("--device=cpu", "--source=points:circle", "--data=points:eight", "--critic=mlp", "--width=8", "--batch=8",
          "--iterations=20", "--num=40")
TINY = {"device": "cpu", "size": "quick", "width": 2, "batch": 4, "iterations": 3, "num": 12, "pool": 20}


def call(*args):
    return CliRunner().invoke(main, args)


def criticise(folder, schedule, **changes):
    """Train or continue critics of points in a folder, without figures."""
    settings = {"device": "cpu", "source": "points:circle", "data": "points:eight", "critic": "mlp", "width": 8,
                "batch": 8, "iterations": 20, "num": 40, "pool": 0}
    return run(Config(schedule=schedule, outdir=str(folder), **{**settings, **changes})).headline()


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted((folder / "critics").iterdir())}

#----------------------------------------------------------------------------
# Continuing.

@pytest.mark.parametrize(("schedules", "changes"), [
    (("3x1", "5x1"), {}), (("2x2", "2x2,1x1"), {"version": 2, "pool": 30})])
def test_continues_bit_for_bit(tmp_path, schedules, changes):
    short, long = schedules
    first = criticise(tmp_path / "a", short, **changes)
    criticise(tmp_path / "b", long, **changes)
    assert contents(tmp_path / "a").items() < contents(tmp_path / "b").items()
    assert criticise(tmp_path / "a", short, **changes)["estimates"] == first["estimates"]
    criticise(tmp_path / "a", long, **changes)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_interrupted_while_writing_and_while_training(tmp_path, monkeypatch):
    calls = []

    def write_half(folder, number, finished):
        calls.append(number)
        if len(calls) == 2:
            (folder / "critics" / ".critic-0001.safetensors.x.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        save_critic(folder, number, finished)

    monkeypatch.setattr(moves, "save_critic", write_half)
    with pytest.raises(KeyboardInterrupt):
        criticise(tmp_path / "a", "3x1")
    assert sorted(contents(tmp_path / "a")) == [".critic-0001.safetensors.x.tmp", "critic-0000.safetensors"]
    monkeypatch.undo()
    criticise(tmp_path / "a", "3x1")
    criticise(tmp_path / "b", "3x1")
    assert contents(tmp_path / "b").items() < contents(tmp_path / "a").items()


@pytest.mark.slow
def test_killed_between_critics(tmp_path):
    """SIGKILL as soon as the first critic is there; the same command then makes what an undisturbed run makes."""
    command = [sys.executable, "-m", "transport.trust_the_critics", *POINTS, f"--outdir={tmp_path}/a",
               "--schedule=90x1"]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    try:
        while not critic_path(tmp_path / "a", 0).is_file():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    kept = len(list((tmp_path / "a/critics").glob("critic-*")))
    assert 1 <= kept < 90
    for folder in ("a", "b"):
        criticise(tmp_path / folder, f"{kept + 2}x1", pool=2000)
    assert contents(tmp_path / "b").items() <= contents(tmp_path / "a").items()


@pytest.mark.numeric
def test_stored_critics_move_samples_as_trained_ones(tmp_path):
    config = settled(Config(device="cpu", source="noise", data="digits", critic="infogan", width=2, batch=4,
                            iterations=5, num=12, pool=0, schedule="2x1", resolution=8, outdir=str(tmp_path)))
    result = moves.run_moves(config)
    sequence = load_critics(tmp_path, [1, 1], lambda: make_critic("infogan", (1, 8, 8), 2))
    assert torch.equal(push(sequence, torch.from_numpy(result.path[0])), torch.from_numpy(result.path[-1]))
    again = moves.run_moves(config)
    assert again.rows == result.rows


def test_folder_of_other_settings_or_data(tmp_path):
    criticise(tmp_path, "1x1")
    for changes, message in (({"theta": 0.5}, "trained with theta=0.9, not theta=0.5"),
                             ({"seed": 1}, "trained with seed=0, not seed=1"),
                             ({"data": "points:ring"}, "trained with data=points:eight, not data=points:ring")):
        with pytest.raises(UserError, match=message):
            criticise(tmp_path, "1x1", **changes)
    criticise(tmp_path, "2x1", num=30)      # More critics, and other tests, are no other settings.
    with pytest.raises(UserError, match="--schedule: critic 1 of .* took 1 steps, not 2"):
        load_critics(tmp_path, [2], lambda: make_critic("mlp", (2,), 8))


def test_damaged_critic(tmp_path):
    criticise(tmp_path, "2x1")
    path = critic_path(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match=f"{path}: not a usable critic"):
        criticise(tmp_path, "2x1")
    path.write_bytes(critic_path(tmp_path, 0).read_bytes())
    with pytest.raises(UserError, match="it is critic 0"):
        load_critics(tmp_path, [1, 1], lambda: make_critic("mlp", (2,), 8))
    with pytest.raises(UserError, match="not a usable critic .*delete it and the later ones"):
        load_critics(tmp_path, [1, 1], lambda: make_critic("mlp", (2,), 4))

#----------------------------------------------------------------------------
# Misalignment.

class Shift(torch.nn.Module):
    """A generator with nothing but a bias."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))

    def forward(self, z):
        return z + self.bias


@pytest.mark.numeric
def test_directions_in_closed_form():
    z = torch.eye(2)
    for critic, expected in ((lambda x: x.norm(dim=1), [math.sqrt(0.5)] * 2),
                             (lambda x: x @ torch.tensor([3.0, -1.0]), [1, 1])):
        moved = misalignment.sgd_direction(Shift(), critic, z, z)
        downhill = misalignment.gradient(critic, z)
        assert misalignment.cosines(moved, downhill).tolist() == approx(expected, abs=1e-6)


@pytest.mark.numeric
def test_direction_of_sgd_is_where_a_small_step_leads():
    """Forward mode against a step of SGD that is carried out, through the WGAN's own generator."""
    net = make_generator((1, 8, 8), width=4).double()
    critic = make_critic("infogan", (1, 8, 8), 4).double()
    z1, z2 = (torch.randn(3, 64, generator=seeded(0, name), dtype=torch.float64) for name in ("z1", "z2"))
    net.train()(z2)         # This moves running statistics from their initial values.
    direction = misalignment.sgd_direction(net, critic, z1, z2)
    rate = 1e-6

    def update():
        optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        optimizer.zero_grad()
        critic(misalignment.images_of(net, (dict(net.named_parameters()), dict(net.named_buffers())), z2)) \
            .mean().backward()
        optimizer.step()

    way = misalignment.way_of_update(net, update, z1)
    torch.testing.assert_close(way / rate, direction, rtol=1e-3, atol=1e-6)
    assert net.training

#----------------------------------------------------------------------------
# Tasks.

@pytest.mark.parametrize(("task", "keys"), [
    ("generation", {"w1_before", "w1_after", "w1_floor", "estimates"}),
    ("denoising", {"psnr_before", "psnr_after", "psnr_regularised", "psnr_one_step"}),
    ("translation", {"w1_before", "w1_after"}),
    ("misalignment", {"moments"})])
def test_tasks(tmp_path, task, keys):
    config = Config(task=task, **TINY, **({} if task == "misalignment" else {"schedule": "2x1"}))
    result = run(config)
    line = json.loads(json.dumps(result.headline()))
    assert keys <= set(line)
    for path in draw(result, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
    if task == "misalignment":
        assert [row["update"] for row in line["moments"]] == [0, 2]
    else:
        assert len(line["estimates"]) == line["steps"] == 2


@pytest.mark.numeric
def test_frechet_distance(tmp_path):
    """In the features of a user's own judge; grey images count as colour images with equal channels."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_own_network(tmp_path / "judge.safetensors", OwnNetwork(own_config(2, 8, (4,))))
    line = run(Config(detector=str(tmp_path / "judge.safetensors"), schedule="1x1", resolution=8,
                      **{**TINY, "num": 100})).headline()
    assert line["frechet_before"] > line["frechet_floor"] > 0
    digits = open_data("digits", 8, "test").samples[:50]
    frechet = moves.Frechet(str(tmp_path / "judge.safetensors"), digits, torch.device("cpu"))
    assert frechet(digits.expand(-1, 3, -1, -1)) == approx(0, abs=1e-6)


def test_deblurring():
    line = run(Config(task="denoising", source="blurred", schedule="1x1", **TINY)).headline()
    assert 15 < line["psnr_before"] < 60


def test_refinement_of_a_generator(tmp_path, data16):
    """Samples of a snapshot of ours, some to train critics on and others to test with."""
    G = stem(False, 16, 6, c_dim=3)
    checkpoint.save(tmp_path / "network.pkl", {
        "format": NETWORK_FORMAT, "version": VERSION, "generator_config": to_dict(G.config), "G_ema": G.state_dict()})
    result = run(Config(task="refinement", source=str(tmp_path / "network.pkl"), data=str(data16), images=6,
                        schedule="1x1", **TINY))
    line = result.headline()
    assert {"w1_before", "w1_after"} <= set(line)
    assert result.path[0].shape == (6, 3, 16, 16)


def test_every_task_has_settings():
    for task in TASKS:
        for size in ("quick", "small", "paper"):
            for version in (1, 2):
                assert {"iterations", "schedule", "batch", "theta"} <= set(defaults(task, size, version))
    paper = defaults("generation", "paper", 2)
    assert (paper["schedule"], paper["iterations"], paper["batch"], paper["theta"], paper["lam"], paper["lr"],
            paper["width"], paper["pool"]) == ("10x2,20x1", 1000, 128, 1, 1000, 1e-4, 64, 0)
    assert defaults("denoising", "paper", 1)["sigma"] == 0.3


@pytest.mark.parametrize(("args", "message"), [
    (["--theta=1"], "--theta=1.0: version 1 moves by a share between 0 and 1"),
    (["--theta=0", "--version=2"], "--theta=0.0: version 2 moves by a share above 0"),
    (["--theta=1.2", "--version=2"], "--theta=1.2: must be at most 1"),
    (["--schedule=0x1"], "--schedule=0x1: give critics x steps"),
    (["--schedule=3x2"], "--schedule has 2 steps per critic"),
    (["--source=points:ring"], "its samples have the shape [2], the target's [1, 8, 8]"),
    (["--critic=mlp"], "--critic=mlp: takes points"),
    (["--task=refinement"], "--task=refinement needs --source"),
    (["--task=refinement", "--source=x.pkl"], "--task=refinement needs --data"),
    (["--lam=0"], "--lam=0.0: must be above 0"),
    (["--task=misalignment", "--data=points:ring"], "this WGAN makes images"),
])
def test_mistakes(args, message):
    done = call("--quick", "--device=cpu", *args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_step_is_told():
    done = call(*POINTS, "--schedule=1x1", "--iterations=1", "--lr=1e-9", "--data=points:circle", "--lam=1e6")
    assert done.exit_code == 0
    line = json.loads(done.stdout)
    assert line["not_taken"] == (line["estimates"][0] <= 0)
    assert "W1 estimate" in done.stderr


def test_settings_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().task = "denoising"
    x = torch.zeros(2, 2)
    assert torch.equal(move(lambda z: z.sum(dim=1), x, 0.5), x - 0.5)
