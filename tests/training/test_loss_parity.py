"""Phases of the official training step: statistics and gradients, and two whole iterations."""
import numpy as np
import pytest
import torch

from tests.closeness import Deviation, approx, l2_error, rel_error
from tests.parity import DOUBLE, DTYPES, VALUE, Recording, fill_by_rule, load_npz
from tests.training.discriminators.test_parity import check_norms, head, is_before_batch_norm
from tests.training.recorded import micro_batches, networks
from torch_utils.misc import requires_grad
from torch_utils.training_stats import Collector
from training.config import LossConfig, OptimConfig
from training.feature_networks.classifier import load_classifier
from training.loss import StyleSanLoss
from training.step.ema import update_ema
from training.step.guard import GradientGuard
from training.step.loss_math import path_lengths
from training.step.phases import make_phases, run_phase

pytestmark = [pytest.mark.numeric, pytest.mark.slow]

CASES = {"stem16_blur": 0, "stem16_pl": 2_000_000, "superres32_cls": 150_000}      # Images shown before.


def recorded_phase(case: str, phase: str, dtype: torch.dtype):
    """Run one phase from the recorded start; returns (data, loss, network, statistics, gradients by name)."""
    data = Recording(f"loss_{case}", dtype)
    G, D = networks(data, "G/")
    classifier = None
    if case.endswith("cls"):
        classifier = load_classifier("deit_small_distilled_patch16_224:random", 1000).to(dtype)
        fill_by_rule(classifier.net)
    size = len(data.input("z"))
    # Official terms are sums over the micro-batch or averages over it: with its size as the reference micro-batch and a
    # global batch of 1 ours are the same sums.
    config = LossConfig(cls_weight=8.0 if classifier else 0.0, reference_micro_batch=size)
    collector = Collector()
    loss = StyleSanLoss(G, D, config, torch.device("cpu"), classifier, collector.report)
    loss.set_progress(CASES[case])
    backward = {"Gmain": loss.generator_main, "Greg": loss.generator_path_length,
                "Dmain": loss.discriminator_main}[phase]
    module = D if phase == "Dmain" else G
    parameters = module.trainable_parameters()
    noise = "Greg/pl_noise" if phase == "Greg" else None
    with requires_grad(module, parameters):
        for batch in micro_batches(data, "z", size=size, noise=noise):
            backward(batch, 1)
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return data, loss, module, collector.update(), grads


PHASES = [("stem16_blur", "Gmain"), ("stem16_blur", "Dmain"), ("stem16_pl", "Gmain"), ("stem16_pl", "Greg"),
          ("stem16_pl", "Dmain"), ("superres32_cls", "Gmain"), ("superres32_cls", "Dmain")]


def mean_error(stat, recorded: float) -> Deviation:
    """Error of a mean relative to the size of its terms: in single precision they are as near as that, and where they
    cancel, as positive and negative scores do, their mean is no nearer."""
    return Deviation(abs(stat.mean - recorded) / (recorded ** 2 + stat.std ** 2) ** 0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "phase"), PHASES)
def test_phase(case, phase, dtype):
    data, loss, module, stats, grads = recorded_phase(case, phase, dtype)
    size = len(data.input("z"))

    recorded = data.keys(f"{phase}/stat/")
    assert recorded
    for key in recorded:
        name = key.removeprefix(f"{phase}/stat/")
        # Official losses are sums over the micro-batch; ours are reported per sample.
        scale = size if name in ("Loss/G/loss", "Loss/D/loss", "Loss/G/reg") else 1
        if data.is_double:
            assert data.error(key, stats[name].mean * scale) < data.bound(key), key
        else:
            assert mean_error(stats[name], float(data[key]) / scale) < VALUE, key

    names = data[f"{phase}/grad_names"].tolist()
    assert set(names) >= set(grads)
    parameters = dict(module.named_parameters())
    grads |= {name: torch.zeros_like(parameters[name]) for name in set(names) - set(grads)}
    check_norms(data[f"{phase}/grad_norms"], names, grads, data.is_double)
    compared = [key for key in data.keys(f"{phase}/grad/") if not is_before_batch_norm(key)]
    assert len(compared) > 5
    for key in compared:
        assert data.error(key, grads[key.removeprefix(f"{phase}/grad/")]) < data.bound(key), key
    if phase == "Greg":
        assert data.error("Greg/pl_mean", loss.pl_mean) < data.bound("Greg/pl_mean")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_iterations(dtype):
    data = Recording("iteration_stem16", dtype)
    G, D = networks(data, "G0/")
    optim = OptimConfig.official(8)     # Gradients are the official sums here, so eps is 1e-8.
    D.project_()
    for it in range(2):
        collector = Collector()
        if it == 0:
            loss = StyleSanLoss(G, D, LossConfig(reference_micro_batch=2), torch.device("cpu"))
            phases = make_phases(G, D, loss, optim)
            guard = GradientGuard(8)
        loss.report = collector.report
        loss.set_progress(4 * it)
        stats = {}
        for phase, z in zip(phases, ("z0", "z1", "z2"), strict=True):
            if it % phase.interval or not phase.is_active(4 * it):
                continue
            # Statistics are those of the last micro-batch.
            batches = last_only(micro_batches(data, f"it{it}/{z}", f"it{it}/", size=2), collector)
            run_phase(phase, batches, 1, guard)
            stats[phase.name] = collector.update()
        update_ema(G, G, 4 * it, 4, optim)
        values = {f"it{it}/{phase}/stat/{name}": stat for phase, found in stats.items() for name, stat in found.items()}
        check = check_iteration_double if data.is_double else check_iteration_single
        check(it, data, values, G, {f"discriminators.{name}": p for name, p in D.discriminators.named_parameters()})
    assert guard.counts() == {"Gmain": 0, "Dmain": 0}


def last_only(batches, collector):
    for batch in batches:
        collector.update()
        yield batch


def statistics(it, data):
    keys = [key for key in data.keys(f"it{it}/") if "/stat/" in key]
    assert keys
    return keys


def official_sum(key):
    """What of ours is the recorded statistic: official losses are sums over the micro-batch, ours are per sample."""
    return 2 if key.endswith("/loss") else 1


def check_iteration_double(it, data, values, G, D_parameters):
    """Everything that was recorded. Biases before BatchNorm are left out: Adam moves them by the sign of a rounding."""
    for key in statistics(it, data):
        assert data.error(key, values[key].mean * official_sum(key)) < DOUBLE, key
    state = G.state_dict()
    state["mapping.w_avg"] = state["mapping.w_avg"][data.input(f"it{it}/w_avg_rows")]
    for key in data.keys(f"it{it}/G/"):
        assert data.error(key, state[key.removeprefix(f"it{it}/G/")]) < DOUBLE, key
    names = data["D_names"].tolist()
    assert set(names) == set(D_parameters)
    for name, norm, recorded in zip(names, data[f"it{it}/D_norms"], data[f"it{it}/D_heads"], strict=True):
        if not is_before_batch_norm(name):
            assert float(D_parameters[name].norm()) == approx(float(norm), rel=DOUBLE, abs=0), name
            assert rel_error(head(D_parameters[name]), recorded) < DOUBLE, name


def check_iteration_single(it, data, values, G, D_parameters):
    """Adam's first step is a sign times the learning rate, and rounding turns signs of gradients near 0."""
    for key in statistics(it, data):
        assert mean_error(values[key], float(data[key]) / official_sum(key)) < (1e-3, 5e-3)[it], key
    state = {f"it{it}/G/{name}": value for name, value in G.state_dict().items()}
    if it == 0:
        step = OptimConfig.official(8).G_lr * 4 / 5
        trained = [f"it0/G/{name}" for name, _ in G.named_parameters() if f"it0/G/{name}" in data]
        assert trained
        for key in trained:
            close = np.abs(state[key].numpy() - data[key]) < 0.05 * step
            assert close.mean() >= 0.95, key
    else:
        # A tenth of the weights was moved by another sign in one of the two iterations: the official run in single
        # precision is itself 1.5e-3 from the one in double precision. Ours may be four times as far from that.
        rows, key = data.input("it1/w_avg_rows"), "it1/G/mapping.w_avg"
        exact = load_npz("iteration_stem16_float64.npz")[key]
        assert l2_error(state[key][rows], exact) < 4 * float(l2_error(data[key], exact))
        # A twentieth of the elements, two steps off in random directions, changes a norm by 2 sqrt(1 / 20) of a step
        # in the mean, whatever the number of elements. Three times that is asked for.
        step = OptimConfig.official(8).D_lr * 16 / 17
        for name, norm in zip(data["it1/D_names"].tolist(), data["it1/D_norms"], strict=True):
            if not is_before_batch_norm(name):
                assert float(D_parameters[name].norm()) == approx(float(norm), abs=6 * 0.05 ** 0.5 * step), name


def test_path_length_noise_in_double_precision():
    """It is drawn in single precision. Dividing it rounds nothing at the sizes of the recordings; here it does."""
    torch.manual_seed(0)
    weight, noise = torch.randn(8, 3 * 12 * 12, dtype=torch.float64), torch.randn(2, 3, 12, 12)
    ws = torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True)
    images = (ws.sum(dim=1) @ weight).reshape(2, 3, 12, 12)
    assert torch.equal(path_lengths(images, ws, noise), path_lengths(images, ws, noise.double()))
