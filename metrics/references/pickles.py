# SPDX-License-Identifier: Apache-2.0
"""Statistics that other tools keep as pickles. They are read as data: nothing that a file names is run.

| kind | content | covariance |
|---|---|---|
| EDM2 | num_images, fid: {mu, sigma}, fd_dinov2: {mu, sigma} | divided by N - 1 |
| StyleGAN's cache | num_items, raw_mean (the sum), raw_cov (sum of outer products), all_features | divided by N |
| torch-fidelity's cache (.pt) | mu, sigma; or a tensor of features | divided by N - 1, N not said |

StyleGAN and torch-fidelity name the detector in the file's name only; a file that was renamed counts as one that does
not say.
"""
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from metrics.references.statistics import (
    DINOV2,
    INCEPTION,
    Statistics,
    find_pair,
    make_statistics,
    statistics_of_features,
)
from torch_utils import safe_pickle
from torch_utils.pickle_values import TensorRecord
from torch_utils.schema import names_shown, shown

# {data set}-{detector}-{md5 of the settings}.pkl
STYLEGAN_NAME = re.compile(r".*-(inception-2015-12-05|vgg16|inception_rand_full)-[0-9a-f]{32}\.pkl")
STYLEGAN_DETECTORS = {"inception_rand_full": "inception-rand"}          # Others are called as here.
# Named by its user, then extractor, what is kept, and layer.
FIDELITY_NAME = re.compile(r".*-inception-v3-compat-(stat-fid|features)-2048\.pt")
SPATIAL = (7, 17, 17)       # Channels, rows, columns of sFID's features.
EDM2_DETECTORS = {"fid": INCEPTION, "fd_dinov2": DINOV2}

#----------------------------------------------------------------------------

def read_pickle(path: str) -> tuple[Statistics, ...]:
    """Statistics in a pickle or a torch.save file.

    Raises:
        UserError: damaged, asks for code, or holds no statistics.
    """
    root = safe_pickle.read(path)
    if isinstance(root, TensorRecord | np.ndarray):
        return (_fidelity_features(path, root),)
    if isinstance(root, Mapping):
        if {"raw_mean", "raw_cov", "num_items"} <= root.keys():
            return (_stylegan(path, root),)
        if root.keys() & EDM2_DETECTORS.keys():
            return _edm2(path, root)
        if pair := find_pair(key for key in root if isinstance(key, str)):
            names = " and ".join(pair)
            more = {"format": f"pickle with {names}"}
            if (name := FIDELITY_NAME.fullmatch(Path(path).name)) and name[1] == "stat-fid":
                more = {"format": "torch-fidelity cache", "detector": INCEPTION}
            return (make_statistics(path, names, _array(path, root, pair[0]), _array(path, root, pair[1]), None, 1,
                                    **more),)
    keys = names_shown(root) if isinstance(root, Mapping) else type(root).__name__
    raise UserError(f"{path}: a pickle without statistics (it holds {keys}): name statistics of EDM2, StyleGAN's "
                    "cache or torch-fidelity's cache, or an .npz; a network goes to --network")


def _array(path: str, values: Mapping[Any, Any], key: str) -> np.ndarray:
    value = values.get(key)
    if isinstance(value, TensorRecord):
        value = value.load().numpy()
    if not isinstance(value, np.ndarray):
        raise UserError(f"{path}: {key} is {'absent' if value is None else f'a {type(value).__name__}'}, but must be "
                        "an array: make the file again")
    return value


def _count(path: str, values: Mapping[Any, Any], key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise UserError(f"{path}: {key} is {shown(value)}, but must be a number of images: make the file again")
    return int(value)

#----------------------------------------------------------------------------

def _edm2(path: str, root: Mapping[Any, Any]) -> tuple[Statistics, ...]:
    num = _count(path, root, "num_images")
    entries = []
    for key, detector in EDM2_DETECTORS.items():
        if key not in root:
            continue
        values = root[key]
        if not isinstance(values, Mapping):
            raise UserError(f"{path}: {key} must hold mu and sigma: make the file again")
        entries.append(make_statistics(path, f"mu and sigma of {key}", _array(path, values, "mu"),
                                       _array(path, values, "sigma"), num, 1, detector=detector,
                                       format="EDM2 reference pickle"))
    return tuple(entries)


def _stylegan(path: str, root: Mapping[Any, Any]) -> Statistics:
    """The attributes of StyleGAN's FeatureStats."""
    num = _count(path, root, "num_items")
    name = STYLEGAN_NAME.fullmatch(Path(path).name)
    more: dict[str, Any] = {"format": "StyleGAN statistics cache",
                            "detector": STYLEGAN_DETECTORS.get(name[1], name[1]) if name else None}
    if root["raw_mean"] is None:
        return statistics_of_features(path, "all_features", _stored_features(path, root, num), **more)
    total, outer = _array(path, root, "raw_mean"), _array(path, root, "raw_cov")
    if total.ndim != 1 or outer.shape != (len(total), len(total)) or {total.dtype.kind, outer.dtype.kind} != {"f"}:
        raise UserError(f"{path}: raw_mean and raw_cov are {total.dtype} {list(total.shape)} and {outer.dtype} "
                        f"{list(outer.shape)}, but must be floats [D] and [D, D]: make the file again")
    mean = total.astype(np.float64) / num
    covariance = outer.astype(np.float64) / num - np.outer(mean, mean)
    if len(mean) == np.prod(SPATIAL):
        # sFID's features, flattened there by channel, row, column; here, as in ADM's files, by row, column, channel.
        order = np.arange(len(mean)).reshape(SPATIAL).transpose(1, 2, 0).ravel()
        mean, covariance, more["output"] = mean[order], covariance[np.ix_(order, order)], "spatial"
    return make_statistics(path, "raw_mean and raw_cov", mean, covariance, num, 0, **more)


def _stored_features(path: str, root: Mapping[Any, Any], num: int) -> torch.Tensor:
    blocks = root.get("all_features")
    if not isinstance(blocks, list) or not blocks or not all(
            isinstance(x, np.ndarray) and x.ndim == 2 and x.shape[1] == blocks[0].shape[-1] for x in blocks):
        raise UserError(f"{path}: holds neither raw_mean nor a list of features: make the file again")
    features = np.concatenate(blocks)
    if len(features) != num:
        raise UserError(f"{path}: num_items is {num}, but it holds features of {len(features)}: make the file again")
    return torch.from_numpy(features.astype(features.dtype.newbyteorder("="), copy=False))


def _fidelity_features(path: str, root: TensorRecord | np.ndarray) -> Statistics:
    name = FIDELITY_NAME.fullmatch(Path(path).name)
    features = root.load() if isinstance(root, TensorRecord) else torch.from_numpy(np.array(root))
    return statistics_of_features(path, "the tensor", features, format="torch-fidelity features",
                                  detector=INCEPTION if name and name[1] == "features" else None)
