"""gen_images.py and the sampling behind it."""
import pickle

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import calc_metrics
import gen_images
import train
from dnnlib import UserError
from inference import sample_files, sampling
from inference.sampling import GeneratorSource, find_class, generate, seed_label, seed_latent
from legacy import load_network
from tests.inference import commands
from tests.parity import DATA, load_npz
from torch_utils import checkpoint
from torch_utils.images import from_uint8, to_uint8_metric, to_uint8_sample
from training import networks_stylegan3
from training.generator import layer_schedule
from training.run.formats import NETWORK_FORMAT


def invoke(*args):
    return commands.invoke(gen_images.main, *args)


def images(folder) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted(folder.glob("*.png")):
        with PIL.Image.open(path) as image:
            found[path.name] = np.asarray(image)
    return found

#----------------------------------------------------------------------------

@pytest.mark.numeric
def test_official_conventions(network, tmp_path):
    """Latent, class, truncation and rounding of the official script, spelled out."""
    assert invoke(f"--network={network}", "--seeds=3,7", "--trunc=0.5", f"--outdir={tmp_path}").exit_code == 0
    G = load_network(network).G_ema
    for seed in (3, 7):
        z = torch.from_numpy(np.random.RandomState(seed).randn(1, 64)).float()
        label = np.random.RandomState(seed).randint(0, 3, 1)
        w = G.mapping(z, torch.eye(3)[label])
        mean = G.mapping.w_avg[label].unsqueeze(1)
        image = G.synthesis(mean + 0.5 * (w - mean))
        expected = ((image + 1) * 127.5).clamp(0, 255).to(torch.uint8)[0].permute(1, 2, 0).numpy()
        found = images(tmp_path)[f"seed{seed:04d}.png"]
        assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.numeric
def test_official_pickle_gives_the_official_image():
    """The recorded image of the official generator, as the official script would have written it."""
    data = load_npz("generator_t_cond_stem16.npz")
    G = load_network(DATA / "snapshot_stem16_t_cond.pkl").G_ema
    state = G.state_dict()
    for name in state:
        state[name] = torch.as_tensor(data["state/" + name])
    G.load_state_dict(state)
    labels = torch.as_tensor(data["c"]).argmax(dim=1)
    ours = torch.cat(list(generate(G, torch.as_tensor(data["z"]), labels, batch_size=1)))
    theirs = to_uint8_sample(torch.as_tensor(data["img"]))
    assert (to_uint8_sample(ours).int() - theirs.int()).abs().max() <= 1


@pytest.mark.numeric
def test_images_do_not_depend_on_the_batch(network, tmp_path):
    for size in (1, 3, 8):
        result = invoke(f"--network={network}", "--seeds=0-6", f"--batch-sz={size}", f"--outdir={tmp_path / str(size)}")
        assert result.exit_code == 0, result.output
    one = images(tmp_path / "1")
    assert len(one) == 7
    for size in (3, 8):
        for name, image in images(tmp_path / str(size)).items():
            assert np.abs(image.astype(int) - one[name].astype(int)).max() <= 1


def test_class_by_name_or_index(network, tmp_path):
    for kind in ("owl", "2"):
        result = invoke(f"--network={network}", "--seeds=0", f"--class={kind}", f"--outdir={tmp_path / kind}")
        assert result.exit_code == 0
        assert ("--class=2: the class 2, owl" in result.output) == (kind == "2")
    assert np.array_equal(images(tmp_path / "owl")["seed0000.png"], images(tmp_path / "2")["seed0000.png"])


def test_sheet_has_a_row_per_class(network, tmp_path):
    result = invoke(f"--network={network}", "--seeds=0-4", f"--sheet={tmp_path / 'sheet.png'}")
    assert result.exit_code == 0, result.output
    with PIL.Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (sample_files.NAME_WIDTH + 5 * 64, 3 * 64)


def test_transforms_move_the_picture(network, tmp_path):
    base = [f"--network={network}", "--seeds=0"]
    for name, more in (("plain", []), ("moved", ["--translate=0.25,0"]), ("turned", ["--rotate=90"])):
        assert invoke(*base, *more, f"--outdir={tmp_path / name}").exit_code == 0
    plain, moved, turned = (images(tmp_path / n)["seed0000.png"].astype(float) for n in ("plain", "moved", "turned"))
    assert not np.array_equal(plain, turned)
    # A quarter of 16 pixels to the right: away from the border the shifted picture is the same one.
    assert np.abs(moved[4:12, 8:13] - plain[4:12, 4:9]).mean() < np.abs(moved[4:12, 8:13] - plain[4:12, 8:13]).mean()


@pytest.mark.numeric
def test_centroids(network, tmp_path):
    centroids = torch.randn(5, 32)
    np.save(tmp_path / "c.npy", centroids.numpy())
    result = invoke(f"--network={network}", "--seeds=0", "--trunc=0", f"--centroids-path={tmp_path / 'c.npy'}",
                    f"--outdir={tmp_path / 'out'}")
    assert result.exit_code == 0, result.output
    G = load_network(network).G_ema
    w = G.mapping(seed_latent(0, 64)[None], torch.eye(3)[[seed_label(0, 3)]])[:, 0]
    nearest = centroids[((centroids - w) ** 2).sum(dim=1).argmin()]
    expected = to_uint8_sample(G.synthesis(nearest.expand(1, G.num_ws, 32)))[0].permute(1, 2, 0).numpy()
    assert np.abs(images(tmp_path / "out")["seed0000.png"].astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.numeric
def test_the_two_roundings():
    x = torch.tensor([-2.0, -1.0, -0.001, 0.0, 0.003, 0.999, 2.0])
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(from_uint8(everything), everything.float() / 127.5 - 1)
    assert torch.equal(to_uint8_metric(from_uint8(everything)), everything)
    assert to_uint8_sample(x).tolist() == [0, 0, 127, 127, 127, 254, 255]
    assert to_uint8_metric(x).tolist() == [0, 0, 127, 128, 128, 255, 255]

#----------------------------------------------------------------------------

@pytest.mark.numeric
def test_metric_source_is_a_function_of_seed_and_number(network):
    G = load_network(network).G_ema
    whole = GeneratorSource(G, 10, seed=5, label_policy="uniform")
    images_10, labels_10 = (torch.cat(x) for x in zip(*whole.batches(4), strict=True))
    some = GeneratorSource(G, 10, seed=5, label_policy="uniform")
    images_3, labels_3 = next(iter(some.batches_at(8, [1, 4, 9])))
    assert torch.equal(labels_3, labels_10[[1, 4, 9]])
    assert (images_3.int() - images_10[[1, 4, 9]].int()).abs().max() <= 1
    balanced = GeneratorSource(G, 9, label_policy="balanced")
    assert torch.cat([labels for _, labels in balanced.batches(4)]).bincount().tolist() == [3, 3, 3]


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_broken_images_do_not_pass_the_metric_source(network, monkeypatch, broken):
    """Whether a batch is finite is looked at one batch later, the last one's at once."""
    made = []

    def synthesize(G, z, labels, psi, precision):
        made.append(torch.full([len(z), 3, 16, 16], torch.nan if len(made) == broken else 0.0))
        return made[-1]

    monkeypatch.setattr(sampling, "synthesize", synthesize)
    source = GeneratorSource(load_network(network).G_ema, 6, label_policy="uniform")
    with pytest.raises(UserError, match="non-finite"):
        list(source.batches(2))
    assert len(made) == min(broken + 2, 3)


def test_large_images_come_in_batches_that_32_bits_can_index(network, monkeypatch):
    G = load_network(network).G_ema
    per_image = max(size for _, size in layer_schedule.map_sizes(G.config))
    assert per_image * layer_schedule.largest_batch(G.config) < 2 ** 31
    monkeypatch.setattr(layer_schedule, "MAX_ELEMENTS", 2 * per_image + 1)
    source = GeneratorSource(G, 5, label_policy="uniform")
    assert [len(images) for images, _ in source.batches(64)] == [2, 2, 1]


def test_single_precision_is_no_less_on_a_gpu(network, monkeypatch):
    """PyTorch lets convolutions round their inputs to TF32 unless it is told not to."""
    seen = []
    convolve = networks_stylegan3.modulated_conv2d
    monkeypatch.setattr(networks_stylegan3, "modulated_conv2d", lambda *args, **kwargs: seen.append(
        torch.backends.cudnn.conv.fp32_precision) or convolve(*args, **kwargs))
    before = torch.backends.cudnn.conv.fp32_precision
    G = load_network(network).G_ema
    sampling.synthesize(G, torch.zeros(1, G.z_dim), torch.zeros(1, dtype=torch.int64))
    assert set(seen) == {"ieee"}
    assert torch.backends.cudnn.conv.fp32_precision == before


@pytest.mark.numeric
def test_precision(network, tmp_path, monkeypatch):
    """bf16 in the marked layers only, and images that look the same; fp32 is what auto is on a CPU."""
    seen = []
    convolve = networks_stylegan3.modulated_conv2d
    monkeypatch.setattr(networks_stylegan3, "modulated_conv2d",
                        lambda x, *args, **kwargs: seen.append(x.dtype) or convolve(x, *args, **kwargs))
    found = {}
    for precision in ("auto", "fp32", "bf16"):
        seen.clear()
        out = tmp_path / precision
        result = invoke(f"--network={network}", "--seeds=0-3", f"--precision={precision}", f"--outdir={out}")
        assert result.exit_code == 0, result.output
        marked = [layer.use_fp16 for layer in load_network(network).G_ema.config.layers]
        wanted = [torch.bfloat16 if low and precision == "bf16" else torch.float32 for low in marked]
        assert seen == wanted * 4
        found[precision] = np.stack(list(images(out).values())).astype(int)
    assert any(marked)
    assert np.array_equal(found["auto"], found["fp32"])
    assert 0 < np.abs(found["bf16"] - found["fp32"]).max() <= 12
    assert np.abs(found["bf16"] - found["fp32"]).mean() < 1


@pytest.mark.numeric
def test_precision_reaches_the_source_of_metrics(network):
    G = load_network(network).G_ema
    sources = [GeneratorSource(G, 4, label_policy="uniform", precision=p) for p in ("auto", "fp32", "bf16")]
    auto, fp32, bf16 = (next(iter(source.batches(4)))[0] for source in sources)
    assert torch.equal(auto, fp32)
    assert not torch.equal(auto, bf16)
    assert sources[2].description["precision"] == "bf16"


def test_labels_follow_the_data(network):
    G = load_network(network).G_ema
    source = GeneratorSource(G, 3000, label_policy="dataset", label_probs=np.array([0.7, 0.3, 0.0]))
    share = source.labels(np.arange(3000)).bincount(minlength=3) / 3000
    assert share[2] == 0
    assert abs(float(share[0]) - 0.7) < 0.03


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"label_policy": "dataset"}, "distribution of the data is not known"),
    ({"label_policy": "dataset", "label_probs": np.ones(5) / 5}, "3 classes, the data 5"),
    ({"label_policy": "other"}, "--labels=other")])
def test_bad_metric_source(network, kwargs, message):
    with pytest.raises(UserError, match=message):
        GeneratorSource(load_network(network).G_ema, 3, **kwargs)


def test_find_class():
    assert find_class("dog", ["cat", "dog"], 2) == 1
    assert find_class("1", None, 2) == 1
    with pytest.raises(UserError, match="unconditional"):
        find_class("1", None, 0)

#----------------------------------------------------------------------------
# Mistakes: one line, exit code 2.

@pytest.mark.parametrize(("args", "message"), [
    (["--class=12"], "--class=12: no class of this name: the network has 3 classes, cat, dog, owl: give"),
    (["--class=\u00b2"], "no class of this name"), (["--class=-1"], "no class of this name"),
    (["--class=cow"], "classes, cat, dog, owl: give one of these names or a number from 0 to 2"),
    (["--centroids-path=nothing.npy"], "--centroids-path=nothing.npy: No such file or directory"),
    (["--seeds=5-2"], "runs backwards"), (["--seeds=x"], "is not a list"), (["--translate=1"], "is not a pair"),
    (["--trunc=1e30"], "-1000<=x<=1000"), (["--translate=0,1e9"], "-1000<=x<=1000"), (["--rotate=1e9"], "x<=360000"),
])
def test_mistakes(network, tmp_path, args, message):
    result = invoke(f"--network={network}", "--seeds=0", f"--outdir={tmp_path}", *args)
    assert result.exit_code == 2
    assert message in result.output


def test_seeds_of_64_bits(network, tmp_path):
    result = invoke(f"--network={network}", "--seeds=4294967296,18446744073709551615", f"--outdir={tmp_path}")
    assert result.exit_code == 0, result.output
    first, last = (images(tmp_path)[f"seed{seed}.png"] for seed in (2 ** 32, 2 ** 64 - 1))
    assert not np.array_equal(first, last)


def test_seeds_without_end_are_one_line(network, tmp_path):
    for seeds, said in (("0-99999999999", "at most 1000000"), ("18446744073709551616", "at most 18446744073709551615")):
        result = invoke(f"--network={network}", f"--seeds={seeds}", f"--outdir={tmp_path}")
        assert result.exit_code == 2
        assert said in result.output
    result = invoke(f"--network={network}", "--seeds=0-999999", f"--sheet={tmp_path / 'sheet.png'}")
    assert result.exit_code == 2
    assert "give at most 5459 samples, or --outdir" in result.output


def test_outdir_or_sheet(network):
    assert "one of the three" in invoke(f"--network={network}", "--seeds=0").output


def test_unwritable_outdir(network, tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke(f"--network={network}", "--seeds=0", f"--outdir={tmp_path / 'file' / 'out'}")
    assert result.exit_code == 2
    assert "--outdir" in result.output


def test_snapshot_cut_in_half(network, tmp_path):
    half = tmp_path / "half.pkl"
    half.write_bytes(network.read_bytes()[: network.stat().st_size // 2])
    result = invoke(f"--network={half}", "--seeds=0", f"--outdir={tmp_path}")
    assert result.exit_code == 2
    assert "half.pkl" in result.output
    assert "damaged or cut off" in result.output


def test_diverged_network_is_an_error(network, tmp_path):
    content = checkpoint.load(network, NETWORK_FORMAT)
    content["G_ema"]["synthesis.L0_24_8.bias"] = torch.full([8], float("nan"))
    bad = tmp_path / "bad.pkl"
    checkpoint.save(bad, content)
    result = invoke(f"--network={bad}", "--seeds=0", f"--outdir={tmp_path}")
    assert result.exit_code == 2
    assert "is not finite" in result.output


class Evil:
    """Runs a command when a careless reader loads it."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        import os
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("script", ["gen_images", "calc_metrics", "train_resume", "train_stem"])
def test_every_script_refuses_code_in_a_network(script, tmp_path, data16):
    evil, canary = tmp_path / "evil.pkl", tmp_path / "canary"
    evil.write_bytes(pickle.dumps({"G_ema": Evil(canary)}))
    training = ["--cfg=stylegan3-t", f"--data={data16}", "--batch=4", f"--outdir={tmp_path / 'out'}", "--metrics=none"]
    command, args = {
        "gen_images": (gen_images.main, [f"--network={evil}", "--seeds=0", f"--outdir={tmp_path / 'out'}"]),
        "calc_metrics": (calc_metrics.main, [f"--network={evil}", f"--data={data16}", "--metrics=fid", "--num=4",
                                             "--detector=inception-2015-12-05:random"]),
        "train_resume": (train.main, [*training, f"--resume={evil}"]),
        "train_stem": (train.main, [*training, "--superres", f"--path_stem={evil}"]),
    }[script]
    result = CliRunner().invoke(command, args)
    assert result.exit_code == 2, result.output
    assert "system" in result.output
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_a_seed_that_is_typed_twice_is_one_image(network, tmp_path):
    result = invoke(f"--network={network}", "--seeds=3,3,1-3", f"--outdir={tmp_path}")
    assert f"{tmp_path}: 3 images" in result.output
    assert len(images(tmp_path)) == 3


def test_no_centroids_at_all(network, tmp_path):
    np.save(tmp_path / "c.npy", np.zeros([0, 32], np.float32))
    result = invoke(f"--network={network}", "--seeds=1", "--trunc=0.5", f"--centroids-path={tmp_path}/c.npy",
                    f"--outdir={tmp_path}")
    assert result.exit_code == 2
    assert "holds no centroids: compute them again" in result.output
