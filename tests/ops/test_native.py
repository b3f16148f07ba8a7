# SPDX-License-Identifier: Apache-2.0
"""Native code against the definitions: the library for processors, and the GPU's programs run on a processor."""
import ctypes
import gc
import math
import struct
import threading

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from dnnlib import UserError
from tests import needs_cuda
from tests.closeness import rel_error
from tests.ops.cases import needs_compiler, randn, random_layers, use_programs_of_gpu
from tests.ops.test_filtered_lrelu import OPTIONS, grads
from tests.ops.test_filtered_lrelu import assert_form_is_ref as assert_layer_is_ref
from tests.ops.test_upfirdn2d import assert_form_is_ref as assert_resampling_is_ref
from torch_utils.ops import descriptions, dispatch, native, native_forms, operations, self_check
from torch_utils.ops.bias_act import activation_funcs, bias_act
from torch_utils.ops.descriptions import AxisRates, BiasActPlan, LayerPlan, Plan, ResamplingFilter, ResamplingPlan
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.upfirdn2d import upfirdn2d

pytestmark = [pytest.mark.numeric, needs_compiler]


@pytest.fixture(params=["cpu", "tiles"])
def code(request, monkeypatch):
    """The library for processors, or the programs of the GPU in its place."""
    if request.param == "tiles":
        use_programs_of_gpu(monkeypatch, fast=False)
    return request.param

#----------------------------------------------------------------------------
# Against the definitions.

@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layer_is_ref(code, options, dtype):
    assert_layer_is_ref("cpu", options, dtype, (3, 7, 9, 8))


@pytest.mark.slow
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels-last"])
def test_layer_of_many_tiles_is_ref(code, last):
    """More rows, columns and planes than one piece of work has; groups of planes that end within an image."""
    layout = torch.channels_last if last else torch.contiguous_format
    x = randn(2, 19, 75, 71).to(memory_format=layout).requires_grad_()
    b, f = randn(19, seed=1).requires_grad_(), torch.hann_window(14, dtype=torch.float64)[1:-1] / 6.5
    for up, down in ((2, 2), (4, 2), (1, 3)):
        found = {}
        for impl in ("ref", "cpu"):
            y = filtered_lrelu(x, f, f, b, up=up, down=down, padding=(9, 8, 7, 9), clamp=0.8, impl=impl)
            found[impl] = [y, *grads(y, [x, b], randn(*y.shape, seed=3).to(memory_format=layout))]
        for a, want in zip(found["cpu"], found["ref"], strict=True):
            assert rel_error(a, want) < 1e-12
        assert found["cpu"][0].is_contiguous(memory_format=layout)


def test_random_layers(code):
    for i, (x, options) in enumerate(random_layers(40)):
        x.requires_grad_()
        found = []
        for impl in ("cpu", "ref"):
            y = filtered_lrelu(x, **options, impl=impl)
            found.append([y, *torch.autograd.grad(y, x, randn(*y.shape, seed=i + 4))])
        for a, want in zip(*found, strict=True):
            assert rel_error(a, want) < 1e-12, options


@pytest.mark.parametrize("name", ["1d", "2d", "rank1", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_resampling_is_ref(code, name, dtype):
    assert_resampling_is_ref("cpu", name, dtype, 20)


@pytest.mark.parametrize("act", list(activation_funcs))
@pytest.mark.parametrize("options", [{}, {"gain": 1.7, "clamp": 0.8, "alpha": 0.1}], ids=["plain", "gain-clamp"])
def test_bias_act_is_ref(code, act, options):
    x, b = randn(2, 3, 4, 5).requires_grad_(), randn(3, seed=1).requires_grad_()
    def function(x, b):
        return bias_act(x, b, act=act, **options, impl="cpu")
    assert rel_error(function(x, b), bias_act(x, b, act=act, **options, impl="ref")) < 1e-14
    assert gradcheck(function, (x, b))
    assert gradgradcheck(function, (x, b))


@pytest.mark.parametrize("act", ["lrelu", "swish", "softplus"])
def test_third_order_of_bias_act(act):
    x, b = randn(3, 4).requires_grad_(), randn(4, seed=1).requires_grad_()
    found = []
    for impl in ("cpu", "ref"):
        y = bias_act(x, b, act=act, impl=impl).square().sum()
        for _ in range(3):
            y = torch.autograd.grad(y, x, create_graph=True)[0].pow(3).sum()
        found.append([y, *torch.autograd.grad(y, [x, b])])
    for a, want in zip(*found, strict=True):
        assert rel_error(a, want) < 1e-9


def test_bias_act_in_every_layout(code):
    base = randn(2, 3, 4, 5)
    for x in (base, base.to(memory_format=torch.channels_last), base.mT, base[:, :, ::2], base[:1].expand(4, 3, 4, 5),
              base[:, :1]):
        for dim in (0, 1, 2, 3):
            b = randn(x.shape[dim], seed=1)
            assert rel_error(bias_act(x, b, dim, "lrelu", impl="cpu"), bias_act(x, b, dim, "lrelu", impl="ref")) < 1e-15
    assert bias_act(torch.zeros(0, 3), torch.zeros(3), act="lrelu", impl="cpu").shape == (0, 3)
    assert bias_act(torch.tensor(-1.0), act="lrelu", gain=1.0, impl="cpu") == torch.tensor(-0.2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(code, dtype):
    x, b, f = randn(2, 19, 12, 12, dtype=dtype).requires_grad_(), randn(19, seed=1, dtype=dtype), torch.ones(8) / 8
    calls = [lambda x, b, impl: filtered_lrelu(x, f, f, b, up=2, down=2, padding=(7, 6), impl=impl),
             lambda x, b, impl: upfirdn2d(x, f, up=2, padding=(4, 3), gain=4, impl=impl),
             lambda x, b, impl: bias_act(x, b, act="lrelu", clamp=1, impl=impl)]
    for call in calls:
        y = call(x, b, "cpu")
        exact = x.detach().double().requires_grad_()
        want = call(exact, b.double(), "ref")
        dy = randn(*y.shape, seed=5, dtype=dtype)
        dx, dexact = torch.autograd.grad(y, x, dy)[0], torch.autograd.grad(want, exact, dy.double())[0]
        assert y.dtype == dx.dtype == dtype
        assert rel_error(y.float(), want) < 2 * torch.finfo(dtype).eps     # One rounding, at the end.
        assert rel_error(dx.float(), dexact) < 2 * torch.finfo(dtype).eps


def test_not_a_number_stays_one(code):
    x = torch.full((1, 1, 6, 6), math.nan)
    assert filtered_lrelu(x, clamp=1, up=2, padding=1, impl="cpu").isnan().any()
    assert bias_act(x, act="lrelu", clamp=1, impl="cpu").isnan().all()
    assert upfirdn2d(x, torch.ones(2), impl="cpu").isnan().all()

#----------------------------------------------------------------------------
# As operations of PyTorch.

def layer_plan():
    up = ResamplingFilter((1.0, 2.0, 0.5), (1.0, 3.0), AxisRates(2, 1, 2, 3, 11), AxisRates(2, 1, 1, 2, 12))
    down = ResamplingFilter((1.0, 2.0), (0.3, 0.2), AxisRates(1, 2, 0, 2, 5), AxisRates(1, 2, 0, 2, 6))
    return LayerPlan(up, down, (5, 5), 0.2, 1.5)


LAYOUTS = pytest.mark.parametrize("layout", [
    lambda x: x, lambda x: x.to(memory_format=torch.channels_last), lambda x: x.mT.contiguous().mT,
    lambda x: x.repeat_interleave(2, 3)[..., ::2]], ids=["contiguous", "channels-last", "transposed", "strided"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")     # opcheck's own.
@LAYOUTS
def test_opcheck(layout):
    def images(seed):
        return layout(randn(2, 3, 5, 5, seed=seed, dtype=torch.float32))
    layer, act, b = layer_plan(), BiasActPlan(1, 8, 0.2, 1.5, 1.0), randn(3, seed=1, dtype=torch.float32)
    up, codes = ResamplingPlan(layer.up, (5, 5)), native.new_codes(images(0), layer).zero_()
    back = LayerPlan(layer.up, layer.down, (5, 5), 0.2, math.inf)
    ops = torch.ops.stylesan
    for op, arguments in ((ops.resample, (images(0), up.number)),
                          (ops.filtered_lrelu, (images(0), b, layer.number)),
                          (ops.filtered_lrelu_and_codes, (images(0), b, layer.number)),
                          (ops.filtered_lrelu_slopes, (images(0), codes, back.number)),
                          (ops.bias_act, (images(0), b, act.number)),
                          (ops.bias_act_derivative, (images(0), b, images(1), act.number, 1))):
        torch.library.opcheck(op.default, arguments)


def differentiable(plans):
    """Functions of images and a bias whose gradients are native operations."""
    layer, up, act = plans
    return [lambda x, b: operations.filtered_lrelu(x, b, layer),
            lambda x, b: operations.resample(x + b[:, None, None], up),
            lambda x, b: operations.bias_act(x, b, act)]


@pytest.mark.parametrize("number", range(3), ids=["filtered_lrelu", "resample", "bias_act"])
@LAYOUTS
def test_the_compiler_sees_the_same(number, layout):
    """Traced as a whole, forward and backward, results, gradients and their layouts are those of eager calls."""
    layer = layer_plan()
    plans = layer, ResamplingPlan(layer.up, (5, 5)), BiasActPlan(1, 8, 0.2, 1.5, 1.0)
    function, found = differentiable(plans)[number], []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        x = layout(randn(2, 3, 5, 5, dtype=torch.float32)).requires_grad_()
        b = randn(3, seed=1, dtype=torch.float32).requires_grad_()
        y = call(x, b)
        found.append([y, *torch.autograd.grad(y, [x, b], torch.ones_like(y))])
    for a, want in zip(*found, strict=True):
        assert torch.equal(a, want)
        assert a.stride() == want.stride()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")     # The compiler's own.
@pytest.mark.parametrize("number", range(3), ids=["filtered_lrelu", "upfirdn2d", "bias_act"])
def test_the_compiler_leaves_what_is_remembered_alone(number):
    """The operations as users call them, in code that is compiled, also when sizes change."""
    f = randn(12, seed=7)
    def function(x, b):
        return calls_of_everything(2 * x, b, f)[number] + 1
    compiled = torch.compile(function, backend="aot_eager")
    for size in (9, 11, 12):
        x, b = randn(2, 3, size, size).requires_grad_(), randn(3, seed=1).requires_grad_()
        for order, (a, want) in enumerate(zip(*([y, *torch.autograd.grad(y, [x, b], torch.ones_like(y))]
                                                for y in (compiled(x, b), function(x, b))), strict=True)):
            assert torch.equal(a, want), (size, order)


def test_codes_are_kept_for_gradients_only(monkeypatch):
    made, new_codes = [], native.new_codes
    monkeypatch.setattr(native, "new_codes", lambda *args: made.append(args) or new_codes(*args))
    x, plan = randn(1, 3, 5, 5).requires_grad_(), layer_plan()
    with torch.no_grad():
        operations.filtered_lrelu(x, None, plan)
    operations.filtered_lrelu(x.detach(), None, plan)
    assert not made
    operations.filtered_lrelu(x, None, plan)
    assert len(made) == 1

#----------------------------------------------------------------------------
# Plans.

def calls_of_everything(x, b, f, impl="cpu"):
    return [filtered_lrelu(x, f, f, b, up=2, down=2, padding=(9, 8, 7, 9), clamp=0.8, impl=impl),
            upfirdn2d(x + b[:, None, None], f, up=2, down=(1, 3), padding=[4, 3, 2, 5], gain=4, impl=impl),
            bias_act(x, b, act="swish", clamp=0.9, impl=impl)]


def second_order(x, b, f, impl="cpu"):
    """Values, gradients and gradients of these."""
    found = []
    for y in calls_of_everything(x, b, f, impl):
        found += [y, *grads(y, [x, b], randn(*y.shape, seed=3))]
    return found


def test_plans_are_made_once(monkeypatch):
    """And taps are read and sent once: the second iteration makes nothing, whatever layout the images have."""
    made, packed = [], []
    init, pack = Plan.__init__, native._pack_filter
    monkeypatch.setattr(Plan, "__init__", lambda plan: made.append(plan) or init(plan))
    monkeypatch.setattr(native, "_pack_filter", lambda *args: packed.append(args) or pack(*args))
    x, b, f = randn(2, 19, 33, 31).requires_grad_(), randn(19, seed=1).requires_grad_(), randn(12, seed=7)
    first = second_order(x, b, f)
    assert len(made) > 0
    assert len(packed) > 0
    made.clear()
    packed.clear()
    for again in (second_order(x, b, f), second_order(x, b, f)):
        assert all(torch.equal(a, want) for a, want in zip(again, first, strict=True))
    second_order(x.detach().to(memory_format=torch.channels_last).requires_grad_(), b, f)
    assert not made
    assert not packed
    f.mul_(2)       # Another filter in the same tensor.
    second_order(x, b, f)
    assert packed


def test_plans_are_forgotten(monkeypatch):
    """Those used last stay. A gradient keeps its own."""
    x, f = randn(1, 2, 9, 9).requires_grad_(), randn(5, seed=3)
    y = upfirdn2d(x, f, padding=4, impl="cpu")
    want = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
    gc.collect()
    before = len(descriptions._plans)
    for gain in range(native_forms.MAX_PLANS + 50):
        upfirdn2d(x.detach(), f, padding=4, gain=gain + 0.5, impl="cpu")
    gc.collect()
    assert len(descriptions._plans) <= before + native_forms.MAX_PLANS
    assert torch.equal(torch.autograd.grad(y, x, torch.ones_like(y))[0], want)
    act = BiasActPlan(1, 8, 0.2, 1.5, 1.0)
    with pytest.raises(RuntimeError, match=f"plan {act.number} is a BiasActPlan, and the operation takes a Resampling"):
        torch.ops.stylesan.resample(randn(1, 1, 5, 5), act.number)
    number = ResamplingPlan(layer_plan().up, (5, 5)).number
    with pytest.raises(RuntimeError, match=f"plan {number} of a native operation does not exist any more"):
        torch.ops.stylesan.resample(randn(1, 1, 5, 5), number)


def test_a_plan_for_another_size_is_refused():
    with pytest.raises(ValueError, match=r"images of shape \[1, 3, 5, 6\] met a plan for 5x5"):
        operations.filtered_lrelu(randn(1, 3, 5, 6), None, layer_plan())


def test_threads_share_plans(code):
    """Each with tensors of its own, as the threads of autograd do on GPUs: nothing of a call is shared."""
    f, wanted, found = randn(12, seed=7), [], {}
    inputs = [[randn(n, 19, 33, 31, seed=n), randn(19, seed=n + 9)] for n in (1, 2, 3, 4)]

    def run(number):
        x, b = (t.clone().requires_grad_() for t in inputs[number])
        return [second_order(x, b, f) for _ in range(4)]

    wanted = [run(number)[0] for number in range(4)]
    threads = [threading.Thread(target=lambda n=n: found.update({n: run(n)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for number, want in enumerate(wanted):
        for results in found[number]:
            assert all(torch.equal(a, b) for a, b in zip(results, want, strict=True))


def test_inference_mode_and_training_share_plans(code):
    x, b, f = randn(2, 5, 9, 8), randn(5, seed=1), randn(12, seed=7)
    with torch.inference_mode():
        inferred = calls_of_everything(x, b, f)
        again = calls_of_everything(x.clone(), b.clone(), f.clone())        # Tensors of that mode, the filter too.
    trained = calls_of_everything(x.requires_grad_(), b.requires_grad_(), f)
    sum(y.sum() for y in trained).backward()
    for a, c, want in zip(inferred, again, trained, strict=True):
        assert torch.equal(a, want)
        assert torch.equal(c, want)

#----------------------------------------------------------------------------

def test_names_are_those_of_the_source():
    assert list(descriptions.ACTS) == list(activation_funcs)


def test_too_large():
    x = torch.zeros(1).expand(1 << 16, 1 << 15, 1, 1)
    for call in (lambda: upfirdn2d(x, None, impl="cpu"), lambda: bias_act(x, act="lrelu", impl="cpu"),
                 lambda: filtered_lrelu(x, up=2, padding=1, impl="cpu")):
        with pytest.raises(ValueError, match=r"2,147,483,648 elements|take up to 2,147,483,647: use smaller batches"):
            call()

#----------------------------------------------------------------------------
# Before it is trusted.

def test_self_check(code):
    assert self_check.find_fault("cpu") is None
    with torch.inference_mode():
        assert self_check.find_fault("cpu") is None


def test_the_self_check_may_run_backward_in_another_thread(monkeypatch):
    """On GPUs autograd does that. Where a lock is held meanwhile, both threads wait for ever."""
    gradients, stuck = self_check._gradients, []

    def in_a_thread(*args):
        found = []
        thread = threading.Thread(target=lambda: found.append(gradients(*args)), daemon=True)
        thread.start()
        thread.join(timeout=60)
        stuck.append(thread.is_alive())
        return found[0]

    monkeypatch.setattr(self_check, "_gradients", in_a_thread)
    monkeypatch.setattr(native, "in_use", {})
    monkeypatch.delenv("STYLESAN_OPS", raising=False)
    assert dispatch.load("cpu").functions is not None
    assert stuck
    assert not any(stuck)


@pytest.mark.parametrize("name", ["resample", "filtered_lrelu", "bias_act"])
def test_wrong_code_is_not_used(name, monkeypatch):
    functions = dispatch.load("cpu").functions
    def spoilt(*args):      # Runs, but one number is wrong.
        code = functions[name](*args)
        memory = ctypes.cast(_result_of(name, args), ctypes.POINTER(ctypes.c_float))
        memory[0] += 10.0
        return code
    broken = native.Loaded({**functions, name: spoilt})
    monkeypatch.setattr(native, "in_use", {"cpu": broken})
    op = {"resample": "upfirdn2d"}.get(name, name)
    assert dispatch._checked("cpu", broken).reason.startswith(f"self-check failed: {op}, float32: result differs")


def _result_of(name, args):
    """Address of the first value of the result, from the arguments of a call."""
    if name == "bias_act":
        return struct.unpack_from("4P", args[1])[3]
    return struct.unpack_from("P", args[{"resample": 2, "filtered_lrelu": 3}[name]])[0]


def test_code_whose_check_does_not_end_is_not_kept(monkeypatch):
    """Nor used by whoever goes on after the error."""
    loads = []
    monkeypatch.setattr(native, "in_use", {})
    monkeypatch.setattr(native, "load", lambda kind: loads.append(kind) or native.Loaded({}))
    def interrupt(kind):
        raise UserError("STYLESAN_OPS=native: no fast programs")
    monkeypatch.setattr(self_check, "find_fault", interrupt)
    for _ in range(2):
        with pytest.raises(UserError):
            dispatch.load("cpu")
    assert loads == ["cpu"] * 2
    assert not native.in_use


def test_the_self_check_names_its_devices():
    """Whatever device new tensors have by default."""
    with torch.device("meta"):
        assert self_check.find_fault("cpu") is None


def test_the_self_check_runs_the_general_program(monkeypatch):
    """The fast ones have checks of their own, when a layer asks for them."""
    called = use_programs_of_gpu(monkeypatch, fast=True)
    assert self_check.find_fault("cpu") is None
    assert set(called) == {"bias_act", "filtered_lrelu", "resample"}


def test_failing_code_is_not_used(monkeypatch):
    functions = {name: lambda *args: -3 for name in dispatch.load("cpu").functions}
    monkeypatch.setattr(native, "in_use", {})
    monkeypatch.setattr(native, "load", lambda kind: native.Loaded(functions))
    monkeypatch.setenv("STYLESAN_OPS", "auto")
    assert dispatch.describe("cpu").startswith("ops: reference (self-check failed: filtered_lrelu for torch.float32 on")
    assert upfirdn2d(randn(1, 1, 8, 8), None, up=2, padding=1).shape == (1, 1, 18, 18)

#----------------------------------------------------------------------------

@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gpu_is_ref(dtype, layout):
    assert dispatch.load("cuda").functions is not None, dispatch.load("cuda").reason
    x = randn(2, 19, 75, 71, dtype=dtype).cuda().to(memory_format=layout).requires_grad_()
    b, f = randn(19, seed=1, dtype=dtype).cuda().requires_grad_(), (torch.hann_window(14)[1:-1] / 6.5).cuda()
    calls = [lambda x, b, impl: filtered_lrelu(x, f, f, b, up=2, down=2, padding=(9, 8, 7, 9), impl=impl),
             lambda x, b, impl: upfirdn2d(x + b[:, None, None], f, up=2, padding=(4, 3), gain=4, impl=impl),
             lambda x, b, impl: bias_act(x, b, act="lrelu", clamp=1, impl=impl)]
    for call in calls:
        found = []
        for impl, inputs in (("cuda", (x, b)), ("ref", (x.detach().double().requires_grad_(),
                                                        b.detach().double().requires_grad_()))):
            y = call(*inputs, impl)
            found.append([y, *torch.autograd.grad(y, inputs, randn(*y.shape, seed=5, dtype=dtype).to(y))])
        for a, want in zip(*found, strict=True):
            assert rel_error(a.double(), want) < max(4 * torch.finfo(dtype).eps, 1e-12)
