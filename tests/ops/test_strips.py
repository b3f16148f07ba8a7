# SPDX-License-Identifier: Apache-2.0
"""The GPU's fast programs for the layers of the recipes: what they are for, what they compute, what is compiled."""
import dataclasses
import functools
import json
import math
import re
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from dnnlib import UserError
from tests import needs_cuda
from tests.closeness import rel_error
from tests.ops.cases import bound, needs_compiler, randn, use_programs_of_gpu
from torch_utils.ops import compilation, dispatch, kernel_report, native, self_check, strips
from torch_utils.ops.descriptions import ACTIVATE, ACTIVATE_AND_KEEP, READ_CODES, Strips
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from training.generator.layer_schedule import stem_config, superres_config
from training.networks_stylegan3 import SynthesisLayer

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
FORWARD = [kind for kind in strips.KINDS.values() if not kind.is_gradient]
GRADIENT = {"22": "22", "42": "24", "22D": "22U", "42D": "24U"}

#----------------------------------------------------------------------------
# What there are programs for.

def recipe_configs():
    """Stems at 16 pixels and what is grown on them up to 1024, as in the recipes: T, R, and T on R."""
    for rotation, syn_layers in ((False, 10), (False, 7), (True, 6), (True, 10)):
        for head_layers in (4, 5, 7):
            config = stem_config(16, syn_layers, 4096, 16, rotation=rotation)
            yield config
            while config.img_resolution < 1024:
                config = superres_config(config, 2, head_layers, rotation=rotation and config.img_resolution < 32)
                yield config


def plans_of_recipes():
    """A plan for every different layer that filters."""
    found = {}
    for config in recipe_configs():
        for spec in config.layers:
            layer = SynthesisLayer(dataclasses.replace(spec, in_channels=1, out_channels=1), config)
            size = spec.in_size + spec.conv_kernel - 1
            key = size, spec.out_size, layer.up, layer.down, spec.use_radial_filters, spec.is_critically_sampled
            if layer.up_filter is None or key in found:
                continue
            plans = []
            def keep(x, b, plan, plans=plans):
                plans.append(plan)
                return x
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("torch_utils.ops.operations.filtered_lrelu", keep)
                filtered_lrelu(torch.zeros(1, 1, size, size), layer.up_filter, layer.down_filter, up=layer.up,
                               down=layer.down, padding=layer.padding, clamp=256, impl="cpu")
            found[key] = plans[0]
    return list(found.values())


@needs_compiler
def test_all_layers_of_the_recipes_have_programs():
    plans = plans_of_recipes()
    assert len(plans) > 20
    names = set()
    for plan in plans:
        kinds = [*map(plan.fast_kind, (ACTIVATE, ACTIVATE_AND_KEEP, READ_CODES)),
                 plan.transposed.fast_kind(READ_CODES)]
        assert None not in kinds, (plan.up, plan.down)
        assert GRADIENT[kinds[0].name] == kinds[3].name
        names |= {kind.name for kind in kinds}
    assert names == set(strips.KINDS)       # And there are no others.


def test_the_table_is_that_of_the_source():
    source = (compilation.SOURCES / "strips.h").read_text()
    lines = re.findall(r"using Strips(\w+) = Strips<Rates<(.*?)>, (\d+), (\d+), (\w+)>;", source)
    found = [(name, *rates.split(", "), width, unroll, gradient) for name, rates, width, unroll, gradient in lines]
    told = [tuple(str(value).lower() if isinstance(value, bool) else str(value)
                  for value in dataclasses.astuple(kind)) for kind in strips.KINDS.values()]
    assert found == told

#----------------------------------------------------------------------------
# What they compute.

def layer(kind, sizes, dtype, layout, seed=3):
    """(call of a layer of that kind, x, b) with taps of no symmetry. `sizes`: in (height, width)."""
    fu, fd = (randn(*[n] * (1 + radial), seed=n + 1) for n, radial in
              ((kind.up_taps, kind.up_radial), (kind.down_taps, kind.down_radial)))
    low = kind.phase + 2 * kind.up
    x = randn(2, 5, *sizes, seed=seed).to(dtype).to(memory_format=layout).requires_grad_()
    b = randn(5, seed=4).to(dtype).requires_grad_()

    def call(x, b, impl, slope=0.2, clamp=2.5):
        return filtered_lrelu(x, fu, fd, b, up=kind.up, down=kind.down, padding=(low, 9, low + kind.up, 8), gain=1.4,
                              slope=slope, clamp=clamp, impl=impl)
    return call, x, b


def results(call, x, b, impl, layout):
    """Value, gradients, and the gradient of a gradient."""
    y = call(x, b, impl)
    dy = randn(*y.shape, seed=5).to(x).to(memory_format=layout).requires_grad_()
    dx, db = torch.autograd.grad(y, [x, b], dy, create_graph=True)
    ddy, = torch.autograd.grad(dx, dy, randn(*x.shape, seed=6).to(x).to(memory_format=layout))
    return [y.detach(), dx.detach(), db.detach(), ddy]


@needs_compiler
@pytest.mark.numeric
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FORWARD, ids=Strips.describe)
@pytest.mark.parametrize("sizes", [(9, 13), (26, 21), (40, 7)], ids=str)
def test_programs_are_ref(kind, layout, sizes, monkeypatch):
    """Widths and heights that are no multiples of strips and chunks, and images of a single strip."""
    called = use_programs_of_gpu(monkeypatch, fast=True)
    call, x, b = layer(kind, sizes, torch.float64, LAYOUTS[layout])
    found, want = (results(call, x, b, impl, LAYOUTS[layout]) for impl in ("cpu", "ref"))
    assert called == [kind.name, GRADIENT[kind.name], kind.name]
    for a, exact in zip(found, want, strict=True):
        assert rel_error(a, exact) < 1e-12
        assert a.is_contiguous(memory_format=LAYOUTS[layout]) or a.ndim == 1
    with torch.no_grad():
        assert torch.equal(call(x, b, "cpu"), found[0])     # Without codes.


@needs_compiler
@pytest.mark.numeric
@pytest.mark.parametrize("kind", FORWARD, ids=Strips.describe)
def test_codes_are_those_of_the_general_program(kind, monkeypatch):
    """Each reads what the other has written, in both layouts."""
    for layout in LAYOUTS.values():
        call, x, b = layer(kind, (23, 21), torch.float64, layout)
        want = torch.autograd.grad(call(x, b, "ref").square().sum(), [x, b])
        for fast in (True, False):
            use_programs_of_gpu(monkeypatch, fast=fast)
            loss = call(x, b, "cpu").square().sum()
            use_programs_of_gpu(monkeypatch, fast=not fast)
            for a, exact in zip(torch.autograd.grad(loss, [x, b]), want, strict=True):
                assert rel_error(a, exact) < 1e-12


@needs_compiler
@pytest.mark.numeric
@pytest.mark.parametrize("dtype", strips.TYPES)
@pytest.mark.parametrize("kind", FORWARD, ids=Strips.describe)
def test_types(kind, dtype, monkeypatch):
    use_programs_of_gpu(monkeypatch, fast=True)
    call, x, b = layer(kind, (12, 19), dtype, torch.channels_last)
    exact = [t.detach().double().requires_grad_() for t in (x, b)]
    found, want = results(call, x, b, "cpu", torch.channels_last), results(call, *exact, "ref", torch.channels_last)
    for a, reference in zip(found[:2], want[:2], strict=True):
        assert a.dtype == dtype
        # Half precision rounds once, at the end; sums are in single precision.
        sums = bound(torch.float32, *(torch.ones([n] * (1 + radial)) for n, radial in (
            (kind.up_taps, kind.up_radial), (kind.down_taps, kind.down_radial))))
        assert rel_error(a.double(), reference) < sums + (torch.finfo(dtype).eps if dtype != torch.float32 else 0)


@needs_compiler
def test_what_is_left_to_the_general_program(monkeypatch):
    called = use_programs_of_gpu(monkeypatch, fast=True)
    f, x = randn(12, seed=1), randn(1, 3, 14, 15).requires_grad_()
    calls = [{"fu": f, "fd": f, "up": 2, "down": 2, "padding": 10},                                 # The phase.
             {"fu": f, "fd": f, "up": 2, "down": 2, "padding": 9, "slope": 1.5},
             {"fu": f, "fd": randn(24, seed=2), "up": 2, "down": 4, "padding": 9},                  # A gradient.
             {"fu": f[:8], "fd": f, "up": 2, "down": 2, "padding": 9}]
    for options in calls:
        found, want = (filtered_lrelu(x, **options, impl=impl) for impl in ("cpu", "ref"))
        assert rel_error(found, want) < 1e-12
    # Columns that are far from each other: fast programs count the bytes between them in 32 bits.
    apart = torch.ones(14, dtype=torch.float64).as_strided((1, 1, 14, 1), (14, 14, 1, native.MAX_COLUMN_STRIDE + 1))
    found, want = (filtered_lrelu(apart, f, f, up=2, down=2, padding=11, impl=impl) for impl in ("cpu", "ref"))
    assert rel_error(found, want) < 1e-12
    assert called == ["filtered_lrelu"] * (len(calls) + 1)


@needs_compiler
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_not_a_number_stays_one_and_zero_has_the_slope(clamp, monkeypatch):
    use_programs_of_gpu(monkeypatch, fast=True)
    f = torch.ones(12, dtype=torch.float64)
    x = torch.full((1, 1, 12, 12), math.nan, dtype=torch.float64).requires_grad_()
    assert filtered_lrelu(x, f, f, up=2, down=2, padding=9, clamp=clamp, impl="cpu").isnan().all()
    with torch.no_grad():
        assert filtered_lrelu(x, f, f, up=2, down=2, padding=9, clamp=clamp, impl="cpu").isnan().all()
    zeros = torch.zeros_like(x).requires_grad_()
    grads = [torch.autograd.grad(filtered_lrelu(zeros, f, f, up=2, down=2, padding=9, clamp=clamp, impl=impl).sum(),
                                 zeros)[0] for impl in ("cpu", "ref")]
    assert rel_error(*grads) < 1e-12


@needs_compiler
@pytest.mark.slow
def test_threads_do_not_meddle(tmp_path):
    """Several threads per block, several blocks at once: ThreadSanitizer sees who writes where another one reads."""
    program = tmp_path / "races"
    flags = "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{compilation.SOURCES}"
    source = Path(__file__).with_name("races.cpp")
    command = [compilation.cpu_target().compiler, *flags, str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if built.returncode and "tsan" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[:4000]


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", strips.TYPES)
@pytest.mark.parametrize("kind", FORWARD, ids=Strips.describe)
def test_gpu_is_ref(kind, dtype, layout):
    """Value, gradients, second order; sizes of several strips, chunks and blocks."""
    assert dispatch.load("cuda").fast(kind, dtype) is not None
    # With these numbers no upsampled value is so near to zero or to the bound that rounding decides on which side it
    # is: the nearest one is six times as far as their usual error.
    call, x, b = layer(kind, (61, 43), dtype, LAYOUTS[layout], seed=20)
    exact = [t.detach().double().requires_grad_() for t in (x, b)]
    on_gpu = [t.detach().cuda().requires_grad_() for t in (x, b)]
    found = results(call, *on_gpu, "cuda", LAYOUTS[layout])
    want = results(call, *exact, "ref", LAYOUTS[layout])
    for a, reference in zip(found, want, strict=True):
        assert rel_error(a.cpu().double(), reference) < max(8 * torch.finfo(dtype).eps, 5e-5)

#----------------------------------------------------------------------------
# Before they are trusted.

@needs_compiler
@pytest.mark.parametrize("family", strips.FAMILIES)
@pytest.mark.parametrize("dtype", strips.TYPES)
def test_self_check(family, dtype, monkeypatch):
    called = use_programs_of_gpu(monkeypatch, fast=True)
    assert self_check.find_fault_of_strips("cpu", family, dtype) is None
    assert set(called) == {kind.name for kind in strips.KINDS.values() if kind.family == family}


@needs_compiler
def test_a_wrong_program_is_not_used(monkeypatch, capsys):
    """The general one is, and it is said."""
    use_programs_of_gpu(monkeypatch, fast=True)
    programs = dispatch.FastPrograms(functools.partial(self_check.find_fault_of_strips, "cpu"))
    def do_nothing(*args):
        return 0
    wrong = native.Loaded(dict.fromkeys(["22", "42", "24"], do_nothing))
    monkeypatch.setattr(native, "load_strips", lambda family, dtype: wrong)
    monkeypatch.setitem(native.in_use, "cpu", native.Loaded(native.in_use["cpu"].functions, fast=programs))
    f, x = randn(12, seed=1, dtype=torch.float32), randn(1, 3, 14, 15, dtype=torch.float32)
    found, want = (filtered_lrelu(x, f, f, up=2, down=2, padding=9, impl=impl) for impl in ("cpu", "ref"))
    assert rel_error(found, want) < 1e-5
    assert "ops: the general program is used instead of fast ones (self-check failed: filtered_lrelu 2/2 12/12" in \
        capsys.readouterr().err


def test_a_library_that_cannot_be_had_is_said_once(monkeypatch, capsys):
    def fail(target):
        raise compilation.BuildError("no nvcc on PATH")
    monkeypatch.setattr(compilation, "strips_target", lambda *args: None)
    monkeypatch.setattr(compilation, "library", fail)
    monkeypatch.delenv("STYLESAN_OPS", raising=False)
    programs = dispatch.FastPrograms(functools.partial(self_check.find_fault_of_strips, "cuda"))
    for _ in range(2):
        assert programs(strips.KINDS["22"], torch.float16) is None
    assert programs(strips.KINDS["22"], torch.float64) is None
    assert capsys.readouterr().err == "ops: the general program is used instead of fast ones (no nvcc on PATH)\n"


def test_without_its_fast_programs_native_is_an_error(monkeypatch):
    """Each time, not only the first."""
    monkeypatch.setattr(native, "load_strips", lambda family, dtype: native.Loaded(None, "no nvcc on PATH"))
    monkeypatch.setenv("STYLESAN_OPS", "native")
    programs = dispatch.FastPrograms(lambda family, dtype: None)
    for _ in range(2):
        with pytest.raises(UserError, match="STYLESAN_OPS=native: no fast programs: no nvcc on PATH: mend that, or"):
            programs(strips.KINDS["22"], torch.float16)


@pytest.mark.parametrize("raises", [False, True])
def test_a_wrong_program_is_never_used_where_native_code_is_a_must(raises, monkeypatch):
    """The error comes again, however often somebody catches it; so it is when the check itself is interrupted."""
    def check(family, dtype):
        if raises:
            raise KeyboardInterrupt
        return "the result differs"
    monkeypatch.setenv("STYLESAN_OPS", "native")
    monkeypatch.setattr(native, "load_strips", lambda family, dtype: native.Loaded({"22": lambda *args: 0}))
    programs = dispatch.FastPrograms(check)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt if raises else UserError):
            programs(strips.KINDS["22"], torch.float16)


@needs_compiler
def test_a_right_program_is_used_when_first_asked_for_inside_an_operation(monkeypatch):
    """The check takes gradients there, whatever mode the caller is in."""
    use_programs_of_gpu(monkeypatch, fast=True)
    loaded = native.in_use["cpu"]
    monkeypatch.setattr(native, "load_strips", lambda family, dtype: native.Loaded({
        kind.name: loaded.fast(kind, dtype) for kind in strips.KINDS.values() if kind.family == family}))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        programs = dispatch.FastPrograms(functools.partial(self_check.find_fault_of_strips, "cpu"))
        monkeypatch.setitem(native.in_use, "cpu", native.Loaded(loaded.functions, fast=programs))
        f, x = randn(12, seed=1, dtype=torch.float32), randn(1, 3, 14, 15, dtype=torch.float32)
        with mode():
            filtered_lrelu(x.requires_grad_(mode is torch.enable_grad), f, f, up=2, down=2, padding=9, impl="cpu")
        assert programs(strips.KINDS["42"], torch.float32) is not None


def test_a_gpu_has_its_programs_while_they_are_checked(monkeypatch):
    """Autograd runs the backward pass of the check in a thread of its own, which asks for them, too."""
    checked = []

    def check(kind, family, dtype):
        thread = threading.Thread(target=lambda: checked.append(programs(strips.KINDS["22"], dtype)), daemon=True)
        thread.start()
        thread.join(timeout=60)
        checked.append((kind, family, dtype))

    monkeypatch.setattr(native, "in_use", {})
    monkeypatch.setattr(native, "load", lambda kind: native.Loaded({}))
    monkeypatch.setattr(native, "load_strips", lambda family, dtype: native.Loaded({"22": print}))
    monkeypatch.setattr(self_check, "find_fault", lambda kind: None)
    monkeypatch.setattr(self_check, "find_fault_of_strips", check)
    programs = dispatch.load("cuda").fast
    assert programs(strips.KINDS["22"], torch.float16) is print
    assert programs(strips.KINDS["42"], torch.float16) is None
    assert checked == [print, ("cuda", "t", torch.float16)]

#----------------------------------------------------------------------------
# What is compiled.

BOUNDS = {"2/2 12/12": 240, "4/2 24/12": 330}      # Instructions per value, forward.
GRADIENT_FACTOR = 1.3
MIN_FFMA_SHARE = 0.45
RESULTS = ROOT / "benchmarks" / "results" / "kernels.json"


def assert_within_bounds(rows):
    for row in rows:
        assert tuple(row) == kernel_report.KEYS
        assert row["spill_bytes"] == row["local_bytes"] == 0, row
        assert row["registers"] <= 255, row
        assert row["ffma_share"] >= MIN_FFMA_SHARE, row
        _, rates, taps, _, *mode = row["kernel"].split()
        backwards = {"2/4": "4/2"}.get(rates, rates)
        bound = BOUNDS.get(f"{backwards} {'24/12' if backwards == '4/2' else '12/12'}") if "r" not in taps else None
        if bound is not None:
            factor = GRADIENT_FACTOR if mode == ["gradient"] else 1
            assert row["instructions_per_output"] <= factor * bound, row


@pytest.mark.slow
@pytest.mark.parametrize("name", ["22", "42D"])
def test_what_the_compiler_makes_of_it(name):
    """In half precision, the type of most layers; benchmarks/results/kernels.json has all kinds, types and GPUs."""
    if compilation.cuda_target("90").compiler is None:
        pytest.skip("no nvcc: neither a CUDA toolkit nor the package nvidia-cuda-nvcc")
    rows = kernel_report.make_report(["90"], [torch.float16], [strips.KINDS[name]])
    assert len(rows) == 3
    assert_within_bounds(rows)


def test_the_whole_report_is_of_these_sources():
    """`make kernel-report` makes it anew, in some minutes."""
    found = json.loads(RESULTS.read_text())
    assert found["sources"] == kernel_report.sources_hash(), "the sources have changed: run make kernel-report"
    rows = found["rows"]
    programs = sum(1 if kind.is_gradient else 3 for kind in strips.KINDS.values())
    assert len({(row["kernel"], row["arch"]) for row in rows}) == len(rows) == programs * len(strips.TYPES) * 3
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert_within_bounds(rows)
