# SPDX-License-Identifier: Apache-2.0
"""What a video shows: from keyframes to the ws and transforms of every picture in every frame."""
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from inference.frames import View, make_transform
from inference.keyframes import KeyframePath, Timing
from inference.sampling import class_means, map_latents, seed_latent
from torch_utils.misc import evaluating, full_precision, to_device
from training.generator.synthesis import UNMOVED, Offset, combined, nearest_centroids
from training.networks_stylegan3 import Generator

#----------------------------------------------------------------------------
# Keyframes.

@dataclasses.dataclass(frozen=True)
class Keyframes:
    """Latents at K keyframes of S sequences, before truncation. A sequence is what one place of the frame shows."""

    ws: torch.Tensor            # [K, S, L, w_dim]; L is 1 where all layers have the same w, otherwise num_ws.
    centers: torch.Tensor       # [K, S, 1, w_dim]: where truncation pulls.
    z: torch.Tensor             # [K, S, z_dim]
    classes: torch.Tensor       # int64 [K, S]


def make_keyframes(G: Generator, sources: Sequence[int | torch.Tensor], labels: Sequence[int], num_sequences: int,
                   centroids: torch.Tensor | None = None) -> Keyframes:
    """Keyframes of seeds and of given latents.

    Args:
        sources: Seeds, or ws [num_ws, w_dim]: those of the first sequence, then those of the second one and so on.
            Given ws have no z, so that what lies between two z cannot be asked for.
        labels: The class of each; 0 where the network is unconditional.
        num_sequences: S.
        centroids: [K, w_dim]; truncation pulls every w towards the nearest of them instead of the class's mean.
    """
    def in_sequences(x: torch.Tensor) -> torch.Tensor:      # [N, ...] -> [K, S, ...]
        return x.reshape(num_sequences, -1, *x.shape[1:]).transpose(0, 1)

    classes = torch.tensor(labels, dtype=torch.int64)
    z = torch.stack([torch.ones(G.z_dim) if isinstance(source, torch.Tensor) else seed_latent(source, G.z_dim)
                     for source in sources])
    ws = map_latents(G, z, classes).unsqueeze(1)
    given = [i for i, source in enumerate(sources) if isinstance(source, torch.Tensor)]
    if given:
        ws = ws.repeat(1, G.num_ws, 1)
        ws[given] = torch.stack([source for source in sources if isinstance(source, torch.Tensor)])
    centers = class_means(G, classes) if centroids is None else nearest_centroids(ws.mean(dim=1), centroids)
    return Keyframes(in_sequences(ws), in_sequences(centers.unsqueeze(1)), in_sequences(z), in_sequences(classes))

#----------------------------------------------------------------------------
# Motion.

@dataclasses.dataclass(frozen=True)
class Sweep:
    """What changes over the whole video, beside what lies between the keyframes. In a loop it ends as it began."""

    psi: tuple[float, float] = (1.0, 1.0)           # Truncation at the beginning and at the farthest point.
    translate: tuple[float, float] = (0.0, 0.0)     # Shift at the farthest point, in image widths.
    rotate: float = 0.0                             # Degrees. Whole turns go on in one direction, others go back.
    edits: tuple[Offset, Offset] = (UNMOVED, UNMOVED)   # Added after truncation, as `psi`; of the same directions.

    def psi_at(self, timing: Timing, frame: int) -> float:
        """Truncation of a frame."""
        first, last = self.psi
        return first if first == last else first + (last - first) * timing.there_and_back(frame)

    def edit_at(self, timing: Timing, frame: int) -> Offset:
        """What is added to the pictures of a frame after truncation."""
        first, last = self.edits
        far = timing.there_and_back(frame)
        return combined([(1 - far, first), (far, last)])

    def transform_at(self, timing: Timing, frame: int) -> torch.Tensor:
        """Where the pictures of a frame lie: [3, 3], as the synthesis input wants it."""
        far = timing.there_and_back(frame)
        turned = timing.progress(frame) if self.rotate % 360 == 0 else far
        return make_transform((self.translate[0] * far, self.translate[1] * far), self.rotate * turned)


class Motion:
    """The pictures of a video, by frames.

    Args:
        G: The generator.
        keyframes: Latents.
        timing: Of the frames.
        sweep: What else changes.
        between_z: Interpolate z and the vectors of the classes, and map what comes out; otherwise w is interpolated.
    """

    def __init__(self, G: Generator, keyframes: Keyframes, timing: Timing, sweep: Sweep, between_z: bool = False):
        self.G, self.timing, self.sweep = G, timing, sweep

        def path(x: torch.Tensor) -> KeyframePath:
            return KeyframePath(x.cpu().numpy(), timing.loop)

        self.centers = path(keyframes.centers)
        self.ws = None if between_z else path(keyframes.ws)
        self.z = path(keyframes.z) if between_z else None
        self.vectors = None
        if between_z and G.c_dim > 0:
            self.vectors = path(G.mapping.embed.weight.detach().cpu()[keyframes.classes])

    def frame_ws(self, frame: int) -> torch.Tensor:
        """ws of all sequences in a frame: float32 [S, num_ws, w_dim], on the CPU."""
        position = self.timing.position(frame)
        ws = self._mapped(position) if self.ws is None else self.ws(position)
        psi = self.sweep.psi_at(self.timing, frame)
        if psi != 1:
            center = self.centers(position)
            ws = center + psi * (ws - center)
        shown = torch.from_numpy(ws).float().expand(-1, self.G.num_ws, -1)
        return self.sweep.edit_at(self.timing, frame).moved(shown)

    @torch.no_grad()
    def _mapped(self, position: float) -> np.ndarray:
        """w [S, 1, w_dim] of the z and the class vectors at a position."""
        assert self.z is not None           # It is there where ws is not.
        device = next(self.G.parameters()).device

        def at(path: KeyframePath) -> torch.Tensor:
            return to_device(torch.from_numpy(path(position)).float(), device)      # Not every device has float64.

        vectors = None if self.vectors is None else at(self.vectors)
        with evaluating(self.G), full_precision():
            return self.G.mapping.map(at(self.z), vectors).unsqueeze(1).cpu().double().numpy()

    def views(self) -> Iterator[View]:
        """The pictures of each frame."""
        for frame in range(self.timing.num_frames):
            ws = self.frame_ws(frame)
            styles = self.sweep.edit_at(self.timing, frame).styles
            yield View(ws, self.sweep.transform_at(self.timing, frame).expand(len(ws), -1, -1),
                       None if styles is None else styles.expand(len(ws), -1))

#----------------------------------------------------------------------------

def style_mixed(views: Iterator[View], columns: int, layers: Sequence[int]) -> Iterator[View]:
    """From views of W + H sources to those of a grid of all their mixtures.

    The first row shows the W sources of the columns, then each row begins with its own source, followed by this source
    with some layers of each column's. The place at the top left has no picture.

    Args:
        views: The sources of the columns, then those of the rows.
        columns: W.
        layers: Those that come from the columns, as indices of ws.
    """
    chosen = list(layers)
    for ws, transforms, styles in views:
        tops, sides = ws[:columns], ws[columns:]
        mixed = sides.unsqueeze(1).repeat(1, columns, 1, 1)         # [H, W, num_ws, w_dim]
        mixed[:, :, chosen] = tops[:, chosen]
        rows = torch.cat([sides.unsqueeze(1), mixed], dim=1).flatten(0, 1)
        cells = torch.cat([tops, rows])
        yield View(cells, transforms[:1].expand(len(cells), -1, -1),
                   None if styles is None else styles[:1].expand(len(cells), -1))
