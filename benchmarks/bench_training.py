# SPDX-License-Identifier: Apache-2.0
"""One training iteration, of the generator and of the discriminator: ours against the official structure.

    python benchmarks/bench_training.py [--quick] [--threads=N]

On a CPU: a 32-pixel generator of 128 channels and 7 layers, the real discriminator (DeiT-base and EfficientNet-lite0,
with random weights), 1000 classes, a batch of 4. On a GPU: the 128 -> 256 stage of the ImageNet recipe with
micro-batches of 8 and 32. The official structure is in official_step.py. All start from the same weights and see the
same numbers; their gradients are compared first, then iterations are timed in turn. The tables give medians and
quartiles, and how much of an iteration PyTorch's profiler finds inside matrix products and convolutions: what is left
if everything else were free. Writes benchmarks/results/training.md; the last line on stdout is JSON.
"""
import copy
import dataclasses
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from official_step import OfficialStep  # noqa: E402

from dnnlib import cli  # noqa: E402
from dnnlib.util import atomic_write_text  # noqa: E402
from torch_utils import misc  # noqa: E402
from torch_utils.misc import one_hot, requires_grad  # noqa: E402
from torch_utils.ops import dispatch  # noqa: E402
from torch_utils.training_stats import Collector  # noqa: E402
from training.config import (  # noqa: E402
    OFFICIAL_PROCESSES,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimConfig,
    TrainConfig,
)
from training.diffaug import NUM_UNIFORMS  # noqa: E402
from training.discriminators.projected import Features, ProjectedDiscriminator  # noqa: E402
from training.feature_networks.classifier import Classifier, load_classifier  # noqa: E402
from training.generator.layer_schedule import stem_config, superres_config  # noqa: E402
from training.networks_stylegan3 import Generator  # noqa: E402
from training.step.ema import update_ema  # noqa: E402
from training.step.gradients import FlatGradients  # noqa: E402
from training.step.loss_math import discriminator_loss_fake, discriminator_loss_real, generator_loss  # noqa: E402
from training.step.micro_batch import MicroBatch  # noqa: E402
from training.step.phases import Phase  # noqa: E402
from training.trainer import Progress, Trainer  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "training.md"
BACKBONES = ("deit_base_distilled_patch16_224:random", "tf_efficientnet_lite0:random")
CLASSES = 1000
BOTH = "bf16, and G"
# Name -> --feature-precision, --precision.
PRECISIONS = {"fp32": ("fp32", "auto"), "bf16": ("bf16", "auto"), BOTH: ("bf16", "bf16")}
CUR_NIMG = 400_000          # Past the blur, before path lengths.
TARGETS = {"cpu": {"fp32": 2.0, "bf16": 3.5, BOTH: 3.5}, "cuda": {"fp32": 2.5, "bf16": 2.5, BOTH: 2.5}}
PRODUCTS = ("mm", "convolution", "conv2d", "scaled_dot_product")     # In the names of PyTorch's operations.
ROUNDS, QUICK_ROUNDS = 9, 2

#----------------------------------------------------------------------------
# What is measured.

@dataclasses.dataclass(frozen=True)
class Case:
    """A generator and a micro-batch."""

    name: str
    generator: GeneratorConfig
    batch: int
    cls_weight: float = 0.0
    backbones: tuple[str, ...] = BACKBONES
    classifier: str = f"{LossConfig.cls_model}:random"


def cases(device: torch.device, quick: bool) -> list[Case]:
    """What is measured on a device. `quick`: a generator of 16 channels and a batch of 2, to see whether it runs."""
    if device.type == "cpu":
        width, batch = (16, 2) if quick else (128, 4)
        return [Case("32 pixels", stem_config(32, 7, 32 * 1024, width, c_dim=CLASSES), batch)]
    config = stem_config(16, 10, 65536, 1024, c_dim=CLASSES)
    for _stage in (32, 64, 128, 256):
        config = superres_config(config, up_factor=2, head_layers=7)
    return [Case(f"128 -> 256, micro-batch {n}", config, n, cls_weight=8.0) for n in ((8,) if quick else (8, 32))]


def random_batch(case: Case, num_backbones: int, device: torch.device, seed: int) -> MicroBatch:
    """Latents, labels, images and augmentation numbers."""
    g = torch.Generator().manual_seed(seed)
    n, size = case.batch, case.generator.img_resolution
    labels = [one_hot(torch.randint(CLASSES, [n], generator=g), CLASSES) for _ in range(2)]
    augment = [torch.rand([num_backbones, n, NUM_UNIFORMS], generator=g) for _ in range(2)]
    batch = MicroBatch(torch.randn([n, case.generator.z_dim], generator=g), labels[0],
                       torch.rand([n, 3, size, size], generator=g) * 2 - 1, labels[1], *augment)
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return MicroBatch(**{name: x.to(device) for name, x in tensors.items() if x is not None})


def train_config(case: Case, precisions: tuple[str, str] = PRECISIONS["fp32"]) -> TrainConfig:
    """The settings of a run that has this micro-batch as its batch."""
    size = case.generator.img_resolution
    return TrainConfig(
        DataConfig("", size, CLASSES), case.generator, DiscriminatorConfig(case.backbones, size, CLASSES),
        LossConfig(cls_weight=case.cls_weight), OptimConfig.official(case.batch), batch=case.batch,
        batch_gpu=case.batch, total_kimg=1, kimg_per_tick=1, snapshot_ticks=1, feature_precision=precisions[0],
        precision=precisions[1])


@dataclasses.dataclass(frozen=True)
class GivenBatches:
    """An iteration of one micro-batch for each network."""

    for_G: MicroBatch
    for_D: MicroBatch

    @property
    def batch(self) -> int:
        return len(self.for_G.z)

    def micro_batches(self, phase: Phase, cur_nimg: int) -> Iterator[MicroBatch]:
        yield self.for_D if phase.uses_real_images else self.for_G


class OurStep:
    """A trainer with copies of the networks, and the parts of its iteration one by one."""

    def __init__(self, case: Case, G: Generator, D: ProjectedDiscriminator, precisions: tuple[str, str],
                 classifier: Classifier | None):
        self.G, self.D = copy.deepcopy((G, D))
        self.D.optimize_frozen_(precisions[0])
        self.trainer = Trainer(train_config(case, precisions), self.G, self.D, classifier, next(G.parameters()).device,
                               Collector().report)
        self.loss, self.guard = self.trainer.loss, self.trainer.guard
        self.loss.set_progress(CUR_NIMG)
        self.optimizers = list(self.trainer.optimizers().values())
        self.features = self.D.features

    def generator_phase(self, batch: MicroBatch) -> None:
        """Adds to the gradients of G."""
        self.loss.generator_main(batch, 1)

    def discriminator_phase(self, batch: MicroBatch) -> None:
        """Adds to the gradients of D."""
        self.loss.discriminator_main(batch, 1)

    def features_of_both(self, fake: torch.Tensor, batch: MicroBatch) -> tuple[Features, Features]:
        """Features of generated and of real images, in one pass."""
        augment = torch.cat([batch.augment_fake, batch.augment_real], dim=1)
        return self.D.split_features(self.D.features(torch.cat([fake, batch.real_img]), augment), len(fake))

    def heads(self, fake: Features, real: Features, batch: MicroBatch) -> None:
        """The trainable part of the discriminator phase: adds to the gradients of D."""
        discriminator_loss_fake(self.D.heads_san(fake, batch.gen_c)).sum().backward()
        discriminator_loss_real(self.D.heads_san(real, batch.real_c)).sum().backward()

    def step(self, optimizer: torch.optim.Adam) -> None:
        """As `run_phase` ends."""
        grads = [p.grad for p in optimizer.param_groups[0]["params"]]
        flat = FlatGradients(optimizer.param_groups[0]["params"]).finish()
        torch.cat([grad.flatten() for grad in grads], out=flat)
        self.guard.sanitize_("", flat)
        optimizer.step()

    def average(self, cur_nimg: int, batch: int) -> None:
        """The average of G."""
        update_ema(self.trainer.G_ema, self.G, cur_nimg, batch, self.trainer.config.optim)

    def iteration(self, for_G: MicroBatch, for_D: MicroBatch, cur_nimg: int) -> None:
        """Both phases and the average: an iteration in which path lengths do not come."""
        self.trainer.progress = Progress(cur_nimg, batch_idx=1)
        self.trainer.step(GivenBatches(for_G, for_D))


Step = OfficialStep | OurStep


def make_networks(case: Case, device: torch.device) -> tuple[Generator, ProjectedDiscriminator, Classifier | None]:
    """With random weights, always the same."""
    torch.manual_seed(0)
    G = Generator(case.generator).train().requires_grad_(False).to(device)
    D = ProjectedDiscriminator(DiscriminatorConfig(case.backbones, case.generator.img_resolution, CLASSES))
    D = D.train().requires_grad_(False).to(device)
    D.project_()
    return G, D, load_classifier(case.classifier).to(device) if case.cls_weight else None


def make_steps(case: Case, device: torch.device) -> dict[str, Step]:
    """The official structure and ours, with equal weights."""
    G, D, classifier = make_networks(case, device)
    guidance = None if classifier is None else (classifier, case.cls_weight)
    steps: dict[str, Step] = {"official": OfficialStep(G, D, OptimConfig.official(OFFICIAL_PROCESSES), guidance)}
    return steps | {name: OurStep(case, G, D, precisions, classifier) for name, precisions in PRECISIONS.items()}

#----------------------------------------------------------------------------
# The same numbers?

def results(step: Step, for_G: MicroBatch, for_D: MicroBatch) -> dict[str, torch.Tensor]:
    """Logits of real images and the gradient of G's loss with respect to them; flat gradients of G and of D."""
    x = for_D.real_img.clone().requires_grad_(True)
    logits = step.D.heads(step.features(x, for_D.augment_real), for_D.real_c)
    (image_grad,) = torch.autograd.grad(generator_loss(logits).sum(), x)
    found = {"logits": torch.cat([y.detach().flatten() for y in logits]), "images": image_grad.flatten()}
    for name, net, backward, batch in (("G", step.G, step.generator_phase, for_G),
                                       ("D", step.D, step.discriminator_phase, for_D)):
        parameters = net.trainable_parameters()
        with requires_grad(net, parameters):
            backward(batch)
        found[name] = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
                                 for p in parameters])
        net.zero_grad(set_to_none=True)
    if isinstance(step, OurStep):
        step.loss.end_discriminator_main()
    return found


def compare(steps: dict[str, Step], for_G: MicroBatch, for_D: MicroBatch) -> dict[str, dict[str, str]]:
    """Relative distance of ours from the official structure's, and the cosine: precision -> result -> text."""
    # Guidance is a mean over the samples there and a sum of weight / 8 here: the same at micro-batch 8 only.
    found = {name: results(step, for_G, for_D) for name, step in steps.items()}
    base = found.pop("official")
    table: dict[str, dict[str, str]] = {}
    for name, values in found.items():
        table[name] = {}
        for what, value in values.items():
            distance = float((value - base[what]).norm() / base[what].norm())
            cosine = float(torch.nn.functional.cosine_similarity(value.double(), base[what].double(), dim=0))
            table[name][what] = f"{distance:.1e} ({cosine:.5f})"
    return table

#----------------------------------------------------------------------------
# Time.

def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, until the device is done."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per call of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, rounds):        # The first round warms up.
        for name, call in calls.items():
            took = seconds(call, device)
            if number >= 0:
                times[name].append(took)
    return times


def seconds_in_products(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call that pass inside the library's matrix products and convolutions."""
    kind = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kind.CPU, *([kind.CUDA] if device.type == "cuda" else [])]) as profile:
        seconds(call, device)
    events = [e for e in profile.key_averages() if e.key.startswith("aten::") and any(p in e.key for p in PRODUCTS)]
    return sum(e.self_device_time_total if device.type == "cuda" else e.self_cpu_time_total for e in events) / 1e6


def parts(step: Step, for_G: MicroBatch, for_D: MicroBatch) -> Iterator[tuple[str, Callable[[], object]]]:
    """The parts of an iteration, each by itself, in an order in which each has what it needs."""
    G, D = step.G, step.D
    form = step.loss.precision if isinstance(step, OurStep) else {}
    G_parameters, D_parameters = G.trainable_parameters(), D.trainable_parameters()
    classifier = step.loss.classifier if isinstance(step, OurStep) else step.guidance and step.guidance[0]
    with torch.no_grad():
        images = G(for_D.z, for_D.gen_c, **form)
        fake, real = step.features_of_both(images, for_D)
    grad = torch.randn_like(images)

    def generator() -> None:
        with requires_grad(G, G_parameters):
            G(for_G.z, for_G.gen_c, **form).backward(grad)

    def generator_no_graph() -> None:
        with torch.no_grad():
            G(for_D.z, for_D.gen_c, **form)

    def frozen() -> None:
        x = images.clone().requires_grad_(True)
        maps = [y for scales in step.features(x, for_G.augment_fake).values() for y in scales]
        torch.autograd.grad(maps, x, [torch.ones_like(y) for y in maps])

    def frozen_no_graph() -> None:
        with torch.no_grad():
            step.features_of_both(images, for_D)

    def heads_for_G() -> None:
        maps = {key: [x.clone().requires_grad_(True) for x in scales] for key, scales in fake.items()}
        logits = D.heads(maps, for_G.gen_c)
        torch.autograd.grad(sum(x.sum() for x in logits), [x for scales in maps.values() for x in scales])

    def heads_for_D() -> None:
        with requires_grad(D, D_parameters):
            step.heads(fake, real, for_D)

    def guidance() -> None:
        x = images.clone().requires_grad_(True)
        torch.autograd.grad(torch.nn.functional.cross_entropy(classifier(x), for_G.gen_c.argmax(dim=1)), x)

    yield "generator, forward and backward", generator
    yield "generator, forward only", generator_no_graph
    yield "frozen features, forward and backward", frozen
    yield "frozen features, forward of real and generated", frozen_no_graph
    yield "heads, for G", heads_for_G
    yield "heads, for D", heads_for_D
    if classifier is not None:
        yield "classifier guidance, forward and backward", guidance
    yield "optimisers", lambda: [step.step(optimizer) for optimizer in step.optimizers]
    yield "average of G", lambda: step.average(CUR_NIMG, len(for_G.z))


def part_medians(steps: dict[str, Step], for_G: MicroBatch, for_D: MicroBatch, rounds: int,
                 device: torch.device) -> dict[str, dict[str, float]]:
    """Part -> step -> median seconds."""
    found: dict[str, dict[str, float]] = {}
    for triple in zip(*(parts(step, for_G, for_D) for step in steps.values()), strict=True):
        calls = {name: call for name, (_, call) in zip(steps, triple, strict=True)}
        times = in_turn(calls, rounds, device)
        found[triple[0][0]] = {name: statistics.median(values) for name, values in times.items()}
    return found

#----------------------------------------------------------------------------
# Tables.

def cell(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


@misc.full_precision()          # As training, and as officially.
def measure(case: Case, device: torch.device, rounds: int) -> tuple[str, dict[str, float]]:
    """Markdown, and speedups by precision."""
    steps = make_steps(case, device)
    for_G, for_D = (random_batch(case, len(BACKBONES), device, seed) for seed in (1, 2))
    errors = compare(steps, for_G, for_D)
    calls = {name: lambda step=step: step.iteration(for_G, for_D, CUR_NIMG) for name, step in steps.items()}
    times = in_turn(calls, rounds, device)
    products = {name: min(seconds_in_products(call, device) for _ in range(3)) for name, call in calls.items()}
    medians = {name: statistics.median(values) for name, values in times.items()}
    speedups = {name: round(medians["official"] / medians[name], 2) for name in PRECISIONS}
    rows = [f"## {case.name}, batch {case.batch}\n",
            "| step | seconds | images/s | speedup | target | seconds in products and convolutions | speedup if these "
            "were all |", "|---|---|---|---|---|---|---|",
            f"| official structure | {cell(times['official'])} | {case.batch / medians['official']:.3g} | | | "
            f"{products['official']:.3f} | |"]
    for name in PRECISIONS:
        rows.append(f"| ours, features in {name} | {cell(times[name])} | {case.batch / medians[name]:.3g} | "
                    f"{speedups[name]} | {TARGETS[device.type][name]} | {products[name]:.3f} | "
                    f"{medians['official'] / products[name]:.2f} |")
    rows += ["", "| relative distance (cosine) from the official structure | logits | gradient of images | "
             "gradient of G | gradient of D |", "|---|---|---|---|---|"]
    rows += [f"| ours, features in {name} | {' | '.join(errors[name].values())} |" for name in PRECISIONS]
    if device.type == "cuda":
        rows += ["", *peak_rows(steps, for_G, for_D)]
    shares = part_medians(steps, for_G, for_D, max(rounds // 2, 1), device)
    rows += ["", "| part, by itself: seconds (share of the iteration) |" + "".join(f" {name} |" for name in steps),
             "|---|" + "---|" * len(steps)]
    for part, values in shares.items():
        cells = "".join(f" {v:.3f} ({100 * v / medians[name]:.0f} %) |" for name, v in values.items())
        rows.append(f"| {part} |{cells}")
    return "\n".join([*rows, ""]), speedups


def peak_rows(steps: dict[str, Step], for_G: MicroBatch, for_D: MicroBatch) -> list[str]:
    """GPU memory that an iteration takes above what stands."""
    rows = []
    for name, step in steps.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.iteration(for_G, for_D, CUR_NIMG)
        rows.append(f"Peak memory, {name}: {(torch.cuda.max_memory_allocated() - before) / 2**30:.2f} GiB.")
    return rows


@click.command(cls=cli.Command)
@click.option("--quick", is_flag=True, help="A small generator, two rounds, no file")
@click.option("--threads", metavar="INT", type=cli.IntRange(min=1), help="Threads in use  [default: its own choice]")
@click.option("--rounds", metavar="INT", type=cli.IntRange(min=2), help="Timed iterations of each")
def main(quick: bool, threads: int | None, rounds: int | None) -> None:
    """Measure a training iteration against the official structure."""
    torch.set_num_threads(threads or torch.get_num_threads())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = (f"# The training step\n\n`python benchmarks/bench_training.py`, {today}, {platform.machine()}, {device}, "
            f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, {dispatch.describe(device)}. Median "
            f"(quartiles) of {rounds} iterations.\n")
    speedup = {}
    for case in cases(device, quick):
        part, ratios = measure(case, device, rounds)
        text += "\n" + part
        speedup |= {f"{case.name}, features in {name}": ratio for name, ratio in ratios.items()}
    if device.type == "cpu":
        text += "\nThe 128 -> 256 stage on a GPU has not been measured: there was none.\n"
    click.echo(text)
    if not quick:
        atomic_write_text(RESULT, text)
    click.echo(json.dumps({"speedup": speedup}))


if __name__ == "__main__":
    main()
