"""Directions of w: how they are found, what a unit is, their files, and pictures that are moved along them."""
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import directions
import gen_images
import gen_video
import run_inversion
from dnnlib import UserError
from inference.directions import labelled
from inference.directions.axes import components, deviations, factorised, principal_axes
from inference.directions.edits import edit_offset, find_offset
from inference.directions.files import Directions, fit_directions, read_directions, save_directions
from inference.directions.methods import class_changes, joined, pca, sefa, style_weights
from inference.inversion import start as inversion_start
from inference.keyframes import Timing
from inference.latents import mapping_sha256
from inference.motion import Motion, Sweep, make_keyframes
from inference.sampling import class_means, many_w, map_latents
from legacy import load_network
from tests.closeness import max_error
from tests.inference.commands import invoke, made
from training.generator.layer_schedule import stem_config
from training.generator.synthesis import Offset, synthesize, synthesize_ws
from training.networks_stylegan3 import Generator


def pixels(path) -> np.ndarray:
    with PIL.Image.open(path) as image:
        return np.asarray(image).astype(int)


def command(name: str):
    return directions.main.commands[name]


@pytest.fixture(scope="module")
def G(network):
    return load_network(network).G_ema


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    """Three components of w, which move the layers 2 and 3."""
    path = tmp_path_factory.mktemp("directions") / "pca.npz"
    made(command("pca"), f"--network={network}", "--num=3", "--samples=300", "--layers=2,3", f"--dest={path}")
    return path

#----------------------------------------------------------------------------
# Axes.

def rotation(size: int) -> np.ndarray:
    return np.linalg.qr(np.random.RandomState(0).randn(size, size))[0]


@pytest.mark.numeric
def test_factorisation_finds_what_a_known_matrix_is_made_of():
    """A = U S V^T: the axes are the rows of V^T, by S^2, and the largest component of each is positive."""
    U, V, S = rotation(9)[:, :4], rotation(4), np.array([1.0, 5.0, 3.0, 0.5])
    found = factorised((U * S) @ V.T, 3)
    for axis, k in zip(found.vectors, (1, 2, 0), strict=True):
        assert abs(axis @ V[:, k]) == pytest.approx(1, abs=1e-12)
        assert axis[np.abs(axis).argmax()] > 0
    assert max_error(found.shares, np.array([25, 9, 1]) / (S ** 2).sum()) < 1e-12


@pytest.mark.numeric
def test_the_sign_does_not_depend_on_what_the_library_returns():
    matrix = np.diag([1.0, 4.0])
    for flip in (np.diag([1.0, -1.0]), np.diag([-1.0, 1.0])):
        assert max_error(principal_axes(flip @ matrix @ flip, 2).vectors, [[0, 1], [1, 0]]) == 0


@pytest.mark.numeric
def test_components_of_a_known_gaussian():
    """w = mean + V S x: the axes are the columns of V by S, as far as a sample tells."""
    V, S = rotation(5), np.array([0.1, 4.0, 0.5, 2.0, 1.0])
    w = 7 + np.random.RandomState(1).randn(20000, 5) * S @ V.T
    found = components(w, 3)
    for axis, k in zip(found.vectors, (1, 3, 4), strict=True):
        assert abs(axis @ V[:, k]) > 0.999
    assert max_error(deviations(found.vectors, w), [4, 2, 1]) < 0.05
    assert max_error(found.shares, np.array([16, 4, 1]) / (S ** 2).sum()) < 0.02


@pytest.mark.numeric
def test_components_are_those_of_scikit_learn():
    from sklearn.decomposition import PCA
    w = np.random.RandomState(0).randn(50, 6) @ np.random.RandomState(1).randn(6, 6) + 3
    found, expected = components(w, 4), PCA(4).fit(w)
    assert max_error(np.abs(np.sum(found.vectors * expected.components_, axis=1)), np.ones(4)) < 1e-12
    assert max_error(found.shares, expected.explained_variance_ratio_) < 1e-12
    assert max_error(deviations(found.vectors, w) ** 2, expected.explained_variance_) < 1e-10


def test_axes_without_spread_are_refused():
    w = np.random.RandomState(0).randn(20, 3)
    w[:, 2] = 100
    with pytest.raises(UserError, match="does not vary along 1 of 3 directions.*at most 2 by --num"):
        deviations(np.eye(3), w)
    with pytest.raises(UserError, match="trained further"):
        deviations(np.eye(3)[2:], w)

#----------------------------------------------------------------------------
# Directions of a network.

@pytest.mark.numeric
def test_styles_change_by_the_weights(G):
    """`style_weights` is the matrix that belongs to the affine layers, up to a common factor."""
    layers = [0, 2, G.num_ws - 1]
    affines = [G.synthesis.input.affine, *(getattr(G.synthesis, G.synthesis.layer_names[i - 1]).affine
                                           for i in layers[1:])]
    first, second = torch.randn(2, 1, G.w_dim, generator=torch.Generator().manual_seed(0))
    change = torch.cat([affine(first) - affine(second) for affine in affines], dim=1)[0]
    expected = style_weights(G, layers) @ (first - second)[0].double().numpy() / G.w_dim ** 0.5
    assert max_error(change.numpy(), expected) < 1e-4


@pytest.mark.numeric
def test_a_unit_is_a_standard_deviation(G):
    w, labels = many_w(G, 200, [0, 1, 2], 0, "test")
    assert np.bincount(labels).tolist() == [67, 67, 66]
    for found in (sefa(G, w, 3, [1, 4]), pca(G, w, 3, [1, 4]), class_changes(G, w, [0], [1, 2], ["a", "b", "c"], [1])):
        vectors = found.vectors.double().numpy()
        lengths = np.linalg.norm(vectors, axis=1)
        assert max_error(np.std(w @ vectors.T / lengths, axis=0, ddof=1) / lengths, np.ones(len(found))) < 1e-5
    assert found.layers.nonzero()[:, 1].tolist() == [1, 1]


@pytest.mark.numeric
def test_changes_of_classes(G):
    """A change goes along the difference of the means, and its note says where the other one lies."""
    w, names, means = many_w(G, 50, [0, 1, 2], 0, "test")[0], ["cat", "dog", "owl"], class_means(G, torch.arange(3))
    found = class_changes(G, w, [0, 2], [1, 2], names, range(G.num_ws))
    assert found.names == ["cat-to-dog", "cat-to-owl", "owl-to-dog"]
    for name, note, vector in zip(found.names, found.notes, found.vectors, strict=True):
        first, second = (means[names.index(part)] for part in name.split("-to-"))
        strength = float(note.rpartition(" ")[2])
        assert max_error(first + strength * vector, second) < 0.01 * float(vector.norm())
    found = class_changes(G, w, None, [1], names, range(G.num_ws))
    assert found.names == ["all-to-dog"]
    assert torch.cosine_similarity(found.vectors[0], means[1] - means.mean(dim=0), dim=0) == pytest.approx(1, abs=1e-6)

#----------------------------------------------------------------------------
# Files.

def test_a_file_has_all_that_makes_it_again(network, file, G, tmp_path):
    found = read_directions(str(file))
    assert found.names == ["pca0", "pca1", "pca2"]
    assert found.layers.sum(dim=0).nonzero().flatten().tolist() == [2, 3]
    with np.load(file, allow_pickle=False) as arrays:
        options = json.loads(str(arrays["options"]))
        assert (str(arrays["method"]), options["samples"], options["layers"]) == ("pca", 300, [2, 3])
        assert str(arrays["network_sha256"]) == load_network(network).sha256
    again = tmp_path / "again.npz"
    made(command("pca"), f"--network={network}", "--num=3", "--samples=300", "--layers=2,3", f"--dest={again}")
    assert torch.equal(read_directions(str(again)).vectors, found.vectors)
    assert "pca1  " in CliRunner().invoke(command("list"), [str(file)]).output


def small(num_ws: int = 4, w_dim: int = 6, **changes) -> Directions:
    layers = torch.zeros(2, num_ws, dtype=torch.bool)
    layers[0], layers[1, 1] = True, True
    return Directions(["a", "b:c"], torch.arange(2.0 * w_dim).reshape(2, w_dim), layers, ["", "x"], **changes)


def test_other_networks(G):
    """All layers stay all layers, others keep their numbers; another width is refused, another mapping is told."""
    own = mapping_sha256(G)
    fitted, note = fit_directions(small(G.num_ws - 1, G.w_dim, mapping_sha256=own), G)
    assert note is None
    assert fitted.layers[0].all()
    assert fitted.layers[1].nonzero().flatten().tolist() == [1]
    assert fit_directions(small(G.num_ws, G.w_dim, mapping_sha256="0", where="--directions=x"), G)[1].startswith(
        "--directions=x: was made of a network with another mapping")
    with pytest.raises(UserError, match="is for networks whose w has 6 values, and this one's has 32"):
        fit_directions(small(G.num_ws, 6), G)
    last = small(G.num_ws + 2, G.w_dim)
    last.layers[1] = torch.arange(G.num_ws + 2) > G.num_ws
    with pytest.raises(UserError, match="the edit b:c: moves no layer of this network"):
        find_offset([fit_directions(last, G)[0]], "b:c")


def test_a_stage_has_the_mapping_of_its_stem():
    torch.manual_seed(0)
    stem = Generator(stem_config(16, 4, 128, 8, margin_size=4, w_dim=8, z_dim=4))
    larger = Generator(stem_config(32, 5, 128, 8, margin_size=4, w_dim=8, z_dim=4))
    assert mapping_sha256(stem) != mapping_sha256(larger)
    larger.mapping.load_state_dict(stem.mapping.state_dict())
    larger.mapping.w_avg.normal_()          # It goes on moving.
    assert mapping_sha256(stem) == mapping_sha256(larger)


def test_what_is_written_is_read(G, tmp_path):
    path = str(tmp_path / "d.npz")
    save_directions(path, small(G.num_ws, G.w_dim), G, {"options": {"a": None}})
    found = read_directions(path)
    assert (found.names, found.notes, found.mapping_sha256) == (["a", "b:c"], ["", "x"], mapping_sha256(G))
    assert torch.equal(found.vectors, small(G.num_ws, G.w_dim).vectors)


def damaged(tmp_path, **changes) -> str:
    arrays = {"format": np.array("stylesan-xl directions 1"), "names": np.array(["a", "b"]),
              "vectors": np.ones([2, 3], np.float32), "layers": np.ones([2, 4], bool),
              "notes": np.array(["", ""]), "mapping_sha256": np.array("0"), **changes}
    path = tmp_path / "damaged.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return str(path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"vectors": None}, "has no array named vectors"),
    ({"format": np.array("x")}, "its format is 'x' and not"),
    ({"names": np.array(["a", "a"])}, "come twice"),
    ({"names": np.array([1, 2])}, "names is no list of text"),
    ({"names": np.array([], dtype="U1")}, "names is no list of text"),
    ({"vectors": np.ones([3, 3])}, r"has 2 names, vectors \[3, 3\]"),
    ({"vectors": np.array([[1, 2, np.nan], [0, 0, 0]])}, "no finite numbers"),
    ({"vectors": np.full([2, 3], 1e30)}, "no finite numbers"),
    ({"vectors": np.ones([2, 3], complex)}, "other types"),
    ({"layers": np.ones([2, 4])}, "other types"),
    ({"layers": np.ones([2, 0], bool)}, "a network without layers"),
    ({"notes": np.array([""])}, "has 2 names"),
    ({"names": np.array(["a", None])}, "not readable as .npz"),
])
def test_damaged_files(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        read_directions(damaged(tmp_path, **changes))


def test_one_name_in_both_forms_of_unicode(network):
    """What is written can be read again, and is found however it is typed."""
    composed, apart = "\u00e9", "e\u0301"
    loaded = dataclasses.replace(load_network(network), class_names=[composed, apart, "b"])
    assert directions.Job("pca", {}, loaded).class_names == ["0", "1", "2"]
    one = Directions([apart], torch.ones(1, 3), torch.ones(1, 4, dtype=torch.bool), [""], where="--directions=a")
    with pytest.raises(UserError, match="--directions=a and --directions=b: both have a direction called"):
        joined([one, dataclasses.replace(one, names=[composed], where="--directions=b")])
    assert len(directions.chosen([one], [composed])) == 1


def test_lists_are_lines(tmp_path):
    path = damaged(tmp_path, names=np.array(["\x1b[2Ja\nb", "c"]), notes=np.array(["\x07", ""]))
    output = CliRunner().invoke(command("list"), [path], color=True).output
    assert output.splitlines()[1:] == ["  \\x1b[2Ja b  \\x07", "  c           "]


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(UserError, match="not readable as .npz"):
        read_directions(str(tmp_path / "x.npz"))

#----------------------------------------------------------------------------
# Edits.

@pytest.mark.numeric
def test_an_edit_adds_to_ws_after_truncation(G, file):
    edit = edit_offset([read_directions(str(file))], [("pca0", 2.0), ("pca2", -1.5), ("pca0", 1.0)])
    assert edit.styles is None
    vectors = read_directions(str(file)).vectors
    assert edit.ws.abs().sum(dim=1).nonzero().flatten().tolist() == [2, 3]
    assert max_error(edit.ws[3], 3 * vectors[0] - 1.5 * vectors[2]) < 1e-6
    z, labels = torch.randn(2, G.z_dim, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    w, mean = map_latents(G, z, labels), class_means(G, labels)
    ws = (mean + 0.5 * (w - mean)).unsqueeze(1) + edit.ws
    assert max_error(synthesize(G, z, labels, 0.5, edit=edit), synthesize_ws(G, ws)) < 1e-4


def test_given_latents_are_moved(network, G, file, tmp_path):
    w = np.random.RandomState(0).randn(1, G.num_ws, G.w_dim).astype(np.float32)
    np.save(tmp_path / "w.npy", w)
    np.save(tmp_path / "moved.npy", w + 2 * read_directions(str(file)).offset("pca1").ws.numpy())
    made(gen_images.main, f"--network={network}", f"--w={tmp_path / 'w.npy'}", f"--directions={file}",
         "--edit=pca1:2", f"--npz={tmp_path / 'a.npz'}")
    made(gen_images.main, f"--network={network}", f"--w={tmp_path / 'moved.npy'}", f"--npz={tmp_path / 'b.npz'}")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_edit_of_no_strength_changes_no_byte(network, file, tmp_path):
    common = (f"--network={network}", "--seeds=0-2", "--trunc=0.7")
    made(gen_images.main, *common, f"--npz={tmp_path / 'a.npz'}")
    made(gen_images.main, *common, f"--npz={tmp_path / 'b.npz'}", f"--directions={file}", "--edit=pca1:0")
    made(gen_images.main, *common, f"--npz={tmp_path / 'c.npz'}", f"--directions={file}", "--edit=pca1:9")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (tmp_path / "a.npz").read_bytes() != (tmp_path / "c.npz").read_bytes()


@pytest.mark.numeric
def test_edits_of_frames(G):
    keys, edits = make_keyframes(G, [0, 1], [0, 1], 2), torch.randn(2, G.num_ws, G.w_dim)
    timing = Timing(1, 4)
    plain = Motion(G, keys, timing, Sweep(psi=(0.6, 0.6)))
    moved = Motion(G, keys, timing, Sweep(psi=(0.6, 0.6), edits=(Offset(edits[0]), Offset(edits[1]))))
    for frame, share in ((0, 0), (1, 0.5), (2, 1), (3, 0.5)):
        expected = plain.frame_ws(frame) + edits[0] + share * (edits[1] - edits[0])
        assert max_error(moved.frame_ws(frame), expected) < 1e-5


def test_a_video_shows_the_pictures_of_its_edits(network, file, tmp_path):
    """The first frame and the farthest one are the pictures of gen_images with these strengths."""
    common = (f"--network={network}", f"--directions={file}", "--edit=pca0:1")
    made(gen_video.main, *common, "--sweep-edit=pca1:-2,3", "--seeds=3", "--class=owl", "--w-frames=2",
         f"--output={tmp_path / 'frames'}/")
    for frame, strength in enumerate((-2, 3)):
        out = tmp_path / str(frame)
        made(gen_images.main, *common, f"--edit=pca1:{strength}", "--seeds=3", "--class=owl", f"--outdir={out}")
        shown, expected = pixels(tmp_path / "frames" / f"frame{frame:06d}.png"), pixels(out / "seed0003.png")
        assert np.abs(shown - expected).max() <= 1


def test_a_sheet_has_a_row_for_each_direction(network, file, tmp_path):
    said = made(command("show"), f"--directions={file}", f"--network={network}", "--seed=3", "--class=owl", "--steps=3",
                "--strength=2", "--name=pca2", "--name=pca0", f"--sheet={tmp_path / 'a.png'}")
    assert "2 row(s), from -2 to 2" in said
    made(gen_images.main, f"--network={network}", "--seeds=3", "--class=owl", f"--outdir={tmp_path}",
         f"--directions={file}", "--edit=pca2:2")
    sheet, single = pixels(tmp_path / "a.png"), pixels(tmp_path / "seed0003.png")
    assert np.array_equal(sheet[64::4, -64::4], single)


def test_latents_of_two_files(network, G, tmp_path):
    w = np.random.RandomState(0).randn(5, G.num_ws, G.w_dim).astype(np.float32)
    np.savez(tmp_path / "plain.npz", w=w[:2])
    np.save(tmp_path / "smiling.npy", w[2:])
    said = made(command("folders"), f"--network={network}", f"--from={tmp_path / 'plain.npz'}", "--layers=1,2",
                f"--to={tmp_path / 'smiling.npy'}", "--samples=50", f"--dest={tmp_path / 'd.npz'}")
    assert "plain-to-smiling  one mean becomes the other at " in said
    way = torch.from_numpy(w[2:, 1:3].mean(axis=(0, 1)) - w[:2, 1:3].mean(axis=(0, 1)))
    found = read_directions(str(tmp_path / "d.npz"))
    assert torch.cosine_similarity(found.vectors[0], way, dim=0) == pytest.approx(1, abs=1e-6)


def test_pictures_of_two_folders(network, tmp_path, monkeypatch):
    """Their latents are those that run_inversion.py finds."""
    monkeypatch.setattr(inversion_start, "NUM_SAMPLES", 100)
    for module in (labelled, run_inversion):
        monkeypatch.setattr(module, "default_count", lambda classes, class_given: 8)
    rng = np.random.RandomState(0)
    for name in ("plain/a", "plain/b", "smiling/c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(rng.randint(0, 255, [20, 20, 3], dtype=np.uint8)).save(tmp_path / f"{name}.png")
    common, search = (f"--network={network}", "--seed=7"), ("--inv-steps=2", "--distance=pixels")
    folders = command("folders"), *common, "--samples=50"
    for name in ("plain", "smiling"):
        made(run_inversion.main, *common, *search, f"--target={tmp_path / name}", f"--outdir={tmp_path / 'out' / name}",
             "--save-video=0")
    latents = [f"--{option}={tmp_path / 'out' / name / 'projected_w.npz'}"
               for option, name in (("from", "plain"), ("to", "smiling"))]
    made(*folders, *latents, f"--dest={tmp_path / 'a.npz'}", "--name=smile")
    made(*folders, *search, f"--from={tmp_path / 'plain'}", f"--to={tmp_path / 'smiling'}", "--name=smile",
         f"--dest={tmp_path / 'b.npz'}")
    refused = invoke(command("folders"), f"--network={network}", f"--from={tmp_path / 'out' / 'plain'}",
                     f"--to={tmp_path / 'smiling'}", f"--dest={tmp_path / 'c.npz'}")
    assert refused.exit_code == 2
    assert "plain: is a folder of results, as it has a projected_w.npz: name that file" in refused.output
    assert directions.called(str(tmp_path / "out" / "plain" / "projected_w.npz")) == "plain"
    a, b = (read_directions(str(tmp_path / f"{name}.npz")) for name in "ab")
    assert a.names == b.names == ["smile"]
    assert max_error(a.vectors, b.vectors) < 1e-3 * float(a.vectors.norm())

#----------------------------------------------------------------------------
# Mistakes: one line, exit code 2, nothing written.

@pytest.mark.parametrize(("name", "args", "message"), [
    ("sefa", ["--num=99"], "--num=99: w has 32 values"),
    ("sefa", ["--layers=3-99"], "--layers: the network has the layers 0 to"),
    ("sefa", ["--class=cow"], "--class=cow: no class of this name"),
    ("pca", ["--num=5", "--samples=5"], "give at most 4"),
    ("pca", ["--samples=100000000"], "do not fit into 1 GiB: give at most"),
    ("pca", ["--dest=x.png"], "name one that ends with .npz"),
    ("pca", ["--name= "], "--name=' ': is blank"),
    ("classes", ["--from=cat", "--to=cat"], "--from=cat: is the class of --to"),
    ("classes", ["--to=7"], "--to=7: no class of this name"),
    ("classes", ["--from=7"], "--from=7: no class of this name"),
    ("folders", ["--from={out}", "--to=b.npy"], "--dest={out}: is the file of --from={out}, too"),
    ("folders", ["--from={out}.npy", "--to={out}.npy"], "No such file"),
    ("folders", ["--from={out}/a", "--to={out}.npy"], "--from={out}/a: no such file or folder"),
    ("folders", ["--from=a.npy", "--to=b.npy", "--inv-steps=1"], "there is nothing to search for"),
])
def test_mistakes(network, tmp_path, name, args, message):
    out = tmp_path / "out.npz"
    result = invoke(command(name), f"--network={network}", f"--dest={out}", *(arg.format(out=out) for arg in args))
    assert result.exit_code == 2, result.output
    assert message.format(out=out) in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("args", "message"), [
    (["--edit=pca0:1"], "needs the file that has this direction: name it by --directions"),
    (["--directions={file}"], "has no effect without --edit=NAME:STRENGTH"),
    (["--directions={file}", "--edit=smile:1"], "the edit smile: no direction of this name in --directions="),
    (["--directions={file},{file}", "--edit=pca0:1"], "both have this direction"),
    (["--directions={file}", "--edit=pca0"], "is not the name of a direction and a strength such as smile:1.5"),
    (["--directions={file}", "--edit=pca0:nan"], "not a finite number"),
    (["--directions={file}", "--edit=pca0:1e9"], "is not in the range"),
    (["--directions={file}", "--edit=:1"], "is not the name of a direction"),
    (["--directions={file}.none", "--edit=a:1"], "No such file"),
])
def test_mistakes_in_edits(network, file, tmp_path, args, message):
    for tool, more in ((gen_images.main, f"--outdir={tmp_path / 'out'}"), (gen_video.main, f"--output={tmp_path}/v/")):
        result = invoke(tool, f"--network={network}", "--seeds=0", more, *(arg.format(file=file) for arg in args))
        assert result.exit_code == 2, result.output
        assert message in result.output
    assert not list(tmp_path.iterdir())
