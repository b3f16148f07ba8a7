# SPDX-License-Identifier: Apache-2.0
"""Feature detectors: frozen networks that turn uint8 images into the numbers that metrics compare.

The one place for third-party networks. Each detector resizes and normalises by itself, computes in full float32 and
answers one call, `features(images) -> {name: float32 tensor}`:

| key | what | from |
|---|---|---|
| pool | [N, D] features | every detector |
| logits_unbiased | [N, 1008] class scores without the output bias, as the inception score is defined | inception |
| logits | [N, C] class scores of the user's own classes | local judges |
"""
import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.download import Asset, find_or_download
from dnnlib.registry import Registry
from torch_utils import distributed, misc

INCEPTION_FILE = Asset(
    "weights-inception-2015-12-05-6726825d.pth",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")
VGG16_FILE = Asset(
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0")

RANDOM_SUFFIX = ":random"           # 'inception-2015-12-05:random': for tests, where no weights can be had.
RANDOM_SEED = 0

Outputs = dict[str, torch.Tensor]

#----------------------------------------------------------------------------

class Detector:
    """A frozen network with a name and the hash of its weights."""

    def __init__(
        self,
        name: str,                                      # As results record it.
        sha256: str,                                    # Of the file of weights; of the tensors if there is no file.
        feature_dim: int,                               # D of 'pool'.
        outputs: tuple[str, ...],                       # Keys that `features` returns.
        forward: Callable[[torch.Tensor], Outputs],     # uint8 images on `device` -> these outputs.
        device: torch.device,                           # Where it computes.
        num_classes: int = 0,                           # C of 'logits'; 0 where there are none.
        class_names: list[str] | None = None,           # Of the columns of 'logits', where known.
    ):
        self.name = name
        self.sha256 = sha256
        self.feature_dim = feature_dim
        self.outputs = outputs
        self.device = device
        self.num_classes = num_classes
        self.class_names = class_names
        self._forward = forward

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> Outputs:
        """uint8 [N, 3, H, W] -> float32 tensors on the detector's device (see the table above).

        Raises:
            ValueError: not uint8, or not of that shape.
            UserError: the weights are broken (features are not finite).
        """
        misc.assert_shape(images, [None, 3, None, None])
        if images.dtype != torch.uint8:
            raise ValueError(f"expected uint8 images, got {images.dtype}")
        with misc.full_precision():
            outputs = {key: x.float() for key, x in self._forward(images.to(self.device)).items()}
        if not outputs["pool"].isfinite().all():
            raise UserError(f"--detector={self.name}: its features are not finite: its weights are damaged")
        return outputs


@dataclasses.dataclass(frozen=True)
class DetectorKind:
    """A registered detector: the file it needs and how it is built and asked."""

    asset: Asset | None                                                 # None: it has random weights only.
    feature_dim: int
    outputs: tuple[str, ...]
    make_net: Callable[[], torch.nn.Module]                             # Called on the meta device.
    forward: Callable[[torch.nn.Module, torch.Tensor], Outputs]


DETECTORS = Registry("detector")    # Name -> DetectorKind.

#----------------------------------------------------------------------------

def local_path(spec: str) -> Path | None:
    """Path of a judge named as 'local:PATH' or 'PATH.safetensors'; None for the name of a registered detector."""
    if spec.startswith("local:"):
        return Path(spec.removeprefix("local:"))
    return Path(spec) if spec.endswith(".safetensors") else None


def require(spec: str, weights_dir: str | None = None, offline: bool | None = None) -> Path | None:
    """Find (or fetch) the file that detector `spec` needs; None if it needs none. Cheap: call it before a long run.

    Raises:
        UserError: unknown detector, or the file is missing; the message says where to get it and where to put it.
    """
    path = local_path(spec)
    if path is not None:
        if not path.is_file():
            raise UserError(f"--detector={spec}: no such file: {path}: train a judge, or name another detector")
        return path
    name = spec.removesuffix(RANDOM_SUFFIX)
    if name not in DETECTORS:
        raise UserError(f"--detector={spec}: unknown detector: choose from {', '.join(sorted(DETECTORS))}, "
                        "or give the path of a .safetensors judge")
    asset = DETECTORS[name].asset
    if asset is None or spec.endswith(RANDOM_SUFFIX):
        return None
    return find_or_download(asset, folders=[weights_dir] if weights_dir else [], offline=offline)


def load_detector(spec: str, device: torch.device, weights_dir: str | None = None,
                  offline: bool | None = None) -> Detector:
    """Build a detector from its name, 'name:random' (seeded random weights) or the path of a local judge.

    Random numbers elsewhere are not disturbed: networks of known kinds are made on the meta device, which draws none.

    Args:
        spec: A name in `DETECTORS`, with or without ':random'; 'local:PATH'; 'PATH.safetensors'.
        device: Where it computes.
        weights_dir: Folder to look in first.
        offline: Never download; None: as the environment says.

    Raises:
        UserError: unknown name, missing or damaged file.
    """
    path = distributed.node_first(lambda: require(spec, weights_dir, offline))
    if local_path(spec) is not None:
        return _load_local(path, device)
    kind = DETECTORS[spec.removesuffix(RANDOM_SUFFIX)]
    with torch.device("meta"):
        net = kind.make_net()
    state = _random_state(net) if path is None else _read_state(path)
    sha256 = _hash_state(state) if path is None else kind.asset.sha256
    try:
        net.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as err:
        raise UserError(f"{path}: its tensors do not fit the network of {spec}: fetch it again") from err
    net.requires_grad_(False).eval().to(device)
    return Detector(spec, sha256, kind.feature_dim, kind.outputs, lambda images: kind.forward(net, images), device)


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    """A plain state dict, read without running code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:                                            # Any failure means the same to the user.
        raise UserError(f"{path}: not a readable file of weights ({type(err).__name__}): fetch it again") from err


def _random_state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Kaiming-normal weights, so that signals keep their size through many layers, and identity normalisation."""
    generator = torch.Generator().manual_seed(RANDOM_SEED)
    state = {}
    for name, x in net.state_dict().items():
        if x.ndim >= 2:
            state[name] = torch.randn(x.shape, generator=generator) * (2 / x[0].numel()) ** 0.5
        else:
            is_one = name.endswith(("running_var", "weight"))
            state[name] = torch.full(x.shape, int(is_one), dtype=x.dtype)
    return state


def _hash_state(state: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(state.items()):
        digest.update(f"{name}{tuple(x.shape)}{x.dtype}".encode())
        digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()

#----------------------------------------------------------------------------
# The Inception network of 2015 that FID is defined by: torch-fidelity's port. It resizes to 299 as TF1 did (bilinear,
# no half-pixel shift, no antialiasing) and takes (x - 128) / 128.

def _make_inception() -> torch.nn.Module:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Net(FeatureExtractorInceptionV3):
        """Its constructor downloads a file or unpickles one without restriction: it is handed an empty dict instead."""

        def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict(state_dict, strict=strict and bool(state_dict), assign=assign)

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Net("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing)


def _inception_forward(net: torch.nn.Module, images: torch.Tensor) -> Outputs:
    pool, logits = net(images)
    return {"pool": pool, "logits_unbiased": logits}


DETECTORS.register("inception-2015-12-05")(
    DetectorKind(INCEPTION_FILE, 2048, ("pool", "logits_unbiased"), _make_inception, _inception_forward))

#----------------------------------------------------------------------------
# VGG16, for precision and recall: torchvision's, up to the rectified second fully connected layer.

def _make_vgg16() -> torch.nn.Module:
    import torchvision
    return torchvision.models.vgg16(weights=None, init_weights=False)


def _vgg16_forward(net: torch.nn.Module, images: torch.Tensor) -> Outputs:
    """Resized to 224 as TF1 did (bilinear, no half-pixel shift, no antialiasing), the choice of torch-fidelity, whose
    precision and recall agree with the StyleGAN line's within 1e-2; then ImageNet's mean and standard deviation."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resize

    mean = torch.tensor([0.485, 0.456, 0.406], device=images.device).reshape(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], device=images.device).reshape(1, 3, 1, 1)
    x = resize(images.float(), size=(224, 224), align_corners=False)
    x = net.avgpool(net.features((x / 255 - mean) / std))               # [N, 512, 7, 7]
    return {"pool": net.classifier[:5](x.flatten(1))}                   # fc1, ReLU, dropout (idle), fc2, ReLU.


DETECTORS.register("vgg16")(DetectorKind(VGG16_FILE, 4096, ("pool",), _make_vgg16, _vgg16_forward))

#----------------------------------------------------------------------------
# Judges: small classifiers trained on the user's own data.

def _load_local(path: Path, device: torch.device) -> Detector:
    from torch_utils.local_network import load_local_network

    with torch.random.fork_rng(devices=[]):     # It draws initial values before it reads the file.
        net = load_local_network(path).to(device)

    def forward(images: torch.Tensor) -> Outputs:
        pool, logits = net.embed_and_logits(net.prepare(images))
        return {"pool": pool, "logits": logits}

    size = net.input_resolution
    probe = forward(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    return Detector(f"local:{path.name}", net.sha256, probe["pool"].shape[1], ("pool", "logits"), forward, device,
                    net.num_classes, list(net.class_names))
