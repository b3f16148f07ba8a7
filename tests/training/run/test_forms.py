# SPDX-License-Identifier: Apache-2.0
"""Forms of operations in a run: found out before the first iteration without a trace, fixed, and recorded.

On processors nothing is timed; here one plays a GPU, with a clock that says what is faster.
"""
import copy
import dataclasses
import json
import math
import random
import re
import types

import numpy as np
import pytest
import torch

from dnnlib import UserError
from tests.ops.cases import needs_compiler
from tests.training.group_run import small_config
from tests.training.test_loop import assert_equal_states, only_run, train
from torch_utils import checkpoint
from torch_utils.ops import tune
from training.config import LossConfig
from training.networks_stylegan3 import Generator
from training.run.folder import OPTIONS_FILE, PREVIOUS_STATE_FILE, RUN_INFO, STATE_FILE
from training.run.formats import STATE_FORMAT
from training.run.forms import path_length_samples, rehearse, settle_forms
from training.trainer import Progress

CPU = torch.device("cpu")

pytestmark = needs_compiler


@pytest.fixture
def timed(tmp_path, monkeypatch):
    """A cache folder of the test's own; how often a form was timed. The last candidate is the fastest, or with
    `is_slower` the first."""
    class Timed(list):
        is_slower = False

    timed = Timed()

    def seconds_of(call, device):
        call()
        timed.append(call)
        return math.exp((1 if timed.is_slower else -1) * len(timed) / 5)

    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("STYLESAN_TUNE", raising=False)
    monkeypatch.delenv("STYLESAN_OPS", raising=False)
    monkeypatch.setattr(tune, "_current", {})
    monkeypatch.setattr(tune, "KINDS", ("cpu",))
    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    return timed


def generator(config) -> Generator:
    torch.manual_seed(0)
    return Generator(config.generator).train().requires_grad_(False)


def trainer_of(config, G: Generator | None, **forms: str) -> types.SimpleNamespace:
    """What `settle_forms` needs of a trainer."""
    return types.SimpleNamespace(config=config, device=CPU, G=G, forms=forms, progress=Progress())


def test_a_rehearsal_leaves_no_trace(timed):
    config = small_config()
    G = generator(config)
    before = copy.deepcopy(G.state_dict())
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    rehearse(G, config)
    assert len(timed) > 0
    assert_equal_states(G.state_dict(), before)
    assert all(p.grad is None and not p.requires_grad for p in G.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]


def test_a_rehearsal_has_all_calls_of_an_iteration(timed):
    """Micro-batches with and without gradient, and the path lengths' part of one with it."""
    config = small_config()
    G, per_layer = generator(config), {}
    timed.is_slower = True
    rehearse(G, config)
    for name in tune.current(CPU).values:
        size = int(re.match(r"\w+ (?:<=)?(\d+)x", name)[1])       # Without a gradient 4 stands for 2 to 4.
        layer = re.sub(rf"(<=|\b){size}x", "", name).replace(" gradient", "")
        per_layer.setdefault(layer, []).append((size, " gradient" in name))
    assert len(per_layer) >= 6
    assert {layer.split()[0] for layer in per_layer} == {"filtered_lrelu", "modulated_conv2d"}
    for layer, calls in per_layer.items():
        assert sorted(calls) == [(2, True), (4, False), (4, True)], layer


def test_samples_of_path_lengths():
    config = small_config()
    G = generator(config)
    for batch_gpu, group, shrink, want in ((8, 0, 2, 4), (1, 0, 2, 1), (8, 4, 2, 4), (8, 2, 4, 4)):
        config = small_config(batch_gpu=batch_gpu, loss=LossConfig(pl_batch_shrink=shrink))
        config = dataclasses.replace(config, discriminator=dataclasses.replace(config.discriminator, ghost_batch=group))
        # As training.loss chooses them.
        count = max((group or batch_gpu) // shrink, 1)
        assert len([k for k in range(batch_gpu) if k % (group or batch_gpu) < count]) == want
        assert path_length_samples(G, config) == want
    assert path_length_samples(G, small_config(loss=LossConfig(pl_weight=0.0))) == 0


def test_switched_off(timed, monkeypatch, tmp_path):
    monkeypatch.setenv("STYLESAN_TUNE", "0")
    config, said = small_config(), []
    G = generator(config)
    trainer = trainer_of(config, G)
    settle_forms(trainer, tmp_path, False, said.append)
    assert said == ["tuned: off (STYLESAN_TUNE=0)"]
    assert trainer.forms == {}
    rehearse(G, config)
    assert not timed


def test_the_next_stage_chooses_anew(timed, tmp_path):
    """What a stage was trained with is fixed for that stage only."""
    counts = []
    for batch_gpu in (4, 8, 8):
        config = small_config(batch_gpu=batch_gpu)
        G = generator(config)
        trainer = trainer_of(config, G)
        settle_forms(trainer, tmp_path, False, print)
        rehearse(G, small_config(batch_gpu=2))      # Fixed: other sizes are not timed.
        counts.append(len(timed))
    assert 0 < counts[0] < counts[1] == counts[2]   # The third knows its sizes from the file.


def test_on_processors_nothing_happens(timed, monkeypatch, tmp_path):
    monkeypatch.setattr(tune, "KINDS", ("cuda",))
    trainer = trainer_of(small_config(), None, **{"a call": "matrix"})
    settle_forms(trainer, tmp_path, False, print)
    assert trainer.forms == {"a call": "matrix"}      # The run began on a GPU, and may return to one.
    monkeypatch.setenv("STYLESAN_TUNE", "no")
    with pytest.raises(UserError, match="STYLESAN_TUNE=no"):
        settle_forms(trainer, tmp_path, False, print)
    assert not tune._current


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data16):
    """A run of 24 images with native code, which is the default."""
    outdir = tmp_path_factory.mktemp("unbroken")
    train(outdir, data16, "--kimg=0.024", "--tick=0.008", "--snap=1")
    return checkpoint.load(only_run(outdir) / STATE_FILE, STATE_FORMAT)


@pytest.mark.slow
def test_a_run_keeps_the_forms_it_was_started_with(timed, data16, tmp_path):
    """Continued, it takes them although the cache says something else, times nothing, and gives the same bits."""
    options = "--tick=0.008", "--snap=1"
    output = train(tmp_path / "whole", data16, "--kimg=0.024", *options)
    assert "tuned: 0 choices of cpu from" in output
    assert "new shapes are timed" in output
    want = checkpoint.load(only_run(tmp_path / "whole") / STATE_FILE, STATE_FORMAT)
    of_layers = {name: form for name, form in want["forms"].items() if name.startswith("filtered_lrelu")}
    assert set(of_layers.values()) == {"matrix"}

    folder = tmp_path / "cut"
    train(folder, data16, "--kimg=0.008", *options)
    record = json.loads((only_run(folder) / OPTIONS_FILE).read_text())[RUN_INFO]
    assert record["forms"] == want["forms"]
    store, before = tune.Store(CPU), len(timed)
    store.path.write_text(store.path.read_text().replace('"form": "matrix"', '"form": "cpu"'))
    assert store.read() == want["forms"] | dict.fromkeys(of_layers, "cpu")
    output = train(folder, data16, "--kimg=0.024", *options)
    assert f"tuned: as this run was started ({len(want['forms'])} choices)" in output
    assert len(timed) == before
    found = checkpoint.load(only_run(folder) / STATE_FILE, STATE_FORMAT)
    assert_equal_states(found, want)
    assert json.loads((only_run(folder) / OPTIONS_FILE).read_text())[RUN_INFO]["forms"] == want["forms"]
    # A new run takes what the cache says. (The other form leaves other layouts to the layers behind it.)
    cached = store.read()
    train(tmp_path / "new", data16, "--kimg=0.008", *options)
    new = checkpoint.load(only_run(tmp_path / "new") / STATE_FILE, STATE_FORMAT)["forms"]
    assert {form for name, form in new.items() if name in cached and name.startswith("filtered_lrelu")} == {"cpu"}


@pytest.mark.slow
def test_an_older_run_takes_the_defaults(timed, data16, tmp_path, unbroken, monkeypatch):
    """Its state has no choices: what it computed so far was native code."""
    options = "--tick=0.008", "--snap=1"
    monkeypatch.setattr(tune, "KINDS", ("cuda",))
    train(tmp_path, data16, "--kimg=0.008", *options)
    folder = only_run(tmp_path)
    for name in (STATE_FILE, PREVIOUS_STATE_FILE):
        state = checkpoint.load(folder / name, STATE_FORMAT)
        del state["forms"]
        checkpoint.save(folder / name, state)
    monkeypatch.setattr(tune, "KINDS", ("cpu",))
    assert "tuned: as this run was started (0 choices)" in train(tmp_path, data16, "--kimg=0.024", *options)
    assert not timed
    ended = checkpoint.load(folder / STATE_FILE, STATE_FORMAT)
    assert_equal_states(ended | {"options": None}, unbroken | {"options": None})      # The record tells of the start.
