# SPDX-License-Identifier: Apache-2.0
"""The definitions of the operations, step by step, with arguments that are parsed and checked."""
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from torch_utils.ops.arguments import split_gain

#----------------------------------------------------------------------------
# Bias and activation.

@dataclasses.dataclass(frozen=True)
class Activation:
    """A nonlinearity and the settings that it takes when the caller gives none."""

    func: Callable[[torch.Tensor, float], torch.Tensor]     # (x, alpha) -> activated x.
    def_alpha: float = 0.0                                  # Slope of the negative part, where there is one.
    def_gain: float = 1.0                                   # Keeps the variance of a normal input about the same.


activation_funcs: dict[str, Activation] = {
    "linear":   Activation(lambda x, alpha: x),
    "relu":     Activation(lambda x, alpha: F.relu(x), def_gain=math.sqrt(2)),
    "lrelu":    Activation(lambda x, alpha: F.leaky_relu(x, alpha), def_alpha=0.2, def_gain=math.sqrt(2)),
    "tanh":     Activation(lambda x, alpha: torch.tanh(x)),
    "sigmoid":  Activation(lambda x, alpha: torch.sigmoid(x)),
    "elu":      Activation(lambda x, alpha: F.elu(x)),
    "selu":     Activation(lambda x, alpha: F.selu(x)),
    "softplus": Activation(lambda x, alpha: F.softplus(x)),
    "swish":    Activation(lambda x, alpha: torch.sigmoid(x) * x, def_gain=math.sqrt(2)),
}


def bias_act_ref(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float = 0.0,
    gain: float = 1.0,
    clamp: float | None = None,
) -> torch.Tensor:
    """Args as in `bias_act.bias_act`."""
    if b is not None:
        x = x + b.to(x.dtype).reshape([-1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
    x = activation_funcs[act].func(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x

#----------------------------------------------------------------------------
# Resampling.

def upfirdn2d_ref(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: tuple[int, int],
    down: tuple[int, int],
    padding: tuple[int, int, int, int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    """Insert zeros, pad or crop, filter with depthwise convolutions that compute every down-th output only.

    Args as in `upfirdn2d.upfirdn2d`, parsed: x [N, C, H, W], rates (x, y), padding (x0, x1, y0, y1).
    """
    n, c, h, w = x.shape
    # Zeros after every sample: pad two axes of size one that stand behind H and W.
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up[0] - 1, 0, 0, 0, up[1] - 1])
    x = x.reshape(n, c, h * up[1], w * up[0])
    x = pad_or_crop(x, padding)
    f = torch.ones([1, 1]) if f is None else f
    f = f.to(dtype=x.dtype, device=x.device)
    if not flip_filter:
        f = f.flip(list(range(f.ndim)))     # PyTorch's convolutions do not flip.
    if f.ndim == 1:
        gain_x, gain_y = split_gain(gain)
        x = depthwise(x, gain_x * f[None, :], (down[0], 1))
        return depthwise(x, gain_y * f[:, None], (1, down[1]))
    return depthwise(x, gain * f, down)


def pad_or_crop(x: torch.Tensor, padding: tuple[int, int, int, int]) -> torch.Tensor:
    """Pad x [N, C, H, W] with zeros by (x0, x1, y0, y1), then crop where these are negative."""
    x = F.pad(x, [max(p, 0) for p in padding])
    x0, x1, y0, y1 = (max(-p, 0) for p in padding)
    return x[:, :, y0 : x.shape[2] - y1, x0 : x.shape[3] - x1]


def depthwise(x: torch.Tensor, f: torch.Tensor, down: tuple[int, int]) -> torch.Tensor:
    """Correlate every channel of x [N, C, H, W] with f [h, w] and keep every down-th (x, y) output."""
    c = x.shape[1]
    return F.conv2d(x, f.expand(c, 1, *f.shape), stride=(down[1], down[0]), groups=c)

#----------------------------------------------------------------------------
# Filtered leaky ReLU.

def filtered_lrelu_ref(
    x: torch.Tensor,
    fu: torch.Tensor | None,
    fd: torch.Tensor | None,
    b: torch.Tensor | None,
    up: int,
    down: int,
    padding: tuple[int, int, int, int],
    gain: float,
    slope: float,
    clamp: float | None,
    flip_filter: bool,
) -> torch.Tensor:
    """Args as in `filtered_lrelu.filtered_lrelu`; padding (x0, x1, y0, y1)."""
    x = bias_act_ref(x, b)
    x = upfirdn2d_ref(x, fu, (up, up), (1, 1), padding, flip_filter, float(up**2))
    x = bias_act_ref(x, act="lrelu", alpha=slope, gain=gain, clamp=clamp)
    return upfirdn2d_ref(x, fd, (1, 1), (down, down), (0, 0, 0, 0), flip_filter, 1.0)
