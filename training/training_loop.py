# SPDX-License-Identifier: Apache-2.0
"""The training loop: StyleGAN-XL's algorithm with SAN heads (Sauer et al. 2022; Takida et al. 2024)."""
import torch

from torch_utils import misc
from torch_utils.training_stats import Collector
from training.run.autotuning import autotunes
from training.run.plan import RunPlan
from training.run.start import start_trainer
from training.run.stopping import NOTHING, StopRequests, stage_end
from training.run.training_data import TrainingData
from training.watch.beginning import Beginning
from training.watch.reporting import Reporter
from training.watch.ticks import Evaluator, Ticks


@misc.full_precision()
@misc.autotuning(False)                     # Until the first iteration; see there.
def training_loop(plan: RunPlan, device: torch.device, stop: StopRequests, evaluate: Evaluator | None = None) -> int:
    """Train to the end of the stage, or until asked to stop.

    Continues from the training state in the run's folder, if there is one. Every random number is a function of the
    seed and of the number of images shown, so continuing gives what an unbroken run gives.

    Args:
        plan: Settings, data, where the weights come from, and the folder for the results, which exists.
        device: Where this process computes.
        stop: Notices signals and other requests to stop.
        evaluate: Metrics of G_ema, taken at snapshots.

    Returns:
        The exit code: 0 at the end of the stage, 3 when asked to stop and to be started again, 4 when gradients stopped
        being finite, 5 after a verdict of collapse with --on-collapse=stop.
    """
    stop.folder = plan.folder
    collector, report = Collector(), Reporter(plan.folder, plan.config)
    beginning = Beginning(report.say, device)
    trainer = start_trainer(plan, device, collector.report, report.say, beginning.step)
    data = TrainingData(trainer, plan.dataset, stop.is_asked)
    batches = data.batches()
    ticks = Ticks(plan, trainer, batches, report, collector, beginning, evaluate)

    end, request, failed = ticks.begin(), NOTHING, None
    torch.backends.cudnn.benchmark = autotunes(plan.config, trainer.progress.cur_nimg, device)
    if end is None:
        beginning.train(torch.backends.cudnn.benchmark)
    while end is None and request.restart is None:
        ticks.save_state_if_due()
        trainer.step(batches, ticks.phase)
        failed = trainer.failed_phase()
        if failed is not None:      # Nothing is saved from here on: what is in the folder is better.
            break
        tick_is_over = ticks.are_due()
        request = stop.poll()       # A state may be of any iteration: the next start goes on there.
        end = stage_end(plan.config, trainer.progress) or request.finish
        if tick_is_over or end is not None or request.restart is not None:
            failed = ticks.broken_phase()
            if failed is not None:
                break
        if tick_is_over or end is not None:
            end = ticks.tick(end, request)
    if failed is None and request.restart is None:
        stop.remove_file()
    return ticks.finish(end, request, failed, data)
