# SPDX-License-Identifier: Apache-2.0
"""The steps of gpu_report.py that measure speed: operations, training iterations, sampling.

What they need is imported where it is needed, so that a package that is missing fails one step and not all.
"""
import gc
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_results import CLASSES, Context, ConvCase, LayerCase, conv_cases, layer_cases, recipe_config, stem_of_recipe

from torch_utils import misc
from torch_utils.ops import tune
from training.config import GeneratorConfig

OPS_BATCH = 8
STEM_BATCH = 512            # --batch-gpu=auto chooses a micro-batch for it.
SECONDS = {"cuda": 0.15, "cpu": 0.02}      # For repetitions of one operation.
SMALL_NETWORKS = {"backbones": ("local:random",), "classifier": "deit_tiny_distilled_patch16_224:random"}

#----------------------------------------------------------------------------
# Clocks.

def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device) -> None:
    """Give back the memory of a GPU that networks which are gone have left; others get theirs back by themselves."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def host_and_total(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds until the call returns, and until the device has done what it was given."""
    start = time.perf_counter()
    call()
    returned = time.perf_counter() - start
    synchronize(device)
    return returned, time.perf_counter() - start


def op_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median of a short operation, after one call that does not count."""
    call()
    synchronize(device)
    repeats = min(max(int(SECONDS[device.type] / max(host_and_total(call, device)[1], 1e-6)), 3), 50)
    if device.type != "cuda":
        return statistics.median(host_and_total(call, device)[1] for _ in range(repeats))
    # Events of the device: what Python takes between two calls does not count.
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    synchronize(device)
    return statistics.median(a.elapsed_time(b) / 1e3 for a, b in zip(marks, marks[1:], strict=False))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by a copy within the device's memory."""
    x = torch.empty(1 << (30 if device.type == "cuda" else 25), dtype=torch.uint8, device=device).fill_(1)
    y = torch.empty_like(x)
    return 2 * x.numel() / op_seconds(lambda: y.copy_(x), device)


def device_work(call: Callable[[], object], device: torch.device) -> tuple[float, int] | None:
    """Seconds inside kernels during one call and their number, from PyTorch's profiler; None if it cannot tell."""
    if device.type != "cuda":
        return None
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            synchronize(device)
        events = [e for e in profile.key_averages() if str(e.device_type).endswith("CUDA")]
    except RuntimeError:        # Machines may keep counters from users.
        return None
    return (sum(e.self_device_time_total for e in events) / 1e6, sum(e.count for e in events)) if events else None

#----------------------------------------------------------------------------
# Operations.

def forms_on(device: torch.device, quick: bool) -> list[str]:
    """Forms of the operations that exist on the device; the definition only in quick mode, because it is slow."""
    from torch_utils.ops import dispatch
    forms = [device.type] if dispatch.load(device.type).functions is not None else []
    return [*forms, "matrix", *(["ref"] if quick else [])]


def layer_calls(case: LayerCase, form: str, layout: torch.memory_format, device: torch.device,
                batch: int) -> tuple[dict[str, Callable[[], Any]], int]:
    """Forward pass, forward and backward pass of a layer's nonlinearity, and the bytes of its input and output."""
    from torch_utils.ops.filtered_lrelu import filtered_lrelu
    from torch_utils.ops.modulated_conv2d import padded_channels
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    size = case.in_size + case.kernel - 1
    # Channels last, the network has them filled up.
    channels = padded_channels(case.channels) if layout == torch.channels_last else case.channels
    x = torch.randn(batch, channels, size, size, device=device, dtype=dtype).to(memory_format=layout)
    b = torch.randn(channels, device=device, dtype=dtype)
    fu, fd = (None if taps == 1 else (torch.hann_window(taps + 2, periodic=False)[1:-1] * 2 / (taps + 1)).to(device)
              for taps in (case.up_taps, case.down_taps))     # Values of the taps move no time.

    def forward() -> torch.Tensor:
        return filtered_lrelu(x, fu, fd, b, case.up, case.down, case.padding, clamp=256, impl=form)

    def forward_only() -> None:
        with torch.no_grad():
            forward()

    with torch.no_grad():
        y = forward()
        dy = torch.randn_like(y)

    def both() -> None:
        for t in (x, b):
            t.requires_grad_(True)
        torch.autograd.grad(forward(), [x, b], dy)

    return {"forward": forward_only, "both": both}, (x.numel() + y.numel()) * x.element_size()


def simple_calls(quick: bool, device: torch.device, form: str) -> dict[str, tuple[Callable[[], Any], int]]:
    """Name -> (forward pass of bias_act or upfirdn2d, bytes of input and output)."""
    from torch_utils.ops.bias_act import bias_act
    from torch_utils.ops.upfirdn2d import upfirdn2d
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    taps = (torch.hann_window(14, periodic=False)[1:-1] / 6.5).to(device)
    calls: dict[str, tuple[Callable[[], Any], int]] = {}
    for channels, size in ((16, 32),) if quick else ((1024, 84), (512, 148)):
        x = torch.randn(2 if quick else OPS_BATCH, channels, size, size, device=device, dtype=dtype)
        b = torch.randn(channels, device=device, dtype=dtype)
        bytes_in = x.numel() * x.element_size()
        calls |= {
            f"bias_act/{channels} x {size}": (
                lambda x=x, b=b: bias_act(x, b, act="lrelu", clamp=256, impl=form), 2 * bytes_in),
            f"upfirdn2d, 2 times up/{channels} x {size}": (
                lambda x=x: upfirdn2d(x, taps, up=2, padding=(6, 5, 6, 5), gain=4, impl=form), 5 * bytes_in)}
    return calls


def ops(context: Context) -> None:
    """filtered_lrelu at the layers of the recipe in every form, then bias_act and upfirdn2d."""
    device, quick, results = context.device, context.quick, context.results
    bandwidth = copy_bandwidth(device)
    results.put(copy_bytes_per_s=bandwidth)
    forms = forms_on(device, quick)
    cases = layer_cases(recipe_config(quick))
    batch = 2 if quick else OPS_BATCH
    layouts = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
    # The form and layout of the networks on GPUs first, at all layers: their sum is what an iteration pays.
    order = [(form, layout) for layout in layouts for form in forms]
    for form, layout in order:
        for case in cases:
            calls, moved = layer_calls(case, form, layouts[layout], device, batch)
            results.put(**{f"{case.name}/floor": moved / bandwidth})
            for what, call in calls.items():
                results.put(**{f"{case.name}/{form}/{layout}/{what}": op_seconds(call, device)})
            del calls
        total = iteration_seconds(results.content["values"], cases, form, layout)
        results.put(**{f"iteration/{form}/{layout}": total})
        if (form, layout) == order[0]:
            results.found(f"filtered_lrelu of an iteration, {form}: {1e3 * total:.3g} ms")
            measure_simple(context, bandwidth, [*forms[:1], "ref"])


def iteration_seconds(values: dict[str, float], cases: list[LayerCase], form: str, layout: str) -> float:
    """Sums the nonlinearities of an iteration: a forward pass in the phase of D, both passes in that of G.

    The gradient passes through all layers, because the input of a super-resolution stage is trained.
    """
    return sum(case.count * values[f"{case.name}/{form}/{layout}/{what}"] for case in cases
               for what in ("forward", "both"))


def measure_simple(context: Context, bandwidth: float, forms: list[str]) -> None:
    """Shares of the copy bandwidth that bias_act and upfirdn2d reach."""
    for form in dict.fromkeys(form for form in forms if form != "matrix"):      # bias_act has no such form.
        for name, (call, moved) in simple_calls(context.quick, context.device, form).items():
            share = moved / op_seconds(call, context.device) / bandwidth
            context.results.put(**{f"{name}/{form}": share})

#----------------------------------------------------------------------------
# Convolutions.

# Forms in the order of interest: what runs on GPUs first, so that a short time has it.
CONV_FORMS = ("products", "padded", "per_sample", "channels_last", "shared", "grouped")


def conv_input(case: ConvCase, form: str, device: torch.device, batch: int) -> torch.Tensor:
    """A map as the form gets it from a layer of the same form."""
    from torch_utils.ops.modulated_conv2d import fit_channels, padded_channels
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(batch, case.in_channels, case.size, case.size, device=device, dtype=dtype)
    if form in ("padded", "per_sample", "products"):
        x = fit_channels(x, padded_channels(case.in_channels))
    contiguous = form in ("shared", "grouped")
    return x.contiguous(memory_format=torch.contiguous_format if contiguous else torch.channels_last)


def conv_calls(case: ConvCase, form: str, device: torch.device, batch: int) -> dict[str, Callable[[], Any]]:
    """Forward pass, forward and backward pass of a layer's convolution with everything that the form needs around it.

    The backward pass of a frozen layer has the gradient of the map only.
    """
    from torch_utils.ops.modulated_conv2d import modulated_conv2d
    x = conv_input(case, form, device, batch)
    weight = torch.randn(case.out_channels, case.in_channels, case.kernel, case.kernel, device=device)
    styles, gain = torch.randn(batch, case.in_channels, device=device), torch.ones([], device=device)
    if case.is_torgb:
        styles = styles / math.sqrt(case.in_channels)

    def forward() -> torch.Tensor:
        return modulated_conv2d(x, weight, styles, not case.is_torgb, case.kernel - 1, gain, impl=form)

    def forward_only() -> None:
        with torch.no_grad():
            forward()

    with torch.no_grad():
        dy = torch.randn_like(forward())

    def both() -> None:
        wanted = [x, weight, styles] if case.is_trained else [x]
        for t in wanted:
            t.requires_grad_(True)
        torch.autograd.grad(forward(), wanted, dy)

    return {"forward": forward_only, "both": both}


def convolutions(context: Context) -> None:
    """The convolutions of the generator at the layers of the recipe in every form."""
    from torch_utils.ops.modulated_conv2d import forms_for
    torch.backends.cudnn.benchmark = True       # As in training.
    device, results, values = context.device, context.results, context.results.content["values"]
    cases, batch = conv_cases(recipe_config(context.quick)), 2 if context.quick else OPS_BATCH
    possible = {case: forms_for("cuda", torch.empty(batch, case.in_channels, case.size, case.size, device="meta"),
                                torch.empty(case.out_channels, case.in_channels, case.kernel, case.kernel,
                                            device="meta"), case.kernel - 1) for case in cases}
    results.put(runs={case.name: forms[0] for case, forms in possible.items()})
    for form in CONV_FORMS:
        for case in [case for case in cases if form in possible[case]]:
            for what, call in conv_calls(case, form, device, batch).items():
                results.put(**{f"{case.name}/{form}/{what}": op_seconds(call, device)})
            release_memory(device)
        if all(form in forms for forms in possible.values()):
            results.put(**{f"iteration/{form}": conv_seconds(values, [(case, form) for case in cases])})
        if form == "padded":
            total = conv_seconds(values, [(case, possible[case][0]) for case in cases])
            results.put(iteration=total)
            results.found(f"convolutions of an iteration, the forms that run: {1e3 * total:.3g} ms")


def conv_seconds(values: dict[str, float], cases: list[tuple[ConvCase, str]]) -> float:
    """Sums the convolutions of an iteration in these forms: a forward pass for D, both passes for G."""
    return sum(case.count * values[f"{case.name}/{form}/{what}"] for case, form in cases
               for what in ("forward", "both"))

#----------------------------------------------------------------------------
# Training iterations.

def make_step(generator: GeneratorConfig, batch: int, cls_weight: float, context: Context) -> tuple[Any, Any, Any]:
    """A training step of ours with random weights, and what its two phases get."""
    import bench_training as bench
    torch.backends.cudnn.benchmark = True       # As in training.
    small = SMALL_NETWORKS if context.quick else {}
    case = bench.Case("", generator, batch, cls_weight, **small)
    G, D, classifier = bench.make_networks(case, context.device)
    step = bench.OurStep(case, G, D, bench.PRECISIONS["fp32"], classifier)
    del G, D
    return step, *(bench.random_batch(case, len(case.backbones), context.device, seed) for seed in (1, 2))


def measure_iteration(prefix: str, step: Any, for_G: Any, for_D: Any, context: Context) -> None:
    """Gmain, Dmain and the average as a whole: seconds, images, memory, and how busy the GPU is."""
    import bench_training as bench
    device, results, batch = context.device, context.results, len(for_G.z)
    call = lambda: step.iteration(for_G, for_D, bench.CUR_NIMG)
    results.put(**{f"{prefix}/first": host_and_total(call, device)[1]})
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    once = host_and_total(call, device)[1]
    results.put(**{f"{prefix}/iteration": once, f"{prefix}/images_per_s": batch / once})
    repeats = 1 if context.quick else min(max(int(5 / once), 2), 9)
    times = [host_and_total(call, device) for _ in range(repeats)]
    host, total = (statistics.median(values) for values in zip(*times, strict=True))
    results.put(**{f"{prefix}/iteration": total, f"{prefix}/images_per_s": batch / total, f"{prefix}/host": host})
    if device.type == "cuda":
        results.put(**{f"{prefix}/peak": torch.cuda.max_memory_allocated(device)})
    work = device_work(call, device)
    if work is not None:
        results.put(**{f"{prefix}/kernel_seconds": work[0], f"{prefix}/kernels": work[1],
                       f"{prefix}/idle": max(1 - work[0] / total, 0.0)})


def median_seconds(call: Callable[[], object], rounds: int, context: Context) -> float:
    """Median of `rounds` calls, or one call in quick mode."""
    import bench_training as bench
    return statistics.median(bench.in_turn({"": call}, 1 if context.quick else rounds, context.device)[""])


def measure_parts(prefix: str, step: Any, for_G: Any, for_D: Any, context: Context) -> None:
    """Every part of the iteration by itself."""
    import bench_training as bench
    for name, call in bench.parts(step, for_G, for_D):
        context.results.put(**{f"{prefix}/part/{name}": median_seconds(call, 3, context)})


def measure_tf32(prefix: str, step: Any, for_G: Any, for_D: Any, context: Context) -> None:
    """The iteration with --feature-precision=tf32. The step has it from then on."""
    import bench_training as bench
    step.D.optimize_frozen_("tf32")
    step.loss.classifier.optimize_frozen_("tf32")
    call = lambda: step.iteration(for_G, for_D, bench.CUR_NIMG)
    context.results.put(**{f"{prefix}/tf32": median_seconds(call, 3, context)})


def measure_tuned(prefix: str, step: Any, for_G: Any, for_D: Any, context: Context) -> None:
    """The iteration with the forms that are the fastest on this GPU, and the one in which they are timed."""
    import bench_training as bench
    call = lambda: step.iteration(for_G, for_D, bench.CUR_NIMG)
    tune.use(context.device, None)
    first = host_and_total(call, context.device)[1]
    context.results.put(**{f"{prefix}/tuning": first, f"{prefix}/tuned": median_seconds(call, 5, context)})


@misc.full_precision()          # As training.
def iteration(context: Context) -> None:
    """One iteration of the 128 -> 256 stage at micro-batches of 8 and 32, as a whole and by part.

    The default forms of the operations come first, because to time all forms takes a while; the larger micro-batch
    has the defaults only.
    """
    config, sizes = recipe_config(context.quick), (2,) if context.quick else (8, 32)
    told = []
    for batch in sizes:
        release_memory(context.device)
        tune.use(context.device, tune.Choices(origin="the defaults, for this measurement"))
        try:
            step, for_G, for_D = make_step(config, batch, 8.0, context)
            measure_iteration(str(batch), step, for_G, for_D, context)
            values = context.results.content["values"]
            told.append(f"micro-batch {batch}: {1e3 * values[f'{batch}/iteration']:.0f} ms, "
                        f"{values[f'{batch}/images_per_s']:.3g} images/s")
            context.results.found("; ".join(told))
            if batch == sizes[0]:
                measure_tuned(str(batch), step, for_G, for_D, context)
                told[-1] += f", with the fastest forms {1e3 * values[f'{batch}/tuned']:.0f} ms"
                context.results.found("; ".join(told))
            measure_parts(str(batch), step, for_G, for_D, context)
            measure_tf32(str(batch), step, for_G, for_D, context)
        except torch.OutOfMemoryError:
            told.append(f"micro-batch {batch} does not fit into the memory")
            context.results.found("; ".join(told))
        step = for_G = for_D = None         # Frees their memory for the next size.


@misc.full_precision()
def stem(context: Context) -> None:
    """The stem at 16 pixels at a micro-batch of 8 and at that of --batch-gpu=auto."""
    config = stem_of_recipe(context.quick)
    measure_stem("small", config, 2 if context.quick else 8, context)
    release_memory(context.device)
    found = auto_micro_batch(config, context)
    context.results.put(auto=found)
    measure_stem("large", config, found, context)


def measure_stem(prefix: str, config: GeneratorConfig, batch: int, context: Context) -> None:
    """An iteration of the stem at one micro-batch."""
    measure_iteration(prefix, *make_step(config, batch, 0.0, context), context)
    values = context.results.content["values"]
    told = context.results.content["found"]
    context.results.found(f"{told}{'; ' if told else ''}micro-batch {batch}: "
                          f"{values[f'{prefix}/images_per_s']:.3g} images/s")


def auto_micro_batch(config: GeneratorConfig, context: Context) -> int:
    """As `--batch-gpu=auto` finds it for a batch of STEM_BATCH; its trials are in the step's log."""
    import bench_training as bench

    from training.run.batch_size import find_batch_gpu
    small = SMALL_NETWORKS if context.quick else {}
    case = bench.Case("", config, 4 if context.quick else STEM_BATCH, **small)
    return find_batch_gpu(bench.train_config(case), context.device, print)

#----------------------------------------------------------------------------
# Sampling.

@torch.no_grad()
def sampling(context: Context) -> None:
    """Images per second of the ImageNet-256 generator in the forms of bench_inference.py, without its reference."""
    import bench_inference as bench

    from training.networks_stylegan3 import Generator
    torch.manual_seed(0)
    batch = 2 if context.quick else 8
    config = recipe_config(True) if context.quick else bench.recipe_config(False)
    G = Generator(config).eval().requires_grad_(False).to(context.device)
    z, labels = torch.randn(batch, G.z_dim), torch.arange(batch) % CLASSES
    told = []
    forms = {name: form for name, form in bench.forms_of(context.device).items() if name != "reference"}
    for name, (surroundings, precision) in sorted(forms.items(), key=lambda form: form[0] != "fp16"):
        with surroundings():
            run = lambda p=precision: bench.synthesize(G, z, labels, precision=p)
            bench.run_once(run, context.device)
            once = bench.run_once(run, context.device)[0]
            times = [bench.run_once(run, context.device)[0] for _ in range(min(max(math.ceil(2 / once), 2), 9))]
        rate = batch / statistics.median(times)
        context.results.put(**{f"{name}/images_per_s": rate})
        told.append(f"{name}: {rate:.3g} images/s")
        context.results.found(", ".join(told))
