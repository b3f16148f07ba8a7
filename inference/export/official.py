# SPDX-License-Identifier: Apache-2.0
"""A generator as the official code's state dict: its names and shapes, and nothing but tensors."""
import io

import torch

from training.config import GeneratorConfig
from training.networks_stylegan3 import Generator

CLASS_ROWS = 1000                               # Of the official class table, whatever the number of classes.
EMBED_DIM = GeneratorConfig.embed_dim           # Its width, of unconditional networks, too.
TABLE = "mapping.embed.weight"


def official_state(G: Generator, class_rows: int = CLASS_ROWS) -> dict[str, torch.Tensor]:
    """The tensors of `G` under the names and in the shapes of the official code: the way back of reading a pickle.

    Our names are the official ones. The class table differs: officially it has ImageNet's rows for any data, and is
    there, unused, in unconditional networks, too. Rows that stand for no class are zero.

    Args:
        class_rows: Rows of the table, unless there are more classes.
    """
    state = {name: tensor.detach().cpu().clone() for name, tensor in G.state_dict().items()}
    table = state.get(TABLE, torch.zeros([0, EMBED_DIM]))
    missing = max(class_rows - len(table), 0)
    state[TABLE] = torch.cat([table, table.new_zeros([missing, table.shape[1]])])
    return state


def official_bytes(G: Generator) -> bytes:
    """The file: what `torch.load(..., weights_only=True)` reads as {"G_ema": state dict}."""
    file = io.BytesIO()
    torch.save({"G_ema": official_state(G)}, file)
    return file.getvalue()
