# SPDX-License-Identifier: Apache-2.0
"""The training loop: StyleGAN-XL's algorithm with SAN heads (Sauer et al. 2022; Takida et al. 2024)."""
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import format_time
from torch_utils import distributed, misc
from torch_utils.ops import dispatch
from torch_utils.training_stats import Collector
from training.config import TrainConfig
from training.data.randomness import CounterRNG
from training.dataset import EpochOrder, ImageDataset, TrainingStream, real_pair_distance
from training.discriminators.projected import ProjectedDiscriminator
from training.feature_networks.classifier import load_classifier
from training.generator.superres import stage_table
from training.loss import StyleSanLoss
from training.networks_stylegan3 import Generator
from training.run.autotuning import autotunes
from training.run.batch_size import explained_memory_errors
from training.run.forms import settle_forms
from training.run.init_from import start_from
from training.run.networks import make_networks
from training.run.preflight import check_disk, state_bytes
from training.run.resume import check_state, load_state
from training.run.saving import Saver, pick_score, update_best
from training.run.snapshots import TrainingState, generator_config, snapshot_name
from training.run.stopping import EXIT_DONE, EXIT_RESTART, NOTHING, Request, StopRequests
from training.step.batches import BatchSource
from training.step.ema import update_ema
from training.step.guard import GradientGuard
from training.step.phases import make_phases, run_phase
from training.watch.beginning import Beginning
from training.watch.health import EXIT_COLLAPSE, EXIT_NONFINITE, HealthCheck
from training.watch.nonfinite import explain_nonfinite
from training.watch.reporting import Reporter, SampleSheets

Evaluator = Callable[[Generator], list[dict[str, Any]]]     # G_ema -> metric results; every process calls it.
# (G, D, blur sigma) -> numbers by the names of their curves. Only rank 0 calls it; it must leave both as they are.
Diagnosis = Callable[[Generator, ProjectedDiscriminator, float], dict[str, float]]

#----------------------------------------------------------------------------

@misc.full_precision()
@misc.autotuning(False)                     # Until the first iteration; see there.
def training_loop(
    config: TrainConfig,                    # Every setting.
    folder: Path,                           # Where results go; exists.
    device: torch.device,                   # Of this process.
    dataset: ImageDataset,                  # Real images.
    stem: dict[str, Any] | None = None,     # Snapshot that a super-resolution stage is grown on.
    start: dict[str, Any] | None = None,    # Snapshot whose weights a new run begins with.
    evaluate: Evaluator | None = None,      # Metrics of G_ema, run at snapshots.
    stop: StopRequests | None = None,       # Notices signals and other requests to stop.
    diagnose: Diagnosis | None = None,      # Of D against G, at the ticks that end with a snapshot.
) -> int:
    """Train to the end of the stage and return EXIT_DONE, or EXIT_RESTART when asked to stop and be started again.

    Continues from the training state in `folder`, if there is one. Every random number is a function of the seed and of
    the number of images shown, so continuing gives what an unbroken run gives.
    """
    start_time = time.time()
    stop = stop or StopRequests(config.restart_every)
    stop.folder = folder
    rank, world_size = distributed.rank(), distributed.world_size()
    report = Reporter(folder, config)
    beginning = Beginning(report.say, device)
    with beginning.step("preparing the operations (native code is compiled once per machine)"):
        operations = dispatch.describe(device)
    report.say(f"device {device}, {world_size} process(es); {operations}; torch {torch.__version__}")

    # Networks.
    with beginning.step("making the networks"):
        saved = load_state(folder, report.say)
        resumed = saved is not None
        G, D = make_networks(config, dataset, stem, device, report.say, saved)
        if saved is not None:
            check_state(saved, folder, config, D.backbone_info())
        G_ema = copy.deepcopy(G).eval()
        classifier = None
        if config.loss.cls_weight > 0 and stem is not None and G.c_dim > 0:
            names = dataset.class_names if config.loss.cls_model.endswith(".safetensors") else None
            classifier = distributed.node_first(
                lambda: load_classifier(config.loss.cls_model, G.c_dim, names)).to(device)
            classifier.make_fast_(config.feature_precision)
    report.say(stage_table(G.config, generator_config(stem) if stem else None))
    trained = [sum(p.numel() for p in net.trainable_parameters()) for net in (G, D)]
    report.say(f"parameters: G {misc.count_parameters(G):,}, trained {trained[0]:,}; D trained {trained[1]:,}")
    report.say(f"augmentation: {', '.join(config.discriminator.diffaug) or 'none'}")

    # Losses, optimisers, state.
    collector = Collector()
    diverse = config.loss.diversity_weight > 0
    report.say("reading some real images ...")      # For the diversity term, the health check and reals.png.
    distance = distributed.broadcast_object(
        real_pair_distance(dataset, config.seed) if diverse and rank == 0 else 0.0)
    loss = StyleSanLoss(G, D, config.loss, device, classifier, collector.report, config.precision, distance)
    phases = make_phases(G, D, loss, config.optim)
    state = TrainingState(G, G_ema, D, loss, phases)
    if rank == 0:
        check_disk(folder, state_bytes([G, G_ema, D], phases))
    guard = GradientGuard(config.batch, collector.report)
    health = HealthCheck(config, dataset, device, guard)
    if saved is not None:
        state.load_content(saved)
        saved = None        # Frees its memory.
        report.say(f"resuming at kimg {state.cur_nimg / 1e3:.1f}, after {format_time(state.elapsed)} of training")
    elif start is not None:
        report.say(start_from(state, start, dataset.class_names, config))
    settle_forms(state, config, device, folder, resumed, report.say)

    # Data.
    order = EpochOrder(len(dataset), config.seed)
    stream = TrainingStream(dataset, order, rank, world_size, config.batch_gpu, state.cur_nimg, config.data.workers,
                            pin_memory=device.type == "cuda")
    probs = dataset.label_distribution() if G.c_dim > 0 else None
    batches = BatchSource(G, CounterRNG(config.seed), probs, stream, len(D.backbone_names), config.batch,
                          config.batch_gpu, rank, world_size, device, augment=bool(config.discriminator.diffaug),
                          paired=diverse)
    sheets = SampleSheets(folder, dataset, G.c_dim, G.z_dim, config.seed)
    if rank == 0 and not resumed:
        sheets.save_reals(dataset)
    saver = Saver(folder, config, dataset.class_names, report.say)
    saved_before = state.elapsed
    if state.snapshot_due:      # Of a new run it shows, before weeks of training, that metrics and disk work.
        with beginning.step(f"first snapshot (metrics: {', '.join(config.metrics) or 'none'})"):
            take_snapshot(config, saver, state, sheets, report, evaluate, device)

    total_nimg = int(config.total_kimg * 1000)
    tick_nimg = max(int(config.kimg_per_tick * 1000), config.batch)
    measured_nimg, tick_start_time, maintenance = state.cur_nimg, time.time(), 0.0
    report.say(f"training for {config.total_kimg:g} kimg")
    end, request, collapsed = stage_end(state, config), NOTHING, False
    torch.backends.cudnn.benchmark = autotunes(config, state.cur_nimg, device)
    if end is None:
        beginning.train(torch.backends.cudnn.benchmark)
    failed = None       # The phase whose gradients are not finite any more.
    while end is None and request.restart is None:
        if saver.state_is_due() and guard.is_clean():
            saver.save_state(state)

        # One iteration: every phase that is due makes one optimiser step.
        loss.set_progress(state.cur_nimg)
        for phase in phases:
            if state.batch_idx % phase.interval == 0 and phase.is_active(state.cur_nimg):
                with explained_memory_errors(phase.name, config, device), beginning.phase(phase.name):
                    run_phase(phase, batches.micro_batches(phase, state.cur_nimg), config.batch, guard)
        update_ema(G_ema, G, state.cur_nimg, config.batch, config.optim)
        state.cur_nimg += config.batch
        state.batch_idx += 1
        failed = guard.failed() if state.batch_idx % guard.LIMIT == 0 else None
        if failed is not None:      # Nothing is saved: what is in the folder is better.
            break

        # Asked to stop? A state may be of any iteration: the next start goes on there.
        state.elapsed = saved_before + time.time() - start_time
        request = stop.poll()
        end = stage_end(state, config) or request.finish

        # Once per tick: status, and now and then a snapshot.
        beginning.iteration(config.batch, state.tick_start_nimg + tick_nimg - state.cur_nimg)
        if end is None and state.cur_nimg < state.tick_start_nimg + tick_nimg:
            continue
        beginning.tick()
        saver.check()
        state.cur_tick += 1
        stats = collector.update()
        tick_end_time = time.time()         # The device has done everything: the statistics have waited for it.
        numbers = health.numbers(G_ema)
        state.snapshot_due |= end is not None or state.cur_tick % max(config.snapshot_ticks, 1) == 0
        diagnosis = {}
        if diagnose is not None and snapshot_now(state, end, request, guard):
            diagnosis = diagnosis_of(state, diagnose, report)
        seconds = tick_end_time - tick_start_time
        report.tick(stats, state.cur_nimg, total_nimg, {
            "tick": state.cur_tick, "elapsed": state.elapsed, "sec_per_tick": seconds,
            "sec_per_kimg": seconds / (state.cur_nimg - measured_nimg) * 1e3,
            "data_wait": batches.wait_seconds() / max(seconds, 1e-9), "maintenance": maintenance} | numbers, diagnosis)
        collapsed = health.judge(stats, numbers, state.cur_nimg, state.batch_idx, report.verdict)
        if collapsed:
            end = "stopped because of the verdict (--on-collapse=stop)"
        state.tick_start_nimg = state.cur_nimg
        state.snapshot_due |= collapsed
        if snapshot_now(state, end, request, guard):
            take_snapshot(config, saver, state, sheets, report, evaluate, device)
            end = end or stage_end(state, config)
        measured_nimg, tick_start_time = state.cur_nimg, time.time()
        maintenance = tick_start_time - tick_end_time

    if failed is not None:
        phase = next(phase for phase in phases if phase.name == failed)
        batch = next(iter(batches.micro_batches(phase, state.cur_nimg)))
        report.say(explain_nonfinite(folder, phase, batch, guard, {"G": G, "D": D}, state.cur_nimg))
    elif request.restart is not None:
        saver.save_state(state)
    else:
        stop.remove_file()
    stream.close()
    saver.close()
    report.say(request.restart or end or "stopped")
    report.close()
    return (EXIT_NONFINITE if failed is not None else EXIT_COLLAPSE if collapsed
            else EXIT_RESTART if request.restart is not None else EXIT_DONE)

#----------------------------------------------------------------------------

def stage_end(state: TrainingState, config: TrainConfig) -> str | None:
    """Why the stage is finished; None while it is not."""
    if state.cur_nimg >= int(config.total_kimg * 1000):
        return "done"
    if 0 < config.saving.stop_patience <= state.bad_evals:
        return (f"done: {state.bad_evals} evaluations without a better {state.best_metric} than that at kimg "
                f"{(state.best_nimg or 0) / 1e3:g} (--stop-patience={config.saving.stop_patience})")
    return None


def snapshot_now(state: TrainingState, end: str | None, request: Request, guard: GradientGuard) -> bool:
    """Whether a snapshot that is due is taken at this tick.

    Asked to stop there may be no time for it: the next start does. After a non-finite step the next tick does.
    """
    return state.snapshot_due and request.restart is None and (end is not None or guard.is_clean())


def diagnosis_of(state: TrainingState, diagnose: Diagnosis, report: Reporter) -> dict[str, float]:
    """Numbers of `diagnose`, on rank 0; the others wait. Never raises: numbers are not worth a run."""
    numbers: dict[str, float] = {}
    if distributed.rank() == 0:
        try:
            with misc.autotuning(False):
                numbers = diagnose(state.G, state.D, state.loss.blur_sigma)
        except Exception as err:
            report.say(f"NOTE: no diagnosis of D at this snapshot: {type(err).__name__}: {err}")
    distributed.barrier()       # This may take long: collectives have a time limit, this has none.
    return numbers


@misc.autotuning(False)
def take_snapshot(config: TrainConfig, saver: Saver, state: TrainingState, sheets: SampleSheets, report: Reporter,
                  evaluate: Evaluator | None, device: torch.device) -> None:
    """Samples, metrics, network snapshot, best model, training state.

    A run that is killed while metrics are computed, which may take long, continues with them.
    """
    state.snapshot_due = True
    captured = None
    if distributed.rank() == 0:
        captured = saver.capture(state)
        if evaluate is not None:
            saver.write_state(captured)
        kimg = snapshot_name(state.cur_nimg).removeprefix("network-snapshot-").removesuffix(".pkl")
        sheets.save_fakes(f"fakes{kimg}", state.G_ema, device)
    score = None
    distributed.barrier()       # The first process may have taken long: collectives have a time limit, this has none.
    if evaluate is not None:
        results = evaluate(state.G_ema)
        report.metrics(results, state.cur_nimg, snapshot_name(state.cur_nimg))
        score = distributed.broadcast_object(pick_score(results, config.saving.best_metric))
        update_best(state, score)
    else:
        state.best_nimg = state.cur_nimg        # Without metrics the newest model counts as the best.
    state.snapshot_due = False
    if captured is not None:
        saver.save_snapshot(state, captured, score)
        report.snapshot(f"fakes{kimg}", state.cur_nimg)
    distributed.barrier()
