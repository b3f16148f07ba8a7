"""The DCGAN of the digits: scores, the command, and the conversion that the documentation shows."""
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tests.closeness import approx
from training.discriminators.san import SanLinear
from transport.common.sklearn_images import load_digits
from transport.common.study import seeded
from transport.san import dcgan

pytestmark = pytest.mark.numeric

DOCS = Path(__file__).resolve().parents[3] / "docs/transport.md"


def test_scores():
    images, labels = load_digits()
    assert (images.min().item(), images.max().item()) == (-1, 1)
    judge, accuracy = dcgan.train_judge(images, labels, steps=60)
    assert accuracy > 0.5
    same = dcgan.score(judge, images, images)
    assert same.fid == approx(0, abs=1e-3)
    assert same[1:] == (1, 1, 10)
    ones = dcgan.score(judge, images, images[labels == 1])
    assert ones.fid > 1
    assert ones.precision == 1
    assert ones.recall < 0.3
    assert ones.classes < 10


def test_command(tmp_path):
    args = ["--iterations=2", "--seeds=2", "--judge-steps=3", f"--outdir={tmp_path}"]
    done = CliRunner().invoke(dcgan.main, args)
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert len(line["gan_fid"]) == len(line["san_fid"]) == 2
    assert line["san_fid_std"] >= 0
    assert (tmp_path / "digits.png").stat().st_size > 1000


def test_documented_conversion_trains():
    (diff,) = re.findall(r"```diff\n(.*?)```", DOCS.read_text(), flags=re.DOTALL)
    for sign, layer in (("-", torch.nn.Linear), ("+", SanLinear)):
        lines = [line[1:] for line in diff.splitlines() if line[:1] in (" ", sign, "")]
        names: dict = {"body": dcgan.discriminator_body()[0]}
        exec("\n".join(lines), names)       # The documentation's own words.
        D, G = names["D"], dcgan.generator()
        assert type(D.last) is layer
        optimizers = [torch.optim.Adam(net.parameters(), 1e-3) for net in (D, G)]
        images, draws = load_digits()[0][:16], seeded(0, "docs")
        before = [[p.clone() for p in net.parameters()] for net in (D, G)]
        for _ in range(2):
            names["train_step"](D, G, *optimizers, images, torch.randn(16, dcgan.Z_DIM, generator=draws))
        for net, start in zip((D, G), before, strict=True):
            # Biases do not count: the last one of a hinge discriminator is pulled up and down alike.
            assert all((p != q).any() for p, q in zip(net.parameters(), start, strict=True) if p.ndim > 1)
        if layer is SanLinear:
            assert D.last.weight.norm().item() == approx(1)
    assert sum(line.startswith("+") for line in diff.splitlines()) == 4     # An import, and the three lines.
