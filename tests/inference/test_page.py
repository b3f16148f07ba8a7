# SPDX-License-Identifier: Apache-2.0
"""What the page shows, without a browser: latents, layers and spectra, command lines, turns, searches."""
import dataclasses
import io
import math
import shlex
import socket
import threading
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import gen_images
import visualizer
from dnnlib import UserError
from inference.directions.files import Directions, save_directions
from inference.page.commands import LATENTS_FILE, Origin, class_word, command_line, latents_file
from inference.page.layers import (
    DEPTH,
    layer_names,
    map_picture,
    num_channels,
    power_spectrum,
    spectrum_picture,
    synthesize_with_maps,
)
from inference.page.scene import BETWEEN, LARGEST_SEED, PICTURE, Controls, Mixing, noisy_latent
from inference.page.studio import Request, Studio
from inference.page.turns import Abandoned, Turns, Watched
from legacy import load_network


@pytest.fixture(scope="module")
def directions(network, tmp_path_factory):
    """A file with two directions, one of which moves the last layers only."""
    G = load_network(network).G_ema
    layers = torch.ones(2, G.num_ws, dtype=torch.bool)
    layers[1, :2] = False
    path = tmp_path_factory.mktemp("directions") / "found.npz"
    found = Directions(["big: yes", "red"], torch.randn(2, G.w_dim, generator=torch.Generator().manual_seed(1)), layers,
                       ["", ""])
    save_directions(path, found, G, {})
    return path


@pytest.fixture(scope="module")
def studio(network, directions):
    studio = visualizer.make_studio(load_network(network), str(network), [str(directions)], "auto", "cpu")
    studio.distance = "pixels"
    return studio

#----------------------------------------------------------------------------
# Pictures.

SAVED = Controls(class_idx=1, seed=5, psi=0.6)
STATES = {
    "plain": Controls(class_idx=2, seed=7),
    "psi": Controls(class_idx=1, seed=3, psi=0.7),
    "large seed": Controls(seed=LARGEST_SEED),
    "moved": Controls(seed=1, translate=(0.25, -0.1), rotate=30),
    "edits": Controls(seed=1, psi=0.5, edits=(("big: yes", -1.5), ("red", 0.1 + 0.2))),
    "noise": Controls(seed=1, psi=0.8, noise=0.3, noise_seed=4),
    "mixed": Controls(seed=1, psi=0.8, mixing=Mixing(2, 2, 1, 3), edits=(("red", 1.0),)),
    "between": Controls(source=BETWEEN, between=0.25, psi=0.9, rotate=-90),
    "picture": Controls(source=PICTURE, psi=0.4),
}


@pytest.fixture(scope="module")
def saved(studio):
    return {name: studio.point(Controls(seed=k, class_idx=k), {}) for k, name in enumerate(("A", "B", PICTURE))}


@pytest.mark.parametrize("name", STATES)
def test_the_command_makes_the_same_picture(studio, saved, tmp_path, monkeypatch, name):
    controls = STATES[name]
    shown = studio.show(controls, saved)
    (tmp_path / LATENTS_FILE).write_bytes(latents_file(studio.origin, controls, shown.ws))
    program, script, *options = shlex.split(command_line(studio.origin, controls))
    assert (program, script) == ("python", "gen_images.py")
    assert controls.is_plain == (f"--w={LATENTS_FILE}" not in options)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(gen_images.main, options)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").iterdir()
    with PIL.Image.open(path) as image:
        assert np.abs(np.asarray(image).astype(int) - shown.image).max() <= 1


def test_every_control_changes_the_picture(studio, saved):
    base = {BETWEEN: STATES["between"], "seed": dataclasses.replace(STATES["mixed"], noise=0.2)}
    changes = [("seed", {"seed": 2}), ("seed", {"class_idx": 1}), ("seed", {"psi": 0.5}), ("seed", {"noise": 0.3}),
               ("seed", {"noise_seed": 1}), ("seed", {"mixing": None}), ("seed", {"mixing": Mixing(3, 2, 1, 3)}),
               ("seed", {"mixing": Mixing(2, 1, 1, 3)}), ("seed", {"mixing": Mixing(2, 2, 2, 3)}),
               ("seed", {"translate": (0.1, 0)}), ("seed", {"translate": (0, 0.1)}), ("seed", {"rotate": 10}),
               ("seed", {"edits": (("big: yes", 1.0),)}), ("seed", {"source": BETWEEN}), ("seed", {"source": PICTURE}),
               (BETWEEN, {"between": 0.75})]
    for source, change in changes:
        before = studio.show(base[source], saved).image
        assert (before != studio.show(dataclasses.replace(base[source], **change), saved).image).any(), change


@pytest.mark.numeric
def test_the_pipeline_is_its_definition(studio, saved):
    a, b = saved["A"], saved["B"]
    controls = Controls(source=BETWEEN, between=0.25, psi=0.5, mixing=Mixing(9, 2, 1, 2), edits=(("red", 2.0),))
    other = studio.point(Controls(seed=9, class_idx=2), {})
    expected = 0.75 * a.ws + 0.25 * b.ws
    centers = 0.75 * a.centers + 0.25 * b.centers
    expected[1:3], centers[1:3] = other.ws[1:3], other.centers[1:3]
    expected = centers + 0.5 * (expected - centers) + 2 * studio.offsets["red"].ws
    torch.testing.assert_close(studio.show(controls, saved).ws[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.numeric
def test_noise_keeps_the_distribution():
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    assert noisy_latent(z, 0, 3) is z
    for noise in (0.2, 0.5, 1):
        found = noisy_latent(z, noise, 3)
        assert found.square().mean() == pytest.approx(1, abs=0.03)
        cosine = torch.nn.functional.cosine_similarity(z, found, dim=0)
        assert cosine == pytest.approx(math.cos(noise * math.pi / 2), abs=0.03)
    assert not torch.equal(found, noisy_latent(z, 1, 4))


def test_neighbours(studio):
    controls = STATES["noise"]
    images = studio.neighbours(controls)
    assert len({image.tobytes() for image in images}) == 8
    assert np.abs(images[4].astype(int) - studio.show(controls, {}).image).max() <= 1


@pytest.mark.parametrize(("change", "match"), [
    ({"source": "moon"}, "what is shown: 'moon' is none of"), ({"seed": -1}, "seed: -1 is none"),
    ({"noise_seed": 2 ** 60}, "seed of the noise"), ({"class_idx": 3}, "has no number 3"),
    ({"psi": math.nan}, "psi: nan is beyond"), ({"noise": 1.1}, "noise: 1.1"), ({"between": -1}, "between: -1"),
    ({"translate": (0, math.inf)}, "shift down: inf"), ({"rotate": 1e30}, "rotation"),
    ({"mixing": Mixing(0, 0, 3, 2)}, "layers 3 to 2"), ({"mixing": Mixing(0, 0, 0, 99)}, "layers 0 to 99"),
    ({"edits": (("red", 1e9),)}, "red: 1e"), ({"edits": (("blue", 1.0),)}, "direction blue: there is none"),
    ({"source": BETWEEN}, "nothing is saved as A"), ({"source": PICTURE}, "there is none: choose a picture"),
])
def test_what_cannot_be_shown(studio, change, match):
    with pytest.raises(UserError, match=match):
        studio.show(dataclasses.replace(Controls(), **change), {})

#----------------------------------------------------------------------------
# Layers.

def test_layers(studio, network):
    G = studio.G
    ws = studio.show(Controls(seed=1), {}).ws
    transform = Controls().transform()
    expected = G.synthesis.input(ws[:, 0], transform)
    for k, name in enumerate(layer_names(G)):
        if k > 0:
            expected = getattr(G.synthesis, name)(expected, ws[:, k])
        image, maps = synthesize_with_maps(G, ws, transform, name)
        assert maps.shape == (num_channels(G, name), *expected.shape[2:])
        torch.testing.assert_close(maps, expected[0])
        assert not G.synthesis.get_submodule(name)._forward_hooks
    shown = studio.show(Controls(seed=1), {}, (name, 2))
    assert np.array_equal(shown.layer[0], map_picture(expected[0, 2]))
    assert np.array_equal(shown.image, studio.show(Controls(seed=1), {}).image)
    with pytest.raises(UserError, match="channel 3: the layer"):
        studio.show(Controls(), {}, (name, 3))


@pytest.mark.numeric
def test_spectrum_of_a_wave():
    """A wave of kx = 5, ky = -3 periods has its power at these frequencies and their negatives, whatever its mean."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    wave = 7 + 2 * torch.cos(2 * math.pi * (5 * x - 3 * y) / 32)
    spectrum = power_spectrum(torch.stack([wave, torch.full_like(wave, 3.5)]))
    assert spectrum[0].sum() == pytest.approx(1)
    peaks = {divmod(int(i), 32) for i in spectrum[0].flatten().topk(2).indices}
    assert peaks == {(16 - 3, 16 + 5), (16 + 3, 16 - 5)}
    assert spectrum[1].sum() < 1 + 1e-9
    far = (x - 16).abs() + (y - 16).abs() > 20
    assert spectrum[0][far].max() < 10 ** -5.8 * spectrum[0].max()
    picture = spectrum_picture(spectrum[0])
    assert picture[13, 21] == 255
    assert picture[0, 0] == pytest.approx(max(0, 255 * (1 + 10 * math.log10(
        spectrum[0, 0, 0] / spectrum[0].max()) / DEPTH)), abs=1)


def test_pictures_of_maps_without_content():
    assert (map_picture(torch.zeros(3, 3)) == 128).all()
    assert spectrum_picture(power_spectrum(torch.zeros(1, 3, 3))[0]).max() == 0
    assert map_picture(torch.tensor([[-2.0, 0, 1]])).tolist() == [[0, 128, 191]]

#----------------------------------------------------------------------------
# What is taken away.

@pytest.mark.parametrize(("names", "idx", "word"), [
    (["cat", "dog"], 1, "dog"), (["a, b", "c"], 0, "a, b"), (None, 1, "1"), (["1", "0"], 0, "1"),
    (["0-1", "x"], 0, "0-1"), (["x", "x"], 1, "1"), (["7-3", "x"], 1, "x"),
    (["\x1b[2J", "x"], 0, "0"),
])
def test_class_word(names, idx, word):
    assert class_word(Origin("n", class_names=names, c_dim=2), idx) == word


def test_command_line_is_quoted():
    origin = Origin("my runs/it's.pkl", class_names=["a b", "c"], c_dim=2, options=["--device=cpu"])
    line = command_line(origin, Controls(seed=3))
    assert shlex.split(line)[2:] == ["--network=my runs/it's.pkl", "--seeds=3", "--class=a b", "--device=cpu",
                                     "--outdir=out"]


def test_latents_say_where_they_come_from(studio):
    with np.load(io.BytesIO(latents_file(studio.origin, Controls(seed=3), torch.zeros(1, 2, 4)))) as arrays:
        assert arrays["w"].shape == (1, 2, 4)
        assert str(arrays["network_sha256"]) == studio.origin.sha256
        assert '"seed": 3' in str(arrays["controls"])

#----------------------------------------------------------------------------
# Turns and long work.

def test_turns_are_given_in_order():
    turns, order = Turns(), []
    entered = threading.Event()

    def other():
        entered.set()
        with turns.turn():
            order.append("other")
    with turns.turn():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
        while "other" not in order:             # However late the other one is, it gets its turn between two steps.
            turns.let_others_in()
        order.append("long work")
    thread.join(10)
    assert order == ["other", "long work"]


def test_work_is_watched():
    looked = threading.Event()

    def work(show):
        show(1)
        assert looked.wait(10)
        show(2)
        return "done"
    watched = Watched(work)
    looks = watched.looks(every=0.01)
    assert next(looks) == 1
    looked.set()
    assert set(looks) <= {2}            # Work that ends at once need not be seen before.
    assert watched.outcome() == "done"


def test_work_ends_when_nobody_looks():
    ended = threading.Event()

    def work(show):
        try:
            while True:
                show(1)
        except Abandoned:
            ended.set()
            raise
    looks = Watched(work).looks(every=0.01)
    assert next(looks) == 1
    looks.close()
    assert ended.wait(10)


def test_errors_of_work_arrive():
    def work(show):
        raise UserError("no")
    with pytest.raises(UserError, match="no"):
        list(Watched(work).looks(every=0.01))


def picture(path, image):
    PIL.Image.fromarray(image).save(path)
    return Request(str(path), path.name, class_idx=1, steps=60)


def test_a_picture_becomes_latents(studio, tmp_path):
    target, mean = (studio.show(c, {}).image for c in (SAVED, Controls(class_idx=1, psi=0)))
    looks = list(studio.invert(picture(tmp_path / "target.png", target)))
    assert looks[-1].step == 60
    assert looks[-1].distance < 0.3 * np.square((target - mean.astype(float)) / 127.5).mean()
    assert np.array_equal(looks[-1].target, target)
    shown = studio.show(Controls(source=PICTURE), {PICTURE: looks[-1].point})
    assert np.array_equal(shown.image, looks[-1].image)


def test_wrong_pictures(studio, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(UserError, match="the picture notes.png: cannot be decoded"):
        list(studio.invert(Request(str(tmp_path / "notes.png"), "notes.png", 0)))
    with pytest.raises(UserError, match="steps: 0 is beyond"):
        list(studio.invert(Request("x", "x", 0, steps=0)))
    with pytest.raises(UserError, match="no number 9"):
        list(studio.invert(Request("x", "x", 9)))

#----------------------------------------------------------------------------
# The command.

def test_report_is_found(network, tmp_path):
    loaded = load_network(network)
    assert visualizer.find_report(loaded) is None
    demo = tmp_path / "best_model.pkl"
    demo.write_bytes(network.read_bytes())
    for run, content in (("a/0", b"other"), ("b/1", network.read_bytes())):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "best_model.pkl").write_bytes(content)
        (tmp_path / run / "report.html").write_text("x")
    assert visualizer.find_report(load_network(demo)) == tmp_path / "b" / "1" / "report.html"
    (tmp_path / "report.html").write_text("x")
    assert visualizer.find_report(load_network(demo)) == tmp_path / "report.html"


def test_directions_that_cannot_be_offered(studio):
    files = [Directions(["still", "red"], torch.ones(2, studio.G.w_dim),
                        torch.tensor([[False], [True]]).expand(-1, studio.G.num_ws), ["", ""])]
    found = Studio(studio.G, studio.origin, files)
    assert list(found.offsets) == ["red"]
    assert "still: moves no layer" in found.left_out[0]


def test_more_directions_than_sliders_are_told(studio, network, tmp_path, capsys):
    """On the page and on the command line."""
    names = [f"d{i}" for i in range(43)]
    G = studio.G
    save_directions(tmp_path / "many.npz", Directions(names, torch.ones(43, G.w_dim), torch.ones(43, G.num_ws) > 0,
                                                      [""] * 43), G, {})
    found = visualizer.make_studio(load_network(network), str(network), [str(tmp_path / "many.npz")], "auto", "cpu")
    assert list(found.offsets) == names[:40]
    (note,) = found.left_out
    assert "the page has 40 sliders, and 3 more directions have none (d40, d41, d42)" in note
    assert f"NOTE: {note}" in capsys.readouterr().err


@pytest.fixture
def server():
    return pytest.importorskip("inference.page.server", reason="gradio is not installed")


def test_places_where_no_page_can_be(server):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port={port}: the page cannot be shown there .*give another one"):
            server.find_port("127.0.0.1", port)
    assert server.find_port("127.0.0.1", port) == port
    with pytest.raises(UserError, match="--host=192.0.2.1: .*give an address of this machine"):
        server.find_port("192.0.2.1", None)             # Reserved for documents: no machine has it.


def test_another_program_is_faster(server, monkeypatch):
    """It takes the port when it has just been found to be free."""
    for name in ("NO_PROXY", "no_proxy"):           # Which `serve` sets.
        monkeypatch.setenv(name, "")

    class Blocks:
        def queue(self, **_settings):
            return self

        def launch(self, server_port, **_settings):
            self.other = socket.create_server(("127.0.0.1", server_port))
            raise OSError("no port")
    blocks = Blocks()
    with pytest.raises(UserError, match="the page cannot be shown there"):
        server.serve(SimpleNamespace(blocks=blocks), "127.0.0.1", None, share=False)
    blocks.other.close()


def test_a_free_port_is_found_if_there_is_one(server, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ports = [place.getsockname()[1] for place in (taken, free)]
        free.close()
        monkeypatch.setattr(server, "PORTS", ports)
        assert server.find_port("127.0.0.1", None) == ports[1]
        monkeypatch.setattr(server, "PORTS", ports[:1])
        with pytest.raises(UserError, match=f"none of the ports {ports[0]} to {ports[0]} is free.*by --port"):
            server.find_port("127.0.0.1", None)
