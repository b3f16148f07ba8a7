# SPDX-License-Identifier: Apache-2.0
"""The projected discriminator (Sauer et al., NeurIPS 2021; StyleGAN-XL, SIGGRAPH 2022) with SAN heads.

Image -> per backbone: DiffAugment, frozen backbone, frozen random projections -> trainable heads on four scales.
The frozen part has no state that moves, so real and generated images may share a batch there; the heads hold BatchNorm
and must see them in separate forwards.
"""
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import cast

import torch

from dnnlib import UserError
from dnnlib.util import list_some
from torch_utils.misc import assert_shape
from training.config import DiscriminatorConfig
from training.diffaug import NUM_UNIFORMS, POLICIES, diff_augment
from training.discriminators.blocks import begin_step, end_step, set_ghost_batch
from training.discriminators.heads import MultiScaleD
from training.discriminators.projector import FeatureFusion, Reassembly, seeded
from training.discriminators.san import SanOutput, project_directions
from training.feature_networks.backbones import Backbone, warm_up_batch_norm
from training.feature_networks.fast import optimize_frozen, surroundings_of
from training.feature_networks.registry import load_backbone
from training.feature_networks.within import Surroundings, run_within

LARGE_MAP = 56
Features = dict[str, list[torch.Tensor]]    # Key of the backbone -> mixed maps, shallowest first.

#----------------------------------------------------------------------------

def module_keys(names: Sequence[str]) -> list[str]:
    """Names under which backbones are filed in state dicts: unique, without dots or folders.

    A path gives its stem, so that a snapshot can be read where the same file lies elsewhere.
    """
    keys: list[str] = []
    for name in names:
        stem = PurePath(name.removeprefix("local:")).stem if name.endswith(".safetensors") else name
        key = base = re.sub(r"\W", "_", stem)
        number = 2
        while key in keys:
            key, number = f"{base}_{number}", number + 1
        keys.append(key)
    return keys


class FeatureNetwork(torch.nn.Module):
    """The frozen part for one backbone. Names in the state dict are official but for the backbone's own."""

    def __init__(self, backbone: Backbone, proj_channels: int):
        super().__init__()
        self.backbone = backbone
        channels, sizes = backbone.channels, backbone.map_sizes
        if backbone.isotropic:
            self.pretrained = Reassembly(channels[-1])
            channels, sizes = self.pretrained.out_channels, self.pretrained.out_sizes(sizes)
        self.scratch = FeatureFusion(channels, proj_channels)
        self.out_channels = self.scratch.out_channels
        self.out_sizes = self.scratch.out_sizes(sizes)      # The sides for images of the backbone's input size.
        self.surroundings: Surroundings | None = None       # See `training.feature_networks.fast`.

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """[N, 3, R, R] in [-1, 1] -> mixed maps, shallowest first."""
        if self.surroundings is None:
            return self._mixed_maps(images)
        return run_within(self.surroundings, self._mixed_maps, images)

    def _mixed_maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        maps = self.backbone.maps(self.backbone.preprocess(images))
        mixed = self.scratch(self.pretrained(maps) if self.backbone.isotropic else maps)
        return [_as_heads_want(x) for x in mixed]


def _as_heads_want(x: torch.Tensor) -> torch.Tensor:
    """The same map, channels last if it is large and on a CPU, where convolutions then take half the time. Small maps,
    whose weights are larger than they, gain nothing."""
    last = x.device.type == "cpu" and x.shape[2] >= LARGE_MAP
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

#----------------------------------------------------------------------------

class ProjectedDiscriminator(torch.nn.Module):
    """Logits of real against generated, one vector per backbone.

    The heads' architecture depends on the backbones' input sizes and not on `config.img_resolution`: larger images give
    larger maps of logits. `config.feature_size` gives the backbones, which are changed for it, another input size.

    Args:
        config: The settings.
        backbones: Ready-made backbones by their names in `config.backbones`; the others are loaded by name.
        weights: Folders with published weights, looked into first.
    """

    def __init__(self, config: DiscriminatorConfig, backbones: Mapping[str, Backbone] | None = None,
                 weights: Sequence[str] = ()):
        super().__init__()
        if not config.backbones:
            raise UserError("backbones: none given: name at least one")
        if unknown := sorted(set(config.diffaug) - set(POLICIES)):
            raise UserError(f"diffaug: unknown augmentation {unknown[0]!r}: choose from {', '.join(POLICIES)}")
        self.config = config
        self.backbone_names = module_keys(config.backbones)     # The keys in the state dict and in `features`.
        self.feature_networks = torch.nn.ModuleDict()
        self.discriminators = torch.nn.ModuleDict()
        for i, (key, name) in enumerate(zip(self.backbone_names, config.backbones, strict=True)):
            backbone = backbones[name] if backbones and name in backbones else load_backbone(name, weights)
            if config.feature_size:
                backbone.look_at(config.feature_size)
            if config.bn_warmup:
                warm_up_batch_norm(backbone)
            with seeded(config.seed, f"projection {i}"):
                network = FeatureNetwork(backbone, config.proj_channels)
            self.feature_networks[key] = network
            self.discriminators[key] = MultiScaleD(network.out_channels, network.out_sizes, config.c_dim,
                                                   config.cmap_dim, config.max_channels, config.san)
        set_ghost_batch(self.discriminators, config.ghost_batch)

    def _networks(self) -> dict[str, FeatureNetwork]:
        """The frozen part by the keys of the backbones."""
        return {key: cast(FeatureNetwork, network) for key, network in self.feature_networks.items()}

    def heads_by_backbone(self) -> dict[str, MultiScaleD]:
        """The trainable part by the keys of the backbones."""
        return {key: cast(MultiScaleD, multi) for key, multi in self.discriminators.items()}

    #------------------------------------------------------------------------
    # Frozen part.

    def optimize_frozen_(self, precision: str = "fp32") -> None:
        """Prepare the backbones, on the device where they are, for a run: `training.feature_networks.fast`."""
        for network in self._networks().values():
            device = next(network.backbone.parameters()).device
            optimize_frozen(network.backbone, precision)
            network.surroundings = surroundings_of(network.backbone.net, precision, device)

    def features(self, img: torch.Tensor, augment: torch.Tensor | None = None) -> Features:
        """Mixed feature maps per backbone.

        Args:
            img: [N, 3, R, R] in [-1, 1]; gradients pass through to it.
            augment: Uniform numbers in [0, 1), [num_backbones, N, NUM_UNIFORMS]: each backbone has its own DiffAugment.
                None for no augmentation.
        """
        assert_shape(img, [None, 3, None, None])
        if augment is not None:
            assert_shape(augment, [len(self.backbone_names), img.shape[0], NUM_UNIFORMS])
        features: Features = {}
        for i, (key, network) in enumerate(self._networks().items()):
            x = img if augment is None else diff_augment(img, self.config.diffaug, augment[i])
            features[key] = network(x)
        return features

    @staticmethod
    def split_features(features: Features, num_first: int) -> tuple[Features, Features]:
        """Undo a concatenation along the batch: those of the first `num_first` images, and those of the rest."""
        first = {key: [x[:num_first] for x in maps] for key, maps in features.items()}
        return first, {key: [x[num_first:] for x in maps] for key, maps in features.items()}

    #------------------------------------------------------------------------
    # Heads.

    def heads(self, features: Features, c: torch.Tensor) -> list[torch.Tensor]:
        """Logits [N, L] per backbone; `c` one-hot [N, c_dim]."""
        self._check_labels(c)
        return [multi(features[key], c) for key, multi in self.heads_by_backbone().items()]

    def heads_san(self, features: Features, c: torch.Tensor) -> list[SanOutput]:
        """Both outputs of the discriminator step per backbone, each [N, L]; `c` one-hot [N, c_dim]."""
        self._check_labels(c)
        return [multi.san(features[key], c) for key, multi in self.heads_by_backbone().items()]

    def scale_sizes(self, features: Features) -> list[list[int]]:
        """Per backbone, how many of its L logits come from each scale: cuts `heads`' output apart."""
        return [multi.scale_sizes(features[key]) for key, multi in self.heads_by_backbone().items()]

    def forward(self, img: torch.Tensor, c: torch.Tensor, augment: torch.Tensor | None = None) -> list[torch.Tensor]:
        """Logits [N, L] per backbone, for the generator step and inference. Arguments as in `features` and `heads`."""
        return self.heads(self.features(img, augment), c)

    def san(self, img: torch.Tensor, c: torch.Tensor, augment: torch.Tensor | None = None) -> list[SanOutput]:
        """Both outputs per backbone, for the discriminator step. Arguments as in `features` and `heads`."""
        return self.heads_san(self.features(img, augment), c)

    def _check_labels(self, c: torch.Tensor) -> None:
        assert_shape(c, [None, self.config.c_dim])

    #------------------------------------------------------------------------
    # State.

    def begin_step(self) -> None:
        """Move what moves once per step; to be called before the first forward of a step of G or of D."""
        begin_step(self.discriminators)

    def end_step(self) -> None:
        """Move what moves once per step; all processes call it after the last forward of the step."""
        end_step(self.discriminators)

    def project_(self) -> None:
        """Bring the directions of all SAN layers back to unit norm, as after every optimiser step."""
        project_directions(self)

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """The parameters of the heads; all others are frozen."""
        return list(self.discriminators.parameters())

    def backbone_info(self) -> dict[str, dict[str, str | None]]:
        """Key -> name, source and SHA-256 of each backbone, whose tensors snapshots do not hold."""
        backbones = {key: network.backbone for key, network in self._networks().items()}
        return {key: {"name": b.name, "source": b.source, "sha256": b.sha256} for key, b in backbones.items()}

    def own_state_dict(self) -> dict[str, torch.Tensor]:
        """Everything but the backbones' tensors, under official names: heads, projections, reassembly."""
        skipped = tuple(f"feature_networks.{key}.backbone." for key in self.backbone_names)
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith(skipped)}

    def load_own_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Read what `own_state_dict` gave; all of it must be there and fit.

        Raises:
            UserError: missing or unknown tensors, other shapes.
        """
        own = self.own_state_dict()
        if missing := sorted(set(own) - set(state)):
            raise UserError(f"discriminator: the snapshot lacks {list_some(missing, 3)}: its backbones, c_dim or san "
                            f"differ from this run's ({', '.join(self.config.backbones)}; c_dim {self.config.c_dim})")
        if unknown := sorted(set(state) - set(own)):
            raise UserError(f"discriminator: the snapshot has unknown tensors {list_some(unknown, 3)}: its backbones, "
                            f"c_dim or san differ from this run's ({', '.join(self.config.backbones)}; "
                            f"c_dim {self.config.c_dim})")
        wrong = [f"{name} {list(state[name].shape)} for {list(own[name].shape)}"
                 for name in own if state[name].shape != own[name].shape]
        if wrong:
            raise UserError(f"discriminator: shapes in the snapshot do not fit: {list_some(wrong, 3)}: "
                            "take the snapshot's own settings (c_dim, cmap_dim, proj_channels, max_channels)")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])
