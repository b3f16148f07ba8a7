# SPDX-License-Identifier: Apache-2.0
"""The function that training calls at every snapshot: any name, groups too, against the training data."""
import json

import pytest
import torch

from dnnlib import UserError
from inference.evaluation import network_evaluator
from tests.metrics.helpers import random_images, write_folder
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from training.dataset import ImageDataset
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator

CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path):
    write_folder(tmp_path / "data", random_images(30, 16))
    labels = {"labels": [[f"{i:06d}.png", i % 3] for i in range(30)]}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(labels))
    return ImageDataset(str(tmp_path / "data"), use_labels=True)


def test_names_of_all_protocols(dataset, tiny_inception):
    names = ["adm", "fid50k_full", "kid50k", "clean_fid50k", "eqt50k_int"]
    score = network_evaluator(names, dataset, None, 12, CPU, seed=0)
    torch.manual_seed(0)
    results = score(Generator(stem_config(16, 6, 256, 16, c_dim=3)))
    assert [r["metric"] for r in results] == [f"{name}@num=12" for name in (
        "adm_is50k", "adm_fid50k", "adm_sfid50k", "adm_pr50k", "fid50k_full", "kid50k", "clean_fid50k", "eqt50k_int")]
    assert all(r["num_gen"] == 12 and r["label_policy"] == "dataset" for r in results)
    assert results[4]["num_real"] == 30


def test_classes_of_the_judge(dataset, tmp_path):
    """The same judge with its classes in another order gives the same score; one that knows others is refused."""
    dataset.class_names = ["a", "b", "c"]
    torch.manual_seed(0)
    judge, G = OwnNetwork(own_config(3, 16, (8, 12), ["a", "b", "c"])), Generator(stem_config(16, 6, 256, 16, c_dim=3))

    def score(names, order):
        net = OwnNetwork(own_config(3, 16, (8, 12), names))
        net.load_state_dict(judge.state_dict())
        for name in ("classifier.weight", "classifier.bias"):
            net.state_dict()[name].copy_(judge.state_dict()[name][order])
        save_own_network(tmp_path / "judge.safetensors", net)
        evaluate = network_evaluator(["accuracy"], dataset, f"{tmp_path}/judge.safetensors", 40, CPU, seed=0)
        return evaluate(G)[0]["results"]

    with torch.no_grad():
        assert score(["a", "b", "c"], [0, 1, 2]) == score(["c", "a", "b"], [2, 0, 1])
    with pytest.raises(UserError, match="has the classes a, b, c, but the judge .* has a, b, d, and none called c"):
        score(["a", "b", "d"], [0, 1, 2])


def test_weights_are_looked_for_before_training(dataset):
    with pytest.raises(UserError, match=r"\.pth"):
        network_evaluator(["ppl2_wend"], dataset, None, None, CPU, seed=0)
    with pytest.raises(UserError, match="dinov2"):
        network_evaluator(["fd_dinov2_50k"], dataset, None, None, CPU, seed=0)
