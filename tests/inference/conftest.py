"""A small network that the tests of several commands share."""
import pytest
import torch

from torch_utils import checkpoint
from training.config import to_dict
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator
from training.run.formats import NETWORK_FORMAT


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A small conditional snapshot with class names; its w_avg differs between classes."""
    torch.manual_seed(0)
    config = stem_config(16, 4, 128, 8, margin_size=4, w_dim=32, c_dim=3, embed_dim=8)
    G = Generator(config)
    G.mapping.w_avg.normal_()
    path = tmp_path_factory.mktemp("network") / "network-snapshot-000001.pkl"
    checkpoint.save(path, {"format": NETWORK_FORMAT, "version": 1, "generator_config": to_dict(config),
                           "G_ema": G.state_dict(), "class_names": ["cat", "dog", "owl"], "progress": {}})
    return path
