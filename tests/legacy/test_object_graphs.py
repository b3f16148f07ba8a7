# SPDX-License-Identifier: Apache-2.0
"""Files that dill wrote, with classes, closures and patched methods by value: tensors come out, code does not run."""
import pickle
import warnings
from pathlib import Path

import dill
import pytest
import timm
import torch

from dnnlib import EasyDict, UserError
from tests.legacy.official_files import modules
from torch_utils import safe_pickle
from torch_utils.pickle_modules import as_module, as_number, as_plain, as_size, load_tensors, state_records, walk
from torch_utils.pickle_values import Call
from torch_utils.schema import Unfit as UnfitError

# A module as third parties write them: patched methods, closures as hooks, classes in a script. Every function would
# make the canary.
SOURCE = """
import os, types, functools, collections, math
import torch

activations = {}

def forward_flex(self, x):
    os.system("touch canary")
    return x

def get_activation(name, limit=math.pi):
    count = [0]
    def hook(module, args, output):
        count[0] += 1
        os.system("touch canary")
        activations[name] = output
    return hook

class Wrapped(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
        self.activate = functools.partial(torch.clamp, min=0)
        self.pair = Pair(1, self)
    def __setstate__(self, state):
        os.system("touch canary")
        super().__setstate__(state)
    def forward(self, x):
        return self.net(x)

class Slotted:
    __slots__ = ("value",)
    def __reduce__(self):
        return get_activation("x"), (1, 2, 3), {"value": 5}

Pair = collections.namedtuple("Pair", "first second")
"""


def graph(module_name: str):
    """(dictionary to pickle, network whose tensors must come out); the classes live in a module of the given name."""
    namespace = modules(module_name)
    (module,) = namespace.__enter__()
    exec(compile(SOURCE, module_name, "exec"), module.__dict__)
    module.Pair.__module__ = module_name
    net = timm.create_model("test_vit", pretrained=False)
    net.forward = module.types.MethodType(module.forward_flex, net)
    net.blocks[0].register_forward_hook(module.get_activation("1"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net.extra = torch.nn.utils.spectral_norm(torch.nn.Conv2d(3, 4, 3))
    wrapped = module.Wrapped(net)
    content = EasyDict(net=wrapped, slotted=module.Slotted(), settings=EasyDict(a=1), function=module.get_activation)
    content["self"] = content
    return content, wrapped, namespace


@pytest.mark.parametrize("module_name", ["feature_networks.vit", "__main__"])
@pytest.mark.parametrize("how", ["dill", "torch.save", "older torch.save"])
def test_third_party_objects(tmp_path, monkeypatch, how, module_name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pkl"
    torch.manual_seed(0)
    content, net, namespace = graph(module_name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if how == "dill":
                path.write_bytes(dill.dumps(content))
            else:
                torch.save(content, path, pickle_module=dill, _use_new_zipfile_serialization=how == "torch.save")
        expected = {name: value.clone() for name, value in net.state_dict().items()}
    finally:
        namespace.__exit__(None, None, None)
    found = safe_pickle.read(path)
    assert isinstance(found, EasyDict)
    assert found["self"] is found
    assert found.settings.a == 1
    state = load_tensors(state_records(as_module(found.net)))
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert isinstance(found.slotted, Call)
    assert not (tmp_path / "canary").exists()


def test_code_by_value_is_there_and_stays_data(tmp_path):
    content, _net, namespace = graph("__main__")
    try:
        data = dill.dumps(content)
    finally:
        namespace.__exit__(None, None, None)
    for name in (b"_create_function", b"_create_code", b"_create_type", b"touch canary"):
        assert name in data
    (tmp_path / "x.pkl").write_bytes(data)
    symbol = as_module(safe_pickle.read(tmp_path / "x.pkl").net)
    assert symbol.class_name == ""              # The class itself was made by a recorded call.
    assert "net" in symbol.group("_modules")


def test_a_published_backbone(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet", pretrained=False)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(net))
    module = as_module(safe_pickle.read(tmp_path / "x.pkl"))
    state = load_tensors(state_records(module))
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert list(state) == list(net.state_dict())
    assert module.child("bn1").get("num_features") == net.bn1.num_features

#----------------------------------------------------------------------------
# What is taken out of graphs.

def read(tmp_path: Path, content):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, 4))
    return safe_pickle.read(tmp_path / "x.pkl")


def test_modules_shared_without_end(tmp_path):
    net = torch.nn.Identity()
    for _ in range(40):
        net = torch.nn.Sequential(net, net)     # 2^40 paths.
    with pytest.raises(UnfitError, match="beyond measure"):
        state_records(as_module(read(tmp_path, net)))


def test_modules_inside_themselves(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(1, 1))
    net.add_module("again", net)
    with pytest.raises(UnfitError, match="beyond measure"):
        list(walk(as_module(read(tmp_path, net))))


def test_settings_shared_without_end(tmp_path):
    settings = [1]
    for _ in range(40):
        settings = [settings, settings]
    with pytest.raises(UnfitError, match="beyond measure"):
        as_plain(read(tmp_path, settings))
    settings = {"a": [1, 2.5, "x", None, True, torch.zeros(1)], 3: 4}
    assert as_plain(read(tmp_path, settings)) == {"a": [1, 2.5, "x", None, True, None]}


def test_non_persistent_buffers_are_left_out(tmp_path):
    net = torch.nn.Linear(1, 1)
    net.register_buffer("kept", torch.ones(1))
    net.register_buffer("scratch", torch.ones(1), persistent=False)
    assert list(state_records(as_module(read(tmp_path, net)))) == ["weight", "bias", "kept"]


def test_numbers(tmp_path):
    good, bad = [1, 1.0, True, torch.tensor(1), torch.ones(1, dtype=torch.bfloat16)], ["1", None, [1], torch.ones(2)]
    assert all(as_number(value, "x") == 1 for value in read(tmp_path, good))
    for value in [*read(tmp_path, bad), 10 ** 5000]:
        with pytest.raises(UnfitError, match="x is"):
            as_number(value, "x")
    assert as_size((36, 36), "x") == 36
    for value in [(36, 37), (), 0, -1, 1.5, float("nan"), float("inf"), 1 << 40]:
        with pytest.raises(UnfitError, match="x is"):
            as_size(value, "x")


def test_tensors_without_data(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    record = safe_pickle.read(tmp_path / "x.pt")
    record.storage.view = None
    with pytest.raises(UserError, match="missing"):
        record.load()
