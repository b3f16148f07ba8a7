# SPDX-License-Identifier: Apache-2.0
"""Whole evaluations: protocols, sharing of work, independence of batch size and order, records, refusals."""
import dataclasses
import json

import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics import metric_main, protocols
from metrics.detectors import DETECTORS, Detector, load_detector
from metrics.frechet import frechet_distance
from metrics.kernel_distance import kernel_distance
from metrics.metric_main import METRICS, evaluate
from metrics.options import MetricOptions
from metrics.precision_recall import precision_recall
from metrics.references import Reference, Statistics
from metrics.sources import Mirrored, seeded_subset
from tests.closeness import approx
from tests.metrics.helpers import ArraySource, SequentialSource, random_images

CPU = torch.device("cpu")
ALL = ["fid", "kid", "pr", "is"]


@pytest.fixture
def real():
    return ArraySource(random_images(230, seed=1))


@pytest.fixture
def gen():
    return ArraySource(random_images(170, seed=2, shift=20), np.arange(170) % 10,
                       {"labels": "uniform", "seed": 5, "truncation_psi": 0.7})


def options(**changes):
    return MetricOptions(**{"detector": "tiny", "num": 170, **changes})


def values(results):
    return {key: value for record in results for key, value in record["results"].items()}


def pool(source, detector="tiny"):
    detector = load_detector(detector, CPU)
    return torch.cat([detector.features(x)["pool"] for x, _ in source.batches(64)])

#----------------------------------------------------------------------------

@pytest.mark.numeric
class TestValues:
    def test_against_the_formulas(self, real, gen):
        got = values(evaluate(ALL, lambda num: gen, Reference(real), options()))
        a, b = pool(real), pool(gen)
        stats = lambda x: (x.double().numpy().mean(axis=0), np.cov(x.double().numpy().T, ddof=0))
        assert got["fid"] == approx(frechet_distance(*stats(a), *stats(b)), rel=1e-9)
        assert got["kid"] == approx(kernel_distance(a, b).mean, rel=1e-9)
        result = precision_recall(a, b)
        assert (got["pr_precision"], got["pr_recall"]) == (result.precision, result.recall)
        assert 1 < got["is_mean"] < 10
        assert got["is_std"] > 0

    def test_same_images(self, real):
        got = values(evaluate(["fid", "pr"], lambda num: real, Reference(real), options(num=230)))
        assert got["fid"] == approx(0, abs=1e-6)
        assert got["pr_precision"] == got["pr_recall"] == 1

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_batch_size_does_not_show(self, real, gen, batch_size):
        expected = values(evaluate(ALL, lambda num: gen, Reference(real), options(batch_size=100, use_cache=False)))
        got = values(evaluate(ALL, lambda num: gen, Reference(real), options(batch_size=batch_size, use_cache=False)))
        assert got == expected

    def test_sequential_sources(self, real, gen):
        expected = values(evaluate(ALL, lambda num: gen, Reference(real), options()))
        plain = SequentialSource(gen.images)
        got = values(evaluate(ALL, lambda num: plain, Reference(SequentialSource(real.images)),
                              options(use_cache=False, batch_size=50)))
        assert got == expected

    def test_seed_moves_only_random_choices(self, real, gen):
        first, again, other = (values(evaluate(ALL, lambda num: gen, Reference(real), options(seed=seed)))
                               for seed in (0, 0, 1))
        assert first == again
        assert first["fid"] == other["fid"]
        assert first["is_mean"] != other["is_mean"]

    def test_mirror(self, real, gen):
        got = values(evaluate(["fid"], lambda num: gen, Reference(real), options(mirror=True)))
        expected = values(evaluate(["fid"], lambda num: gen, Reference(Mirrored(real)), options()))
        assert got["fid"] == approx(expected["fid"], rel=1e-12)
        assert got["fid"] != values(evaluate(["fid"], lambda num: gen, Reference(real), options()))["fid"]

    def test_accuracy(self, gen):
        judge = load_detector("tiny-judge", CPU)
        predicted = torch.cat([judge.features(x)["logits"] for x, _ in gen.batches(64)]).argmax(dim=1)
        labels = predicted.clone()
        labels[:17] = (labels[:17] + 1) % 10
        source = ArraySource(gen.images, labels)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metric_main, "load_detector", lambda *_: _judge(judge))
            results = evaluate(["accuracy"], lambda num: source, None, options(detector="tiny-judge"))
        assert values(results) == {"accuracy": 153 / 170}


def _judge(detector, names=None):
    return Detector("judge", "0", 16, ("pool", "logits"), detector._forward, CPU, num_classes=10, class_names=names)

#----------------------------------------------------------------------------

class TestProtocols:
    def test_official_names(self, tiny_inception, replace):
        names = ["fid50k_full", "fid10k_full", "kid50k_full", "pr50k3_full", "is50k"]
        for name in names:
            small = dataclasses.replace(METRICS[name], num_gen=METRICS[name].num_gen // 100)
            replace(METRICS, name, small)
        gen, real = ArraySource(random_images(600, 4)), ArraySource(random_images(300, 4, seed=9))
        asked = []

        def generated(num):
            asked.append(num)
            return seeded_subset(gen, num, 0)

        results = evaluate(names, generated, Reference(real), MetricOptions())
        assert [record["metric"] for record in results] == names
        assert asked == [100, 500]
        assert set(values(results)) == {"fid50k_full", "fid10k_full", "kid50k_full", "pr50k3_full_precision",
                                        "pr50k3_full_recall", "is50k_mean", "is50k_std"}
        assert [record["detector"] for record in results] == [METRICS[name].detector for name in names]
        assert [record["num_gen"] for record in results] == [500, 100, 500, 500, 500]

    def test_one_forward_pass_serves_all(self, real, gen, monkeypatch):
        seen = []
        original = Detector.features
        monkeypatch.setattr(Detector, "features",
                            lambda self, *args: seen.append(len(args[0])) or original(self, *args))
        evaluate(["fid", "kid", "pr", "is"], lambda num: gen, Reference(real), options())
        assert sum(seen) == 170 + 230
        assert gen.num_read == 170
        assert real.num_read == 230

    def test_two_detectors_share_the_images(self, real, gen, tiny_inception):
        evaluate(["fid", "pr"], lambda num: gen, Reference(real), MetricOptions(num=170))
        assert gen.num_read == 170

    def test_official_names_ignore_mirror(self, tiny_inception, replace):
        replace(METRICS, "fid50k_full",
                protocols.Metric("fid50k_full", protocols.FID, protocols.INCEPTION, 170))
        gen, real = ArraySource(random_images(170)), ArraySource(random_images(80, seed=3))
        plain, mirrored = (evaluate(["fid50k_full"], lambda num: gen, Reference(real), MetricOptions(mirror=mirror))
                           for mirror in (False, True))
        assert values(plain) == values(mirrored)
        assert "--mirror has no effect on fid50k_full" in metric_main.unused_mirror(
            ["fid50k_full", "fid"], MetricOptions(mirror=True))
        assert metric_main.unused_mirror(["fid"], MetricOptions(mirror=True)) is None

    @pytest.mark.parametrize(("name", "changes", "match"), [
        ("fid50k_full", {"detector": "tiny"}, "fid50k_full is defined with inception-2015-12-05: use --metrics=fid"),
        ("pr50k3_full", {"detector": "inception-2015-12-05"}, "defined with vgg16: use --metrics=pr"),
        ("accuracy", {}, "needs a classifier of the classes"),
        ("fid", {"detector": "no-such"}, "unknown detector"),
        ("fid51k", {}, "unknown metric 'fid51k': choose from accuracy, adm_fid50k,"),
    ])
    def test_refusals(self, name, changes, match):
        with pytest.raises(UserError, match=match):
            metric_main.preflight([name], MetricOptions(**changes))
        with pytest.raises(UserError, match=match):
            evaluate([name], lambda num: None, Reference(ArraySource(random_images(1))), MetricOptions(**changes))

    def test_preflight_finds_missing_weights(self):
        with pytest.raises(UserError, match="vgg16-397923af.pth"):
            metric_main.preflight(["pr50k3_full"], MetricOptions())
        metric_main.preflight(["fid", "is"], options())

    def test_needs(self):
        assert metric_main.needs_labels(["fid", "accuracy"])
        assert not metric_main.needs_labels(["fid", "is"])
        assert metric_main.needs_reference(["is", "kid"])
        assert not metric_main.needs_reference(["is50k", "accuracy"])

#----------------------------------------------------------------------------

class TestRefusals:
    def check(self, match, names, gen, reference, **changes):
        with pytest.raises(UserError, match=match) as err:
            evaluate(names, lambda num: gen, reference, options(**changes))
        assert "\n" not in str(err.value)

    def test_no_reference(self, gen):
        self.check("compares with real images: name them with --data or --ref", ["fid"], gen, None)
        self.check("compares with real images", ["kid"], gen, Reference())

    @pytest.mark.parametrize("name", ["pr", "kid"])
    def test_statistics_serve_fid_only(self, gen, name):
        statistics = Statistics(np.zeros(16), np.eye(16), 100, None, path="adm.npz")
        self.check(f"--metrics={name}: not computable from adm.npz.*--data or --ref", [name], gen,
                   Reference(statistics=(statistics,)))

    def test_statistics_with_images_serve_all(self, real, gen, capsys):
        statistics = Statistics(np.zeros(16), np.eye(16), None, None, path="adm.npz")
        results = evaluate(["fid", "pr"], lambda num: gen, Reference(real, (statistics,)), options())
        assert results[0]["num_real"] is None
        assert results[1]["num_real"] == 230
        assert "adm.npz does not say which detector made it" in capsys.readouterr().err

    def test_mirrored_statistics(self, gen):
        statistics = Statistics(np.zeros(16), np.eye(16), 100, None, path="adm.npz")
        self.check("--mirror: adm.npz holds statistics", ["fid"], gen, Reference(statistics=(statistics,)),
                   mirror=True)

    def test_sizes_differ(self, gen):
        self.check("generated images have 8x8 pixels, the reference 16x16", ["fid"], gen,
                   Reference(ArraySource(random_images(10, 16))))

    def test_detector_without_classes(self, gen, replace):
        kind = DETECTORS["tiny"]
        replace(DETECTORS, "blind", type(kind)(None, 16, ("pool",), kind.make_net, kind.forward))
        self.check("--detector=blind: is needs a classifier", ["is"], gen, None, detector="blind")
        self.check("classes of the data", ["accuracy"], gen, None, detector="tiny")

    @pytest.mark.parametrize(("labels", "names", "match"), [
        (None, None, "the images have no labels"),
        (np.full(170, 10), None, "label 10, but the judge judge knows 10 classes"),
        (np.zeros(170), ["dog", "cow"], "the images: has the classes dog, cow, but the judge --detector=judge has cat, "
                                        "dog, and none called cow"),
    ])
    def test_accuracy(self, labels, names, match, monkeypatch):
        judge = load_detector("tiny-judge", CPU)
        monkeypatch.setattr(metric_main, "load_detector", lambda *_: _judge(judge, ["cat", "dog"] if names else None))
        labels = None if labels is None else labels.astype(np.int64)
        source = ArraySource(random_images(170), labels, {"class_names": names})
        self.check(match, ["accuracy"], source, None, detector="tiny-judge")

#----------------------------------------------------------------------------

class TestRecords:
    def test_everything_that_makes_the_number(self, real, gen, tmp_path):
        record = evaluate(["fid"], lambda num: gen, Reference(real),
                          options(out_dir=str(tmp_path / "out"), record={"snapshot_pkl": "a.pkl"}))[0]
        assert record["metric"] == "fid"
        assert (record["num_real"], record["num_gen"], record["ddof"]) == (230, 170, 0)
        assert (record["label_policy"], record["seed"], record["truncation_psi"]) == ("uniform", 5, 0.7)
        assert record["detector"] == "tiny"
        assert record["detector_sha256"] == load_detector("tiny", CPU).sha256
        assert record["reference_fingerprint"] == real.fingerprint
        assert record["generated"]["fingerprint"] == gen.fingerprint
        assert record["snapshot_pkl"] == "a.pkl"
        assert record["total_time"] > 0
        assert {"torch", "commit"} <= set(record["version"])
        lines = (tmp_path / "out" / "metric-fid.jsonl").read_text().splitlines()
        assert [json.loads(line)["results"] for line in lines] == [record["results"]]

    def test_lines_are_appended(self, real, gen, tmp_path):
        for _run in range(2):
            evaluate(["fid", "kid"], lambda num: gen, Reference(real), options(out_dir=str(tmp_path)))
        for name in ("fid", "kid"):
            assert len((tmp_path / f"metric-{name}.jsonl").read_text().splitlines()) == 2

    def test_settings(self, real, gen):
        kid, pr, score = evaluate(["kid", "pr", "is"], lambda num: gen, Reference(real), options(seed=3))
        assert kid["settings"]["subset_size"] == 170
        assert kid["settings"]["subset_seed"] == 3
        assert pr["settings"]["k"] == 3
        assert score["settings"] == {"num_splits": 10, "order": "shuffled", "shuffle_seed": 3}
        assert score["num_real"] is None

    def test_few_images_are_warned_of(self, capsys):
        few, many = ArraySource(random_images(10)), ArraySource(random_images(40))
        evaluate(["fid"], lambda num: few, Reference(many), options(num=10))
        err = capsys.readouterr().err
        assert "10 generated images are fewer than the 16 features" in err
        assert "real images are fewer" not in err
