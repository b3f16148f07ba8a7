# SPDX-License-Identifier: Apache-2.0
"""How large a micro-batch may be, and is best: what memory holds and the GPU is fast with (`--batch-gpu=auto`), what
32-bit indices reach, and what to say when memory ran out all the same."""
import contextlib
import dataclasses
import functools
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from dnnlib import UserError
from dnnlib.util import format_bytes
from torch_utils import distributed, misc
from torch_utils.memory import free_memory
from torch_utils.misc import one_hot
from torch_utils.ops import tune
from training.config import GeneratorConfig, TrainConfig
from training.diffaug import NUM_UNIFORMS
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks.classifier import Classifier
from training.generator.layer_schedule import MAX_ELEMENTS, map_sizes
from training.networks_stylegan3 import Generator
from training.run.autotuning import autotunes
from training.run.networks import make_classifier
from training.step.micro_batch import MicroBatch
from training.step.phases import Phase
from training.trainer import Progress, Trainer

Result = TypeVar("Result")

GPU_SHARE = 0.95            # Share of a GPU's memory to use: data, statistics and fragments need the rest.
AS_FAST = 0.97              # A smaller size is taken that reaches this share of the fastest one's images per second.
MICRO_BATCHES, REPEATS = 3, 3   # A timed iteration has so many, another a single one; how often each is timed.
CPU_SHARE = 0.5             # Share of a machine's free memory to use.
UNKNOWN_MEMORY = 4 << 30    # Bytes that are counted on where the system does not say.
CPU_COPIES = 3              # Values, gradients and temporary copies of every map: an estimate.
D_ELEMENTS = 96 * 2 / 4     # In D's largest maps per input pixel: 96 channels at half the side, real and generated.

#----------------------------------------------------------------------------
# Sizes that follow from the settings alone.

def micro_batch_sizes(batch: int, world_size: int, even: bool = False) -> list[int]:
    """Micro-batches that a process's share of the batch can be cut into, ascending; `even` ones where pairs count."""
    share = batch // world_size
    return [n for n in range(1, share + 1) if share % n == 0 and not (even and n % 2)]


def largest_tensor(config: GeneratorConfig) -> tuple[int, str]:
    """Elements per image of the largest tensor in a training step, and where it is.

    D's maps are those of the official feature networks; the generated and the real image count together.
    """
    side = max(config.img_resolution, 224)
    maps = [*((size, f"layer {name}") for name, size in map_sizes(config)),
            (int(D_ELEMENTS * side ** 2), "the discriminator")]
    return max(maps)


def default_batch_gpu(config: TrainConfig, world_size: int) -> int:
    """The largest micro-batch that 32-bit indices reach: a process's whole share, for all but the largest images."""
    sizes = usable_sizes(config, world_size)
    return sizes[-1] if sizes else config.batch_gpu


def check_index_range(config: TrainConfig, world_size: int) -> None:
    """Refuse micro-batches with tensors that 32-bit indices do not reach.

    Raises:
        UserError: with the number, and the largest micro-batch that is allowed.
    """
    elements, where = largest_tensor(config.generator)
    if elements * config.batch_gpu < MAX_ELEMENTS:
        return
    allowed = usable_sizes(config, world_size)
    remedy = f"take --batch-gpu={allowed[-1]} or less" if allowed else "no micro-batch of this --batch is small enough"
    raise UserError(f"--batch-gpu={config.batch_gpu}: {where} would have {elements * config.batch_gpu:,} elements, and "
                    f"32-bit indices reach {MAX_ELEMENTS - 1:,}: {remedy}")


def usable_sizes(config: TrainConfig, world_size: int) -> list[int]:
    """Micro-batch sizes that a process's share can be cut into and 32-bit indices reach, ascending.

    Multiples of --ghost-batch, and even ones where pairs count.
    """
    elements, _ = largest_tensor(config.generator)
    sizes = micro_batch_sizes(config.batch, world_size, even=config.loss.diversity_weight > 0)
    return [n for n in sizes if elements * n < MAX_ELEMENTS and n % max(config.discriminator.ghost_batch, 1) == 0]

#----------------------------------------------------------------------------
# --batch-gpu=auto.

def find_batch_gpu(config: TrainConfig, device: torch.device, say: Callable[[str], None] = lambda text: None,
                   class_names: Sequence[str] = (), clock: Callable[[], float] = time.perf_counter) -> int:
    """The micro-batch to train with: the largest that fits on every process, or a smaller one that is as fast. All
    processes call this.

    On a GPU every phase of training runs with the sizes that are tried. Elsewhere memory is estimated.

    Args:
        config: Settings of the run; its micro-batch is not looked at.
        device: Where this process computes.
        say: Takes a line per size that is tried.
        class_names: Names of the data's classes: see `make_classifier`.
        clock: Seconds.

    Raises:
        UserError: not even the smallest fits.
    """
    sizes = usable_sizes(config, distributed.world_size())
    if not sizes:
        ghost = config.discriminator.ghost_batch
        raise UserError(f"--batch-gpu=auto: no micro-batch of --batch={config.batch} on {distributed.world_size()} "
                        "process(es) stays within 32-bit indices"
                        + (f" and is a multiple of --ghost-batch={ghost}" if ghost else "") + ": take another --batch")
    if device.type == "cuda":
        found = _find_on_gpu(config, device, sizes, say, class_names, clock)
    else:
        per_image, free = cpu_bytes_per_image(config.generator), free_memory()
        free = UNKNOWN_MEMORY if free is None else free
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        found = largest_fitting(sizes, lambda n: n == sizes[0] or n * per_image * local <= free * CPU_SHARE)
    everyones: list[int | None] = distributed.all_gather_object(found)
    if None in everyones:
        raise UserError(f"--batch-gpu=auto: not even {sizes[0]} image(s) fit into the memory of rank "
                        f"{everyones.index(None)}: take smaller widths (--preset=small) or a larger device")
    return min(size for size in everyones if size is not None)


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending sizes that fits, None if none does: the largest first, then by bisection."""
    if fits(sizes[-1]):
        return sizes[-1]
    low, high = -1, len(sizes) - 1          # sizes[low] fits, sizes[high] does not.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


def smallest_as_fast(sizes: Sequence[int], rate: Callable[[int], float]) -> int:
    """The smallest of ascending sizes that is as fast as the fastest, but for a few per cent.

    From the largest down, as far as speed does not suffer: small micro-batches take time to measure, and lose.

    Args:
        sizes: That fit.
        rate: Images per second.
    """
    rates: dict[int, float] = {}
    for size in reversed(sizes):
        rates[size] = rate(size)
        if rates[size] < AS_FAST * max(rates.values()):
            break
    return min(size for size in rates if rates[size] >= AS_FAST * max(rates.values()))


def cpu_bytes_per_image(config: GeneratorConfig) -> int:
    """An estimate of what a training step takes per image, without the networks themselves."""
    maps = sum(size for _, size in map_sizes(config)) + 8 * int(D_ELEMENTS * max(config.img_resolution, 224) ** 2)
    return maps * CPU_COPIES * 4


@misc.full_precision()
def _find_on_gpu(config: TrainConfig, device: torch.device, sizes: Sequence[int], say: Callable[[str], None],
                 class_names: Sequence[str], clock: Callable[[], float]) -> int | None:
    """Try sizes on this process's GPU. Networks are gone afterwards."""
    tune.use(device, None)      # The forms that a stage before this one was trained with were chosen for its shapes.
    D = distributed.node_first(lambda: ProjectedDiscriminator(config.discriminator))
    classifier = make_classifier(config, class_names, device)
    share, memory = config.batch // distributed.world_size(), GpuMemory(device)
    trial = unless_out_of_memory(functools.partial(Trial, config, D, classifier, device, memory, clock))
    # A process that runs out of memory must leave no other waiting.
    with distributed.alone(), misc.autotuning(autotunes(config, 0, device)):
        found = None if trial is None else search(trial, sizes, share, say)
    del D, classifier, trial
    memory.release()            # And the peak that ticks report is training's.
    return found


def search(trial: "Trial", sizes: Sequence[int], share: int, say: Callable[[str], None]) -> int | None:
    """The micro-batch among ascending sizes by trials on this process; None if none fits."""
    def fits(size: int) -> bool:
        fitting = trial.fits(size)
        say(f"--batch-gpu=auto: {size} image(s) {'fit' if fitting else 'do not fit'} into memory")
        return fitting

    def rate(size: int) -> float:
        images_per_second = trial.images_per_second(size, share)
        say(f"--batch-gpu=auto: {size} image(s) at a time: {images_per_second:.3g} images/s")
        return images_per_second

    # The smallest first: libraries make themselves at home while there is room, and if they cannot, nothing can.
    if not fits(sizes[0]):
        return None
    largest = sizes[0] if len(sizes) == 1 else largest_fitting(sizes[1:], fits) or sizes[0]
    return smallest_as_fast([size for size in sizes if size <= largest], rate)


class GpuMemory:
    """What a trial asks of a GPU's memory."""

    def __init__(self, device: torch.device):
        self.device = device

    def limit(self) -> int:
        """Bytes that this process may have: what it has and what is free, but for the share that stays so."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free + torch.cuda.memory_reserved(self.device) - (1 - GPU_SHARE) * total)

    def release(self) -> None:
        """Give back what is not in use, and measure the peak anew."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes that this process has had at most since."""
        return torch.cuda.max_memory_reserved(self.device)

    def wait(self) -> None:
        """Until the GPU has done everything."""
        torch.cuda.synchronize(self.device)


@dataclasses.dataclass(frozen=True)
class _Repeated:
    """The batches of a trial: one micro-batch, so many times."""

    micro_batch: MicroBatch
    count: int

    @property
    def batch(self) -> int:
        return len(self.micro_batch.z) * self.count

    def micro_batches(self, phase: Phase, cur_nimg: int) -> Iterator[MicroBatch]:
        return itertools.repeat(self.micro_batch, self.count)


class Trial:
    """A trainer as the run will have it, for single iterations on random data."""

    def __init__(self, config: TrainConfig, D: ProjectedDiscriminator, classifier: Classifier | None,
                 device: torch.device, memory: GpuMemory, clock: Callable[[], float] = time.perf_counter):
        self.config, self.device, self.memory, self.clock = config, device, memory, clock
        G = Generator(config.generator).train().requires_grad_(False).to(device)
        D = D.train().requires_grad_(False).to(device)
        D.optimize_frozen_(config.feature_precision)
        # At the first image the blur is widest; path lengths count, too, although they begin later.
        config = dataclasses.replace(config, loss=dataclasses.replace(config.loss, pl_start_kimg=0))
        self.trainer = Trainer(config, G, D, classifier, device, real_distance=1.0)

    def fits(self, size: int) -> bool:
        """Whether every phase runs on this GPU with micro-batches of this size and leaves some memory free."""
        self.memory.release()
        limit, peak = self.memory.limit(), self._unless_out_of_memory(lambda: self._peak(size))
        return peak is not None and peak <= limit

    def _peak(self, size: int) -> int:
        """Bytes that phases take."""
        self.iterate(size)          # Here algorithms are chosen, with as much memory as there is. Then it is given
        self.memory.release()       # back, and what an iteration takes is measured by another one.
        self.iterate(size)
        return self.memory.peak()

    def images_per_second(self, size: int, share: int) -> float:
        """With micro-batches of this size, of which `share` images make an iteration; 0 if memory runs out."""
        return self._unless_out_of_memory(lambda: share / max(self._iteration_seconds(size, share), 1e-9)) or 0.0

    def _iteration_seconds(self, size: int, share: int) -> float:
        """A step costs something once, and then every micro-batch the same."""
        self.iterate(size)
        one = self._seconds(size, 1)
        more = self._seconds(size, MICRO_BATCHES) if share > size else one
        return one + (share // size - 1) * max(more - one, 0) / (MICRO_BATCHES - 1)

    def _unless_out_of_memory(self, action: Callable[[], float]) -> float | None:
        """What it returns; None if memory ran out. Afterwards nothing is left of it."""
        found = unless_out_of_memory(action)
        self.trainer.forget_step()  # It may have stopped half-way, with samples of this size.
        self.memory.release()       # The error, which held what it interrupted, is gone.
        return found

    def _seconds(self, size: int, count: int) -> float:
        """Median of the phases that every iteration has, with so many micro-batches."""
        times = []
        for _ in range(REPEATS):
            self.memory.wait()
            began = self.clock()
            self.iterate(size, count, regularised=False)
            self.memory.wait()
            times.append(self.clock() - began)
        return statistics.median(times)

    def iterate(self, size: int, count: int = 1, regularised: bool = True) -> None:
        """One iteration, with every phase that training will ever have.

        Args:
            size: Images in a micro-batch.
            count: How many micro-batches.
            regularised: Whether phases take part that do not come in every iteration.
        """
        self.trainer.progress = Progress(batch_idx=0 if regularised else 1)
        self.trainer.step(_Repeated(self._micro_batch(size), count))

    def _micro_batch(self, size: int) -> MicroBatch:
        config, device = self.config.generator, self.device
        images = (size, config.img_channels, config.img_resolution, config.img_resolution)
        labels = one_hot(torch.arange(size, device=device) % max(config.c_dim, 1), config.c_dim)
        augment = None
        if self.config.discriminator.diffaug:
            augment = torch.rand([len(self.trainer.D.backbone_names), size, NUM_UNIFORMS], device=device)
        return MicroBatch(torch.randn([size, config.z_dim], device=device), labels, torch.rand(images, device=device),
                          labels, augment, augment, torch.randn(images, device=device))

#----------------------------------------------------------------------------
# Out of memory in training.

# What PyTorch's own class does not cover: the processor's allocator, libraries that found no room for their workspaces,
# and a kernel of ours that CUDA could not start for want of memory.
MEMORY_WORDS = ("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory", "unable to find an engine", "CUDA error 2;")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says, in whatever words, that memory was too small."""
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS))


def unless_out_of_memory(action: Callable[[], Result]) -> Result | None:
    """What it returns; None if memory ran out."""
    try:
        return action()
    except (MemoryError, RuntimeError) as err:
        if not is_out_of_memory(err):
            raise
        return None


@contextlib.contextmanager
def explained_memory_errors(phase: str, config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Say in one message what ran out of memory, and what to do.

    Raises:
        UserError: in place of the framework's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as err:
        if not is_out_of_memory(err):
            raise
        peak = "unknown"
        if device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            peak = f"{format_bytes(torch.cuda.max_memory_allocated(device))} of {format_bytes(total)}"
        smaller = [n for n in usable_sizes(config, distributed.world_size()) if n < config.batch_gpu]
        remedy = f"take --batch-gpu={smaller[-1]} or --batch-gpu=auto" if smaller else \
            "take smaller widths (--preset=small) or a larger device"
        raise UserError(f"out of memory in phase {phase} at {config.generator.img_resolution} pixels with "
                        f"--batch-gpu={config.batch_gpu} (peak {peak}): {remedy}; the same command then continues "
                        "this run") from err
