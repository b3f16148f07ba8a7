"""The forms of the modulated convolution against its definition, and against each other."""
import math

import pytest
import torch
import torch.nn.functional as F

from tests import needs_cuda
from tests.closeness import l2_error, rel_error
from torch_utils.ops import modulated_conv2d as ops
from torch_utils.ops.modulated_conv2d import FORMS, fit_channels, forms_for, modulated_conv2d, padded_channels

pytestmark = pytest.mark.numeric

KERNELS = {"3x3": 3, "1x1": 1}
# (in, out) channels: odd counts, an odd one on one side only, and none.
CHANNELS = [(5, 11), (8, 13), (9, 16), (16, 8)]


def arguments(kernel: int, channels: tuple[int, int] = (5, 11), dtype: torch.dtype = torch.float64,
              samples: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"x": [samples, channels[0], 7, 6], "weight": [channels[1], channels[0], kernel, kernel],
              "styles": [samples, channels[0]]}
    tensors = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["weight"] /= math.sqrt(channels[0] * kernel ** 2)       # Results are about 1, demodulated or not.
    return {name: x.to(dtype) for name, x in tensors.items()}


def convolve(tensors: dict[str, torch.Tensor], demodulate: bool, impl: str) -> torch.Tensor:
    """With the channels that are no filling."""
    kernel = tensors["weight"].shape[-1]
    gain = torch.tensor(0.7, dtype=tensors["styles"].dtype, device=tensors["styles"].device)
    y = modulated_conv2d(**tensors, demodulate=demodulate, padding=kernel - 1, input_gain=gain, impl=impl)
    return fit_channels(y, tensors["weight"].shape[0])


def definition(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool) -> torch.Tensor:
    """Sample by sample (Karras et al. 2020, equations 1-3), weights and styles normalised before as in StyleGAN3."""
    if demodulate:
        styles = styles / styles.square().mean().sqrt()
        weight = weight / weight.square().mean(dim=[1, 2, 3], keepdim=True).sqrt()
    found = []
    for n in range(len(x)):
        w = weight * styles[n].reshape(1, -1, 1, 1)
        if demodulate:
            w = w / (w.square().sum(dim=[1, 2, 3], keepdim=True) + 1e-8).sqrt()
        found.append(F.conv2d(x[n:n + 1], w * 0.7, padding=weight.shape[-1] - 1))
    return torch.cat(found)


def forms(tensors: dict[str, torch.Tensor]) -> list[str]:
    return forms_for("cpu", tensors["x"], tensors["weight"], tensors["weight"].shape[-1] - 1)


@pytest.mark.parametrize("demodulate", [True, False], ids=["demodulated", "plain"])
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("samples", [1, 3])
def test_every_form_is_the_definition(samples, kernel, channels, demodulate):
    """Also of maps that were filled up before, and whatever their layout is."""
    tensors = arguments(kernel, channels, samples=samples)
    wanted = definition(**tensors, demodulate=demodulate)
    filled = fit_channels(tensors["x"], padded_channels(channels[0]))
    for form in forms(tensors):
        for x in (tensors["x"], filled, filled.to(memory_format=torch.channels_last)):
            assert rel_error(convolve(tensors | {"x": x}, demodulate, form), wanted) < 1e-12, form


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("samples", [1, 3])
def test_added_channels_are_zero(samples, kernel):
    tensors = arguments(kernel, samples=samples)
    filling = ("padded", "per_sample", "products")
    assert sorted(forms(tensors)) == sorted(FORMS if kernel == 1 else FORMS.keys() - {"products"})
    for form in forms(tensors):
        y = modulated_conv2d(**tensors, demodulate=True, padding=kernel - 1, input_gain=torch.ones([]), impl=form)
        assert y.shape[1] == (16 if form in filling else 11), form
        assert not y[:, 11:].any(), form
        assert y.is_contiguous(memory_format=torch.channels_last) or form not in ("channels_last", *filling), form


def derivatives(tensors: dict[str, torch.Tensor], demodulate: bool, impl: str) -> dict[str, torch.Tensor]:
    """Result, gradients of a sum over it, and the gradients of the sum of their squares."""
    tensors = {name: x.clone().requires_grad_(True) for name, x in tensors.items()}
    y = convolve(tensors, demodulate, impl)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad((y * probe).sum(), list(tensors.values()), create_graph=True)
    seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), list(tensors.values()))
    return {"y": y} | {f"{kind} {name}": g for kind, found in (("d", grads), ("dd", seconds))
                       for name, g in zip(tensors, found, strict=True)}


@pytest.mark.parametrize("demodulate", [True, False], ids=["demodulated", "plain"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("samples", [1, 3])
def test_forms_have_equal_derivatives(samples, kernel, demodulate):
    """Gradients of the first and of the second order, which path lengths need."""
    tensors = arguments(kernel, samples=samples)
    wanted = derivatives(tensors, demodulate, "shared")
    for form in forms(tensors):
        for name, found in derivatives(tensors, demodulate, form).items():
            assert rel_error(found, wanted[name]) < 1e-12, (form, name)


@pytest.mark.parametrize("demodulate", [True, False], ids=["demodulated", "plain"])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_filling_channels_up_is_exact_in_single_precision(kernel, demodulate):
    """What is added is zero; only the order of sums may change."""
    tensors = arguments(kernel, dtype=torch.float32)
    wanted = derivatives(tensors, demodulate, "channels_last")
    for name, found in derivatives(tensors, demodulate, "padded").items():
        assert l2_error(found, wanted[name]) < 1e-6, name


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_frozen_layers(kernel):
    """Only the map has a gradient, which has one again; and but for the shared form nothing of the map is kept."""
    tensors = arguments(kernel)

    def run(impl: str) -> tuple[list[torch.Tensor], int]:
        kept = []
        mine = tensors | {"x": tensors["x"].clone().requires_grad_(True)}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            y = convolve(mine, True, impl)
        grad, = torch.autograd.grad(y.square().sum(), mine["x"], create_graph=True)
        second, = torch.autograd.grad(grad.square().sum(), mine["x"])
        return [y, grad, second], max(kept)

    wanted, _ = run("shared")
    for form in forms(tensors):
        found, largest = run(form)
        for one, other in zip(found, wanted, strict=True):
            assert rel_error(one, other) < 1e-12, form
        if form in ("channels_last", "padded"):
            assert largest <= 16 * 8 * kernel ** 2, form       # The weight.


def test_half_precision_stays_in_range():
    """Weights of 1000 and activations of 100 leave the range of float16 in a plain sum of 9 * 64 terms."""
    tensors = arguments(3, (64, 9))
    tensors |= {"x": tensors["x"] * 100, "weight": tensors["weight"] * 1000}
    wanted = definition(**tensors, demodulate=True)
    for form in forms(tensors):
        found = convolve({name: x.to(torch.float16 if name == "x" else torch.float32) for name, x in tensors.items()}
                         | {"x": tensors["x"].half()}, True, form)
        assert found.dtype == torch.float16
        assert rel_error(found, wanted) < 0.01, form

@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_forms_in_half_precision_on_a_gpu(kernel):
    tensors = arguments(kernel, (61, 43))
    wanted = first_derivatives(tensors, "shared")
    low = {name: x.to("cuda", torch.float16 if name == "x" else torch.float32) for name, x in tensors.items()}
    for form in forms(tensors):
        for found, value in zip(first_derivatives(low, form), wanted, strict=True):
            assert rel_error(found, value) < 0.02, form


def first_derivatives(tensors: dict[str, torch.Tensor], impl: str) -> list[torch.Tensor]:
    """Result and gradients."""
    tensors = {name: x.clone().requires_grad_(True) for name, x in tensors.items()}
    y = convolve(tensors, True, impl)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [y, *torch.autograd.grad(y, list(tensors.values()), probe.to(y))]

#----------------------------------------------------------------------------
# Which form.

def test_each_kind_of_device_has_its_form():
    x, weight, torgb = torch.zeros(2, 5, 20, 20), torch.zeros(11, 5, 3, 3), torch.zeros(3, 5, 1, 1)
    assert forms_for("cpu", x, weight, 2)[0] == "shared"
    assert forms_for("cpu", x.bfloat16(), weight, 2)[0] == "channels_last"
    assert forms_for("cuda", x, weight, 2) == ["padded", "shared", "channels_last", "grouped", "per_sample"]
    assert forms_for("cuda", x[:1], weight, 2) == ["per_sample", "shared", "channels_last", "padded", "grouped"]
    assert forms_for("cuda", x, torgb, 0)[0] == forms_for("cuda", x[:1], torgb, 0)[0] == "products"
    # 1x1 layers of config R: a weight per sample would be larger than the maps.
    assert forms_for("cuda", x[:, :, :3, :3], torch.zeros(11, 5, 1, 1), 0)[:2] == ["padded", "shared"]


def test_channels_that_fit_cost_nothing():
    x = torch.zeros(2, 16, 3, 3)
    assert fit_channels(x, 16) is x
    assert [padded_channels(n) for n in (1, 8, 861, 724, 609, 431, 362, 1024)] == \
        [8, 8, 864, 728, 616, 432, 368, 1024]
    assert ops.CHANNEL_MULTIPLE == 8


def test_mistakes():
    tensors = arguments(3)
    with pytest.raises(ValueError, match="impl='fast': choose from auto, shared, "):
        convolve(tensors, True, "fast")
    with pytest.raises(ValueError, match=r"impl='products': .* has only the forms shared, channels_last, "):
        convolve(tensors, True, "products")
