"""The diversity term: its target against a brute-force mean, its value, who is paired, and what is refused."""
import itertools

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.conftest import write_dataset
from train import main
from training.data.randomness import CounterRNG
from training.dataset import ImageDataset, real_pair_distance
from training.step.batches import BatchSource
from training.step.diversity import diversity_loss


def brute_force(dataset: ImageDataset) -> float:
    """Mean over all pairs of a class."""
    items = [dataset[i] for i in range(len(dataset))]
    pairs = [np.abs(a.astype(float) - b).mean() / 127.5 for (a, la), (b, lb) in itertools.combinations(items, 2)
             if la == lb]
    return float(np.mean(pairs))


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.numeric
def test_target_is_the_mean_over_pairs(tmp_path, labels):
    dataset = ImageDataset(write_dataset(tmp_path / "d.zip", 16, num_images=200), use_labels=labels)
    exact = brute_force(dataset)
    assert real_pair_distance(dataset, seed=0) == pytest.approx(exact, rel=0.1)
    assert real_pair_distance(dataset, seed=0) == real_pair_distance(dataset, seed=0)
    across = brute_force(ImageDataset(dataset.path))
    assert (abs(across - exact) < 1e-12) == (not labels)        # Classes do differ more than images of one class.


def test_target_of_lonely_images(tmp_path):
    dataset = ImageDataset(write_dataset(tmp_path / "d.zip", 16, num_images=4, num_classes=4), use_labels=True)
    assert real_pair_distance(dataset) == 0


@pytest.mark.numeric
def test_loss_is_what_is_missing():
    images = torch.zeros(4, 3, 8, 8)
    images[1] = 0.25
    images[3] = 2
    images.requires_grad_(True)
    loss = diversity_loss(images, target=0.5)
    assert torch.equal(loss, torch.tensor([0.25, 0]))
    loss.sum().backward()
    assert images.grad[1].lt(0).all()       # These two are pushed apart.
    assert not images.grad[2:].any()        # These are far enough apart.


@pytest.mark.parametrize(("rank", "world", "batch_gpu"), [(0, 1, 8), (1, 2, 4), (1, 2, 2)])
def test_pairs_share_their_class_whoever_draws_them(rank, world, batch_gpu):
    class G:
        c_dim = 10
        config = type("Config", (), {"z_dim": 4})

    class Phase:
        name = "Gmain"
        uses_real_images = uses_noise = False

    def labels(rank, world, batch_gpu):
        source = BatchSource(G, CounterRNG(0), np.full(10, 0.1), None, 1, 8, batch_gpu, rank, world,
                             torch.device("cpu"), augment=False, paired=True)
        return [batch.gen_c.argmax(dim=1) for batch in source.micro_batches(Phase, 32)]

    (whole,) = labels(0, 1, 8)
    assert torch.equal(whole[0::2], whole[1::2])
    assert len(set(whole.tolist())) > 1
    mine = labels(rank, world, batch_gpu)
    expected = whole.split(batch_gpu)[rank::world]
    assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))


def test_odd_micro_batch_is_refused(data16, tmp_path):
    result = CliRunner().invoke(main, ["--cfg=stylegan3-t", "--preset=demo", "--batch=9", "--cond=1", "-n",
                                       f"--data={data16}", f"--outdir={tmp_path}", "--backbones=local:random"])
    assert result.exit_code == 2
    assert "--diversity=4" in result.output
    assert "--batch-gpu" in result.output
