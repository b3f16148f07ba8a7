# SPDX-License-Identifier: Apache-2.0
"""The names: what each fixes, that its value is that of the formula, what it shares, and what it says of itself."""
import dataclasses

import numpy as np
import pytest
import torch

from dnnlib import UserError
from metrics import formulas, metric_main, protocols, records
from metrics.detectors import DETECTORS, Detector, load_detector
from metrics.frechet import frechet_distance
from metrics.kernel_distance import kernel_distance
from metrics.metric_main import evaluate
from metrics.options import MetricOptions
from metrics.precision_recall import precision_recall
from metrics.protocols import METRICS, GeneratorKind, Metric
from metrics.real_side import RealSide, view_of
from metrics.references import Reference, Statistics, load_statistics
from metrics.sources import Mirrored, seeded_indices, seeded_subset
from tests.closeness import approx
from tests.metrics.helpers import ArraySource, SequentialSource, random_images, tiny_kind

CPU = torch.device("cpu")
INCEPTION, PYTORCH_FID = "inception-2015-12-05", "inception-2015-12-05-pytorch_fid"
NUM = 170
ADM = ["adm_is50k", "adm_fid50k", "adm_sfid50k", "adm_pr50k"]
IMAGE_NAMES = [*ADM, "fid50k_full", "kid50k_full", "pr50k3_full", "is50k", "sfid50k_full", "rfid50k_full",
               "clean_fid50k", "pytorch_fid", "pytorch_fid_64", "fd_dinov2_50k", "rfid_random", "fid50k", "kid50k",
               "pr50k3", "pr10k3"]

pytestmark = pytest.mark.usefixtures("tiny_inception")


@pytest.fixture
def real():
    return ArraySource(random_images(230, seed=1))


@pytest.fixture
def gen():
    return ArraySource(random_images(NUM, seed=2, shift=20))


def options(**changes):
    return MetricOptions(**{"num": NUM, **changes})


def score(names, gen, reference, **changes):
    """Values by name, without the note that there were fewer images."""
    results = evaluate(names, lambda num: seeded_subset(gen, num, 0), reference, options(**changes))
    return {key.partition("@")[0]: value for record in results for key, value in record["results"].items()}


def features(source, output, detector=INCEPTION):
    network = load_detector(detector, CPU)
    return torch.cat([network.features(x)[output] for x, _ in source.batches(64)])


def gaussian(x, ddof):
    return x.double().numpy().mean(axis=0), np.cov(x.double().numpy().T, ddof=ddof)


def distance(real, gen, output="pool", ddof=0):
    return approx(frechet_distance(*gaussian(features(real, output), ddof), *gaussian(features(gen, output), ddof)),
                  rel=1e-9)

#----------------------------------------------------------------------------

class TestTable:
    def test_every_name(self):
        table = {name: (m.detector, m.num_gen, m.num_real, m.protocol) for name in METRICS
                 if not isinstance((m := METRICS[name]).kind, GeneratorKind)}
        k10, k50 = 10_000, 50_000
        assert table == {
            "fid50k_full": (INCEPTION, k50, None, "stylegan"), "fid10k_full": (INCEPTION, k10, None, "stylegan"),
            "kid50k_full": (INCEPTION, k50, None, "stylegan"), "pr50k3_full": ("vgg16", k50, None, "stylegan"),
            "is50k": (INCEPTION, k50, None, "stylegan"), "sfid50k_full": (INCEPTION, k50, None, "stylegan"),
            "rfid50k_full": ("inception-rand", k50, None, "stylegan"),
            "fid50k": (INCEPTION, k50, k50, "stylegan-legacy"), "kid50k": (INCEPTION, k50, k50, "stylegan-legacy"),
            "pr50k3": ("vgg16", k50, k50, "stylegan-legacy"), "pr10k3": ("vgg16", k10, k10, "stylegan-legacy"),
            "adm_fid50k": (INCEPTION, k50, None, "adm"), "adm_sfid50k": (INCEPTION, k50, None, "adm"),
            "adm_is50k": (INCEPTION, k50, None, "adm"), "adm_pr50k": (INCEPTION, k50, None, "adm"),
            "pytorch_fid": (PYTORCH_FID, None, None, "pytorch-fid"),
            "pytorch_fid_64": (PYTORCH_FID, None, None, "pytorch-fid"),
            "pytorch_fid_192": (PYTORCH_FID, None, None, "pytorch-fid"),
            "pytorch_fid_768": (PYTORCH_FID, None, None, "pytorch-fid"),
            "clean_fid50k": ("inception-2015-12-05-clean", k50, None, "clean-fid"),
            "fd_dinov2_50k": ("dinov2-vitl14", k50, None, "fd-dinov2"),
            **{f"fd_lite{i}_50k": (f"timm:tf_efficientnet_lite{i}", k50, None, "fd-timm") for i in range(3)},
            "rfid_random": ("inception-random-seed0", k50, None, "own"),
            **{name: (None, None, None, "free") for name in (
                "fid", "sfid", "kid", "pr", "is", "accuracy", "fd", "probe_accuracy")}}

    def test_names_that_measure_the_generator(self):
        table = {name: (m.num_gen, m.protocol) for name in METRICS
                 if isinstance((m := METRICS[name]).kind, GeneratorKind)}
        assert table == {name: (50_000, "stylegan") for name in ("ppl2_wend", "eqt50k_int", "eqt50k_frac", "eqr50k")}

    def test_groups(self):
        assert protocols.expand(["adm", "fid", "adm_fid50k"]) == [*ADM, "fid"]
        assert protocols.expand(["stylegan"]) == ["fid50k_full", "kid50k_full", "pr50k3_full", "is50k"]
        assert not set(protocols.GROUPS) & set(METRICS)

#----------------------------------------------------------------------------

@pytest.mark.numeric
class TestValues:
    def test_frechet_distances(self, real, gen):
        got = score(["fid50k_full", "adm_fid50k", "sfid50k_full", "adm_sfid50k", "clean_fid50k", "fd_dinov2_50k",
                     "rfid50k_full", "rfid_random"], gen, Reference(real))
        assert got["fid50k_full"] == got["rfid50k_full"] == got["rfid_random"] == distance(real, gen)
        assert got["adm_fid50k"] == got["clean_fid50k"] == got["fd_dinov2_50k"] == distance(real, gen, ddof=1)
        assert got["sfid50k_full"] == distance(real, gen, "spatial")
        assert got["adm_sfid50k"] == distance(real, gen, "spatial", ddof=1)
        assert got["adm_fid50k"] != got["fid50k_full"]

    def test_adm_inception_score_is_in_file_order(self, gen, monkeypatch):
        monkeypatch.setattr(formulas, "ADM_SPLIT", 60)
        probs = torch.softmax(features(gen, "logits_unbiased").double(), dim=1).numpy()
        scores = []
        for part in (probs[:60], probs[60:120], probs[120:]):
            kl = part * (np.log(part) - np.log(part.mean(axis=0)))
            scores.append(np.exp(kl.sum(axis=1).mean()))
        record = evaluate(["adm_is50k"], lambda num: gen, None, options())[0]
        assert record["results"] == {f"adm_is50k@num={NUM}": approx(np.mean(scores), rel=1e-12)}
        assert record["settings"] == {"num_splits": 3, "split_size": 60, "order": "file"}

    def test_pytorch_fid_takes_all_images_there_are(self, real, gen):
        """Its layers have names of their own, and other numbers of images no other name."""
        names = ["pytorch_fid", "pytorch_fid_64"]
        evaluated = evaluate(names, lambda _num: gen, Reference(real), MetricOptions(num_images=NUM))
        assert [record["results"] for record in evaluated] == [
            {"pytorch_fid": distance(real, gen, ddof=1)}, {"pytorch_fid_64": distance(real, gen, "pool64", ddof=1)}]
        assert [(r["num_gen"], r["num_real"], r["ddof"], r["protocol"]) for r in evaluated] == [
            (NUM, 230, 1, "pytorch-fid")] * 2
        few = score_record(["pytorch_fid"], gen, Reference(real), num=100)
        assert (few["metric"], few["num_gen"]) == ("pytorch_fid", 100)
        assert METRICS["pytorch_fid"].is_official

    def test_statistics_of_pytorch_fid(self, real, gen, tmp_path, capsys):
        """Its files name no layer: the width says it."""
        values = score(["pytorch_fid", "pytorch_fid_64"], gen, Reference(real))
        for name, output in (("pytorch_fid_64", "pool64"), ("pytorch_fid", "pool")):
            x = features(real, output, PYTORCH_FID).double().numpy()
            np.savez(tmp_path / "ref.npz", mu=x.mean(axis=0), sigma=np.cov(x, rowvar=False))
            reference = Reference(statistics=load_statistics(tmp_path / "ref.npz"))
            assert score([name], gen, reference) == {name: approx(values[name], rel=1e-9)}
            assert f"taken as {PYTORCH_FID}, which the metric uses" in capsys.readouterr().err
        with pytest.raises(UserError, match="holds statistics of pool of an unnamed detector, but not pool64 of"):
            score(["pytorch_fid_64"], gen, reference)

    def test_adm_precision_and_recall_do_not_round(self, real, gen):
        got = score(["adm_pr50k"], gen, Reference(real))
        exact = precision_recall(features(real, "pool"), features(gen, "pool"), dtype=torch.float32)
        assert (got["adm_pr50k_precision"], got["adm_pr50k_recall"]) == (exact.precision, exact.recall)

    def test_features_beyond_fp16(self):
        """Only what is rounded to fp16 must be in its range.

        Neighbourhoods have a radius of 200,000 or, at the ends, 300,000. No point lies on one: there rounding would
        decide, because squares of such numbers take more than the 24 bits of float32.
        """
        x = torch.arange(20).float()[:, None] * 1e5
        with pytest.raises(UserError, match="exceed 65504, the range of"):
            precision_recall(x, x)
        assert precision_recall(x, x + 3.7e5, dtype=torch.float32).recall == 19 / 20

    def test_legacy_names_take_a_choice_of_the_real_images(self, real, gen, replace):
        for name in ("fid50k", "kid50k", "pr50k3"):
            replace(METRICS, name, dataclasses.replace(METRICS[name], num_real=100))
        some = ArraySource(real.images[seeded_indices(230, 100, 0)])
        a, b = features(some, "pool"), features(gen, "pool")
        got = score(["fid50k", "kid50k", "pr50k3", "fid50k_full"], gen, Reference(real))
        assert got["fid50k"] == distance(some, gen)
        assert got["fid50k_full"] == distance(real, gen)
        assert got["kid50k"] == kernel_distance(a, b).mean
        assert got["pr50k3_precision"] == precision_recall(a, b).precision

    def test_legacy_names_take_mirror_images(self, real, gen):
        names = ["fid50k", "fid50k_full", "adm_fid50k"]
        plain, mirrored = (score(names, gen, Reference(real), mirror=mirror) for mirror in (False, True))
        assert mirrored["fid50k"] == distance(Mirrored(real), gen)
        assert mirrored["fid50k"] != plain["fid50k"] == plain["fid50k_full"] == mirrored["fid50k_full"]
        assert metric_main.unused_mirror(names, options(mirror=True)).startswith(
            "--mirror has no effect on fid50k_full, adm_fid50k")

    def test_a_limit_after_mirroring(self, real):
        assert view_of(real, False, 230) is real
        view = view_of(real, True, 300)
        assert view.num_images == 300
        assert view.fingerprint != view_of(real, True, 299).fingerprint

    def test_fewer_features_of_those_that_were_kept(self, real):
        """A metric with a lower limit sees what it would have seen alone."""
        x = features(real, "pool")
        kept = x[seeded_indices(230, 200, 0)]
        side = RealSide(features={"pool": kept}, num_images=230)
        assert torch.equal(side.some_features("pool", 50), x[seeded_indices(230, 50, 0)])
        assert side.some_features("pool", 200) is kept

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_batch_size_does_not_show(self, real, gen, batch_size):
        expected = score(IMAGE_NAMES, gen, Reference(real), batch_size=100, use_cache=False)
        plain = SequentialSource(gen.images)
        assert score(IMAGE_NAMES, plain, Reference(real), batch_size=batch_size, use_cache=False) == expected
        assert len(expected) == len(IMAGE_NAMES) + 5        # is50k and the precisions and recalls have two values.

    def test_from_the_cache(self, real, gen):
        first = score(IMAGE_NAMES, gen, Reference(real))
        read = real.num_read
        assert score(IMAGE_NAMES, gen, Reference(real)) == first
        assert real.num_read == read

#----------------------------------------------------------------------------

class TestSharing:
    def test_one_pass_of_a_detector(self, real, gen, monkeypatch):
        """Over outputs, divisors, limits of features and free names."""
        seen, asked = [], set()
        original = Detector.features

        def count(self, images, keys=None):
            seen.append(len(images))
            asked.update(keys)
            return original(self, images, keys)

        monkeypatch.setattr(Detector, "features", count)
        monkeypatch.setattr(protocols, "ADM_REAL_FEATURES", 100)
        score([*ADM, "fid50k_full", "kid50k_full", "is50k", "sfid50k_full", "fid", "sfid"], gen, Reference(real))
        assert sum(seen) == NUM + 230
        assert gen.num_read == NUM
        assert asked == {"pool", "spatial", "logits_unbiased"}

    def test_outputs_that_nobody_needs_are_not_asked_for(self, real, gen, monkeypatch):
        asked = []
        original = Detector.features
        monkeypatch.setattr(Detector, "features", lambda self, x, keys: asked.append(keys) or original(self, x, keys))
        score(["fid50k_full"], gen, Reference(real))
        assert {frozenset(keys) for keys in asked} == {frozenset({"pool"})}

#----------------------------------------------------------------------------

class TestNumbers:
    def test_too_few_images_are_refused(self, gen, real):
        with pytest.raises(UserError, match=f"has {NUM} images, the metric asks for 50000: supply more, or set --num"):
            score(["adm_fid50k"], gen, Reference(real), num=None)

    def test_another_number_is_in_the_name(self, gen, real, tmp_path):
        record = score_record(["pr50k3_full"], gen, Reference(real), num=40, out_dir=str(tmp_path))
        assert record["metric"] == "pr50k3_full@num=40"
        assert set(record["results"]) == {"pr50k3_full_precision@num=40", "pr50k3_full_recall@num=40"}
        assert record["num_gen"] == 40
        assert (tmp_path / "metric-pr50k3_full@num=40.jsonl").is_file()
        assert score_record(["fid"], gen, Reference(real), num=40)["metric"] == "fid"

    def test_the_number_of_the_protocol_leaves_the_name(self, gen, real, replace):
        replace(METRICS, "fid10k_full", dataclasses.replace(METRICS["fid10k_full"], num_gen=40))
        assert score_record(["fid10k_full"], gen, Reference(real), num=40)["metric"] == "fid10k_full"

    def test_more_images_give_a_seeded_choice_in_order(self, gen):
        subset = seeded_subset(gen, 40, 0)
        assert np.array_equal(subset.indices, np.sort(subset.indices))
        assert score(["adm_is50k"], gen, None, num=40) == score(["adm_is50k"], subset, None, num=40)


def score_record(names, gen, reference, **changes):
    return evaluate(names, lambda num: seeded_subset(gen, num, 0), reference, options(**changes))[0]

#----------------------------------------------------------------------------

@pytest.mark.numeric
class TestReferences:
    def stored(self, source, output="pool", num=230, **changes):
        mean, covariance = gaussian(features(source, output), 0 if num else 1)
        return Statistics(mean, covariance, num, None, path="ref.npz", output=output, **changes)

    def test_statistics_of_each_output(self, real, gen):
        reference = Reference(statistics=(self.stored(real), self.stored(real, "spatial")))
        got = score(["adm_fid50k", "adm_sfid50k", "sfid50k_full"], gen, reference)
        assert got["adm_fid50k"] == distance(real, gen, ddof=1)
        assert got["adm_sfid50k"] == distance(real, gen, "spatial", ddof=1)
        assert got["sfid50k_full"] == distance(real, gen, "spatial")

    def test_foreign_statistics_are_exact_under_ddof_1(self, real, gen):
        """They are divided by N - 1 and do not say N: ADM's protocol takes them as they are."""
        record = score_record(["adm_fid50k"], gen, Reference(statistics=(self.stored(real, num=None),)))
        assert next(iter(record["results"].values())) == distance(real, gen, ddof=1)
        assert record["num_real"] is None

    def test_foreign_statistics_under_ddof_0_are_warned_of(self, real, gen, capsys):
        for num, said in ((None, True), (230, False)):
            score(["fid"], gen, Reference(statistics=(self.stored(real, num=num),)))
            assert ("ref.npz does not say of how many images it is" in capsys.readouterr().err) == said

    def test_an_output_that_the_file_does_not_hold(self, real, gen, capsys):
        with pytest.raises(UserError, match=r"--metrics=adm_sfid50k: not computable from ref\.npz, which holds .*pool "
                           f"of an unnamed detector, but not spatial of {INCEPTION}"):
            score(["adm_sfid50k"], gen, Reference(statistics=(self.stored(real),)))
        record = score_record(["adm_sfid50k"], gen, Reference(real, (self.stored(real),)))
        assert record["reference"]["used"] == "images"
        assert "holds no statistics of spatial" in capsys.readouterr().err

    def test_the_record_says_what_was_used(self, real, gen):
        reference = Reference(real, (self.stored(real, fingerprint="abc"),))
        fid, pr, score_ = evaluate(["adm_fid50k", "adm_pr50k", "adm_is50k"], lambda num: gen, reference, options())
        assert (fid["reference"]["used"], fid["reference"]["path"]) == ("statistics", "ref.npz")
        assert fid["reference_fingerprint"] == "abc"
        assert (pr["reference"]["used"], pr["reference"]["kind"]) == ("images", "array")
        assert pr["reference_fingerprint"] == real.fingerprint
        assert score_["reference"] is score_["num_real"] is None

    def test_a_limit_cannot_be_taken_of_statistics(self, real, gen, replace):
        replace(METRICS, "fid50k", dataclasses.replace(METRICS["fid50k"], num_real=100))
        for num, text in ((230, "230"), (None, "an unknown number of")):
            with pytest.raises(UserError, match=rf"npz: holds statistics of {text} images, but the metric takes 100"):
                score(["fid50k"], gen, Reference(statistics=(self.stored(real, num=num),)))

    def test_sorted_samples_are_warned_of(self, gen, capsys):
        gen.description["labels_sorted"] = True
        score(["adm_is50k"], gen, None)
        assert "adm_is50k takes the images in file order, and they are sorted by class" in capsys.readouterr().err
        score(["is50k"], gen, None)
        assert "sorted" not in capsys.readouterr().err

    def test_too_few_on_either_side(self, real, gen):
        """One image has no covariance that is divided by N - 1, and is said so before any work."""
        one = ArraySource(random_images(1))
        for name, least in (("adm_fid50k", 2), ("clean_fid50k", 2), ("pytorch_fid", 2), ("kid", 2), ("pr", 4)):
            with pytest.raises(UserError, match=f"{name}: 1 generated image is too few: give {least} or more"):
                score([name], one, Reference(real), num=1)
            with pytest.raises(UserError, match=f"{name}: 1 real image is too few: give {least} or more"):
                score([name], gen, Reference(one))
        assert one.num_read == 0
        stored = Statistics(np.zeros(16), np.zeros([16, 16]), 1, None, path="ref.npz")
        with pytest.raises(UserError, match="1 real image is too few"):
            score(["adm_fid50k"], gen, Reference(statistics=(stored,)))
        assert score(["fid"], one, Reference(one), num=1) == {"fid": 0}         # Divided by N there is one.

    def test_a_detector_without_the_output(self, real, gen, replace):
        replace(DETECTORS, "flat", tiny_kind("logits"))
        with pytest.raises(UserError, match="--detector=flat: sfid needs its output 'spatial'"):
            score(["sfid"], gen, Reference(real), detector="flat")

#----------------------------------------------------------------------------

class TestRecord:
    def test_protocol_and_divisor(self, real, gen):
        results = evaluate(["adm", "fid50k_full", "fid50k", "clean_fid50k", "fid"], lambda num: gen, Reference(real),
                           options())
        assert [(r["metric"].partition("@")[0], r["protocol"], r["ddof"]) for r in results] == [
            ("adm_is50k", "adm", None), ("adm_fid50k", "adm", 1), ("adm_sfid50k", "adm", 1), ("adm_pr50k", "adm", None),
            ("fid50k_full", "stylegan", 0), ("fid50k", "stylegan-legacy", 0), ("clean_fid50k", "clean-fid", 1),
            ("fid", "free", 0)]
        assert results[3]["settings"]["rounded_to"] == "not rounded"

    def test_the_detector_says_how_it_resizes(self, real, gen, replace):
        replace(DETECTORS, INCEPTION, dataclasses.replace(tiny_kind(), resize="TF1 bilinear"))
        assert score_record(["fid50k_full"], gen, Reference(real))["resize"] == "TF1 bilinear"

    def test_the_lines_of_adm(self, real, gen):
        results = evaluate(["fid", "adm_pr50k", "adm"], lambda num: gen, Reference(real), options())
        values = {key.partition("@")[0]: value for r in results for key, value in r["results"].items()}
        assert records.adm_lines(results) == [
            f"Inception Score: {values['adm_is50k']}", f"FID: {values['adm_fid50k']}",
            f"sFID: {values['adm_sfid50k']}", f"Precision: {values['adm_pr50k_precision']}",
            f"Recall: {values['adm_pr50k_recall']}"]
        assert records.adm_lines(evaluate(["fid"], lambda num: gen, Reference(real), options())) == []

#----------------------------------------------------------------------------

class LatentArray(ArraySource):
    """A source that a generator could stand behind."""

    G = "the generator"

    def __init__(self, images):
        super().__init__(images)
        self.labels = lambda positions: None

    def batches_at(self, batch_size, indices):
        for part in torch.as_tensor(list(indices)).split(batch_size):
            yield self.images[part], None

    def latents(self, positions, stream="metric/z"): ...

    def uniform(self, positions, shape, stream): ...


@pytest.mark.numeric
class TestGenerators:
    @pytest.fixture
    def kind(self, replace):
        kind = GeneratorKind(lambda source, options: ({"": 3.5}, {"of": source.G, "detector": "net"}))
        replace(METRICS, "ppl2_wend", Metric("ppl2_wend", kind, num_gen=NUM, protocol="stylegan"))
        return kind

    def test_values_and_record(self, kind, real):
        source = LatentArray(random_images(NUM))
        ppl, fid = evaluate(["ppl2_wend", "fid50k_full"], lambda num: source, Reference(real), options())
        assert ppl["results"] == {"ppl2_wend": 3.5}
        assert ppl["settings"] == {"of": "the generator"}
        assert (ppl["detector"], ppl["reference"], ppl["num_gen"]) == ("net", None, NUM)
        assert fid["detector"] == INCEPTION
        assert records.table([ppl]).splitlines()[1].split() == ["ppl2_wend", "3.5", str(NUM), "-", "net", "-"]

    def test_images_alone_are_refused(self, kind, gen):
        with pytest.raises(UserError, match="--metrics=ppl2_wend: .*--network"):
            evaluate(["ppl2_wend"], lambda num: gen, None, options())
        with pytest.raises(UserError, match="--detector=vgg16: ppl2_wend measures the generator and takes none"):
            metric_main.preflight(["ppl2_wend"], options(detector="vgg16"))

    def test_its_files_are_looked_for_first(self, kind, replace):
        def missing(options):
            raise UserError("no weights")
        replace(METRICS, "ppl2_wend",
                Metric("ppl2_wend", dataclasses.replace(kind, require=missing), num_gen=NUM))
        with pytest.raises(UserError, match="no weights"):
            metric_main.preflight(["fid", "ppl2_wend"], options())
        assert not metric_main.needs_reference(["ppl2_wend"])
        assert metric_main.needs_generator(["fid", "ppl2_wend"]) == ["ppl2_wend"]

#----------------------------------------------------------------------------

def test_what_a_saved_reference_must_hold():
    def wanted(names, **changes):
        return metric_main.statistics_to_save(names, MetricOptions(**changes))

    inception = {INCEPTION: ["pool", "spatial"]}
    assert wanted([]) == wanted(["adm"]) == wanted(["kid50k_full", "accuracy"][:1]) == inception
    assert wanted(["fd_dinov2_50k"]) == {**inception, "dinov2-vitl14": ["pool"]}
    assert wanted(["fid"], detector="tiny") == {"tiny": ["pool"]}


def test_unverified_weights_are_passed_on(monkeypatch, gen, real):
    asked = []
    original = metric_main.load_detector
    monkeypatch.setattr(metric_main, "load_detector", lambda *args: asked.append(args[4]) or original(*args))
    monkeypatch.setattr(metric_main, "require", lambda *args: asked.append(args[3]))
    metric_main.preflight(["fid"], options(allow_unverified=True))
    score(["fid50k_full"], gen, Reference(real), allow_unverified=True)
    score(["fid50k_full"], gen, Reference(real))
    assert asked == [True, True, False]
