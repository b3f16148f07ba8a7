# SPDX-License-Identifier: Apache-2.0
"""What a run says before its first tick, by a clock that the test sets."""
import re

import pytest
import torch
from click.testing import CliRunner

from train import main
from training.watch.beginning import PATIENCE, Beginning

CPU = torch.device("cpu")


class Clock:
    """Stands still unless it is moved."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def started():
    """(what was said, the clock, a run whose first iteration begins)."""
    said, clock = [], Clock()
    return said, clock, Beginning(said.append, CPU, clock)


def test_a_step_is_named_before_it_begins(started):
    said, clock, beginning = started
    with beginning.step("making the networks"):
        assert said == ["making the networks ..."]
        clock.now += 12.34
    with beginning.step("something short"):
        clock.now += 0.9
    assert said[1:] == ["    took 12.3 s", "something short ..."]


def test_first_iteration_and_speed(started):
    said, clock, beginning = started
    beginning.train(chooses_algorithms=True)
    assert "--nobench=1" in said.pop()
    for seconds in (9.0, 0.5):
        with beginning.phase("Gmain"):
            clock.now += seconds
    assert said == ["    first Gmain: 9.0 s"]       # Nothing is said of later runs.
    beginning.iteration(32, 2000)
    assert said.pop() == "first iteration done in 9.5 s; the first tick comes after 63 more"
    clock.now += 8
    beginning.iteration(32, 1968)
    assert len(said) == 1
    clock.now += PATIENCE
    beginning.iteration(32, 1936)
    # 64 images in 38 s; 1936 more take 1150 s.
    assert said.pop() == "3 iteration(s) in 48s, 1.68 images/s after the first; the first tick comes in about 19m 10s"


def test_lines_become_rare(started):
    said, clock, beginning = started
    beginning.train(chooses_algorithms=False)
    for left in range(10_000, 0, -1):
        clock.now += 1
        beginning.iteration(1, left)
    assert said[0] == "first iteration ..."
    seconds = [int(line.split()[0]) for line in said[2:]]       # An iteration takes one.
    assert seconds == [PATIENCE * 2 ** k for k in range(9)]


def test_a_first_iteration_that_is_long(started):
    said, clock, beginning = started
    beginning.train(chooses_algorithms=False)
    clock.now += 2 * PATIENCE
    beginning.iteration(8, 8)
    assert said[1:] == ["first iteration done in 60.0 s; the first tick comes after 1 more", "1 iteration(s) in 1m 00s"]


def test_nothing_is_said_after_the_first_tick(started):
    said, clock, beginning = started
    beginning.train(chooses_algorithms=False)
    beginning.iteration(8, 0)
    assert said[1:] == ["first iteration done in 0.0 s; the first tick comes now"]
    beginning.tick()
    clock.now += 1e6
    beginning.iteration(8, 100)
    assert len(said) == 2
    with beginning.phase("Greg"):       # Path lengths begin after a million images, and their first run is long, too.
        clock.now += 3
    assert said[2:] == ["    first Greg: 3.0 s"]


@pytest.mark.slow
def test_a_run_says_what_it_is_doing(data16, tmp_path):
    result = CliRunner().invoke(main, ["--cfg=stylegan3-t", "--preset=demo", "--cbase=64", "--cmax=8", "--batch=8",
                                       "--device=cpu", "--workers=0", "--metrics=none", "--backbones=local:random",
                                       f"--data={data16}", "--cond=1", f"--outdir={tmp_path}", "--kimg=0.016",
                                       "--tick=0.016", "--feature-precision=tf32"], catch_exceptions=False)
    (folder,) = tmp_path.iterdir()
    log = (folder / "log.txt").read_text()
    places = [re.search(pattern, log, re.MULTILINE) for pattern in (
        "^preparing the operations", "^device cpu", "^making the networks", "class vectors: features of 16 images",
        "^NOTE: --feature-precision=tf32 has an effect on GPUs only: here it is fp32", "^reading some real images",
        r"^first snapshot \(metrics: none\)", "^training for", r"^first iteration \.\.\.", "first Gmain: ",
        "first Dmain: ", "^first iteration done in .* after 1 more", "^tick 1 ")]
    assert None not in places, log
    assert [place.start() for place in places] == sorted(place.start() for place in places)
    assert log.strip() in result.output
