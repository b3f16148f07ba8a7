# SPDX-License-Identifier: Apache-2.0
"""Small valid files of each of our formats, and what may be done to them."""
import contextlib
import copy
import io
import math
import resource
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from training.config import DiscriminatorConfig, to_dict
from training.generator.layer_schedule import stem_config, superres_config
from training.networks_stylegan3 import Generator
from training.run.formats import NETWORK_FORMAT, STATE_FORMAT, VERSION, RunShape

MEMORY = 512 << 20      # What reading a file of some kilobytes may ask for; libraries take some of it at first use.

#----------------------------------------------------------------------------
# Reading.


@contextlib.contextmanager
def little_memory(extra: int = MEMORY) -> Iterator[None]:
    """For the block this process gets no more than `extra` bytes more than it has: who asks for more fails."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:         # Not on Linux: the bound is tested there.
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(read: Callable[[], Any], name: str = "") -> str | None:
    """None if reading succeeded, else the one line that it gave. Any other end is a failure of the test."""
    try:
        read()
    except UserError as err:
        cause: BaseException | None = err
        while cause is not None:
            assert not isinstance(cause, MemoryError), "asked for much memory"
            assert "alloc" not in str(cause), f"asked for much memory: {cause!r}"
            cause = cause.__cause__
        text = str(err)
        assert "\n" not in text
        assert len(text) < 700, text
        assert name in text
        return text
    return None

#----------------------------------------------------------------------------
# Valid content.


def small_generator() -> Generator:
    """A super-resolution stage, which has every kind of layer and setting, with two classes."""
    torch.manual_seed(0)
    stem = stem_config(8, 3, 64, 4, margin_size=2, z_dim=4, w_dim=4, c_dim=2, embed_dim=3)
    return Generator(superres_config(stem, 2, 3))


def snapshot_of(G: Generator) -> dict[str, Any]:
    """A network snapshot with everything that one may hold."""
    state = G.state_dict()
    return {
        "format": NETWORK_FORMAT, "version": VERSION, "generator_config": to_dict(G.config), "G": state, "G_ema": state,
        "discriminator_config": to_dict(DiscriminatorConfig(c_dim=2)),
        "D": {"discriminators.a.weight": torch.ones(3, 2), "discriminators.a.num_batches_tracked": torch.tensor(3)},
        "backbones": {"a": {"name": "a", "source": "somewhere", "sha256": None}},
        "class_names": ["cat", "dog"], "progress": {"cur_nimg": 1000, "best_value": None, "pl_mean": 0.5},
        "score": {"metric": "fid", "value": 3.5}, "options": {"seed": 0, "metrics": ("fid",)}}


def state_of(G: Generator) -> tuple[dict[str, Any], RunShape]:
    """A training state after one step, and the shape of its run."""
    D = torch.nn.Linear(3, 2)
    optimizers = {}
    for name, net in (("G", G), ("D", D)):
        optimizers[name] = torch.optim.Adam(net.parameters(), lr=0.01)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        optimizers[name].step()
    networks = {"G": G.state_dict(), "G_ema": copy.deepcopy(G.state_dict()), "D": D.state_dict()}
    counters = {"cur_nimg": 8, "batch_idx": 1, "cur_tick": 0, "elapsed": 1.5, "best_value": None, "best_nimg": 0,
                "best_metric": "fid", "bad_evals": 0, "tick_start_nimg": 0, "snapshot_due": True}
    content = {"format": STATE_FORMAT, "version": VERSION, **networks,
               "optimizers": {name: opt.state_dict() for name, opt in optimizers.items()},
               "pl_mean": torch.zeros([]), "counters": counters, "forms": {"conv": "tiles"},
               "generator_config": to_dict(G.config), "discriminator_config": to_dict(DiscriminatorConfig(c_dim=2)),
               "backbones": {}}
    groups = {name: [group["params"] for group in opt.param_groups] for name, opt in optimizers.items()}
    return content, RunShape(networks, groups, tuple(counters))

#----------------------------------------------------------------------------
# Changes.

_endless: list[Any] = []
for _ in range(60):                     # 2^60 values if it is written out.
    _endless = [_endless, _endless]
_deep: Any = []
for _ in range(500):
    _deep = [_deep]

VALUES: dict[str, Any] = {
    "nothing": None, "minus one": -1, "zero": 0, "huge": 2 ** 40, "beyond 64 bits": 2 ** 70, "very long": 10 ** 5000,
    "one half": 0.5, "nan": math.nan, "inf": math.inf, "true": True, "text": "no\nnumber", "long text": "x" * 100_000,
    "list": [], "list of lists": [[[1]]], "dict": {}, "numbers as keys": {1: 2}, "endless": _endless, "deep": _deep,
    "tensor": torch.zeros(3), "nan tensor": torch.full([3], math.nan)}


def tensors_like(value: torch.Tensor) -> dict[str, Any]:
    """What stands in the place of a tensor."""
    bad = value.clone().float()
    bad.view(-1)[-1:] = math.inf
    return {
        "other shape": torch.zeros(*value.shape, 2), "flat": value.reshape(-1, 1, 1, 1, 1), "integer": value.int(),
        "complex": value.to(torch.complex64), "not finite": bad, "bytes": value.to(torch.uint8),
        "double": value.double(), "half": value.half(), "parameter": torch.nn.Parameter(value.float())}


# Kinds of tensors that only a file can hold: they are saved and read.
STRANGE_TENSORS: dict[str, Callable[[], Any]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse, huge": lambda: torch.sparse_coo_tensor([[0], [0]], [1.0], (10 ** 6, 10 ** 6), check_invariants=True),
    "compressed rows": lambda: torch.eye(3).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.quint8),
    "without memory": lambda: torch.empty(10 ** 6, 10 ** 6, device="meta"),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "conjugate": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
    "of 8 bits": lambda: torch.zeros(3).to(torch.float8_e4m3fn),
    "expanded": lambda: torch.zeros(1).expand(10 ** 6, 10 ** 6),
    "overlapping": lambda: torch.zeros(10_000).as_strided((9000, 1000), (1, 1)),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "of a class": lambda: torch.nn.Linear(2, 2),
    "an array": lambda: torch.zeros(3).numpy(),
    "bytes": lambda: b"x" * 1000,
    "a set": lambda: {1, 2},
}


def places(content: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to every value in nested dicts and lists; of many alike only to the first and the last."""
    items = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    alike = len(items) > 4 and len({type(value) for _, value in items}) == 1
    for key, value in [items[0], items[-1]] if alike else items:
        yield (*prefix, key)
        if isinstance(value, dict | list | tuple):
            yield from places(value, (*prefix, key))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    """The same with another value at one place; everything else is shared."""
    key, *rest = place
    inner = changed(content[key], tuple(rest), value) if rest else value
    if isinstance(content, dict):
        return {**content, key: inner}
    return type(content)(inner if i == key else item for i, item in enumerate(content))


def without(content: Any, place: tuple[Any, ...]) -> Any:
    """The same without an entry."""
    key, *rest = place
    if rest:
        return changed(content, (key,), without(content[key], tuple(rest)))
    if isinstance(content, dict):
        return {name: value for name, value in content.items() if name != key}
    return type(content)(item for i, item in enumerate(content) if i != key)

#----------------------------------------------------------------------------
# Archives.


def rewritten(data: bytes, change: Callable[[str, bytes], tuple[bytes, int]]) -> bytes:
    """A zip archive whose members are what `change(name, content)` says, packed or not."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            content, how = change(info.filename, source.read(info))
            archive.writestr(info.filename, content, how, 9)
    return target.getvalue()


