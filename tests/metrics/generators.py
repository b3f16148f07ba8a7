# SPDX-License-Identifier: Apache-2.0
"""Generators whose path length and equivariance are known, and small real ones."""
import math

import numpy as np
import torch

from inference.sampling import GeneratorSource


class Mapping(torch.nn.Module):
    """w = z, in one layer and in float64, so that small steps are exact; remembers the classes it was asked for."""

    def __init__(self):
        super().__init__()
        self.classes = []

    def forward(self, z, c):
        self.classes.append(c)
        return z.double().unsqueeze(1)


class LinearGenerator(torch.nn.Module):
    """Images are a linear map of w."""

    z_dim = 4

    def __init__(self, resolution=16, c_dim=0, seed=0):
        super().__init__()
        self.img_resolution, self.c_dim = resolution, c_dim
        self.mapping = Mapping()
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.randn(self.z_dim, 3 * resolution ** 2, generator=generator, dtype=torch.float64)
        self.matrix = torch.nn.Parameter(matrix)
        self.synthesis = lambda ws, force_fp32: (ws[:, 0] @ self.matrix).reshape(-1, 3, resolution, resolution)


class Waves(torch.nn.Module):
    """Draws a few plane waves where its input's transform says; `fault` is what it does to the transform.

    The second channel lags a quarter of a wave behind the first, the third is 0. With one wave, moving it by a phase d
    therefore costs 2 - 2 cos(d) in every pixel, whatever the phase is there.
    """

    z_dim = 2
    c_dim = 0

    def __init__(self, resolution=64, waves=1, frequency=5.0, fault=lambda m: m, seed=0):
        super().__init__()
        self.img_resolution, self.fault = resolution, fault
        self.mapping = Mapping()
        generator = torch.Generator().manual_seed(seed)
        angles = torch.rand(waves, generator=generator, dtype=torch.float64) * 2 * math.pi
        self.frequencies = torch.stack([angles.cos(), angles.sin()], dim=1) * frequency     # Per width.
        self.amplitude = 1 / waves
        self.synthesis = Synthesis(self)


class Synthesis(torch.nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.input = torch.nn.Module()
        self.input.register_buffer("transform", torch.eye(3))
        self.owner = [owner]                # Not as a child: it is its parent.

    def forward(self, ws, force_fp32):
        assert force_fp32
        G = self.owner[0]
        m = G.fault(self.input.transform.double().expand(len(ws), 3, 3))
        x = (torch.arange(G.img_resolution, dtype=torch.float64) + 0.5) / G.img_resolution - 0.5
        places = torch.stack(torch.meshgrid(x, x, indexing="xy"))
        places = torch.einsum("nab,bhw->nahw", m[:, :2, :2], places) + m[:, :2, 2, None, None]
        phase = torch.einsum("kb,nbhw->nkhw", G.frequencies, places) + ws[:, 0, :1, None, None]
        phase = torch.stack([phase, phase - 0.25], dim=1) * (2 * math.pi)                   # [N, 2, waves, H, W]
        images = phase.sin().sum(dim=2) * G.amplitude
        return torch.cat([images, torch.zeros_like(images[:, :1])], dim=1).float()


def stem(rotation, resolution=64, layers=8, seed=0, c_dim=0, channels=16):
    """An untrained generator of ours."""
    from training.generator.layer_schedule import stem_config
    from training.networks_stylegan3 import Generator
    torch.manual_seed(seed)
    config = stem_config(resolution, layers, 512, channels, z_dim=8, w_dim=16, c_dim=c_dim, embed_dim=8,
                         rotation=rotation)
    return Generator(config).eval().requires_grad_(False)


def source(G, num, seed=0, **settings):
    return GeneratorSource(G, num, seed, **{"label_policy": "balanced", **settings})


def tiny_distance(first, second):
    """Stands for LPIPS: quadratic, and as sensitive to rounding."""
    return (first - second).square().sum(dim=(1, 2, 3))


def phase_decibels(phase):
    """PSNR of `Waves` with one wave that is `phase` radians off: three channels, two of which differ."""
    return 10 * np.log10(4 / ((2 - 2 * np.cos(phase)) / 3))
