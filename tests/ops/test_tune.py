# SPDX-License-Identifier: Apache-2.0
"""The choice of the fastest form, with a clock that says what the test wants: on processors nothing is tuned else."""
import functools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import torch_utils.ops.filtered_lrelu as module
import torch_utils.ops.modulated_conv2d as conv
from dnnlib import UserError
from tests import needs_cuda
from tests.ops.cases import needs_compiler, randn, use_programs_of_gpu
from torch_utils.ops import compilation, dispatch, tune
from torch_utils.ops.filtered_lrelu import candidates, filtered_lrelu, filtered_lrelu_matrix

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
FORMS = {"first": lambda: "first", "second": lambda: "second", "third": lambda: "third"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own, and no choices yet."""
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path))
    monkeypatch.delenv("STYLESAN_TUNE", raising=False)
    monkeypatch.setattr(tune, "_current", {})
    return tmp_path / "tuned"


class Clock:
    """The cost of each form by its name, seconds or (seconds, bytes); counts what was timed."""

    def __init__(self, **seconds):
        self.seconds, self.timed = seconds, []

    def __call__(self, form):
        name = form()
        self.timed.append(name)
        if isinstance(self.seconds[name], Exception):
            raise self.seconds[name]
        cost = self.seconds[name]
        return tune.Cost(*cost) if isinstance(cost, tuple) else tune.Cost(cost)


def test_the_fastest_is_chosen_and_timed_once(folder):
    choices, clock = tune.open_choices(CPU), Clock(first=3.0, second=1.0, third=2.0)
    assert choices.describe() == f"tuned: 0 choices of cpu from {choices.store.path}, new shapes are timed"
    assert [choices.choose("a call", FORMS, clock) for _ in range(3)] == ["second"] * 3
    assert clock.timed == ["first", "second", "third"]
    assert choices.values == {"a call": "second"}
    # The key is what is looked up; the other arguments are only made for a new one.
    forms = [choices.fastest(7, lambda: "a call", lambda: FORMS, clock)]
    forms.append(choices.fastest(7, None, None, None))
    assert forms == [FORMS["second"]] * 2
    assert choices.choose("with one form", {"first": FORMS["first"]}, None) == "first"
    assert list(choices.values) == ["a call"]


def test_only_what_is_faster_replaces_the_default(folder):
    """Two forms that take the same would else be chosen by chance, now the one and now the other."""
    choices = tune.open_choices(CPU)
    assert choices.choose("a call", FORMS, Clock(first=1.0, second=0.96, third=0.97)) == "first"
    assert choices.choose("another", FORMS, Clock(first=1.0, second=0.97, third=0.94)) == "third"


def test_memory_for_the_gradient_counts(folder):
    """How large a micro-batch may be must not depend much on what is chosen."""
    choices = tune.open_choices(CPU)
    assert choices.choose("a call", FORMS, Clock(first=(3.0, 100), second=(1.0, 151), third=(2.0, 150))) == "third"
    assert choices.choose("another", FORMS, Clock(first=(3.0, 100), second=(1.0, 151), third=(2.9, 90))) == "first"
    broken = RuntimeError("the default does not run")
    assert choices.choose("a third", FORMS, Clock(first=broken, second=(1.0, 201), third=(2.0, 200))) == "second"


def test_without_memory_or_broken_is_out(folder):
    choices = tune.open_choices(CPU)
    clock = Clock(first=torch.OutOfMemoryError("no memory"), second=2.0, third=RuntimeError("too many taps"))
    assert choices.choose("a call", FORMS, clock) == "second"
    clock = Clock(**dict.fromkeys(FORMS, torch.OutOfMemoryError("no memory")))
    assert choices.choose("a large call", FORMS, clock) == "first"      # It says itself what is wrong.
    assert list(choices.store.read()) == ["a call"]
    with pytest.raises(ValueError, match="a mistake"):
        choices.choose("a wrong call", FORMS, Clock(first=ValueError("a mistake")))


IN_ANOTHER_PROCESS = """
import torch
from torch_utils.ops import tune
choices = tune.open_choices(torch.device("cpu"))
print(choices.choose("a call", {"first": 1, "second": 2}, None), len(choices._kept))
"""


@pytest.mark.slow
def test_choices_are_kept(folder):
    """In a file of plain text, for other processes."""
    tune.open_choices(CPU).choose("a call", FORMS, Clock(first=3.0, second=1.0, third=2.0))
    done = subprocess.run([sys.executable, "-c", IN_ANOTHER_PROCESS], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={"STYLESAN_CACHE": str(folder.parent), "PATH": "/usr/bin:/bin"})
    assert done.stdout.split() == ["second", "1"], done.stderr
    (path,) = folder.glob("*.json")
    assert json.loads(path.read_text())["choices"] == {
        "a call": {"form": "second", "microseconds": {"first": 3e6, "second": 1e6, "third": 2e6},
                   "kept bytes": {"first": 0, "second": 0, "third": 0}}}
    assert torch.__version__ in path.name
    assert compilation.cpu_target().name in path.name


def test_processes_add_to_one_file(folder):
    """What two wrote at the same time is all there; of one call the first choice stays, and each process keeps its
    own."""
    both = [tune.open_choices(CPU) for _ in range(2)]
    for number, choices in enumerate(both):
        choices.choose(f"call {number}", FORMS, Clock(first=3.0, second=1.0, third=2.0))
        choices.choose("a call", FORMS, Clock(first=3.0, second=1.0 + 9 * number, third=2.0))
    assert [choices.values["a call"] for choices in both] == ["second", "third"]
    assert tune.open_choices(CPU).store.read() == {"a call": "second", "call 0": "second", "call 1": "second"}
    assert not list(folder.glob(".*.tmp"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"choices": 3}', '{"choices": {"a call": "second"}}',
                                     '{"choices": {"a call": {"form": 7}}}'])
def test_a_damaged_file_does_not_count(folder, content, capsys):
    path = tune.Store(CPU).path
    folder.mkdir()
    path.write_text(content)
    choices = tune.open_choices(CPU)
    err = capsys.readouterr().err
    assert err.startswith(f"tuned: {path} is damaged and does not count (")
    assert err.count("\n") == 1
    assert choices.choose("a call", FORMS, Clock(first=3.0, second=2.0, third=1.0)) == "third"
    assert tune.Store(CPU).read() == {"a call": "third"}


def test_a_folder_that_cannot_be_written_is_told_once(folder, capsys):
    folder.write_text("in the way")
    choices = tune.open_choices(CPU)
    capsys.readouterr()
    for name in ("a call", "another"):
        assert choices.choose(name, FORMS, Clock(first=1.0, second=2.0, third=3.0)) == "first"
    assert capsys.readouterr().err.count("choices are not kept") == 1


def test_switched_off(folder, monkeypatch):
    tune.open_choices(CPU).choose("a call", FORMS, Clock(first=3.0, second=1.0, third=2.0))
    monkeypatch.setenv("STYLESAN_TUNE", "0")
    choices = tune.open_choices(CPU)
    assert choices.describe() == "tuned: off (STYLESAN_TUNE=0)"
    assert choices.choose("a call", FORMS, None) == "first"
    monkeypatch.setenv("STYLESAN_TUNE", "no")
    for call in (lambda: tune.open_choices(CPU), lambda: tune.describe("cpu"), lambda: tune.describe("cuda")):
        with pytest.raises(UserError, match="STYLESAN_TUNE=no: choose from 1 .* and 0"):
            call()


def test_a_closed_set_times_nothing(folder, capsys):
    """It knows what another set found; new shapes and forms that are gone take the default."""
    found = tune.open_choices(CPU)
    found.choose("a call", FORMS, Clock(first=3.0, second=1.0, third=2.0))
    sent = json.loads(json.dumps(found.values))
    choices = tune.Choices(sent, origin="as this run was started")
    assert choices.describe() == "tuned: as this run was started"
    assert choices.choose("a call", FORMS, None) == "second"
    assert choices.choose("another", FORMS, None) == "first"
    assert choices.values == sent
    assert choices.choose("a call", {"first": 1, "third": 3}, None) == "first"
    assert "a call: there is no form 'second' any more, the default 'first' is taken" in capsys.readouterr().err
    assert tune.open_choices(CPU).choose("another", FORMS, Clock(first=3.0, second=1.0, third=2.0)) == "second"


def test_threads_agree(folder):
    """Both time, since none waits for the other, and take what the first one found."""
    choices, both_time = tune.open_choices(CPU), threading.Barrier(2, timeout=60)
    found = []

    def run(fastest):
        def seconds(form):
            if form() == "first":
                both_time.wait()
            return tune.Cost(1.0 if form() == fastest else 2.0)
        found.append(choices.choose("a call", FORMS, seconds))

    threads = [threading.Thread(target=run, args=[name]) for name in ("second", "third")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(set(found)) == 1
    assert choices.values == {"a call": found[0]}

#----------------------------------------------------------------------------
# The filtered leaky ReLU on a device where forms are timed, which a processor plays here.

@pytest.fixture
def clock(folder, monkeypatch):
    """Seconds of native code and of matrices, to be changed, and how often one was timed."""
    clock = {"cpu": 2.0, "matrix": 1.0, "timed": 0}

    def seconds_of(call, device):
        call()
        clock["timed"] += 1
        return clock["cpu" if clock["timed"] % 2 else "matrix"]

    monkeypatch.setattr(tune, "KINDS", ("cpu",))
    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    return clock


F = torch.hann_window(14, periodic=False)[1:-1] / 6.5


def layer(x, b=None, impl="auto"):
    return filtered_lrelu(x, F, F, b, up=2, down=2, padding=[9, 8, 9, 8], clamp=0.8, impl=impl)


@needs_compiler
def test_the_layer_takes_the_fastest_form(clock, monkeypatch):
    x, b = randn(2, 19, 21, 23, dtype=torch.float32), randn(19, dtype=torch.float32)
    before = torch.get_rng_state()
    forms = {"cpu": layer(x, b, "cpu"), "matrix": layer(x, b, "matrix") + 1}    # So that it shows which one it was.
    monkeypatch.setattr(module, "filtered_lrelu_matrix", lambda *args: filtered_lrelu_matrix(*args) + 1)
    assert clock["timed"] == 0
    for _ in range(2):
        assert torch.equal(layer(x, b), forms["matrix"])
        assert clock["timed"] == 2
    clock["cpu"] = 0.5
    assert torch.equal(layer(x, b), forms["matrix"])        # As chosen.
    assert torch.equal(layer(x[:1], b), forms["cpu"][:1])
    assert torch.equal(layer(torch.cat([x[:1]] * 3), b)[:1], forms["matrix"][:1])       # As two: without a gradient.
    name = "filtered_lrelu <=4x19x21x23 float32, 19 float32; up 2, down 2, padding 9,8,9,8, up taps 12, down taps 12"
    assert tune.current(CPU).values == {name: "matrix", name.replace(" <=4x", " 1x"): "cpu"}
    assert tune.describe(CPU).startswith("tuned: 0 choices of cpu from")
    tune.use(CPU, None)
    ops, tuned = dispatch.start_lines(CPU).splitlines()
    assert ops == "ops: cpu native"
    assert tuned.startswith("tuned: 2 choices of cpu from")
    assert torch.equal(layer(x, b), forms["matrix"])
    assert clock["timed"] == 4
    filtered_lrelu(x, b=b)      # An activation alone has one form.
    assert clock["timed"] == 4
    assert torch.equal(torch.get_rng_state(), before)


@needs_compiler
def test_with_a_gradient_both_passes_are_timed(clock, monkeypatch):
    """On values of the inputs: nothing is left in their graph."""
    x, b = randn(2, 19, 21, 23, dtype=torch.float32).requires_grad_(), randn(19, dtype=torch.float32).requires_grad_()
    passes, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: passes.append(args) or grad(*args))
    y = layer(x.square().to(memory_format=torch.channels_last), b)
    (name,) = tune.current(CPU).values
    assert name.startswith("filtered_lrelu 2x19x21x23 float32 channels-last gradient, 19 float32 gradient; up 2")
    assert [len(wanted) for _, wanted, _ in passes] == [2, 2]
    monkeypatch.undo()
    y.sum().backward()
    wanted = torch.autograd.grad(layer(x.square(), b, "matrix").sum(), [x, b])
    assert torch.equal(x.grad, wanted[0])
    assert torch.equal(b.grad, wanted[1])


@needs_compiler
def test_without_a_gradient_only_the_forward_pass_is(clock, monkeypatch):
    monkeypatch.setattr(torch.autograd, "grad", None)
    x = randn(2, 19, 21, 23, dtype=torch.float32).requires_grad_()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x.clone())
    assert clock["timed"] == 2
    (name,) = tune.current(CPU).values
    assert name.startswith("filtered_lrelu <=4x19x21x23 float32, none; up 2")


@needs_compiler
def test_programs_of_native_code_are_candidates(monkeypatch):
    """Forward and backward."""
    called = use_programs_of_gpu(monkeypatch, fast=True)
    x, f = randn(1, 3, 9, 8).requires_grad_(), randn(12, seed=1)
    arguments = 2, 2, (9, 8, 9, 8), 1.0, 0.2, None, False
    forms, found = candidates(x, f, f, *arguments), {}
    assert list(forms) == ["cpu", "cpu general", "matrix"]
    for name, form in forms.items():
        called.clear()
        form(x, f, f, None, *arguments).sum().backward()
        found[name] = list(called)
    assert found == {"cpu": ["22", "22"], "cpu general": ["filtered_lrelu"] * 2, "matrix": []}
    assert list(candidates(x, f, f, 2, 2, (10, 8, 10, 8), 1.0, 0.2, None, False)) == ["cpu", "matrix"]


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_convolution_takes_the_fastest_form(folder, monkeypatch, kernel):
    """The default and those that may be faster on a GPU are timed; the choice stays in the layout of the input."""
    timed = []
    def seconds_of(call, device):
        call()
        timed.append(1.0 + (len(timed) + 3) % 5)        # The third is the fastest.
        return timed[-1]
    monkeypatch.setattr(tune, "KINDS", ("cpu",))
    monkeypatch.setattr(tune, "seconds_of", seconds_of)
    x = randn(2, 11, 9, 9, dtype=torch.float32).to(memory_format=torch.channels_last).requires_grad_()
    weight, styles = randn(5, 11, kernel, kernel, dtype=torch.float32).requires_grad_(), torch.ones(2, 11)
    arguments = x, weight, styles, True, kernel - 1, torch.ones([])
    forms = ["shared", *(name for name in conv.forms_for("cpu", x, weight, kernel - 1) if name in conv.TIMED)]
    for _ in range(2):
        y = conv.modulated_conv2d(*arguments)
        assert len(timed) == len(forms)
    assert list(tune.current(CPU).values.values()) == [forms[2]] == ["grouped"]
    assert torch.equal(y, conv.modulated_conv2d(*arguments, impl="grouped"))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is None
    assert weight.grad is None


def test_the_clock():
    x = randn(4, 4).requires_grad_()
    trial = tune.Trial(lambda x, b: x * 2, (x, None))
    assert 0 < tune.seconds_of(trial, CPU) < 60
    assert tune.kept_bytes(trial, CPU) == 0
    assert x.grad is None


def test_long_calls_are_timed_once(monkeypatch):
    """After one that does not count: of many forms some take long."""
    calls = []
    for limit, count in ((0.0, 2), (1e9, 2 + tune.REPEATS)):
        monkeypatch.setattr(tune, "LONG_SECONDS", limit)
        calls.clear()
        tune.seconds_of(lambda: calls.append(0), CPU)
        assert len(calls) == count


@pytest.mark.gpu
@needs_cuda
def test_the_clock_of_a_gpu():
    """Twice the work takes longer, and what is kept for the gradient is counted."""
    device = torch.device("cuda")
    x = torch.randn(64, 1 << 20, device=device).requires_grad_()
    once, thrice = (tune.Trial(lambda x, n=n: functools.reduce(lambda y, _: y * y, range(n), x), (x,)) for n in (1, 3))
    assert tune.seconds_of(thrice, device) > 1.5 * tune.seconds_of(once, device) > 0
    assert [tune.kept_bytes(trial, device) for trial in (once, thrice)] == [x.nbytes, 3 * x.nbytes]
    with torch.no_grad():
        assert tune.kept_bytes(tune.Trial(lambda x: x * x, (x,)), device) == 0
    assert x.grad is None


def test_nothing_is_tuned_on_processors(folder):
    layer(randn(1, 3, 9, 8))
    assert not tune._current
    assert tune.describe("cpu") is None
    assert dispatch.start_lines("cpu") == dispatch.describe("cpu")
    assert not folder.exists()
