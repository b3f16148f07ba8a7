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
from training import batch_size
from training.batch_size import (
    MAX_ELEMENTS,
    Trial,
    check_index_range,
    default_batch_gpu,
    explained_memory_errors,
    find_batch_gpu,
    largest_fitting,
    largest_tensor,
    micro_batch_sizes,
)
from training.config import DataConfig, DiscriminatorConfig, LossConfig, OptimConfig, TrainConfig
from training.discriminators.projected import ProjectedDiscriminator
from training.layer_schedule import map_sizes, stem_config, superres_config
from training.networks_stylegan3 import Generator

CPU = torch.device("cpu")


def settings(generator, batch: int = 8, batch_gpu: int = 8, **loss) -> TrainConfig:
    return TrainConfig(DataConfig("data.zip", generator.img_resolution, generator.c_dim), generator,
                       DiscriminatorConfig(("local:random",), generator.img_resolution, generator.c_dim,
                                           proj_channels=4, max_channels=64),
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
    """Of the generator; and the discriminator's is larger there, because its images are resized to 224 pixels."""
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


def test_a_trial_runs_every_phase(tiny):
    config = settings(tiny, pl_weight=2.0)
    D = ProjectedDiscriminator(config.discriminator)
    trial = Trial(config, D, None, CPU)
    before = {name: p.clone() for name, p in [*trial.G.named_parameters(), *D.discriminators.named_parameters()]}
    trial.run_phases(2)
    moved = {name for name, p in [*trial.G.named_parameters(), *D.discriminators.named_parameters()]
             if not torch.equal(before[name], p)}
    assert any(name.startswith("synthesis") for name in moved)
    assert any("embed" in name for name in moved)
    assert float(trial.phases[1].backward.__self__.pl_mean) != 0        # Path lengths, too.


@pytest.mark.gpu
@needs_cuda
def test_auto_on_a_gpu():
    generator = stem_config(64, 6, 4096, 64, c_dim=3)
    assert find_batch_gpu(settings(generator, 16), torch.device("cuda", 0)) == 16


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

    monkeypatch.setattr("training.training_loop.run_phase", fail)
    result = CliRunner().invoke(main, ["--cfg=stylegan3-t", "--preset=demo", "--cbase=64", "--cmax=8", "--batch=8",
                                       "--device=cpu", "--workers=0", "--metrics=none", "--backbones=local:random",
                                       f"--data={data16}", f"--outdir={tmp_path}"])
    assert result.exit_code == 2, result.output
    assert "out of memory in phase Gmain at 16 pixels with --batch-gpu=8" in result.output


def test_auto_is_recorded(data16, tmp_path):
    args = ["--cfg=stylegan3-t", "--preset=demo", "--cbase=64", "--cmax=8", "--batch=8", "--batch-gpu=auto",
            "--device=cpu", "--workers=0", "--metrics=none", "--backbones=local:random", f"--data={data16}",
            f"--outdir={tmp_path}", "--kimg=0.008"]
    result = CliRunner().invoke(main, args, catch_exceptions=False)
    assert "--batch-gpu=auto: 8" in result.output
    (folder,) = tmp_path.iterdir()
    assert '"batch_gpu": 8' in (folder / "training_options.json").read_text()
