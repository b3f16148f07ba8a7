# SPDX-License-Identifier: Apache-2.0
"""A generator as an ONNX graph: latents, classes and psi to images, for any number of images.

The graph is made of the definitions of the operations (`torch_utils.ops.reference`) in single precision.
"""
import importlib
import json
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dnnlib import UserError
from dnnlib.util import first_line, format_bytes
from inference.sampling import seed_latent
from training.generator.synthesis import synthesize
from training.networks_stylegan3 import Generator

OPSET = 23                      # The newest that PyTorch's exporter writes by itself.
MAX_BYTES = (2 << 30) - (64 << 20)      # Of weights: a file of one part holds 2 GiB.
TOLERANCE = 1e-4                # Largest difference between its images and ours, which lie in about [-1, 1].
CHECKED = ((2, 1.0), (3, 0.5))  # Batches of so many images at this psi are compared.

#----------------------------------------------------------------------------

class _Graph(torch.nn.Module):
    """What the graph computes. Classes are indices, which are a list of any length less than one-hot rows."""

    def __init__(self, G: Generator):
        super().__init__()
        self.mapping, self.synthesis = G.mapping, G.synthesis

    def forward(self, z: torch.Tensor, psi: torch.Tensor, classes: torch.Tensor | None = None) -> torch.Tensor:
        ws = self.mapping.map_classes(z, classes)
        images: torch.Tensor = self.synthesis(self.mapping.truncate(ws, classes, psi), force_fp32=True)
        return images


def require_packages(*names: str) -> None:
    """Import packages that only this needs.

    Raises:
        UserError: one is missing or broken.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as err:        # Also of a broken installation.
            raise UserError(f"--format=onnx: the package {name} is missing or broken ({first_line(err)}): "
                            f"pip install {' '.join(names)}") from err


def onnx_bytes(G: Generator, class_names: Sequence[str] | None, sha256: str) -> bytes:
    """The file with the graph of `G`, which is on the CPU.

    Inputs are z [N, z_dim] and psi [], float32, and for a network with classes `class` [N], int64; the output is
    images [N, 3, R, R] in about [-1, 1]. Names of classes stand in the file's metadata.

    Args:
        sha256: Of the file that `G` came from, for the metadata.

    Raises:
        UserError: a package is missing; the weights are too large for one file.
    """
    require_packages("onnx", "onnxscript")
    import onnx
    from onnxscript import optimizer

    size = sum(tensor.numel() * tensor.element_size() for tensor in G.state_dict().values())
    if size > MAX_BYTES:
        raise UserError(f"--format=onnx: the network has {format_bytes(size)} of weights, more than the "
                        f"{format_bytes(MAX_BYTES)} that one file holds: use --format=safetensors")
    inputs: dict[str, torch.Tensor] = {"z": torch.zeros([2, G.z_dim]), "psi": torch.ones([])}
    batch = torch.export.Dim("batch")
    shapes: list[Any] = [{0: batch}, None]
    if G.c_dim > 0:
        inputs["class"] = torch.zeros([2], dtype=torch.int64)
        shapes.append({0: batch})
    # The exporter's own optimisation takes an added 1e-8 for nothing, and then a root of zero becomes NaN. So only what
    # is constant is worked out; programs that run a graph do the rest themselves.
    with warnings.catch_warnings():
        # Two inputs share their first axis, and the exporter says at length that it needs one name for it.
        warnings.filterwarnings("ignore", message=".*axis name.*will not be used", category=UserWarning)
        program = torch.onnx.export(_Graph(G).eval(), tuple(inputs.values()), dynamo=True, verbose=False,
                                    dynamic_shapes=tuple(shapes), input_names=list(inputs), output_names=["images"],
                                    opset_version=OPSET, optimize=False)
    assert program is not None          # Only the older exporter, which writes a file itself, returns nothing.
    optimizer.fold_constants(program.model)
    optimizer.remove_unused_nodes(program.model)
    model = program.model_proto
    for part in (model.graph, *model.graph.node):
        part.ClearField("metadata_props")       # Places in the source that it came from, on this machine.
        part.ClearField("doc_string")
    onnx.helper.set_model_props(model, {"stylesan_xl": json.dumps({
        "img_resolution": G.img_resolution, "z_dim": G.z_dim, "c_dim": G.c_dim, "class_names": class_names,
        "source_sha256": sha256}, sort_keys=True)})
    content: bytes = model.SerializeToString()
    return content

#----------------------------------------------------------------------------

def largest_deviation(model: bytes, G: Generator) -> float:
    """The largest difference between the graph's images and those of `G`, for some latents (zero too) and classes.

    Not a number if an image has none. `G` may be on any device; the graph runs on the CPU.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    found = []
    for num, psi in CHECKED:
        z = torch.stack([seed_latent(seed, G.z_dim) for seed in range(1, num)] + [torch.zeros(G.z_dim)])
        labels = torch.arange(num) * 7 % max(G.c_dim, 1)
        given = {"z": z.numpy(), "psi": np.array(psi, np.float32)}
        if G.c_dim > 0:
            given["class"] = labels.numpy()
        images, = session.run(None, given)
        ours = synthesize(G, z, labels, psi, precision="fp32").cpu().numpy()
        found.append(np.abs(images - ours).max())
    return float(np.max(found))         # Not a number if there is one among them.
