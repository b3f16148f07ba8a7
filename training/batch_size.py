# SPDX-License-Identifier: Apache-2.0
"""How large a micro-batch may be: what memory holds (`--batch-gpu=auto`), what 32-bit indices reach, and what to say
when memory ran out all the same."""
import contextlib
import copy
import gc
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from dnnlib import UserError
from dnnlib.util import format_bytes
from torch_utils import distributed
from torch_utils.misc import one_hot
from training.classifier import load_classifier
from training.config import GeneratorConfig, TrainConfig
from training.diffaug import NUM_UNIFORMS
from training.discriminators.projected import ProjectedDiscriminator
from training.health import GradientGuard
from training.layer_schedule import MAX_ELEMENTS, map_sizes
from training.loss import MicroBatch, StyleSanLoss
from training.networks_stylegan3 import Generator
from training.phases import make_phases, run_phase

GPU_SHARE = 0.95            # Of a GPU's memory: data, statistics and fragments need the rest.
CPU_SHARE = 0.5             # Of the free memory of a machine.
CPU_COPIES = 3              # Values, gradients and temporary copies of every map: an estimate.
D_ELEMENTS = 96 * 2 / 4     # Of D's largest maps per input pixel: 96 channels at half the side, real and generated.

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
    sizes = _usable_sizes(config, world_size)
    return sizes[-1] if sizes else config.batch_gpu


def check_index_range(config: TrainConfig, world_size: int) -> None:
    """Refuse micro-batches with tensors that 32-bit indices do not reach.

    Raises:
        UserError: with the number, and the largest micro-batch that is allowed.
    """
    elements, where = largest_tensor(config.generator)
    if elements * config.batch_gpu < MAX_ELEMENTS:
        return
    allowed = _usable_sizes(config, world_size)
    remedy = f"take --batch-gpu={allowed[-1]} or less" if allowed else "no micro-batch of this --batch is small enough"
    raise UserError(f"--batch-gpu={config.batch_gpu}: {where} would have {elements * config.batch_gpu:,} elements, and "
                    f"32-bit indices reach {MAX_ELEMENTS - 1:,}: {remedy}")


def _usable_sizes(config: TrainConfig, world_size: int) -> list[int]:
    """Micro-batch sizes within the range of indices, ascending."""
    elements, _ = largest_tensor(config.generator)
    sizes = micro_batch_sizes(config.batch, world_size, even=config.loss.diversity_weight > 0)
    return [n for n in sizes if elements * n < MAX_ELEMENTS]

#----------------------------------------------------------------------------
# --batch-gpu=auto.

def find_batch_gpu(config: TrainConfig, device: torch.device) -> int:
    """The largest micro-batch that fits on every process. All processes call this.

    On a GPU every phase of training runs once per size that is tried. Elsewhere memory is estimated.

    Raises:
        UserError: not even the smallest fits.
    """
    sizes = _usable_sizes(config, distributed.world_size())
    if not sizes:
        raise UserError(f"--batch-gpu=auto: no micro-batch of --batch={config.batch} on {distributed.world_size()} "
                        f"process(es) stays within 32-bit indices: take another --batch")
    if device.type == "cuda":
        found = _find_on_gpu(config, device, sizes)
    else:
        per_image, free = cpu_bytes_per_image(config.generator), free_memory()
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        found = largest_fitting(sizes, lambda n: n == sizes[0] or n * per_image * local <= free * CPU_SHARE)
    everyones = distributed.all_gather_object(found)
    if None in everyones:
        raise UserError(f"--batch-gpu=auto: not even {sizes[0]} image(s) fit into the memory of rank "
                        f"{everyones.index(None)}: take smaller widths (--preset=small) or a larger device")
    return min(everyones)


def largest_fitting(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending sizes that fits, None if none does: the largest first, then by bisection."""
    if fits(sizes[-1]):
        return sizes[-1]
    low, high = -1, len(sizes) - 1          # sizes[low] fits, sizes[high] does not.
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


def cpu_bytes_per_image(config: GeneratorConfig) -> int:
    """An estimate of what a training step takes per image, without the networks themselves."""
    maps = sum(size for _, size in map_sizes(config)) + 8 * int(D_ELEMENTS * max(config.img_resolution, 224) ** 2)
    return maps * CPU_COPIES * 4


def free_memory() -> int:
    """Bytes that the machine has left, as far as it says."""
    try:
        with open("/proc/meminfo") as f:
            fields = dict(line.split(":") for line in f)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _find_on_gpu(config: TrainConfig, device: torch.device, sizes: Sequence[int]) -> int | None:
    """Try sizes on this process's GPU. Networks are gone afterwards."""
    D = distributed.node_first(lambda: ProjectedDiscriminator(config.discriminator))
    classifier = None
    if config.loss.cls_weight > 0 and config.generator.c_dim > 0 and not config.loss.cls_model.endswith(".safetensors"):
        classifier = distributed.node_first(lambda: load_classifier(config.loss.cls_model, config.generator.c_dim))
    trial = Trial(config, D, classifier, device)
    with distributed.alone():               # A process that runs out of memory must leave no other waiting.
        found = largest_fitting(sizes, trial.fits)
    del D, classifier, trial
    gc.collect()
    torch.cuda.empty_cache()
    return found


class Trial:
    """Networks and phases as training has them, for single steps on random data."""

    def __init__(self, config: TrainConfig, D: ProjectedDiscriminator, classifier: torch.nn.Module | None,
                 device: torch.device):
        self.config, self.device = config, device
        self.G = Generator(config.generator).train().requires_grad_(False).to(device)
        self.G_ema = copy.deepcopy(self.G)      # Takes its room.
        self.D = D.train().requires_grad_(False).to(device)
        self.D.make_fast_(config.feature_precision)
        loss = StyleSanLoss(self.G, self.D, config.loss, device, None if classifier is None else classifier.to(device),
                            precision=config.precision, real_distance=1.0)
        loss.set_progress(0)
        self.phases = make_phases(self.G, self.D, loss, config.optim)

    def fits(self, size: int) -> bool:
        """Whether every phase runs on this GPU with micro-batches of this size and leaves some memory free."""
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            self.run_phases(size)
        except torch.OutOfMemoryError:
            return False
        finally:
            gc.collect()
            taken = torch.cuda.max_memory_reserved(self.device)
            torch.cuda.empty_cache()
        return taken <= GPU_SHARE * torch.cuda.get_device_properties(self.device).total_memory

    def run_phases(self, size: int) -> None:
        """One step of each phase that training will have; path lengths count although they begin later."""
        for phase in self.phases:
            try:
                if phase.is_active(1 << 62):
                    run_phase(phase, [self._micro_batch(size)], size, GradientGuard(size))
            finally:
                phase.optimizer.zero_grad(set_to_none=True)

    def _micro_batch(self, size: int) -> MicroBatch:
        config, device = self.config.generator, self.device
        images = (size, config.img_channels, config.img_resolution, config.img_resolution)
        labels = one_hot(torch.arange(size, device=device) % max(config.c_dim, 1), config.c_dim)
        augment = None
        if self.config.discriminator.diffaug:
            augment = torch.rand([len(self.D.backbone_names), size, NUM_UNIFORMS], device=device)
        return MicroBatch(torch.randn([size, config.z_dim], device=device), labels, torch.rand(images, device=device),
                          labels, augment, augment, torch.randn(images, device=device))

#----------------------------------------------------------------------------
# Out of memory in training.

# What PyTorch's own class does not cover: the processor's allocator, libraries that found no room for their workspaces,
# and a kernel of ours that CUDA could not start for want of memory.
MEMORY_WORDS = ("DefaultCPUAllocator", "ALLOC_FAILED", "out of memory", "CUDA error 2;")


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says, in whatever words, that memory was too small."""
    return (isinstance(error, torch.OutOfMemoryError | MemoryError)
            or isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS))


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
        smaller = [n for n in micro_batch_sizes(config.batch, distributed.world_size(),
                                                even=config.loss.diversity_weight > 0) if n < config.batch_gpu]
        remedy = f"take --batch-gpu={smaller[-1]} or --batch-gpu=auto" if smaller else \
            "take smaller widths (--preset=small) or a larger device"
        raise UserError(f"out of memory in phase {phase} at {config.generator.img_resolution} pixels with "
                        f"--batch-gpu={config.batch_gpu} (peak {peak}): {remedy}; the same command then continues "
                        "this run") from err
