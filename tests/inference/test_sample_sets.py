"""Sets of images: which classes come how often, and folders, arrays, sheets and grids of one and the same images."""
import dataclasses
import math

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import gen_images
import gen_video
from dnnlib import UserError
from inference.image_inputs import open_images
from inference.sample_files import NAME_WIDTH, SHEET_PIXELS, Sheet, class_numbers, folder_names, write_npz
from inference.samples import Samples, class_shares, drawn_classes, each_class
from inference.sampling import seed_label, seed_latent
from legacy import load_network
from tests.conftest import write_dataset
from tests.inference import commands
from torch_utils import checkpoint

CELL = 64                   # Images of 16 pixels, four times as large.


def invoke(*args):
    return commands.invoke(gen_images.main, *args)


def made(*args) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.output


def pixels(path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def by_class(network, tmp_path_factory):
    """Folder with the images of the seeds 0 to 3 of two classes."""
    out = tmp_path_factory.mktemp("out")
    said = made(f"--network={network}", "--seeds=0-3", "--class=owl,0", f"--outdir={out}")
    assert "--class=owl,0: owl, cat" in said
    assert "8 images in a folder per class" in said
    return out


def image(by_class, name: str, seed: int) -> np.ndarray:
    return pixels(by_class / name / f"seed{seed:04d}.png")

#----------------------------------------------------------------------------
# A picture depends on its seed and class alone: whatever else a call asks for, its bytes are the same.

def test_folders_are_classes_for_those_who_read_them(by_class):
    source = open_images(by_class, labels=True)
    assert source.description["class_names"] == ["cat", "owl"]
    assert source.labels.tolist() == [0] * 4 + [1] * 4


def test_a_single_class_gives_the_same_bytes(network, by_class, tmp_path):
    made(f"--network={network}", "--seeds=3,1", "--class=owl", f"--outdir={tmp_path}")
    for seed in (1, 3):
        name = f"seed{seed:04d}.png"
        assert (tmp_path / name).read_bytes() == (by_class / "owl" / name).read_bytes()


def test_arrays_hold_the_same_bytes(network, by_class, tmp_path):
    for name in ("a.npz", "b.npz"):
        said = made(f"--network={network}", "--seeds=2,0", "--class=dog,cat,owl", f"--npz={tmp_path / name}")
    assert f"{tmp_path / 'b.npz'}: 6 images" in said
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["arr_0"].dtype == np.uint8
        assert arrays["arr_1"].tolist() == [1, 0, 2, 1, 0, 2]
        for i, (name, seed) in {1: ("cat", 2), 2: ("owl", 2), 4: ("cat", 0), 5: ("owl", 0)}.items():
            assert np.array_equal(arrays["arr_0"][i], image(by_class, name, seed))


def test_calc_metrics_reads_the_arrays(network, tmp_path):
    made(f"--network={network}", "--seeds=0-3", "--labels=balanced", f"--npz={tmp_path / 'a.npz'}")
    source = open_images(tmp_path / "a.npz", labels=True)
    batch, labels = next(source.batches(8))
    assert labels.tolist() == [0, 1, 2, 0]
    with np.load(tmp_path / "a.npz") as arrays:
        assert np.array_equal(batch.numpy(), arrays["arr_0"].transpose(0, 3, 1, 2))
    assert not source.description["labels_sorted"]


def test_sheets_and_grids_show_the_same_bytes(network, by_class, tmp_path):
    made(f"--network={network}", "--seeds=1,2", "--classes=cat,owl", "--grid-width=5", f"--sheet={tmp_path / 's.png'}")
    made(f"--network={network}", "--seeds=1,2", "--class=cat,owl", "--grid=3x2", f"--sheet={tmp_path / 'g.png'}")
    sheet, grid = pixels(tmp_path / "s.png"), pixels(tmp_path / "g.png")
    width = NAME_WIDTH + 2 * CELL
    assert sheet.shape == (CELL, 2 * width, 3)          # Two classes of two samples in a row of five: four of them.
    assert grid.shape == (2 * CELL, 3 * CELL, 3)
    for i, (name, seed) in enumerate((("cat", 1), ("cat", 2), ("owl", 1), ("owl", 2))):
        expected = image(by_class, name, seed)
        x = i // 2 * width + NAME_WIDTH + i % 2 * CELL
        assert np.array_equal(sheet[:: 4, x : x + CELL : 4], expected)
        y, x = i // 3 * CELL, i % 3 * CELL
        assert np.array_equal(grid[y : y + CELL : 4, x : x + CELL : 4], expected)
    assert (grid[CELL:, CELL:] == 255).all()            # Two places stay empty.


def test_the_official_sheet(network, tmp_path):
    """Four samples from seed 42 on, unless something else is said."""
    made(f"--network={network}", f"--sheet={tmp_path / 'a.png'}", "--batch-gpu=1")
    made(f"--network={network}", "--seeds=42-45", f"--sheet={tmp_path / 'b.png'}")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    said = made(f"--network={network}", f"--sheet={tmp_path / 'c.png'}", "--samples-per-class=1", "--seed=43",
                "--grid-width=32")
    assert "3 class(es) of 1 samples, 3 in a row" in said
    a, c = pixels(tmp_path / "a.png"), pixels(tmp_path / "c.png")
    assert np.array_equal(c[:, NAME_WIDTH : NAME_WIDTH + CELL], a[:CELL, NAME_WIDTH + CELL : NAME_WIDTH + 2 * CELL])


@pytest.mark.parametrize("names", [(), ["a", "b", "c"]])
def test_the_largest_sheet(names):
    """What is allowed is opened by Pillow without a warning, names included, and one image more is refused."""
    sheet = Sheet(64, 1, 3, 2, names)
    largest, larger = (dataclasses.replace(sheet, per_group=sheet.most_per_group + more) for more in (0, 1))
    assert math.prod(largest.size) <= SHEET_PIXELS < math.prod(larger.size)
    assert not largest.is_too_large
    assert larger.is_too_large
    assert SHEET_PIXELS < PIL.Image.MAX_IMAGE_PIXELS
    image = np.full([64, 64, 3], 7, np.uint8)
    assert sheet.draw([image] * 3).size == sheet.size
    assert dataclasses.replace(sheet, groups=10 ** 9).most_per_group == 0


def test_no_class_is_folded_over_two_rows():
    sheet = Sheet(64, per_group=4, groups=7, groups_per_row=10 // 4)
    assert (sheet.columns, sheet.rows) == (2, 4)
    pictures = [np.full([64, 64, 3], i, np.uint8) for i in range(28)]
    drawn = np.asarray(sheet.draw(pictures))[::64, ::64, 0]
    assert drawn[:3].tolist() == [[8 * row + i for i in range(8)] for row in range(3)]
    assert drawn[3].tolist() == [24, 25, 26, 27, 255, 255, 255, 255]

def test_given_latents_give_the_same_bytes(network, by_class, tmp_path):
    """w of the seeds of a class, as they are, to all places."""
    G = load_network(network).G_ema
    w = G.mapping(torch.stack([seed_latent(s, 64) for s in (1, 3)]), torch.eye(3)[[2, 2]])
    np.save(tmp_path / "w.npy", w.numpy())
    for output in ("--outdir={}", "--npz={}/a.npz", "--sheet={}/g.png --grid=2x1"):
        made(f"--network={network}", f"--w={tmp_path / 'w.npy'}", *output.format(tmp_path).split())
    grid = pixels(tmp_path / "g.png")[::4, ::4]
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays.files == ["arr_0"]
        for i, seed in enumerate((1, 3)):
            single = pixels(tmp_path / f"w000{i}.png")
            assert np.abs(single.astype(int) - image(by_class, "owl", seed)).max() <= 1    # Mapped as a batch of two.
            assert np.array_equal(arrays["arr_0"][i], single)
            assert np.array_equal(grid[:, 16 * i : 16 * i + 16], single)

#----------------------------------------------------------------------------
# Classes.

def test_balanced_classes_take_turns_whatever_the_seeds_are():
    for seeds in (range(30), range(0, 300, 10), [7, 2 ** 64 - 1, 3]):
        counts = np.bincount(drawn_classes(list(seeds), 10, "balanced").labels, minlength=10)
        assert counts.max() - counts.min() <= 1


def test_uniform_is_the_official_draw():
    assert drawn_classes([5, 9], 10, "uniform").labels == [seed_label(5, 10), seed_label(9, 10)]
    assert drawn_classes([5, 9], 0, "uniform").labels == [0, 0]


def test_shares_of_the_data():
    """A class comes as often as in the data, and that of a seed is a function of the seed."""
    shares, note = class_shares("--data=x", np.array([0, 0, 0, 1]), ["owl", "cat"], "the network",
                                ["cat", "dog", "owl"], 3)
    assert shares.tolist() == [0.25, 0, 0.75]
    assert note is None
    seeds = list(range(2000))
    labels = drawn_classes(seeds, 3, "dataset", shares).labels
    found = np.bincount(labels, minlength=3) / len(labels)
    assert found[1] == 0
    assert abs(found[0] - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert drawn_classes(seeds[100:], 3, "dataset", shares).labels == labels[100:]
    assert drawn_classes([2 ** 64 - 1], 3, "dataset", shares).labels[0] in (0, 2)


def test_labels_of_a_data_set(network, tmp_path):
    data = write_dataset(tmp_path / "d.zip", 16, 8, 2, classes=["owl", "dog"])
    made(f"--network={network}", "--seeds=0-7", "--labels=dataset", f"--data={data}", f"--npz={tmp_path / 'a.npz'}")
    with np.load(tmp_path / "a.npz") as arrays:
        assert set(arrays["arr_1"].tolist()) == {1, 2}


def test_order_of_seeds_and_classes():
    assert each_class([5, 6], [1, 0]) == Samples([5, 5, 6, 6], [1, 0, 1, 0])
    assert each_class([5, 6], [1, 0], by_class=True) == Samples([5, 6, 5, 6], [1, 1, 0, 0])


@pytest.mark.parametrize("names", [
    ["a/b", "c"], ["..", "c"], [".hidden", "c"], ["Cat", "cat"], ["train", "test"], ["a.", "c"], ["c", ""],
    ["a\nb", "c"], ["x" * 300, "c"], ["caf\u00e9", "cafe\u0301"], ["a:b", "c"]])
def test_names_that_are_no_good_for_folders(names):
    assert folder_names(names, 2) == ["0", "1"]


def test_names_that_are_good_for_folders():
    assert folder_names(["tench, Tinca tinca", "bullet train", "cafe\u0301"], 3) == [
        "tench, Tinca tinca", "bullet train", "caf\u00e9"]
    assert folder_names(None, 2) == ["0", "1"]


def test_numbers_that_are_names_stand_for_classes():
    assert class_numbers(["4", "05", "6.0"], 3) == [4, 5, 6]
    assert class_numbers(["cat", "7"], 2) == [0, 1]
    assert class_numbers(None, 2) == [0, 1]
    assert class_numbers(None, 0) == []

#----------------------------------------------------------------------------
# Files.

def test_arrays_appear_whole(tmp_path):
    """An error between two images leaves the old file as it was, and nothing else."""
    (tmp_path / "a.npz").write_text("old")

    def images():
        yield np.zeros([4, 4, 3], np.uint8)
        raise UserError("diverged")

    with pytest.raises(UserError):
        write_npz(tmp_path / "a.npz", Samples([0, 1], [0, 0]), images(), 4)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert (tmp_path / "a.npz").read_text() == "old"


def test_arrays_that_the_disk_cannot_hold_are_refused_before_anything_is_made(tmp_path):
    with pytest.raises(UserError, match=r"a.npz: 1000000 images of 1000000 pixels take .* GiB, and .* are free there"):
        write_npz(tmp_path / "a.npz", Samples([0] * 10 ** 6, [0] * 10 ** 6), iter([]), 10 ** 6)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("output", ["--npz={out}", "--sheet={out}", "--sheet={out}/a.png"])
def test_places_that_cannot_be_written_show_before_anything_is_made(network, tmp_path, monkeypatch, output):
    monkeypatch.setattr(gen_images, "sample_images", lambda *args: iter(pytest.fail, 0))
    out = tmp_path / "out"
    if output.endswith("out}"):
        out.mkdir()
    else:
        out.write_text("")
    result = invoke(f"--network={network}", "--seeds=0", output.format(out=out))
    assert result.exit_code == 2
    assert str(out) in result.output


def test_arrays_without_classes(tmp_path):
    write_npz(tmp_path / "a.npz", Samples([0], [0]), [np.full([4, 4, 3], 7, np.uint8)[:, ::-1]], 4)
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays.files == ["arr_0"]
        assert (arrays["arr_0"] == 7).all()

#----------------------------------------------------------------------------
# Mistakes: one line, exit code 2, nothing written.

@pytest.mark.parametrize(("args", "message"), [
    (["--outdir={out}"], "give --seeds, such as --seeds=0-9"),
    (["--seeds=0", "--outdir={out}", "--npz={out}/a.npz"], "one of the three"),
    (["--seeds=0", "--outdir={out}", "--grid=2x2"], "--grid=2x2: is the form of a picture: name its file by --sheet"),
    (["--seeds=0-4", "--sheet={out}/a.png", "--grid=2x2"], "has room for 4 images, and 5 are asked for"),
    (["--seeds=0", "--sheet={out}/a.png", "--grid=9999x9999"], "more than fit into one picture: give at most 16384"),
    (["--seeds=0", "--outdir={out}", "--grid-width=4"], "--grid-width=4: belongs to a --sheet of classes"),
    (["--seeds=0", "--sheet={out}/a.png", "--seed=4"], "leave --seed and --samples-per-class out"),
    (["--sheet={out}/a.png", "--seed=18446744073709551615"], "end at 18446744073709551615: give fewer"),
    (["--sheet={out}/a.png", "--samples-per-class=5", "--grid-width=4"], "a row has no room for the 5 samples"),
    (["--seeds=0", "--outdir={out}", "--labels=balanced", "--class=cat"], "leave one of the two out"),
    (["--seeds=0", "--sheet={out}/a.png", "--labels=balanced"], "a sheet has every class"),
    (["--seeds=0", "--outdir={out}", "--labels=dataset"], "needs a data set with labels: name it by --data"),
    (["--seeds=0", "--outdir={out}", "--data=x.zip"], "has no effect without --labels=dataset"),
    (["--seeds=0", "--outdir={out}", "--split=val"], "has no effect without --data"),
    (["--seeds=0", "--outdir={out}", "--class=cat,cow"], "--class=cow: no class of this name"),
    (["--seeds=0", "--w=x.npy", "--outdir={out}"], "--w: its latents are used as they are, and --seeds would"),
    (["--w=x.npy", "--sheet={out}/a.png"], "the latents of --w have none: give --grid, too"),
    (["--w=x.npy", "--outdir={out}", "--trunc=0.5", "--class=cat"], "and --class, --trunc would change nothing"),
    (["--w=x.npy", "--outdir={out}"], "--w=x.npy: No such file"),
    (["--w=x.npy", "--npz=./x.npy"], "--npz=./x.npy: is the file of --w=x.npy, too, which would get lost"),
    (["--seeds=0", "--sheet={network}"], "--sheet={network}: is the file of --network={network}, too"),
    (["--seeds=0", "--outdir={network}/x"], "--outdir={network}/x: Not a directory"),
    (["--seeds=0-499999", "--outdir={out}", "--class=0-2"], "are 1500000 images, at most 1000000"),
    (["--seeds=0", "--npz={out}/a.npz", "--labels=dataset", "--data={out}.zip"], "no such folder, archive"),
])
def test_mistakes(network, tmp_path, args, message):
    out = tmp_path / "out"
    result = invoke(f"--network={network}", *(arg.format(out=out, network=network) for arg in args))
    assert result.exit_code == 2, result.output
    assert message.format(network=network) in result.output
    assert not out.exists()


def test_data_without_labels_or_with_other_classes(network, tmp_path):
    for name, classes, message in (("a", 0, "a.zip: has no labels: name a data set"), ("b", 4, "none called 3")):
        data = write_dataset(tmp_path / f"{name}.zip", 16, 4, classes)
        result = invoke(f"--network={network}", "--seeds=0", "--labels=dataset", f"--data={data}",
                        f"--npz={tmp_path}/out.npz")
        assert result.exit_code == 2
        assert message in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]


@pytest.mark.parametrize(("args", "note"), [
    (["--seeds=0", "--centroids-path={out}/c.npy"], "c.npy has no effect"),
    (["--w={out}/w.npz"], "w.npz: its latents are of a network with another mapping"),
])
def test_what_changes_nothing_or_may_mislead_is_told(network, tmp_path, args, note):
    np.save(tmp_path / "c.npy", np.zeros([1, 32], np.float32))
    np.savez(tmp_path / "w.npz", w=np.zeros([1, 1, 32], np.float32), mapping_sha256="0" * 64)
    given = [f"--network={network}", "--device=cpu", *(arg.format(out=tmp_path) for arg in args)]
    for command, more in ((gen_images.main, [f"--outdir={tmp_path}"]),
                          (gen_video.main, [f"--output={tmp_path}/frames/", "--w-frames=1"])):
        result = CliRunner().invoke(command, given + more)
        assert result.exit_code == 0, result.output
        assert f"NOTE: {given[-1].partition('=')[0]}" in result.output
        assert note in result.output


def test_names_of_others_do_not_move_the_cursor(network, tmp_path):
    snapshot = checkpoint.load_plain(network)
    checkpoint.save(tmp_path / "n.pkl", snapshot | {"class_names": ["\x1b[2Jcat", "dog", "owl"]})
    for classes in ("0", "0,1"):
        result = CliRunner().invoke(gen_images.main, [f"--network={tmp_path}/n.pkl", "--seeds=0", "--device=cpu",
                                                      f"--class={classes}", f"--outdir={tmp_path}"], color=True)
        assert "\\x1b[2Jcat" in result.output
        assert "\x1b" not in result.output
