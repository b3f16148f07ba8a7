# SPDX-License-Identifier: Apache-2.0
"""What --feature-precision costs in accuracy: features, logits and gradients in fp32, tf32 and bf16 against float64.

    python benchmarks/bench_feature_precision.py [--weights=DIR] [--seeds=3] [--quick]

A training step of G as on the command line (D of DeiT-base and EfficientNet-lite0, classifier guidance of weight 8,
1000 classes, micro-batch 8, a 32-pixel generator) is computed on the CPU, once with everything in float64 and then in
float32 with the frozen networks in each precision: transformers only, as the option has it, and all of them. TF32 is
emulated: the arguments of every convolution and matrix product of these networks, and the gradients that come into
their backward passes, are rounded to 10 bits of mantissa (to nearest, ties to even), then multiplied and added in
float32. In --weights published weights are looked for by the names of `training.feature_networks.registry`; networks
whose weights are not there have random ones, and the table says so. Writes benchmarks/results/feature_precision.md.
"""
import copy
import datetime
import json
import platform
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from dnnlib import UserError, cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from torch_utils.images import from_uint8  # noqa: E402
from torch_utils.misc import one_hot, requires_grad  # noqa: E402
from torch_utils.published import find_weights  # noqa: E402
from training.config import DiscriminatorConfig, LossConfig  # noqa: E402
from training.diffaug import NUM_UNIFORMS  # noqa: E402
from training.discriminators.projected import ProjectedDiscriminator  # noqa: E402
from training.feature_networks import fast  # noqa: E402
from training.feature_networks.backbones import is_isotropic  # noqa: E402
from training.feature_networks.classifier import Classifier, load_classifier  # noqa: E402
from training.feature_networks.fast import optimize_frozen  # noqa: E402
from training.generator.layer_schedule import stem_config  # noqa: E402
from training.loss import StyleSanLoss  # noqa: E402
from training.networks_stylegan3 import Generator  # noqa: E402
from training.step.micro_batch import MicroBatch  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "feature_precision.md"
BACKBONES = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0")
CLASSES, SIZE, BATCH = 1000, 32, 8
EVERYWHERE = ", all networks"
PRECISIONS = ("fp32", "tf32", "bf16", f"tf32{EVERYWHERE}", f"bf16{EVERYWHERE}")
BOUND, FP16_IN_G = 1e-3, 2.9e-2     # For a default: of a gradient; what fp16 in G does to it, measured on an H200.

#----------------------------------------------------------------------------
# TF32 by hand.

PRODUCTS = ("linear", "conv2d", "conv_transpose2d", "matmul", "__matmul__", "bmm")
KEPT_BITS = 10


def rounded(x: torch.Tensor) -> torch.Tensor:
    """float32 with the mantissa rounded to KEPT_BITS, to nearest, ties to even. (Not for infinities and NaN.)"""
    drop = 23 - KEPT_BITS
    bits = x.contiguous().view(torch.int32)
    bits = bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1)
    return (bits >> drop << drop).view(torch.float32)


class _RoundArgument(torch.autograd.Function):
    """Rounds a value; its gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return rounded(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


class _RoundGradient(torch.autograd.Function):
    """Rounds a gradient; the value passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return rounded(grad)


class EmulatedTF32(torch.overrides.TorchFunctionMode):
    """Within its block float32 products are computed as with TF32, and their gradients, too."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") not in PRODUCTS:
            return func(*args, **(kwargs or {}))
        factors = [_RoundArgument.apply(x) for x in args[:2]]       # What follows is a bias, which is added in float32.
        return _RoundGradient.apply(func(*factors, *args[2:], **(kwargs or {})))

#----------------------------------------------------------------------------
# Networks and data.

def available(name: str, folder: str | None) -> str:
    """The name, if its weights are on this machine, else that of random weights."""
    try:
        find_weights(name, [folder] if folder else [])
    except UserError:
        return f"{name}:random"
    return name


def photographs(count: int, size: int) -> torch.Tensor:
    """Parts of scikit-learn's two photographs, [count, 3, size, size] in [-1, 1]: the real images."""
    from sklearn.datasets import load_sample_images
    rng = np.random.RandomState(0)
    parts = []
    for i in range(count):
        photo = load_sample_images().images[i % 2]
        y, x = (rng.randint(0, n - 256) for n in photo.shape[:2])
        parts.append(torch.from_numpy(photo[y:y + 256, x:x + 256].copy()).permute(2, 0, 1))
    images = from_uint8(torch.stack(parts))
    return torch.nn.functional.interpolate(images, size=(size, size), mode="area")


class Step:
    """Networks in one precision of the frozen ones; 'float64' has everything in it."""

    def __init__(self, networks: tuple[Generator, ProjectedDiscriminator, Classifier], precision: str):
        self.G, self.D, self.classifier = copy.deepcopy(networks)
        for module in self.classifier.modules():
            if getattr(module, "fused_attn", False):
                module.fused_attn = False           # Products one by one can be rounded.
        if precision == "float64":
            for network in (self.G, self.D, self.classifier):
                network.double()
        kind, everywhere = precision.removesuffix(EVERYWHERE), precision.endswith(EVERYWHERE)
        for network in self.D.feature_networks.values():
            optimize_frozen(network.backbone, kind if kind in fast.PRECISIONS else "fp32")
            if kind == "bf16" and everywhere:
                fast.reduce_(network.backbone, torch.bfloat16)
        frozen = [(network, network.backbone.net) for network in self.D.feature_networks.values()]
        for network, net in (*frozen, (self.classifier, self.classifier.net)):
            if kind == "tf32" and (everywhere or is_isotropic(net)):
                network.surroundings = EmulatedTF32
        self.dtype = torch.float64 if precision == "float64" else torch.float32
        self.loss = StyleSanLoss(self.G, self.D, LossConfig(cls_weight=8.0), torch.device("cpu"), self.classifier)

    def results(self, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Features and logits of the real images, gradients of G's loss by generated images and by G's parameters."""
        batch = MicroBatch(**{name: x.to(self.dtype) for name, x in vars(batch).items() if x is not None})
        found: dict[str, torch.Tensor] = {}
        real = batch.real_img.clone().requires_grad_(True)      # Asks for the passes that have a gradient.
        features = self.D.features(real, batch.augment_real)
        for key, maps in features.items():
            found[f"features, {key}"] = torch.cat([x.detach().flatten() for x in maps])
        with torch.no_grad():
            found["D's logits"] = torch.cat([x.flatten() for x in self.D.heads(features, batch.real_c)])
        found["classifier's logits"] = self.classifier(real).detach().flatten()
        images: list[torch.Tensor] = []

        def watch(_module: torch.nn.Module, _args: tuple, output: torch.Tensor) -> None:
            output.register_hook(lambda grad: images.append(grad.detach().flatten()))

        handle = self.G.register_forward_hook(watch)
        parameters = self.G.trainable_parameters()
        with requires_grad(self.G, parameters):
            self.loss.generator_main(batch, len(batch.z))
        handle.remove()
        found["gradient of images"] = images[0]
        found["gradient of G"] = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                                            for p in parameters])
        self.G.zero_grad(set_to_none=True)
        return {name: x.double() for name, x in found.items()}


def make_networks(backbones: tuple[str, ...], classifier: str, folder: str | None, width: int, seed: int,
                  ) -> tuple[Generator, ProjectedDiscriminator, Classifier]:
    """G and the heads of D as they are drawn; the frozen networks with published weights where they are there."""
    torch.manual_seed(seed)
    G = Generator(stem_config(SIZE, 7, SIZE * 1024, width, c_dim=CLASSES)).train().requires_grad_(False)
    D = ProjectedDiscriminator(DiscriminatorConfig(backbones, SIZE, CLASSES), weights=[folder] if folder else [])
    D = D.train().requires_grad_(False)
    D.project_()
    return G, D, load_classifier(classifier, weights=[folder] if folder else [])


def make_batch(num_backbones: int, batch: int, seed: int) -> MicroBatch:
    g = torch.Generator().manual_seed(seed)
    labels = [one_hot(torch.randint(CLASSES, [batch], generator=g), CLASSES) for _ in range(2)]
    augment = [torch.rand([num_backbones, batch, NUM_UNIFORMS], generator=g) for _ in range(2)]
    return MicroBatch(torch.randn([batch, 64], generator=g), labels[0], photographs(batch, SIZE), labels[1], *augment)

#----------------------------------------------------------------------------
# The table.

def distance(x: torch.Tensor, base: torch.Tensor) -> float:
    """Relative, in the norm."""
    return float((x - base).norm() / base.norm())


def measure(names: tuple[str, ...], classifier: str, folder: str | None, width: int, batch: int,
            seed: int) -> dict[str, dict[str, float]]:
    """Result -> precision -> distance from float64."""
    networks = make_networks(names, classifier, folder, width, seed)
    data = make_batch(len(names), batch, seed)
    found = {precision: Step(networks, precision).results(data) for precision in ("float64", *PRECISIONS)}
    table: dict[str, dict[str, float]] = {}
    for what, base in found["float64"].items():
        table[what] = {precision: distance(found[precision][what], base) for precision in PRECISIONS}
    return table


def markdown(tables: list[dict[str, dict[str, float]]], weights: dict[str, str], batch: int, width: int) -> str:
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    columns = list(next(iter(tables[0].values())))
    rows = [f"# Precision of the frozen networks\n\n`python benchmarks/bench_feature_precision.py`, {today}, "
            f"{platform.machine()}, torch {torch.__version__}. Micro-batch {batch}, a generator of {SIZE} pixels and "
            f"{width} channels, {len(tables)} draw(s) of G, heads, latents and augmentation. Median relative distances "
            "(the largest in brackets) from the same step in float64. `tf32` and `bf16` are those of the option, "
            "which concerns transformers; in the last two columns all frozen networks are in that precision.\n",
            "Weights: " + "; ".join(f"{name}: {what}" for name, what in weights.items()) + ".\n",
            "TF32 is emulated by rounding the arguments of products to nearest. Libraries that cut off instead are "
            "twice as far away.\n",
            "| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for what in tables[0]:
        values = [[table[what][column] for table in tables] for column in columns]
        rows.append(f"| {what} | " + " | ".join(f"{statistics.median(v):.1e} ({max(v):.1e})" for v in values) + " |")
    found = statistics.median(table["gradient of G"]["tf32"] for table in tables)
    rows += ["", f"With `tf32` the gradient of G is off by {found:.1e}. As a default it would have to be below "
             f"{BOUND:g}; float16 in G moves the gradient by {FP16_IN_G:g} (measured on an H200)."]
    return "\n".join([*rows, ""])


@click.command(cls=cli.Command)
@click.option("--weights", metavar="DIR", type=cli.PathType(),
              help="Folder with published weights, such as tf_efficientnet_lite0.pth")
@click.option("--seeds", metavar="INT", type=cli.IntRange(min=1), default=3, show_default=True, help="Draws")
@click.option("--quick", is_flag=True, help="Small random networks, one draw, no file: does it run?")
def main(weights: str | None, seeds: int, quick: bool) -> None:
    """Measure what the precision of the frozen networks does to features, logits and gradients."""
    wanted = BACKBONES if not quick else ("deit_tiny_distilled_patch16_224", "test_efficientnet")
    guide = LossConfig.cls_model if not quick else wanted[0]
    names = {name: available(name, weights) for name in (*wanted, guide)}
    said = {name: "random" if found.endswith(":random") else "published" for name, found in names.items()}
    width, batch = (16, 2) if quick else (128, BATCH)
    tables = []
    for seed in range(1 if quick else seeds):
        tables.append(measure(tuple(names[name] for name in wanted), names[guide], weights, width, batch, seed))
        text = markdown(tables, said, batch, width)
        if not quick:
            atomic_write_text(RESULT, text)
    click.echo(text)
    click.echo(json.dumps(tables))


if __name__ == "__main__":
    main()
