# SPDX-License-Identifier: Apache-2.0
"""Random weights of detectors: for tests, and for metrics that are defined with a random network."""
import hashlib

import numpy as np
import torch

from metrics.detectors.base import State

RANDOM_SUFFIX = ":random"           # 'inception-2015-12-05:random': for tests, where no weights can be had.
RANDOM_SEED = 0


def random_state(net: torch.nn.Module, seed: int = RANDOM_SEED) -> State:
    """Kaiming-normal weights, so that signals keep their size through many layers, and identity normalisation.

    Drawn by NumPy's legacy generator, whose stream is frozen, in the order of the names: a network with a declared seed
    has to be the same network with every version of every library.
    """
    rng = np.random.RandomState(seed)
    state = {}
    for name, x in sorted(net.state_dict().items()):
        if x.ndim >= 2:
            values = rng.standard_normal(tuple(x.shape)) * (2 / x[0].numel()) ** 0.5
            state[name] = torch.from_numpy(values).to(x.dtype)
        else:
            is_one = name.endswith(("running_var", "weight", "gamma"))
            state[name] = torch.full(x.shape, int(is_one), dtype=x.dtype)
    return state


def hash_state(state: State) -> str:
    """SHA-256 over names, shapes, types and values."""
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()
