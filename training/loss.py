# SPDX-License-Identifier: Apache-2.0
"""The forward and backward passes of the training phases.

Every term is a mean over the samples of the global batch, so gradients do not depend on how a batch is split. Guidance
and path-length weights keep their official meaning at micro-batch 8: officially adversarial terms are summed over a
micro-batch while these two are averaged, so per sample their weight is `weight / reference_micro_batch`.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_utils import distributed
from training.config import LossConfig
from training.discriminators.projected import Features, ProjectedDiscriminator
from training.networks_stylegan3 import PRECISIONS, Generator
from training.step.blur import blur, blur_sigma
from training.step.diversity import diversity_loss
from training.step.loss_math import discriminator_loss_fake, discriminator_loss_real, generator_loss, path_lengths
from training.step.micro_batch import MicroBatch


class StyleSanLoss:
    """Forward and backward of each phase. Gradients are added to `.grad`; parameters are never stepped here."""

    def __init__(
        self,
        G: Generator,
        D: ProjectedDiscriminator,
        config: LossConfig,
        device: torch.device,
        classifier: Callable[[torch.Tensor], torch.Tensor] | None = None,   # Images in [-1, 1] -> logits [N, c_dim].
        report: Callable[[str, torch.Tensor], None] = lambda name, value: None,
        precision: str = "auto",                # How G computes: a key of `training.networks_stylegan3.PRECISIONS`.
        real_distance: float = 0.0,             # `training.dataset.real_pair_distance`, for the diversity term.
    ):
        self.G, self.D, self.config, self.classifier = G, D, config, classifier
        self.report = report
        self.precision, self.real_distance = PRECISIONS[precision], real_distance
        self.pl_mean = torch.zeros([], dtype=G.mapping.w_avg.dtype, device=device)
        self.blur_sigma = 0.0
        self._drawn: list[tuple[torch.Tensor, torch.Tensor]] = []   # w and classes of this step, for the mean of w.
        self._lengths: list[torch.Tensor] = []      # Path lengths of this step; only with ghost batches.

    def set_progress(self, cur_nimg: int) -> None:
        """Set what depends on the number of images seen in this stage."""
        self.blur_sigma = blur_sigma(cur_nimg, self.config.blur_init_sigma, self.config.blur_fade_kimg)

    def path_length_is_active(self, cur_nimg: int) -> bool:
        """Whether the path-length phase runs: in stems only, and only from `pl_start_kimg` on."""
        is_stem = self.G.config.num_frozen_layers == 0
        return self.config.pl_weight > 0 and is_stem and cur_nimg >= self.config.pl_start_kimg * 1e3

    def _report_scores(self, kind: str, logits: list[torch.Tensor], features: Features) -> None:
        """Report mean score and mean sign: over all heads, per backbone, and per scale of a backbone."""
        for name, x, sizes in zip(self.D.backbone_names, logits, self.D.scale_sizes(features), strict=True):
            signs = x.detach().sign()
            self.report(f"Loss/scores/{kind}", x)
            self.report(f"Loss/signs/{kind}", signs)
            self.report(f"Loss/signs/{kind}/{name}", signs)
            for scale, part in enumerate(signs.split(sizes, dim=1)):
                self.report(f"Loss/signs/{kind}/{name}/{scale}", part)

    #------------------------------------------------------------------------
    # Phases. `global_batch` is the number of samples over all micro-batches and processes.

    def generator_main(self, batch: MicroBatch, global_batch: int) -> None:
        """Maximise the score of generated images; with a classifier, its confidence in the class that was asked for;
        with the diversity term, the distance between two images of a class."""
        images = self.G(batch.z, batch.gen_c, **self.precision)
        features = self.D.features(blur(images, self.blur_sigma), batch.augment_fake)
        logits = self.D.heads(features, batch.gen_c)
        self._report_scores("fake", logits, features)
        loss = generator_loss(logits)
        self.report("Loss/G/adversarial", loss)
        if self.classifier is not None:
            guidance = F.cross_entropy(self.classifier(images), batch.gen_c.argmax(dim=1), reduction="none")
            self.report("Loss/G/guidance_loss", guidance)
            loss = loss + guidance * (self.config.cls_weight / self.config.reference_micro_batch)
        if self.config.diversity_weight > 0:
            missing = diversity_loss(images, self.real_distance)
            self.report("Loss/G/diversity", missing)
            loss = loss + missing.repeat_interleave(2) * self.config.diversity_weight
        self.report("Loss/G/loss", loss)
        (loss.sum() / global_batch).backward()

    def generator_path_length(self, batch: MicroBatch, global_batch: int) -> None:
        """Path-length regularisation (Karras et al. 2020, equation 4) on part of the micro-batch.

        The running mean is updated first and enters the penalty with its gradient; the penalty is not multiplied by the
        interval of the phase (StyleGAN3 does that; StyleGAN-XL does not). With ghost batches samples are chosen from
        each, and the mean is the one before the step and moves after it: neither depends on micro-batches.
        """
        ghost = self.D.config.ghost_batch
        count = max((ghost or len(batch.z)) // self.config.pl_batch_shrink, 1)
        # These are slices, because a list of positions would be copied to the device, which waits for it.
        z, c, noise = (x.unflatten(0, (-1, ghost))[:, :count].flatten(0, 1) if ghost else x[:count]
                       for x in (batch.z, batch.gen_c, batch.noise()))
        ws = self.G.mapping(z, c)
        images = self.G.synthesis(ws, **self.precision)
        lengths = path_lengths(images, ws, noise)
        if ghost:
            self._lengths.append(lengths.detach())
            mean = self.pl_mean
        else:
            mean = self._moved_mean(lengths)
        penalty = (lengths - mean).square()
        self.report("Loss/pl_penalty", penalty)
        weight = self.config.pl_weight / self.config.reference_micro_batch
        # This is the mean over the samples used here, weighted by the micro-batch's share of the global batch.
        loss = penalty.mean() * weight * (len(batch.z) / global_batch)
        self.report("Loss/G/reg", penalty.detach() * weight)
        loss.backward()

    def forget_step(self) -> None:
        """Drop what micro-batches have left for the end of their step; call it after a step that failed half-way."""
        self._drawn.clear()
        self._lengths.clear()

    def _moved_mean(self, lengths: torch.Tensor) -> torch.Tensor:
        """Move the running mean of path lengths by these; returns it with its gradient."""
        # Its value is the mean over all processes, so that they agree; its gradient is that of this process alone.
        local = lengths.mean()
        average = distributed.all_reduce_sum(local.detach().clone()) / distributed.world_size()
        mean = self.pl_mean.lerp(local + (average - local.detach()), self.config.pl_decay)
        self.pl_mean.copy_(mean.detach())
        return mean

    def end_path_length(self) -> None:
        """Move the running mean of path lengths once, after the last micro-batch, if there are ghost batches."""
        if self._lengths:
            average = distributed.all_reduce_sum(torch.cat(self._lengths).mean()) / distributed.world_size()
            self.pl_mean.lerp_(average, self.config.pl_decay)
            self._lengths.clear()

    def discriminator_main(self, batch: MicroBatch, global_batch: int) -> None:
        """Tell generated from real images, and turn the SAN directions towards where they differ most."""
        real_img, real_c = batch.real()
        with torch.no_grad():
            ws = self.G.mapping(batch.z, batch.gen_c)
            self._drawn.append((ws[:, 0], batch.gen_c))
            fake = self.G.synthesis(ws, **self.precision)
            # The frozen part takes generated and real images in one batch; batch statistics exist only behind it.
            both = blur(torch.cat([fake, real_img]), self.blur_sigma)
            augment = None
            if batch.augment_fake is not None and batch.augment_real is not None:
                augment = torch.cat([batch.augment_fake, batch.augment_real], dim=1)
            features = self.D.features(both, augment)
            features_fake, features_real = self.D.split_features(features, len(fake))

        outputs = self.D.heads_san(features_fake, batch.gen_c)
        self._report_scores("fake", [out.fun for out in outputs], features_fake)
        loss_fake = discriminator_loss_fake(outputs)
        (loss_fake.sum() / global_batch).backward()

        outputs = self.D.heads_san(features_real, real_c)
        self._report_scores("real", [out.fun for out in outputs], features_real)
        loss_real = discriminator_loss_real(outputs)
        (loss_real.sum() / global_batch).backward()
        self.report("Loss/D/loss", loss_fake.detach() + loss_real.detach())

    @torch.no_grad()
    def end_discriminator_main(self) -> None:
        """Move the running mean of w by the samples of all processes, in their order, after the last micro-batch."""
        ws, cs = (distributed.all_gather(torch.stack(parts)) for parts in zip(*self._drawn, strict=True))
        self._drawn.clear()
        # [processes * micro-batches, N, ...] -> [micro-batches, processes * N, ...]: the order of positions.
        ws, cs = (x.unflatten(0, (distributed.world_size(), -1)).transpose(0, 1).flatten(1, 2) for x in (ws, cs))
        if self.D.config.ghost_batch:       # Without classes the mean moves once per call.
            ws, cs = ws.flatten(0, 1)[None], cs.flatten(0, 1)[None]
        for w, c in zip(ws, cs, strict=True):
            self.G.mapping.update_w_avg(w, c)
