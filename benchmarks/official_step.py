# SPDX-License-Identifier: Apache-2.0
"""One training iteration structured as the official code does it: what bench_training.py compares with.

Written from the description of that structure. It works on copies of our networks, in which slow forms take the place
of ours (`install_official_forms`), so that both start from the same weights and must give the same gradients:

* resampling by zero-insertion, padding and convolutions; activations apart from them;
* a weight per sample in the generator's convolutions, which are grouped;
* spectral norm by division of the weight;
* attention written out, and the transformer evaluated to its end, with its maps caught on the way;
* generated and real images in passes of their own, also through the frozen part;
* gradients, optimiser and average parameter by parameter; the mean of w sample by sample.

No graph is made through the frozen part for real images: nothing asks for one there.
"""
import copy
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_utils.misc import requires_grad
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from training.config import OptimConfig
from training.diffaug import diff_augment
from training.discriminators.blocks import SpectralConv2d
from training.discriminators.projected import FeatureNetwork, Features, ProjectedDiscriminator
from training.networks_stylegan3 import FullyConnectedLayer, Generator, SynthesisLayer
from training.step.loss_math import discriminator_loss_fake, discriminator_loss_real, generator_loss
from training.step.micro_batch import MicroBatch

#----------------------------------------------------------------------------
# Slow forms of layers.

def grouped_modulated_conv(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
                           input_gain: torch.Tensor) -> torch.Tensor:
    """A weight per sample (Karras et al. 2020, equations 1-3), applied as one grouped convolution."""
    num, channels = x.shape[:2]
    if demodulate:
        weight = weight * weight.square().mean(dim=[1, 2, 3], keepdim=True).rsqrt()
        styles = styles * styles.square().mean().rsqrt()
    weights = weight[None] * styles[:, None, :, None, None]                 # [N, O, I, k, k]
    if demodulate:
        weights = weights * (weights.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt()[:, :, None, None, None]
    weights = weights * input_gain
    y = F.conv2d(x.reshape(1, num * channels, *x.shape[2:]), weights.flatten(0, 1).to(x.dtype), padding=padding,
                 groups=num)
    return y.reshape(num, -1, *y.shape[2:])


def synthesis_layer(layer: SynthesisLayer, x: torch.Tensor, w: torch.Tensor, force_fp32: bool = False,
                    *_unused: object) -> torch.Tensor:
    """SynthesisLayer.forward."""
    spec = layer.spec
    on_gpu = x.device.type == "cuda"        # There the official code has native operations, too, and half precision.
    x = x.to(torch.float16 if on_gpu and spec.use_fp16 and not force_fp32 else layer.weight.dtype)
    styles = layer.affine(w)
    if spec.is_torgb:
        styles = styles / math.sqrt(spec.in_channels * layer.conv_kernel ** 2)
    x = grouped_modulated_conv(x, layer.weight, styles, not spec.is_torgb, layer.conv_kernel - 1,
                               layer.magnitude_ema.rsqrt())
    gain, slope = (1.0, 1.0) if spec.is_torgb else (math.sqrt(2), 0.2)
    return filtered_lrelu(x, fu=layer.up_filter, fd=layer.down_filter, b=layer.bias.to(x.dtype), up=layer.up,
                          down=layer.down, padding=layer.padding, gain=gain, slope=slope, clamp=layer.conv_clamp,
                          impl="auto" if on_gpu else "ref")


def fully_connected(layer: FullyConnectedLayer, x: torch.Tensor) -> torch.Tensor:
    """FullyConnectedLayer.forward."""
    weight, bias = layer.weight * layer.weight_gain, layer.bias * layer.bias_gain
    if layer.activation == "linear":
        return torch.addmm(bias, x, weight.t())
    return bias_act(x @ weight.t(), bias, act=layer.activation, impl="auto" if x.device.type == "cuda" else "ref")


def spectral_conv(layer: SpectralConv2d, x: torch.Tensor) -> torch.Tensor:
    """SpectralConv2d.forward."""
    layer.power_iteration()
    u, v = layer.weight_u.clone(), layer.weight_v.clone()
    weight = layer.weight_orig / torch.dot(u, layer.weight_orig.flatten(1) @ v)
    return F.conv2d(x, weight, layer.bias, stride=layer.stride, padding=layer.padding)


def feature_network(network: FeatureNetwork, images: torch.Tensor) -> list[torch.Tensor]:
    """FeatureNetwork.forward."""
    backbone = network.backbone
    x = backbone.preprocess(images)
    if not backbone.isotropic:
        return network.scratch(backbone.maps(x))
    tokens: dict[int, torch.Tensor] = {}
    hooks = [backbone.net.blocks[i].register_forward_hook(lambda _m, _x, y, i=i: tokens.update({i: y}))
             for i in backbone.indices]
    backbone.net(x)
    for hook in hooks:
        hook.remove()
    side = backbone.map_sizes[0]
    maps = [y[:, -side * side:].transpose(1, 2).unflatten(2, (side, side)) for y in tokens.values()]
    return network.scratch(network.pretrained(maps))


SLOW_FORMS: dict[type, Callable[..., object]] = {
    SynthesisLayer: synthesis_layer, FullyConnectedLayer: fully_connected, SpectralConv2d: spectral_conv,
    FeatureNetwork: feature_network,
}


def install_official_forms(*networks: torch.nn.Module) -> None:
    """Let the networks compute by the functions above, and attention product by product."""
    for module in (module for network in networks for module in network.modules()):
        if type(module) in SLOW_FORMS:
            module.forward = functools.partial(SLOW_FORMS[type(module)], module)
        if hasattr(module, "fused_attn"):
            module.fused_attn = False

#----------------------------------------------------------------------------

Guidance = tuple[torch.nn.Module, float]        # Classifier and its weight.


class OfficialStep:
    """Copies of the networks, their optimisers, and an iteration."""

    def __init__(self, G: Generator, D: ProjectedDiscriminator, config: OptimConfig, guidance: Guidance | None = None):
        self.G, self.D = copy.deepcopy((G, D))
        install_official_forms(self.G, self.D)
        self.G_ema = copy.deepcopy(G).eval()
        self.config, self.guidance = config, guidance
        self.optimizers = [self._adam(self.G, config.G_lr, config.G_reg_interval),
                           self._adam(self.D, config.D_lr, config.D_reg_interval)]

    def _adam(self, net: Generator | ProjectedDiscriminator, lr: float, interval: int) -> torch.optim.Adam:
        ratio = interval / (interval + 1)
        return torch.optim.Adam(net.trainable_parameters(), lr=lr * ratio, foreach=False, fused=False,
                                betas=tuple(b ** ratio for b in self.config.betas), eps=self.config.eps)

    def features(self, images: torch.Tensor, augment: torch.Tensor) -> Features:
        """Features of generated or of real images."""
        return {key: network(diff_augment(images, self.D.config.diffaug, u))
                for (key, network), u in zip(self.D.feature_networks.items(), augment, strict=True)}

    #------------------------------------------------------------------------

    def generator_phase(self, batch: MicroBatch) -> None:
        """Adds to the gradients of G; officially the terms are summed over the micro-batch."""
        images = self.G(batch.z, batch.gen_c)
        logits = self.D.heads(self.features(images, batch.augment_fake), batch.gen_c)
        loss = generator_loss(logits).sum()
        if self.guidance is not None:
            classifier, weight = self.guidance
            loss = loss + F.cross_entropy(classifier(images), batch.gen_c.argmax(dim=1)) * weight
        loss.backward()

    def features_of_both(self, fake: torch.Tensor, batch: MicroBatch) -> tuple[Features, Features]:
        """Features of generated and of real images, in passes of their own."""
        return self.features(fake, batch.augment_fake), self.features(batch.real_img, batch.augment_real)

    def discriminator_phase(self, batch: MicroBatch) -> None:
        """Adds to the gradients of D."""
        ws = self.G.mapping(batch.z, batch.gen_c)
        self._move_w_avg(ws[:, 0].detach(), batch.gen_c)
        fake, real = self.features_of_both(self.G.synthesis(ws), batch)
        self.heads(fake, real, batch)

    def heads(self, fake: Features, real: Features, batch: MicroBatch) -> None:
        """The trainable part of the discriminator phase: adds to the gradients of D."""
        discriminator_loss_fake(self.D.heads_san(fake, batch.gen_c)).sum().backward()
        discriminator_loss_real(self.D.heads_san(real, batch.real_c)).sum().backward()

    def _move_w_avg(self, w: torch.Tensor, c: torch.Tensor) -> None:
        mapping = self.G.mapping
        for one, label in zip(w, c.argmax(dim=1), strict=True):
            mapping.w_avg[label].copy_(one.lerp(mapping.w_avg[label], mapping.w_avg_beta))

    def step(self, optimizer: torch.optim.Adam) -> None:
        """Replace what is not finite, move the parameters."""
        for p in optimizer.param_groups[0]["params"]:
            if p.grad is not None:
                torch.nan_to_num(p.grad, nan=0, posinf=1e5, neginf=-1e5, out=p.grad)
        optimizer.step()

    @torch.no_grad()
    def average(self, cur_nimg: int, batch: int) -> None:
        """Average all parameters of G, also those that do not move."""
        half_life = min(self.config.ema_kimg * 1000, cur_nimg * self.config.ema_rampup)
        decay = 0.5 ** (batch / max(half_life, 1e-8))
        for old, new in zip(self.G_ema.parameters(), self.G.parameters(), strict=True):
            old.copy_(new.lerp(old, decay))
        for old, new in zip(self.G_ema.buffers(), self.G.buffers(), strict=True):
            old.copy_(new)

    def iteration(self, for_G: MicroBatch, for_D: MicroBatch, cur_nimg: int) -> None:
        """Both phases and the average."""
        phases = zip((self.G, self.D), self.optimizers, (self.generator_phase, self.discriminator_phase),
                     (for_G, for_D), strict=True)
        for net, optimizer, backward, batch in phases:
            optimizer.zero_grad(set_to_none=True)
            with requires_grad(net, net.trainable_parameters()):
                backward(batch)
            self.step(optimizer)
        self.D.project_()
        self.average(cur_nimg, len(for_G.z))
