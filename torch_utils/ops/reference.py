# SPDX-License-Identifier: Apache-2.0
"""The definition of resampling, step by step."""
import torch
import torch.nn.functional as F

from torch_utils.ops.arguments import split_gain


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
