"""The loop on small data: files, exact continuation, stages, states that survive alone."""
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

from legacy import load_network, open_snapshot
from tests.closeness import assert_close
from tests.conftest import write_dataset
from torch_utils import checkpoint
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from train import main
from training.data.randomness import CounterRNG
from training.dataset import EpochOrder, ImageDataset, TrainingStream
from training.run.folder import STATE_FILE
from training.run.formats import STATE_FORMAT
from training.run.snapshots import build_generator
from training.step.batches import BatchSource
from training.step.phases import Phase

SMALL = ("--cfg=stylegan3-t --preset=demo --cbase=64 --cmax=8 --batch=8 --device=cpu --workers=0 --metrics=none "
         "--backbones=local:random --cond=1").split()


def train(outdir, data, *more) -> str:
    options = [o for o in SMALL if "--superres" not in more or not o.startswith(("--cbase", "--cmax"))]
    result = CliRunner().invoke(main, [*options, f"--outdir={outdir}", f"--data={data}", *map(str, more)],
                                catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def only_run(outdir):
    (folder,) = (p for p in outdir.iterdir() if p.is_dir())
    return folder


def assert_equal_states(a: dict, b: dict, path: str = "") -> None:
    """Bit by bit, through nested dicts and lists; times of day apart."""
    if isinstance(a, dict):
        assert set(a) == set(b), path
        for key in a:
            if key != "elapsed":
                assert_equal_states(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal_states(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def stem_run(tmp_path_factory, data16):
    outdir = tmp_path_factory.mktemp("stem")
    train(outdir, data16, "--kimg=0.032", "--tick=0.016", "--snap=1")
    return only_run(outdir)


def test_files_of_a_run(stem_run, data16):
    names = {p.name for p in stem_run.iterdir()}
    assert {"training_options.json", "log.txt", "stats.jsonl", "reals.png", "fakes000000.png", "best_model.pkl",
            "network-snapshot-000000.pkl", "network-snapshot-000000.016.pkl", "network-snapshot-000000.032.pkl",
            STATE_FILE} <= names
    assert not [n for n in names if n.endswith(".tmp")]
    lines = [json.loads(line) for line in (stem_run / "stats.jsonl").read_text().splitlines()]
    assert [line["cur_nimg"] for line in lines] == [16, 32]
    for name in ("Loss/G/loss", "Loss/D/loss", "Loss/signs/real", "Loss/signs/fake"):
        assert np.isfinite(lines[-1][name]["mean"])
    assert lines[-1]["Progress/nonfinite"] == 0
    with PIL.Image.open(stem_run / "reals.png") as reals, PIL.Image.open(stem_run / "fakes000000.png") as fakes:
        assert reals.size == fakes.size


def test_snapshot_is_plain_and_complete(stem_run):
    content = torch.load(stem_run / "best_model.pkl", weights_only=True)
    assert content["class_names"] == ["0", "1", "2", "3"]
    assert content["progress"]["cur_nimg"] == 32
    assert not [name for name in content["D"] if ".backbone." in name]
    assert any("scratch" in name for name in content["D"])
    assert content["backbones"]["local_random"]["name"] == "local:random"
    G = load_network(stem_run).G_ema
    assert torch.equal(G(torch.zeros(1, 64), torch.eye(4)[:1]),
                       build_generator(content).eval()(torch.zeros(1, 64), torch.eye(4)[:1]))


@pytest.mark.numeric
def test_directions_have_unit_norm_and_differ_from_the_start(stem_run):
    first, last = (open_snapshot(stem_run / f"network-snapshot-{k}.pkl")["D"] for k in ("000000", "000000.032"))
    heads = [name for name in last if name.endswith("embed.weight")]
    assert heads
    for name in heads:
        assert_close(last[name].norm(dim=1), torch.ones(4), atol=1e-6, rtol=1e-5)
        assert not torch.equal(first[name], last[name])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_stopped_and_started_again_is_the_unbroken_run(stem_run, data16, tmp_path, workers):
    """2N iterations == N iterations, a new process's worth of state, N iterations; for every tensor, bit by bit."""
    train(tmp_path, data16, "--kimg=0.016", "--tick=0.016", "--snap=1")
    output = train(tmp_path, data16, "--kimg=0.032", "--tick=0.016", "--snap=1", f"--workers={workers}")
    assert "resuming at kimg 0.0" in output
    run = only_run(tmp_path)
    assert_equal_states(checkpoint.load(run / STATE_FILE, STATE_FORMAT),
                        checkpoint.load(stem_run / STATE_FILE, STATE_FORMAT))
    assert len((run / "stats.jsonl").read_text().splitlines()) == 2     # Appended to.


@pytest.mark.slow
def test_other_settings_start_a_new_run(data16, tmp_path):
    train(tmp_path, data16, "--kimg=0.008")
    train(tmp_path, data16, "--kimg=0.008", "--glr=0.001")
    assert sorted(p.name[:6] for p in tmp_path.iterdir()) == ["00000-", "00001-"]


@pytest.mark.numeric
def test_samples_do_not_depend_on_how_a_batch_is_cut(data16, stem_run):
    """Latents, labels, images and augmentation of a sample do not depend on the micro-batch it is in."""
    G = build_generator(open_snapshot(stem_run))
    dataset = ImageDataset(str(data16), use_labels=True)
    phase = Phase("Dmain", G, [], None, 1, None, uses_real_images=True, uses_noise=True)

    def draw(batch_gpu: int, ranks: int):
        parts = []
        for rank in range(ranks):
            stream = TrainingStream(dataset, EpochOrder(len(dataset), 0), rank, ranks, batch_gpu, 24)
            source = BatchSource(G, CounterRNG(0), dataset.label_distribution(), stream, 2, 8, batch_gpu, rank, ranks,
                                 torch.device("cpu"))
            parts.append(list(source.micro_batches(phase, 24)))
        ordered = [batch for group in zip(*parts, strict=True) for batch in group]
        return {name: torch.cat([getattr(b, name) for b in ordered], dim=1 if name.startswith("augment") else 0)
                for name in ("z", "gen_c", "real_img", "real_c", "augment_fake", "augment_real", "pl_noise")}

    whole = draw(8, 1)
    for batch_gpu, ranks in ((2, 1), (4, 2), (1, 4)):
        for name, value in draw(batch_gpu, ranks).items():
            assert torch.equal(value, whole[name]), (name, batch_gpu, ranks)


@pytest.mark.slow
def test_superres_stage(stem_run, data32, tmp_path):
    stem = tmp_path / "stem"
    shutil.copytree(stem_run, stem)
    train(tmp_path / "up", data32, "--superres", f"--path_stem={stem}", "--kimg=0.016", "--tick=0.008", "--snap=1")
    run = only_run(tmp_path / "up")
    before, after = open_snapshot(stem), open_snapshot(run)
    shutil.rmtree(stem)                         # A stage needs its stem only to begin.
    kept = after["generator_config"]["num_frozen_layers"]
    frozen = [f"synthesis.{layer['name']}." for layer in after["generator_config"]["layers"][:kept]] + ["mapping."]
    moved = 0
    for name, value in after["G"].items():
        if name.startswith(tuple(frozen)) and name != "mapping.w_avg":
            assert torch.equal(value, before["G_ema"][name]), name
        elif name.startswith("synthesis.input.weight"):
            moved += not torch.equal(value, before["G_ema"][name])
    assert moved == 1                           # The input trains on.
    image = load_network(run).G_ema(torch.zeros(2, 64), torch.eye(4)[:2])
    assert image.shape == (2, 3, 32, 32)


@pytest.mark.slow
def test_guidance_by_a_local_classifier(stem_run, data32, tmp_path):
    net = tmp_path / "net.safetensors"
    save_own_network(net, OwnNetwork(own_config(4, 32, (8, 8), class_names=["0", "1", "2", "3"])))
    train(tmp_path / "out", data32, "--superres", f"--path_stem={stem_run}", "--kimg=0.008", "--cls_weight=8",
          f"--classifier={net}")
    lines = (only_run(tmp_path / "out") / "stats.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["Loss/G/guidance_loss"]["mean"] == pytest.approx(np.log(4), abs=1)


@pytest.mark.slow
def test_unconditional_run_of_config_r_with_plain_heads(tmp_path):
    data = write_dataset(tmp_path / "plain.zip", 16, 8, 0)
    out = train(tmp_path / "out", data, "--cond=0", "--cfg=stylegan3-r", "--cbase=32", "--cmax=4", "--san=0",
                "--kimg=0.008", "--mirror=1")
    assert "resuming" not in out
    D = open_snapshot(only_run(tmp_path / "out"))["D"]
    assert not [name for name in D if name.endswith(".scale")]


@pytest.mark.slow
def test_resume_option_takes_weights_into_a_new_run(stem_run, data16, tmp_path):
    train(tmp_path, data16, f"--resume={stem_run}", "--kimg=0.008")
    start = open_snapshot(only_run(tmp_path) / "network-snapshot-000000.pkl")
    assert_equal_states(start["G_ema"], open_snapshot(stem_run)["G_ema"])


@pytest.mark.slow
def test_restart_every_exits_with_3(data16, tmp_path):
    args = [*SMALL, f"--outdir={tmp_path}", f"--data={data16}", "--kimg=100", "--tick=0.008", "--restart_every=1"]
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 3, result.output
    assert (only_run(tmp_path) / STATE_FILE).is_file()


@pytest.mark.slow
def test_metrics_choose_the_best_model(data16, tmp_path):
    """A judge scores every snapshot; the best is kept under its own name."""
    judge = tmp_path / "judge.safetensors"
    save_own_network(judge, OwnNetwork(own_config(4, 16, (8, 8))))
    train(tmp_path / "out", data16, "--kimg=0.016", "--tick=0.008", "--snap=1", "--metrics=fid,kid", "--num=16",
          f"--detector={judge}")
    run = only_run(tmp_path / "out")
    lines = [json.loads(line) for line in (run / "metric-fid.jsonl").read_text().splitlines()]
    assert len(lines) == 3
    values = [line["results"]["fid"] for line in lines]
    best = lines[int(np.argmin(values))]["snapshot_pkl"]
    assert_equal_states(open_snapshot(run / best)["G_ema"], open_snapshot(run / "best_model.pkl")["G_ema"])
