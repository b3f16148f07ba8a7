"""Micro-batches: what fits, what 32-bit indices reach, what is said when memory runs out."""
import dataclasses

import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError
from tests import needs_cuda
from tests.conftest import write_dataset
from torch_utils import distributed
from train import main
from training import trainer
from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.generator.layer_schedule import map_sizes, stem_config, superres_config
from training.networks_stylegan3 import Generator
from training.run import batch_size, plan
from training.run.batch_size import (
    MAX_ELEMENTS,
    Trial,
    check_index_range,
    default_batch_gpu,
    explained_memory_errors,
    find_batch_gpu,
    is_out_of_memory,
    largest_fitting,
    largest_tensor,
    micro_batch_sizes,
    search,
    smallest_as_fast,
    usable_sizes,
)

CPU = torch.device("cpu")


def settings(generator, batch: int = 8, batch_gpu: int = 8, ghost_batch: int = 0, **loss) -> TrainConfig:
    return TrainConfig(DataConfig("data.zip", generator.img_resolution, generator.c_dim), generator,
                       DiscriminatorConfig(("local:random",), generator.img_resolution, generator.c_dim,
                                           proj_channels=4, max_channels=64, ghost_batch=ghost_batch),
                       LossConfig(**loss), OptimConfig.official(batch), batch, batch_gpu, 1, 1, 1)


def ffhq1024():
    config = stem_config(16, 6, 131072, 2048, rotation=True)
    for size in (32, 64, 128, 256, 512, 1024):
        config = superres_config(config, 2, 7 if size == 32 else 4, rotation=size == 32)
    return config


@pytest.fixture(scope="module")
def tiny():
    return stem_config(16, 4, 64, 8, 2, c_dim=3, w_dim=16, embed_dim=8)


def test_sizes_are_divisors_of_the_share():
    assert micro_batch_sizes(96, 8) == [1, 2, 3, 4, 6, 12]
    assert micro_batch_sizes(96, 8, even=True) == [2, 4, 6, 12]


@pytest.mark.parametrize("limit", range(0, 40))
def test_bisection_finds_the_largest_that_fits(limit):
    sizes, tried = micro_batch_sizes(32, 1), []

    def fits(n: int) -> bool:
        tried.append(n)
        return n <= limit

    assert largest_fitting(sizes, fits) == max((n for n in sizes if n <= limit), default=None)
    assert tried[0] == 32                               # Most often all of it fits.
    assert len(tried) <= 4


def test_largest_tensor_is_what_a_forward_makes(tiny):
    """In the generator; the discriminator's is larger, because its images are resized to 224 pixels."""
    G, seen = Generator(tiny), []

    def note(module, args, output):
        seen.extend([args[0].numel(), output.numel()])

    for name in G.synthesis.layer_names:
        getattr(G.synthesis, name).register_forward_hook(note)
    with torch.no_grad():
        G(torch.randn(1, 64), torch.eye(3)[:1])
    made = [size for _, size in map_sizes(tiny)]
    assert set(seen) <= set(made)
    assert max(seen) <= max(made)
    assert largest_tensor(tiny)[1] == "the discriminator"
    assert largest_tensor(ffhq1024())[1].startswith("layer L")


def test_sizes_beyond_32_bit_indices_are_refused():
    generator = ffhq1024()
    elements, _ = largest_tensor(generator)
    with pytest.raises(UserError, match=r"--batch-gpu=128: layer L\S+ would have ([\d,]+) elements") as err:
        check_index_range(settings(generator, 128, 128), 1)
    assert f"{elements * 128:,}" in str(err.value)
    assert "take --batch-gpu=8 or less" in str(err.value)
    assert elements * 8 < MAX_ELEMENTS <= elements * 16
    check_index_range(settings(generator, 128, 8), 8)
    assert default_batch_gpu(settings(generator, 128, 16), 8) == 8         # Published commands leave it out.
    assert default_batch_gpu(settings(generator, 32, 4), 8) == 4


def test_refused_before_launch(tmp_path):
    data = write_dataset(tmp_path / "plain16.zip", 16, 2, 0)
    result = CliRunner().invoke(main, ["--cfg=stylegan3-t", f"--data={data}", "--batch=131072", "--batch-gpu=131072",
                                       "--metrics=none", f"--outdir={tmp_path}/out"])
    assert result.exit_code == 2, result.output
    assert "--batch-gpu=131072: " in result.output
    assert "take --batch-gpu=" in result.output
    assert not (tmp_path / "out").exists()


def test_auto_on_a_cpu_stays_within_its_memory(tiny, monkeypatch):
    need = batch_size.cpu_bytes_per_image(tiny)
    for free, expected in ((1 << 50, 32), (2 * 9 * need, 8), (0, 1)):
        monkeypatch.setattr(batch_size, "free_memory", lambda free=free: free)
        assert find_batch_gpu(settings(tiny, 32), CPU) == expected
    assert find_batch_gpu(settings(tiny, 32, diversity_weight=1.0), CPU) == 2       # Pairs.
    monkeypatch.undo()
    assert batch_size.free_memory() > 1 << 20


def test_auto_takes_the_minimum_of_all_processes(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [value, 4])
    assert find_batch_gpu(settings(tiny, 32), CPU) == 4
    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [value, None])
    with pytest.raises(UserError, match="memory of rank 1"):
        find_batch_gpu(settings(tiny, 32), CPU)


#----------------------------------------------------------------------------
# Trials, on a processor with a memory and a clock that the test sets.

class Gpu:
    """Memory of which the images of a micro-batch take their share, and a clock that moves as steps do."""

    def __init__(self, images: int = 1 << 30, seconds: dict[int, tuple[float, float]] | None = None):
        self.images = images                # That fit.
        self.seconds = seconds or {}        # Size of a micro-batch -> seconds of a step, and of each micro-batch in it.
        self.now, self.largest, self.released = 0.0, 0, 0

    def limit(self) -> int:
        return self.images

    def release(self) -> None:
        self.largest, self.released = 0, self.released + 1

    def peak(self) -> int:
        return self.largest

    def wait(self) -> None:
        pass

    def step(self, size: int, count: int = 1, regularised: bool = True) -> None:
        """In the place of `Trial.iterate`: memory may run out, and time passes."""
        if size > 2 * self.images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.largest = max(self.largest, size)
        step, each = self.seconds.get(size, (0.0, 1.0))
        self.now += step + count * each


def trial_on(gpu: Gpu, config: TrainConfig, monkeypatch=None) -> Trial:
    trial = Trial(config, ProjectedDiscriminator(config.discriminator), None, CPU, gpu, lambda: gpu.now)
    if monkeypatch is not None:
        monkeypatch.setattr(trial, "iterate", gpu.step)
    return trial


def test_multiples_of_the_group(tiny):
    assert usable_sizes(settings(tiny, 96, ghost_batch=8), 1) == [8, 16, 24, 32, 48, 96]
    assert usable_sizes(settings(tiny, 96, ghost_batch=3, diversity_weight=1.0), 2) == [6, 12, 24, 48]
    assert default_batch_gpu(settings(tiny, 96, ghost_batch=8), 4) == 24
    with pytest.raises(UserError, match=r"is a multiple of --ghost-batch=8: take another --batch"):
        find_batch_gpu(settings(tiny, 12, ghost_batch=8), CPU)


@pytest.mark.parametrize(("rates", "found"), [
    ({1: 10, 2: 20, 4: 40, 8: 80, 16: 97, 32: 100, 64: 100}, 16),       # No slower than 3 % below the best.
    ({1: 10, 2: 20, 4: 40, 8: 80, 16: 96, 32: 100, 64: 100}, 32),
    ({1: 10, 2: 20, 4: 40}, 4),
    ({1: 100, 2: 100, 4: 100}, 1),
    ({1: 10, 2: 100, 4: 99, 8: 80}, 2),                                 # The largest may be slow.
    ({4: 0, 8: 0}, 4), ({8: 1}, 8)])
def test_the_smallest_that_is_as_fast(rates, found):
    tried = []
    assert smallest_as_fast(list(rates), lambda n: tried.append(n) or rates[n]) == found
    slower = [n for n in tried if rates[n] < 0.97 * max(rates.values())]
    assert len(slower) <= 1 or tried[0] in slower                       # It does not go on where speed suffers.


def test_a_search(tiny, monkeypatch):
    """The smallest first, then the largest, bisection, and from what fits down to where it gets slower."""
    # A step costs 0.1 s, and 32 images as much as any smaller number: a GPU that waits for the program.
    gpu = Gpu(images=100, seconds={n: (0.1, max(n, 32) / 320) for n in (1, 2, 4, 8, 16, 32, 64, 128, 256)})
    said = []
    config = settings(tiny, 256)
    assert search(trial_on(gpu, config, monkeypatch), usable_sizes(config, 1), 256, said.append) == 32
    assert [int(line.split()[1]) for line in said] == [1, 256, 16, 64, 128, 64, 32, 16]
    assert ["do not" in line for line in said[:5]] == [False, True, False, False, True]
    assert [line.removeprefix("--batch-gpu=auto: ") for line in said[-3:]] == [
        "64 image(s) at a time: 284 images/s", "32 image(s) at a time: 284 images/s",
        "16 image(s) at a time: 151 images/s"]


def test_a_search_where_not_even_one_image_fits(tiny, monkeypatch):
    config = settings(tiny)
    assert search(trial_on(Gpu(images=0), config, monkeypatch), [1, 2, 4, 8], 8, lambda text: None) is None


def test_a_gpu_is_as_before_after_memory_ran_out(tiny, monkeypatch):
    """Samples that a failed step has left must not meet those of the next size, and what it held is given back."""
    config, gpu = settings(tiny), Gpu()
    trial = trial_on(gpu, config)
    features = trial.trainer.D.features

    def too_large(images, augment=None):
        if len(images) > 4:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return features(images, augment)

    monkeypatch.setattr(trial.trainer.D, "features", too_large)
    before = gpu.released
    assert not trial.fits(4)                    # D's phase, which sees eight.
    assert gpu.released > before
    assert trial.fits(2)
    assert trial.images_per_second(4, 8) == 0
    monkeypatch.setattr(trial.trainer.D, "features", lambda images, augment=None: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trial.fits(2)


def test_time_of_an_iteration(tiny, monkeypatch):
    """A step costs once per iteration, so it does not speak against small micro-batches."""
    trial = trial_on(Gpu(seconds={2: (5.0, 1.0), 8: (5.0, 2.0)}), settings(tiny), monkeypatch)
    assert trial.images_per_second(2, 8) == pytest.approx(8 / (5 + 4))
    assert trial.images_per_second(8, 8) == pytest.approx(8 / (5 + 2))


def test_faces_of_missing_memory():
    for error in (torch.OutOfMemoryError(), MemoryError(), RuntimeError("CUDNN_STATUS_ALLOC_FAILED"),
                  RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
                  RuntimeError("GET was unable to find an engine to execute this computation"),
                  RuntimeError("filtered_lrelu for torch.float16 on cuda:0: CUDA error 2; STYLESAN_OPS=reference ...")):
        assert is_out_of_memory(error)
    for error in (RuntimeError("CUDA error: an illegal memory access"), RuntimeError("shapes do not fit"),
                  RuntimeError("resample for torch.float32 on cuda:0: CUDA error 209; STYLESAN_OPS=reference ...")):
        assert not is_out_of_memory(error)


def test_trials_from_end_to_end(tiny, monkeypatch):
    """What is run on a GPU, with its real steps: in the precision of training, and gone afterwards."""
    gpu, said, seen = Gpu(), [], []
    monkeypatch.setattr(batch_size, "GpuMemory", lambda device: gpu)
    run_phase = trainer.run_phase
    monkeypatch.setattr(trainer, "run_phase", lambda *args: seen.append(
        torch.backends.cudnn.conv.fp32_precision) or run_phase(*args))
    clock = iter(range(1000))               # Every reading is a second after the one before: all sizes take as long.
    assert batch_size._find_on_gpu(settings(tiny, 4), CPU, [2, 4], said.append, (), lambda: next(clock)) == 2
    assert said == [f"--batch-gpu=auto: {line}" for line in (
        "2 image(s) fit into memory", "4 image(s) fit into memory", "4 image(s) at a time: 4 images/s",
        "2 image(s) at a time: 4 images/s")]
    assert set(seen) == {"ieee"}

    def no_room(config):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch_size, "Generator", no_room)
    assert batch_size._find_on_gpu(settings(tiny, 4), CPU, [2, 4], said.append, (), lambda: 0.0) is None


def test_a_trial_runs_every_phase(tiny):
    config = settings(tiny, pl_weight=2.0)
    trial = trial_on(Gpu(), config)
    G, D = trial.trainer.G, trial.trainer.D
    before = {name: p.clone() for name, p in [*G.named_parameters(), *D.discriminators.named_parameters()]}
    trial.iterate(2)
    moved = {name for name, p in [*G.named_parameters(), *D.discriminators.named_parameters()]
             if not torch.equal(before[name], p)}
    assert any(name.startswith("synthesis") for name in moved)
    assert any("embed" in name for name in moved)
    assert float(trial.trainer.loss.pl_mean) != 0        # Path lengths, too.


@pytest.mark.gpu
@needs_cuda
def test_auto_on_a_gpu():
    generator, said = stem_config(64, 6, 4096, 64, c_dim=3), []
    found = find_batch_gpu(settings(generator, 16), torch.device("cuda", 0), said.append)
    assert found in (1, 2, 4, 8, 16)                    # Whatever is as fast.
    assert "--batch-gpu=auto: 16 image(s) fit into memory" in said


def test_out_of_memory_is_one_message(tiny):
    config = settings(tiny, 32, 8)
    with pytest.raises(UserError) as err, explained_memory_errors("Gmain", config, CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 EiB.")
    for part in ("phase Gmain", "16 pixels", "--batch-gpu=8", "peak", "take --batch-gpu=4"):
        assert part in str(err.value)
    with pytest.raises(UserError, match="phase Dmain"), explained_memory_errors("Dmain", config, CPU):
        torch.empty(1 << 60)
    with pytest.raises(UserError, match="smaller widths"), explained_memory_errors(
            "Gmain", dataclasses.replace(config, batch_gpu=1), CPU):
        raise torch.OutOfMemoryError
    with pytest.raises(RuntimeError, match="something else"), explained_memory_errors("Gmain", config, CPU):
        raise RuntimeError("something else")


def test_out_of_memory_in_training(data16, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("training.trainer.run_phase", fail)
    result = CliRunner().invoke(main, ["--cfg=stylegan3-t", "--preset=demo", "--cbase=64", "--cmax=8", "--batch=8",
                                       "--device=cpu", "--workers=0", "--metrics=none", "--backbones=local:random",
                                       f"--data={data16}", f"--outdir={tmp_path}"])
    assert result.exit_code == 2, result.output
    assert "out of memory in phase Gmain at 16 pixels with --batch-gpu=8" in result.output


@pytest.mark.slow
def test_auto_is_recorded(data16, tmp_path):
    args = ["--cfg=stylegan3-t", "--preset=demo", "--cbase=64", "--cmax=8", "--batch=8", "--batch-gpu=auto",
            "--device=cpu", "--workers=0", "--metrics=none", "--backbones=local:random", f"--data={data16}",
            f"--outdir={tmp_path}", "--kimg=0.008"]
    result = CliRunner().invoke(main, args, catch_exceptions=False)
    assert "--batch-gpu=auto: 8\n" in result.output
    assert "NOTE: D's heads" not in result.output       # As in the published runs.
    (folder,) = tmp_path.iterdir()
    assert '"batch_gpu": 8' in (folder / "training_options.json").read_text()


@pytest.mark.slow
def test_auto_takes_what_the_run_had(data16, tmp_path, monkeypatch):
    args = ["--cfg=stylegan3-t", "--preset=demo", "--cbase=64", "--cmax=8", "--batch=8", "--batch-gpu=auto",
            "--device=cpu", "--workers=0", "--metrics=none", "--backbones=local:random", f"--data={data16}",
            f"--outdir={tmp_path}"]
    monkeypatch.setattr(plan, "find_batch_gpu", lambda *args: 2)
    result = CliRunner().invoke(main, [*args, "--kimg=0.008"], catch_exceptions=False)
    assert "--batch-gpu=auto: 2\n" in result.output
    assert "here it has 2 image(s), in the published runs 8: --ghost-batch=8 keeps that" in result.output
    monkeypatch.setattr(plan, "find_batch_gpu", lambda *args: 4)
    result = CliRunner().invoke(main, [*args, "--kimg=0.016"], catch_exceptions=False)
    assert "--batch-gpu=auto: 2, as before\n" in result.output
    result = CliRunner().invoke(main, [*args, "--kimg=0.016", "--ghost-batch=4"], catch_exceptions=False)
    assert "--batch-gpu=auto: 4\n" in result.output     # Another run.
    assert "NOTE: D's heads" not in result.output
