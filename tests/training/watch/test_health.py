# SPDX-License-Identifier: Apache-2.0
"""Variety, collapse and verdicts: the parts, and whole runs with an injected fault."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import training.trainer
from legacy import open_snapshot
from tests.closeness import approx
from tests.conftest import write_dataset
from tests.training.test_loop import SMALL, only_run
from train import main
from training.dataset import ImageDataset
from training.run.snapshots import snapshot_name
from training.watch.health import EXIT_COLLAPSE, CollapseWatch, DiversityProbe, Measures
from training.watch.html_report import read_lines

NAN = float("nan")

#----------------------------------------------------------------------------
# Diversity.

class Fake(torch.nn.Module):
    """A generator whose ws are z and c beside each other, which `picture` makes an image of."""

    def __init__(self, c_dim):
        super().__init__()
        self.c_dim, self.where = c_dim, torch.nn.Parameter(torch.zeros(()))

    def mapping(self, z, c, truncation_psi):
        return torch.cat([z, c], dim=1)

    def synthesis(self, ws, transform, style_offset):
        assert transform is None
        assert style_offset is None
        return self.picture(*ws.split([ws.shape[1] - self.c_dim, self.c_dim], dim=1))


class Copier(Fake):
    """Shows real images of the class that is asked for, chosen by z."""

    def __init__(self, dataset):
        super().__init__(dataset.c_dim)
        images = [torch.from_numpy(dataset[i][0]).float() / 127.5 - 1 for i in range(len(dataset))]
        self.images = [[images[i] for i in np.flatnonzero(dataset.labels == c)] for c in range(max(dataset.c_dim, 1))]

    def picture(self, z, c):
        classes = c.argmax(dim=1) if c.shape[1] else torch.zeros(len(z), dtype=torch.int64)
        chosen = [self.images[k][int(abs(float(v)) * 1e4) % len(self.images[k])]
                  for k, v in zip(classes.tolist(), z[:, 0], strict=True)]
        return torch.stack(chosen)


class Constant(Fake):
    """One picture per class."""

    def picture(self, z, c):
        return c.argmax(dim=1).float()[:, None, None, None].expand(-1, 3, 16, 16) / 10


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.numeric
def test_diversity_of_real_images_is_one_and_of_one_image_zero(tmp_path, labels):
    dataset = ImageDataset(write_dataset(tmp_path / "d.zip", 16, num_images=400), use_labels=labels)
    probe = DiversityProbe(dataset, dataset.c_dim, 4, 0, batch=8)
    assert probe.measure(Copier(dataset)) == pytest.approx(1, abs=0.25)
    if labels:                                  # Classes may differ as they like: variety is within a class.
        assert probe.measure(Constant(dataset.c_dim)) == 0
    other = DiversityProbe(dataset, dataset.c_dim, 4, 0, batch=5)
    assert other.measure(Copier(dataset)) == approx(probe.measure(Copier(dataset)), rel=1e-6)


def test_diversity_without_two_real_images_of_a_class_is_unknown(tmp_path):
    dataset = ImageDataset(write_dataset(tmp_path / "d.zip", 16, num_images=4, num_classes=4), use_labels=True)
    assert DiversityProbe(dataset, 4, 4, 0, 8).measure(Constant(4)) is None

#----------------------------------------------------------------------------
# Verdicts.

GOOD = Measures(0.8, 0.5, -0.5)


def verdicts(measures: list[Measures], first_step: int = CollapseWatch.WARMUP_STEPS,
             steps: int = CollapseWatch.PATIENCE_STEPS) -> list[list[tuple[str, bool]]]:
    """What is said at each of these ticks, `steps` iterations apart."""
    watch = CollapseWatch()
    return [[(v.name, v.is_bad) for v in watch.update(m, first_step + i * steps)] for i, m in enumerate(measures)]


@pytest.mark.parametrize(("bad", "name"), [
    (Measures(0.049, 0.5, -0.5), "collapse"),
    (Measures(NAN, 0.5, -0.5), "collapse"),
    (Measures(0.8, 0.995, -0.995), "pinned signs"),
    (Measures(0.8, 0.995, 0.995), "pinned signs"),
])
def test_one_verdict_per_illness_after_three_ticks(bad, name):
    assert verdicts([bad] * 3 + [bad] * 2 + [GOOD]) == [[], [], [(name, True)], [], [], [(name, False)]]
    assert not any(verdicts([bad, bad, GOOD] * 3))              # They are not in a row.
    short = verdicts([bad] * 13, steps=10)                      # Ticks of few iterations: three of them are too short.
    assert [i for i, said in enumerate(short) if said] == [10]


@pytest.mark.parametrize("good", [GOOD, Measures(0.05, 0.99, -0.99), Measures(0.8, 1, -0.9),
                                  Measures(None, None, None)])
def test_no_verdict_on_what_is_well(good):
    assert not any(verdicts([good] * 5))


def test_no_verdict_in_the_warm_up():
    bad = Measures(0.0, 1, -1)
    assert not any(verdicts([bad] * 5, first_step=0))
    assert len(verdicts([bad] * 4, CollapseWatch.WARMUP_STEPS - 1)[3]) == 2


def test_texts_hold_the_numbers():
    watch = CollapseWatch()
    said = [v for step in (500, 550, 600) for v in watch.update(Measures(0.012, 0.995, -1), step)]
    assert "0.012" in said[0].text
    assert "--glr" in said[0].text
    assert "+0.995" in said[1].text

#----------------------------------------------------------------------------
# Whole runs.

def run(outdir, data, *more):
    return CliRunner().invoke(main, [*SMALL, f"--outdir={outdir}", f"--data={data}", *more], catch_exceptions=False)


@pytest.fixture
def constant_generator(monkeypatch):
    """G_ema looks neither at z nor at the class."""
    monkeypatch.setattr(training.trainer, "update_ema",
                        lambda G_ema, *args: G_ema.mapping.fc0.weight.data.zero_())
    monkeypatch.setattr(CollapseWatch, "WARMUP_STEPS", 2)
    monkeypatch.setattr(CollapseWatch, "PATIENCE_STEPS", 2)


@pytest.mark.slow
def test_collapse_stops_the_run_when_asked_to(data16, tmp_path, constant_generator, reports):
    result = run(tmp_path, data16, "--kimg=0.8", "--tick=0.008", "--snap=100", "--on-collapse=stop")
    assert result.exit_code == EXIT_COLLAPSE == 5
    folder = only_run(tmp_path)
    lines = read_lines(folder / "stats.jsonl")
    assert [line["Progress/diversity"] for line in lines[1:]] == [0, 0, 0]
    assert lines[-1]["cur_nimg"] == 32                          # Warm-up 2, then three ticks: 2, 3, 4.
    (verdict,) = read_lines(folder / "health.jsonl")
    assert verdict["verdict"] == "collapse"
    assert verdict["cur_nimg"] == 32
    assert "VERDICT at kimg 0.0: collapse: images of one class are nearly the same" in result.output
    assert html_text(verdict["text"]) in (folder / "report.html").read_text()
    assert open_snapshot(folder / snapshot_name(32))["progress"]["cur_nimg"] == 32      # Saved before.


def html_text(text: str) -> str:
    return text.replace("'", "&#x27;")


@pytest.mark.slow
def test_collapse_is_told_once_and_the_run_goes_on(data16, tmp_path, constant_generator):
    result = run(tmp_path, data16, "--kimg=0.056", "--tick=0.008", "--snap=100")
    assert result.exit_code == 0
    assert result.output.count("VERDICT") == 1


@pytest.mark.slow
def test_nothing_is_said_of_a_healthy_run(data16, tmp_path, monkeypatch):
    monkeypatch.setattr(CollapseWatch, "WARMUP_STEPS", 0)
    monkeypatch.setattr(CollapseWatch, "PATIENCE_STEPS", 0)
    result = run(tmp_path, data16, "--kimg=0.048", "--tick=0.008", "--snap=100", "--on-collapse=stop")
    assert result.exit_code == 0
    assert "VERDICT" not in result.output
    folder = only_run(tmp_path)
    assert not (folder / "health.jsonl").exists()
    assert not list(folder.glob("nonfinite-*"))
    lines = read_lines(folder / "stats.jsonl")
    assert all(0.05 < line["Progress/diversity"] < 5 for line in lines)
    assert {line["Progress/nonfinite/G"] + line["Progress/nonfinite/D"] for line in lines} == {0}
