# SPDX-License-Identifier: Apache-2.0
"""Files of our own formats in which something was changed: one line or success, nothing else, and little memory."""
import gc
import json
import math
import pickle
import random
import struct
import weakref
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import legacy
from dnnlib import UserError
from metrics.detectors import load_detector
from metrics.references import load_statistics, read_cache
from tests.torch_utils.crafted import (
    STRANGE_TENSORS,
    VALUES,
    changed,
    little_memory,
    outcome,
    places,
    rewritten,
    small_generator,
    snapshot_of,
    state_of,
    tensors_like,
    without,
)
from torch_utils import checkpoint, pickle_values
from torch_utils.arrays import open_npz, read_npy
from torch_utils.nested import first_nonfinite
from torch_utils.own_network import OwnNetwork, load_own_network, own_config, save_own_network
from torch_utils.schema import Unfit, record, shown, whole
from torch_utils.weights import HEADER_KEY, read_weights
from training.config import GeneratorConfig, from_dict
from training.networks_stylegan3 import Generator
from training.run.formats import check_snapshot, check_state, read_state

CPU = torch.device("cpu")

#----------------------------------------------------------------------------
# Content: every value in turn.


@pytest.fixture(scope="module")
def G() -> Generator:
    return small_generator()


def refusals(check, content, is_usable=lambda content: None, leave=(), kinds=tuple(VALUES)) -> dict:
    """(place, what was done) -> the line, or None where the change was taken. Entries of `leave` are changed whole."""
    found = {}

    def attempt(place, what, candidate):
        try:
            check(candidate)
        except Unfit as err:
            found[place, what] = str(err)
        else:
            is_usable(candidate)
            found[place, what] = None

    for place in places(content):
        if place[0] in leave and len(place) > 1:
            continue
        value = content
        for key in place:
            value = value[key]
        values = {what: VALUES[what] for what in kinds}
        if isinstance(value, torch.Tensor):
            plain = ("nothing", "one half", "text", "list", "dict")
            values = tensors_like(value) | {what: VALUES[what] for what in plain}
        for what, new in values.items():
            attempt(place, what, changed(content, place, new))
        attempt(place, "absent", without(content, place))
    assert all(line is None or (len(line) < 500 and "\n" not in line) for line in found.values())
    return found


@pytest.mark.slow
def test_snapshots(G):
    content = snapshot_of(G)
    check_snapshot(content)

    def build(candidate):
        Generator(from_dict(GeneratorConfig, candidate["generator_config"])).load_state_dict(candidate["G_ema"])

    lines = refusals(check_snapshot, content, build)
    assert len(lines) > 1000
    for place, what in lines:
        if place[0] == "generator_config" and len(place) > 1 and what in ("nan", "inf", "text", "deep", "huge", "list"):
            is_text = what == "text" and place[-1] == "name"
            assert lines[place, what] or is_text or place[-1] in ("channel_base", "channel_max"), (place, what)
        if place[0] in ("G", "G_ema") and len(place) == 2:
            taken = what in ("double", "half", "parameter")
            assert (lines[place, what] is None) == taken, (place, what, lines[place, what])
    assert lines[("generator_config", "layers", 0, "is_torgb"), "zero"] == (
        "generator_config.layers[0].is_torgb is 0, but must be true or false")
    assert lines[("generator_config", "z_dim"), "true"] == (
        "generator_config.z_dim is True, but must be a whole number from 1 to 1048576")
    assert lines[("class_names",), "list of lists"] == (
        "class_names[0] is a list, but must be a text of at most 10000 characters")
    assert lines[("class_names", 1), "absent"] == "class_names has 1 names for 2 classes"
    assert lines[("G_ema",), "absent"] == "the file lacks G_ema"


@pytest.mark.slow
def test_states(G):
    content, shape = state_of(G)
    check_state(content, shape)
    check_state(content)
    lines = refusals(lambda candidate: check_state(candidate, shape), content, leave=("generator_config",),
                     kinds=("nothing", "minus one", "huge", "nan", "true", "text", "list", "numbers as keys", "deep"))
    assert len(lines) > 400
    for place, what in lines:
        if place[0] in ("G", "G_ema", "D") and len(place) == 2:
            taken = what == "parameter" or (what == "double" and content[place[0]][place[1]].dtype == torch.float64)
            assert (lines[place, what] is None) == taken, (place, what, lines[place, what])
    for place in (("optimizers",), ("optimizers", "G"), ("optimizers", "D", "state"), ("counters",), ("pl_mean",)):
        for what in ("absent", "nothing", "list", "text"):
            assert lines[place, what], (place, what)
    assert lines[("optimizers", "D"), "absent"] == "optimizers lacks D"
    assert "exp_avg is not finite" in lines[("optimizers", "D", "state", 0, "exp_avg"), "not finite"]
    assert lines[("counters", "cur_nimg"), "true"] == (
        "counters.cur_nimg is True, but must be a whole number from 0 to 1000000000000000")
    with pytest.raises(Unfit, match="counters has unknown entries: 'G'"):
        check_state(changed(content, ("counters",), content["counters"] | {"G": 3}), shape)


@pytest.mark.parametrize(("change", "match"), [
    ({"filter_size": 200}, "filters of more than 256 taps"),
    ({"img_resolution": 64}, "make images"),
    ({"channel_base": 10 ** 9, "channel_max": 10 ** 9}, "would make .* channels"),
    ({"num_frozen_layers": 200}, "200 of its"),
    ({"margin_size": 1000}, "margins of 1000 pixels"),
    ({"more": 1}, "unknown entries: more"),
])
def test_settings_that_no_tensor_bears_out(G, change, match):
    content = snapshot_of(G)
    with pytest.raises(Unfit, match=match):
        check_snapshot(content | {"generator_config": content["generator_config"] | change})


@pytest.mark.parametrize(("layer", "value"), [(0, True), (3, False)])
def test_layers_that_no_stage_can_keep(G, layer, value):
    place = ("generator_config", "layers", layer, "is_critically_sampled")
    with pytest.raises(Unfit, match="critically sampled layers must be the last ones"):
        check_snapshot(changed(snapshot_of(G), place, value))


@pytest.mark.parametrize("size", [1 << 15, 1 << 20])
def test_layers_that_ask_for_terabytes(G, size):
    """Maps are not in the file. Their sizes agree with each other here, and are as large as the settings want."""
    content = snapshot_of(G)
    config = content["generator_config"]
    layers = [layer | {"in_size": size, "out_size": size} for layer in config["layers"]]
    config |= {"layers": layers, "input": config["input"] | {"size": size}, "img_resolution": size}
    with pytest.raises(Unfit, match="elements, more than can be computed"):
        check_snapshot(content | {"generator_config": config})

#----------------------------------------------------------------------------
# Files of torch.save.


@pytest.fixture(scope="module")
def files(G, tmp_path_factory):
    """A valid snapshot and a valid state, as bytes."""
    folder = tmp_path_factory.mktemp("valid")
    checkpoint.save(folder / "snapshot", snapshot_of(G))
    content, shape = state_of(G)
    checkpoint.save(folder / "state", content)
    return {"snapshot": (folder / "snapshot").read_bytes(), "state": (folder / "state").read_bytes(), "shape": shape}


def readers(path: Path, shape):
    return {"snapshot": lambda: legacy.load_network(path), "state": lambda: read_state(path, shape)}


@pytest.mark.filterwarnings("ignore")       # PyTorch tells that it may change such tensors.
def test_tensors_that_only_files_hold(G, tmp_path):
    for kind, content in (("snapshot", snapshot_of(G)), ("state", state_of(G)[0])):
        name = next(iter(content["G"]))
        for what, make in STRANGE_TENSORS.items():
            for place in (("G_ema", name), ("more",)):
                path = tmp_path / "x.pkl"
                whole_content = changed(content, place, make()) if len(place) > 1 else content | {"more": make()}
                torch.save(whole_content, path)
                with little_memory():
                    line = outcome(readers(path, None)[kind], str(path))
                # A few megabytes of overlapping rows are within what an entry of a later version may take.
                assert line or (what == "overlapping" and place == ("more",)), (kind, what, place)


@pytest.mark.parametrize("kind", ["snapshot", "state"])
def test_packed_archives(files, tmp_path, kind):
    """Members that unpack to a thousand times their size."""
    for packed in ("data.pkl", "data/0", "data/1", "version"):
        path = tmp_path / "x.pkl"
        path.write_bytes(rewritten(files[kind], lambda name, content, packed=packed: (
            (content + b"\0" * (1 << 20), zipfile.ZIP_DEFLATED) if name.endswith("/" + packed) else
            (content, zipfile.ZIP_STORED))))
        line = outcome(readers(path, files["shape"])[kind], str(path))
        assert line is None if packed == "version" else "packed members" in line


@pytest.mark.parametrize("kind", ["snapshot", "state"])
def test_damaged_bytes(files, tmp_path, kind):
    """Bytes changed, left out, added: at random, with a seed."""
    data, rng, path = files[kind], random.Random(0), tmp_path / "x.pkl"
    read = readers(path, files["shape"])[kind]
    at_names = [i for i in range(len(data)) if data.startswith(b"PK", i)]
    lines = []
    with little_memory():
        for number in range(150):
            position = rng.choice(at_names) + rng.randrange(46) if number % 3 == 0 else rng.randrange(len(data))
            cut = rng.choice((0, 1, 100))
            path.write_bytes(data[:position] + rng.randbytes(rng.choice((0, 1, 4))) + data[position + cut:])
            lines.append(outcome(read, str(path)))
        for size in (0, 1, 4, 100, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            assert outcome(read, str(path))
    assert sum(line is not None for line in lines) > 100


def pickle_as_archive(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", "little")


# Opcodes that leave hundreds of bytes each, calls that allocate, numbers that cannot be printed.
HOSTILE = {
    "sets": b"\x80\x04(" + b"\x8f" * 200_000 + b"t.",
    "memo": b"\x80\x04N" + b"\x94" * 200_000 + b".",
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n" + b"\x8a\x05\x00\xe4\x0b\x54\x02" + b"\x85R.",
    "tensor": b"\x80\x02ctorch\nTensor\n" + b"\x8a\x05\x00\xe4\x0b\x54\x02" + b"\x85R.",
    "doubled": b"\x80\x02]" + b"2a" * 100 + b".",
    "key": b"\x80\x02}" + b"\x8b" + struct.pack("<i", 10_000) + b"\x7f" * 10_000 + b"Ns.",
    "cycle": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles(tmp_path, monkeypatch, what):
    monkeypatch.setattr(pickle_values, "COPIES_EXTRA", 4 << 20)     # So that the limit is reached in little time.
    path = tmp_path / "x.pkl"
    pickle_as_archive(path, HOSTILE[what])
    with little_memory():
        for read in (read_weights, legacy.open_snapshot, load_statistics)[:1 if what in ("sets", "memo") else 3]:
            assert outcome(lambda read=read: read(path), str(path))


def test_lists_in_lists(G, tmp_path):
    """A few hundred bytes that are 100^10 values if one walks through them."""
    many = [1]
    for _ in range(10):
        many = [many] * 100
    deep = [[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]
    for content, taken in ((many, False), ([[1] * 1000] * 50, True), (deep, False)):
        torch.save(snapshot_of(G) | {"more": content}, tmp_path / "x.pkl")
        line = outcome(lambda: legacy.load_network(tmp_path / "x.pkl"), str(tmp_path))
        assert line is None if taken else "beyond measure" in line


def test_what_is_mapped_is_what_is_copied(files, tmp_path):
    path = tmp_path / "x.pkl"
    path.write_bytes(files["snapshot"])
    copied, mapped = (checkpoint.load(path, "stylesan-xl-network", mmap=mmap) for mmap in (False, True))
    mapped["G_ema"]["mapping.fc0.weight"][0] = 7                # A copy of the page; the file stays.
    assert path.read_bytes() == files["snapshot"]
    assert (copied["G_ema"]["mapping.fc0.weight"][0] != 7).all()
    assert copied["G"] is copied["G_ema"]                       # What was one object is one object.
    for name, value in torch.load(path, weights_only=True)["G_ema"].items():
        assert torch.equal(copied["G_ema"][name], value)

def test_what_was_read_goes_at_once(files, tmp_path):
    """A state is gigabytes: nothing may keep it until the garbage is collected."""
    path = tmp_path / "x.pkl"
    path.write_bytes(files["snapshot"])
    gc.disable()
    try:
        content = legacy.open_snapshot(path)
        there = weakref.ref(content["G_ema"]["mapping.fc0.weight"])
        assert there() is not None
        del content
        assert there() is None
    finally:
        gc.enable()

#----------------------------------------------------------------------------
# Networks of your own: detectors, feature networks, classifiers.


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> bytes:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge") / "x.safetensors"
    save_own_network(path, OwnNetwork(own_config(2, 16, (4, 6), ["a", "b"])), {"data": "digits"})
    return path.read_bytes()


def test_own_networks(judge, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(judge)
    state, header = safetensors.torch.load(judge), load_own_network(path)
    header = {"format": "stylesan-xl/local-network/1", "config": header.config, "metadata": header.metadata}
    refused = set()

    def attempt(place, what, tensors, content):
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(safetensors.torch.save(tensors, {HEADER_KEY: text}))
        if outcome(lambda: load_own_network(path), str(path)):
            refused.add((place, what))

    with little_memory():
        for place in places(header):
            for what, value in VALUES.items():
                if what not in ("very long", "endless", "tensor", "nan tensor"):        # JSON cannot hold them.
                    attempt(place, what, state, changed(header, place, value))
            attempt(place, "absent", state, without(header, place))
        for name, tensor in state.items():
            for what, value in tensors_like(tensor).items():
                attempt(name, what, {**state, name: value.detach().contiguous()}, header)
            attempt(name, "absent", {key: x for key, x in state.items() if key != name}, header)
        attempt("header", "deep", state, "[" * 100_000)
        attempt("header", "long number", state, json.dumps(header).replace("16", "9" * 5000))
        attempt("name", "more", {**state, "more": torch.zeros(1)}, header)
    names = [place for place, _ in refused if isinstance(place, str)]
    assert set(state) | {"header", "name"} == set(names)
    for what in ("huge", "nan", "text", "true", "minus one", "list", "absent"):
        for key in ("num_classes", "input_resolution", "widths"):
            assert (("config", key), what) in refused
    taken = {what for name in state for what in tensors_like(state[name]) if (name, what) not in refused}
    assert taken <= {"double", "half", "parameter", "integer", "bytes"}     # The last two: the counters of BatchNorm.
    path.write_bytes(judge)
    assert load_detector(str(path), CPU).num_classes == 2


@pytest.mark.parametrize(("resolution", "widths"), [(100_000, (4, 6)), (4096, (8, 8)), (2048, (2000, 4))])
def test_a_small_network_of_large_maps(tmp_path, resolution, widths):
    """850 KB of weights can ask for gigabytes of maps."""
    net = OwnNetwork(own_config(2, 16, widths))
    path = tmp_path / "x.safetensors"
    header = {"format": "stylesan-xl/local-network/1", "config": net.config | {"input_resolution": resolution}}
    safetensors.torch.save_file(net.state_dict(), path, {HEADER_KEY: json.dumps(header)})
    with little_memory():
        assert outcome(lambda: load_detector(str(path), CPU), str(path))


def test_weights(tmp_path):
    """Weights of feature networks and detectors that others publish."""
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"x{suffix}"
        for value, match in ((torch.zeros(3), None), (torch.full([3], math.nan), "not finite"),
                             (torch.zeros(3).to(torch.float8_e4m3fn), "type.* no network has|damaged")):
            state = {"a": value}
            torch.save(state, path) if suffix == ".pth" else safetensors.torch.save_file(state, path)
            if match is None:
                assert torch.equal(read_weights(path)["a"], value)
            else:
                with pytest.raises(UserError, match=match):
                    read_weights(path)

#----------------------------------------------------------------------------
# Arrays: references, caches, tables.


def reference(folder: Path, **change) -> dict:
    metadata = {"format": "stylesan-xl/reference/2", "ddof": 1, "num_images": 9, "images_fingerprint": "f",
                "resolution": 8, "crop": None, "statistics": [
                    {"keys": ["mu", "sigma"], "detector": "x", "detector_sha256": "y", "output": "pool"}]}
    return {"mu": np.zeros(3), "sigma": np.eye(3), "num_images": np.array(9), "ddof": np.array(1),
            "metadata": metadata, **change}


def test_references(tmp_path):
    path, content = tmp_path / "x.npz", reference(tmp_path)
    arrays = {"text": np.array("x"), "nan": np.full([3], np.nan), "empty": np.zeros([0]), "wide": np.zeros([3, 3, 3]),
              "object": np.array([{}]), "complex": np.zeros(3, complex), "zero": np.array(0), "minus": np.array(-5),
              "huge": np.array(2 ** 62), "structure": np.zeros(3, dtype=[("a", "f8")]), "half": np.array(0.5)}
    lines = {}
    with little_memory():
        for key in places(content):
            values = VALUES if key[0] == "metadata" else arrays
            for what, value in values.items():
                if what in ("endless", "tensor", "nan tensor", "very long"):
                    continue
                new = changed(content, key, value)
                new["metadata"] = json.dumps(new["metadata"])
                np.savez(path, **new)
                lines[key, what] = outcome(lambda: load_statistics(path), str(path))
                outcome(lambda: read_cache(path))
    assert all(lines[("metadata", "statistics"), what] for what in ("text", "dict", "nothing", "list", "deep"))
    assert lines[("ddof",), "minus"]
    entry = content["metadata"]["statistics"][0]
    for entries in ([entry] * 2, [entry | {"keys": ["mu", str(i)]} for i in range(1000)]):
        np.savez(path, **content | {"metadata": json.dumps(content["metadata"] | {"statistics": entries})})
        assert outcome(lambda: load_statistics(path), str(path))


def test_packed_arrays(tmp_path):
    """3 MB that unpack to 3 GiB, here a thousandth of both; and arrays that claim more than there is."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, mu=np.zeros(3), sigma=np.zeros([3000, 3000]))
    assert path.stat().st_size < 1 << 17
    with little_memory(60 << 20):
        assert "many times the data" in outcome(lambda: load_statistics(path), str(path))
        assert read_cache(path) is None
    np.savez_compressed(path, mu=np.zeros(200), sigma=np.eye(200))          # What pytorch-fid writes is packed.
    assert len(load_statistics(path)[0].mean) == 200
    with open_npz(path) as file:
        assert np.array_equal(file["sigma"], np.eye(200))
    claims = "has 24 bytes"
    for shape, order, match in (((1 << 38,), False, claims), ((-3,), False, claims), ((3,), True, None)):
        with open(tmp_path / "x.npy", "wb") as f:
            np.lib.format.write_array_header_1_0(f, {"descr": "<f8", "fortran_order": order, "shape": shape})
            f.write(np.arange(3.0).tobytes())
        if match is None:
            assert np.array_equal(read_npy(tmp_path / "x.npy"), np.arange(3.0))
        else:
            with little_memory(), pytest.raises(ValueError, match=match):
                read_npy(tmp_path / "x.npy")


def test_references_that_grow_without_end(tmp_path):
    """Wide features make a covariance of their square; a pickle's lists in lists are 2^60 values written out."""
    path = tmp_path / "x.npz"
    for wide in (np.zeros([2, 100_000], np.float32), np.zeros([2, 9000], np.float32)):
        np.savez(path, reps=wide)
        with little_memory():
            assert "no detector has more than" in outcome(lambda: load_statistics(path), str(path))
    pkl, block = tmp_path / "x.pkl", np.zeros([1000, 100])
    repeated = {"num_items": 10 ** 9, "raw_mean": None, "raw_cov": None, "all_features": [block] * 10 ** 6}
    endless = VALUES["endless"]
    for content in (repeated, endless, {"num_images": endless, "fid": {}}, {"num_images": 10 ** 5000, "fid": {}},
                    {"num_items": endless, "raw_mean": 0, "raw_cov": 0}, {"mu": endless, "sigma": 0},
                    {"fid": endless, "num_images": 5}, {"x" * 10_000: 1}):
        pkl.write_bytes(pickle.dumps(content, 4))
        with little_memory():
            assert outcome(lambda: load_statistics(pkl), str(pkl))

#----------------------------------------------------------------------------
# The parts.


def test_schemas_say_where():
    check = record({"a": whole(1, 3)}, {"b": record({"c": whole()})})
    check({"a": 3}, "header")
    for content, line in (({"a": 4}, "header.a is 4, but must be a whole number from 1 to 3"),
                          ({"a": 1, "b": {"c": None}}, "header.b.c is None, but must be a whole number from 0 to "),
                          ({}, "header lacks a"), ([], "header is a list, but must hold entries by name"),
                          ({"a": 1, "x\n": 2}, r"header has unknown entries: x\\n")):
        with pytest.raises(Unfit, match=line):
            check(content, "header")
    assert (shown(10 ** 5000), shown("a\n"), shown([])) == ("a number beyond reason", r"'a\n'", "a list")


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_first_nonfinite(dtype, value):
    for size, position in ((1, 0), (1000, 517), (1000, 999)):
        bad = torch.randn(size, dtype=torch.float32).to(dtype)
        assert first_nonfinite({"a": [bad]}) is None
        bad[position] = value
        assert first_nonfinite({"z": torch.ones(3), "a": {1: [torch.ones([]), bad], 2: bad}, "i": torch.ones(2).int(),
                                "e": torch.zeros(0), "t": "text"}) == "a.1.1"
