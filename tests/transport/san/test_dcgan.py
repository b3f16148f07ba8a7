"""The DCGAN as SAN: networks and scores, runs that are kept, and the conversion that the documentation shows."""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests.closeness import approx
from tests.conftest import write_dataset
from training.discriminators.san import SanLinear
from transport.common.sklearn_images import load_digits
from transport.common.study import seeded
from transport.san import dcgan
from transport.san.judge import score, train_judge

pytestmark = pytest.mark.numeric

DOCS = Path(__file__).resolve().parents[3] / "docs/transport.md"
TINY = ["--iterations=2", "--every=1", "--seeds=1", "--judge-steps=3"]


def command(*args):
    return CliRunner().invoke(dcgan.main, [*TINY, *map(str, args)])


def test_scores():
    images, labels = load_digits()
    assert (images.min().item(), images.max().item()) == (-1, 1)
    judge, accuracy = train_judge(images, labels, steps=60)
    assert accuracy > 0.5
    same = score(judge, images, images)
    assert same.fid == approx(0, abs=1e-3)
    assert same[1:] == (1, 1, 10)
    ones = score(judge, images, images[labels == 1])
    assert ones.fid > 1
    assert ones.precision == 1
    assert ones.recall < 0.3
    assert ones.classes < 10


def test_default_is_the_published_protocol():
    config = dcgan.Config()
    assert (config.lr, config.beta1, config.beta2, config.batch, config.loss) == (1e-3, 0, 0.99, 128, "hinge")
    body, width = dcgan.discriminator_body(1, 8)
    convs = [module for module in body if isinstance(module, torch.nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [64, 128, 256]
    assert [hasattr(conv, "parametrizations") for conv in convs] == [False, True, True]
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in body)
    assert body(torch.zeros(2, 1, 8, 8)).shape == (2, width) == (2, 1024)


@pytest.mark.parametrize("norm", dcgan.NORMS)
@pytest.mark.parametrize(("channels", "resolution"), [(1, 8), (3, 16), (3, 32)])
def test_shapes(norm, channels, resolution):
    body, width = dcgan.discriminator_body(channels, resolution, norm)
    images = dcgan.Generator(channels, resolution, 3)(torch.zeros(2, dcgan.Z_DIM), torch.tensor([0, 2]))
    assert images.shape == (2, channels, resolution, resolution)
    assert body(images).shape == (2, width)


def test_gan_and_san_begin_alike():
    images, labels = (part[:32] for part in load_digits())
    config = dcgan.Config(batch=8)
    gan, san = (dcgan.Training(config, images, labels, "hinge", model, 3) for model in dcgan.MODELS)
    for a, b in ((gan.G, san.G), (gan.D.body, san.D.body)):
        assert all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert torch.equal(torch.rand(3, generator=gan.draws), torch.rand(3, generator=san.draws))


@pytest.mark.parametrize("loss", ["hinge", "wasserstein", "least-squares"])
@pytest.mark.parametrize("conditional", [False, True])
def test_measuring_changes_nothing(loss, conditional):
    images, labels = (part[:200] for part in load_digits())
    config = dcgan.Config(batch=8, conditional=conditional, norm="batch")
    training = dcgan.Training(config, images, labels, loss, "san", 0)
    training.iterate()
    before = {name: value.clone() for net in (training.G, training.D) for name, value in net.state_dict().items()}
    found = training.conditions(training.samples())
    after = {name: value for net in (training.G, training.D) for name, value in net.state_dict().items()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert -1 <= found.inner_product <= 1
    assert 0 <= found.separability <= 1
    assert 0 < found.pair_ratio <= 2
    assert found.stretch > 0
    assert found.slope > 0


def test_slope_and_direction_of_a_known_discriminator():
    """Features that are the pixels themselves, and w along the first of them: every number is known."""
    images, labels = (part[:64] for part in load_digits())
    training = dcgan.Training(dcgan.Config(batch=8), images, labels, "hinge", "gan", 0)
    training.D.body, training.D.last = torch.nn.Flatten(), torch.nn.Linear(64, 1)
    with torch.no_grad():
        training.D.last.weight.copy_(torch.nn.functional.one_hot(torch.tensor([0]), 64) * 3.0)
    fake = images.clone()
    fake[:, :, 0, 0] += 0.5                                     # The laws differ along the first pixel only.
    found = training.conditions(fake)
    assert found.inner_product == approx(-1)                    # w is large on generated images.
    assert found.gap == approx(0.5)
    assert found.separability == approx(1)
    assert (found.stretch, found.pair_ratio, found.slope) == (approx(1), approx(1), approx(3))


@pytest.mark.slow
def test_command_keeps_its_runs(tmp_path):
    data = f"--data={write_dataset(tmp_path / 'data.zip', 8, 40, 3)}"
    done = command(data, "--loss=hinge", f"--outdir={tmp_path}")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert line["hinge gan"]["iterations"] == [1, 2]
    assert (tmp_path / "samples.png").stat().st_size > 1000
    kept = tmp_path / "runs/hinge-gan-0.json"
    kept.write_text(kept.read_text().replace('"samples": [[[[', '"samples": [[[[7, 7, '))      # Not rectangular now.
    done = command(data, f"--outdir={tmp_path}")
    assert done.exit_code == 2
    assert "hinge-gan-0.json: damaged" in done.output
    kept.unlink()
    done = command(data, "--seeds=2", f"--outdir={tmp_path}")
    assert done.exit_code == 0, done.output
    assert "hinge san, seed 0" not in done.stderr               # It is there already; the deleted one is made anew.
    again = json.loads(done.stdout)
    assert [again[f"hinge {model}"]["fid"][0] for model in dcgan.MODELS] == [
        line[f"hinge {model}"]["fid"][0] for model in dcgan.MODELS]
    assert again["hinge san"]["fid_std"][0] >= 0
    shutil.move(tmp_path / "data.zip", tmp_path / "moved.zip")      # The same images elsewhere, then others there.
    done = command(f"--data={tmp_path}/moved.zip", f"--outdir={tmp_path}")
    assert (done.exit_code, "seed 0, step" in done.stderr) == (0, False)
    write_dataset(tmp_path / "data.zip", 8, 40, 3, seed=1)
    done = command(data, f"--outdir={tmp_path}")
    assert done.exit_code == 2
    assert "was made with data=images with the hash" in done.output
    data = f"--data={tmp_path}/moved.zip"
    done = command(data, "--norm=batch", f"--outdir={tmp_path}")
    assert done.exit_code == 2
    assert "norm=spectral, not norm=batch" in done.output


@pytest.mark.parametrize(("change", "problem"), [
    (lambda record: record["history"].pop(), "lacks measurements"),
    (lambda record: record["history"][0][1].__setitem__(0, float("nan")), "nan is no finite number"),
    (lambda record: record["history"][0][2].__setitem__(0, "0.5"), "'0.5' is no finite number"),
    (lambda record: record.update(samples=[[[[300]]]]), "300"),
    (lambda record: record.update(samples=[]), "no samples"),
    (lambda record: record.update(run=["hinge", "gan", 0]), "it is of the run"),
])
def test_kept_runs_are_believed_as_little_as_other_files(tmp_path, change, problem):
    config = dcgan.Config(iterations=3, every=2)
    score, conditions = dcgan.Score(1, 1, 1, 1), dcgan.Conditions(*[0.5] * 7)
    run = dcgan.Run("hinge", "san", 0, [dcgan.Measurement(i, score, conditions) for i in (2, 3)],
                    np.zeros((2, 8, 8, 1), dtype=np.uint8))
    settings, path = dcgan.settings_of(config, *load_digits()), tmp_path / "run.json"
    dcgan.save_run(settings, run, path)
    assert dcgan.load_run(config, settings, path, "hinge", "san", 0).history == run.history
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"run.json: damaged .*{problem}.*delete it to have the run made again"):
        dcgan.load_run(config, settings, path, "hinge", "san", 0)


def test_data_that_are_too_few(tmp_path):
    done = command(f"--data={write_dataset(tmp_path / 'few.zip', 8, 7, 2)}")
    assert (done.exit_code, "has 7 images, but this study compares its halves and needs 8" in done.output) == (2, True)
    done = command(f"--data={write_dataset(tmp_path / 'rare.zip', 8, 9, 9)}", "--conditional=true")
    assert (done.exit_code, "--conditional=true: of class 0, 1, " in done.output) == (2, True)


def test_a_folder_that_cannot_be_made_is_said_before_the_work(tmp_path):
    done = command(f"--outdir={__file__}")
    assert (done.exit_code, "step 1" in done.output) == (2, False)


def test_images_of_an_archive(tmp_path):
    data = write_dataset(tmp_path / "colour.zip", 16, 12, 3)
    images, labels = dcgan.load_images(str(data))
    assert images.shape == (12, 3, 16, 16)
    assert -1 <= images.min() < images.max() <= 1
    assert labels.max() == 2
    done = command(f"--data={write_dataset(tmp_path / 'large.zip', 64, 4, 2)}")
    assert done.exit_code == 2
    assert "64 pixels" in done.output


def test_documented_conversion_trains():
    (diff,) = re.findall(r"```diff\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    for sign, layer in (("-", torch.nn.Linear), ("+", SanLinear)):
        lines = [line[1:] for line in diff.splitlines() if line[:1] in (" ", sign, "")]
        names: dict = {"body": dcgan.discriminator_body(1, 8)[0]}
        exec("\n".join(lines), names)       # The documentation's own words.
        D, G = names["D"], dcgan.Generator(1, 8)
        assert type(D.last) is layer
        optimizers = [torch.optim.Adam(net.parameters(), 1e-3) for net in (D, G)]
        images, draws = load_digits()[0][:16], seeded(0, "docs")
        before = [[p.clone() for p in net.parameters()] for net in (D, G)]
        for _ in range(2):
            z = torch.randn(16, dcgan.Z_DIM, generator=draws)
            names["train_step"](D, G, *optimizers, images, z)
        for net, start in zip((D, G), before, strict=True):
            # Biases do not count: the last one of a hinge discriminator is pulled up and down alike.
            assert all((p != q).any() for p, q in zip(net.parameters(), start, strict=True) if p.ndim > 1)
        if layer is SanLinear:
            assert D.last.weight.norm().item() == approx(1)
    assert sum(line.startswith("+") for line in diff.splitlines()) == 4     # An import, and the three lines.
