# SPDX-License-Identifier: Apache-2.0
"""Which forms of the operations a run uses: found out on its GPU before its first iteration, then fixed.

Forms differ in rounding, so all processes of a run take the same ones, and a run that is continued takes those that it
was started with (torch_utils/ops/tune.py).
"""
import time
from collections.abc import Callable
from pathlib import Path

import torch

from torch_utils import distributed, misc
from torch_utils.ops import tune
from training.config import TrainConfig
from training.networks_stylegan3 import PRECISIONS, Generator
from training.run.autotuning import autotunes
from training.run.batch_size import explained_memory_errors
from training.run.folder import add_run_info
from training.trainer import Trainer


def settle_forms(trainer: Trainer, folder: Path, resumed: bool, say: Callable[[str], None]) -> None:
    """Fix on all processes, until the run ends, which form each operation takes. Does nothing on processors.

    A new run times forms on rank 0, at the calls that its generator makes in an iteration. The choices are part of the
    state and of the run's record; what they do not know takes the default, in states without any everything.

    Raises:
        UserError: STYLESAN_TUNE has a wrong value.
    """
    config, device = trainer.config, trainer.device
    tune.is_on()
    if device.type not in tune.KINDS:
        return
    if not resumed:
        found: dict[str, str] = {}
        if distributed.rank() == 0:
            choices = tune.open_choices(device)
            tune.use(device, choices)
            say(choices.describe())
            if choices.store is not None:
                began = time.perf_counter()
                # cuDNN may choose algorithms here if it may in training, so that the times are those of training.
                algorithms = misc.autotuning(autotunes(config, trainer.progress.cur_nimg, device))
                with algorithms, explained_memory_errors("rehearsal", config, device):
                    rehearse(trainer.G, config)
                say(f"    {len(choices.values)} of this run in {time.perf_counter() - began:.1f} s")
            found = choices.values
        trainer.forms = distributed.broadcast_object(found)       # The others wait for it, however long it takes.
    tune.use(device, tune.Choices(trainer.forms, "as this run was started"))
    if resumed:
        say(f"{tune.describe(device)} ({len(trainer.forms)} choices)")
    if distributed.rank() == 0:
        add_run_info(folder, forms=trainer.forms)


def rehearse(G: Generator, config: TrainConfig) -> None:
    """Let G make every kind of call that it makes in an iteration; nothing of it remains.

    Parameters, averages and gradients stay as they are, and nothing is drawn from any generator of random numbers.
    """
    precision, parameters = PRECISIONS[config.precision], G.trainable_parameters()
    for size in {config.batch_gpu, path_length_samples(G, config)} - {0}:
        with misc.requires_grad(G, parameters):
            images = G(*_inputs(G, size), **precision)
            torch.autograd.grad(images.sum(), parameters, allow_unused=True)
    with torch.no_grad():
        G(*_inputs(G, config.batch_gpu), **precision)


def path_length_samples(G: Generator, config: TrainConfig) -> int:
    """Images of a micro-batch in the phase of path lengths; 0 without that phase."""
    if config.loss.pl_weight == 0 or G.config.num_frozen_layers > 0:
        return 0
    group = config.discriminator.ghost_batch or config.batch_gpu
    return max(group // config.loss.pl_batch_shrink, 1) * (config.batch_gpu // group)


def _inputs(G: Generator, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Any latents and labels."""
    device = next(G.parameters()).device
    z = torch.linspace(-2, 2, size * G.z_dim, device=device).reshape(size, G.z_dim)
    return z, misc.one_hot(torch.arange(size, device=device) % max(G.c_dim, 1), G.c_dim)
