# SPDX-License-Identifier: Apache-2.0
"""The generator's convolutions, whose input channels are scaled per sample, in several forms.

The forms give equal numbers up to rounding and take the same arguments, so that one can stand for another. On a GPU
feature maps are channels last and have a multiple of 8 channels, which is what tensor cores take without a copy. The
recipes' layers have 861, 724, 609, 431 or 362 channels; the ones that are missing are zeros, at the end. They stay
exactly zero from layer to layer and add exactly nothing: a zero channel meets zero weights, and the nonlinearity of
zero and a bias of zero is zero. So a map is filled up once, at the network's input, and cut once, at its image.
"""
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from torch_utils.ops import tune, winograd

# The forms that may be faster on a GPU than the default. The others differ from `padded` in what tensor cores dislike,
# and to time them takes seconds per shape: an algorithm is chosen for each.
TIMED = ("padded", "per_sample", "products", "grouped")
CHANNEL_MULTIPLE = 8        # 16 bytes of half precision: what tensor cores load at a time.

#----------------------------------------------------------------------------

def modulated_conv2d(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
                     input_gain: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """Convolution whose input channels are scaled per sample (Karras et al. 2020, equations 1-3).

    Args:
        x: [N, I, H, W]. It may have further channels, which must be zero.
        weight: [O, I, k, k].
        styles: [N, I].
        demodulate: Give every output feature map unit expected variance.
        padding: Zeros on every side.
        input_gain: Scalar on the input, after demodulation was worked out.
        impl: A key of `FORMS`; 'auto' takes the first of `forms_for`, or the fastest of them on a device where
            forms are timed (`tune`).

    Returns:
        [N, O, H', W'], with further channels of zeros if the form makes them: see `padded_channels`.

    Raises:
        ValueError: `impl` is not known, or does not apply.
    """
    if impl != "auto" and impl not in FORMS:
        raise ValueError(f"impl={impl!r}: choose from auto, {', '.join(FORMS)}")
    possible = forms_for(x.device.type, x, weight, padding)
    if impl != "auto" and impl not in possible:
        raise ValueError(f"impl={impl!r}: a convolution of {list(x.shape)} with {list(weight.shape)} and "
                         f"padding={padding} has only the forms {', '.join(possible)}")
    form = FORMS[possible[0] if impl == "auto" else impl]
    if impl == "auto" and x.device.type in tune.KINDS:
        form = tune.fastest("modulated_conv2d", (x, weight, styles, input_gain),
                            {"demodulate": demodulate, "padding": padding},
                            lambda: {name: FORMS[name] for name in possible if name in (possible[0], *TIMED)},
                            lambda form, x, w, s, gain: form(x, w, s, demodulate, padding, gain), batched=(0, 2))
    return form(x, weight, styles, demodulate, padding, input_gain)


def forms_for(device_type: str, x: torch.Tensor, weight: torch.Tensor, padding: int) -> list[str]:
    """The forms that apply to a convolution, in the order in which such a device prefers them.

    The device is named apart from the tensors so that the choice of one can be asked for on another.
    """
    possible = ["shared", "channels_last", "padded", "grouped", "per_sample"]
    if weight.shape[2:] == (1, 1) and padding == 0:
        possible.append("products")
    if device_type == "cuda":
        first = "products" if "products" in possible and _maps_are_large(x, weight) else \
            "per_sample" if len(x) == 1 else "padded"
    elif device_type == "cpu" and x.dtype == torch.bfloat16:
        first = "channels_last"
    else:
        first = "shared"
    return [first, *(form for form in possible if form != first)]


def _maps_are_large(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a weight per sample is little beside the maps. Making one moves about 10 bytes per value, and the two
    passes over maps that it saves move 4 bytes per value each in half precision. Gradients take more of both."""
    return 4 * weight.shape[0] <= x.shape[2] * x.shape[3]

#----------------------------------------------------------------------------
# Channels.

def padded_channels(channels: int) -> int:
    """The number of channels that the forms which fill up give a map with that many."""
    return -(-channels // CHANNEL_MULTIPLE) * CHANNEL_MULTIPLE


def fit_channels(x: torch.Tensor, channels: int, dim: int = 1) -> torch.Tensor:
    """`x` with that many channels: zeros are added or, where there are too many, the last ones left out.

    Where nothing has to be done that is `x` itself: a view of all its channels would cost its gradient a copy.
    """
    missing = channels - x.shape[dim]
    if missing == 0:
        return x
    return x.narrow(dim, 0, channels) if missing < 0 else F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, missing])


def _fill_weight(weight: torch.Tensor, out_channels: int, in_channels: int) -> torch.Tensor:
    """Weights [O, I, k, k] with zeros up to these numbers of channels: one pass, or none."""
    missing = out_channels - weight.shape[0], in_channels - weight.shape[1]
    return weight if missing == (0, 0) else F.pad(weight, [0, 0, 0, 0, 0, missing[1], 0, missing[0]])

#----------------------------------------------------------------------------
# Factors.

def _factors(weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, input_gain: torch.Tensor,
             dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weights, factors of the inputs [N, I] and factors of the outputs [N, O] or None, for a product in `dtype`."""
    if not demodulate:
        return weight, styles * input_gain, None
    # Pre-normalisation keeps half precision in range; demodulation takes it out again. Where the range is no concern
    # the weights stay as they are and their norm goes to the outputs, which are fewer.
    power = weight.square().sum(dim=[2, 3])                                 # [O, I]
    norm = (power.sum(dim=1) / weight[0].numel()).rsqrt()                   # [O]
    styles = styles * styles.square().mean().rsqrt()
    energy = styles.square() @ power.t() * norm.square()
    demodulation = (energy + 1e-8).rsqrt()                                  # [N, O]
    if dtype == torch.float16:
        return weight * norm[:, None, None, None], styles * input_gain, demodulation
    return weight, styles * input_gain, demodulation * norm


def _weight_per_sample(weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, input_gain: torch.Tensor,
                       out_channels: int, in_channels: int) -> torch.Tensor:
    """[N, out_channels, in_channels, k, k] with all factors. Demodulated, it is in the range of any type."""
    weight, scale, demodulation = _factors(weight, styles, demodulate, input_gain, weight.dtype)
    factors = fit_channels(scale, in_channels)[:, None, :]
    if demodulation is not None:
        factors = fit_channels(demodulation, out_channels)[:, :, None] * factors
    # Filled up while there is one for all samples.
    return _fill_weight(weight, out_channels, in_channels) * factors[:, :, :, None, None]


def _scaled(x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Maps times a factor per sample and channel."""
    return x * factors.to(x.dtype)[:, :, None, None]

#----------------------------------------------------------------------------
# The convolution itself.

class _FixedWeightConv(torch.autograd.Function):
    """A convolution with a weight that is not trained. Nothing of the size of a map is kept for its gradient, while
    PyTorch's own keeps its input in any case."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.padding = padding
        return F.conv2d(x, weight, padding=padding)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, = ctx.saved_tensors
        return F.conv_transpose2d(grad, weight, padding=ctx.padding), None, None


def _conv2d(x: torch.Tensor, weight: torch.Tensor, padding: int) -> torch.Tensor:
    if torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad:
        y: torch.Tensor = _FixedWeightConv.apply(x, weight, padding)
        return y
    return F.conv2d(x, weight, padding=padding)

#----------------------------------------------------------------------------
# Forms. The weights stay shared over the batch where they can: inputs are scaled by the styles, outputs by the
# demodulation factors. Equal to a weight per sample up to rounding, and on processors several times faster.

def _shared(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
            input_gain: torch.Tensor) -> torch.Tensor:
    """In the layout of x, by tiles on processors where that is faster."""
    x = fit_channels(x, weight.shape[1])
    weight, scale, demodulation = _factors(weight, styles, demodulate, input_gain, x.dtype)
    y = winograd.conv2d(_scaled(x, scale), weight.to(x.dtype), padding)
    return y if demodulation is None else _scaled(y, demodulation)


def _channels_last(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
                   input_gain: torch.Tensor) -> torch.Tensor:
    """With the channels that there are."""
    return _convolve_channels_last(x, weight, styles, demodulate, padding, input_gain, *weight.shape[:2])


def _padded(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
            input_gain: torch.Tensor) -> torch.Tensor:
    """With channels filled up."""
    out_channels, in_channels = map(padded_channels, weight.shape[:2])
    return _convolve_channels_last(x, weight, styles, demodulate, padding, input_gain, out_channels, in_channels)


def _convolve_channels_last(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool,
                            padding: int, input_gain: torch.Tensor, out_channels: int,
                            in_channels: int) -> torch.Tensor:
    x = fit_channels(x, in_channels).contiguous(memory_format=torch.channels_last)
    weight, scale, demodulation = _factors(weight, styles, demodulate, input_gain, x.dtype)
    # One pass for type and layout, and a second one over what is then half as large where channels are added.
    weight = weight.to(x.dtype, memory_format=torch.channels_last)
    weight = _fill_weight(weight, out_channels, in_channels)
    y = _conv2d(_scaled(x, fit_channels(scale, in_channels)), weight, padding)
    return y if demodulation is None else _scaled(y, fit_channels(demodulation, out_channels))


def _per_sample(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
                input_gain: torch.Tensor) -> torch.Tensor:
    """A convolution per sample with a weight of its own, which saves the passes that scale maps, and costs one that
    puts the results together if there are several samples; channels last and filled up."""
    out_channels, in_channels = map(padded_channels, weight.shape[:2])
    weights = _weight_per_sample(weight, styles, demodulate, input_gain, out_channels, in_channels).flatten(0, 1)
    weights = weights.to(x.dtype, memory_format=torch.channels_last)
    x = fit_channels(x, in_channels).contiguous(memory_format=torch.channels_last)
    if len(x) == 1:
        return _conv2d(x, weights, padding)
    pairs = zip(x.split(1), weights.split(out_channels), strict=True)
    return torch.cat([_conv2d(part, w, padding) for part, w in pairs])


def _products(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
              input_gain: torch.Tensor) -> torch.Tensor:
    """1x1 kernels with a weight per sample, which saves the passes that scale maps; channels last and filled up."""
    out_channels, in_channels = map(padded_channels, weight.shape[:2])
    weights = _weight_per_sample(weight, styles, demodulate, input_gain, out_channels, in_channels)
    weights = weights.flatten(2).to(x.dtype)                                            # [N, O, I]
    x = fit_channels(x, in_channels).contiguous(memory_format=torch.channels_last)
    pixels = x.permute(0, 2, 3, 1).flatten(1, 2)                                        # [N, H*W, I], a view.
    y = torch.bmm(pixels, weights.transpose(1, 2))
    y = y.view(len(y), *x.shape[2:], out_channels)                                      # [N, H, W, O]
    return y.permute(0, 3, 1, 2)


def _grouped(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
             input_gain: torch.Tensor) -> torch.Tensor:
    """A weight per sample, and the samples as groups of one convolution, which works on contiguous maps; the result has
    the layout of x all the same, so that the form pays for what it needs."""
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    x = fit_channels(x, weight.shape[1])
    weights = _weight_per_sample(weight, styles, demodulate, input_gain, *weight.shape[:2]).flatten(0, 1)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), weights.to(x.dtype), padding=padding, groups=len(x))
    y = y.reshape(len(x), -1, *y.shape[2:])
    return y.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool, int, torch.Tensor], torch.Tensor]] = {
    "shared": _shared, "channels_last": _channels_last, "padded": _padded, "grouped": _grouped,
    "per_sample": _per_sample, "products": _products}
