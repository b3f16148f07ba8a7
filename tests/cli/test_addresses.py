# SPDX-License-Identifier: Apache-2.0
"""https:// addresses in place of files: downloaded once, recorded, bounded, and read as safely as a file."""
import hashlib
import http.server
import json
import pickle
import threading
import types

import pytest
import torch
from click.testing import CliRunner

import calc_metrics
import gen_images
import train
from dnnlib import UserError, download
from dnnlib.download import FACTS_FILE, cache_dir, local_file
from torch_utils import checkpoint
from training.config import to_dict
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator
from training.run.formats import NETWORK_FORMAT

CONTENT = bytes(range(256)) * 100


class Handler(http.server.BaseHTTPRequestHandler):
    """'/name' answers with a file of the server; some names misbehave."""

    def do_GET(self):
        name = self.path.strip("/").partition("?")[0]
        self.server.asked.append(name)
        if name.startswith("to-"):
            self.send_response(302)
            self.send_header("Location", self.server.files[name])
            return self.end_headers()
        if name not in self.server.files:
            return self.send_error(404)
        data = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if name == "page" else "application/octet-stream")
        if name == "huge":
            self.send_header("Content-Length", str(1 << 50))
        elif name != "endless":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:len(data) // 2] if name == "cut" else data)
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    for name in ("STYLESAN_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("STYLESAN_CACHE", str(tmp_path / "cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files = {name: CONTENT for name in ("good", "page", "huge", "endless", "cut")}
        server.asked = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}"
        yield server
        server.shutdown()


def refusal(url: str) -> str:
    with pytest.raises(UserError) as info:
        local_file(url)
    assert "\n" not in str(info.value)
    assert not list(cache_dir().rglob("*.part"))
    return str(info.value)

#----------------------------------------------------------------------------

def test_a_file_is_downloaded_once_and_recorded(server, capsys):
    path = local_file(f"{server.url}/good?download=1")
    assert path.read_bytes() == CONTENT
    assert path.name == "good"
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert json.loads((path.parent / FACTS_FILE).read_text()) == {
        "url": f"{server.url}/good?download=1", "sha256": sha256, "size": len(CONTENT)}
    assert f"sha256 {sha256}" in capsys.readouterr().err
    assert local_file(f"{server.url}/good?download=1") == path
    assert server.asked == ["good"]
    assert capsys.readouterr().err == ""
    assert local_file(path) == path


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT[:-1] + b"x"])
def test_a_damaged_copy_is_fetched_anew(server, damage):
    path = local_file(f"{server.url}/good")
    path.write_bytes(damage)
    assert local_file(f"{server.url}/good").read_bytes() == CONTENT
    (path.parent / FACTS_FILE).write_text("[")
    assert local_file(f"{server.url}/good").read_bytes() == CONTENT
    assert len(server.asked) == 3


def test_offline_takes_what_was_downloaded(server, monkeypatch):
    path = local_file(f"{server.url}/good")
    monkeypatch.setenv("STYLESAN_OFFLINE", "1")
    assert local_file(f"{server.url}/good") == path
    assert "downloads are off (offline)" in refusal(f"{server.url}/cut")
    assert server.asked == ["good"]


def test_what_cannot_be_had_is_one_line(server, monkeypatch):
    assert "the server answers 404" in refusal(f"{server.url}/absent")
    assert "a web page, not a file" in refusal(f"{server.url}/page")
    assert "has 1048576.0 GiB, more than" in refusal(f"{server.url}/huge")
    assert "the connection broke off" in refusal(f"{server.url}/cut")
    assert server.asked.count("cut") == download.ATTEMPTS
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    assert "sends more than 1000 B" in refusal(f"{server.url}/endless")


def test_a_server_that_drips_is_left(server, monkeypatch):
    monkeypatch.setattr(download, "SLOW_SECONDS", -1)
    monkeypatch.setattr(download, "MIN_RATE", 1 << 40)
    assert "per second: try again later" in refusal(f"{server.url}/good")


def test_a_disk_without_room_is_told_before(server, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9))
    assert "has room for 9 B: make room" in refusal(f"{server.url}/good")


def test_addresses_that_are_not_safe(server):
    for url in ("http://example.org/x.pkl", "ftp://example.org/x", "https:///x", "http://[::1"):
        assert "https://" in refusal(url) or "not an address" in refusal(url)
    assert "secret" not in refusal("https://me:secret@example.org/x.pkl")
    server.files |= {"to-plain": "http://192.0.2.1/x", "to-good": "/good"}
    assert "must begin with https://" in refusal(f"{server.url}/to-plain")
    assert local_file(f"{server.url}/to-good").read_bytes() == CONTENT

#----------------------------------------------------------------------------
# The scripts.

@pytest.fixture
def network(server, tmp_path):
    torch.manual_seed(0)
    config = stem_config(16, 4, 128, 8, margin_size=4, w_dim=32)
    path = tmp_path / "net.pkl"
    checkpoint.save(path, {"format": NETWORK_FORMAT, "version": 1, "generator_config": to_dict(config),
                           "G_ema": Generator(config).state_dict(), "class_names": None, "progress": {}})
    server.files["net.pkl"] = path.read_bytes()
    server.files["evil.pkl"] = pickle.dumps({"G_ema": Evil()})
    return f"{server.url}/net.pkl"


class Evil:
    """Would write a file when a careless reader loads it."""

    def __reduce__(self):
        return exec, ("open('canary', 'w')",)


def test_every_script_takes_addresses(server, network, tmp_path, data32, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(gen_images.main, [f"--network={network}", "--seeds=0", "--outdir=out", "--device=cpu"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "seed0000.png").is_file()
    training = ["--cfg=stylegan3-t", f"--data={data32}", "--batch=4", "--outdir=runs", "--metrics=none", "--device=cpu",
                "--superres", "-n", "--backbones=tf_efficientnet_lite0:random"]
    result = CliRunner().invoke(train.main, [*training, f"--path_stem={network}"])
    assert result.exit_code == 0, result.output
    assert network in result.output             # The settings hold the address.
    assert server.asked == ["net.pkl"]
    for command, args in ((gen_images.main, ["--seeds=0", "--outdir=out", "--network={}"]),
                          (calc_metrics.main, ["--metrics=fid", "--num=4", f"--data={data32}", "--network={}",
                                               "--detector=vgg16:random"]),
                          (train.main, [*training, "--path_stem={}"]), (train.main, [*training[:-3], "--init-from={}"]),
                          (train.main, [*training[:-3], "--resume={}"])):
        result = CliRunner().invoke(command, [arg.format(network.replace("net", "evil")) for arg in args])
        assert result.exit_code == 2, result.output
        assert "exec" in result.output
        result = CliRunner().invoke(command, [arg.format(network.replace("net", "absent")) for arg in args])
        assert result.exit_code == 2
        assert "the server answers 404" in result.output.splitlines()[-1]
    assert server.asked.count("evil.pkl") == 1
    assert not (tmp_path / "canary").exists()


def test_reference_and_detector_take_addresses(server, tmp_path, data32):
    """Up to the reader of such files, which says what it makes of them."""
    for name, value, said in (("ref", "good", "/good"), ("ref", "absent", "404"), ("detector", "good", "/good"),
                              ("detector", "absent", "404")):
        other = [f"--ref={data32}"] if name == "detector" else ["--detector=vgg16:random"]
        result = CliRunner().invoke(calc_metrics.main, [
            f"--images={data32}", *other, f"--{name}={server.url}/{value}", "--metrics=kid", "--num=4", "--no-cache"])
        assert result.exit_code == 2, result.output
        assert said in result.output.splitlines()[-1]
    assert server.asked == ["good", "absent", "absent"]
