# SPDX-License-Identifier: Apache-2.0
"""The alias-free generator (Karras et al. 2021) with the class-conditional mapping of StyleGAN-XL (Sauer et al. 2022).

Parameter names are the official ones, so that official checkpoints fit. One class serves stems and super-resolution
stages: they differ only in their layer table (`training.config.GeneratorConfig`).
"""
import math
from typing import TypedDict

import numpy as np
import scipy.special
import torch
import torch.nn.functional as F

from torch_utils.misc import assert_shape
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.modulated_conv2d import fit_channels, modulated_conv2d, padded_channels
from training.config import GeneratorConfig, InputSpec, LayerSpec

#----------------------------------------------------------------------------

def unit_rms(x: torch.Tensor, eps: float = 1e-8) -> torch.Tensor:
    """Scale every row of [N, D] to root mean square 1."""
    return x * (x.square().mean(dim=1, keepdim=True) + eps).rsqrt()


class FullyConnectedLayer(torch.nn.Module):
    """Linear layer with equalised learning rate: the stored weight is multiplied by lr_multiplier / sqrt(fan_in)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: str = "linear",     # A name of torch_utils.ops.bias_act.
        lr_multiplier: float = 1.0,
        weight_init: float = 1.0,       # Standard deviation of the effective weight times sqrt(fan_in).
        bias_init: float | list[float] = 0.0,
    ):
        super().__init__()
        self.activation = activation
        self.weight = torch.nn.Parameter(torch.randn([out_features, in_features]) * (weight_init / lr_multiplier))
        bias = torch.as_tensor(bias_init, dtype=self.weight.dtype).expand(out_features)
        self.bias = torch.nn.Parameter(bias / lr_multiplier)
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier

    def forward(self, x: torch.Tensor) -> torch.Tensor:     # [N, in_features] -> [N, out_features]
        weight = self.weight.to(x.dtype) * self.weight_gain
        bias = self.bias.to(x.dtype) * self.bias_gain
        if self.activation == "linear":
            return torch.addmm(bias, x, weight.t())
        return bias_act(x @ weight.t(), bias, act=self.activation)

#----------------------------------------------------------------------------

class MappingNetwork(torch.nn.Module):
    """(z, c) -> w, repeated for every layer; keeps a running mean of w per class for truncation."""

    w_avg: torch.Tensor         # [c_dim, w_dim], or [w_dim] when unconditional.

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = config.z_dim, config.c_dim, config.w_dim, config.num_ws
        self.w_avg_beta = 0.998
        features = config.z_dim
        if config.c_dim > 0:
            self.embed = torch.nn.Embedding(config.c_dim, config.embed_dim)
            self.embed_proj = FullyConnectedLayer(config.embed_dim, config.z_dim, activation="lrelu")
            features += config.z_dim
        self.num_layers = config.mapping_layers
        for i in range(self.num_layers):
            layer = FullyConnectedLayer(features if i == 0 else config.w_dim, config.w_dim, "lrelu", lr_multiplier=0.01)
            setattr(self, f"fc{i}", layer)
        shape = [config.c_dim, config.w_dim] if config.c_dim > 0 else [config.w_dim]
        self.register_buffer("w_avg", torch.zeros(shape))

    def forward(self, z: torch.Tensor, c: torch.Tensor | None, truncation_psi: float = 1.0,
                truncation_cutoff: int | None = None) -> torch.Tensor:
        """[N, z_dim], one-hot [N, c_dim] -> ws [N, num_ws, w_dim].

        Args:
            z: Standard normal latents.
            c: Class labels; None or [N, 0] when unconditional.
            truncation_psi: Pull w towards the class's mean: 1 leaves it, 0 gives the mean.
            truncation_cutoff: Only the first so many layers are pulled; None means all.
        """
        classes = self._labels(c).argmax(dim=1) if self.c_dim > 0 else None
        ws = self.map_classes(z, classes)
        return ws if truncation_psi == 1 else self.truncate(ws, classes, truncation_psi, truncation_cutoff)

    def map_classes(self, z: torch.Tensor, classes: torch.Tensor | None) -> torch.Tensor:
        """[N, z_dim], indices of classes [N] (None when unconditional) -> ws [N, num_ws, w_dim] without truncation."""
        assert_shape(z, [None, self.z_dim])
        w = self.map(z, None if classes is None else self.embed(classes))
        return w.unsqueeze(1).repeat(1, self.num_ws, 1)

    def truncate(self, ws: torch.Tensor, classes: torch.Tensor | None, psi: float | torch.Tensor,
                 cutoff: int | None = None) -> torch.Tensor:
        """Pull the first `cutoff` of ws [N, num_ws, w_dim] towards the means of their classes: see `forward`."""
        mean = self.w_avg if classes is None else self.w_avg[classes].unsqueeze(1)
        cut = self.num_ws if cutoff is None else cutoff
        return torch.cat([mean.lerp(ws[:, :cut], psi), ws[:, cut:]], dim=1)

    def map(self, z: torch.Tensor, vectors: torch.Tensor | None) -> torch.Tensor:
        """z [N, z_dim] and class vectors [N, embed_dim], rows of `embed` or what lies between them, -> w [N, w_dim].

        Args:
            z: Latents; only their direction counts.
            vectors: None when unconditional.
        """
        x = unit_rms(z.to(self.w_avg.dtype))
        if vectors is not None:
            x = torch.cat([x, unit_rms(self.embed_proj(vectors))], dim=1)
        for i in range(self.num_layers):
            x = getattr(self, f"fc{i}")(x)
        return x

    def _labels(self, c: torch.Tensor | None) -> torch.Tensor:
        """The labels of a conditional generator, which must be there: one-hot [N, c_dim]."""
        assert c is not None, "a conditional generator needs class labels"
        assert_shape(c, [None, self.c_dim])
        return c

    @torch.no_grad()
    def update_w_avg(self, w: torch.Tensor, c: torch.Tensor | None) -> None:
        """Move the running mean towards the batch. w: [N, w_dim]; c: one-hot [N, c_dim].

        Officially samples enter one after the other, `w_avg[class] = lerp(w, w_avg[class], beta)`. Unrolled, a class
        with samples w_1..w_n becomes `beta^n * w_avg + (1 - beta) * sum_i beta^(n - i) * w_i`, which needs no loop.
        """
        beta = self.w_avg_beta
        if self.c_dim == 0:
            self.w_avg.copy_(w.mean(dim=0).lerp(self.w_avg, beta))
            return
        c = self._labels(c).to(w.dtype)                             # The powers of beta are as precise as w.
        same = c @ c.t()                                            # [N, N]: 1 where the classes agree.
        later = torch.triu(same, diagonal=1).sum(dim=1)             # Samples of the same class that come after.
        share = (1 - beta) * beta ** later                          # [N]
        self.w_avg.mul_((beta ** c.sum(dim=0)).unsqueeze(1))
        self.w_avg.index_add_(0, c.argmax(dim=1), w * share.unsqueeze(1))

#----------------------------------------------------------------------------

class SynthesisInput(torch.nn.Module):
    """Fourier features, rotated and translated by w and by the user (Karras et al. 2021, section 3.2, appendix F)."""

    transform: torch.Tensor     # [3, 3], from output to input: the inverse of what the user asks for.
    freqs: torch.Tensor         # [channels, 2]
    phases: torch.Tensor        # [channels]

    def __init__(self, spec: InputSpec, w_dim: int):
        super().__init__()
        self.spec = spec
        # Frequencies are uniform in a disc, phases in a period.
        freqs = torch.randn([spec.channels, 2])
        radii = freqs.square().sum(dim=1, keepdim=True).sqrt()
        freqs = freqs / (radii * radii.square().exp().pow(0.25)) * spec.bandwidth
        self.weight = torch.nn.Parameter(torch.randn([spec.channels, spec.channels]))
        self.affine = FullyConnectedLayer(w_dim, 4, weight_init=0, bias_init=[1, 0, 0, 0])
        self.register_buffer("transform", torch.eye(3))
        self.register_buffer("freqs", freqs)
        self.register_buffer("phases", torch.rand([spec.channels]) - 0.5)

    def forward(self, w: torch.Tensor, transform: torch.Tensor | None = None,
                style_offset: torch.Tensor | None = None) -> torch.Tensor:
        """[N, w_dim] -> [N, channels, size, size].

        Args:
            transform: [N, 3, 3], one per image instead of the buffer of this name.
            style_offset: [N, 4], added to what the affine layer makes of w.
        """
        t = self.affine(w)                                  # [N, 4]: cos, sin, shift x, shift y.
        if style_offset is not None:
            t = t + style_offset
        t = t / t[:, :2].norm(dim=1, keepdim=True)
        cos, sin, dx, dy = t.unbind(dim=1)
        one, zero = torch.ones_like(cos), torch.zeros_like(cos)
        rotate = torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one], dim=1).reshape(-1, 3, 3)
        shift = torch.stack([one, zero, -dx, zero, one, -dy, zero, zero, one], dim=1).reshape(-1, 3, 3)
        transform = rotate @ shift @ (self.transform if transform is None else transform)       # [N, 3, 3]

        # Moving the picture is the same as turning the frequencies and adding to the phases.
        freqs = self.freqs @ transform[:, :2, :2]                                           # [N, C, 2]
        phases = self.phases + (self.freqs @ transform[:, :2, 2:]).squeeze(2)               # [N, C]
        # Frequencies that the transform pushes beyond the band fade out before they alias.
        spec = self.spec
        amplitudes = 1 - (freqs.norm(dim=2) - spec.bandwidth) / (spec.sampling_rate / 2 - spec.bandwidth)
        amplitudes = amplitudes.clamp(0, 1)                                                 # [N, C]

        scale = 0.5 * spec.size / spec.sampling_rate
        theta = torch.eye(2, 3, device=w.device, dtype=w.dtype) * scale     # No copy, which would be waited for.
        grid = F.affine_grid(theta[None], [1, 1, spec.size, spec.size], align_corners=False)    # [1, H, W, 2]
        x = grid.reshape(1, -1, 2) @ freqs.transpose(1, 2) + phases.unsqueeze(1)            # [N, H*W, C]
        x = torch.sin(x * (2 * math.pi)) * amplitudes.unsqueeze(1)
        x = x @ (self.weight / math.sqrt(spec.channels)).t()
        image: torch.Tensor = x.transpose(1, 2).reshape(-1, spec.channels, spec.size, spec.size)
        return image            # This is a view, so it is channels last in memory.

#----------------------------------------------------------------------------

def design_lowpass_filter(num_taps: int, cutoff: float, width: float, sampling_rate: float,
                          radial: bool = False) -> torch.Tensor | None:
    """Kaiser low-pass filter (Karras et al. 2021, appendix C): [taps], radial [taps, taps], or None for one tap.

    Taps are worked out in double precision and rounded to single precision, also for networks in double precision: they
    are part of the state of a network, and official snapshots hold these values.

    Raises:
        ValueError: the cutoff is not between 0 and half the sampling rate.
    """
    if num_taps == 1:
        return None
    if not 0 < cutoff < sampling_rate / 2:
        raise ValueError(f"cutoff {cutoff:g}: must be above 0 and below half the sampling rate of {sampling_rate:g}")
    x = (np.arange(num_taps) - (num_taps - 1) / 2) / sampling_rate
    window = kaiser_window(num_taps, width / (sampling_rate / 2))
    if not radial:
        f = np.sinc(2 * cutoff * x) * window
        return torch.as_tensor(f / f.sum(), dtype=torch.float32)
    # This is a jinc, the radially symmetric counterpart of the sinc, under the outer product of the 1-D window.
    r = np.hypot(*np.meshgrid(x, x))
    f = scipy.special.j1(2 * cutoff * (np.pi * r)) / (np.pi * r)
    f *= np.outer(window, window)
    return torch.as_tensor(f / f.sum(), dtype=torch.float32)


def kaiser_window(num_taps: int, width: float) -> np.ndarray:
    """The window whose filter has a transition band of `width`, a fraction of half the sampling rate (Kaiser 1974).

    `scipy.signal` has it too, and takes a second to load.
    """
    attenuation = 2.285 * (num_taps - 1) * (np.pi * width) + 7.95      # In dB.
    if attenuation > 50:
        beta = 0.1102 * (attenuation - 8.7)
    elif attenuation > 21:
        beta = 0.5842 * (attenuation - 21) ** 0.4 + 0.07886 * (attenuation - 21)
    else:
        beta = 0.0
    return np.kaiser(num_taps, beta)


class SynthesisLayer(torch.nn.Module):
    """Modulated convolution, then bias and leaky ReLU between an upsampling and a downsampling filter."""

    magnitude_ema: torch.Tensor             # A number: the mean square of the layer's input.
    up_filter: torch.Tensor | None
    down_filter: torch.Tensor | None

    def __init__(self, spec: LayerSpec, config: GeneratorConfig):
        super().__init__()
        self.spec = spec
        self.conv_kernel = spec.conv_kernel
        self.conv_clamp = config.conv_clamp if spec.is_clamped else None
        self.magnitude_ema_beta = config.magnitude_ema_beta
        self.affine = FullyConnectedLayer(config.w_dim, spec.in_channels, bias_init=1)
        kernel = self.conv_kernel
        self.weight = torch.nn.Parameter(torch.randn([spec.out_channels, spec.in_channels, kernel, kernel]))
        self.bias = torch.nn.Parameter(torch.zeros([spec.out_channels]))
        self.register_buffer("magnitude_ema", torch.ones([]))

        # The nonlinearity works at `rate`, high enough for the new frequencies it makes.
        rate = max(spec.in_sampling_rate, spec.out_sampling_rate) * (1 if spec.is_torgb else config.lrelu_upsampling)
        self.up, self.down = round(rate / spec.in_sampling_rate), round(rate / spec.out_sampling_rate)
        up_taps = config.filter_size * self.up if self.up > 1 and not spec.is_torgb else 1
        down_taps = config.filter_size * self.down if self.down > 1 and not spec.is_torgb else 1
        self.register_buffer("up_filter", design_lowpass_filter(
            up_taps, spec.in_cutoff, spec.in_half_width * 2, rate))
        self.register_buffer("down_filter", design_lowpass_filter(
            down_taps, spec.out_cutoff, spec.out_half_width * 2, rate,
            radial=spec.use_radial_filters and not spec.is_critically_sampled))

        # Padding turns in_size (grown by the convolution) into out_size; an odd rest goes to the far side.
        total = (spec.out_size - 1) * self.down + 1 - (spec.in_size + kernel - 1) * self.up + up_taps + down_taps - 2
        low = (total + self.up) // 2
        self.padding = [low, total - low] * 2

    def forward(self, x: torch.Tensor, w: torch.Tensor, force_fp32: bool = False,
                update_magnitude_ema: bool = False, low_dtype: torch.dtype | None = None,
                keep_zeros: bool = False, style_offset: torch.Tensor | None = None) -> torch.Tensor:
        """[N, in_channels, in_size, in_size], w [N, w_dim] -> [N, out_channels, out_size, out_size].

        With `keep_zeros`, the channels of zeros that the form of the convolution may add stay at the end of the result;
        the next layer takes them as they are (`torch_utils.ops.modulated_conv2d`). `style_offset` [N, in_channels] is
        added to what the affine layer makes of w.
        """
        spec = self.spec
        channels = spec.in_channels if x.shape[1] == spec.in_channels else padded_channels(spec.in_channels)
        assert_shape(x, [None, channels, spec.in_size, spec.in_size])
        if update_magnitude_ema:
            with torch.no_grad():
                power = fit_channels(x, spec.in_channels).to(self.magnitude_ema.dtype).square().mean()
                self.magnitude_ema.copy_(power.lerp(self.magnitude_ema, self.magnitude_ema_beta))
        styles = self.affine(w)
        if style_offset is not None:
            styles = styles + style_offset
        if spec.is_torgb:
            styles = styles / math.sqrt(spec.in_channels * self.conv_kernel ** 2)
        if low_dtype is None and x.device.type == "cuda" and self.weight.dtype == torch.float32:
            low_dtype = torch.float16       # A network in double precision is meant to stay in it.
        may_be_low = spec.use_fp16 and not force_fp32
        x = x.to(low_dtype if may_be_low and low_dtype is not None else self.weight.dtype)
        x = modulated_conv2d(x, self.weight, styles, demodulate=not spec.is_torgb, padding=self.conv_kernel - 1,
                             input_gain=self.magnitude_ema.rsqrt())
        bias = fit_channels(self.bias.to(x.dtype), x.shape[1], dim=0)
        gain, slope = (1.0, 1.0) if spec.is_torgb else (math.sqrt(2), 0.2)
        x = filtered_lrelu(x, fu=self.up_filter, fd=self.down_filter, b=bias, up=self.up, down=self.down,
                           padding=self.padding, gain=gain, slope=slope, clamp=self.conv_clamp)
        return x if keep_zeros else fit_channels(x, spec.out_channels)

    def extra_repr(self) -> str:
        return (f"{self.spec.name}, up={self.up}, down={self.down}, padding={self.padding}, "
                f"critical={self.spec.is_critically_sampled}, fp16={self.spec.use_fp16}")

#----------------------------------------------------------------------------

class Precision(TypedDict, total=False):
    """Arguments of the synthesis that decide about half precision; see `SynthesisNetwork.forward`."""

    force_fp32: bool
    low_dtype: torch.dtype


PRECISIONS: dict[str, Precision] = {            # --precision -> arguments of the synthesis.
    "auto": {},                                 # Half precision on CUDA devices in the layers that are marked for it.
    "fp32": {"force_fp32": True},
    "bf16": {"low_dtype": torch.bfloat16},      # In these layers, on any device.
}


class SynthesisNetwork(torch.nn.Module):
    """ws -> image: the input, then the layers of the table in turn.

    Between layers maps may have channels of zeros at their end, and on GPUs they have them (`SynthesisLayer.forward`).
    This is between the layers of a network: a layer that is called by itself has the channels of its table.
    """

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.num_ws = config.num_ws
        self.output_scale = config.output_scale
        self.layer_names = [spec.name for spec in config.layers]
        self.input = SynthesisInput(config.input, config.w_dim)
        for spec in config.layers:
            setattr(self, spec.name, SynthesisLayer(spec, config))

    @property
    def affines(self) -> list[FullyConnectedLayer]:
        """The layers that make the styles: number k takes ws[:, k]."""
        return [layer.affine for layer in (self.input, *(getattr(self, name) for name in self.layer_names))]

    @property
    def style_sizes(self) -> list[int]:
        """Values of the styles of each layer. All of them, layer by layer, are a point in style space."""
        return [len(affine.bias) for affine in self.affines]

    def forward(self, ws: torch.Tensor, force_fp32: bool = False, update_magnitude_ema: bool = False,
                low_dtype: torch.dtype | None = None, transform: torch.Tensor | None = None,
                style_offset: torch.Tensor | None = None) -> torch.Tensor:
        """[N, num_ws, w_dim] -> images [N, 3, R, R], about [-1, 1].

        Args:
            force_fp32: No half precision, also in layers that are marked for it.
            update_magnitude_ema: Track the magnitudes of the layers' inputs. Nothing in training asks for it: with
                projected discriminators it led to collapse (Sauer et al. 2022), so the gains stay at 1.
            low_dtype: Type of the layers that are marked for half precision. None: float16 on CUDA devices if the
                parameters are float32, else the type of the parameters.
            transform: [N, 3, 3], where each image lies, as the buffer of the input says it for all.
            style_offset: [N or 1, sum of `style_sizes`], added to the styles that the layers make of ws.
        """
        first, *rest = ws.to(self.input.weight.dtype).unbind(dim=1)
        offsets: list[torch.Tensor | None] = [None] * self.num_ws
        if style_offset is not None:
            offsets = [*style_offset.to(self.input.weight.dtype).split(self.style_sizes, dim=1)]
        x = self.input(first, transform, offsets[0])
        for name, w, offset in zip(self.layer_names, rest, offsets[1:], strict=True):
            keep_zeros = name != self.layer_names[-1]
            x = getattr(self, name)(x, w, force_fp32, update_magnitude_ema, low_dtype, keep_zeros, offset)
        # One call converts type and layout, so that the image is read and written once.
        image: torch.Tensor = x.to(self.input.weight.dtype, memory_format=torch.contiguous_format) * self.output_scale
        return image

#----------------------------------------------------------------------------

class Generator(torch.nn.Module):
    """Class-conditional StyleGAN-XL generator of any stage."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        self.z_dim, self.c_dim, self.w_dim, self.num_ws = config.z_dim, config.c_dim, config.w_dim, config.num_ws
        self.img_resolution, self.img_channels = config.img_resolution, config.img_channels
        self.synthesis = SynthesisNetwork(config)
        self.mapping = MappingNetwork(config)

    def forward(self, z: torch.Tensor, c: torch.Tensor | None, truncation_psi: float = 1.0,
                truncation_cutoff: int | None = None, force_fp32: bool = False,
                low_dtype: torch.dtype | None = None) -> torch.Tensor:
        """z [N, z_dim], one-hot c [N, c_dim] -> images [N, 3, R, R], about [-1, 1]."""
        ws = self.mapping(z, c, truncation_psi, truncation_cutoff)
        images: torch.Tensor = self.synthesis(ws, force_fp32=force_fp32, low_dtype=low_dtype)
        return images

    def frozen_prefixes(self) -> tuple[str, ...]:
        """Prefixes of the tensors that a super-resolution stage keeps from its stem: the mapping with its embedding and
        the kept layers (Sauer et al. 2022, section 3.3). A stem has none."""
        kept = self.config.layers[: self.config.num_frozen_layers]
        return ("mapping.", *(f"synthesis.{spec.name}." for spec in kept)) if kept else ()

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """All parameters of a stem; of a super-resolution stage those of the input (`weight` and `affine`, as
        officially) and of the head."""
        frozen = self.frozen_prefixes()
        return [p for name, p in self.named_parameters() if not name.startswith(frozen)]

    def moving_buffers(self) -> list[torch.Tensor]:
        """The buffers that training changes: the mean of w, in super-resolution stages too. (`magnitude_ema` moves only
        where a caller of the synthesis asks for it, and training does not ask.)"""
        return [self.mapping.w_avg]
