# SPDX-License-Identifier: Apache-2.0
"""The training loop: StyleGAN-XL's algorithm with SAN heads (Sauer et al. 2022; Takida et al. 2024)."""
import copy
import dataclasses
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dnnlib.util import format_time
from torch_utils import checkpoint, distributed, misc
from torch_utils.ops import dispatch
from torch_utils.training_stats import Collector
from training.batches import BatchSource
from training.class_embedding import class_embedding
from training.classifier import load_classifier
from training.config import TrainConfig
from training.dataset import EpochOrder, ImageDataset, TrainingStream
from training.discriminators.projected import ProjectedDiscriminator
from training.diversity import real_pair_distance
from training.ema import update_ema
from training.feature_networks.registry import load_backbone
from training.loss import StyleSanLoss
from training.networks_stylegan3 import Generator
from training.phases import GradientGuard, make_phases, run_phase
from training.randomness import CounterRNG
from training.reporting import Reporter, SampleSheets
from training.run_folder import STATE_FILE
from training.snapshots import TrainingState, generator_config, snapshot_name
from training.superres import load_stem_into, stage_table

EXIT_DONE, EXIT_RESTART = 0, 3      # What a launcher reads: finished; start me again.

Evaluator = Callable[[Generator], list[dict[str, Any]]]     # G_ema -> metric results; every process calls it.

#----------------------------------------------------------------------------
# Setting up.

def make_networks(config: TrainConfig, dataset: ImageDataset, stem: dict[str, Any] | None,
                  device: torch.device) -> tuple[Generator, ProjectedDiscriminator]:
    """G and D on the device, equal on all processes."""
    torch.manual_seed(config.seed)
    D = distributed.rank0_first(lambda: ProjectedDiscriminator(config.discriminator))   # The first may download.
    torch.manual_seed(config.seed)      # G does not depend on what D drew.
    if stem is not None:
        G = Generator(config.generator)
        load_stem_into(G, generator_config(stem), stem["G_ema"])
    else:
        table = make_class_embedding(config, dataset, device) if config.generator.c_dim > 0 else None
        # The table is as wide as the features that it was made from.
        width = config.generator.embed_dim if table is None else table.shape[1]
        G = Generator(dataclasses.replace(config.generator, embed_dim=width))
        if table is not None:
            with torch.no_grad():
                G.mapping.embed.weight.copy_(table)
    G, D = G.train().requires_grad_(False).to(device), D.train().requires_grad_(False).to(device)
    D.project_()
    for tensor in [*G.parameters(), *G.buffers(), *D.own_state_dict().values()]:
        distributed.broadcast(tensor.data)
    return G, D


def make_class_embedding(config: TrainConfig, dataset: ImageDataset, device: torch.device) -> torch.Tensor:
    """The class table [c_dim, width], equal on all processes. Rank 0 makes it: it may have to look at every image."""
    table = None
    if distributed.rank() == 0:
        backbone = load_backbone(config.discriminator.backbones[-1]).to(device) if config.embedding == "data" else None
        table = class_embedding(config.embedding, config.generator.c_dim, dataset=dataset, backbone=backbone,
                                seed=config.seed, device=device, embed_dim=config.generator.embed_dim).cpu()
    return distributed.broadcast_object(table)


def is_better(result: dict[str, Any], best: float | None) -> bool:
    """Whether a metric improved: distances want to be low, everything else high."""
    value = next(iter(result["results"].values()))
    if best is None:
        return True
    lower = any(word in result["metric"] for word in ("fid", "kid", "ppl"))
    return value < best if lower else value > best

#----------------------------------------------------------------------------

def training_loop(
    config: TrainConfig,                    # Every setting.
    folder: Path,                           # Where results go; exists.
    device: torch.device,                   # Of this process.
    dataset: ImageDataset,                  # Real images.
    stem: dict[str, Any] | None = None,     # Snapshot that a super-resolution stage is grown on.
    start: dict[str, Any] | None = None,    # Snapshot whose weights a new run begins with.
    evaluate: Evaluator | None = None,      # Metrics of G_ema, run at snapshots.
) -> int:
    """Train until `config.total_kimg`; return EXIT_DONE, or EXIT_RESTART when `config.restart_every` ran out.

    Continues from the training state in `folder`, if there is one. Every random number is a function of the seed and of
    the number of images shown, so continuing gives what an unbroken run gives.
    """
    start_time = time.time()
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    rank, world_size = distributed.rank(), distributed.world_size()
    report = Reporter(folder)
    report.say(f"device {device}, {world_size} process(es); {dispatch.describe()}; torch {torch.__version__}")

    # Networks.
    G, D = make_networks(config, dataset, stem, device)
    G_ema = copy.deepcopy(G).eval()
    classifier = None
    if config.loss.cls_weight > 0 and stem is not None and G.c_dim > 0:
        names = dataset.class_names if config.loss.cls_model.endswith(".safetensors") else None
        classifier = distributed.rank0_first(lambda: load_classifier(config.loss.cls_model, G.c_dim, names)).to(device)
    report.say(stage_table(G.config, generator_config(stem) if stem else None))
    trained = [sum(p.numel() for p in net.trainable_parameters()) for net in (G, D)]
    report.say(f"parameters: G {misc.count_parameters(G):,}, trained {trained[0]:,}; D trained {trained[1]:,}")
    report.say(f"augmentation: {', '.join(config.discriminator.diffaug) or 'none'}")

    # Losses, optimisers, state.
    collector = Collector()
    diverse = config.loss.diversity_weight > 0
    distance = distributed.broadcast_object(
        real_pair_distance(dataset, config.seed) if diverse and rank == 0 else 0.0)
    loss = StyleSanLoss(G, D, config.loss, device, classifier, collector.report, config.fp32, distance)
    phases = make_phases(G, D, loss, config.optim)
    state = TrainingState(G, G_ema, D, loss, phases)
    guard = GradientGuard()
    resumed = (folder / STATE_FILE).is_file()
    if resumed:
        state.load(folder / STATE_FILE)
        report.say(f"resuming at kimg {state.cur_nimg / 1e3:.1f}, after {format_time(state.elapsed)} of training")
    elif start is not None:
        state.start_from(start, str(config.resume))

    # Data.
    order = EpochOrder(len(dataset), config.seed)
    stream = TrainingStream(dataset, order, rank, world_size, config.batch_gpu, state.cur_nimg, config.data.workers)
    probs = dataset.label_distribution() if G.c_dim > 0 else None
    batches = BatchSource(G, CounterRNG(config.seed), probs, stream, len(D.backbone_names), config.batch,
                          config.batch_gpu, rank, world_size, device, augment=bool(config.discriminator.diffaug),
                          paired=diverse)
    sheets = SampleSheets(folder, dataset, G.c_dim, G.z_dim, config.seed)
    if rank == 0 and not resumed:
        sheets.save_reals(dataset)
    if not resumed:     # Also shows, before weeks of training, that metrics and disk work.
        save_snapshot(config, folder, state, dataset.class_names, sheets, report, evaluate, device)

    total_nimg = int(config.total_kimg * 1000)
    tick_nimg = max(int(config.kimg_per_tick * 1000), config.batch)
    tick_start_nimg, tick_start_time, maintenance, saved_before = state.cur_nimg, time.time(), 0.0, state.elapsed
    report.say(f"training for {config.total_kimg:g} kimg")
    out_of_time = False
    while state.cur_nimg < total_nimg and not out_of_time:

        # One iteration: every phase that is due makes one optimiser step.
        loss.set_progress(state.cur_nimg)
        for phase in phases:
            if state.batch_idx % phase.interval == 0 and phase.is_active(state.cur_nimg):
                run_phase(phase, batches.micro_batches(phase, state.cur_nimg), config.batch, guard)
        update_ema(G_ema, G, state.cur_nimg, config.batch, config.optim)
        state.cur_nimg += config.batch
        state.batch_idx += 1

        # Once per tick: status, and now and then a snapshot.
        done = state.cur_nimg >= total_nimg
        if not done and state.cur_nimg < tick_start_nimg + tick_nimg:
            continue
        state.cur_tick += 1
        tick_end_time = time.time()
        state.elapsed = saved_before + tick_end_time - start_time
        stats = collector.update()
        guard.check()
        seconds = tick_end_time - tick_start_time
        report.tick(stats, state.cur_nimg, total_nimg, {
            "tick": state.cur_tick, "elapsed": state.elapsed, "sec_per_tick": seconds,
            "sec_per_kimg": seconds / (state.cur_nimg - tick_start_nimg) * 1e3,
            "data_wait": batches.wait_seconds() / max(seconds, 1e-9), "maintenance": maintenance,
            "nonfinite": sum(guard.counts().values())})

        is_late = 0 < config.restart_every <= tick_end_time - start_time
        out_of_time = distributed.broadcast_object(is_late and not done)
        if done or out_of_time or state.cur_tick % max(config.snapshot_ticks, 1) == 0:
            save_snapshot(config, folder, state, dataset.class_names, sheets, report, evaluate, device)
        tick_start_nimg, tick_start_time = state.cur_nimg, time.time()
        maintenance = tick_start_time - tick_end_time

    stream.close()
    report.say("stopped to be started again (--restart_every)" if out_of_time else "done")
    report.close()
    return EXIT_RESTART if out_of_time else EXIT_DONE

#----------------------------------------------------------------------------

def save_snapshot(config: TrainConfig, folder: Path, state: TrainingState, class_names: list[str], sheets: SampleSheets,
                  report: Reporter, evaluate: Evaluator | None, device: torch.device) -> None:
    """Samples, network snapshot, metrics, best model, training state: in this order, each file whole or not at all."""
    name = snapshot_name(state.cur_nimg)
    kimg = name.removeprefix("network-snapshot-").removesuffix(".pkl")
    if distributed.rank() == 0:
        sheets.save_fakes(f"fakes{kimg}", state.G_ema, device)
        checkpoint.save(folder / name, state.network_snapshot(config, class_names))
    distributed.barrier()

    improved = evaluate is None         # Without metrics the newest model counts as the best.
    if evaluate is not None:
        results = evaluate(state.G_ema)
        report.metrics(results, state.cur_nimg, name)
        improved = is_better(results[0], state.best_value)
        if improved:
            state.best_value = float(next(iter(results[0]["results"].values())))
    if improved:
        state.best_nimg = state.cur_nimg
    if distributed.rank() == 0:
        if improved:
            link_or_copy(folder / name, folder / "best_model.pkl")
        state.save(folder / STATE_FILE)
    distributed.barrier()


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, atomically: a hard link costs no space; elsewhere a copy."""
    temp = target.with_name(f".{target.name}.tmp")
    temp.unlink(missing_ok=True)
    try:
        os.link(source, temp)
    except OSError:
        shutil.copyfile(source, temp)
    os.replace(temp, target)
