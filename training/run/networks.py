# SPDX-License-Identifier: Apache-2.0
"""G, D and the classifier as a run begins with them, equal on all processes."""
import dataclasses
from collections.abc import Callable, Sequence

import torch

from torch_utils import distributed
from training.config import GeneratorConfig, TrainConfig
from training.dataset import ImageDataset
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks.class_embedding import class_embedding
from training.feature_networks.classifier import Classifier, load_classifier
from training.generator.superres import load_stem_into
from training.networks_stylegan3 import Generator
from training.run.snapshots import Snapshot


@dataclasses.dataclass(frozen=True)
class Stem:
    """What a super-resolution stage is grown on."""

    config: GeneratorConfig
    class_names: tuple[str, ...]        # Empty where they are not known, as those of official networks.
    snapshot: Snapshot | None = None    # None for a stem that is planned but not trained yet.


def make_networks(config: TrainConfig, dataset: ImageDataset, stem: Stem | None, device: torch.device,
                  say: Callable[[str], None] = lambda text: None,
                  saved: GeneratorConfig | None = None) -> tuple[Generator, ProjectedDiscriminator]:
    """G and D on the device. Without the stem's snapshot a stage has random weights below, too, for measurements.

    With the generator's settings from a training state, `saved`, G is only built: its tensors come from there, and
    neither the stem nor the class table is needed any more.
    """
    torch.manual_seed(config.seed)
    D = distributed.node_first(lambda: ProjectedDiscriminator(config.discriminator))   # The first may download.
    torch.manual_seed(config.seed)      # G does not depend on what D drew.
    if saved is not None:
        G = Generator(dataclasses.replace(config.generator, embed_dim=saved.embed_dim))
    elif stem is not None and stem.snapshot is not None:
        G = Generator(config.generator)
        load_stem_into(G, stem.config, stem.snapshot["G_ema"])
    else:
        table = make_class_embedding(config, dataset, device, say) if config.generator.c_dim > 0 else None
        # The table is as wide as the features that it was made from.
        width = config.generator.embed_dim if table is None else table.shape[1]
        G = Generator(dataclasses.replace(config.generator, embed_dim=width))
        if table is not None:
            with torch.no_grad():
                G.mapping.embed.weight.copy_(table)
    G, D = G.train().requires_grad_(False).to(device), D.train().requires_grad_(False).to(device)
    D.project_()
    D.optimize_frozen_(config.feature_precision)
    if config.feature_precision == "tf32" and device.type != "cuda":
        say("NOTE: --feature-precision=tf32 has an effect on GPUs only: here it is fp32")
    for tensor in [*G.parameters(), *G.buffers(), *D.own_state_dict().values()]:
        distributed.broadcast(tensor.data)
    return G, D


def make_classifier(config: TrainConfig, class_names: Sequence[str], device: torch.device) -> Classifier | None:
    """The classifier of the guidance, on the device; None without guidance.

    Args:
        class_names: Names of the data's classes. A trained file has names of its own, which must be these.
    """
    if not config.has_guidance:
        return None
    model, c_dim = config.loss.cls_model, config.generator.c_dim
    names = list(class_names) if model.endswith(".safetensors") else None
    classifier: Classifier = distributed.node_first(lambda: load_classifier(model, c_dim, names)).to(device)
    return classifier.optimize_frozen_(config.feature_precision)


def make_class_embedding(config: TrainConfig, dataset: ImageDataset, device: torch.device,
                         say: Callable[[str], None]) -> torch.Tensor:
    """The class table [c_dim, width], equal on all processes. Rank 0 makes it: it may have to look at every image."""
    table = None
    if distributed.rank() == 0:
        table = class_embedding(config.embedding, config.generator.c_dim, dataset=dataset,
                                backbone=config.discriminator.backbones[-1], seed=config.seed, device=device,
                                embed_dim=config.generator.embed_dim,
                                workers=config.data.workers, say=say).cpu()
    distributed.barrier()       # May take long: collectives have a time limit, this has none.
    shared: torch.Tensor = distributed.broadcast_object(table)
    return shared
