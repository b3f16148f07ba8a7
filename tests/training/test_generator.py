"""Generators against the recorded numbers of the official implementation, and their own rules."""
import dataclasses
import functools

import numpy as np
import pytest
import scipy.signal
import torch

from tests.closeness import rel_error
from tests.parity import DOUBLE, DTYPES, VALUE, Recording, load_json
from torch_utils.ops.filtered_lrelu import filtered_lrelu
from training import networks_stylegan3
from training.config import from_dict, to_dict
from training.generator.layer_schedule import stem_config, superres_config
from training.generator.superres import load_stem_into, stage_table
from training.networks_stylegan3 import Generator, MappingNetwork, modulated_conv2d

pytestmark = pytest.mark.numeric


def entries() -> dict[str, dict]:
    return {e["name"]: e for e in load_json("generators.json")}


def config_of(name: str):
    entry = entries()[name]
    if entry["kind"] == "superres":
        return superres_config(config_of(entry["stem"]), entry["up_factor"], entry["head_layers"])
    args = entry["args"]
    return stem_config(args["img_resolution"], args["num_layers"], args["channel_base"], args["channel_max"],
                       z_dim=args["z_dim"], w_dim=args["w_dim"], c_dim=entry["c_dim"],
                       embed_dim=args["embedding"][1], mapping_layers=args["mapping_layers"],
                       magnitude_ema_beta=args["magnitude_ema_beta"],
                       rotation=entry["cfg"] == "r")


@pytest.fixture(scope="module", params=sorted(entries()))
def case(request):
    """(generator, recording) in both precisions."""
    return {dtype: load(request.param, dtype) for dtype in DTYPES}


def load(name: str, dtype: torch.dtype) -> tuple[Generator, Recording]:
    recording = Recording(name, dtype)
    G = Generator(config_of(name)).requires_grad_(False).eval()
    state = recording.inputs("state/")
    if G.c_dim == 0:
        state.pop("mapping.embed.weight", None)
    G.load_state_dict(state)
    return G.to(dtype), recording


@pytest.fixture(params=DTYPES, ids=str)
def recorded(request, case):
    return case[request.param]


def test_latents(recorded):
    G, data = recorded
    z, c = data.input("z"), data.input("c")
    assert data.error("ws", G.mapping(z, c)) < data.bound("ws")
    ws = G.mapping(z, c, truncation_psi=0.6)
    assert data.error("ws_trunc", ws) < data.bound("ws_trunc")
    ws = G.mapping(z, c, truncation_psi=0.6, truncation_cutoff=3)
    assert data.error("ws_trunc_cutoff3", ws) < data.bound("ws_trunc_cutoff3")


def test_images(recorded):
    """In both precisions the image was recorded for the `ws` of the single-precision file."""
    G, data = recorded
    assert data.error("img", G.synthesis(data.input("ws"))) < data.bound("img")
    z, c = data.input("z"), data.input("c")
    assert rel_error(G(z, c), data["img"]) < VALUE
    assert data.error("img_trunc", G(z, c, truncation_psi=0.6)) < data.bound("img_trunc")


def image_gradients(G, data, impl, monkeypatch) -> dict[str, torch.Tensor]:
    """Gradients of sum(img * probe) with respect to ws and every synthesis parameter, with one form of the filters."""
    monkeypatch.setattr(networks_stylegan3, "filtered_lrelu", functools.partial(filtered_lrelu, impl=impl))
    ws = data.input("ws").to(data.dtype).requires_grad_(True)
    parameters = {name: p for name, p in G.named_parameters() if name.startswith("synthesis.")}
    try:
        G.synthesis.requires_grad_(True)
        loss = (G.synthesis(ws) * data.input("probe")).sum()
        grads = torch.autograd.grad(loss, [ws, *parameters.values()])
    finally:
        G.requires_grad_(False)
    return {"grad/" + name: grad for name, grad in zip(["ws", *parameters], grads, strict=True)}


def test_gradients(recorded, monkeypatch):
    G, data = recorded
    grads = image_gradients(G, data, "auto", monkeypatch)
    assert set(grads) == set(data.keys("grad/"))
    for key, grad in grads.items():
        assert data.error(key, grad) < data.bound(key), key


@pytest.mark.slow
def test_gradients_do_not_depend_on_the_form_of_the_filters(case, monkeypatch):
    """In float64, where rounding crosses no kink, the form that training uses gives the same gradients."""
    G, data = case[torch.float64]
    ours, reference = (image_gradients(G, data, impl, monkeypatch) for impl in ("auto", "ref"))
    for name in reference:
        assert rel_error(ours[name], reference[name]) < DOUBLE, name


def test_transform_and_ema(recorded):
    G, data = recorded
    before = {k: v.clone() for k, v in G.state_dict().items()}
    try:
        G.synthesis.input.transform.copy_(data.input("transform"))
        assert data.error("img_transformed", G.synthesis(data.input("ws"))) < data.bound("img_transformed")
        G.load_state_dict(before)
        ws = G.mapping(data.input("z"), data.input("c"))
        G.mapping.update_w_avg(ws[:, 0], data.input("c"))
        img = G.synthesis(ws, update_magnitude_ema=True)
        state = G.state_dict()
        for key in data.keys("ema/"):
            assert data.error(key, state[key.removeprefix("ema/")]) < data.bound(key), key
        assert data.error("img_after_ema", img) < data.bound("img_after_ema")
    finally:
        G.load_state_dict(before)

#----------------------------------------------------------------------------

def small_config(**settings):
    return stem_config(16, 4, 256, 16, **({"w_dim": 32, "c_dim": 5, "embed_dim": 8} | settings))


@pytest.mark.parametrize("c_dim", [1, 3, 7])
def test_w_avg_equals_the_loop_over_samples(c_dim):
    torch.manual_seed(c_dim)
    mapping = MappingNetwork(small_config(c_dim=c_dim)).double()
    mapping.w_avg.normal_()
    labels = torch.randint(0, c_dim, [40])
    w = torch.randn([40, 32], dtype=torch.float64)
    expected = mapping.w_avg.clone()
    for i, label in enumerate(labels):
        expected[label] = w[i].lerp(expected[label], 0.998)
    mapping.update_w_avg(w, torch.nn.functional.one_hot(labels, c_dim).double())
    assert torch.allclose(mapping.w_avg, expected, atol=1e-12)


@pytest.mark.parametrize("demodulate", [True, False])
def test_shared_weights_equal_a_weight_per_sample(demodulate):
    torch.manual_seed(0)
    x, weight, styles = torch.randn(3, 4, 8, 8).double(), torch.randn(5, 4, 3, 3).double(), torch.randn(3, 4).double()
    gain = torch.tensor(0.7).double()
    y = modulated_conv2d(x, weight, styles, demodulate, padding=2, input_gain=gain)
    s = styles / styles.square().mean().sqrt() if demodulate else styles
    w = weight / weight.square().mean(dim=[1, 2, 3], keepdim=True).sqrt() if demodulate else weight
    for n in range(3):
        per_sample = w * s[n].reshape(1, -1, 1, 1)
        if demodulate:
            per_sample = per_sample / (per_sample.square().sum(dim=[1, 2, 3], keepdim=True) + 1e-8).sqrt()
        expected = torch.nn.functional.conv2d(x[n:n + 1], per_sample * gain, padding=2)
        assert torch.allclose(y[n:n + 1], expected, atol=1e-12)


@pytest.mark.slow
def test_frequencies_fill_the_disc_uniformly():
    """A radius r of a uniform disc of radius 1 has distribution function r^2."""
    torch.manual_seed(0)
    config = small_config()
    spec = dataclasses.replace(config.input, channels=20000)
    from training.networks_stylegan3 import SynthesisInput
    radii = np.sort(SynthesisInput(spec, 4).freqs.norm(dim=1).numpy() / spec.bandwidth)
    quantiles = (np.arange(len(radii)) + 0.5) / len(radii)
    # The official rule is close to uniform, not exactly: r = exp(-g^2/4) has distribution function r^2.
    assert np.abs(radii ** 2 - quantiles).max() < 0.02
    assert radii.max() <= 1


@pytest.mark.parametrize("num_taps", [2, 6, 12, 13, 24])
@pytest.mark.parametrize("width", [0.02, 0.3, 0.7, 3.0, 6.0])
def test_filters_are_those_of_scipy(num_taps, width):
    """For attenuations on both sides of 21 and 50 dB. Radial filters are compared with the recorded ones."""
    want = scipy.signal.firwin(num_taps, 2.5, width=width, fs=16)
    got = networks_stylegan3.design_lowpass_filter(num_taps, 2.5, width, 16)
    assert np.allclose(got, want, rtol=1e-7, atol=1e-9)
    beta = scipy.signal.kaiser_beta(scipy.signal.kaiser_atten(num_taps, width / 8))
    assert np.allclose(networks_stylegan3.kaiser_window(num_taps, width / 8), np.kaiser(num_taps, beta), rtol=1e-13)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, 8.0, float("nan")])
@pytest.mark.parametrize("radial", [False, True])
def test_filters_without_a_cutoff(cutoff, radial):
    with pytest.raises(ValueError, match="must be above 0 and below half the sampling rate of 16"):
        networks_stylegan3.design_lowpass_filter(6, cutoff, 1.0, 16, radial)


def test_growing_keeps_the_stem_bit_for_bit():
    torch.manual_seed(0)
    stem = Generator(small_config())
    G = Generator(superres_config(stem.config, up_factor=2, head_layers=4))
    load_stem_into(G, stem.config, stem.state_dict())
    kept = stem.config.layers[:-3]
    assert G.config.layers[:len(kept)] == kept
    for name, value in stem.state_dict().items():
        if name.startswith(("mapping.", "synthesis.input.")) or name.split(".")[1] in [k.name for k in kept]:
            assert torch.equal(G.state_dict()[name], value), name
    trained = {id(p) for p in G.trainable_parameters()}
    for name, p in G.named_parameters():
        frozen = name.startswith("mapping.") or name.split(".")[1] in [k.name for k in kept]
        assert (id(p) in trained) != frozen, name
    assert "frozen" in stage_table(G.config, stem.config)
    assert "cut" in stage_table(G.config, stem.config)


def test_a_head_may_be_of_the_other_kind():
    """FFHQ: config R at 16 and 32, config T from 64 on."""
    stem = small_config(rotation=True)
    config = superres_config(stem, 2, 4, rotation=False)
    assert [layer.conv_kernel for layer in config.layers] == [1] * 2 + [3] * 4 + [1]
    assert (config.channel_base, config.channel_max) == (stem.channel_base // 2, stem.channel_max // 2)
    G = Generator(config)
    assert G.synthesis(torch.randn(2, G.num_ws, 32)).shape == (2, 3, 32, 32)


def test_config_survives_json():
    import json
    config = superres_config(small_config(), 4, 5)
    assert from_dict(type(config), json.loads(json.dumps(to_dict(config)))) == config
