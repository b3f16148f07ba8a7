# SPDX-License-Identifier: Apache-2.0
"""What happens beside the algorithm: once per tick status, health and diagnosis; now and then a snapshot, its metrics
and a report; training states in between."""
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from torch_utils import distributed, misc
from torch_utils.training_stats import Collector
from training.networks_stylegan3 import Generator
from training.run.batch_size import explained_memory_errors
from training.run.plan import RunPlan
from training.run.saving import Saver, pick_score, update_best
from training.run.snapshots import kimg_digits, snapshot_name
from training.run.stopping import EXIT_DONE, EXIT_RESTART, Request, stage_end
from training.run.training_data import TrainingData
from training.step.batches import BatchSource
from training.step.phases import Phase
from training.trainer import Trainer
from training.watch.beginning import Beginning
from training.watch.discriminator_diagnosis import training_diagnosis
from training.watch.health import EXIT_COLLAPSE, EXIT_NONFINITE, HealthCheck
from training.watch.nonfinite import broken_weights, explain_nonfinite, phase_of
from training.watch.reporting import Reporter, SampleSheets

Evaluator = Callable[[Generator], list[dict[str, Any]]]     # G_ema -> metric results; every process calls it.


class SnapshotTaker:
    """Takes snapshots of a run. Every process calls it; rank 0 writes.

    Args:
        plan, trainer, report, evaluate: As `Ticks` has them.
    """

    def __init__(self, plan: RunPlan, trainer: Trainer, report: Reporter, evaluate: Evaluator | None):
        config, dataset = plan.config, plan.dataset
        self.config, self.trainer, self.report, self.evaluate = config, trainer, report, evaluate
        self.saver = Saver(plan.folder, config, dataset.class_names, report.say)
        self.sheets = SampleSheets(plan.folder, dataset, trainer.G.c_dim, trainer.G.z_dim, config.seed)

    @misc.autotuning(False)
    def take(self) -> None:
        """Samples, metrics, network snapshot, best model, training state.

        A run that is killed while metrics are computed, which may take long, continues with them.
        """
        trainer, progress, captured = self.trainer, self.trainer.progress, None
        progress.snapshot_due = True
        sheet = f"fakes{kimg_digits(progress.cur_nimg)}"
        if distributed.rank() == 0:
            captured = self.saver.capture(trainer)
            if self.evaluate is not None:
                self.saver.write_state(captured)
            self.sheets.save_fakes(sheet, trainer.G_ema)
        score = None
        distributed.barrier()       # This may take long: collectives have a time limit, this has none.
        if self.evaluate is not None:
            results = self.evaluate(trainer.G_ema)
            self.report.metrics(results, progress.cur_nimg, snapshot_name(progress.cur_nimg))
            score = distributed.broadcast_object(pick_score(results, self.config.saving.best_metric))
            update_best(progress, score)
        else:
            progress.best_nimg = progress.cur_nimg      # Without metrics the newest model counts as the best.
        progress.snapshot_due = False
        if captured is not None:
            self.saver.save_snapshot(progress, captured, score)
            self.report.snapshot(sheet, progress.cur_nimg)
        distributed.barrier()


class Ticks:
    """What hangs on the training loop. Every process makes the same calls; rank 0 writes.

    Args:
        plan: The plan of the run.
        trainer: As `start_trainer` made it.
        batches: Where the trainer's batches come from.
        report: Where lines, curves and pictures go.
        collector: Gathers the trainer's statistics.
        beginning: Says what goes on until the first tick.
        evaluate: Metrics of G_ema, taken at snapshots; None without.
    """

    def __init__(self, plan: RunPlan, trainer: Trainer, batches: BatchSource, report: Reporter, collector: Collector,
                 beginning: Beginning, evaluate: Evaluator | None):
        config, dataset = plan.config, plan.dataset
        self.plan, self.config, self.trainer, self.batches = plan, config, trainer, batches
        self.report, self.collector, self.beginning = report, collector, beginning
        self.health = HealthCheck(config, dataset, trainer.guard)
        self.diagnose = training_diagnosis(dataset, config.diagnose, config.batch_gpu, config.seed)
        self.snapshots = SnapshotTaker(plan, trainer, report, evaluate)
        self.saver = self.snapshots.saver
        self._tick_nimg = max(int(config.kimg_per_tick * 1000), config.batch)
        self._collapsed = False
        self._broken: str | None = None     # A tensor that is not finite any more.
        self._elapsed_before, self._started = trainer.progress.elapsed, time.time()

    #------------------------------------------------------------------------
    # In the order in which the loop calls them.

    def begin(self) -> str | None:
        """Pictures of the data and, in a new run, the first snapshot: it shows, before weeks of training, that metrics
        and disk work. Why the stage is over already; None if it is not."""
        progress, config = self.trainer.progress, self.config
        self.report.continue_at(progress.cur_nimg)
        if distributed.rank() == 0 and progress.batch_idx == 0:
            self.snapshots.sheets.save_reals(self.plan.dataset)
        if progress.snapshot_due:
            with self.beginning.step(f"first snapshot (metrics: {', '.join(config.metrics) or 'none'})"):
                self.snapshots.take()
        self.report.say(f"training for {config.total_kimg:g} kimg")
        self._tick_began, self._maintenance, self._nimg_then = time.time(), 0.0, progress.cur_nimg
        return stage_end(config, progress)

    def save_state_if_due(self) -> None:
        """A training state, every --snap-state minutes."""
        if self.saver.state_is_due() and self.trainer.guard.is_clean():
            self.saver.save_state(self.trainer)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around a phase: says what ran out of memory, and how long its first run takes."""
        with explained_memory_errors(name, self.config, self.trainer.device), self.beginning.phase(name):
            yield

    def are_due(self) -> bool:
        """After an iteration: whether a tick is over."""
        progress = self.trainer.progress
        progress.elapsed = self._elapsed_before + time.time() - self._started
        left = progress.tick_start_nimg + self._tick_nimg - progress.cur_nimg
        self.beginning.iteration(self.batches.batch, left)
        return left <= 0

    def broken_phase(self) -> Phase | None:
        """Before something is saved: the phase of a network of which a weight, or a moment of its optimiser, is not
        finite any more. The run is over then."""
        self._broken = broken_weights(self.trainer)
        return None if self._broken is None else phase_of(self._broken, self.trainer.phases)

    def tick(self, end: str | None, request: Request) -> str | None:
        """Status and health, and a snapshot where one is due.

        Args:
            end: Why the stage is over; None if it is not.
            request: What all processes have agreed on.

        Returns:
            Why the stage is over now: as `end`, or because of a verdict or patience.
        """
        trainer, progress = self.trainer, self.trainer.progress
        self.beginning.tick()
        self.saver.check()
        progress.cur_tick += 1
        stats = self.collector.update()
        tick_ended = time.time()        # The device has done everything: the statistics have waited for it.
        numbers = self.health.numbers(trainer.G_ema)
        progress.snapshot_due |= end is not None or progress.cur_tick % max(self.config.snapshot_ticks, 1) == 0
        diagnosis = self.diagnosis() if self.config.diagnose and self._snapshot_now(end, request) else {}
        seconds = tick_ended - self._tick_began
        speed: dict[str, float | None] = {
            "tick": progress.cur_tick, "elapsed": progress.elapsed, "sec_per_tick": seconds,
            "sec_per_kimg": seconds / (progress.cur_nimg - self._nimg_then) * 1e3,
            "data_wait": self.batches.wait_seconds() / max(seconds, 1e-9),
            "maintenance": self._maintenance}
        self.report.tick(stats, progress.cur_nimg, int(self.config.total_kimg * 1000), speed | numbers, diagnosis)
        self._collapsed = self.health.judge(stats, numbers, progress.cur_nimg, progress.batch_idx, self.report.verdict)
        if self._collapsed:
            end = "stopped because of the verdict (--on-collapse=stop)"
        progress.tick_start_nimg = progress.cur_nimg
        progress.snapshot_due |= self._collapsed
        if self._snapshot_now(end, request):
            self.snapshots.take()
            end = end or stage_end(self.config, progress)
        self._nimg_then, self._tick_began = progress.cur_nimg, time.time()
        self._maintenance = self._tick_began - tick_ended
        return end

    def finish(self, end: str | None, request: Request, failed: Phase | None, data: TrainingData) -> int:
        """Write what is still to be written and close everything; returns the exit code.

        Args:
            end, request: As in `tick`.
            failed: A phase whose gradients or weights stopped being finite. Nothing is saved then.
            data: The run's training data.
        """
        trainer, report = self.trainer, self.report
        if failed is not None:
            nimg = trainer.progress.cur_nimg
            batch = next(iter(self.batches.micro_batches(failed, nimg)))
            report.say(explain_nonfinite(self.plan.folder, failed, batch, trainer.guard,
                                         {"G": trainer.G, "D": trainer.D}, nimg, self._broken))
        elif request.restart is not None:
            self.saver.save_state(trainer)
        data.close()
        self.saver.close()
        report.say(request.restart or end or "stopped")
        report.close()
        return (EXIT_NONFINITE if failed is not None else EXIT_COLLAPSE if self._collapsed
                else EXIT_RESTART if request.restart is not None else EXIT_DONE)

    def _snapshot_now(self, end: str | None, request: Request) -> bool:
        """Whether a snapshot that is due is taken at this tick.

        Asked to stop there may be no time for it: the next start does. After a non-finite step the next tick does.
        """
        return (self.trainer.progress.snapshot_due and request.restart is None
                and (end is not None or self.trainer.guard.is_clean()))

    def diagnosis(self) -> dict[str, float]:
        """What D's last layers know, on rank 0; the others wait. Never raises: numbers are not worth a run."""
        numbers: dict[str, float] = {}
        if distributed.rank() == 0:
            try:
                with misc.autotuning(False):
                    numbers = self.diagnose(self.trainer.G, self.trainer.D, self.trainer.loss.blur_sigma)
            except Exception as err:
                self.report.say(f"NOTE: no diagnosis of D at this snapshot: {type(err).__name__}: {err}")
        distributed.barrier()       # This may take long: collectives have a time limit, this has none.
        return numbers
