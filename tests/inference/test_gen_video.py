"""gen_video.py: what lies between keyframes, what moves besides, and the files that are written."""
import re
import subprocess

import imageio_ffmpeg
import numpy as np
import PIL.Image
import pytest
import scipy.interpolate
import torch

import gen_images
import gen_video
from dnnlib import UserError
from inference import frames, video_files
from inference.frames import make_transform, pictures, tiled
from inference.keyframes import EASINGS, KeyframePath, Timing
from inference.latents import load_latents
from inference.motion import Motion, Sweep, make_keyframes
from inference.sampling import find_classes, seed_label, seed_latent
from inference.video_files import open_video
from legacy import load_network
from tests.closeness import max_error
from tests.inference import commands
from tests.parity import DATA
from torch_utils.images import to_uint8_sample
from training.generator.synthesis import synthesize_ws


def invoke(*args, command=gen_video.main):
    return commands.invoke(command, *args)


def stored(path) -> np.ndarray:
    """Frames of a folder or of an animation, [T, H, W, 3]."""
    if path.is_dir():
        return np.stack([np.asarray(PIL.Image.open(file)) for file in sorted(path.iterdir())])
    with PIL.Image.open(path) as image:
        return np.stack([np.asarray(image.convert("RGB")) for _ in map(image.seek, range(image.n_frames))])


def video(network, out, *args) -> np.ndarray:
    """The frames that a command line makes, as integers."""
    result = invoke(f"--network={network}", f"--output={out}", *args)
    assert result.exit_code == 0, result.output
    return stored(out).astype(int)


def shown(G, ws, transform=None) -> np.ndarray:
    """What a frame shows of ws [num_ws, w_dim]: [R, R, 3]."""
    image = synthesize_ws(G, ws[None].float(), transform=None if transform is None else transform[None])
    return to_uint8_sample(image)[0].permute(1, 2, 0).numpy().astype(int)


def levels(found, expected) -> int:
    """The largest difference, of 255: sums of another order are rounded to the neighbouring level."""
    return int(np.abs(np.asarray(found) - np.asarray(expected)).max())

#----------------------------------------------------------------------------
# Between keyframes.

def official_interpolation(keys: np.ndarray, position: float) -> np.ndarray:
    """The published formula: the sequence five times over, and SciPy's cubic interpolation through all of it."""
    wraps, count = 2, len(keys)
    x = np.arange(-count * wraps, count * (wraps + 1))
    y = np.tile(keys, [wraps * 2 + 1] + [1] * (keys.ndim - 1))
    return scipy.interpolate.interp1d(x, y, kind="cubic", axis=0)(position)


@pytest.mark.numeric
@pytest.mark.parametrize("count", [1, 2, 3, 7, 33, 100])
def test_interpolation_is_the_official_one(count):
    keys = np.random.RandomState(count).randn(count, 2, 3)
    path = KeyframePath(keys)
    for position in np.linspace(0, count, 23):
        assert max_error(path(position), official_interpolation(keys, position)) < 1e-12


@pytest.mark.numeric
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_loop_closes(count):
    path = KeyframePath(np.random.RandomState(0).randn(count, 4))
    assert max_error(path(count), path(0)) < 1e-13
    step = 1e-6             # The speed is nearly the same, too, so that nobody sees where the loop begins.
    before, after = (path(count) - path(count - step)) / step, (path(step) - path(0)) / step
    assert max_error(before, after) < (0.3 if count == 2 else 1e-4)     # Of two keyframes the formula does less well.
    timing = Timing(count, 10)
    assert timing.num_frames == 10 * count
    assert timing.position(timing.num_frames) == count
    assert timing.there_and_back(0) == timing.there_and_back(timing.num_frames) == 0
    assert timing.there_and_back(timing.num_frames // 2) == 1


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_without_a_loop_it_ends_at_the_last_keyframe(count):
    keys, timing = np.random.RandomState(0).randn(count, 4), Timing(count, 3, loop=False)
    last = timing.num_frames - 1
    assert timing.num_frames == (3 if count == 1 else 3 * (count - 1) + 1)
    assert (timing.progress(0), timing.progress(last)) == (0, 1)
    if count > 1:
        assert timing.position(last) == count - 1
        assert max_error(KeyframePath(keys, loop=False)(count - 1), keys[-1]) < 1e-12
    assert Timing(1, 1, loop=False).progress(0) == 0


@pytest.mark.numeric
@pytest.mark.parametrize("name", EASINGS)
def test_easing(name):
    ease = EASINGS[name]
    values = [ease(x) for x in np.linspace(0, 1, 11)]
    assert (values[0], values[-1]) == (0, 1)
    assert values == sorted(values)
    assert ease(0.5) == pytest.approx(0.5, abs=1e-15)
    speed = (ease(1e-4) - ease(0)) / 1e-4
    assert speed == pytest.approx(1 if name == "none" else 0, abs=1e-3)
    assert Timing(2, 4, easing=name).position(5) == 1 + ease(0.25)

#----------------------------------------------------------------------------
# Pictures.

@pytest.mark.numeric
def test_a_video_is_the_official_one(network, tmp_path):
    """Keyframes, truncation, interpolation, layout and rounding of the official script, spelled out."""
    found = video(network, tmp_path / "out", "--seeds=0-2", "--num-keyframes=2", "--grid=2x1", "--w-frames=3",
                  "--trunc=0.6", "--class=dog", "--shuffle-seed=4")
    G = load_network(network).G_ema
    seeds = np.array([0, 1, 2, 0])
    np.random.RandomState(4).shuffle(seeds)
    z = torch.from_numpy(np.stack([np.random.RandomState(seed).randn(64) for seed in seeds]))
    ws = G.mapping(z, torch.eye(3)[[1] * 4], truncation_psi=0.6).reshape(1, 2, 2, G.num_ws, 32)
    assert found.shape == (6, 16, 32, 3)
    for i, frame in enumerate(found):
        cells = [shown(G, torch.from_numpy(official_interpolation(ws[0, cell].numpy(), i / 3))) for cell in (0, 1)]
        assert levels(frame, np.concatenate(cells, axis=1)) <= 1


@pytest.mark.numeric
def test_frames_do_not_depend_on_the_batch(network, tmp_path):
    args = ["--seeds=0-5", "--grid=3x1", "--w-frames=3"]
    one = video(network, tmp_path / "1", *args)
    for size in (2, 7, 100):
        assert levels(video(network, tmp_path / str(size), *args, f"--batch-sz={size}"), one) <= 1


@pytest.mark.numeric
def test_keyframes_are_the_pictures_of_gen_images(network, tmp_path):
    """Without --class each seed has its own one, and a list of classes takes turns."""
    args = [f"--network={network}", "--trunc=0.5", "--seeds=0-3", f"--outdir={tmp_path / 'images'}"]
    assert invoke(*args, command=gen_images.main).exit_code == 0
    images = stored(tmp_path / "images")
    for interp in ("w", "z"):
        found = video(network, tmp_path / interp, "--seeds=0-3", "--w-frames=2", "--trunc=0.5", f"--interp={interp}")
        assert levels(found[::2], images) <= 1
    turns = video(network, tmp_path / "turns", "--seeds=5", "--class=cat,owl", "--w-frames=1")
    G = load_network(network).G_ema
    for frame, label in zip(turns, (0, 2), strict=True):
        assert levels(frame, shown(G, G.mapping(seed_latent(5, 64)[None], torch.eye(3)[[label]])[0])) <= 1


@pytest.mark.numeric
def test_between_classes_in_z(network):
    """z and the vectors of the classes are interpolated and mapped, and truncation follows the classes' means."""
    G = load_network(network).G_ema
    labels, seeds = [0, 2, 1], [3, 4, 5]
    keyframes = make_keyframes(G, seeds, labels, 1)
    motion = Motion(G, keyframes, Timing(3, 4), Sweep((0.7, 0.7)), between_z=True)
    z, vectors, means = (official_interpolation(np.stack(rows), 1.25) for rows in (
        [seed_latent(seed, 64).numpy() for seed in seeds], [G.mapping.embed.weight[k].numpy() for k in labels],
        [G.mapping.w_avg[k].numpy() for k in labels]))
    w = G.mapping.map(torch.tensor(z)[None], torch.tensor(vectors)[None].float())[0].numpy()
    assert max_error(motion.frame_ws(5)[0, 3], means + 0.7 * (w - means)) < 1e-5


@pytest.mark.numeric
def test_mapping_of_a_class_vector_is_that_of_its_class(network):
    G = load_network(network).G_ema
    z = torch.randn(3, 64)
    assert torch.equal(G.mapping.map(z, G.mapping.embed.weight), G.mapping(z, torch.eye(3))[:, 0])


@pytest.mark.numeric
def test_sweep_of_truncation(network, tmp_path):
    found = video(network, tmp_path / "out", "--seeds=7", "--class=1", "--w-frames=4", "--sweep-trunc=0,1")
    G = load_network(network).G_ema
    mean, w = G.mapping.w_avg[1], G.mapping(seed_latent(7, 64)[None], torch.eye(3)[[1]])[0]
    for frame, psi in zip(found, (0, 0.5, 1, 0.5), strict=True):
        assert levels(frame, shown(G, mean + psi * (w - mean))) <= 1


@pytest.mark.numeric
def test_sweeps_of_the_input(network, tmp_path, monkeypatch):
    """Whole turns go on, other motions come back; the pictures are those that gen_images moves so far."""
    found = video(network, tmp_path / "out", "--seeds=7", "--w-frames=4", "--sweep-rotate=360",
                  "--sweep-translate=0.5,-0.25", "--batch-sz=3")
    for i, far, angle in ((1, 0.5, 90), (2, 1, 180), (3, 0.5, 270)):
        out = tmp_path / str(i)
        assert invoke(f"--network={network}", "--seeds=7", f"--outdir={out}", f"--rotate={angle}",
                      f"--translate={0.5 * far},{-0.25 * far}", command=gen_images.main).exit_code == 0
        assert levels(found[i], stored(out)[0]) <= 1
    assert levels(found[1], found[2]) > 3
    timing = Timing(1, 4)
    swing = [Sweep(rotate=90).transform_at(timing, i) for i in (0, 1, 2, 3, 4)]
    for found_transform, angle in zip(swing, (0, 45, 90, 45, 0), strict=True):
        assert torch.allclose(found_transform, make_transform((0, 0), angle), atol=1e-6)


@pytest.mark.numeric
def test_mixtures(network, tmp_path):
    """Sources in the first row and column; each mixture has the layers 2 and 3 of its column."""
    found = video(network, tmp_path / "out", "--seeds=0-4", "--class=cat", "--grid=3x2", "--mix-layers=2,3",
                  "--w-frames=1")
    assert found.shape == (1, 3 * 16, 4 * 16, 3)
    G = load_network(network).G_ema
    ws = G.mapping(torch.stack([seed_latent(seed, 64) for seed in range(5)]), torch.eye(3)[[0] * 5])

    def cell(row, column):
        return found[0, row * 16:(row + 1) * 16, column * 16:(column + 1) * 16]

    assert not cell(0, 0).any()
    for i in range(3):
        assert levels(cell(0, i + 1), shown(G, ws[i])) <= 1
    for j in range(2):
        assert levels(cell(j + 1, 0), shown(G, ws[3 + j])) <= 1
        for i in range(3):
            mixed = ws[3 + j].clone()
            mixed[2:4] = ws[i, 2:4]
            assert levels(cell(j + 1, i + 1), shown(G, mixed)) <= 1


@pytest.mark.numeric
def test_given_latents_are_keyframes(network, tmp_path):
    G = load_network(network).G_ema
    plus, single = torch.randn(1, G.num_ws, 32), torch.randn(2, 1, 32)
    np.savez(tmp_path / "a.npz", w=plus.numpy(), other="x")
    np.save(tmp_path / "b.npy", single.double().numpy())
    found = video(network, tmp_path / "out", f"--w={tmp_path / 'a.npz'},{tmp_path / 'b.npy'}", "--seeds=3",
                  "--w-frames=1")
    of_seed = G.mapping(seed_latent(3, 64)[None], torch.eye(3)[[seed_label(3, 3)]])[0]
    for frame, ws in zip(found, [plus[0], *single.expand(-1, G.num_ws, -1), of_seed], strict=True):
        assert levels(frame, shown(G, ws)) <= 1


@pytest.mark.numeric
def test_centroids(network, tmp_path):
    """Each keyframe is pulled to the centre nearest to it, as gen_images pulls it."""
    np.save(tmp_path / "c.npy", torch.randn(5, 32).numpy())
    args = [f"--network={network}", "--seeds=0-3", "--trunc=0.3", f"--centroids-path={tmp_path / 'c.npy'}"]
    assert invoke(*args, f"--outdir={tmp_path / 'images'}", command=gen_images.main).exit_code == 0
    found = video(network, tmp_path / "out", *args[1:], "--w-frames=1")
    assert levels(found, stored(tmp_path / "images")) <= 1


def test_an_official_pickle_without_classes(tmp_path):
    found = video(DATA / "snapshot_stem16_r_uncond.pkl", tmp_path / "out", "--seeds=0,1", "--w-frames=2", "--interp=z",
                  "--trunc=0.7", "--sweep-rotate=10")
    assert found.shape == (4, 16, 16, 3)


def test_turns_of_a_network_that_is_made_for_shifts(network, tmp_path):
    for angle, said in ((90, True), (360, True), (0, False)):
        result = invoke(f"--network={network}", "--seeds=0", "--w-frames=1", f"--sweep-rotate={angle}",
                        f"--output={tmp_path / str(angle)}")
        assert ("config R is made for turns" in result.output) == said


def test_frames_are_made_as_they_are_needed(network):
    """No more than a batch is ahead, so a video of any length fits into memory."""
    G = load_network(network).G_ema
    asked = []

    def views():
        for i in range(1000):
            asked.append(i)
            yield frames.View(torch.zeros(1, G.num_ws, 32), torch.eye(3)[None])

    made = tiled(pictures(G, views(), batch_size=4), 2, 1, zoom=2)
    assert next(made).shape == (32, 64, 3)
    assert len(asked) == 4
    next(made), next(made)
    assert len(asked) == 8


def test_pictures_of_a_diverged_network(network, tmp_path, monkeypatch):
    """The video breaks off in the middle, and nothing is left of it."""
    made = []

    def synthesize(G, ws, precision, transform, styles):
        made.append(ws)
        return torch.full([len(ws), 3, 16, 16], torch.nan if len(made) == 3 else 0.0)

    monkeypatch.setattr(frames, "synthesize_ws", synthesize)
    for out in ("v.mp4", "v.gif", "folder"):
        made.clear()
        result = invoke(f"--network={network}", "--seeds=0,1", "--w-frames=5", f"--output={tmp_path / out}")
        assert result.exit_code == 2
        assert "non-finite" in result.output
        assert not list(tmp_path.iterdir())

#----------------------------------------------------------------------------
# Files.

def decoded(path) -> np.ndarray:
    """Frames of an .mp4."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"],
                          capture_output=True, check=True)
    about = re.search(rb"Video: h264 .*yuv420p\(tv, bt709, progressive\), (\d+)x(\d+)", done.stderr)
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, int(about[2]), int(about[1]), 3)


def ramp(count: int, width: int, height: int) -> np.ndarray:
    """Frames that every format stores well: smooth, and unlike each other."""
    t, y, x = np.meshgrid(np.arange(count), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([20 * t + 2 * x, 40 + 3 * y + 0 * t, 200 - 10 * t - 2 * y], axis=3).astype(np.uint8)


@pytest.mark.parametrize(("name", "width", "height"), [("v.mp4", 33, 17), ("-v.MP4", 32, 18), ("v%d.webp", 33, 17),
                                                       ("a:v.gif", 33, 17), ("frames", 33, 17)])
def test_files(tmp_path, monkeypatch, name, width, height):
    """Each format gives back the frames, also of odd sizes; .mp4 repeats the last row and column then."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("old") if "." in name else (tmp_path / name).mkdir()
    given = ramp(6, width, height)
    with open_video(name, width, height, 25) as write:
        for frame in given:
            write(frame)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    got = decoded(tmp_path / name) if name.lower().endswith("mp4") else stored(tmp_path / name)
    if name.endswith("mp4"):
        assert got.shape == (6, 18, 34, 3)
        got = got[:, :17, :33]
    assert got.shape == given.shape
    assert np.abs(got.astype(int) - given).mean() < (1e-9 if name == "frames" else 4)


@pytest.mark.parametrize(("fps", "name", "milliseconds"), [(50, "v.gif", 20), (10, "v.gif", 100), (40, "v.webp", 25)])
def test_speed_of_animations(tmp_path, fps, name, milliseconds):
    with open_video(str(tmp_path / name), 16, 16, fps) as write:
        for frame in ramp(3, 16, 16):
            write(frame)
    with PIL.Image.open(tmp_path / name) as image:
        assert image.info["loop"] == 0
        for i in range(2):
            image.seek(i)
            image.load()
            assert image.info["duration"] == milliseconds


def test_an_encoder_that_fails(tmp_path, monkeypatch):
    """A full disk looks like this: the program says why and ends; the file that was there stays."""
    program = tmp_path / "encoder"
    program.write_text("#!/bin/sh\nhead -c 100 >/dev/null\necho '[out#0/mp4 @ 0x56] No space left on device' >&2\n"
                       "exit 3\n", "utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(video_files, "_ffmpeg", lambda path: str(program))
    place = tmp_path / "place"
    place.mkdir()
    (place / "v.mp4").write_text("old", "utf-8")

    def write_frames(count):
        with open_video(str(place / "v.mp4"), 256, 256, 60) as write:
            for frame in ramp(count, 256, 256):
                write(frame)

    for count in (0, 1, 30):
        with pytest.raises(UserError, match=r"v.mp4: the encoder failed \(No space left on device\): make room"):
            write_frames(count)
    assert (place / "v.mp4").read_text("utf-8") == "old"
    assert len(list(place.iterdir())) == 1


def test_the_package_is_missing(network, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imageio_ffmpeg", None)
    result = invoke(f"--network={network}", "--seeds=0", f"--output={tmp_path / 'v.mp4'}")
    assert result.exit_code == 2
    assert "pip install imageio-ffmpeg, or name a folder for PNG frames" in result.output
    assert len(video(network, tmp_path / "frames", "--seeds=0", "--w-frames=1")) == 1


def test_command_line(network, tmp_path):
    """The default speed of a .gif, the zoom, the picture of the first frame, and what is said."""
    result = invoke(f"--network={network}", "--seeds=0-2", "--num-keyframes=2", "--class=2,cat", "--w-frames=2",
                    "--zoom=3", f"--output={tmp_path / 'v.gif'}", f"--first-frame={tmp_path / 'first.png'}")
    assert result.exit_code == 0, result.output
    assert "--class=2,cat: owl, cat" in result.output
    assert "NOTE: 3 seeds or latents for 2 keyframes: the first 2 are shown" in result.output
    assert "v.gif: 4 frame(s) of 48x48 pixels, 0.1 s" in result.output
    first = np.asarray(PIL.Image.open(tmp_path / "first.png"))
    assert np.array_equal(first[::3, ::3].repeat(3, axis=0).repeat(3, axis=1), first)
    assert stored(tmp_path / "v.gif").shape == (4, 48, 48, 3)

#----------------------------------------------------------------------------
# Classes and mistakes.

def test_lists_of_classes():
    names = ["tench, Tinca tinca", "cat", "dog", "tench"]
    assert find_classes("cat,tench, Tinca tinca,dog", names, 4) == [1, 0, 2]
    assert find_classes("tench,dog,3,0-2", names, 4) == [3, 2, 3, 0, 1, 2]
    assert find_classes("1, 0", None, 3) == [1, 0]
    assert find_classes("5-6", ["4", "5", "6"], 3) == [1, 2]
    for value in ("cat,", "", "3-9", "2-1", "0-999999999", "cow"):
        with pytest.raises(UserError, match="no class of this name"):
            find_classes(value, names, 4)
    with pytest.raises(UserError, match="unconditional"):
        find_classes("cat", ["cat"], 0)


@pytest.mark.parametrize(("args", "message"), [
    (["--grid=3"], "is not columns x rows such as 4x3"), (["--grid=0x2"], "is not columns x rows"),
    (["--grid=2x2"], "--grid=2x2: shows 4 pictures side by side, and 3 seeds, latents or classes are no multiple of "
                     "this: give 1 more, or --num-keyframes"),
    (["--grid=2x2", "--mix-layers=1"], None),
    (["--grid=3x2", "--mix-layers=1"], "shows 5 sources"),
    (["--mix-layers=99", "--grid=1x2"], "--mix-layers: the network has the layers 0 to"),
    (["--output=v.avi"], "v.avi: no video format has the suffix .avi: name a file that ends with .mp4, .webp, .gif"),
    (["--output=v.png"], "or a folder for PNG frames, with a slash at its end"),
    (["--class=7"], "--class=7: no class of this name"), (["--class=cat,cow"], "--class=cow: no class"),
    (["--class=cat,dog"], "2 classes for 3 keyframes: give one for all, one for each, or a number"),
    (["--trunc=1", "--sweep-trunc=0,1"], "leave one of the two out"),
    (["--w=none.npz"], "none.npz"), (["--w=none.npz", "--interp=z"], "have no z"),
    (["--output=v.gif", "--fps=60"], "players show gif with at most 50"), (["--fps=0"], "--fps"),
    (["--zoom=64", "--num-keyframes=1", "--grid=9x1"], "at most 8192 on a side"),
    (["--num-keyframes=2000000000"], "at most 1048576 are taken of this network"),
    (["--first-frame=x.jpg"], "name one that ends with .png"), (["--sweep-translate=1e30,0"], "-1000<=x<=1000"),
    (["--w-frames=2000000000"], "at most 1000000 are made"),
    (["--output=full/"], "this folder is not empty"), (["--output=file/v.mp4"], "--output=file/v.mp4"),
    (["--output=file/"], "--output=file/: File exists"), (["--first-frame=file/x.png"], "--first-frame=file/x.png:"),
    (["--output=v/", "--first-frame=v/x.png"], "--first-frame=v/x.png: lies in the folder of --output"),
    (["--output=v.png/", "--first-frame=v.png"], "is the file of --first-frame=v.png, too"),
])
def test_mistakes(network, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    (tmp_path / "file").write_text("")
    output = [] if any(arg.startswith("--output") for arg in args) else ["--output=v.mp4"]
    w_frames = [] if "--w-frames=2000000000" in args else ["--w-frames=1"]
    result = invoke(f"--network={network}", "--seeds=0-2", *output, *w_frames, *args)
    if message is None:
        message = "shows 4 sources"
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("\u2502", "").split())
    assert {path.name for path in tmp_path.iterdir()} == {"full", "file"}


@pytest.mark.parametrize(("array", "message"), [
    (np.zeros([1, 1, 31]), "expected latents"), (np.zeros([0, 1, 32]), "expected latents"),
    (np.zeros([1, 5, 32]), "expected latents"), (np.zeros([1, 32]), "expected latents"),
    (np.full([1, 1, 32], np.nan), "no finite numbers"), (np.full([1, 1, 32], 1e39), "no finite numbers"),
    (np.zeros([1, 1, 32], complex), "no finite numbers"), (np.full([1, 1, 32], "x"), "no finite numbers"),
])
def test_latents_that_do_not_fit(tmp_path, array, message):
    np.savez(tmp_path / "w.npz", w=array)
    with pytest.raises(UserError, match=message):
        load_latents(str(tmp_path / "w.npz"), 7, 32)


def test_files_that_are_no_latents(network, tmp_path):
    np.savez(tmp_path / "v.npz", v=np.zeros([1, 1, 32]))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.npy").write_text("no array")
    for name, message in (("v.npz", "has no array named w"), ("text.npz", "not readable"),
                          ("text.npy", "not readable")):
        with pytest.raises(UserError, match=message):
            load_latents(str(tmp_path / name), 7, 32)
    np.savez(tmp_path / "w.npz", w=np.zeros([1, 1, 32]))
    result = invoke(f"--network={network}", f"--w={tmp_path / 'w.npz'}", "--trunc=0.5", f"--output={tmp_path / 'out'}")
    assert result.exit_code == 2
    assert "needs the mean of their class: give --class, or --trunc=1" in result.output


def test_nothing_to_show(network, tmp_path):
    result = invoke(f"--network={network}", f"--output={tmp_path / 'out'}")
    assert result.exit_code == 2
    assert "give --seeds, or latents in files with --w" in result.output
