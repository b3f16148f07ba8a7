# SPDX-License-Identifier: Apache-2.0
"""The restricted reader on plain data: equal to Python's own unpickler, for every protocol."""
import collections
import io
import pickle
import struct

import numpy as np
import pytest
import torch

from dnnlib import EasyDict, UserError
from torch_utils import pickle_values, safe_pickle
from torch_utils.pickle_values import Call, Symbol, TensorRecord

PLAIN = {
    "constants": [None, True, False, 0, 1, -1, 255, 256, 65535, -2 ** 31, 2 ** 31, 2 ** 70, -2 ** 2100, 0.5, 1e300],
    "strings": ["", "a", "\u00e9\u4e2d\U0001f600", "x" * 300, "line\nbreak\\", b"", b"a\x00\xff", b"y" * 300],
    "containers": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [[]], {}, {1: {2: 3}}, {(1, "a"): 2}],
    "sets": [set(), {1, "a", (2, 3)}, frozenset({1, 2})],
    "ordered": collections.OrderedDict([("b", 1), ("a", collections.OrderedDict())]),
}


def as_values(value):
    """Long byte strings come back as memoryviews."""
    if isinstance(value, memoryview):
        return bytes(value)
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(as_values(item) for item in value)
    return {key: as_values(item) for key, item in value.items()} if isinstance(value, dict) else value


def read_bytes(tmp_path, data):
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    return safe_pickle.read(path)


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_of_every_protocol(tmp_path, protocol):
    assert as_values(read_bytes(tmp_path, pickle.dumps(PLAIN, protocol))) == PLAIN


def test_strings_of_python_2(tmp_path):
    assert read_bytes(tmp_path, rb"S'a\n\x41\'\\ '" + b"\n.") == "a\nA'\\ "
    assert read_bytes(tmp_path, b'S"\xc3\xa9"\n.') == "\u00e9"
    for line in (b"S'a", b"S'a\"\n.", b"Sa\n.", rb"S'\q'" + b"\n.", rb"S'\x4'" + b"\n.", b"S'\n."):
        assert "damaged" in refused(tmp_path, line)


@pytest.mark.parametrize("protocol", range(6))
def test_cycles_and_sharing(tmp_path, protocol):
    shared = [1]
    graph = {"a": shared, "b": shared}
    graph["self"] = graph
    found = read_bytes(tmp_path, pickle.dumps(graph, protocol))
    assert found["a"] is found["b"]
    assert found["self"] is found


@pytest.mark.parametrize("protocol", range(6))
def test_numpy(tmp_path, protocol):
    arrays = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.zeros((0, 3), np.int8),
              np.array(3, dtype=">i4"), np.array([True, False]), np.array(["ab", "c"]), np.array([1 + 2j]),
              np.arange(3, dtype=np.float16)]
    scalars = [np.float64(0.1), np.float32(0.1), np.int64(-3), np.bool_(True), np.str_("abc")]
    data = pickle.dumps(arrays + scalars, protocol)
    for a, b in zip(pickle.loads(data), read_bytes(tmp_path, data), strict=True):
        assert type(a) is type(b)
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


def test_easy_dict(tmp_path):
    found = read_bytes(tmp_path, pickle.dumps(EasyDict(a=1, b=EasyDict(c=2)), 4))
    assert isinstance(found, EasyDict)
    assert found.b.c == 2


def tensors():
    torch.manual_seed(0)
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return [base, base[1:, ::2], base.t(), base[0, 0], torch.zeros(0, 3), torch.tensor([True, False]),
            torch.arange(3, dtype=torch.int16), torch.tensor([1.5, -2], dtype=torch.bfloat16), torch.ones(2, 3).half(),
            torch.tensor([1 + 2j]), torch.nn.Parameter(torch.randn(3)), torch.ones(1).expand(5),
            torch.randn(70, 70, dtype=torch.float64)]


@pytest.mark.parametrize("how", ["pickle", "torch.save", "older torch.save"])
def test_tensors(tmp_path, how):
    path = tmp_path / "file.pkl"
    if how == "pickle":
        path.write_bytes(pickle.dumps(tensors(), 4))
    else:
        torch.save(tensors(), path, _use_new_zipfile_serialization=how == "torch.save")
    for expected, found in zip(tensors(), safe_pickle.read(path), strict=True):
        assert isinstance(found, TensorRecord)
        value = found.load()
        assert value.dtype == expected.dtype
        assert value.shape == expected.shape
        assert torch.equal(value, expected)
        assert value.is_contiguous()


def storage_call(payload: bytes) -> bytes:
    """A pickle of torch.storage._load_from_bytes(payload)."""
    return (b"\x80\x04ctorch.storage\n_load_from_bytes\n" + b"B" + struct.pack("<I", len(payload)) + payload
            + b"\x85R.")


@pytest.mark.parametrize("zipped", [True, False])
def test_storages_of_either_format(tmp_path, zipped):
    values = torch.randn(50)
    buffer = io.BytesIO()
    torch.save(values.untyped_storage() if zipped else values._typed_storage(), buffer,
               _use_new_zipfile_serialization=zipped)
    storage = read_bytes(tmp_path, storage_call(buffer.getvalue()))
    assert isinstance(storage, pickle_values.Storage)
    assert bytes(storage.view) == values.numpy().tobytes()


def test_other_objects_stay_notes(tmp_path):
    module = torch.nn.Conv2d(2, 3, 1)
    found = read_bytes(tmp_path, pickle.dumps([module, torch.nn.Module, torch.float16], 4))
    assert isinstance(found[0], Call)
    assert found[0].calls("torch.nn.modules.conv", "Conv2d")
    assert found[0].state["kernel_size"] == (1, 1)
    assert torch.equal(found[0].state["_parameters"]["weight"].load(), module.weight)
    assert (found[1].module, found[1].name) == ("torch.nn.modules.module", "Module")
    assert all(isinstance(symbol, Symbol) for symbol in found[1:])

#----------------------------------------------------------------------------
# Limits.

def refused(tmp_path, data):
    with pytest.raises(UserError) as err:
        read_bytes(tmp_path, data)
    assert "\n" not in str(err.value)
    assert "file.pkl" in str(err.value)
    return str(err.value)


@pytest.mark.parametrize("data", [
    b"", b".", b"garbage", b"\x80\x04", b"\x80\x07N.", b"PK\x03\x04 no archive",
    b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",           # A byte string of an exabyte.
    b"\x80\x04\x8d" + struct.pack("<Q", (1 << 64) - 1) + b"x.",
    b"\x80\x04r\xff\xff\xff\xff.", b"j\x01\x00\x00\x00.", b"h\x05.", b"0.", b"1.", b"e.", b"](K\x01u.", b"}]K\x01s.",
    b"N)R.", b"K\x01}b.", b"cos.", b"I12x\n.", b"\x8b\xff\xff\xff\xff.", b"(" * 100, b"]" + b"\x85" * 10,
])
def test_garbage(tmp_path, data):
    assert "damaged or cut off" in refused(tmp_path, data)


def test_deep_nesting_is_read_or_refused(tmp_path):
    depth = 100_000
    found = read_bytes(tmp_path, b"\x80\x04N" + b"\x85" * depth + b".")
    for _ in range(depth):
        (found,) = found
    assert found is None
    refused(tmp_path, b"\x80\x04}N" + b"\x85" * depth + b"Ns.")     # As a key it would have to be hashed.


def test_too_many_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_values, "MAX_OPCODES", 1000)
    assert "more than 1000 objects" in refused(tmp_path, b"]" * 2000 + b".")


def tensor_call(shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0, count: int = 4) -> bytes:
    """A pickle of _rebuild_tensor_v2 on a storage of `count` floats."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(count)._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    inner = storage_call(buffer.getvalue())[2:-1]
    parts = [pickle.dumps(part, 2)[2:-1] for part in (offset, shape, stride, False, None)]
    return b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\n(" + inner + b"".join(parts) + b"tR."


@pytest.mark.parametrize(("shape", "stride", "offset"), [
    ((5,), (1,), 0), ((4,), (1,), 1), ((2, 2), (3, 1), 0), ((2,), (1 << 60,), 0), ((1,), (1,), 4), ((-1,), (1,), 0),
    ((2,), (-1,), 3), ((True,), (1,), 0), ((1.0,), (1,), 0), ((1, 1), (1,), 0), ((1,) * 40, (1,) * 40, 0),
    ((1,), (1,), -1), ("ab", (1, 1), 0), ((1,), (1,), None),
])
def test_tensors_beyond_their_storage(tmp_path, shape, stride, offset):
    assert "damaged" in refused(tmp_path, tensor_call(shape, stride, offset))


def test_expanded_tensors_are_bounded(tmp_path):
    record = read_bytes(tmp_path, tensor_call((1 << 20, 1 << 20), (0, 0)))
    with pytest.raises(UserError, match="many times the data"):
        record.load()
    record = read_bytes(tmp_path, tensor_call((1000, 1000), (0, 0)))
    with pytest.raises(UserError, match="many times the data"):
        [record.load() for _ in range(1000)]


def array_state(shape, code: str, data: bytes) -> bytes:
    """A pickle of an array of the given parts."""
    dtype = b"cnumpy\ndtype\n(" + pickle.dumps(code, 2)[2:-1] + b"K\x00K\x01tR"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    raw = b"B" + struct.pack("<I", len(data)) + data
    return b"\x80\x04" + empty + b"(K\x01" + pickle.dumps(shape, 2)[2:-1] + dtype + b"\x89" + raw + b"tb."


def test_arrays_of_sizes_that_do_not_fit(tmp_path):
    assert read_bytes(tmp_path, array_state((2,), "f4", b"\x00" * 8)).tolist() == [0, 0]
    for shape in [(3,), (1 << 62,), (-2,), (2.0,), "a", (1,) * 40]:
        assert "damaged" in refused(tmp_path, array_state(shape, "f4", b"\x00" * 8))


@pytest.mark.parametrize("code", ["O", "O8", "object", "V8", "f4,O", "M8[s]", "(2,)O"])
def test_arrays_of_objects(tmp_path, code):
    assert "NumPy array of" in refused(tmp_path, array_state((1,), code, b"\x00" * 8))
    assert "NumPy array of" in refused(tmp_path, pickle.dumps(np.array([None, {}], dtype=object), 4))


@pytest.mark.parametrize("wrap", [b"cbuiltins\nset\n", b"cbuiltins\nfrozenset\n"])
def test_containers_cannot_be_multiplied(tmp_path, wrap, monkeypatch):
    monkeypatch.setattr(pickle_values, "COPIES_EXTRA", 1 << 20)
    items = b"](" + b"".join(b"J" + struct.pack("<i", i) for i in range(1000)) + b"e\x94"
    data = b"\x80\x04" + items + b"".join(wrap + b"h\x00\x85R" for _ in range(100)) + b"."
    assert "many times the data" in refused(tmp_path, data)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.pkl", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            safe_pickle.read(path)
