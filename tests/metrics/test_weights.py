# SPDX-License-Identifier: Apache-2.0
"""Files of weights: every place they are looked for, downloads from a server on this machine, and what is refused."""
import dataclasses
import hashlib
import http.server
import io
import re
import threading

import pytest
import torch
from click.testing import CliRunner

from dnnlib import UserError, download
from dnnlib.download import Asset, find_asset, locate, torch_hub_dir
from metrics import prefetch
from metrics.detectors import DETECTORS, VGG16_FILE, load_detector, require
from metrics.options import MetricOptions
from metrics.protocols import METRICS
from tests.metrics.helpers import random_images, tiny_kind

CPU = torch.device("cpu")
CONTENT = b"weights " * 1000
OTHER = b"something else"


def sha(data):
    return hashlib.sha256(data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """'/good' answers with the content; '/cut' breaks off in the middle; '/resumable' does so the first time."""

    def do_GET(self):
        name, data = self.path.strip("/"), self.server.content
        self.server.asked.append((name, self.headers.get("Range")))
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if name == "resumable" else 0
        if name == "absent":
            return self.send_error(404)
        if name == "busy":
            return self.send_error(503)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        is_cut = name == "cut" or name == "resumable" and not start
        self.wfile.write(data[start : len(data) // 2 if is_cut else None])
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("STYLESAN_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.asked = CONTENT, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def asset(url="https://example.org/w.pth", **more):
    return Asset(**{"filename": "w.pth", "url": url, "sha256": sha(CONTENT), **more})


def in_cache(tmp_path):
    return tmp_path / "cache" / "downloads" / "w.pth"


def put(path, data=CONTENT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path

#----------------------------------------------------------------------------

class TestDownload:
    def test_good(self, server, tmp_path):
        found = find_asset(asset(f"{server.url}/good"))
        assert found.path == in_cache(tmp_path)
        assert found.path.read_bytes() == CONTENT
        assert found.verified
        assert find_asset(asset(f"{server.url}/good")) == found
        assert len(server.asked) == 1                                   # The second time it is there.
        assert [p.name for p in found.path.parent.iterdir()] == ["w.pth"]

    def test_into_a_folder(self, server, tmp_path):
        assert find_asset(asset(f"{server.url}/good"), into=tmp_path / "mine").path == tmp_path / "mine" / "w.pth"

    def test_goes_on_where_it_broke_off(self, server, monkeypatch):
        monkeypatch.setattr(download, "CHUNK_BYTES", 1000)              # What was received of a chunk is lost.
        assert find_asset(asset(f"{server.url}/resumable")).path.read_bytes() == CONTENT
        assert [wanted for _name, wanted in server.asked] == [None, f"bytes={len(CONTENT) // 2}-"]

    @pytest.mark.parametrize(("name", "reason", "num_asked"), [
        ("absent", "the server answers 404", 1), ("busy", "the server answers 503", 5),
        ("cut", "the connection broke off", 5)])
    def test_failures_are_one_line(self, server, tmp_path, name, reason, num_asked):
        self.check(f"{server.url}/{name}", reason, tmp_path)
        assert len(server.asked) == num_asked

    def test_no_server(self, server, tmp_path):
        server.server_close()
        server.shutdown()
        self.check(f"{server.url}/good", "no connection", tmp_path)

    def test_wrong_content(self, server, tmp_path):
        server.content = OTHER
        self.check(f"{server.url}/good", f"what the server sent has sha256 {sha(OTHER)}", tmp_path)
        assert list(in_cache(tmp_path).parent.iterdir()) == []          # Nothing is left to be taken for whole.

    def test_wrong_content_is_never_accepted(self, server, tmp_path):
        server.content = OTHER
        with pytest.raises(UserError, match="what the server sent"):
            find_asset(asset(f"{server.url}/good"), allow_unverified=True)

    def test_folder_that_cannot_be_written(self, server, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(UserError, match="cannot be written to"):
            find_asset(asset(f"{server.url}/good"), into=tmp_path / "file" / "folder")

    @pytest.mark.parametrize("how", ["argument", "STYLESAN_OFFLINE", "HF_HUB_OFFLINE"])
    def test_offline(self, server, tmp_path, monkeypatch, how):
        if how != "argument":
            monkeypatch.setenv(how, "1")
        offline = True if how == "argument" else None
        self.check(f"{server.url}/good", "downloads are off", tmp_path, offline)
        assert server.asked == []

    def check(self, url, reason, tmp_path, offline=None):
        with pytest.raises(UserError) as info:
            find_asset(asset(url), offline=offline)
        for part in ("w.pth: ", reason, url, sha(CONTENT), str(in_cache(tmp_path)), "--weights", "STYLESAN_WEIGHTS"):
            assert part in str(info.value)
        assert "\n" not in str(info.value)
        assert not in_cache(tmp_path).exists()

#----------------------------------------------------------------------------

class TestPlaces:
    @pytest.fixture
    def places(self, tmp_path, monkeypatch):
        """Folder by name, in the order in which they are looked in."""
        (tmp_path / "env").mkdir()
        monkeypatch.setenv("STYLESAN_WEIGHTS", str(tmp_path / "env"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        return {"flag": tmp_path / "flag", "env": tmp_path / "env", "cache": in_cache(tmp_path).parent,
                "hub": tmp_path / "torch" / "hub" / "checkpoints"}

    @pytest.mark.parametrize("name", ["flag", "env", "cache", "hub"])
    def test_each(self, places, name):
        path = put(places[name] / "w.pth")
        found = find_asset(asset(in_torch_hub=True), [places["flag"]])
        assert (found.path, found.sha256, found.verified) == (path, sha(CONTENT), True)

    def test_order(self, places):
        for name in reversed(places):
            path = put(places[name] / "w.pth")
            assert locate(asset(in_torch_hub=True), [places["flag"]]).path == path

    def test_torch_hub_only_where_it_may_be(self, places):
        put(places["hub"] / "w.pth")
        assert locate(asset()) is None

    @pytest.mark.parametrize("name", ["flag", "env", "cache", "hub"])
    def test_another_name_of_the_same_content(self, places, name):
        path = put(places[name] / "theirs.pth")
        known = asset(in_torch_hub=True, other_names=("theirs.pth",))
        assert locate(known, [places["flag"]]).path == path
        put(path, OTHER)
        assert locate(known, [places["flag"]]) is None
        assert locate(known, [places["flag"]], allow_unverified=True) is None

    def test_wrong_content_in_torch_hub_is_passed_over(self, places):
        put(places["hub"] / "w.pth", OTHER)
        with pytest.raises(UserError, match="not on this machine"):
            find_asset(asset(in_torch_hub=True))

    @pytest.mark.parametrize("name", ["flag", "env", "cache"])
    def test_wrong_content_is_refused(self, places, name):
        path = put(places[name] / "w.pth", OTHER)
        match = f"{re.escape(str(path))}: sha256 is {sha(OTHER)}, expected {sha(CONTENT)}.*--allow-unverified-weights"
        with pytest.raises(UserError, match=match):
            find_asset(asset(), [places["flag"]])
        found = find_asset(asset(), [places["flag"]], allow_unverified=True)
        assert (found.path, found.sha256, found.verified) == (path, sha(OTHER), False)

    def test_torch_hubs_own_rules(self, tmp_path, monkeypatch):
        for names, folder in [((), ".cache/torch"), (("XDG_CACHE_HOME",), "xdg/torch"),
                              (("XDG_CACHE_HOME", "TORCH_HOME"), "torch_home")]:
            monkeypatch.setenv("HOME", str(tmp_path))
            for name in ("XDG_CACHE_HOME", "TORCH_HOME"):
                monkeypatch.delenv(name, raising=False)
            for name in names:
                value = {"XDG_CACHE_HOME": "xdg", "TORCH_HOME": "torch_home"}[name]
                monkeypatch.setenv(name, str(tmp_path / value))
            assert torch_hub_dir() == tmp_path / folder / "hub" / "checkpoints"
            assert str(torch_hub_dir().parent) == torch.hub.get_dir()

#----------------------------------------------------------------------------

def file_of(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.fixture
def published(replace):
    """A small network registered with a file that 'is published'; returns that file's content."""
    net = tiny_kind().make_net()
    data = file_of(net.state_dict())
    kind = dataclasses.replace(tiny_kind(), asset=asset(sha256=sha(data)))
    replace(DETECTORS, "small", kind)
    return data


class TestDetector:
    def test_verified(self, published, tmp_path, capsys):
        put(tmp_path / "w.pth", published)
        detector = load_detector("small", CPU, str(tmp_path))
        assert (detector.sha256, detector.verified) == (sha(published), True)
        assert capsys.readouterr().err == ""

    def test_downloaded(self, published, server, replace):
        server.content = published
        kind = DETECTORS["small"]
        replace(DETECTORS, "small", dataclasses.replace(
            kind, asset=dataclasses.replace(kind.asset, url=f"{server.url}/good")))
        assert load_detector("small", CPU).sha256 == sha(published)

    def test_unverified(self, published, tmp_path, capsys):
        other = file_of(tiny_kind().make_net().state_dict())
        put(tmp_path / "w.pth", other)
        with pytest.raises(UserError, match="sha256 is"):
            load_detector("small", CPU, str(tmp_path))
        with pytest.raises(UserError, match="sha256 is"):
            require("small", str(tmp_path))
        assert require("small", str(tmp_path), allow_unverified=True) == tmp_path / "w.pth"
        detector = load_detector("small", CPU, str(tmp_path), allow_unverified=True)
        assert (detector.sha256, detector.verified) == (sha(other), False)
        warning = capsys.readouterr().err
        assert "Warning: " in warning
        assert sha(other) in warning

    @pytest.mark.parametrize(("change", "match"), [
        (lambda state: state.pop("fc.bias"), r"lacks fc\.bias"),
        (lambda state: state.update(more=torch.zeros(1)), "has besides more"),
        (lambda state: state.update({"fc.bias": torch.zeros(17)}), r"other shape of fc\.bias"),
        (lambda state: state.clear(), "no tensors by name")])
    def test_tensors_that_do_not_fit(self, published, tmp_path, change, match):
        state = dict(tiny_kind().make_net().state_dict())
        change(state)
        put(tmp_path / "w.pth", file_of(state))
        with pytest.raises(UserError, match=f"w.pth: its tensors do not fit the network of small .*{match}"):
            load_detector("small", CPU, str(tmp_path), allow_unverified=True)

    @pytest.mark.parametrize(("change", "match"), [
        ({"epoch": 3}, "holds 3 as 'epoch', but must hold tensors by name"),
        ({"fc.bias": torch.full([16], torch.inf)}, r"fc\.bias is not finite"),
        ({"fc.bias": torch.zeros(16, dtype=torch.complex64)}, "which no network has")])
    def test_content_that_is_no_state(self, published, tmp_path, change, match):
        put(tmp_path / "w.pth", file_of({**tiny_kind().make_net().state_dict(), **change}))
        with pytest.raises(UserError, match=f"w.pth: .*{match}.*: fetch it again"):
            load_detector("small", CPU, str(tmp_path), allow_unverified=True)

    def test_half_precision_files_compute_in_float32(self, published, tmp_path):
        state = {name: x.half() for name, x in tiny_kind().make_net().state_dict().items()}
        put(tmp_path / "w.pth", file_of(state))
        detector = load_detector("small", CPU, str(tmp_path), allow_unverified=True)
        assert detector.features(torch.from_numpy(random_images(2)))["pool"].dtype == torch.float32

    def test_folder_that_is_not_there(self, published, tmp_path):
        with pytest.raises(UserError, match=r"--weights=.*/absent: no such folder: name one with w\.pth"):
            load_detector("small", CPU, str(tmp_path / "absent"))

    def test_code_in_a_file_is_not_run(self, published, tmp_path):
        class Evil:
            def __reduce__(self):
                return pytest.fail, ("code ran",)

        put(tmp_path / "w.pth", file_of({"x": Evil()}))
        with pytest.raises(UserError, match="asks for _pytest.*: nothing was run"):
            load_detector("small", CPU, str(tmp_path), allow_unverified=True)

#----------------------------------------------------------------------------

class TestRandomInception:
    def test_the_published_pickle_is_not_read(self, tmp_path):
        put(tmp_path / "inception_rand_full.pkl", b"\x80\x04.")
        with pytest.raises(UserError) as info:
            require("inception-rand", str(tmp_path), offline=False)     # Nor is it fetched.
        text = str(info.value)
        for part in ("inception_rand_full.pth", "runs code", "torch-fidelity's names", "--weights", "rfid_random"):
            assert part in text
        assert "\n" not in text

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
    def test_a_plain_state_dict_is_taken(self, tmp_path, replace, capsys, suffix):
        import safetensors.torch
        replace(DETECTORS, "inception-rand", dataclasses.replace(
            tiny_kind(), asset=DETECTORS["inception-rand"].asset))
        state = tiny_kind().make_net().state_dict()
        put(tmp_path / f"inception_rand_full{suffix}",
            file_of(state) if suffix == ".pth" else safetensors.torch.save(state))
        detector = load_detector("inception-rand", CPU, str(tmp_path))
        assert detector.sha256 == sha((tmp_path / f"inception_rand_full{suffix}").read_bytes())
        assert not detector.verified
        assert "unverified weights of inception-rand" in capsys.readouterr().err

#----------------------------------------------------------------------------

class TestPrefetch:
    @pytest.fixture
    def run(self):
        def run(*args):
            return CliRunner().invoke(prefetch.main, list(args))
        return run

    @pytest.fixture
    def fetchable(self, server, replace):
        """The Inception network's file comes from the local server."""
        kind = DETECTORS["inception-2015-12-05"]
        small = dataclasses.replace(kind.asset, url=f"{server.url}/good", sha256=sha(CONTENT), size=len(CONTENT))
        replace(DETECTORS, "inception-2015-12-05", dataclasses.replace(kind, asset=small))
        return small

    def test_fetches_into_the_folder_that_the_run_reads(self, run, fetchable, server, tmp_path):
        result = run("--metrics=adm", f"--weights={tmp_path / 'w'}")
        path = tmp_path / "w" / fetchable.filename
        assert result.exit_code == 0, result.output
        assert path.read_bytes() == CONTENT
        for part in (fetchable.filename, fetchable.url, fetchable.sha256, str(path), "fetched", "7.8 KiB",
                     "adm_is50k, adm_fid50k, adm_sfid50k, adm_pr50k"):
            assert part in result.stdout
        again = run("--metrics=adm", f"--weights={tmp_path / 'w'}", "--offline")
        assert "on this machine" in again.stdout
        assert len(server.asked) == 1
        assert require("inception-2015-12-05", str(tmp_path / "w"), offline=True) == path

    def test_without_a_folder_into_the_cache(self, run, fetchable, tmp_path):
        assert run("--metrics=is50k").exit_code == 0
        assert (tmp_path / "cache" / "downloads" / fetchable.filename).is_file()

    def test_dry_run(self, run, fetchable, server):
        result = run("--metrics=fid50k_full,rfid50k_full", "--dry-run")
        assert result.exit_code == 0
        assert "to be fetched" in result.stdout
        assert "missing, and not to be fetched" in result.stdout
        assert server.asked == []

    def test_one_failure_does_not_keep_the_others(self, run, fetchable, tmp_path):
        result = run("--metrics=rfid50k_full,fid50k_full", f"--weights={tmp_path}")
        assert result.exit_code == 2
        assert "inception_rand_full.pth: it is not on this machine" in result.stderr
        assert (tmp_path / fetchable.filename).is_file()

    def test_several_missing(self, run):
        result = run("--metrics=fid50k_full,fd_dinov2_50k,pr50k3_full", "--offline")
        assert result.exit_code == 2
        assert "3 of 3 files are missing" in result.stderr
        assert result.stdout.count("state   missing") == 3

    def test_nothing_needed(self, run):
        result = run("--metrics=rfid_random")
        assert (result.exit_code, result.stdout) == (0, "rfid_random: no files are needed\n")

    def test_unknown_names(self, run):
        assert "unknown metric 'fdi'" in run("--metrics=fdi").stderr
        assert "unknown detector" in run("--metrics=fid", "--detector=incept").stderr

    def test_unverified_is_said(self, run, tmp_path):
        put(tmp_path / "vgg16-397923af.pth", OTHER)
        assert "sha256 is" in run("--metrics=pr50k3_full", f"--weights={tmp_path}").stderr
        result = run("--metrics=pr50k3_full", f"--weights={tmp_path}", "--allow-unverified-weights")
        assert "on this machine, unverified" in result.stdout

    def test_every_metric_can_be_listed(self):
        """Those of the generator as well; only networks without a default have to be named."""
        names = [name for name in METRICS if name not in ("accuracy", "fd", "probe_accuracy")]
        needs = prefetch.prefetch(names, MetricOptions(offline=True))
        files = {need.asset.filename: need.users for need in needs}
        assert "ppl2_wend" in files["weights-vgg16-lpips.pth"]
        assert {"ppl2_wend", "pr50k3_full"} <= set(files[VGG16_FILE.filename])
        assert all(need.asset.url.startswith("https://") for need in needs)
