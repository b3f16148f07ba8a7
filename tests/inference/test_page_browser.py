# SPDX-License-Identifier: Apache-2.0
"""The page in a real browser: controls change what they should, tabs do not mix, nobody else is asked."""
import base64
import io
import re
import shlex
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner

import gen_images
import visualizer
from inference.directions.files import Directions, save_directions
from inference.page.scene import PICTURE
from legacy import load_network

pytest.importorskip("gradio", reason="gradio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]
WAIT = 20_000           # Milliseconds, for busy machines.

pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def served(network, tmp_path_factory):
    """A page and its address, with one direction, a report and a cheap distance."""
    from inference.page.app import Page
    from inference.page.server import serve
    loaded = load_network(network)
    G, folder = loaded.G_ema, tmp_path_factory.mktemp("page")
    save_directions(folder / "found.npz", Directions(["red"], 3 * torch.ones(1, G.w_dim), torch.ones(
        1, G.num_ws, dtype=torch.bool), [""]), G, {})
    (folder / "report.html").write_text("<p>How the <b>run</b> went.</p><script>document.body.innerHTML = ''</script>")
    studio = visualizer.make_studio(loaded, str(network), [str(folder / "found.npz")], "auto", "cpu")
    studio.distance = "pixels"
    page = Page(studio, folder / "report.html")
    yield page, serve(page, "127.0.0.1", None, share=False, wait=False)
    page.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def address(served):
    return served[1]


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


class Tab:
    """A tab with the page, as people use it."""

    def __init__(self, browser, address):
        self.page = browser.new_page()
        self.page.set_default_timeout(WAIT)
        self.asked = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.answer = self.page.goto(address)
        self.page.wait_for_selector("#picture img")

    def source(self) -> str:
        return self.page.get_attribute("#picture img", "src")

    def pixels(self) -> np.ndarray:
        return decoded(self.source())

    def command(self) -> str:
        return self.page.input_value("#command textarea")

    def open(self, name: str) -> None:
        self.page.get_by_role("tab", name=name, exact=True).click()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def fill(self, label: str, value: object) -> None:
        """A number, or the number beside a slider."""
        field = self.page.get_by_label(re.compile(rf"^(number input for )?{label}(?=$| \(|,)")).and_(
            self.page.locator("input[type=number]"))
        field.fill(str(value))
        field.press("Enter")
        field.blur()

    def choose(self, label: str, name: str) -> None:
        field = self.page.get_by_label(label, exact=True)
        field.click()
        self.page.get_by_role("option", name=name, exact=True).click()

    def changes(self, act, *args) -> None:
        """Do something, and wait until the picture is another one."""
        before = self.source()
        act(*args)
        self.page.wait_for_function("before => document.querySelector('#picture img').src != before", arg=before)

    def message(self) -> str:
        return self.page.wait_for_selector("[data-testid=toast-body]").inner_text()


def decoded(source: str) -> np.ndarray:
    with PIL.Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as image:
        return np.asarray(image)


@pytest.fixture
def tab(browser, address):
    tab = Tab(browser, address)
    yield tab
    tab.page.close()


def drawn(command: str, folder) -> np.ndarray:
    """What the command makes."""
    *options, outdir = shlex.split(command)[2:]
    assert outdir == "--outdir=out"
    result = CliRunner().invoke(gen_images.main, [*options, f"--outdir={folder / 'out'}"])
    assert result.exit_code == 0, result.output
    (path,) = (folder / "out").iterdir()
    with PIL.Image.open(path) as image:
        return np.asarray(image)


def differ(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first.astype(int) - second).max())

#----------------------------------------------------------------------------

def test_controls_of_a_seed(tab, tmp_path):
    tab.changes(tab.fill, "Seed", 7)
    tab.changes(tab.choose, "Class", "owl")
    tab.changes(tab.fill, "Truncation psi", 0.7)
    tab.open("Move")
    tab.changes(tab.fill, "To the right", 0.2)
    tab.changes(tab.fill, "Down", -0.1)
    tab.changes(tab.fill, "Turn", 30)
    tab.open("Directions")
    tab.changes(tab.fill, "red", 1.5)
    command = tab.command()
    for word in ("--seeds=7", "--class=owl", "--trunc=0.7", "--translate=0.2,-0.1", "--rotate=30", "--edit=red:1.5"):
        assert word in command
    assert differ(drawn(command, tmp_path), tab.pixels()) <= 1
    with tab.page.expect_download() as download:
        tab.press("Download picture")
    with PIL.Image.open(download.value.path()) as image:
        assert np.array_equal(np.asarray(image), tab.pixels())


def test_controls_of_other_latents(tab, tmp_path, monkeypatch):
    tab.press("Save as A")
    tab.page.wait_for_selector("#points img")
    tab.open("Around")
    tab.changes(tab.fill, "Distance from the seed", 0.4)
    tab.changes(tab.fill, "Seed of the noise", 3)
    tab.press("Show the neighbours of the seed")
    tab.page.wait_for_selector("#neighbours img")
    near = tab.page.locator("#neighbours img").nth(3).get_attribute("src")
    assert differ(decoded(near), tab.pixels()) <= 1
    tab.open("Mix")
    tab.changes(tab.page.get_by_label("Take some layers from another seed").check)
    tab.changes(tab.fill, "Other seed", 5)
    tab.changes(tab.choose, "Other class", "dog")
    tab.changes(tab.fill, "First layer", 1)
    tab.changes(tab.fill, "Last layer", 2)
    tab.press("Save as B")
    tab.page.wait_for_function("document.querySelectorAll('#points img').length == 2")
    tab.changes(tab.page.get_by_label("Take some layers from another seed").uncheck)
    tab.changes(tab.page.get_by_label("between A and B").check)
    tab.open("Between")
    tab.changes(tab.fill, "From A to B", 0.5)
    with tab.page.expect_download() as download:
        tab.press("Download latents")
    assert download.value.suggested_filename == "latents.npz"
    download.value.save_as(tmp_path / "latents.npz")
    monkeypatch.chdir(tmp_path)
    assert "--w=latents.npz" in tab.command()
    assert differ(drawn(tab.command(), tmp_path), tab.pixels()) <= 1


def test_layers_and_report(tab):
    tab.choose("Layer", "input")
    tab.page.wait_for_selector("#maps img")
    assert tab.page.locator("#maps img").count() == 3
    before = tab.page.get_attribute("#maps img", "src")
    tab.fill("Channel", 2)
    tab.page.wait_for_function("before => document.querySelector('#maps img').src != before", arg=before)
    tab.choose("Layer", "none")
    tab.page.wait_for_function("document.querySelectorAll('#maps img').length == 0")
    assert tab.page.locator("[data-testid=toast-body]").count() == 0
    tab.open("Report")
    assert "How the run went." in tab.page.frame_locator("#report iframe").locator("body").inner_text()
    hosts = {url.split("/")[2] for url in tab.asked if not url.startswith(("data:", "blob:", "about:"))}
    assert len(hosts) == 1
    assert hosts.pop().startswith("127.0.0.1:")
    assert "default-src 'self'" in tab.answer.headers["content-security-policy"]


def test_two_tabs_do_not_mix(tab, browser, address):
    other = Tab(browser, address)
    tab.changes(tab.fill, "Seed", 3)
    tab.press("Save as A")
    tab.press("Save as B")
    tab.page.wait_for_function("document.querySelectorAll('#points img').length == 2")
    other.changes(other.fill, "Seed", 4)
    shown = other.source()
    tab.page.get_by_label("between A and B").check()
    tab.changes(tab.fill, "Truncation psi", 0.5)
    other.page.get_by_label("between A and B").check()
    assert "nothing is saved as A" in other.message()
    assert other.source() == shown
    other.page.close()


def test_pictures_become_latents(tab, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    PIL.Image.fromarray(tab.pixels()).resize((20, 24)).save(tmp_path / "photo.png")
    tab.open("Invert")
    tab.press("Find its latents")
    assert "none is chosen" in tab.message()
    tab.page.set_input_files("#upload input[type=file]", tmp_path / "notes.png")
    tab.page.wait_for_selector("#upload >> text=notes")
    tab.press("Find its latents")
    tab.page.wait_for_selector("text=the picture notes.png: cannot be decoded")
    tab.page.get_by_label("Remove").or_(tab.page.get_by_label("Clear")).first.click()
    tab.page.set_input_files("#upload input[type=file]", tmp_path / "photo.png")
    tab.page.wait_for_selector("#upload >> text=photo")
    tab.fill("Steps", 30)
    tab.changes(tab.press, "Find its latents")
    assert tab.page.get_by_label("inverted picture").is_checked()
    found = tab.page.locator("#progress img").nth(1).get_attribute("src")
    assert differ(decoded(found), tab.pixels()) <= 1

def test_points_that_are_saved_at_the_same_time_are_all_kept(served, tmp_path):
    """Events that overlap begin with the same state of the tab; a search lasts for many of them."""
    page, _ = served
    PIL.Image.new("RGB", (16, 16), "red").save(tmp_path / "t.png")
    values = {component: component.value for component in page.panel.inputs} | {
        page.saved: {}, page.upload: str(tmp_path / "t.png"), page.steps: 2, page.space: "w", page.any_class: False}
    search = page._invert(values)
    next(search)
    for name in ("A", "B"):
        page._save(name, {**values, page.panel.seed: ord(name)})
    assert list(search)
    assert set(values[page.saved]) == {"A", "B", PICTURE}
    assert page._points(values).count("<img") == 2
