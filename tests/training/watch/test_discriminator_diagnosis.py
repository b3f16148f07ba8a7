"""Diagnosis of a discriminator: closed forms on heads made by hand, heads of networks, and training without a trace."""
import json
import math
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.closeness import approx, assert_close
from tests.conftest import write_dataset
from tests.training.test_loop import assert_equal_states, only_run
from tests.training.test_loop import train as train_small
from tests.training.test_processes import train as train_script
from torch_utils import checkpoint
from training.config import DiscriminatorConfig
from training.dataset import ImageDataset
from training.discriminators.projected import ProjectedDiscriminator
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator
from training.run.folder import STATE_FILE
from training.run.formats import STATE_FORMAT
from training.watch import discriminator_diagnosis
from training.watch.discriminator_diagnosis import (
    Samples,
    Settings,
    as_in_training,
    choose,
    conditions_of,
    diagnose,
    heads_of,
    patches,
    searched_direction,
    smallest_stretch,
)
from training.watch.html_report import write_report
from transport.diagnose import main as diagnose_command


def gaussians(count: int, difference: list[float], scale: list[float], positions: int = 1, seed: int = 0) -> Samples:
    """N(+-difference/2, diag(scale^2)), real and generated, `positions` times the same."""
    generator = torch.Generator().manual_seed(seed)
    spread, half = torch.tensor(scale), torch.tensor(difference) / 2
    sides = [torch.randn([count, len(scale)], generator=generator) * spread + sign * half for sign in (1, -1)]
    return Samples([*sides], [x[:, None].expand(-1, positions, -1) for x in sides], positions)


def measured(samples: Samples, omega: list[float]) -> dict[str, float]:
    rows = torch.arange(len(samples.mean[0]))
    return conditions_of(samples, rows, torch.tensor(omega), torch.Generator().manual_seed(0))

#----------------------------------------------------------------------------
# Closed forms.

@pytest.mark.numeric
def test_an_aligned_head_reads_what_the_floor_says():
    """Gap 1 in one of 32 directions, 400 images: 1/sqrt(1 + 64/400) = 0.928 is the best there is to read."""
    first = [1.0] + 31 * [0.0]
    seeds = [measured(gaussians(400, first, 32 * [1.0], seed=k), first) for k in range(3)]
    found = {name: np.mean([one[name] for one in seeds]) for name in seeds[0]}
    assert found["floor"] == pytest.approx(1 / math.sqrt(1 + 64 / 400), abs=0.02)
    assert found["inner_product"] == pytest.approx(found["floor"], abs=0.02)
    assert found["separability"] > 0.99
    assert found["w1_learned"] == pytest.approx(1, abs=0.1)
    assert found["w1_learned"] > found["w1_optimal"]        # Which is estimated, on the other half.
    assert found["w1_floor"] < 0.15
    assert measured(gaussians(8000, first, 32 * [1.0]), first)["inner_product"] > 0.99


@pytest.mark.numeric
def test_a_discriminator_of_fisher_misses_the_direction():
    """Hinge and others end at Sigma^-1 delta, at 0.714142 from delta for delta = (1, 1), Sigma = diag(1, 100)."""
    samples = gaussians(20_000, [1.0, 1.0], [1.0, 10.0], seed=1)
    found = measured(samples, [1.0, 0.01])
    assert found["inner_product"] == pytest.approx(0.714142, abs=0.1)
    assert measured(samples, [1.0, 1.0])["inner_product"] > 0.98
    assert found["w1_learned"] == pytest.approx(1.0099 / math.hypot(1, 0.01), abs=0.05)


@pytest.mark.numeric
def test_equal_laws_stand_out_of_nothing():
    found = measured(gaussians(500, [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]), [1.0, 0.0, 0.0])
    assert found["floor"] < 0.75
    assert found["w1_learned"] == pytest.approx(found["w1_floor"], abs=0.1)


@pytest.mark.numeric
def test_separability_finds_laws_that_cross():
    """N(0, 1) against N(0, 4) has equal means and W1 = sqrt(2/pi), so S is near 0; shifted far apart S is 1."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn([20_000, 1], generator=generator)
    crossing, apart = ([x, y] for x, y in ((z, 2 * z.flip(0)), (z + 20, 2 * z.flip(0))))
    found = measured(Samples(crossing, [x[:, None] for x in crossing], 1), [1.0])
    assert found["separability"] < 0.05
    assert found["w1_learned"] == pytest.approx(math.sqrt(2 / math.pi), abs=0.03)
    assert measured(Samples(apart, [x[:, None] for x in apart], 1), [1.0])["separability"] == approx(1)


@pytest.mark.numeric
def test_max_asw_sees_what_no_mean_shows():
    """Means differ by 1 along e1, but N(0, 100) against N(0, 1) along e2 has W1 = 9 sqrt(2/pi) = 7.180961."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn([2, 8000], generator=generator)
    real = torch.stack([torch.ones(8000), 10 * noise[0]], dim=1)
    fake = torch.stack([torch.zeros(8000), noise[1]], dim=1)
    samples = Samples([real, fake], [real[:, None], fake[:, None]], 1)
    found = measured(samples, [1.0, 0.0])
    assert found["separability"] == approx(1)
    assert found["w1_learned"] == approx(1)
    assert found["w1_max"] == pytest.approx(7.180961, rel=0.06)


@pytest.mark.numeric
def test_wide_features_are_searched_in_a_part_that_holds_the_difference():
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn([2, 100, 700], generator=generator)
    real[:, 3] += 8
    omega = torch.zeros(700).index_fill(0, torch.tensor([5]), 1)
    direction = searched_direction(real, fake, omega, generator)
    assert direction[3].abs() > 0.9
    assert direction.norm() == approx(1)


@pytest.mark.numeric
def test_smallest_stretch():
    """x = (a, b), h = (3a, b/2): 1/2; and a direction that does not move the image does not count."""
    dx, dh = torch.eye(2), torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    assert smallest_stretch(dx, dh) == approx(0.5)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    assert smallest_stretch(turn @ dx * 2, turn @ dh * 2) == approx(0.5)
    still = torch.cat([dx, torch.zeros(1, 2)]), torch.cat([dh, torch.zeros(1, 2)])
    assert smallest_stretch(*still) == approx(0.5)
    assert smallest_stretch(dx, dx[:, :1]) == 0         # h forgets b.

#----------------------------------------------------------------------------
# On networks.

@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    """96 labelled images of 16 pixels, 4 classes."""
    return write_dataset(tmp_path_factory.mktemp("data") / "many16.zip", 16, 96)


def networks(c_dim: int, **settings):
    torch.manual_seed(0)
    G = Generator(stem_config(16, 4, 64, 8, 2, c_dim=c_dim, w_dim=32, embed_dim=16))
    D = ProjectedDiscriminator(DiscriminatorConfig(("local:random",), 16, c_dim, max_channels=64, **settings))
    return G.requires_grad_(False), D.train().requires_grad_(False)


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize("san", [True, False])
@pytest.mark.numeric
def test_patches_and_directions_make_the_logits(c_dim, san):
    _, D = networks(c_dim, san=san)
    img = torch.rand(5, 3, 16, 16) * 2 - 1
    label = torch.tensor([0, 1, 2, 0, 1])
    c = torch.nn.functional.one_hot(label, c_dim).float() if c_dim else torch.zeros(5, 0)
    with as_in_training(D):
        (logits,) = D.heads(D.features(img), c)
        features = patches(D, img)
    parts = []
    for (_, _, disc), h in zip(heads_of(D).values(), features, strict=True):
        weight = disc.embed(label) if c_dim else disc.last_layer.weight.flatten(1).expand(5, -1)
        if c_dim == 0 and san:
            weight = weight * disc.last_layer.scale[:, None]
        omega = disc.directions()[label if c_dim else torch.zeros(5, dtype=torch.int64)]
        assert_close(omega.norm(dim=1), torch.ones(5), atol=1e-6, rtol=1e-5)
        size = (weight * omega).sum(dim=1, keepdim=True) * (disc.gain if c_dim else 1)
        parts.append(torch.einsum("npd,nd->np", h, omega) * size)
    assert_close(torch.cat(parts, dim=1), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.numeric
def test_features_are_those_of_the_training_step():
    """Normalised over the micro-batch, with the singular vectors as they are; and nothing moves."""
    _, D = networks(3)
    before = {name: value.clone() for name, value in D.state_dict().items()}
    img = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad(), as_in_training(D):
        now = patches(D, img)
        other = patches(D, img[:4])
    assert not torch.allclose(now[0][:4], other[0], atol=1e-3)
    _, grouped = networks(3, ghost_batch=4)                 # Its training step moves singular vectors by itself.
    grouped.load_own_state_dict({name: before[name] for name in grouped.own_state_dict()})
    grouped.discriminators.train()
    with torch.no_grad():
        for a, b in zip(other, patches(grouped, img[:4]), strict=True):
            assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert all(module.training for module in D.discriminators.modules())
    for name, value in D.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(("c_dim", "diffaug"), [
    (0, ()), pytest.param(4, ("color", "translation", "cutout"), marks=pytest.mark.slow)])
@pytest.mark.numeric
def test_diagnosis_of_networks(blobs, c_dim, diffaug):
    G, D = networks(c_dim, diffaug=diffaug)
    G.train()
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in (G, D)]
    dataset, settings = ImageDataset(str(blobs), use_labels=c_dim > 0), Settings(num=100, batch=8, blur_sigma=1.0)
    stream = torch.get_rng_state()
    found = diagnose(G, D, dataset, settings)
    assert torch.equal(torch.get_rng_state(), stream)
    assert G.training
    for net, values in zip((G, D), before, strict=True):
        for name, value in net.state_dict().items():
            assert torch.equal(value, values[name]), name
    assert (found.num, found.classes) == ((72, 3) if c_dim else (96, 1))    # Of 100 images, three classes of 32.
    assert [head.name for head in found.heads] == list(heads_of(D))
    for head in found.heads:
        assert all(np.isfinite(list(head.numbers().values())))
        assert abs(head.inner_product) <= 1
        assert 0 <= head.separability <= 1
        assert head.w1_max >= max(head.w1_learned, head.w1_optimal) - 1e-9
        assert (np.diff(head.quantiles) >= 0).all()
        assert head.pair_ratio >= 0
    again = diagnose(G, D, dataset, settings)
    assert again.scalars() == found.scalars()
    assert found.scalars()[f"Diagnosis/floor/{found.heads[0].name}"] == found.heads[0].floor


@pytest.mark.slow
@pytest.mark.numeric
def test_directions_that_are_set_to_the_optimal_ones_are_found_optimal(blobs):
    """Layers between images and the numbers: a D whose directions are turned by hand reads 1."""
    G, D = networks(0)
    dataset, settings = ImageDataset(str(blobs)), Settings(num=96, batch=8)
    collected = discriminator_diagnosis.collect(G, D, dataset, settings, choose(dataset, settings))
    for name, (_, _, disc) in heads_of(D).items():
        real, fake = collected[name].mean
        disc.last_layer.weight.copy_((real.mean(dim=0) - fake.mean(dim=0)).reshape(disc.last_layer.weight.shape))
    D.project_()
    for head in diagnose(G, D, dataset, settings).heads:
        assert head.inner_product == approx(1, abs=1e-5)
        assert head.separability == approx(head.separability_optimal)


def test_many_classes_leave_images_for_each(tmp_path):
    path = write_dataset(tmp_path / "classes.zip", 16, 120, 12)
    dataset = ImageDataset(str(path), use_labels=True)
    items = choose(dataset, Settings(num=64, batch=4))
    assert len(np.unique(dataset.labels[items])) == 2
    assert len(items) == 20                                 # All ten images of two classes.
    assert len(choose(dataset, Settings(num=1000, batch=50))) == 100

#----------------------------------------------------------------------------
# In training.

def run_train(outdir, data, *more):
    output = train_small(outdir, data, "--kimg=0.032", "--tick=0.016", "--snap=1", *more)
    return only_run(outdir), output


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory, blobs):
    return run_train(tmp_path_factory.mktemp("plain"), blobs)[0]


@pytest.mark.numeric
@pytest.mark.slow
def test_training_is_the_same_with_it(plain_run, blobs, tmp_path):
    """Bit by bit, at every snapshot; and the numbers are in stats.jsonl, TensorBoard and report.html."""
    run, _ = run_train(tmp_path, blobs, "--diagnose=64")
    assert_equal_states(checkpoint.load(run / STATE_FILE, STATE_FORMAT),
                        checkpoint.load(plain_run / STATE_FILE, STATE_FORMAT))
    lines = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    names = [name for name in lines[0] if name.startswith("Diagnosis/")]
    assert "Diagnosis/inner_product/local_random/0" in names
    events = EventAccumulator(str(run)).Reload()
    for name in names:
        assert [event.step for event in events.Scalars(name)] == [16, 32]
        assert [event.value for event in events.Scalars(name)] == pytest.approx([line[name] for line in lines])
    report = write_report(run).read_text()
    assert "Directions of D" in report
    assert "Distances that D sees" in report
    assert "Directions of D" not in write_report(plain_run).read_text()
    # The last line is what the command says of the last snapshot.
    done = CliRunner().invoke(diagnose_command, [f"--network={run}/network-snapshot-000000.032.pkl", f"--data={blobs}",
                                                 "--num=64", "--device=cpu"])
    line = json.loads(done.stdout)
    assert line["inner_product"] == approx(lines[-1]["Diagnosis/inner_product"], abs=1e-6)


@pytest.mark.slow
def test_a_diagnosis_that_fails_does_not_stop_a_run(blobs, tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("no room")

    monkeypatch.setattr(discriminator_diagnosis, "diagnose", broken)
    run, output = run_train(tmp_path, blobs, "--diagnose")
    assert output.count("NOTE: no diagnosis of D at this snapshot: RuntimeError: no room") == 2
    assert json.loads((run / "training_options.json").read_text())["diagnose"] == 1024
    assert "Diagnosis" not in (run / "stats.jsonl").read_text()


@pytest.mark.slow
def test_two_processes_wait_for_it(blobs, tmp_path):
    """The first process measures, the other one waits, and both go on."""
    _, run = train_script([sys.executable], tmp_path, blobs, "--kimg=0.008", "--gpus=2", "--diagnose=64")
    (line,) = (json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines())
    assert np.isfinite(line["Diagnosis/inner_product"])
    assert (run / "network-snapshot-000000.008.pkl").is_file()
