"""run_inversion.py: its files, what gen_images makes of them, and its messages."""
import json

import imageio_ffmpeg
import numpy as np
import PIL.Image
import pytest
import torch

import gen_images
import run_inversion
from dnnlib import UserError
from legacy import load_network
from tests.inference.commands import invoke
from torch_utils.images import from_uint8
from training.generator.synthesis import synthesize_ws
from training.run.formats import read_snapshot


def invert(network, outdir, *args):
    return invoke(run_inversion.main, f"--network={network}", f"--outdir={outdir}", "--distance=pixels", *args)


def pixels(path):
    with PIL.Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three pictures of other shapes than the network's."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.RandomState(0)
    for name in ("a", "b", "c"):
        PIL.Image.fromarray(rng.randint(0, 255, [20, 26, 3], dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def several(network, photos, tmp_path_factory):
    outdir = tmp_path_factory.mktemp("several") / "out"
    result = invert(network, outdir, f"--target={photos}", "--inv-steps=3", "--run-pti", "--pti-steps=2",
                    "--batch-sz=2", "--space=w+", "--starts=5", "--seed=9")
    assert result.exit_code == 0, result.output
    return outdir, result.output

#----------------------------------------------------------------------------

def test_files_of_several_pictures(several):
    outdir, output = several
    assert {path.name for path in outdir.iterdir()} == {"a", "b", "c", "projected_w.npz", "comparison.png"}
    for name in "abc":
        assert {path.name for path in (outdir / name).iterdir()} == {
            "target.png", "start.png", "proj.png", "tuned.png", "proj.mp4", "projected_w.npz", "G.pkl"}
        count, _ = imageio_ffmpeg.count_frames_and_secs(str(outdir / name / "proj.mp4"))
        assert count == 3 + 2
        assert f"{name}, class " in output
    assert pixels(outdir / "comparison.png").shape == (3 * 64, 4 * 64, 3)
    assert not [path for path in outdir.parent.rglob(".*")]


def test_latents_say_how_they_were_found(several, network, photos):
    outdir, _ = several
    loaded = load_network(network)
    with np.load(outdir / "projected_w.npz") as found:
        content = dict(found)
    assert content["w"].shape == content["start"].shape == (3, loaded.G_ema.num_ws, 32)
    assert content["target"].tolist() == ["a.png", "b.png", "c.png"]
    assert (content["seed"], content["steps"], content["space"], content["distance"]) == (9, 3, "w+", "pixels")
    assert content["network_sha256"] == loaded.sha256
    assert set(content["class"].tolist()) <= {0, 1, 2}
    options = json.loads(str(content["options"]))
    assert options["target"] == [str(photos)]
    assert options["starts"] == 5
    for i, name in enumerate("abc"):
        with np.load(outdir / name / "projected_w.npz") as found:
            assert np.array_equal(found["w"][0], content["w"][i])
            assert found["mse"] == content["mse"][i]
        images = synthesize_ws(loaded.G_ema, torch.from_numpy(content["w"][i:i + 1]))
        target = from_uint8(torch.tensor(pixels(outdir / name / "target.png"))).permute(2, 0, 1)
        assert content["mse"][i] == pytest.approx((images[0] - target).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize("tuned", [False, True])
def test_gen_images_draws_them(several, network, tmp_path, tuned):
    outdir, _ = several
    source = outdir / "b" / "G.pkl" if tuned else network
    result = invoke(gen_images.main, f"--network={source}", f"--w={outdir / 'b' / 'projected_w.npz'}",
                    f"--outdir={tmp_path}")
    assert result.exit_code == 0, result.output
    expected = pixels(outdir / "b" / ("tuned.png" if tuned else "proj.png")).astype(int)
    assert np.abs(pixels(tmp_path / "w0000.png").astype(int) - expected).max() <= 1


def test_the_tuned_generator_says_where_it_comes_from(several, network):
    outdir, _ = several
    snapshot, original = read_snapshot(outdir / "c" / "G.pkl"), load_network(network)
    assert snapshot["class_names"] == ["cat", "dog", "owl"]
    record = snapshot["tuned_to"]
    assert (record["target"], record["network_sha256"], record["seed"]) == ("c.png", original.sha256, 9)
    with np.load(outdir / "c" / "projected_w.npz") as found:
        assert np.array_equal(found["w"][0], record["w"].numpy())
    changed = load_network(outdir / "c" / "G.pkl").G_ema.state_dict()
    assert any(not torch.equal(x, changed[name]) for name, x in original.G_ema.state_dict().items())


def test_one_picture_has_the_official_names(network, photos, several, tmp_path):
    """Its search goes on where the other one ended: without steps nothing changes."""
    outdir, _ = several
    result = invert(network, tmp_path / "out", f"--target={photos / 'a.png'}", "--inv-steps=0", "--save-video=False",
                    f"--w-init={outdir / 'a' / 'projected_w.npz'}", "--space=w+", "--class=owl")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "target.png", "start.png", "proj.png", "projected_w.npz", "comparison.png"}
    with np.load(tmp_path / "out" / "projected_w.npz") as found, np.load(outdir / "a" / "projected_w.npz") as first:
        assert np.array_equal(found["w"], first["w"])
        assert found["class"].tolist() == [2]
    assert "a, class owl: mean squared error" in result.output


def test_bad_input_gets_a_line(network, photos, several, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    PIL.Image.new("L", (8, 8)).save(tmp_path / "black.png")
    np.save(tmp_path / "narrow.npy", np.zeros([1, 1, 5]))
    np.save(tmp_path / "two.npy", np.zeros([2, 1, 32]))
    one, latents = f"--target={photos / 'a.png'}", several[0] / "a" / "projected_w.npz"
    for args, said in (
            ([f"--target={tmp_path / 'none.png'}"], "none.png: no such file or folder"),
            ([f"--target={tmp_path / 'empty'}"], "no pictures in this folder"),
            ([f"--target={tmp_path / 'text.png'}"], "cannot be decoded"),
            ([one, "--distance=lpisp"], "--distance=lpisp: no distance of this name"),
            ([one, "--distance=timm:no_such_net"], "no_such_net"),
            ([one, f"--distance={tmp_path / 'none.safetensors'}"], "none.safetensors"),
            ([one, "--class=fish"], "--class=fish"),
            ([one, f"--w-init={tmp_path / 'narrow.npy'}"], "expected latents"),
            ([one, f"--w-init={tmp_path / 'two.npy'}"], "holds 2 latents for 1 targets"),
            ([one, f"--w-init={latents}"], "give --space=w+"),
            ([one, f"--w-init={latents}", "--starts=3"], "leave one of the two out"),
            ([one, f"--mask={tmp_path / 'black.png'}"], "is black everywhere"),
            ([one, f"--mask={photos}"], "is a folder"),
            ([one, f"--outdir={tmp_path / 'full'}"], "this folder is not empty"),
            ([one, f"--outdir={tmp_path / 'text.png'}"], "is a file: name a new folder")):
        result = invert(network, tmp_path / "out", *args)
        assert result.exit_code == 2, (args, result.output)
        assert said in result.output, (args, result.output)
        assert not (tmp_path / "out").exists(), args
    result = invoke(gen_images.main, f"--network={network}", f"--outdir={tmp_path / 'out'}")
    assert (result.exit_code, "or latents in files with --w" in result.output) == (2, True)
    result = invoke(gen_images.main, f"--network={network}", f"--w={latents}", "--class=cat", "--outdir=x")
    assert (result.exit_code, "--class would change nothing" in result.output) == (2, True)


def test_nothing_is_left_half_done(network, photos, tmp_path, monkeypatch):
    def fail(*args):
        raise UserError("it failed")
    monkeypatch.setattr(run_inversion, "tune", fail)
    result = invert(network, tmp_path / "out", f"--target={photos / 'a.png'}", "--inv-steps=1", "--starts=1",
                    "--run-pti")
    assert (result.exit_code, "it failed" in result.output) == (2, True)
    assert list(tmp_path.iterdir()) == []
