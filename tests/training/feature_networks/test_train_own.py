# SPDX-License-Identifier: Apache-2.0
"""The trainer of networks of your own: accuracy, disjoint parts, repeatability, command line."""
import json

import click.testing
import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.data_prep.samples import encoded, files, write_zip
from tests.training.feature_networks.digits import Digits
from torch_utils.own_network import load_own_network
from training.feature_networks.train import Settings, _shifted, main, split_items, train_own_network

pytestmark = pytest.mark.numeric


def test_parts_are_disjoint_and_cover_everything():
    parts = [split_items(101, (k, 3), seed=5) for k in range(3)]
    assert sorted(np.concatenate([train for train, _ in parts]).tolist()) == list(range(101))
    for train, rest in parts:
        assert sorted([*train, *rest]) == list(range(101))
        assert abs(len(train) - 101 / 3) < 1
    assert not np.array_equal(parts[0][0], split_items(101, (0, 3), seed=6)[0])
    whole, nothing = split_items(7, (0, 1), seed=0)
    assert (whole.tolist(), len(nothing)) == (list(range(7)), 0)


@pytest.mark.slow
def test_digits_are_told_apart():
    net, report = train_own_network(Digits(), Settings(resolution=16, split=(0, 2)))
    assert (report.num_train, report.num_heldout) == (899, 898)
    assert report.heldout_accuracy > 0.97
    assert report.train_accuracy > 0.98
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())
    assert net.class_names == [str(i) for i in range(10)]


def test_same_seed_same_weights():
    torch.manual_seed(3)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    settings = Settings(resolution=8, widths=(4, 8), epochs=2)
    a, b = (train_own_network(Digits(8, count=200), settings)[0].state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = train_own_network(Digits(8, count=200), Settings(resolution=8, widths=(4, 8), epochs=2, seed=1))[0]
    assert not torch.equal(other.state_dict()["classifier.weight"], a["classifier.weight"])


def test_shifts_repeat_the_border():
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(50, 3, 6, 6)
    y = _shifted(x, 1, generator)
    padded = torch.nn.functional.pad(x[:1].float(), (1, 1, 1, 1), mode="replicate")
    candidates = [padded[0, :, i:i + 6, j:j + 6].to(torch.uint8) for i in range(3) for j in range(3)]
    found = {next(i for i, c in enumerate(candidates) if torch.equal(c, image)) for image in y}
    assert found == set(range(9))
    assert torch.equal(_shifted(x, 0, generator), x)


def test_too_little_to_train_on():
    data = Digits(8, count=4)
    with pytest.raises(UserError, match="--split=0/4"):
        train_own_network(data, Settings(resolution=8, widths=(4,), split=(0, 4)))
    data.class_names = ["0"]
    with pytest.raises(UserError, match="at least two"):
        train_own_network(data, Settings(resolution=8, widths=(4,)))

#----------------------------------------------------------------------------

def digit_zip(path):
    data = Digits(16, count=120)
    content = {f"{i:03d}.png": encoded(data[i][0].transpose(1, 2, 0)) for i in range(len(data))}
    meta = {"labels": [[f"{i:03d}.png", int(k)] for i, k in enumerate(data.labels)],
            "classes": [f"digit {i}" for i in range(10)]}
    return write_zip(path, content, meta)


def run(*args: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, list(args))


def test_command_line(tmp_path):
    data, dest = digit_zip(tmp_path / "digits.zip"), tmp_path / "net.safetensors"
    result = run(f"--data={data}", f"--dest={dest}", "--split=1/2", "--epochs=2", "--widths=4,8", "--resolution=16",
                 "--device=cpu")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.splitlines()[-1])
    net = load_own_network(dest)
    assert answer["sha256"] == net.sha256
    assert (answer["num_train"], answer["num_heldout"]) == (60, 60)
    assert net.class_names[3] == "digit 3"
    assert net.metadata["settings"]["split"] == [1, 2]
    assert net.metadata["data"] == "digits"


@pytest.mark.parametrize(("option", "message"), [
    ("--split=2/2", "is not a part"),
    ("--widths=a", "is not a list"),
    ("--dest=net.pt", "must end with .safetensors"),
])
def test_command_line_refusals(tmp_path, option, message):
    data = digit_zip(tmp_path / "digits.zip")
    result = run(f"--data={data}", f"--dest={tmp_path}/x.safetensors", option)
    assert result.exit_code == 2
    assert message in result.output


def test_images_without_labels(tmp_path):
    data = write_zip(tmp_path / "plain.zip", files())
    result = run(f"--data={data}", f"--dest={tmp_path}/x.safetensors")
    assert result.exit_code == 2
    assert f"--data={data}: has no labels" in result.output
