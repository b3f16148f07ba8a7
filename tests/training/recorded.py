"""Networks of the recorded losses and iterations, with the recorded weights."""
import numpy as np
import torch
import torch.nn.functional as F

from tests.discriminators.test_parity import filled_discriminator_of
from training.layer_schedule import stem_config, superres_config
from training.loss import MicroBatch
from training.networks_stylegan3 import Generator

BACKBONE = "tf_efficientnet_lite0"


def networks(data: dict[str, np.ndarray], prefix: str):
    """(G, D) at the recorded starting point. `prefix` is that of G's tensors in the file."""
    state = {k.removeprefix(prefix): torch.as_tensor(v) for k, v in data.items() if k.startswith(prefix)}
    num_classes, embed_dim = state["mapping.embed.weight"].shape
    config = stem_config(16, 6, 512, 32, w_dim=64, c_dim=num_classes, embed_dim=embed_dim)
    if "synthesis.L6_16_3.weight" not in state:
        config = superres_config(config, 2, 5)
    G = Generator(config).train()
    G.load_state_dict(state)
    D = filled_discriminator_of((BACKBONE,), c_dim=num_classes).train()
    return G.requires_grad_(False), D.requires_grad_(False)


def micro_batches(data: dict[str, np.ndarray], z: str, prefix: str = "", size: int = 4, noise: str | None = None):
    """The recorded batch in micro-batches of `size`."""
    tensors = {
        "z": torch.as_tensor(data[z]),
        "gen_c": F.one_hot(torch.as_tensor(data[prefix + "gen_label"]), 1000).float(),
        "real_img": torch.as_tensor(data[prefix + "real"]),
        "real_c": F.one_hot(torch.as_tensor(data[prefix + "real_label"]), 1000).float(),
    }
    if noise is not None:
        tensors["pl_noise"] = torch.as_tensor(data[noise])
    parts = {name: value.split(size if name != "pl_noise" else size // 2) for name, value in tensors.items()}
    return [MicroBatch(**{name: part[i] for name, part in parts.items()}) for i in range(len(tensors["z"]) // size)]
