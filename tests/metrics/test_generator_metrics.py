# SPDX-License-Identifier: Apache-2.0
"""ppl2_wend, eqt50k_int, eqt50k_frac and eqr50k by name: from the command line, in training, with several processes."""
import json

import numpy as np
import pytest
import torch

from inference.evaluation import network_evaluator
from metrics import latents
from metrics.detectors import lpips
from metrics.metric_main import evaluate, preflight
from metrics.options import MetricOptions
from metrics.protocols import METRICS
from tests.closeness import approx
from tests.metrics import generator_ranks
from tests.metrics.generators import source, stem
from tests.metrics.helpers import (
    in_two_processes,
    one_thread,
    random_images,
    random_lpips_states,
    write_folder,
    write_lpips_files,
)
from tests.metrics.test_calc_metrics import refused, run
from torch_utils import checkpoint

NAMES = ("ppl2_wend", "eqt50k_int", "eqt50k_frac", "eqr50k")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_lpips_files(tmp_path_factory.mktemp("weights"), random_lpips_states())


@pytest.fixture
def network(tmp_path):
    from training.config import to_dict
    from training.run.formats import NETWORK_FORMAT, VERSION
    G = stem(False, 16, 6, c_dim=3)
    checkpoint.save(tmp_path / "net.pkl", {
        "format": NETWORK_FORMAT, "version": VERSION, "generator_config": to_dict(G.config),
        "G_ema": G.state_dict(), "class_names": ["a", "b", "c"], "progress": {}})
    return tmp_path / "net.pkl"

#----------------------------------------------------------------------------

def test_names_are_protocols():
    for name in NAMES:
        assert METRICS[name].num_gen == 50_000
        assert METRICS[name].protocol == "stylegan"


def test_from_the_command_line(network, weights, tmp_path):
    want = (f"--network={network}", f"--metrics={','.join(NAMES)}", "--labels=balanced", "--num=5",
            f"--weights={weights}", "--allow-unverified-weights", f"--out={tmp_path}/results")
    records = run(*want)
    values = {key: value for record in records for key, value in record["results"].items()}
    assert list(values) == [f"{name}@num=5" for name in NAMES]
    assert values["ppl2_wend@num=5"] > 0
    assert values["eqt50k_int@num=5"] > 30
    ppl, eqt, _, eqr = records
    assert (ppl["detector"], len(ppl["detector_sha256"])) == ("lpips-vgg16", 64)
    assert (ppl["num_gen"], ppl["label_policy"], ppl["seed"]) == (5, "balanced", 0)
    assert ppl["settings"]["epsilon"] == 1e-4
    assert ppl["detector_unverified"]
    assert eqt["settings"] == {"unit": "dB", "max_translation": 0.125, "lanczos": None}
    assert eqr["settings"]["lanczos"] == 3
    assert eqr["detector"] is None
    assert len(list((tmp_path / "results").glob("metric-*.jsonl"))) == 4
    assert [r["results"] for r in run("--batch=1", *want)] == [r["results"] for r in records]
    assert run("--seed=1", *want)[1]["results"] != eqt["results"]


class TestRefusals:
    @pytest.mark.parametrize("name", NAMES)
    def test_images_are_not_enough(self, name, tmp_path):
        write_folder(tmp_path / "gen", random_images(4, 16))
        refused("measures the generator itself: name it with --network", f"--images={tmp_path}/gen",
                f"--metrics={name}", "--num=4")

    @pytest.mark.parametrize("name", NAMES[1:])
    def test_truncation(self, name, network):
        refused(f"--trunc=0.7: {name} is defined without truncation", f"--network={network}", f"--metrics={name}",
                "--num=4", "--trunc=0.7", "--labels=uniform")

    def test_truncated_source(self):
        truncated = source(stem(False, 16, 6), 4, truncation_psi=0.5)
        with pytest.raises(Exception, match=r"--trunc=0\.5: eqr50k is defined without truncation"):
            evaluate(["eqr50k"], lambda num: truncated, options=MetricOptions(num=4))

    def test_missing_weights_show_before_any_work(self, monkeypatch, tmp_path):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        with pytest.raises(Exception, match="vgg16-397923af.pth"):
            preflight(["ppl2_wend"], MetricOptions(offline=True))
        preflight(["eqr50k", "eqt50k_int", "eqt50k_frac"], MetricOptions(offline=True))

    def test_another_detector(self, network):
        refused("--detector=tiny: ppl2_wend measures the generator", f"--network={network}", "--metrics=ppl2_wend",
                "--detector=tiny")


def test_in_training(tmp_path):
    from training.dataset import ImageDataset
    write_folder(tmp_path / "data", random_images(6, 16))
    labels = {"labels": [[f"{i:06d}.png", i % 3] for i in range(6)]}
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(labels))
    G = stem(False, 16, 6, c_dim=3)
    before = {name: x.clone() for name, x in G.state_dict().items()}
    score = network_evaluator(["eqt50k_int"], ImageDataset(str(tmp_path / "data"), use_labels=True), None, 4,
                              torch.device("cpu"), seed=0)
    record = score(G)[0]
    assert record["results"]["eqt50k_int@num=4"] > 30
    assert record["label_policy"] == "dataset"
    assert all(torch.equal(x, before[name]) for name, x in G.state_dict().items())


@pytest.mark.numeric
@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "MAX_CHUNK", latents.MAX_CHUNK)        # The measurement changes it.
    with one_thread():
        generator_ranks.measure(str(tmp_path / "one.json"), torch.device("cpu"))
    in_two_processes("tests.metrics.generator_ranks", tmp_path / "two.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["processes"] == 2
    assert two["values"] == one["values"]                               # To the last digit.


@pytest.mark.numeric
def test_lpips_serves_path_length(weights):
    """The whole protocol on a real generator, put together by hand."""
    G, num = stem(False, 16, 6), 4
    options = MetricOptions(num=num, weights_dir=str(weights), allow_unverified=True)
    samples = source(G, num)
    value = evaluate(["ppl2_wend"], lambda n: samples, options=options)[0]["results"][f"ppl2_wend@num={num}"]
    distance = lpips.load_lpips(torch.device("cpu"), str(weights), True, True)
    positions = np.arange(num)
    with torch.no_grad():
        start, end = (G.mapping(samples.latents(positions, stream), torch.zeros(num, 0))
                      for stream in ("metric/z", "metric/z-other-end"))
        images = [(G.synthesis(ws, force_fp32=True) + 1) * 127.5 for ws in (start, start + 1e-4 * (end - start))]
        lengths = distance(*images).double() * 1e8
    assert value == approx(lengths.mean().item(), rel=0.02)      # Rounding: the images differ by 1e-4.
