# SPDX-License-Identifier: Apache-2.0
"""From the plan of a run to a trainer that stands where training goes on."""
import contextlib
import time
from collections.abc import Callable

import torch

from dnnlib.util import format_time
from torch_utils import distributed, misc
from torch_utils.ops import dispatch
from training.dataset import real_pair_distance
from training.generator.superres import stage_table
from training.run.forms import settle_forms
from training.run.init_from import start_from
from training.run.networks import make_classifier, make_networks
from training.run.plan import RunPlan
from training.run.preflight import check_disk, state_bytes
from training.run.resume import check_state, load_state, run_shape, saved_generator
from training.trainer import Trainer

Say = Callable[[str], None]
Step = Callable[[str], contextlib.AbstractContextManager[None]]     # Around a step of the start, which it names.


def start_trainer(plan: RunPlan, device: torch.device, report: Callable[[str, torch.Tensor], None], say: Say,
                  step: Step) -> Trainer:
    """The trainer of a run: continued from the state in its folder, or new, with the weights that the plan names.

    Every process calls this; all get the same networks.

    Raises:
        UserError: weights or states that cannot be read or do not fit; no room for states.
    """
    began, config, stem = time.time(), plan.config, plan.stem
    with step("preparing the operations (native code is compiled once per machine)"):
        operations = dispatch.describe(device)
    say(f"device {device}, {distributed.world_size()} process(es); {operations}; torch {torch.__version__}")
    with step("making the networks"):
        G, D = make_networks(config, plan.dataset, stem, device, say, saved_generator(plan.folder))
        classifier = make_classifier(config, plan.dataset.class_names, device)
    say(stage_table(G.config, stem.config if stem else None))
    trained = [sum(p.numel() for p in net.trainable_parameters()) for net in (G, D)]
    say(f"parameters: G {misc.count_parameters(G):,}, trained {trained[0]:,}; D trained {trained[1]:,}")
    say(f"augmentation: {', '.join(config.discriminator.diffaug) or 'none'}")
    trainer = Trainer(config, G, D, classifier, device, report, _real_distance(plan, say))
    if distributed.rank() == 0:
        check_disk(plan.folder, state_bytes([G, trainer.G_ema, D], trainer.phases))
    settle_forms(trainer, plan.folder, _take_weights(trainer, plan, say), say)
    trainer.progress.elapsed += time.time() - began
    return trainer


def _real_distance(plan: RunPlan, say: Say) -> float:
    """What the diversity term compares with: the same on all processes; 0 where there is no such term."""
    say("reading some real images ...")         # The health check and the sheet of real images follow.
    measured = plan.config.loss.diversity_weight > 0 and distributed.rank() == 0
    distance = real_pair_distance(plan.dataset, plan.config.seed) if measured else 0.0
    return float(distributed.broadcast_object(distance))


def _take_weights(trainer: Trainer, plan: RunPlan, say: Say) -> bool:
    """Continue from the newest state, or begin with the weights of another network. Whether there was a state."""
    state = load_state(plan.folder, say, run_shape(trainer))
    if state is not None:
        check_state(state, plan.folder, plan.config, trainer.D.backbone_info())
        trainer.load_state_dict(state)
        say(f"resuming at kimg {trainer.progress.cur_nimg / 1e3:.1f}, "
            f"after {format_time(trainer.progress.elapsed)} of training")
    elif plan.start is not None:
        say(start_from(trainer, plan.start, plan.dataset.class_names))
    return state is not None
