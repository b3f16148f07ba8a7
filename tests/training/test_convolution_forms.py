"""The generator as it works on a GPU, channels last and with channels filled up, tried on a processor."""
import collections
import functools
import math

import pytest
import torch

from tests import needs_cuda
from tests.closeness import rel_error
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from torch_utils.ops.modulated_conv2d import forms_for, modulated_conv2d, padded_channels
from training import networks_stylegan3
from training.generator.layer_schedule import stem_config, superres_config
from training.networks_stylegan3 import Generator, SynthesisNetwork

pytestmark = pytest.mark.numeric


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Convolutions take the form that GPUs take."""
    def convolve(x: torch.Tensor, weight: torch.Tensor, styles: torch.Tensor, demodulate: bool, padding: int,
                 input_gain: torch.Tensor) -> torch.Tensor:
        form = forms_for("cuda", x, weight, padding)[0]
        return modulated_conv2d(x, weight, styles, demodulate, padding, input_gain, impl=form)

    def begin() -> None:
        monkeypatch.setattr(networks_stylegan3, "modulated_conv2d", convolve)

    return begin


def small_generator(rotation: bool) -> Generator:
    """With layers of 8, 7, 5 and 4 channels; config R has twice as many."""
    torch.manual_seed(0)
    return Generator(superres_config(stem_config(16, 4, 64, 7, w_dim=16, rotation=rotation), 2, 4)).double()


def measured(synthesis: SynthesisNetwork, ws: torch.Tensor) -> dict[str, torch.Tensor]:
    """Images, gradients of a smooth function of them, and gradients of the norm of a gradient, as path lengths are."""
    ws = ws.clone().requires_grad_(True)
    parameters = dict(synthesis.named_parameters())
    images = synthesis(ws)
    grads = torch.autograd.grad(images.sin().sum(), [ws, *parameters.values()], create_graph=True)
    seconds = torch.autograd.grad(grads[0].square().sum(), [ws, *parameters.values()], materialize_grads=True)
    return {"images": images} | {f"{kind} {name}": g for kind, found in (("d", grads), ("dd", seconds))
                                 for name, g in zip(("ws", *parameters), found, strict=True)}


@pytest.mark.parametrize(("rotation", "samples"), [(False, 2), (False, 1), (True, 2)], ids=["t", "t, one", "r"])
def test_the_numbers_are_those_of_processors(rotation, samples, as_on_a_gpu):
    """In float64, where rounding takes no unit to its other side: images, gradients, those of gradients, magnitudes."""
    G = small_generator(rotation)
    ws = torch.randn(samples, G.num_ws, 16).double()
    before = {name: x.clone() for name, x in G.state_dict().items()}
    wanted = measured(G.synthesis, ws)
    G.synthesis(ws, update_magnitude_ema=True)
    magnitudes = {name: x.clone() for name, x in G.state_dict().items() if name.endswith("magnitude_ema")}
    G.load_state_dict(before)
    as_on_a_gpu()
    found = measured(G.synthesis, ws)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        assert rel_error(value, wanted[name]) < 1e-9, name
    G.synthesis(ws, update_magnitude_ema=True)
    for name, value in G.state_dict().items():
        assert value.shape == before[name].shape
        assert rel_error(value, magnitudes.get(name, before[name])) < 1e-12, name


def test_channels_are_filled_up_inside_the_network_only(as_on_a_gpu):
    G = small_generator(False)
    spec = G.config.layers[-3]
    layer, seen = getattr(G.synthesis, spec.name), []
    x, w = torch.randn(2, spec.in_channels, spec.in_size, spec.in_size).double(), torch.randn(2, 16).double()
    wanted = layer(x, w)
    as_on_a_gpu()
    assert spec.out_channels % 8
    assert layer(x, w).shape == wanted.shape
    assert rel_error(layer(x, w), wanted) < 1e-12
    for name in G.synthesis.layer_names:
        getattr(G.synthesis, name).register_forward_hook(lambda _module, _inputs, y: seen.append(y))
    images = G.synthesis(torch.randn(2, G.num_ws, 16).double())
    assert images.shape == (2, 3, 32, 32)
    assert images.is_contiguous()
    *maps, last = seen
    for y, spec in zip(maps, G.config.layers, strict=False):
        assert y.shape[1] == padded_channels(spec.out_channels)
        assert not y[:, spec.out_channels:].any()
    assert last.shape[1] == 3
    with pytest.raises(ValueError, match="expected a tensor of shape"):
        layer(x[:, 1:], w)

#----------------------------------------------------------------------------
# Passes over maps. The network is the 128 -> 256 stage of ImageNet, 64 times narrower: 31 layers.

MAP_SIZE = 4 * 36 ** 2      # Values in the smallest map, and far more than in the largest weight.


def imagenet_256() -> Generator:
    config = stem_config(16, 10, 65536 // 64, 16, w_dim=16)
    for _ in range(4):
        config = superres_config(config, 2, 7)
    return Generator(config).requires_grad_(False)


@pytest.mark.parametrize("samples", [1, 2])
def test_nothing_is_copied_between_layers(samples, as_on_a_gpu, monkeypatch):
    """Half precision is bfloat16 here, which processors can multiply."""
    as_on_a_gpu()
    check_passes("cpu", samples, torch.bfloat16, monkeypatch)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("samples", [1, 2])
def test_nothing_is_copied_between_layers_on_a_gpu(samples, as_on_a_gpu, monkeypatch):
    as_on_a_gpu()
    check_passes("cuda", samples, None, monkeypatch)


def check_passes(device: str, samples: int, low_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass of training: layouts, copies, and the operations that work on maps.

    Copies that are left: both changes of type at the input, the image's type and layout, the same for its gradient, and
    the gradient of the cut of ToRGB's 8 channels to 3, which is made contiguous and then has to be channels last.
    """
    torch.manual_seed(0)
    G = imagenet_256().to(device)
    monkeypatch.delenv("STYLESAN_OPS", raising=False)
    monkeypatch.setattr(networks_stylegan3, "filtered_lrelu", functools.partial(filtered_lrelu, impl=device))
    for p in G.trainable_parameters():
        p.requires_grad_(True)
    ws, layouts = torch.randn(samples, G.num_ws, 16, device=device), []

    def note(_module: torch.nn.Module, _inputs: tuple, y: torch.Tensor) -> None:
        layouts.append(y.is_contiguous(memory_format=torch.channels_last))
        y.register_hook(lambda grad: layouts.append(grad.is_contiguous(memory_format=torch.channels_last)))

    with torch.no_grad():
        G.synthesis(ws, low_dtype=low_dtype)        # Filters are read and operations are compiled once.
    for name in G.synthesis.layer_names[:-1]:
        getattr(G.synthesis, name).register_forward_hook(note)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        G.synthesis(ws, low_dtype=low_dtype).sum().backward()

    layers, heads = len(G.synthesis.layer_names) - 1, len(G.config.layers) - 1 - G.config.num_frozen_layers
    assert (layers, heads) == (30, 7)
    assert layouts == [True] * 2 * layers
    shapes = collections.defaultdict(list)      # Operation -> shapes of the maps that it worked on.
    for event in profile.events():
        maps = [tuple(shape) for shape in event.input_shapes or () if len(shape) == 4 and math.prod(shape) >= MAP_SIZE]
        shapes[event.name] += maps[:1]
    first, image, filled = ((samples, *shape) for shape in ((16, 36, 36), (3, 256, 256), (8, 256, 256)))
    # Every copy, whatever asks for it: `clone`, `contiguous`, `to`, `pad`, `cat` of maps.
    assert sorted(shapes["aten::copy_"]) == sorted([first, image, image, image, filled, first])
    assert not shapes["aten::cat"]
    # Besides convolutions and nonlinearities: two multiplications per layer, forward and backward. Where styles and
    # weights are trained, the gradients of both factors and of the bias: a product and a sum, and a sum. For a single
    # sample the factors are in the weight. Then the image: its scale, both ways; ToRGB's bias; the sum above.
    is_scaled = samples > 1
    assert len(shapes["aten::mul"]) == (4 * layers + 2 * heads) * is_scaled + 2
    assert len(shapes["aten::sum"]) == 2 * heads * is_scaled + heads + 2
    # Those of frozen layers have a convolution with the transposed weight for a gradient.
    assert len(shapes["aten::convolution"]) == layers + layers - heads
    assert len(shapes["aten::convolution_backward"]) == heads
