# SPDX-License-Identifier: Apache-2.0
"""Where metrics get images from: a protocol, and views of a source (a seeded subset, a mirrored copy).

Images travel as uint8 because that is what a viewer sees: rounding belongs to the source, not to the metric.
"""
import hashlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from dnnlib import UserError

Batch = tuple[torch.Tensor, torch.Tensor | None]    # uint8 [N, 3, H, W], int64 [N] or None
Chunk = tuple[np.ndarray, torch.Tensor, torch.Tensor | None]        # The same with the positions of the images

#----------------------------------------------------------------------------

class ImageSource(Protocol):
    """A numbered collection of images. Number i is the same image however often and in whatever batches it is read.

    A source may set `can_read_ahead = True` where another thread may run its iterators: it reads files and leaves
    networks alone. It may say in `label_values` which labels occur, None if there are none; names of the classes, where
    there are any, are `class_names` in its description. What a label means is decided by `dnnlib.classes`.
    """

    num_images: int
    fingerprint: str                # A hash of the content: equal for equal images, whatever the path.
    description: dict[str, Any]     # For the record: kind, path, resolution, labels (policy), seed, truncation_psi...

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All images in order, at most `batch_size` at a time."""
        ...


def label_values(source: ImageSource) -> np.ndarray | None:
    """Which labels occur, ascending; None where the source does not say, or has none."""
    values: np.ndarray | None = getattr(source, "label_values", None)
    return values


def says_it_has_no_labels(source: ImageSource) -> bool:
    """Whether it is known before its images are read that they come without labels."""
    return hasattr(source, "label_values") and label_values(source) is None


@runtime_checkable
class RandomAccessSource(Protocol):
    """What a source offers besides when it can skip images cheaply. Without it every process reads every image."""

    def batches_at(self, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
        """The images with these numbers, in this order. The numbers ascend."""
        ...


def read_rows(source: ImageSource, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
    """The images with ascending numbers `indices`, from any source, at most `batch_size` at a time."""
    if isinstance(source, RandomAccessSource):
        yield from source.batches_at(batch_size, indices)
        return
    wanted = np.zeros(source.num_images, dtype=bool)
    wanted[np.asarray(indices, dtype=np.int64)] = True
    start = 0
    for images, labels in source.batches(batch_size):
        keep = torch.from_numpy(np.flatnonzero(wanted[start : start + len(images)]))
        start += len(images)
        if len(keep):
            rows = keep.to(images.device)
            yield images[rows], None if labels is None else labels[keep.to(labels.device)]

#----------------------------------------------------------------------------

def chunks_of_rank(num: int, chunk_size: int, rank: int, world_size: int) -> list[np.ndarray]:
    """Positions 0..num-1 cut into runs of `chunk_size` (the last may be shorter) and dealt to the processes in turn.

    A chunk is the unit of work of a detector. Because its images depend on neither the batch size of the source nor
    the number of processes, neither do its features, to the last bit. No image is dealt twice.
    """
    starts = range(rank * chunk_size, num, world_size * chunk_size)
    return [np.arange(start, min(start + chunk_size, num)) for start in starts]


def read_chunks(source: ImageSource, batch_size: int, chunks: Sequence[np.ndarray],
                indices: np.ndarray | None = None) -> Generator[Chunk, None, None]:
    """Read a source in chunks of positions, regrouping its batches.

    Args:
        source: Where the images are.
        batch_size: Images per batch that the source is asked for.
        chunks: Ascending positions, chunk by chunk.
        indices: Image number of each position; None: position = number.

    Yields:
        (positions of the chunk, uint8 [N, 3, H, W], int64 [N] or None).
    """
    if not chunks:
        return
    positions = np.concatenate(chunks)
    rows = read_rows(source, batch_size, (positions if indices is None else indices[positions]).tolist())
    held: list[Batch] = []
    for chunk in chunks:
        while sum(len(images) for images, _ in held) < len(chunk):
            batch = next(rows, None)
            if batch is None:
                raise RuntimeError(f"source {source.description} ended before its {source.num_images} images")
            held.append(batch)
        images = torch.cat([images for images, _ in held])
        labels = None if any(x is None for _, x in held) else torch.cat([x for _, x in held if x is not None])
        n = len(chunk)
        yield chunk, images[:n], None if labels is None else labels[:n]
        held = [(images[n:], None if labels is None else labels[n:])] if len(images) > n else []

#----------------------------------------------------------------------------

def pinned(chunks: Iterator[Chunk]) -> Generator[Chunk, None, None]:
    """Chunks with their images in page-locked memory, from which copies to a GPU do not wait for its other work."""
    for positions, images, labels in chunks:
        yield positions, images.pin_memory() if images.device.type == "cpu" else images, labels

#----------------------------------------------------------------------------

class Subset:
    """The images of `source` with the given ascending numbers."""

    def __init__(self, source: ImageSource, indices: Sequence[int] | np.ndarray, note: dict[str, Any] | None = None):
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.num_images = len(self.indices)
        digest = hashlib.sha256(source.fingerprint.encode() + b"|subset|" + self.indices.tobytes())
        self.fingerprint = digest.hexdigest()
        self.description = {**source.description, "num_images": self.num_images, **(note or {})}
        self.can_read_ahead = getattr(source, "can_read_ahead", False)
        if hasattr(source, "label_values"):
            self.label_values = label_values(source)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self.batches_at(batch_size, range(self.num_images))

    def batches_at(self, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
        return read_rows(self.source, batch_size, self.indices[np.asarray(indices, dtype=np.int64)].tolist())


def seeded_indices(num_images: int, num: int, seed: int) -> np.ndarray:
    """`num` of the numbers 0..num_images-1, a uniform draw that depends on the seed alone, ascending."""
    draw = np.random.Generator(np.random.PCG64(seed)).permutation(num_images)[:num]
    return np.sort(draw)


def seeded_subset(source: ImageSource, num: int, seed: int, what: str = "the image source") -> ImageSource:
    """`source` cut to `num` images drawn with `seed`; the source itself when it has just as many.

    Raises:
        UserError: it has fewer.
    """
    if source.num_images < num:
        raise UserError(f"{what} has {source.num_images} images, the metric asks for {num}: "
                        f"supply more, or set --num={source.num_images}, which the result then says")
    if source.num_images == num:
        return source
    note = {"subset_of": source.num_images, "subset_seed": seed}
    return Subset(source, seeded_indices(source.num_images, num, seed), note)


class Mirrored:
    """A source followed by its left-right mirrored copy: twice as many images."""

    def __init__(self, source: ImageSource):
        self.source = source
        self.num_images = 2 * source.num_images
        self.fingerprint = hashlib.sha256(source.fingerprint.encode() + b"|mirrored").hexdigest()
        self.description = {**source.description, "num_images": self.num_images, "mirror": True}
        self.can_read_ahead = getattr(source, "can_read_ahead", False)
        if hasattr(source, "label_values"):
            self.label_values = label_values(source)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self.batches_at(batch_size, range(self.num_images))

    def batches_at(self, batch_size: int, indices: Sequence[int]) -> Iterator[Batch]:
        n = self.source.num_images
        plain = [i for i in indices if i < n]
        flipped = [i - n for i in indices if i >= n]
        if plain:
            yield from read_rows(self.source, batch_size, plain)
        if flipped:
            for images, labels in read_rows(self.source, batch_size, flipped):
                yield images.flip(3), labels
