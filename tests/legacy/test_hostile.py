# SPDX-License-Identifier: Apache-2.0
"""Pickles that would run something: nothing runs, and the refusal is one line."""
import copyreg
import io
import os
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import legacy
from dnnlib import UserError
from tests.legacy.official_files import Persistent, dump, official_generator
from torch_utils import safe_pickle
from torch_utils.pickle_values import Call
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """A file that hostile content would make. Its name is short and without a path, for the hand-made pickles."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return b"X" + struct.pack("<I", len(data)) + data


COMMAND = string("touch canary")
CODE = string("open('canary', 'w').close()")
STORAGE = b"ctorch.storage\n_load_from_bytes\n"


def call(function: bytes, argument: bytes) -> bytes:
    return function + argument + b"\x85R"


def short_bytes(payload: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(payload)) + payload


# Name -> (pickle, the name that is refused). Python's own unpickler makes the canary of all of these.
LIVE = {
    "REDUCE": (call(b"cos\nsystem\n", COMMAND) + b".", "os.system"),
    "STACK_GLOBAL": (b"\x80\x04" + call(string("os") + string("system") + b"\x93", COMMAND) + b".", "os.system"),
    "INST": (b"(" + COMMAND + b"ios\nsystem\n.", "os.system"),
    "OBJ": (b"(cos\nsystem\n" + COMMAND + b"o.", "os.system"),
    "posix": (call(b"cposix\nsystem\n", COMMAND) + b".", "posix.system"),
    "eval": (call(b"cbuiltins\neval\n", CODE) + b".", "builtins.eval"),
    "exec": (call(b"cbuiltins\nexec\n", CODE) + b".", "builtins.exec"),
    "Python 2 names": (b"\x80\x02" + call(b"c__builtin__\neval\n", CODE) + b".", "builtins.eval"),
    "Popen": (b"\x80\x04csubprocess\nPopen\n](" + string("touch") + string("canary") + b"e\x85R.", "subprocess.Popen"),
    "NEWOBJ": (b"\x80\x04csubprocess\nPopen\n](" + string("touch") + string("canary") + b"e\x85\x81.",
               "subprocess.Popen"),
    "open": (b"\x80\x04cbuiltins\nopen\n" + string("canary") + string("w") + b"\x86R.", "builtins.open"),
    "runpy": (b"\x80\x04" + call(b"cpathlib\nos.system\n", COMMAND) + b".", "pathlib.os.system"),
    "dill": (b"\x80\x04" + call(b"cdill._dill\n_eval_repr\n", CODE) + b".", "dill._dill._eval_repr"),
    "numpy": (b"\x80\x04cnumpy.testing._private.utils\nrunstring\n" + CODE + b"}\x86R.", "runstring"),
    "code": (b"\x80\x04ccode\nInteractiveInterpreter\n)R}b.", "code.InteractiveInterpreter"),
}


def is_refused(path: Path, *words: str) -> str:
    for reader in (safe_pickle.read, legacy.read_official_pickle, legacy.open_snapshot, legacy.load_network):
        with pytest.raises(UserError) as err:
            reader(path)
        message = str(err.value)
        assert "\n" not in message
        assert len(message) < 400
        assert str(path) in message
        assert all(word in message for word in words), message
    return message


@pytest.mark.parametrize("case", LIVE)
def test_refused(tmp_path, canary, case):
    data, name = LIVE[case]
    path = tmp_path / "x.pkl"
    path.write_bytes(data)
    is_refused(path, name, "nothing was run")


def test_the_attack_is_real(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(LIVE["REDUCE"][0])
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", [
    "os.popen", "os.remove", "nt.system", "sys.exit", "importlib.import_module", "runpy.run_path", "ctypes.CDLL",
    "builtins.__import__", "builtins.compile", "builtins.breakpoint", "builtins.input", "builtins.globals",
    "webbrowser.open", "shutil.rmtree", "socket.socket", "pickle.loads", "dill.loads", "torchlike.anything",
    "multiprocessing.util.spawnv_passfds", "timmy.models", "trainingx.y", "numpy.load", "operator.attrgetter",
    "copyreg.add_extension", "_imported_module_evil.f", "posixpath.join", "__mp_main__.f", "legacy.open_snapshot",
])
def test_names_outside_the_list(tmp_path, canary, name):
    module, _, attribute = name.rpartition(".")
    path = tmp_path / "x.pkl"
    path.write_bytes(f"c{module}\n{attribute}\n.".encode())
    is_refused(path, name)


@pytest.mark.parametrize("data", [b"Panything\n.", b"\x80\x04" + string("x") + b"Q.", b"\x80\x04)Q."])
def test_persistent_ids(tmp_path, canary, data):
    (tmp_path / "x.pkl").write_bytes(data)
    is_refused(tmp_path / "x.pkl", "persistent ids")


@pytest.mark.parametrize("opcode", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"])
def test_extension_registry(tmp_path, canary, opcode):
    copyreg.add_extension("os", "system", 0xf0)
    try:
        (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + opcode + COMMAND + b"\x85R.")
        is_refused(tmp_path / "x.pkl", "by its number")
    finally:
        copyreg.remove_extension("os", "system", 0xf0)


@pytest.mark.parametrize("opcode", [b"\x97", b"\x98"])
def test_out_of_band_buffers(tmp_path, canary, opcode):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x05N" + opcode + b".")
    is_refused(tmp_path / "x.pkl", "outside the file")


def test_names_are_printable(tmp_path, canary):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + string("o\ns\x1b[2J") + string("x" * 5000) + b"\x93.")
    is_refused(tmp_path / "x.pkl", r"o\ns\x1b[2J")

#----------------------------------------------------------------------------
# Inside storages.

def torch_file(root: bytes) -> bytes:
    """An older torch.save file around a hand-made pickle."""
    parts = [pickle.dumps(value, 2) for value in (safe_pickle.TORCH_MAGIC, 1001, {"little_endian": True})]
    return b"".join(parts) + b"\x80\x02" + root + b"." + pickle.dumps([], 2)


def zip_file(root: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.zeros(1).untyped_storage(), buffer)
    source, target = zipfile.ZipFile(buffer), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            archive.writestr(info.filename, b"\x80\x02" + root + b"." if info.filename.endswith("data.pkl")
                             else source.read(info))
    return target.getvalue()


@pytest.mark.parametrize("wrap", [torch_file, zip_file, lambda root: root + b"."])
def test_pickles_inside_storages(tmp_path, canary, wrap):
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + call(STORAGE, short_bytes(wrap(call(b"cposix\nsystem\n", COMMAND)))) + b".")
    is_refused(path, "posix.system")
    # Also names that are harmless outside have no place there.
    path.write_bytes(b"\x80\x04" + call(STORAGE, short_bytes(wrap(b"ctorch.nn.modules.linear\nLinear\n"))) + b".")
    is_refused(path, "torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("wrap", [torch_file, zip_file])
def test_whole_torch_files(tmp_path, canary, wrap):
    path = tmp_path / "x.pkl"
    path.write_bytes(wrap(call(b"cposix\nsystem\n", COMMAND)))
    with pytest.raises(UserError, match="posix.system"):
        safe_pickle.read(path)
    with pytest.raises(UserError, match="x.pkl"):
        legacy.load_network(path)


def test_compressed_storages(tmp_path, canary):
    """A zip bomb: members of torch.save are never compressed."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"N0" * 1_000_000 + b"N.")
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04" + call(STORAGE, short_bytes(target.getvalue())) + b".")
    is_refused(path, "packed members")

#----------------------------------------------------------------------------
# Names on the list: written down, never called.

def test_allowed_names_stay_inert(tmp_path, canary):
    import_os = call(b"cdill._dill\n_import_module\n", string("os"))
    system = b"cbuiltins\ngetattr\n" + import_os + string("system") + b"\x86R"
    chains = [
        import_os,
        call(system, COMMAND),
        b"cfunctools\npartial\n" + system + COMMAND + b"\x86R)R",
        call(b"ctypes\nFunctionType\n", CODE),
        call(call(b"cdill._dill\n_load_type\n", string("CodeType")), CODE),
        b"cbuiltins\ngetattr\nctorch\nhub\n" + string("load") + b"\x86R" + CODE + b"\x85R",
        call(b"ctorch\nload\n", string("canary")),
        b"cdill._dill\n_setattr\n" + import_os + string("system") + CODE + b"\x87R",
        b"ctorch.nn.modules.module\nModule\n)\x81}" + string("__class__") + system + b"sb",
        b"cbuiltins\nobject\n)\x81" + system + b"b",
    ]
    path = tmp_path / "x.pkl"
    path.write_bytes(b"\x80\x04(" + b"".join(chains) + b"l.")
    found = safe_pickle.read(path)
    assert len(found) == len(chains)
    assert all(isinstance(item, Call) for item in found)
    assert found[1].function.args[0].args == ("os",)


def test_modules_are_not_imported(tmp_path, canary, monkeypatch):
    (tmp_path / "pg_modules").mkdir()
    (tmp_path / "pg_modules" / "__init__.py").write_text("open('canary', 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "x.pkl").write_bytes(b"cpg_modules\nThing\n)R.")
    assert isinstance(safe_pickle.read(tmp_path / "x.pkl"), Call)
    assert "pg_modules" not in sys.modules


def test_source_texts_are_not_compiled(tmp_path, canary):
    G = Generator(stem_config(8, 3, 32, 4, z_dim=8, w_dim=8))
    hostile = "import os\nos.system('touch canary')\nraise SystemError\n(not even valid source"
    path = dump(tmp_path / "x.pkl", {"G": None, "D": None, "G_ema": official_generator(G, module_src=hostile)})
    assert hostile.encode() in path.read_bytes()
    assert legacy.load_network(path).G_ema.img_resolution == 8


def test_reduce_of_a_live_object(tmp_path, canary):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch canary",)

    path = dump(tmp_path / "x.pkl", {"G_ema": Persistent("Generator", {"_modules": {"mapping": Evil()}})})
    is_refused(path, "system")
