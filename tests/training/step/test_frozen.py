"""What a super-resolution stage keeps frozen: bit-unchanged, in no optimiser, no average, no message."""
import copy

import pytest
import torch

from training.config import DiscriminatorConfig, LossConfig, OptimConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.generator.layer_schedule import stem_config, superres_config
from training.generator.superres import load_stem_into, stage_table
from training.loss import StyleSanLoss
from training.networks_stylegan3 import Generator
from training.step.ema import update_ema
from training.step.gradients import FlatGradients
from training.step.guard import GradientGuard
from training.step.micro_batch import MicroBatch
from training.step.phases import make_phases, run_phase

pytestmark = pytest.mark.numeric

MOVES = {"mapping.w_avg"}       # Documented: the means of w follow the data of the stage.


@pytest.fixture(scope="module")
def stem():
    torch.manual_seed(0)
    return Generator(stem_config(16, 4, 64, 8, 2, c_dim=3, w_dim=16, embed_dim=8))


@pytest.fixture
def stage(stem):
    torch.manual_seed(1)
    G = Generator(superres_config(stem.config, 2, 4))
    load_stem_into(G, stem.config, stem.state_dict())
    return G.train().requires_grad_(False)


def old_update(G_ema, G, cur_nimg: int, batch: int, config: OptimConfig) -> None:
    """The average over everything."""
    decay = 0.5 ** (batch / max(min(config.ema_kimg * 1000, cur_nimg * config.ema_rampup), 1e-8))
    with torch.no_grad():
        torch.optim.swa_utils.get_ema_multi_avg_fn(decay)(list(G_ema.parameters()), list(G.parameters()), None)
        for old, new in zip(G_ema.buffers(), G.buffers(), strict=True):
            old.copy_(new)


def test_frozen_parts_stay_and_the_rest_trains(stem, stage):
    D = ProjectedDiscriminator(DiscriminatorConfig(("local:random",), 32, 3, proj_channels=4, max_channels=64,
                                                   diffaug=())).train().requires_grad_(False)
    loss = StyleSanLoss(stage, D, LossConfig(blur_init_sigma=0), torch.device("cpu"))
    phases = make_phases(stage, D, loss, OptimConfig.official(4))
    before = {name: value.clone() for name, value in stage.state_dict().items()}
    G_ema = copy.deepcopy(stage).eval()
    by_old_rule = copy.deepcopy(G_ema)
    labels = torch.eye(3)[[0, 1, 2, 0]]
    batch = MicroBatch(torch.randn(4, 64), labels, torch.rand(4, 3, 32, 32) * 2 - 1, labels)
    for step in range(2):
        for phase in phases:
            if phase.is_active(10 ** 9):
                run_phase(phase, [batch], 4, GradientGuard(4))
        for average, rule in ((G_ema, update_ema), (by_old_rule, old_update)):
            rule(average, stage, 1000 + 4 * step, 4, OptimConfig.official(4))

    frozen = stage.frozen_prefixes()
    assert len(frozen) == 1 + stage.config.num_frozen_layers
    for name, value in stage.state_dict().items():
        if name.startswith(frozen) and name not in MOVES:
            assert torch.equal(value, before[name]), name
            assert torch.equal(value, stem.state_dict()[name]), name
            assert torch.equal(value, G_ema.state_dict()[name]), name
    moved = {name for name, p in stage.named_parameters() if not torch.equal(p, before[name])}
    assert {"synthesis.input.weight", "synthesis.input.affine.weight"} <= moved
    assert not torch.equal(stage.mapping.w_avg, before["mapping.w_avg"])
    buffers = {name for name, b in stage.named_buffers() if not torch.equal(b, before[name])}
    assert buffers == MOVES                             # So the average need not copy any other.
    for (name, a), b in zip(G_ema.state_dict().items(), by_old_rule.state_dict().values(), strict=True):
        assert torch.equal(a, b), name

    # Frozen parts are in no Adam, have no gradients and are in no messages.
    kept = {id(p) for name, p in stage.named_parameters() if name.startswith(frozen)}
    for phase in phases:
        grouped = [p for group in phase.optimizer.param_groups for p in group["params"]]
        assert not kept & {id(p) for p in [*grouped, *phase.parameters, *phase.optimizer.state]}, phase.name
    assert all(p.grad is None for p in stage.parameters() if id(p) in kept)
    gradients = FlatGradients(phases[0].parameters)
    trained = sum(p.numel() for name, p in stage.named_parameters() if not name.startswith(frozen))
    assert gradients.flat.numel() == trained


def test_average_of_a_stem_is_the_old_one(stem):
    torch.manual_seed(2)
    G = copy.deepcopy(stem)
    mine, theirs = copy.deepcopy(G), copy.deepcopy(G)
    with torch.no_grad():
        for value in [*G.parameters(), G.mapping.w_avg]:
            value.add_(torch.randn_like(value))
    for cur_nimg in (0, 500):
        update_ema(mine, G, cur_nimg, 4, OptimConfig.official(4))
        old_update(theirs, G, cur_nimg, 4, OptimConfig.official(4))
        for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b), name


def test_table_counts_parameters(stem, stage):
    lines = stage_table(stage.config, stem.config).splitlines()
    total = sum(p.numel() for p in stage.parameters())
    trained = sum(p.numel() for p in stage.trainable_parameters())
    assert lines[-1] == f"generator: {total:,} parameters, {trained:,} trained, {total - trained:,} frozen"
    for name, module in stage.synthesis.named_children():
        (line,) = (x for x in lines if x.split()[0] == name and "cut" not in x)
        assert f"  {sum(p.numel() for p in module.parameters()):,}  " in line
        is_frozen = f"synthesis.{name}." in stage.frozen_prefixes()
        assert ("frozen, kept" in line) == is_frozen
    assert sum("cut from the stem" in line for line in lines) == 3
    assert [line.split()[0] for line in lines[:3]] == ["layer", "mapping", "input"]
    assert "frozen" not in stage_table(stem.config).splitlines()[1]
