# SPDX-License-Identifier: Apache-2.0
"""VGG16, for precision and recall: torchvision's, up to the rectified second fully connected layer."""
import torch

from dnnlib.download import Asset
from metrics.detectors.base import DETECTORS, DetectorKind, Outputs, normalised
from metrics.detectors.resizes import tf1_bilinear

VGG16_FILE = Asset(
    "vgg16-397923af.pth",
    "https://download.pytorch.org/models/vgg16-397923af.pth",
    "397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0", size=553_433_881, in_torch_hub=True)

SIZE = 224

#----------------------------------------------------------------------------

def make_vgg16() -> torch.nn.Module:
    """torchvision's network, without weights."""
    import torchvision
    net: torch.nn.Module = torchvision.models.vgg16(weights=None, init_weights=False)
    return net


def _forward(net: torch.nn.Module, images: torch.Tensor) -> Outputs:
    """Resized to 224 as TF1 did (bilinear, no half-pixel shift, no antialiasing), the choice of torch-fidelity, whose
    precision and recall agree with the StyleGAN line's within 1e-2; then ImageNet's mean and standard deviation."""
    x = net.features(normalised(tf1_bilinear(images, SIZE)))
    x = net.avgpool(x)                                                  # [N, 512, 7, 7]
    return {"pool": net.classifier[:5](x.flatten(1))}                   # fc1, ReLU, dropout (idle), fc2, ReLU.


DETECTORS.register("vgg16")(
    DetectorKind(VGG16_FILE, 4096, ("pool",), make_vgg16, _forward, resize=f"tf1_bilinear_{SIZE}"))
