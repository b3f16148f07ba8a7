# SPDX-License-Identifier: Apache-2.0
"""The linear probe against scikit-learn, and as a metric."""
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeCV

from dnnlib import UserError
from inference.sampling import GeneratorSource
from metrics.linear_probe import HELD_OUT, PENALTIES, fit_probe, held_out_of, probe_accuracy
from metrics.metric_main import evaluate
from metrics.options import MetricOptions
from metrics.references import Reference
from tests.closeness import rel_error
from tests.metrics.generators import stem
from tests.metrics.helpers import ArraySource

pytestmark = pytest.mark.numeric


def digits(num=400):
    data = load_digits()
    return torch.from_numpy(data.data[:num]), torch.from_numpy(data.target[:num].astype(np.int64))


@pytest.mark.parametrize("num", [40, 400])          # Fewer images than the 64 features, and more.
def test_against_scikit_learn(num):
    x, labels = digits(num)
    ours = fit_probe(x, labels, 10)
    scale = x.std(dim=0, correction=0)
    standard = ((x - x.mean(dim=0)) / torch.where(scale == 0, 1, scale)).numpy()
    theirs = RidgeCV([penalty * num for penalty in PENALTIES]).fit(standard, np.eye(10)[labels.numpy()])
    assert ours.penalty * num == pytest.approx(theirs.alpha_)
    assert rel_error(ours.scores(x), torch.from_numpy(theirs.predict(standard))) < 1e-6


@pytest.mark.parametrize("value", [7.0, 0.1])       # The mean of many 0.1 is another number.
def test_a_feature_that_never_moves_says_nothing(value):
    """Also where it moves by rounding, and where it does move in the images that are judged."""
    x, labels = digits(100)
    still = value * (1 + 1e-7 * torch.randn(100, 1, generator=torch.Generator().manual_seed(0)))
    for column in (torch.full([100, 1], value), still):
        probe = fit_probe(torch.cat([x, column.double()], dim=1), labels, 10)
        for judged in (column, column + 1):
            scores = probe.scores(torch.cat([x, judged.double()], dim=1))
            assert rel_error(scores, fit_probe(x, labels, 10).scores(x)) < 1e-5


def test_what_is_held_out():
    labels = np.repeat([0, 1, 2], [50, 9, 4])
    held_out = held_out_of(labels, seed=3)
    assert np.bincount(labels[held_out], minlength=3).tolist() == [10, 1, 0]
    assert np.array_equal(held_out, held_out_of(labels, seed=3))
    assert not np.array_equal(held_out, held_out_of(labels, seed=4))


def test_accuracies():
    """The images themselves and their classes one further: the probe knows both, and what it does not know."""
    x, labels = digits()
    right = probe_accuracy(x, labels.numpy(), x, labels)
    wrong = probe_accuracy(x, labels.numpy(), x, (labels + 1) % 10)
    assert right.accuracy > 0.95
    assert wrong.accuracy < 0.05
    assert 0.85 < right.held_out == wrong.held_out < 1
    assert right.num_fitted + right.num_held_out == 400
    assert right.num_held_out == held_out_of(labels.numpy(), 0).sum()


@pytest.mark.parametrize("labels", [np.zeros(20, dtype=np.int64), np.arange(20)])
def test_too_little_to_learn(labels):
    with pytest.raises(UserError, match=f"two classes or more, and {HELD_OUT} of one"):
        probe_accuracy(torch.randn(20, 3), labels, torch.randn(2, 3), torch.zeros(2, dtype=torch.int64))

#----------------------------------------------------------------------------

CLASSES = ["dark", "light", "mixed"]


def shaded(num, seed, order=(0, 1, 2)):
    """Images of three shades, class i % 3, whose labels are numbered in another order."""
    rng = np.random.RandomState(seed)
    kinds = np.arange(num) % 3
    low, high = np.array([0, 156, 0])[kinds], np.array([100, 256, 256])[kinds]
    images = rng.randint(low[:, None, None, None], high[:, None, None, None], (num, 3, 16, 16)).astype(np.uint8)
    return ArraySource(images, np.argsort(order)[kinds], {"class_names": [CLASSES[i] for i in order]})


def probe(gen, real, detector="timm:test_efficientnet:random"):
    (record,) = evaluate(["probe_accuracy"], lambda num: gen, Reference(real),
                         MetricOptions(detector=detector, num=gen.num_images, use_cache=False))
    return record


def test_as_a_metric():
    """Classes are brought together by name, and the record says how far the probe is to be believed."""
    record = probe(shaded(18, 1, order=(2, 0, 1)), shaded(60, 0))
    assert record["metric"] == "probe_accuracy_test_efficientnet_random"
    assert list(record["results"]) == [record["metric"], f"{record['metric']}_held_out"]
    assert record["results"][record["metric"]] > 0.9
    assert (record["asked_for"], record["num_real"], record["lower_is_better"]) == ("probe_accuracy", 60, False)
    assert (record["settings"]["num_held_out"], record["settings"]["held_out_seed"]) == (12, 0)
    swapped = shaded(18, 1, order=(2, 0, 1))
    swapped.description["class_names"] = CLASSES
    assert probe(swapped, shaded(60, 0))["results"][record["metric"]] < 0.4


def test_what_is_missing_is_said_first():
    gen, real = shaded(6, 1), shaded(30, 0)
    with pytest.raises(UserError, match="learns the classes from the real images, but .* has no labels"):
        probe(gen, ArraySource(real.images))
    with pytest.raises(UserError, match="the images have no labels"):
        probe(ArraySource(gen.images), real)
    with pytest.raises(UserError, match="needs a network: name it with --detector"):
        probe(gen, real, detector=None)
    gen.description["class_names"], gen.label_values = ["dark", "light", "odd"], np.arange(3)
    real.num_read = 0
    with pytest.raises(UserError, match="none called odd"):
        probe(gen, real)
    gen.description["class_names"], gen.label_values = CLASSES, None
    with pytest.raises(UserError, match="which accuracy and probe_accuracy need"):
        probe(gen, real)
    with pytest.raises(UserError, match="the largest class has 4, and classes with images are 3"):
        probe(gen, shaded(12, 0))
    assert real.num_read == 0
    with pytest.raises(UserError, match="use --metrics=probe_accuracy"):
        evaluate(["accuracy"], lambda num: gen, None, MetricOptions(detector="timm:test_efficientnet:random", num=6))


def test_a_class_without_real_images_is_refused():
    """The probe never predicts it, so every image of it would count as wrong."""
    gen, real = shaded(6, 1), shaded(30, 0)
    kept = real.labels != 1
    few = ArraySource(real.images[kept], real.labels[kept], real.description)
    gen.label_values = np.arange(3)
    with pytest.raises(UserError, match="there are none of the classes light: name a data set"):
        probe(gen, few)
    gen.label_values = np.array([0, 2])
    probe(gen, few)
    assert few.num_read > 0


def test_a_network_without_classes_has_no_labels():
    """Its images are of no class, also not of the one that is called 0."""
    gen, real = GeneratorSource(stem(False, resolution=16), 4), shaded(30, 0)
    with pytest.raises(UserError, match="the images have no labels"):
        probe(gen, real)
    assert real.num_read == 0
    assert [labels for _images, labels in gen.batches(4)] == [None]
