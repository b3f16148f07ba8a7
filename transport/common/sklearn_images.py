# SPDX-License-Identifier: Apache-2.0
"""The pictures that scikit-learn ships: handwritten digits and two photographs. Only this module imports it."""
from types import ModuleType

import numpy as np
import torch

from dnnlib import UserError

LARGEST = 16.0          # The whitest grey value of a digit.
PHOTOS = {"china": "china.jpg", "flower": "flower.jpg"}


def _datasets() -> ModuleType:
    try:
        import sklearn.datasets
    except ImportError as err:
        raise UserError("digits and photographs come with scikit-learn: pip install -e '.[transport]'") from err
    datasets: ModuleType = sklearn.datasets
    return datasets


def load_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 digits: (float32 [N, 1, 8, 8] in [-1, 1], int64 [N]).

    Raises:
        UserError: scikit-learn is not installed.
    """
    content = _datasets().load_digits()
    images = torch.as_tensor(content.images, dtype=torch.float32).unsqueeze(1)
    return images / (LARGEST / 2) - 1, torch.as_tensor(content.target, dtype=torch.int64)


def load_photo(name: str) -> torch.Tensor:
    """A photograph, uint8 [3, H, W]; `name` is a key of `PHOTOS`.

    Raises:
        UserError: scikit-learn is not installed.
    """
    photo: np.ndarray = _datasets().load_sample_image(PHOTOS[name])
    return torch.from_numpy(np.ascontiguousarray(photo.transpose(2, 0, 1)))
