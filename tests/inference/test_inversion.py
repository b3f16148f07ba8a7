"""The parts of an inversion: schedules, distances, starts, the search for latents, tuning."""
import math

import numpy as np
import PIL.Image
import pytest
import torch
from sklearn.datasets import load_digits

from data_prep.transforms import Size, center_crop
from dnnlib import UserError
from inference.inversion import distances
from inference.inversion.distances import default_distance, make_distance
from inference.inversion.goals import Goal
from inference.inversion.pivotal import TuningSettings, neighbour, tune
from inference.inversion.projection import ProjectionSettings, project
from inference.inversion.start import Start, candidates, default_count, given_start, nearest_start, spread
from inference.inversion.targets import list_targets
from inference.sampling import map_latents
from legacy import load_network
from metrics.detectors import lpips
from tests.closeness import assert_close
from tests.metrics.helpers import random_lpips_states, write_lpips_files
from torch_utils.misc import one_hot
from training.data.randomness import CounterRNG
from training.feature_networks.registry import load_backbone
from training.generator.synthesis import synthesize, synthesize_ws

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def G(network):
    return load_network(network).G_ema


@pytest.fixture(scope="module")
def pixels():
    return make_distance("pixels", 16, CPU)


def smooth_pictures(count, size=16):
    """[count, 3, size, size] in [-1, 1]: a few waves."""
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, size=size, mode="bicubic").tanh()

#----------------------------------------------------------------------------
# Schedules.

def test_published_schedules():
    """Karras et al. 2020, appendix D: of 1000 steps the rate rises over 50, falls over 250; noise falls over 750."""
    settings = ProjectionSettings()
    rates = {0: 0, 25: 0.05, 50: 0.1, 400: 0.1, 750: 0.1, 875: 0.05, 999: 0.1 * (0.5 - 0.5 * math.cos(math.pi / 250))}
    for step, rate in rates.items():
        assert settings.learning_rate_at(step / 1000) == pytest.approx(rate, abs=1e-15), step
    for step, noise in {0: 0.05, 375: 0.0125, 750: 0, 900: 0}.items():
        assert settings.noise_at(step / 1000) == pytest.approx(noise), step

#----------------------------------------------------------------------------
# Distances.

@pytest.fixture(scope="module")
def random_lpips(tmp_path_factory):
    folder = write_lpips_files(tmp_path_factory.mktemp("weights"), random_lpips_states())
    return lpips.load_lpips(CPU, str(folder), offline=True, allow_unverified=True)


@pytest.mark.numeric
def test_lpips_is_that_of_the_metrics(random_lpips, monkeypatch):
    monkeypatch.setattr(distances, "load_lpips", lambda device: random_lpips)
    distance = make_distance("lpips", 32, CPU)
    a, b = smooth_pictures(4, 32).chunk(2)
    a.requires_grad_(True)
    found = distance.between(distance.maps(a), distance.maps(b))
    with torch.no_grad():
        assert_close(found.detach(), random_lpips((a + 1) * 127.5, (b + 1) * 127.5), 1e-5)
    found.sum().backward()
    assert a.grad.isfinite().all()
    assert a.grad.abs().max() > 0
    with pytest.raises(UserError, match="needs pictures of 16 pixels or more, and the network's have 8"):
        make_distance("lpips", 8, CPU)


@pytest.mark.numeric
def test_distance_of_feature_maps():
    """Unit length at each position; squared differences averaged over positions and maps."""
    distance, backbone = make_distance("local:random:3", 16, CPU), load_backbone("local:random:3")
    a, b = smooth_pictures(4).double().float().chunk(2)
    expected = torch.zeros(2)
    with torch.no_grad():
        maps = [backbone.maps(backbone.preprocess(x)) for x in (a, b)]
        for x, y in zip(*maps, strict=True):
            x, y = (torch.nn.functional.normalize(z, dim=1) for z in (x, y))
            expected += (x - y).square().sum(dim=1).mean(dim=(1, 2)) / len(maps[0])
        assert_close(distance.between(distance.maps(a), distance.maps(b)), expected, 1e-4)


def test_pixels_are_a_mean_squared_error(pixels):
    a, b = smooth_pictures(4).chunk(2)
    found = pixels.between(pixels.maps(a), pixels.maps(b))
    torch.testing.assert_close(found, (a - b).square().mean(dim=(1, 2, 3)))


def test_large_pictures_are_averaged_down():
    image = smooth_pictures(1, 512)
    torch.testing.assert_close(distances.shrunk(image), torch.nn.functional.avg_pool2d(image, 2))
    small = smooth_pictures(1, 256)
    assert distances.shrunk(small) is small


def test_the_default_needs_no_network(monkeypatch):
    monkeypatch.setattr(distances, "locate", lambda asset: None)
    monkeypatch.setattr(distances, "locate_weights", lambda name: None)
    assert default_distance() == "pixels"
    monkeypatch.setattr(distances, "locate_weights", lambda name: name)
    assert default_distance() == "timm:tf_efficientnet_lite0"
    monkeypatch.setattr(distances, "locate", lambda asset: asset)
    assert default_distance() == "lpips"

#----------------------------------------------------------------------------
# Starts.

def test_candidates_are_means_and_published_samples(G):
    w, labels = candidates(G, [0, 2], 6)
    torch.testing.assert_close(w[:2], G.mapping.w_avg[[0, 2]])
    assert labels[:2].tolist() == [0, 2]
    z = torch.from_numpy(np.random.RandomState(123).randn(4, G.z_dim)).float()
    assert set(labels.tolist()) == {0, 2}
    torch.testing.assert_close(w[2:], G.mapping(z, one_hot(labels[2:], 3))[:, 0])
    assert candidates(G, [0, 1, 2], 2)[0].shape == (2, G.w_dim)     # The means do not fit in.
    assert (default_count([1], True), default_count(range(10), False), default_count(range(1000), False)) == (
        1, 256, 2000)


def test_the_nearest_candidate_is_taken(G, pixels):
    w, labels = candidates(G, range(3), 20)
    chosen = [7, 19]
    images = synthesize_ws(G, w[chosen, None].expand(-1, G.num_ws, -1))
    found = nearest_start(G, Goal(images, pixels), range(3), 20)
    assert found.labels.tolist() == labels[chosen].tolist()
    assert torch.equal(found.ws[:, 0], w[chosen])


def test_given_latents_get_the_nearest_class(G):
    ws = (G.mapping.w_avg[[2, 0]] + 0.01)[:, None].expand(-1, G.num_ws, -1)
    assert given_start(G, ws, None).labels.tolist() == [2, 0]
    assert given_start(G, ws, 1).labels.tolist() == [1, 1]


@pytest.mark.numeric
def test_spread_of_w(G):
    z = torch.from_numpy(np.random.RandomState(123).randn(10_000, G.z_dim)).float()
    w = map_latents(G, z, torch.full([10_000], 1)).double()
    expected = w.var(dim=0, correction=0).sum().sqrt().float()
    found = spread(G, torch.tensor([1, 0, 1]))
    assert_close(found[[0, 2]], expected.expand(2), 1e-5)
    assert found[1] != found[0]

#----------------------------------------------------------------------------
# The search.

def mean_start(G, count):
    return Start(G.mapping.w_avg[:1].expand(count, -1)[:, None].repeat(1, G.num_ws, 1),
                 torch.zeros(count, dtype=torch.int64))


@pytest.mark.numeric
def test_steps_begin_with_noise_around_the_start(G, pixels):
    steps = []
    goal, start = Goal(smooth_pictures(2), pixels), mean_start(G, 2)
    settings = ProjectionSettings(steps=4, seed=5, space="w+")
    ws = project(G, goal, start, settings, steps.append)
    assert len(steps) == 4
    noise = torch.from_numpy(CounterRNG(5).normal("inversion/noise", [0], (G.num_ws, G.w_dim)))
    expected = synthesize_ws(G, start.ws + noise * 0.05 * spread(G, start.labels)[0])
    assert_close(steps[0].images, expected, 1e-5)
    assert_close(steps[0].distances, (expected - goal.targets).square().mean(dim=(1, 2, 3)), 1e-5)
    assert not torch.equal(ws[:, 0], ws[:, 1]), "a w for each layer"
    one = project(G, goal, start, ProjectionSettings(steps=2))
    assert torch.equal(one, one[:, :1].expand_as(one)), "one w for all"


@pytest.mark.numeric
def test_many_pictures_go_the_way_of_one(G, pixels):
    targets, start = smooth_pictures(3), mean_start(G, 3)
    settings = ProjectionSettings(steps=6)
    together = project(G, Goal(targets, pixels), start, settings)
    for i in range(3):
        alone = project(G, Goal(targets[i:i + 1], pixels), Start(start.ws[i:i + 1], start.labels[i:i + 1]), settings)
        assert_close(together[i:i + 1], alone, 1e-4)


def test_masked_pixels_make_no_difference(G, pixels):
    mask = torch.zeros(16, 16)
    mask[:, :8] = 1
    first = smooth_pictures(1)
    second = torch.where(mask > 0, first, -first)
    found = []
    for target in (first, second):
        goal = Goal(target, pixels, mask)
        found.append(project(G, goal, mean_start(G, 1), ProjectionSettings(steps=3)))
        half = (torch.zeros(1, 3, 16, 16) - target)[..., :8].square().mean()
        torch.testing.assert_close(goal.squared_errors(torch.zeros(1, 3, 16, 16)), half[None])
    assert torch.equal(*found)


def test_grey_pixels_count_in_part(pixels):
    target = smooth_pictures(1)
    images = target + 0.5
    for mask in (torch.full([16, 16], 0.3), torch.rand(16, 16, generator=torch.Generator().manual_seed(0))):
        torch.testing.assert_close(Goal(target, pixels, mask).squared_errors(images), torch.tensor([0.25]))


@pytest.mark.numeric
def test_a_generated_picture_is_found(G, pixels):
    """To 0.002 without tuning."""
    z = torch.from_numpy(np.random.RandomState(7).randn(1, G.z_dim)).float()
    goal = Goal(synthesize(G, z, torch.tensor([2])), pixels)
    start = nearest_start(G, goal, range(3), 64)
    assert goal.squared_errors(synthesize_ws(G, start.ws)) > 0.002
    ws = project(G, goal, start, ProjectionSettings(steps=80))
    assert goal.squared_errors(synthesize_ws(G, ws)) < 0.002

#----------------------------------------------------------------------------
# Tuning.

@pytest.mark.numeric
def test_neighbours_lie_at_the_published_distance(G):
    pivot = torch.randn(1, G.num_ws, G.w_dim, generator=torch.Generator().manual_seed(0))
    near = neighbour(G, pivot, 2, TuningSettings(seed=3), 11)
    length = (near - pivot).norm(dim=2)
    assert_close(length, torch.full_like(length, 30 * math.sqrt(32 / 512)), 1e-5)
    z = torch.from_numpy(CounterRNG(3).normal("inversion/locality", [11], (G.z_dim,)))
    towards = G.mapping(z, one_hot(torch.tensor([2]), 3), truncation_psi=0.5) - pivot
    assert_close(torch.cosine_similarity(near - pivot, towards, dim=2), torch.ones_like(length), 1e-5)


@pytest.mark.numeric
@pytest.mark.slow
def test_tuning_makes_what_the_generator_could_not(G, pixels):
    """A handwritten digit, which it never saw, to 0.02; the original and the mapping stay."""
    digit = torch.tensor(load_digits().images[5], dtype=torch.float32).expand(1, 3, 8, 8) / 8 - 1
    target = torch.nn.functional.interpolate(digit, size=16, mode="bilinear")
    goal, start = Goal(target, pixels), mean_start(G, 1)
    before = {name: x.clone() for name, x in G.state_dict().items()}
    assert goal.squared_errors(synthesize_ws(G, start.ws)) > 0.1
    seen = []
    tuned = tune(G, goal, start.ws, 0, TuningSettings(steps=140, learning_rate=1e-2), seen.append)
    assert goal.squared_errors(synthesize_ws(tuned, start.ws)) < 0.02
    assert len(seen) == 140
    after, now = G.state_dict(), tuned.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(before[name], now[name]) for name in before if name.startswith("mapping."))
    assert not any(p.requires_grad for p in tuned.parameters())

@pytest.mark.numeric
def test_near_the_pivot_little_changes(G, pixels):
    goal, start = Goal(smooth_pictures(1), pixels), mean_start(G, 1)
    near = neighbour(G, start.ws, 0, TuningSettings(), 1000)
    strayed = {}
    for locality in (0, 1e5):
        tuned = tune(G, goal, start.ws, 0, TuningSettings(steps=15, learning_rate=3e-2, locality=locality))
        strayed[locality] = (synthesize_ws(tuned, near) - synthesize_ws(G, near)).square().mean()
    assert strayed[1e5] < strayed[0] / 2

#----------------------------------------------------------------------------
# Pictures in files.

def test_targets_are_cropped_and_named(tmp_path):
    rng = np.random.RandomState(0)
    (tmp_path / "more" / "a").mkdir(parents=True)
    image = PIL.Image.fromarray(rng.randint(0, 255, [40, 61, 3], dtype=np.uint8))
    for name in ("x.png", "more/x.bmp", "more/a/x.png", "more/X.jpg", "comparison.png.png"):
        image.save(tmp_path / name)
    (tmp_path / "more" / "notes.txt").write_text("no picture")
    targets = list_targets([str(tmp_path / name) for name in ("x.png", "more", "x.png", "comparison.png.png")])
    # What lies beside the folders of all targets keeps its name.
    assert [target.name for target in targets] == ["x", "X-2", "a-x", "x-3", "x-4", "comparison.png-2"]
    expected = np.array(center_crop(image, Size(16, 16)))
    assert np.array_equal(targets[0].load(16).pixels.permute(1, 2, 0).numpy(), expected)
