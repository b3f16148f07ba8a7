"""Directions of style space: the search with CLIP, their files, and pictures that are moved along them."""
import contextlib
import json
import math
import shlex
import sys

import numpy as np
import PIL.Image
import pytest
import safetensors.torch
import torch

import directions
import gen_images
import gen_video
import visualizer
from dnnlib import UserError
from inference.directions import clip as clip_module
from inference.directions.clip import find_weights, load_clip
from inference.directions.edits import edit_offset
from inference.directions.files import (
    Directions,
    fit_directions,
    mapping_sha256,
    read_directions,
    save_directions,
    style_space,
)
from inference.directions.text import (
    default_name,
    find_text_direction,
    given_steps,
    movable_layers,
    seed_steps,
    spherical_distances,
    split_prompts,
)
from inference.page.commands import command_line
from inference.page.scene import Controls, Mixing
from legacy import load_network
from tests import needs_cuda
from tests.closeness import max_error
from tests.inference.commands import invoke, made
from torch_utils.images import to_uint8_sample
from training.generator.layer_schedule import stem_config, superres_config
from training.generator.superres import load_stem_into
from training.generator.synthesis import Offset, combined, synthesize, synthesize_ws
from training.networks_stylegan3 import Generator

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
TINY = {"embed_dim": 8,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 4},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}}
PROMPTS = ["a smiling face", "a portrait"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory):
    """A network of open_clip that is called tiny and has no published weights."""
    path = tmp_path_factory.mktemp("clip") / "tiny.json"
    path.write_text(json.dumps(TINY))
    open_clip.add_model_config(path)


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return load_clip("tiny:random", None, CPU)


@pytest.fixture(scope="module")
def weights(clip, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    safetensors.torch.save_file(clip.encode_image.__self__.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def G(network):
    return load_network(network).G_ema


def style_directions(G, *names: str, layers=(1, 2), **changes) -> Directions:
    """Random directions that move some layers."""
    space, rng = style_space(G), torch.Generator().manual_seed(0)
    parts = [torch.randn(len(names), size, generator=rng) * (k in layers) for k, size in enumerate(space.sizes)]
    moved = torch.tensor([k in layers for k in range(G.num_ws)]).expand(len(names), -1)
    return Directions(list(names), torch.cat(parts, dim=1), moved, [""] * len(names), mapping_sha256(G), styles=space,
                      **changes)


@pytest.fixture(scope="module")
def file(G, tmp_path_factory):
    path = tmp_path_factory.mktemp("directions") / "styles.npz"
    save_directions(path, style_directions(G, "smile", "red: hair", layers=(0, 1, 2)), G, {})
    return path


text = directions.main.commands["text"]


@contextlib.contextmanager
def moved_affines(G, vector: torch.Tensor):
    """Add the parts of a point in style space to what the affine layers put out, from outside of the network."""
    layers = [G.synthesis.input, *(getattr(G.synthesis, name) for name in G.synthesis.layer_names)]
    parts = vector.split([len(layer.affine.bias) for layer in layers])
    handles = [layer.affine.register_forward_hook(lambda _module, _inputs, output, part=part: output + part)
               for layer, part in zip(layers, parts, strict=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

#----------------------------------------------------------------------------
# The search.

@pytest.mark.numeric
def test_the_distance_is_half_the_squared_angle():
    angles = torch.tensor([0.1, 1.0, 2.0, 3.0], dtype=torch.float64)
    x = torch.stack([angles.cos(), angles.sin(), 0 * angles], dim=1)
    y = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=torch.float64)
    expected = torch.stack([angles ** 2 / 2, torch.full_like(angles, (math.pi / 2) ** 2 / 2)], dim=1)
    assert max_error(spherical_distances(x, y), expected) < 1e-12


def written_out(G, clip, steps, layers) -> tuple[torch.Tensor, torch.Tensor]:
    """The search as it is published, one picture after the other; the direction before channels are dropped, and how
    often the sign of each channel's gradient has changed."""
    sizes = G.synthesis.style_sizes
    texts = clip.embed_texts(PROMPTS)
    allowed = torch.cat([torch.full([size], k in layers) for k, size in enumerate(sizes)])
    d, v = torch.zeros(2, sum(sizes), dtype=torch.float64)
    gradients = []
    for t, ws in enumerate(steps, start=1):
        point = d.clone().requires_grad_(True)
        with moved_affines(G, point):
            loss = 0
            for w in ws:
                image = G.synthesis(w[None].double())
                x = (image.clamp(-1, 1) + 1) / 2
                x = (x - torch.tensor(clip.mean)[:, None, None]) / torch.tensor(clip.std)[:, None, None]
                features = clip.encode_image(x)[0]
                cosines = texts @ (features / features.norm())
                loss = loss + (cosines.arccos() ** 2 / 2).sum()
            loss.backward()
        g = point.grad * allowed
        gradients.append(g)
        v = 0.999 * v + 0.001 * g ** 2
        d = d - 0.05 * 0.25 * d - 0.05 * g / ((v / (1 - 0.999 ** t)).sqrt() + 1e-8)
    signs = torch.stack(gradients).sign()
    return d, (signs[1:] != signs[:-1]).sum(dim=0)


@pytest.mark.numeric
def test_the_search_is_its_definition(G, weights):
    """In double precision, so that no gradient is so near zero that its sign is one of rounding."""
    G = load_double(G)
    clip = load_clip("tiny", str(weights), CPU)
    clip.encode_image.__self__.double()
    layers = [1, 2]
    steps = list(seed_steps(G, range(20), [i % 3 for i in range(20)], 0.7, 44))
    assert [len(ws) for ws in steps] == [8, 8, 8, 8, 8, 4]
    seen = []
    found = find_text_direction(G, clip, PROMPTS, steps, layers, batch_size=3, watch=seen.append)
    expected, changes = written_out(G, clip, steps, layers)
    dropped = changes > len(steps) / 4
    assert 0 < int(dropped[expected != 0].sum()) < int((expected != 0).sum())
    assert max_error(found.vector, expected * ~dropped) < 1e-5
    assert found.num_moved == int((expected * ~dropped).count_nonzero())
    assert found.num_looked_at == sum(G.synthesis.style_sizes[k] for k in layers)
    assert [step.distance for step in seen] == found.distances
    # Pictures that the search has not seen come nearer, too.
    (ws,) = seed_steps(G, range(100, 108), [0, 1, 2, 0, 1, 2, 0, 1], 0.7, 8)
    before, after = (spherical_distances(clip.embed_images(synthesize_ws(G, ws, styles=strength * found.vector)),
                                         clip.embed_texts(PROMPTS)).sum(dim=1) for strength in (0, 1))
    assert (after < before).all()


@pytest.mark.gpu
@needs_cuda
def test_the_search_on_a_gpu(G, weights):
    found = []
    for device in (CPU, torch.device("cuda", 0)):
        own, clip = load_double(G).to(device), load_clip("tiny", str(weights), device)
        clip.encode_image.__self__.double()
        found.append(find_text_direction(own, clip, PROMPTS, seed_steps(own, range(16), [0] * 16, 0.7, 16), [1, 2]))
    assert max_error(found[0].vector, found[1].vector) < 1e-4


def load_double(G):
    copy = Generator(G.config).double().eval().requires_grad_(False)
    copy.load_state_dict(G.state_dict())
    return copy


def test_pictures_of_steps(G):
    """Seeds are those of gen_images with their truncation, given latents are used as they are; both begin again."""
    (ws,) = seed_steps(G, [5, 6, 7], [0, 2, 1], 0.6, 4)
    again = next(seed_steps(G, [5], [0], 0.6, 1))
    assert max_error(ws[3:], again) < 1e-6
    z = torch.from_numpy(np.random.RandomState(6).randn(1, G.z_dim)).float()
    assert max_error(synthesize_ws(G, ws[1:2]), synthesize(G, z, torch.tensor([2]), 0.6)) < 1e-4
    given = torch.randn(3, G.num_ws, G.w_dim)
    first, second = given_steps(given, 10)
    assert torch.equal(torch.cat([first, second]), given[[0, 1, 2, 0, 1, 2, 0, 1, 2, 0]])


@pytest.mark.numeric
def test_clip_sees_what_a_file_would_hold(clip):
    """Values beyond the range are cut, and pictures come to the network's size and scale."""
    x = 3 * torch.rand(2, 3, 32, 32) - 1.5
    whole = clip.embed_images(x)
    assert max_error(whole.norm(dim=1), torch.ones(2)) < 1e-6
    assert torch.equal(whole, clip.embed_images(x.clamp(-1, 1)))
    flat = clip.embed_images(torch.full([1, 3, 64, 64], 0.5))
    mean, std = (torch.tensor(values)[:, None, None] for values in (clip.mean, clip.std))
    assert max_error(flat, clip.encode_image(((0.75 - mean) / std).expand(1, 3, 16, 16), normalize=True)) < 1e-5


def test_prompts_and_names():
    assert split_prompts(" a smile| red hair ") == ["a smile", "red hair"]
    with pytest.raises(UserError, match="--prompt=a || b: has an empty text"):
        split_prompts("a || b")
    assert default_name("A smiling face | a portrait!") == "A-smiling-face-a-portrait"
    assert default_name("?!") == "text"


def test_layers_that_are_moved(G):
    """L0 to L4, of which the last three are critically sampled."""
    assert G.num_ws == 6
    assert movable_layers(G) == [1, 2]
    assert movable_layers(G, [2, 0, 2]) == [2, 0]
    with pytest.raises(UserError, match="those from 3 on are critically sampled"):
        movable_layers(G, [2, 3])


def test_a_search_that_ends_nowhere(G, clip):
    """No layer may be moved; or the pictures are none."""
    (ws,) = seed_steps(G, [0], [0], 1, 1)
    with pytest.raises(UserError, match="no direction is left"):
        find_text_direction(G, clip, PROMPTS, [ws], [])
    with pytest.raises(UserError, match="after 1 steps the direction is not finite"):
        find_text_direction(G, clip, PROMPTS, [ws * torch.nan], [1])

#----------------------------------------------------------------------------
# Edits.

@pytest.mark.numeric
@pytest.mark.parametrize("layers", [(0,), (1, 2), range(6)])
def test_an_edit_adds_to_what_the_affine_layers_make(G, layers):
    vector = style_directions(G, "a", layers=layers).vectors[0]
    edit = edit_offset([style_directions(G, "a", layers=layers)], [("a", 1.5), ("a", -0.5)])
    assert edit.ws is None
    ws = torch.randn(2, G.num_ws, G.w_dim, generator=torch.Generator().manual_seed(1))
    plain, moved = synthesize_ws(G, ws), synthesize_ws(G, ws, styles=edit.styles)
    with moved_affines(G, vector):
        expected = synthesize_ws(G, ws)
    assert max_error(moved, expected) < 1e-4
    assert max_error(plain, expected) > 0.01
    each = synthesize_ws(G, ws, styles=torch.stack([vector, 0 * vector]))       # One picture moves, the other does not.
    assert max_error(each[0], expected[0]) < 1e-4
    assert max_error(each[1], plain[1]) < 1e-4


def test_offsets_add_up():
    a, b = torch.ones(2, 3), torch.ones(5)
    total = combined([(2.0, Offset(ws=a)), (0.5, Offset(styles=b)), (-1.0, Offset(a, b))])
    assert torch.equal(total.ws, a)
    assert torch.equal(total.styles, -0.5 * b)
    assert combined([]).is_zero
    assert combined([(0.0, Offset(styles=b))]).is_zero


def test_an_edit_of_no_strength_changes_no_byte(network, file, tmp_path):
    common = (f"--network={network}", "--seeds=0-2", "--trunc=0.7")
    made(gen_images.main, *common, f"--npz={tmp_path / 'a.npz'}")
    made(gen_images.main, *common, f"--npz={tmp_path / 'b.npz'}", f"--directions={file}", "--edit=smile:0")
    made(gen_images.main, *common, f"--npz={tmp_path / 'c.npz'}", f"--directions={file}", "--edit=smile:1")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert (tmp_path / "a.npz").read_bytes() != (tmp_path / "c.npz").read_bytes()


def test_given_latents_are_moved(network, G, file, tmp_path):
    w = np.random.RandomState(0).randn(1, G.num_ws, G.w_dim).astype(np.float32)
    np.save(tmp_path / "w.npy", w)
    made(gen_images.main, f"--network={network}", f"--w={tmp_path / 'w.npy'}", f"--directions={file}",
         "--edit=red: hair:2", f"--outdir={tmp_path}")
    styles = 2 * read_directions(str(file)).vectors[1]
    expected = to_uint8_sample(synthesize_ws(G, torch.from_numpy(w), styles=styles))[0].permute(1, 2, 0)
    with PIL.Image.open(tmp_path / "w0000.png") as image:
        assert np.array_equal(np.asarray(image), expected.numpy())


def test_a_video_shows_the_pictures_of_its_edits(network, file, tmp_path):
    """Together with a direction of w, in batches that hold several strengths."""
    made(directions.main.commands["pca"], f"--network={network}", "--num=1", "--samples=100",
         f"--dest={tmp_path / 'pca.npz'}")
    common = (f"--network={network}", f"--directions={file},{tmp_path / 'pca.npz'}", "--edit=pca0:1")
    made(gen_video.main, *common, "--sweep-edit=smile:-1,2", "--seeds=3", "--class=owl", "--w-frames=2", "--batch-sz=2",
         f"--output={tmp_path / 'frames'}/")
    for frame, strength in enumerate((-1, 2)):
        out = tmp_path / str(frame)
        made(gen_images.main, *common, f"--edit=smile:{strength}", "--seeds=3", "--class=owl", f"--outdir={out}")
        shown, expected = (np.asarray(PIL.Image.open(path)).astype(int)
                           for path in (tmp_path / "frames" / f"frame{frame:06d}.png", out / "seed0003.png"))
        assert np.abs(shown - expected).max() <= 1


def test_mixtures_are_moved(network, file, tmp_path):
    made(gen_video.main, f"--network={network}", f"--directions={file}", "--edit=smile:1", "--seeds=0-2", "--grid=2x1",
         "--mix-layers=3", "--w-frames=1", f"--output={tmp_path}/v/")
    made(gen_images.main, f"--network={network}", f"--directions={file}", "--edit=smile:1", "--seeds=2",
         f"--outdir={tmp_path}")
    frame, source = (np.asarray(PIL.Image.open(path)).astype(int)
                     for path in (tmp_path / "v" / "frame000000.png", tmp_path / "seed0002.png"))
    assert np.abs(frame[16:, :16] - source).max() <= 1


def test_a_sheet_from_no_strength_on(network, file, tmp_path):
    show = directions.main.commands["show"]
    said = made(show, f"--directions={file}", f"--network={network}", "--from=0", "--strength=1", "--steps=5",
                f"--sheet={tmp_path / 'a.png'}", "--class=cat")
    assert "2 row(s), from 0 to 1" in said
    refused = invoke(show, f"--directions={file}", f"--network={network}", "--from=1", "--strength=1",
                     f"--sheet={tmp_path / 'b.png'}")
    assert refused.exit_code == 2
    assert "--strength=1: is where the rows begin" in refused.output


def test_the_page(network, G, file):
    """It has a slider for it, and says an edit of styles besides the latents, which do not hold it."""
    studio = visualizer.make_studio(load_network(network), str(network), [str(file)], "auto", "cpu")
    assert list(studio.offsets) == ["smile", "red: hair"]
    controls = Controls(seed=4, class_idx=1, psi=0.5, mixing=Mixing(2, 2, 1, 3), edits=(("red: hair", 1.5),))
    shown = studio.show(controls, {}, ("input", 0))
    expected = synthesize_ws(G, shown.ws, styles=1.5 * read_directions(str(file)).vectors[1])
    assert np.array_equal(shown.image, to_uint8_sample(expected)[0].permute(1, 2, 0).numpy())
    assert not np.array_equal(shown.image, studio.show(Controls(), {}).image)
    assert {"--w=latents.npz", f"--directions={file}", "--edit=red: hair:1.5"} <= set(
        shlex.split(command_line(studio.origin, controls)))
    assert len(studio.neighbours(controls)) == 8

#----------------------------------------------------------------------------
# Files, and other networks.

def test_what_is_written_is_read(G, file):
    found, expected = read_directions(str(file)), style_directions(G, "smile", "red: hair", layers=(0, 1, 2))
    assert (found.names, found.styles, found.mapping_sha256) == (expected.names, style_space(G), mapping_sha256(G))
    assert torch.equal(found.vectors, expected.vectors)
    fitted, note = fit_directions(found, G)
    assert note is None
    assert torch.equal(fitted.vectors, expected.vectors)


@pytest.fixture(scope="module")
def grown():
    """A stem and a stage on it."""
    torch.manual_seed(0)
    stem = Generator(stem_config(16, 5, 128, 8, margin_size=4, w_dim=8, z_dim=4))
    larger = Generator(superres_config(stem.config, 2, 4))
    load_stem_into(larger, stem.config, stem.state_dict())
    return stem.eval(), larger.eval()


def test_directions_of_a_stem_move_its_stage(grown):
    """The layers that the stage keeps give the same maps, moved or not."""
    stem, larger = grown
    layers = movable_layers(stem)
    assert layers == list(range(1, larger.config.num_frozen_layers + 1))
    own = style_directions(stem, "a", layers=layers)
    fitted, note = fit_directions(own, larger)
    assert note is None
    assert fitted.layers.nonzero()[:, 1].tolist() == layers
    maps = []
    for G, found in ((stem, own), (larger, fitted)):
        last = getattr(G.synthesis, G.synthesis.layer_names[layers[-1] - 1])
        handle = last.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
        synthesize_ws(G, torch.ones(1, G.num_ws, G.w_dim), styles=edit_offset([found], [("a", 1.0)]).styles)
        handle.remove()
    assert torch.equal(*maps)


def test_layers_that_are_other_ones_are_told_or_refused(grown):
    stem, larger = grown
    own = style_directions(stem, "a", layers=(0, 1), where="--directions=x")
    with torch.no_grad():
        larger.synthesis.input.affine.bias += 1
    note = fit_directions(own, larger)[1]
    assert note == ("--directions=x: moves layers that are other ones in this network (0): pictures may change in "
                    "other ways than its names say")
    narrow = Generator(stem_config(16, 5, 64, 4, margin_size=4, w_dim=8, z_dim=4))
    with pytest.raises(UserError, match="--directions=x: moves the layer 1, where it has 8 styles, and this network's "
                       "has 4: make directions of this network"):
        fit_directions(own, narrow)
    with pytest.raises(UserError, match=f"moves the layer {larger.num_ws - 1}, and this network has 0 to "
                       f"{stem.num_ws - 1}: make"):
        fit_directions(style_directions(larger, "a", layers=(larger.num_ws - 1,)), stem)


@pytest.mark.parametrize(("changes", "message"), [
    ({"style_sizes": None}, "has no array named style_sizes"),
    ({"style_sizes": np.array([1.0, 2, 3])}, "other types or shapes"),
    ({"style_sizes": np.array([3, 3])}, "other types or shapes"),
    ({"style_sizes": np.array([7, -2, 1])}, "do not have the 6 styles"),
    ({"style_sizes": np.array([2 ** 62, 2 ** 62, 6])}, "do not have the 6 styles"),
    ({"affine_sha256": np.array([1, 2, 3])}, "other types or shapes"),
    ({"affine_sha256": np.array(["a"])}, "other types or shapes"),
])
def test_damaged_files(tmp_path, changes, message):
    arrays = {"format": np.array("stylesan-xl style directions 1"), "names": np.array(["a", "b"]),
              "vectors": np.ones([2, 6], np.float32), "layers": np.ones([2, 3], bool), "notes": np.array(["", ""]),
              "mapping_sha256": np.array("0"), "style_sizes": np.array([1, 2, 3]),
              "affine_sha256": np.array(["a", "b", "c"]), **changes}
    np.savez(tmp_path / "x.npz", **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(UserError, match=message):
        read_directions(str(tmp_path / "x.npz"))

#----------------------------------------------------------------------------
# The command, and weights.

def test_a_direction_of_a_text(network, weights, tmp_path):
    """From texts to a file that names all it was made of, twice the same; batches change no more than rounding."""
    common = (f"--network={network}", "--prompt=a smiling face | a portrait", "--seeds=0-15", "--clip=tiny",
              f"--clip-weights={weights}")
    said = made(text, *common, "--name=smile", f"--dest={tmp_path / 'a.npz'}")
    made(text, *common, "--name=smile", f"--dest={tmp_path / 'b.npz'}")
    assert f"--clip=tiny: {weights}" in said
    assert "smile  " in said
    found = read_directions(str(tmp_path / "a.npz"))
    assert found.names == ["smile"]
    assert found.layers.nonzero()[:, 1].tolist() == [1, 2]
    assert torch.equal(found.vectors, read_directions(str(tmp_path / "b.npz")).vectors)
    assert 0.01 < float(found.vectors.abs().max()) < 0.05 * (1 + 2 ** 0.5)      # The largest two steps of AdamW.
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert (str(arrays["method"]), str(arrays["clip"])) == ("text", "tiny")
        assert len(str(arrays["clip_sha256"])) == 64
        assert json.loads(str(arrays["options"]))["prompt"] == "a smiling face | a portrait"
    made(gen_images.main, f"--network={network}", "--seeds=0", f"--directions={tmp_path / 'a.npz'}", "--edit=smile:1",
         f"--outdir={tmp_path / 'out'}")


def test_a_direction_for_given_latents(network, G, tmp_path):
    np.save(tmp_path / "w.npy", np.random.RandomState(0).randn(1, 1, G.w_dim).astype(np.float32))
    said = made(text, f"--network={network}", "--prompt=a smile", f"--w={tmp_path / 'w.npy'}", "--steps=2",
                "--clip=tiny:random", f"--dest={tmp_path / 'a.npz'}")
    assert invoke(text, f"--network={network}", "--prompt=a smile", f"--w={tmp_path / 'none.npy'}",
                  "--clip=tiny:random", f"--dest={tmp_path / 'b.npz'}").exit_code == 2
    assert "a-smile  " in said
    assert "--clip=tiny:random: random weights" in said


@pytest.mark.parametrize(("args", "message"), [
    (["--prompt=a |"], "--prompt=a |: has an empty text"),
    (["--prompt=" + "long " * 20], "has 22 tokens, and tiny:random reads 12: give a shorter text"),
    (["--layers=1-5"], "those from 3 on are critically sampled"),
    (["--clip=tin"], "--clip=tin: open_clip has no network of this name: did you mean tiny"),
    (["--clip=tiny"], "nobody publishes weights for it: give a file by --clip-weights"),
    (["--clip=tiny:best"], "--clip=tiny:best: there are no weights of this name"),
    (["--clip=ViT-B-32"], "belong to the network with the other GELU: take ViT-B-32-quickgelu:openai"),
    (["--clip=ViT-B-16-SigLIP"], "parts of this network are not open_clip's own"),
    (["--clip=ViT-H-14"], "has several weights"),
    (["--clip-weights=x.safetensors"], "has no use for --clip-weights"),
    (["--clip=tiny", "--clip-weights={out}.safetensors"], "{out}.safetensors: no such file"),
    (["--clip=tiny", "--clip-weights={out}.pth"], "{out}.pth"),
    (["--w={out}.npy", "--seeds=1", "--trunc=0.5"], "--seeds, --trunc would change nothing"),
    (["--dest=x.png"], "name one that ends with .npz"),
    (["--class=cow"], "--class=cow: no class of this name"),
])
def test_mistakes(network, tmp_path, args, message):
    out = tmp_path / "out.npz"
    result = invoke(text, f"--network={network}", f"--dest={out}", "--prompt=a smile", "--seeds=0",
                    "--clip=tiny:random", *(arg.format(out=out) for arg in args))
    assert result.exit_code == 2, result.output
    assert message.format(out=out) in result.output
    assert not list(tmp_path.iterdir())


def test_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(UserError, match="need the package open_clip_torch: pip install open_clip_torch"):
        load_clip("tiny:random", None, CPU)


def test_weights_of_another_network(weights, tmp_path):
    state = safetensors.torch.load_file(weights)
    state["visual.proj"] = torch.zeros(2, 2)
    safetensors.torch.save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold the weights of tiny .*visual.proj"):
        load_clip("tiny", str(tmp_path / "other.safetensors"), CPU)
    torch.save({"state_dict": state}, tmp_path / "nested.pt")
    with pytest.raises(UserError, match="holds a dict as 'state_dict'.* a plain state dict of torch.save"):
        load_clip("tiny", str(tmp_path / "nested.pt"), CPU)


def test_where_weights_are_looked_for(weights, tmp_path, monkeypatch):
    """In the folder of weights, else in the caches; offline the message says what to fetch."""
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    monkeypatch.setenv("STYLESAN_WEIGHTS", str(tmp_path))
    published = {"hf_hub": "nobody/tiny-clip/", "url": ""}
    with pytest.raises(UserError, match=r"tiny.some.safetensors: it is not on this machine and downloads are off .*"
                       r"Fetch https://huggingface.co/nobody/tiny-clip/resolve/main/open_clip_model.safetensors "
                       r".*by --clip-weights"):
        find_weights("tiny", "some", published)
    with pytest.raises(UserError, match=r"tiny.some.pt: .*Fetch https://example.com/x.pt"):
        find_weights("tiny", "some", {"hf_hub": "", "url": "https://example.com/x.pt"})
    (tmp_path / "tiny.some.safetensors").write_bytes(weights.read_bytes())
    assert find_weights("tiny", "some", published) == tmp_path / "tiny.some.safetensors"
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["some"])
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, tag: {**published, "mean": (0.5, 0.5, 0.5)})
    found = clip_module.load_clip("tiny", None, CPU)
    assert (found.name, found.mean, found.source) == ("tiny:some", (0.5, 0.5, 0.5),
                                                      str(tmp_path / "tiny.some.safetensors"))
