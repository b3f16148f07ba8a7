# SPDX-License-Identifier: Apache-2.0
"""The Inception network of 2015 that FID is defined by: torch-fidelity's port, under each resize that is in use."""
import io
from collections.abc import Callable
from typing import Any, cast

import torch

from dnnlib.download import Asset
from metrics.detectors import resizes
from metrics.detectors.base import DETECTORS, DetectorKind, Outputs
from metrics.detectors.fast_inception import FastInception

INCEPTION_FILE = Asset(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2", size=95_628_359,
    other_names=("pt_inception-2015-12-05-6726825d.pth",), in_torch_hub=True)       # pytorch-fid's name.
RANDOM_INCEPTION_FILE = Asset(
    "inception_rand_full.pth",
    "https://s3.eu-central-1.amazonaws.com/avg-projects/stylegan_xl/feature_networks/inception_rand_full.pkl",
    other_names=("inception_rand_full.safetensors",),
    obstacle="StyleGAN-XL publishes it as inception_rand_full.pkl, a dill pickle that runs code from the file when it "
             "is read, so it is not read here. Save its tensors as a plain state dict with torch-fidelity's names in a "
             "folder named by --weights or STYLESAN_WEIGHTS, or use --metrics=rfid_random, a random network that needs "
             "no file and whose values are comparable among each other only")

SIZE = 299
POOL_DIM, NUM_LOGITS = 2048, 1008
SPATIAL_CHANNELS, SPATIAL_SIZE = 7, 17
SPATIAL_DIM = SPATIAL_CHANNELS * SPATIAL_SIZE ** 2      # 2023
INCEPTION_LAYERS = {"pool64": 64, "pool192": 192, "pool768": 768}       # Earlier layers, pytorch-fid's too.

#----------------------------------------------------------------------------

def make_inception() -> torch.nn.Module:
    """torch-fidelity's network, without weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Net(FeatureExtractorInceptionV3):     # type: ignore[misc]    # It has no types.
        """Its constructor downloads a file or unpickles one without restriction: it is handed an empty dict instead."""

        def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=strict and bool(state_dict), assign=assign)

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Net("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)


def _run(net: FastInception, images: torch.Tensor, prepare: Callable[[torch.Tensor], torch.Tensor]) -> Outputs:
    """uint8 images [N, 3, H, W] -> the network's outputs; `prepare` brings them to its size and range.

    `spatial` is what ADM's evaluator calls mixed_6/conv: the first branch of `Mixed_6d` after normalisation and
    rectification, which is where the block's channels begin.
    """
    maps = net(images, prepare, SPATIAL_CHANNELS)
    return {"pool": maps.pool, "spatial": maps.spatial.permute(0, 2, 3, 1).flatten(1),
            "logits_unbiased": maps.pool @ net.fc_weight.T, **{name: getattr(maps, name) for name in INCEPTION_LAYERS}}

#----------------------------------------------------------------------------
# From uint8 images to the network's range.

def _tf1(images: torch.Tensor) -> torch.Tensor:
    return (resizes.tf1_bilinear(images, SIZE) - 128) / 128


def _clean(images: torch.Tensor) -> torch.Tensor:
    return (resizes.pil_bicubic_float(images, SIZE) - 128) / 128


def _pytorch_fid(images: torch.Tensor) -> torch.Tensor:
    return 2 * resizes.pytorch_fid_bilinear(images, SIZE) - 1


def _kind(asset: Asset | None, prepare: Callable[[torch.Tensor], torch.Tensor], resize: str) -> DetectorKind:
    return DetectorKind(
        asset, POOL_DIM, ("pool", "spatial", "logits_unbiased", *INCEPTION_LAYERS), make_inception,
        lambda net, images: _run(cast(FastInception, net), images, prepare),
        dims={"spatial": SPATIAL_DIM, "logits_unbiased": NUM_LOGITS, **INCEPTION_LAYERS}, resize=f"{resize}_{SIZE}",
        rebuild=FastInception)


DETECTORS.register("inception-2015-12-05")(_kind(INCEPTION_FILE, _tf1, "tf1_bilinear"))
DETECTORS.register("inception-2015-12-05-clean")(_kind(INCEPTION_FILE, _clean, "pil_bicubic_float"))
DETECTORS.register("inception-2015-12-05-pytorch_fid")(_kind(INCEPTION_FILE, _pytorch_fid, "pytorch_fid_bilinear"))
DETECTORS.register("inception-rand")(_kind(RANDOM_INCEPTION_FILE, _tf1, "tf1_bilinear"))
DETECTORS.register("inception-random-seed0")(_kind(None, _tf1, "tf1_bilinear"))
