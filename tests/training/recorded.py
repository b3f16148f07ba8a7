"""Networks of the recorded losses and iterations, with the recorded weights."""
import torch.nn.functional as F

from tests.parity import Recording
from tests.training.discriminators.test_parity import filled_discriminator
from training.generator.layer_schedule import stem_config, superres_config
from training.networks_stylegan3 import Generator
from training.step.micro_batch import MicroBatch

BACKBONE = "tf_efficientnet_lite0"


def networks(data: Recording, prefix: str):
    """(G, D) at the recorded starting point. `prefix` is that of G's tensors in the file."""
    state = data.inputs(prefix)
    num_classes, embed_dim = state["mapping.embed.weight"].shape
    config = stem_config(16, 6, 512, 32, w_dim=64, c_dim=num_classes, embed_dim=embed_dim)
    if "synthesis.L6_16_3.weight" not in state:
        config = superres_config(config, 2, 5)
    G = Generator(config).train()
    G.load_state_dict(state)
    G = G.to(data.dtype)
    D = filled_discriminator((BACKBONE,), num_classes, data.dtype).train()
    return G.requires_grad_(False), D.requires_grad_(False)


def micro_batches(data: Recording, z: str, prefix: str = "", size: int = 4, noise: str | None = None):
    """The recorded batch in micro-batches of `size`. It is in single precision, whatever the networks are."""
    tensors = {
        "z": data.input(z),
        "gen_c": F.one_hot(data.input(prefix + "gen_label"), 1000).float(),
        "real_img": data.input(prefix + "real"),
        "real_c": F.one_hot(data.input(prefix + "real_label"), 1000).float(),
    }
    if noise is not None:
        tensors["pl_noise"] = data.input(noise)
    parts = {name: value.split(size if name != "pl_noise" else size // 2) for name, value in tensors.items()}
    return [MicroBatch(**{name: part[i] for name, part in parts.items()}) for i in range(len(tensors["z"]) // size)]
