# SPDX-License-Identifier: Apache-2.0
"""Other implementations of the metrics, asked for the same things as ours: torch-fidelity, pytorch-fid, clean-fid.

They get the same images and the same files of weights, which hold random tensors in the published layouts. Used by the
tests and by benchmarks/compare_metrics.py.
"""
import contextlib
import os
import warnings
from pathlib import Path

import numpy as np
import torch

from metrics.detectors import INCEPTION_FILE, VGG16_FILE
from metrics.detectors.inception import make_inception
from metrics.detectors.random_weights import random_state
from metrics.detectors.vgg import make_vgg16

CPU = torch.device("cpu")
SIZE = 32
BATCH = 64

#----------------------------------------------------------------------------
# Weights and images.

def published_layout(make_net, seed):
    """Random weights; unlike those of ':random', statistics, scales and biases of normalisation matter."""
    with torch.device("meta"):
        net = make_net()
    rng = np.random.RandomState(seed)
    state = random_state(net, seed)
    for name, x in state.items():
        if x.ndim == 1:
            noise = torch.from_numpy(rng.standard_normal(len(x))).float()
            state[name] = x + 0.1 * (noise.abs() if name.endswith("running_var") else noise)
    if "fc.weight" in state:
        state["fc.weight"] *= 8         # Else all class probabilities are alike, and the inception score is one.
    return state


def write_weights(folder, vgg=True):
    """Files that every implementation will read: ours and torch-fidelity's name in `folder`, torch.hub's below it."""
    hub = Path(folder) / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    torch.save(published_layout(make_inception, 1), Path(folder) / INCEPTION_FILE.filename)
    os.link(Path(folder) / INCEPTION_FILE.filename, hub / INCEPTION_FILE.other_names[0])
    if vgg:
        torch.save(published_layout(make_vgg16, 2), Path(folder) / VGG16_FILE.filename)


def digits(num, rng):
    """scikit-learn's handwritten digits, 8 pixels, every pixel repeated to 32."""
    from sklearn.datasets import load_digits
    images = load_digits().images[rng.permutation(1797)[:num]]
    planes = (images / 16 * 255).astype(np.uint8).repeat(SIZE // 8, axis=1).repeat(SIZE // 8, axis=2)
    return np.repeat(planes[:, None], 3, axis=1)


def crops(num, rng):
    """Random squares of scikit-learn's two photographs, at their resolution."""
    from sklearn.datasets import load_sample_images
    photographs = load_sample_images().images
    squares = []
    for i in range(num):
        photograph = photographs[i % len(photographs)]
        y, x = (rng.randint(0, length - SIZE + 1) for length in photograph.shape[:2])
        squares.append(photograph[y : y + SIZE, x : x + SIZE].transpose(2, 0, 1))
    return np.stack(squares)


def noise(num, rng):
    """Independent uniform values."""
    return rng.randint(0, 256, [num, 3, SIZE, SIZE], dtype=np.uint8)


KINDS = {"digits": digits, "photographs": crops, "noise": noise}


def three_kinds(num, seed=0):
    """uint8 [num, 3, 32, 32]: digits, crops of photographs and noise by turns."""
    rng = np.random.RandomState(seed)
    each = [make(-(-num // len(KINDS)), rng) for make in KINDS.values()]
    return np.stack(each, axis=1).reshape(-1, 3, SIZE, SIZE)[:num]


@contextlib.contextmanager
def old_calls_allowed():
    """The other packages call what scipy and torch will remove."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

#----------------------------------------------------------------------------
# Features, float64 or float32 [N, D].

def by_torch_fidelity(images, weights):
    """Its Inception network: (pool, logits without bias, the map that sFID is cut from)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    kept = []
    with old_calls_allowed():
        net = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(weights / INCEPTION_FILE.filename))
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, inputs, output: kept.append(output[:, :7].clone()))
    with torch.no_grad():
        parts = [net(part) for part in torch.from_numpy(images).split(BATCH)]
    pool, logits = (torch.cat(x) for x in zip(*parts, strict=True))
    return pool, logits, torch.cat(kept)


def by_torch_fidelity_vgg(images, weights):
    """Its VGG16, rectified second fully connected layer."""
    from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16
    with old_calls_allowed():
        net = FeatureExtractorVGG16("x", ["fc2_relu"], str(weights / VGG16_FILE.filename))
    with torch.no_grad():
        return torch.cat([net(part)[0] for part in torch.from_numpy(images).split(BATCH)])


def by_pytorch_fid(files, weights, dims=2048):
    """Its whole path from files to features; `dims` chooses the layer."""
    from pytorch_fid.fid_score import get_activations
    from pytorch_fid.inception import InceptionV3
    before = os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(weights)
    try:
        with old_calls_allowed():
            net = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[dims]])
            return get_activations(files, net, BATCH, dims, "cpu", num_workers=0)
    finally:
        if before is None:
            del os.environ["TORCH_HOME"]
        else:
            os.environ["TORCH_HOME"] = before


def by_clean_fid(files, weights):
    """Its path from files to resized images, and torch-fidelity's network behind it.

    Its own network is a TorchScript file of the same weights, which cannot be written here.
    """
    from cleanfid.fid import get_files_features
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    with old_calls_allowed():
        net = FeatureExtractorInceptionV3("x", ["2048"], str(weights / INCEPTION_FILE.filename))
        resized = 299

        def model(x):
            """[N, 3, 299, 299] in 0..255, which the network's own resize leaves as it is."""
            assert x.shape[2:] == (resized, resized)
            return behind_the_resize(net, x)

        with torch.no_grad():
            return get_files_features([str(file) for file in files], model, num_workers=0, batch_size=BATCH, device=CPU,
                                      mode="clean", verbose=False)


def behind_the_resize(net, x):
    """torch-fidelity's network takes uint8 only: its blocks, on floats in 0..255."""
    x = (x - 128) / 128
    for name, block in net.named_children():
        if name != "fc":
            x = block(x)
    return x.flatten(1)

#----------------------------------------------------------------------------
# Metrics from features, by the others' functions.

def frechet_distance(a, b, package):
    """The distance of features [N, D], float64. Covariances have ddof 1 everywhere."""
    import cleanfid.fid
    import pytorch_fid.fid_score
    from torch_fidelity import metric_fid
    with old_calls_allowed():
        if package == "torch-fidelity":
            stats = [metric_fid.fid_features_to_statistics(torch.as_tensor(x)) for x in (a, b)]
            return metric_fid.fid_statistics_to_metric(*stats, False)["frechet_inception_distance"]
        moments = [moment for x in (a, b) for moment in (np.mean(x, axis=0), np.cov(x, rowvar=False))]
        theirs = {"pytorch-fid": pytorch_fid.fid_score.calculate_frechet_distance,
                  "clean-fid": cleanfid.fid.frechet_distance}
        return theirs[package](*moments)


def kernel_distances(a, b):
    """KID of one subset that is all: no choice is left to the seeds."""
    import cleanfid.fid
    from torch_fidelity import metric_kid
    size = min(len(a), len(b))
    with old_calls_allowed():
        theirs = metric_kid.kid_features_to_metric(torch.as_tensor(a), torch.as_tensor(b), kid_subsets=2,
                                                   kid_subset_size=size, verbose=False)
        return {"torch-fidelity": theirs["kernel_inception_distance_mean"],
                "clean-fid": cleanfid.fid.kernel_distance(np.asarray(a), np.asarray(b), 1, size)}


def inception_score(logits):
    """(mean, deviation), in the order of the rows."""
    from torch_fidelity import metric_isc
    with old_calls_allowed():
        found = metric_isc.isc_features_to_metric(torch.as_tensor(logits), splits=10, shuffle=False)
    return found["inception_score_mean"], found["inception_score_std"]


def precision_recall(real, gen):
    """(precision, recall), distances in float32. Its first argument is the generated side."""
    from torch_fidelity import metric_prc
    with old_calls_allowed():
        found = metric_prc.prc_features_to_metric(torch.as_tensor(gen), torch.as_tensor(real), prc_neighborhood=3,
                                                  prc_batch_size=10_000, verbose=False)
    return found["precision"], found["recall"]
