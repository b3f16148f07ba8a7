"""The training step: equal to the step in its official structure, and never waiting for the device."""
import importlib.util
from pathlib import Path

import pytest
import torch

from tests import needs_cuda
from tests.closeness import assert_close, l2_error
from tests.host_numbers import HostNumbers
from torch_utils.training_stats import Collector
from training.config import DiscriminatorConfig, LossConfig, OptimConfig
from training.diffaug import NUM_UNIFORMS
from training.discriminators.projected import ProjectedDiscriminator
from training.generator.layer_schedule import stem_config
from training.loss import StyleSanLoss
from training.networks_stylegan3 import Generator
from training.step import phases as phases_module
from training.step.ema import update_ema
from training.step.gradients import FlatGradients
from training.step.guard import GradientGuard
from training.step.micro_batch import MicroBatch
from training.step.phases import lazy_adam, make_phases, run_phase

pytestmark = pytest.mark.numeric

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
NUM_BACKBONES = 2


def official_step():
    spec = importlib.util.spec_from_file_location("official_step", BENCHMARKS / "official_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.OfficialStep


def networks(group: int = 0) -> tuple[Generator, ProjectedDiscriminator]:
    torch.manual_seed(0)
    G = Generator(stem_config(16, 4, 128, 8, 2, c_dim=3, w_dim=16, embed_dim=8)).train().requires_grad_(False)
    config = DiscriminatorConfig(("deit_tiny_distilled_patch16_224:random", "test_efficientnet:random"), 16, 3,
                                 proj_channels=8, max_channels=32, ghost_batch=group)
    D = ProjectedDiscriminator(config).train().requires_grad_(False)
    D.project_()
    return G, D


def random_batch(to: str | torch.dtype = "cpu") -> MicroBatch:
    n = 2
    c = torch.eye(3)[[0, 2]]
    batch = MicroBatch(torch.randn(n, 64), c, torch.rand(n, 3, 16, 16) * 2 - 1, c.roll(1, 0),
                       *torch.rand(2, NUM_BACKBONES, n, NUM_UNIFORMS), torch.randn(n, 3, 16, 16))
    return MicroBatch(**{name: x.to(to) for name, x in vars(batch).items()})


@pytest.mark.slow
def test_gradients_are_those_of_the_official_structure():
    """Slow forms, passes apart, sums over the micro-batch against what training does. In float64, because batches of
    two make BatchNorm enlarge rounding errors."""
    G, D = (net.double() for net in networks())
    official = official_step()(G, D, OptimConfig.official(8))
    D.optimize_frozen_()
    loss = StyleSanLoss(G, D, LossConfig(blur_init_sigma=0), torch.device("cpu"))
    for name, ours, theirs in (("generator", loss.generator_main, official.generator_phase),
                               ("discriminator", loss.discriminator_main, official.discriminator_phase)):
        flats = []
        for net, backward in ((G if name == "generator" else D, lambda b, f=ours: f(b, 1)),
                              (official.G if name == "generator" else official.D, theirs)):
            parameters = net.trainable_parameters()
            net.requires_grad_(False)
            for p in parameters:
                p.requires_grad_(True)
            torch.manual_seed(7)
            backward(random_batch(torch.float64))
            flats.append(torch.cat([p.grad.flatten() for p in parameters]))
            net.requires_grad_(False)
        assert l2_error(*flats) < 1e-6, name
    loss.end_discriminator_main()
    assert_close(G.mapping.w_avg, official.G.mapping.w_avg, atol=1e-6, rtol=1e-5)


def gradient_of_G(precision: str, phase: str) -> torch.Tensor:
    G, D = networks()
    loss = StyleSanLoss(G, D, LossConfig(), torch.device("cpu"), precision=precision)
    torch.manual_seed(7)
    batch = random_batch()
    parameters = G.trainable_parameters()
    for p in parameters:
        p.requires_grad_(True)
    getattr(loss, phase)(batch, 1)
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


@pytest.mark.parametrize("phase", ["generator_main", "generator_path_length"])
def test_generator_in_bfloat16(phase):
    """Also twice differentiated, as path lengths are: near the gradient in float32, and not equal to it."""
    exact, low = (gradient_of_G(precision, phase) for precision in ("fp32", "bf16"))
    assert exact.dtype == low.dtype == torch.float32
    assert torch.equal(exact, gradient_of_G("auto", phase))             # On a processor.
    distance = float((exact - low).norm() / exact.norm())
    assert 1e-4 < distance < 0.2        # Measured: 0.09 to 0.11 for path lengths, by the form of the filters.


def test_optimiser_of_an_older_state_goes_on():
    """States that were written by the unfused Adam continue in the fused one."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(5))
    old = torch.optim.Adam([p], lr=1.0)
    new = lazy_adam([torch.nn.Parameter(p.detach().clone())], 0.002, OptimConfig.official(2), 4)
    for group in new.param_groups:
        assert group["fused"]
    for opt in (old, new):
        opt.param_groups[0].update(lr=0.01, betas=(0.0, 0.99))
        for step in range(3):
            q = opt.param_groups[0]["params"][0]
            q.grad = torch.arange(5.0) + step
            opt.step()
    assert_close(p, new.param_groups[0]["params"][0], rtol=1e-6, atol=1e-8)

#----------------------------------------------------------------------------
# Nothing waits: what has to read a number from the device cannot be done on the "meta" device, which has no data.

def iteration(G: Generator, D: ProjectedDiscriminator, batch: MicroBatch) -> None:
    """All phases and the average, with everything that the loop does in an iteration."""
    loss = StyleSanLoss(G, D, LossConfig(pl_start_kimg=0), batch.z.device, report=Collector().report)
    guard = GradientGuard(2, Collector().report)
    for phase in make_phases(G, D, loss, OptimConfig.official(2)):
        loss.set_progress(0)        # Images are blurred fully.
        run_phase(phase, [batch], 2, guard)
    update_ema(G, G, 0, 2, OptimConfig.official(2))


def on_meta(monkeypatch, group: int) -> tuple[Generator, ProjectedDiscriminator]:
    """Networks on a device without data, whose heads normalise over `group` images."""
    G, D = networks(group)
    D.optimize_frozen_()
    filters = {name: f for name, f in G.named_buffers() if name.endswith("_filter")}     # Known before.
    G.to("meta")
    D.to("meta")
    for name, f in filters.items():
        path, _, leaf = name.rpartition(".")
        setattr(G.get_submodule(path), leaf, f)
    # The fused optimiser has no form for this device.
    monkeypatch.setattr(phases_module, "lazy_adam",
                        lambda parameters, *args: torch.optim.SGD(parameters, lr=0.1))
    return G, D


@pytest.mark.parametrize("group", [0, 2])
def test_a_step_reads_nothing_from_the_device(group, monkeypatch):
    G, D = on_meta(monkeypatch, group)
    iteration(G, D, random_batch("meta"))
    with pytest.raises((RuntimeError, NotImplementedError)):
        FlatGradients(D.trainable_parameters()).flat.sum().item()      # A wait would show like this.


def test_the_watch_for_host_numbers_sees_them():
    x = torch.zeros(3, device="meta")
    with HostNumbers() as watch:
        x[[0, 1]]
        x[torch.tensor([0])]
        torch.tensor([1.0], device="meta")
        torch.zeros(3).to("meta")
        assert len(watch.found) == 4
        x[1:], x * 2.0, x * torch.tensor(2.0), torch.zeros(3) + 1, torch.arange(3, device="meta")   # These are none.
    assert len(watch.found) == 4


@pytest.mark.slow
@pytest.mark.parametrize("group", [0, 2])
def test_a_step_hands_no_numbers_to_the_device(group, monkeypatch):
    G, D = on_meta(monkeypatch, group)
    batch = random_batch("meta")
    iteration(G, D, batch)          # Mean and spread of colours, and filters, are copied once.
    with HostNumbers() as watch:
        iteration(G, D, batch)
    assert not watch.found


@pytest.mark.gpu
@needs_cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")     # PyTorch says so when it is set.
def test_a_step_does_not_wait_for_the_gpu():
    G, D = networks()
    G.cuda()
    D.cuda()
    D.optimize_frozen_()
    batch = random_batch("cuda")
    iteration(G, D, batch)      # It reads filters and picks algorithms.
    batch_mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        iteration(G, D, batch)
    finally:
        torch.cuda.set_sync_debug_mode(batch_mode)
