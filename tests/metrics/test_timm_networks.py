# SPDX-License-Identifier: Apache-2.0
"""Networks of timm as detectors: images come to them by timm's own transforms, and nobody takes the result for FID."""
import numpy as np
import PIL.Image
import pytest
import torch
from timm.data import create_transform, resolve_data_config

from dnnlib import UserError
from metrics import prefetch
from metrics.detectors import asset_of, load_detector, require
from metrics.detectors.random_weights import random_state
from metrics.frechet import frechet_distance
from metrics.jobs import plan
from metrics.metric_main import evaluate
from metrics.options import MetricOptions
from metrics.real_side import compute_statistics
from metrics.references import Reference, load_statistics, save_statistics
from tests.closeness import assert_close, rel_error
from tests.metrics.helpers import ArraySource, random_images
from torch_utils.published import PACKAGES, load_published, make_model

CPU = torch.device("cpu")
TINY = "timm:test_efficientnet:random"      # 160 pixels, bicubic.


@pytest.fixture(autouse=True)
def _nothing_else_on_this_machine(monkeypatch):
    monkeypatch.delenv("STYLESAN_WEIGHTS", raising=False)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args: None)


def by_timm(net: torch.nn.Module, images: np.ndarray) -> torch.Tensor:
    """What timm's own transforms and the network's own calls give, on whole images."""
    prepare = create_transform(**{**resolve_data_config({}, model=net), "crop_pct": 1.0})
    x = torch.stack([prepare(PIL.Image.fromarray(image.transpose(1, 2, 0))) for image in images])
    with torch.no_grad():
        return net.eval().forward_head(net.forward_features(x), pre_logits=True)


@pytest.mark.numeric
@pytest.mark.parametrize("name", ["tf_efficientnet_lite2", "test_vit:random", "test_resnet:random"])
def test_features_are_timms(name):
    images = random_images(3, 48, seed=1)
    detector = load_detector(f"timm:{name}", CPU)
    net = make_model(name.removesuffix(":random"))
    if name.endswith("random"):
        net.load_state_dict(random_state(net))
    else:
        net = load_published(name).net
        assert detector.sha256 == PACKAGES[name].sha256
        assert (detector.feature_dim, detector.resize) == (1280, "pil_bicubic_uint8_260")
    features = detector.features(torch.from_numpy(images))["pool"]
    assert features.shape == (3, detector.feature_dim)
    assert rel_error(features, by_timm(net, images)) < 1e-5
    assert detector.outputs == ("pool",)


@pytest.mark.numeric
def test_distance_is_that_of_the_features():
    real, gen = (ArraySource(random_images(12, 16, seed, shift)) for seed, shift in ((0, 0), (1, 20)))
    options = MetricOptions(detector=TINY, num=12, use_cache=False)
    (record,) = evaluate(["fd"], lambda num: gen, Reference(real), options)
    net = make_model("test_efficientnet")
    net.load_state_dict(random_state(net))
    sides = [by_timm(net, source.images.numpy()).double().numpy() for source in (real, gen)]
    expected = frechet_distance(*(part for x in sides for part in (x.mean(axis=0), np.cov(x, rowvar=False))))
    name = "fd_test_efficientnet_random"
    assert list(record["results"]) == [name]
    assert_close(record["results"][name], expected, rtol=1e-4)
    assert (record["metric"], record["asked_for"], record["ddof"]) == (name, "fd", 1)
    assert (record["detector"], record["resize"]) == (TINY, "pil_bicubic_uint8_160")


@pytest.mark.parametrize(("metric", "detector", "name"), [
    ("fd", "timm:tf_efficientnet_lite2", "fd_tf_efficientnet_lite2"), ("fd", TINY, "fd_test_efficientnet_random"),
    ("fd", "inception-2015-12-05", "fd_inception-2015-12-05"), ("fd", "a/my judge.safetensors", "fd_my_judge"),
    ("kid", TINY, "kid_test_efficientnet_random"), ("pr", TINY, "pr_test_efficientnet_random"),
    ("fid", None, "fid"), ("fid", "vgg16", "fid"), ("fd_lite2_50k", None, "fd_lite2_50k@num=9"),
    ("fd_dinov2_50k", None, "fd_dinov2_50k@num=9")])
def test_names_of_results(metric, detector, name):
    (job,) = plan([metric], MetricOptions(detector=detector, num=9))
    assert job.name == name


@pytest.mark.parametrize(("metric", "detector", "match"), [
    ("fid", TINY, "fid is a distance of Inception's features: use --metrics=fd"), ("sfid", TINY, "use --metrics=fd"),
    ("fd_lite2_50k", TINY, "use --metrics=fd for another detector"), ("fd", None, "needs a network: name it")])
def test_nobody_takes_it_for_fid(metric, detector, match):
    with pytest.raises(UserError, match=match):
        plan([metric], MetricOptions(detector=detector))


def test_a_reference_of_another_detector_is_refused(tmp_path):
    real, gen = (ArraySource(random_images(6, 8, seed)) for seed in (0, 1))
    options = MetricOptions(detector=TINY, num=6, use_cache=False)
    saved = compute_statistics(real, load_detector(TINY, CPU), ["pool"], False, options)
    save_statistics(tmp_path / "ref.npz", saved, {}, real)
    reference = Reference(None, load_statistics(tmp_path / "ref.npz"))
    (record,) = evaluate(["fd"], lambda num: gen, reference, options)
    assert record["reference"]["used"] == "statistics"
    save_statistics(tmp_path / "ref.npz", saved, {"resize": {TINY: "pil_bilinear_uint8_160"}}, real)
    with pytest.raises(UserError, match="by pil_bilinear_uint8_160, but now come by pil_bicubic_uint8_160: make it"):
        evaluate(["fd"], lambda num: gen, Reference(None, load_statistics(tmp_path / "ref.npz")), options)
    options = MetricOptions(detector="timm:test_vit:random", num=6, use_cache=False)
    with pytest.raises(UserError, match="but not pool of timm:test_vit:random"):
        evaluate(["fd"], lambda num: gen, reference, options)


@pytest.mark.usefixtures("_no_packages")
def test_absent_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="tf_efficientnet_lite2.safetensors: .*pip install -e"):
        require("timm:tf_efficientnet_lite2")
    (need,) = prefetch.prefetch(["fd_lite2_50k"], MetricOptions(offline=True))
    assert (need.asset.filename, need.state) == ("tf_efficientnet_lite2.safetensors", "missing")


def test_what_needs_no_download():
    assert asset_of(TINY) is None
    assert asset_of("timm:tf_efficientnet_lite2") is None       # It is in a package.
    assert require("timm:tf_efficientnet_lite2").name == "efficientnet-lite2-9656183e.pth"


@pytest.mark.parametrize(("spec", "match"), [
    ("timm:tf_efficientnet_light2", r"timm has no model .* \(did you mean tf_efficientnet_lite2"),
    ("timm:tf_efficientnet_lite0.in1", r"timm has no model .* \(did you mean tf_efficientnet_lite0.in1k"),
    ("timm:tf_efficientnet_lite0.in1:random", "timm has no model"),
    ("timm:", "timm has no model ''"), ("timm:hf-hub:some/thing", "timm has no model"),
    ("timm:mixer_s32_224", "publishes no weights"), ("timmy", "name a network of timm as timm:MODEL")])
def test_unknown_names(spec, match):
    with pytest.raises(UserError, match=match):
        require(spec)
