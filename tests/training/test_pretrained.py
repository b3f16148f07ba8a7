# SPDX-License-Identifier: Apache-2.0
"""The official recipe in small with weights that know something, on crops of two photographs whose classes they know:
backbone, class vectors, and guidance by a classifier of ImageNet's classes."""
import json
import zipfile

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_sample_images

from legacy import open_snapshot
from tests.closeness import rel_error
from tests.training.test_loop import only_run, train
from torch_utils.images import from_uint8
from torch_utils.published import PACKAGES
from training.dataset import ImageDataset
from training.feature_networks.registry import load_backbone

LITE0 = "tf_efficientnet_lite0"
CLASSES = (698, 985, 999)       # Palace, daisy, and one that makes the numbers those of ImageNet.
OPTIONS = (f"--backbones={LITE0}", "--batch=2", "--kimg=0.002")


def write_crops(path, resolution):
    """Two crops of each photograph, and one that stands for the last class."""
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(5):
            photograph = load_sample_images().images[i % 2]
            image = PIL.Image.fromarray(photograph[:400, 50 * i:50 * i + 400]).resize((resolution, resolution))
            name = f"img{i:08d}.png"
            with archive.open(name, "w") as file:
                image.save(file, format="PNG")
            labels.append([name, CLASSES[2] if i == 4 else CLASSES[i % 2]])
        archive.writestr("dataset.json", json.dumps({"labels": labels, "classes": [f"n{i}" for i in range(1000)]}))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:class embedding. no images of class:UserWarning")
def test_a_stem_and_a_stage(tmp_path, monkeypatch):
    monkeypatch.delenv("STYLESAN_WEIGHTS", raising=False)
    small, large = write_crops(tmp_path / "a16.zip", 16), write_crops(tmp_path / "a32.zip", 32)
    train(tmp_path / "stem", small, *OPTIONS)
    stem = only_run(tmp_path / "stem")
    table = open_snapshot(stem / "best_model.pkl")["G_ema"]["mapping.embed.weight"]
    data, backbone = ImageDataset(small, use_labels=True), load_backbone(LITE0)
    flowers = torch.from_numpy(np.stack([data[i][0] for i in range(5) if data[i][1] == 985]))
    with torch.no_grad():
        expected = backbone.pooled(backbone.preprocess(from_uint8(flowers))).mean(dim=0)
    data.close()
    assert rel_error(table[985], expected) < 1e-3
    train(tmp_path / "stage", large, *OPTIONS, "--superres", f"--path_stem={stem}", "--cls_weight=8",
          f"--classifier={LITE0}")
    stage = only_run(tmp_path / "stage")
    stats = json.loads((stage / "stats.jsonl").read_text().splitlines()[-1])
    assert 0 < stats["Loss/G/guidance_loss"]["mean"] < 30
    (backbone_of_run,) = open_snapshot(stage / "best_model.pkl")["backbones"].values()
    assert backbone_of_run["sha256"] == PACKAGES[LITE0].sha256
