# SPDX-License-Identifier: Apache-2.0
"""The judge of small generators: a classifier of the real images, in whose features generated ones are compared."""
from typing import NamedTuple

import torch

from metrics.frechet import frechet_distance
from metrics.precision_recall import precision_recall
from transport.common.study import seeded
from transport.san.adversarial import adam

FEATURES = 64
COVERED = 0.2           # A class counts if it has more than a fifth of its share of the real images among the samples.


class Score(NamedTuple):
    """Generated images against all real ones, in features of the judge."""

    fid: float              # Frechet distance; the features are not Inception's, so it is no FID of the literature.
    precision: float
    recall: float
    classes: int            # How many classes the samples look like: see COVERED.


class Judge(torch.nn.Module):
    """A classifier, [N, C, R, R] -> logits [N, classes]; `features` [N, 64] are what scores compare."""

    def __init__(self, channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        layers: list[torch.nn.Module] = [torch.nn.Conv2d(channels, 32, 3, padding=1), torch.nn.ReLU()]
        while resolution > 4:
            layers += [torch.nn.Conv2d(32, 32, 3, stride=2, padding=1), torch.nn.ReLU()]
            resolution //= 2
        self.features = torch.nn.Sequential(*layers, torch.nn.Flatten(),
                                            torch.nn.Linear(32 * resolution ** 2, FEATURES), torch.nn.ReLU())
        self.last = torch.nn.Linear(FEATURES, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.features(x))
        return logits


def train_judge(images: torch.Tensor, labels: torch.Tensor, steps: int) -> tuple[Judge, float]:
    """Train a classifier on every second image; returns it and its accuracy on the others. All runs share it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge(images.shape[1], images.shape[2], int(labels.max()) + 1).to(images.device)
    optimizer, draws = adam(judge, 1e-3, (0.9, 0.999)), seeded(0, "judge")
    known = torch.arange(0, len(images), 2)
    for _ in range(steps):
        index = known[torch.randint(len(known), [64], generator=draws)].to(images.device)
        loss = torch.nn.functional.cross_entropy(judge(images[index]), labels[index])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = judge(images[1::2]).argmax(dim=1) == labels[1::2]
    return judge, float(right.double().mean())


@torch.no_grad()
def score(judge: Judge, real: torch.Tensor, fake: torch.Tensor) -> Score:
    """Frechet distance, precision and recall (k = 3), and classes covered, of images [N, C, R, R] each."""
    a, b = judge.features(real).cpu(), judge.features(fake).cpu()
    moments = [part for h in (a.double(), b.double()) for part in (h.mean(dim=0).numpy(), torch.cov(h.T).numpy())]
    manifold = precision_recall(a, b, dtype=torch.float32)
    shares = [torch.bincount(judge(x).argmax(dim=1), minlength=judge.last.out_features) / len(x) for x in (real, fake)]
    covered = int(((shares[1] > COVERED * shares[0]) & (shares[0] > 0)).sum())
    return Score(frechet_distance(*moments), manifold.precision, manifold.recall, covered)
