# SPDX-License-Identifier: Apache-2.0
"""What a layer of the synthesis network puts out, and its spectrum."""
import numpy as np
import torch

from torch_utils.images import to_uint8_nearest
from torch_utils.ops.modulated_conv2d import fit_channels
from training.generator.synthesis import synthesize_ws
from training.networks_stylegan3 import Generator, SynthesisInput, SynthesisLayer

INPUT = "input"
DEPTH = 100.0               # Decibels below the highest value that a picture of a spectrum shows.
WINDOW_BETA = 8.0           # Of a Kaiser window: what leaks to other frequencies lies below -58 dB.

#----------------------------------------------------------------------------

def layer_names(G: Generator) -> list[str]:
    """The layers in the order of ws: number k is moved by ws[:, k]."""
    return [INPUT, *G.synthesis.layer_names]


def num_channels(G: Generator, name: str) -> int:
    """Channels of what a layer puts out."""
    layer = G.synthesis.get_submodule(name)
    assert isinstance(layer, SynthesisInput | SynthesisLayer)
    return layer.spec.channels if isinstance(layer, SynthesisInput) else layer.spec.out_channels


def synthesize_with_maps(G: Generator, ws: torch.Tensor, transform: torch.Tensor, name: str | None,
                         precision: str = "auto",
                         styles: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The image [3, R, R], about [-1, 1], of ws [1, num_ws, w_dim], and what a layer puts out on the way.

    Args:
        G: The generator.
        ws: Of one picture.
        transform: [1, 3, 3], where it lies.
        name: The layer, one of `layer_names`; None: no layer.
        precision: A key of `PRECISIONS`.
        styles: Added to the styles; None: nothing.

    Returns:
        The image, and float32 [C, H, W] on the CPU, or None without a layer.
    """
    if name is None:
        return synthesize_ws(G, ws, precision, transform, styles)[0], None
    kept: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        kept.append(output)
    handle = G.synthesis.get_submodule(name).register_forward_hook(keep)
    try:
        image = synthesize_ws(G, ws, precision, transform, styles)[0]
    finally:
        handle.remove()
    return image, fit_channels(kept[0], num_channels(G, name))[0].float().cpu()

#----------------------------------------------------------------------------

def power_spectrum(maps: torch.Tensor) -> torch.Tensor:
    """The share of the power of each map [C, H, W] at each frequency, float64 [C, H, W]; frequency 0 in the middle.

    The mean is left out, which would outshine all else. A window takes away the jump from one edge to the other, which
    the Fourier transform sees in a map that does not repeat itself. Of a map without content the share is 0 everywhere.
    """
    x = maps.double()
    height, width = x.shape[1:]
    window = torch.from_numpy(np.outer(np.kaiser(height, WINDOW_BETA), np.kaiser(width, WINDOW_BETA)))
    mean = (x * window).sum(dim=(1, 2), keepdim=True) / window.sum()
    power = torch.fft.fft2((x - mean) * window).abs().square()
    total = power.sum(dim=(1, 2), keepdim=True)
    shares: torch.Tensor = torch.fft.fftshift(power / total.clamp(min=torch.finfo(torch.float64).tiny), dim=(1, 2))
    return shares


def spectrum_picture(spectrum: torch.Tensor) -> np.ndarray:
    """Power [H, W] as uint8 [H, W]: white is the highest value, black what is DEPTH decibels below it, or less."""
    highest = spectrum.max().clamp(min=torch.finfo(torch.float64).tiny)
    decibels = 10 * torch.log10((spectrum / highest).clamp(min=10 ** (-DEPTH / 10)))
    return to_uint8_nearest(decibels / (DEPTH / 2) + 1).numpy()


def map_picture(values: torch.Tensor) -> np.ndarray:
    """One map [H, W] as uint8 [H, W]: grey is 0, white and black are the value farthest from it and its negative."""
    farthest = values.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return to_uint8_nearest(values / farthest).numpy()
