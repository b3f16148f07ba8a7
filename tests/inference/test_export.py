# SPDX-License-Identifier: Apache-2.0
"""export.py: every format against the network it came from, the page of a shared one, and hf:// addresses."""
import json
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import PIL.Image
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import LocalEntryNotFoundError

import export
import gen_images
import legacy
from dnnlib import UserError
from dnnlib.hub import REMEDIES, WEIGHTS_FILE
from inference.export import hub_folder
from inference.export.official import CLASS_ROWS, TABLE, official_state
from inference.export.onnx_graph import OPSET, TOLERANCE
from tests.legacy.official_files import Persistent, dump, official_generator
from tests.legacy.test_official import RECORDED
from tests.legacy.test_snapshots import own_snapshot
from tests.parity import DATA, load_npz
from torch_utils import checkpoint
from torch_utils.own_network import OwnNetwork, own_config, save_own_network
from torch_utils.weights import HEADER_KEY, open_safetensors, safetensors_bytes
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator

NAMES = ["cat", "dog | wolf", "<owl>"]
OPTIONS = {"data": {"path": "/home/me/pets.zip", "mirror": True}, "batch": 32, "seed": 0,
           "discriminator": {"backbones": ["local:/home/me/own.safetensors", "deit"], "san": True}}
RECORD = {"results": {"fid50k_full": 12.5}, "metric": "fid50k_full", "protocol": "stylegan", "num_gen": 50_000,
          "num_real": None, "reference": {"path": "/home/me/pets.zip"}, "detector": "/home/me/judge.safetensors",
          "detector_sha256": "ab" * 32, "label_policy": "dataset", "truncation_psi": 1.0}


def small_generator(c_dim: int = 3, **settings) -> Generator:
    torch.manual_seed(0)
    config = stem_config(8, 3, **{"channel_base": 64, "channel_max": 4, "margin_size": 4} | settings, z_dim=8, w_dim=8,
                         c_dim=c_dim, embed_dim=6)
    G = Generator(config).eval().requires_grad_(False)
    G.mapping.w_avg.normal_()
    return G


@pytest.fixture(scope="module")
def G() -> Generator:
    return small_generator()


@pytest.fixture
def run_folder(tmp_path, G) -> Path:
    """A run with a snapshot after 2 kimg, and metrics of it and of an earlier one."""
    folder = tmp_path / "run"
    checkpoint.save(folder / "network-snapshot-000002.pkl", own_snapshot(G) | {
        "G": G.state_dict(), "class_names": NAMES, "progress": {"cur_nimg": 2000, "best_value": float("inf")},
        "score": {"metric": "fid50k_full", "value": 12.5}, "options": OPTIONS})
    lines = [RECORD | {"results": {"fid50k_full": 99.0}, "snapshot_pkl": "network-snapshot-000001.pkl"},
             RECORD | {"results": {"fid50k_full": 50.0}, "snapshot_pkl": "network-snapshot-000002.pkl"},
             RECORD | {"snapshot_pkl": "network-snapshot-000002.pkl"}]
    (folder / "metric-fid50k_full.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"cut')
    return folder


def invoke(network, kind: str, dest, *args: str):
    return CliRunner().invoke(export.main, [f"--network={network}", f"--format={kind}", f"--dest={dest}",
                                            "--device=cpu", *args])


def done(*args) -> str:
    result = invoke(*args)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*args) -> str:
    result = invoke(*args)
    assert result.exit_code == 2, result.output
    return result.output


def assert_same_images(network: legacy.LoadedNetwork, G: Generator) -> None:
    z, c = torch.randn(3, G.z_dim), torch.eye(3)
    for psi in (1, 0.5):
        assert torch.equal(network.G_ema(z, c, psi), G(z, c, psi))

#----------------------------------------------------------------------------
# .safetensors.

@pytest.mark.numeric
def test_a_safetensors_is_the_same_network(run_folder, tmp_path, G):
    path = tmp_path / "new" / "pets.safetensors"
    assert str(path) in done(run_folder, "safetensors", path)
    network = legacy.load_network(path)
    assert_same_images(network, G)
    assert network.generator_config == G.config
    assert (network.class_names, network.progress) == (NAMES, {"cur_nimg": 2000})
    with open_safetensors(path) as file:
        header = json.loads(file.metadata()[HEADER_KEY])
        assert sorted(file.keys()) == sorted(G.state_dict())
    assert header["generator_config"]["img_resolution"] == 8
    assert "/home/me" not in json.dumps(header)
    snapshot = legacy.open_snapshot(path)
    assert (snapshot["G"], snapshot["D"]) == (None, None)
    # An export of an export is the same file, and other commands take it.
    done(path, "safetensors", tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    result = CliRunner().invoke(gen_images.main, [f"--network={path}", "--seeds=0", f"--outdir={tmp_path}"])
    assert result.exit_code == 0, result.output


def test_official_pickles_are_exported_too(tmp_path):
    source = DATA / "snapshot_stem16_r_uncond.pkl"
    done(source, "safetensors", tmp_path / "x.safetensors")
    ours, theirs = (legacy.load_network(path).G_ema for path in (tmp_path / "x.safetensors", source))
    z = torch.randn(2, ours.z_dim)
    assert torch.equal(ours(z, None), theirs(z, None))


def test_damaged_safetensors_are_one_line(tmp_path, G):
    path, state = tmp_path / "x.safetensors", G.state_dict()
    header = {"format": "stylesan-xl/generator/1", "generator_config": own_snapshot(G)["generator_config"]}

    def line(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(UserError) as err:
            legacy.load_network(path)
        assert "\n" not in str(err.value)
        assert str(path) in str(err.value)
        return str(err.value)

    good = safetensors_bytes(state, header)
    for cut in (0, 5, 100, len(good) - 1):
        assert "damaged or cut off" in line(good[:cut])
    assert "lacks generator_config" in line(safetensors_bytes(state, {"format": header["format"]}))
    assert "class_names has 2 names for 3" in line(safetensors_bytes(state, header | {"class_names": ["a", "b"]}))
    assert "progress is 3" in line(safetensors_bytes(state, header | {"progress": 3}))
    assert "generator_config.w_dim" in line(safetensors_bytes(
        state, header | {"generator_config": header["generator_config"] | {"w_dim": 1e99}}))
    assert "lacks tensors" in line(safetensors_bytes(dict(list(state.items())[1:]), header))
    assert "not finite" in line(safetensors_bytes(
        {name: value * float("nan") for name, value in state.items()}, header))
    assert "expected a file of format" in line(safetensors_bytes(state, {}))
    save_own_network(path, OwnNetwork(own_config(2, widths=(4,))))
    assert "found 'stylesan-xl/local-network/1': name a file that export.py" in line(path.read_bytes())

#----------------------------------------------------------------------------
# The hub.

def test_a_folder_for_the_hub(run_folder, tmp_path, G):
    folder = tmp_path / "pets"
    assert f"hf upload USER/pets {folder}" in done(run_folder, "hub", folder, "--license=cc-by-4.0")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", WEIGHTS_FILE, "samples.png"]
    assert_same_images(legacy.load_network(folder), G)
    with PIL.Image.open(folder / "samples.png") as sheet:
        assert sheet.size == (8 * 8, 3 * 8)             # Eight seeds of each class.
    text = (folder / "README.md").read_text()
    card = huggingface_hub.ModelCard(text).data
    assert (card.license, card.library_name, card.model_name) == ("cc-by-4.0", "stylesan-xl", "pets")
    assert [(r.metric_type, r.metric_value, r.dataset_name) for r in card.eval_results] == [
        ("fid50k_full", 12.5, "pets.zip")]
    for line in ("| data | pets.zip |", "| images shown | 2 kimg |", "| SAN heads | yes |",
                 "Classes: cat, dog \\| wolf", "| feature networks of D | own.safetensors, deit |",
                 "The weights are under: cc-by-4.0.",
                 "| fid50k_full | 12.5 | stylegan | 50000 | all | judge.safetensors (sha256 abababababab) | dataset |",
                 "![samples](samples.png)", 'load_network("hf://USER/pets")'):
        assert line in text
    assert "/home/me" not in text
    assert "<owl>" not in text


def test_a_page_without_a_record(tmp_path):
    """An official pickle knows little, and nothing is made up. A folder may have a name that the hub does not take."""
    folder = tmp_path / "my pets: 2"
    output = done(DATA / "snapshot_stem16_t_cond.pkl", "hub", folder)
    assert "NOTE: the page will say that the licence is unknown: name" in output
    assert f"hf upload USER/my-pets-2 '{folder}'; everybody then loads it as hf://USER/my-pets-2" in output
    text = (folder / "README.md").read_text()
    assert huggingface_hub.ModelCard(text).data.license == "unknown"
    assert "None are recorded beside the file." in text
    assert "The licence of these weights was not stated." in text
    assert "| images shown | 123.456 kimg |" in text


def test_metrics_of_calc_metrics_count_by_the_content_of_the_file(run_folder, tmp_path):
    sha256 = legacy.load_network(run_folder).sha256
    (run_folder / "metric-is.jsonl").write_text(json.dumps(
        RECORD | {"metric": "is50k", "results": {"is50k_mean": 7.25}, "generated": {"fingerprint": sha256}}) + "\n")
    done(run_folder, "hub", tmp_path / "x")
    assert "| is50k_mean | 7.25 |" in (tmp_path / "x" / "README.md").read_text()


def test_a_distance_in_other_features_is_not_published_as_fid(run_folder, tmp_path):
    (run_folder / "metric-fid.jsonl").write_text(json.dumps(RECORD | {
        "metric": "fid", "results": {"fid": 0.85}, "protocol": "free", "num_gen": 1797,
        "detector": "local:models/judge.safetensors",
        "generated": {"fingerprint": legacy.load_network(run_folder).sha256}}) + "\n")
    done(run_folder, "hub", tmp_path / "x")
    card = huggingface_hub.ModelCard((tmp_path / "x" / "README.md").read_text()).data
    names = [r.metric_type for r in card.eval_results]
    assert "fid (judge.safetensors, 1797 images)" in names
    assert "fid" not in names


def test_a_tuned_network_has_not_the_metrics_of_the_one_it_comes_from(run_folder, tmp_path):
    path = run_folder / "network-snapshot-000002.pkl"
    checkpoint.save(path, checkpoint.load_plain(path) | {"tuned_to": {"target": "cat | 7.png"}, "score": None})
    done(path, "hub", tmp_path / "hub")
    page = (tmp_path / "hub" / "README.md").read_text()
    assert "None are recorded beside the file." in page
    assert "| tuned to | cat \\| 7.png |" in page


def test_a_folder_that_cannot_be_finished_leaves_nothing(run_folder, tmp_path, monkeypatch):
    written = hub_folder.atomic_file
    def fails(path):
        if Path(path).name == WEIGHTS_FILE:
            raise OSError(28, "No space left on device", str(path))
        return written(path)
    monkeypatch.setattr(hub_folder, "atomic_file", fails)
    assert "No space left" in refused(run_folder, "hub", tmp_path / "here" / "x")
    assert list((tmp_path / "here").iterdir()) == []


@pytest.fixture
def hub(run_folder, tmp_path, monkeypatch):
    """A hub on this machine with the model me/pets; gives what was asked of it."""
    done(run_folder, "hub", tmp_path / "hub" / "pets")
    asked = []

    def download(repo_id, filename, *, revision=None, local_files_only=False):
        asked.append((repo_id, filename, revision, local_files_only))
        if revision == "gone":
            raise type("RevisionNotFoundError", (Exception,), {})("404\nnothing")      # The real one wants a response.
        if repo_id != "me/pets":
            raise LocalEntryNotFoundError("Cannot find an appropriate cached snapshot folder.")
        return str(tmp_path / "hub" / "pets" / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    for name in ("STYLESAN_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")
    return asked


def test_networks_on_the_hub(hub, tmp_path, G, monkeypatch):
    assert_same_images(legacy.load_network("hf://me/pets"), G)
    assert_same_images(legacy.load_network("hf://me/pets@v1.0"), G)
    legacy.load_network(f"hf://me/pets@refs%2Fpr%2F1/{WEIGHTS_FILE}")
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    result = CliRunner().invoke(gen_images.main, ["--network=hf://me/pets", "--seeds=0", f"--outdir={tmp_path}"])
    assert result.exit_code == 0, result.output
    assert hub == [("me/pets", WEIGHTS_FILE, None, False), ("me/pets", WEIGHTS_FILE, "v1.0", False),
                   ("me/pets", WEIGHTS_FILE, "refs/pr/1", False), ("me/pets", WEIGHTS_FILE, None, True)]


@pytest.mark.parametrize(("address", "message"), [
    ("hf://me/other", "no copy is on this machine, and the hub was not asked or not reached"),
    ("hf://me/pets@gone", "there is no such revision: name a branch"),
    ("hf://me/pets/absent.pkl", "absent.pkl: no such file or folder"),
    ("hf://pets", "expected an address such as hf://user/name"),
    ("hf://me/pets@", "expected an address such as hf://user/name"),
    ("hf://", "expected an address such as hf://user/name"),
])
def test_what_the_hub_does_not_have_is_one_line(hub, address, message):
    with pytest.raises(UserError) as err:
        legacy.load_network(address)
    assert message in str(err.value)
    assert "\n" not in str(err.value)


def test_errors_of_the_hub_have_the_names_that_its_library_gives_them():
    assert all(hasattr(huggingface_hub.errors, name) for name in REMEDIES)


def test_the_library_of_the_hub_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        legacy.load_network("hf://me/pets")

#----------------------------------------------------------------------------
# ONNX.

@pytest.mark.slow
@pytest.mark.parametrize(("rotation", "c_dim", "width"), [(False, 3, 128), (True, 0, 4)])
def test_onnx_makes_our_images(tmp_path, rotation, c_dim, width):
    """Config T with classes, wide enough for tiles on processors, and config R without, by the command and by hand."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    G = small_generator(c_dim, rotation=rotation, channel_base=1 << 16, channel_max=width)
    checkpoint.save(tmp_path / "x.pkl", own_snapshot(G) | {"class_names": NAMES[:c_dim]})
    path = tmp_path / "x.onnx"
    assert "its images differ from ours by at most" in done(tmp_path / "x.pkl", "onnx", path)
    model = onnx.load(path)
    onnx.checker.check_model(model)
    assert model.opset_import[0].version == OPSET
    assert str(Path(__file__).parents[2]).encode() not in path.read_bytes()
    assert json.loads(model.metadata_props[0].value)["class_names"] == NAMES[:c_dim]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for num, psi in ((1, 1.0), (5, 0.7), (2, 0.0)):
        z, labels = torch.randn(num, G.z_dim), torch.arange(num) % max(c_dim, 1)
        z[-1] = 0           # Its length is zero but for an epsilon, which optimisers of graphs have thrown away.
        given = {"z": z.numpy(), "psi": np.array(psi, np.float32)} | ({"class": labels.numpy()} if c_dim else {})
        images, = session.run(None, given)
        assert np.abs(images - G(z, torch.eye(3)[labels] if c_dim else None, psi).numpy()).max() < TOLERANCE


@pytest.mark.parametrize("deviation", [0.5, float("nan")])
def test_onnx_that_differs_is_not_written(run_folder, tmp_path, monkeypatch, deviation):
    monkeypatch.setattr(export, "onnx_bytes", lambda *args: b"graph")
    monkeypatch.setattr(export, "largest_deviation", lambda *args: deviation)
    path = tmp_path / "x.onnx"
    assert f"differ from ours by at most {deviation}, more than 0.0001, so nothing" in refused(run_folder, "onnx", path)
    assert not path.exists()
    assert "not compared" in done(run_folder, "onnx", path, "--check=0")
    assert path.read_bytes() == b"graph"


def test_packages_of_onnx_may_be_missing(run_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert "pip install onnx onnxscript" in refused(run_folder, "onnx", tmp_path / "x.onnx")
    monkeypatch.setattr(export, "onnx_bytes", lambda *args: b"graph")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "onnxruntime is not installed: pip install" in done(run_folder, "onnx", tmp_path / "x.onnx")

#----------------------------------------------------------------------------
# Official names.

@pytest.mark.parametrize("snapshot", RECORDED)
def test_official_names_and_shapes(snapshot):
    """Against state dicts that were recorded from the official code, tensor by tensor; there the table has 10 rows."""
    recorded = {name.removeprefix("state/"): value for name, value in load_npz(f"{RECORDED[snapshot]}.npz").items()
                if name.startswith("state/")}
    G = legacy.load_network(DATA / f"{snapshot}.pkl").G_ema
    state = official_state(G, class_rows=10)
    assert set(state) == set(recorded)
    if G.c_dim == 0:                    # The unused table: as official networks of full size have it.
        assert official_state(G)[TABLE].shape == (1000, 320)
        del recorded[TABLE]
    for name, value in recorded.items():
        assert np.array_equal(state[name].numpy(), value), name


def fill(node: Persistent | torch.nn.Embedding, state: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Put the tensors of a state dict into the modules of an official file."""
    parts = vars(node) if isinstance(node, torch.nn.Module) else node.meta["state"]
    for kind in ("_parameters", "_buffers"):
        for name in parts[kind]:
            if parts[kind][name] is not None:
                value = state[f"{prefix}{name}"]
                parts[kind][name] = torch.nn.Parameter(value) if kind == "_parameters" else value
    for name, child in parts["_modules"].items():
        fill(child, state, f"{prefix}{name}.")


@pytest.mark.parametrize("c_dim", [0, 3])
def test_the_official_state_in_an_official_pickle_is_the_same_network(tmp_path, c_dim):
    G = small_generator(c_dim)
    checkpoint.save(tmp_path / "x.pkl", own_snapshot(G) | {"class_names": None})
    done(tmp_path / "x.pkl", "official", tmp_path / "x.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert content.keys() == {"G_ema"}
    assert len(content["G_ema"][TABLE]) == CLASS_ROWS
    node = official_generator(small_generator(c_dim), class_rows=CLASS_ROWS)
    fill(node, content["G_ema"])
    state = legacy.open_snapshot(dump(tmp_path / "official.pkl", {"G_ema": node}))["G_ema"]
    assert set(state) == set(G.state_dict())
    assert all(torch.equal(state[name], value) for name, value in G.state_dict().items())

#----------------------------------------------------------------------------
# Mistakes.

def test_what_is_at_dest_stays(run_folder, tmp_path):
    network, folder = run_folder / "network-snapshot-000002.pkl", tmp_path / "other"
    folder.mkdir()
    (folder / "file").write_text("mine")
    for kind, dest, args, message in (
            ("safetensors", folder / "file", (), "exists already: choose another name or add --overwrite"),
            ("safetensors", folder, ("--overwrite",), "is a folder: choose another name"),
            ("hub", folder / "file", ("--overwrite",), "is a file: choose another name"),
            ("hub", folder, (), "exists already"),
            ("hub", folder, ("--overwrite",), f"is no folder for the hub (it has no {WEIGHTS_FILE})"),
            ("official", network, ("--overwrite",), "is the network itself")):
        assert f"--dest={dest}: {message}" in refused(network, kind, dest, *args)
    assert (folder / "file").read_text() == "mine"
    done(network, "official", folder / "file", "--overwrite")
    assert "G_ema" in torch.load(folder / "file", weights_only=True)


def test_a_folder_for_the_hub_is_made_anew_around_what_else_is_in_it(run_folder, tmp_path):
    done(run_folder, "hub", tmp_path / "x")
    (tmp_path / "x" / ".gitattributes").write_text("mine")
    done(run_folder, "hub", tmp_path / "x", "--overwrite", "--license=mit")
    assert (tmp_path / "x" / ".gitattributes").read_text() == "mine"
    assert "license: mit" in (tmp_path / "x" / "README.md").read_text()
    assert "is the network itself" in refused(tmp_path / "x", "hub", tmp_path / "x", "--overwrite")


def test_a_place_where_nothing_can_be_is_one_line(run_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for kind in ("safetensors", "hub", "onnx", "official"):
        assert f"{tmp_path / 'file'} is a file: name a" in refused(run_folder, kind, tmp_path / "file" / "new" / "x")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(("kind", "args", "message"), [
    ("onnx", ["--license=mit"], "--license=mit: only --format=hub has a page"),
    ("hub", ["--license=My Own"], "--license=My Own: expected an identifier"),
    ("official", ["--check=0"], "--check=0: only --format=onnx is checked"),
    ("pickle", [], "'pickle' is not one of"),
])
def test_options_without_effect(run_folder, tmp_path, kind, args, message):
    assert message in refused(run_folder, kind, tmp_path / "x", *args)
    assert not (tmp_path / "x").exists()
