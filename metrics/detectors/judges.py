# SPDX-License-Identifier: Apache-2.0
"""Judges: small classifiers trained on the user's own data."""
from pathlib import Path

import torch

from dnnlib.util import file_sha256
from metrics.detectors.base import Detector, Outputs


def load_judge(path: Path, device: torch.device) -> Detector:
    """A judge as a detector. Raises UserError: not a judge's file."""
    from torch_utils.own_network import load_own_network

    with torch.random.fork_rng(devices=[]):     # It draws initial values before it reads the file.
        net = load_own_network(path).to(device)

    def forward(images: torch.Tensor) -> Outputs:
        pool, logits = net.embed_and_logits(net.prepare(images))
        return {"pool": pool, "logits": logits}

    size = net.input_resolution
    probe = forward(torch.zeros(1, 3, size, size, dtype=torch.uint8, device=device))
    return Detector(f"local:{path.name}", net.sha256 or file_sha256(path), probe["pool"].shape[1], ("pool", "logits"),
                    forward, device, net.num_classes, list(net.class_names), dims={"logits": net.num_classes},
                    resize=f"judge_{size}")
