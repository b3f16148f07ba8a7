# SPDX-License-Identifier: Apache-2.0
"""A plain DCGAN on scikit-learn's handwritten digits, and the same as SAN: several seeds, scored by a classifier."""
import dataclasses
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from metrics.frechet import frechet_distance
from metrics.precision_recall import precision_recall
from torch_utils.images import to_uint8_nearest
from training.discriminators.san import GAN_LOSSES
from transport.common import plotting
from transport.common.sklearn_images import load_digits
from transport.common.study import check, option, seeded, study_command
from transport.san.adversarial import Discriminator, adam, train_discriminator, train_generator

NUM_CLASSES = 10
Z_DIM, FEATURES = 32, 64
MODELS = ("gan", "san")
COVERED = 0.02                                  # A class counts if more than 2 % of all samples look like it.


@dataclasses.dataclass(frozen=True)
class Config:
    """DCGAN against DCGAN as SAN on 8-pixel digits."""

    loss: str = option("hinge", "Loss of the GAN", choices=tuple(GAN_LOSSES))
    seeds: int = option(5, "Runs per model, with seeds 0, 1, ...", min=1)
    iterations: int = option(2000, "Steps of each network", min=1)
    batch: int = option(64, "Images per step", min=2)
    lr: float = option(2e-4, "Learning rate of Adam, betas (0.5, 0.999)", min=0, open_min=True)
    judge_steps: int = option(1000, "Steps of the classifier that scores", min=1)
    device: str = option("cpu", "Where to compute")

    def quick(self) -> "Config":
        return dataclasses.replace(self, seeds=1, iterations=800)


class Score(NamedTuple):
    """Generated digits against all real ones, in features of the classifier."""

    fid: float
    precision: float
    recall: float
    classes: int            # How many of the ten more than 2 % of the samples look like.


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores per model and seed, the scores of real digits, and samples of seed 0."""

    config: Config
    scores: dict[str, list[Score]]
    accuracy: float                     # The classifier's, on the half that it did not train on.
    real: Score                         # One half of the digits against the other.
    samples: dict[str, np.ndarray]      # uint8 [N, 8, 8].

    def headline(self) -> dict[str, Any]:
        line: dict[str, Any] = {"loss": self.config.loss, "iterations": self.config.iterations,
                                "judge_accuracy": round(self.accuracy, 4),
                                "real_halves": [round(value, 3) for value in self.real]}
        for model, scores in self.scores.items():
            for field in ("fid", "precision", "recall"):
                values = [getattr(score, field) for score in scores]
                line[f"{model}_{field}"] = [round(value, 3) for value in values]
                line[f"{model}_{field}_mean"] = round(statistics.fmean(values), 3)
                line[f"{model}_{field}_std"] = round(statistics.stdev(values), 3) if len(values) > 1 else None
            line[f"{model}_classes"] = [score.classes for score in scores]
        return line

#----------------------------------------------------------------------------


def generator() -> torch.nn.Sequential:
    """DCGAN's (Radford et al. 2016) for 8 pixels: z [N, Z_DIM] -> [N, 1, 8, 8]."""
    def up(a: int, b: int) -> list[torch.nn.Module]:
        return [torch.nn.ConvTranspose2d(a, b, 4, stride=2, padding=1, bias=False)]
    return torch.nn.Sequential(
        torch.nn.Unflatten(1, (Z_DIM, 1, 1)), torch.nn.ConvTranspose2d(Z_DIM, 64, 2, bias=False),
        torch.nn.BatchNorm2d(64), torch.nn.ReLU(), *up(64, 32), torch.nn.BatchNorm2d(32), torch.nn.ReLU(),
        *up(32, 1), torch.nn.Tanh())


def discriminator_body() -> tuple[torch.nn.Sequential, int]:
    """All of DCGAN's discriminator but the last layer: [N, 1, 8, 8] -> [N, width], and the width."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 4, stride=2, padding=1), torch.nn.LeakyReLU(0.2),
        torch.nn.Conv2d(32, 64, 4, stride=2, padding=1, bias=False), torch.nn.BatchNorm2d(64), torch.nn.LeakyReLU(0.2),
        torch.nn.Flatten()), 64 * 2 * 2


def train(config: Config, images: torch.Tensor, model: str, seed: int) -> torch.nn.Module:
    """A generator, trained beside a GAN's or a SAN's discriminator; same start of all but the last layer."""
    device = images.device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        G = generator().to(device)
        D = Discriminator(*discriminator_body(), san=model == "san").to(device)
    adam_G, adam_D = (adam(net, config.lr, (0.5, 0.999)) for net in (G, D))
    draws, no_class = seeded(seed, "training"), torch.zeros(config.batch, dtype=torch.int64, device=device)
    for _ in range(config.iterations):
        real = images[torch.randint(len(images), [config.batch], generator=draws).to(device)]
        fake = G(torch.randn([config.batch, Z_DIM], generator=draws).to(device))
        train_discriminator(config.loss, D, adam_D, real, fake.detach(), no_class)
        train_generator(config.loss, D, adam_G, fake, no_class)
    return G

#----------------------------------------------------------------------------

class Judge(torch.nn.Module):
    """A classifier of digits, [N, 1, 8, 8] -> logits [N, 10]; `features` [N, 64] are what scores compare."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(32, 32, 3, stride=2, padding=1),
            torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32 * 4 * 4, FEATURES), torch.nn.ReLU())
        self.last = torch.nn.Linear(FEATURES, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.last(self.features(x))
        return logits


def train_judge(images: torch.Tensor, labels: torch.Tensor, steps: int) -> tuple[Judge, float]:
    """Train a classifier on every second digit; returns it and its accuracy on the others. All runs share it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        judge = Judge().to(images.device)
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
    """Frechet distance, precision and recall (k = 3), and classes covered."""
    a, b = judge.features(real).cpu(), judge.features(fake).cpu()
    moments = [part for h in (a.double(), b.double()) for part in (h.mean(dim=0).numpy(), torch.cov(h.T).numpy())]
    manifold = precision_recall(a, b, dtype=torch.float32)
    counts = torch.bincount(judge(fake).argmax(dim=1), minlength=NUM_CLASSES)
    return Score(frechet_distance(*moments), manifold.precision, manifold.recall,
                 int((counts > COVERED * len(fake)).sum()))


@torch.no_grad()
def sample(G: torch.nn.Module, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """[count, 1, 8, 8], with BatchNorm's running statistics."""
    z = torch.randn([count, Z_DIM], generator=seeded(seed, "samples")).to(device)
    images: torch.Tensor = G.eval()(z)
    return images


def run(config: Config) -> Result:
    """Train the judge, then every model with every seed.

    Raises:
        UserError: a setting out of its range.
    """
    check(config)
    images, labels = (t.to(config.device) for t in load_digits())
    judge, accuracy = train_judge(images, labels, config.judge_steps)
    scores: dict[str, list[Score]] = {model: [] for model in MODELS}
    samples = {}
    for seed in range(config.seeds):
        for model in MODELS:
            fake = sample(train(config, images, model, seed), len(images), seed, images.device)
            scores[model].append(score(judge, images, fake))
            if seed == 0:
                samples[model] = to_uint8_nearest(fake[:50, 0]).cpu().numpy()
    return Result(config, scores, accuracy, score(judge, images[0::2], images[1::2]), samples)


def draw(result: Result, folder: Path) -> list[Path]:
    """Samples of seed 0, and the distance of every seed."""
    figure, axes = plotting.panels(1, 3, 2.8, 2.2)
    for axis, model in zip(axes[0], MODELS, strict=False):
        plotting.draw_images(axis, result.samples[model], columns=10)
        axis.set_title(f"{model.upper()}, seed 0", fontsize=9)
    last = axes[0, 2]
    for place, scores in enumerate(result.scores.values()):
        last.plot([place] * len(scores), [one.fid for one in scores], "o", alpha=0.6)
        last.set_xlim(-0.5, 1.5)
    last.set_xticks(range(len(MODELS)), [model.upper() for model in MODELS])
    last.set_ylabel("FID by the judge, per seed")
    last.set_ylim(bottom=0)
    return [plotting.save(figure, folder / "digits.png")]


main = study_command("san_dcgan", Config, run, draw)
