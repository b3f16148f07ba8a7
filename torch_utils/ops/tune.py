# SPDX-License-Identifier: Apache-2.0
"""The fastest form of an operation is chosen on the user's device.

Which of several forms is fastest depends on the GPU and on the shape. So at the first call of a shape the candidates
are timed on the real arguments, and the fastest is taken from then on. Choices are kept in the cache folder, in a file
for each kind of GPU, library and version of PyTorch. On processors nothing is timed: there native code is fastest.

Forms differ in rounding. Where numbers have to be the same again, in a run that is continued and on all its processes,
a set of choices is exported, handed on and closed: it times nothing, and shapes that it does not know take the default,
the first candidate. $STYLESAN_TUNE=0 takes the defaults everywhere.
"""
import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from dnnlib import UserError
from dnnlib.download import cache_dir
from dnnlib.util import atomic_write_text, file_lock, parse_json
from torch_utils.ops import compilation

KINDS = ("cuda",)           # Types of devices where forms are timed.
LONG_SECONDS = 0.02         # A call that takes longer is timed once: little can disturb that, and forms may be many.
REPEATS = 5                 # A shorter one is timed so often. The fastest counts: what disturbs makes it longer.
MARGIN = 0.95               # A candidate that takes a larger share of the default's time is no better for certain.
LOCK_SECONDS = 10.0         # For another process that writes its choices; then this one does not wait any longer.
MEMORY = 1.5                # Times what the default keeps for the gradient: a form that keeps more is out, so that
                            # the memory of a training step does not depend much on what is chosen.
MAX_PICKED = 4096           # Calls whose form is looked up at once.

Form = Callable[..., torch.Tensor]


def is_on() -> bool:
    """What $STYLESAN_TUNE says: 1, the default, or 0."""
    value = os.environ.get("STYLESAN_TUNE") or "1"
    if value not in ("0", "1"):
        raise UserError(f"STYLESAN_TUNE={value}: choose from 1 (the fastest form is chosen on this GPU) and 0 (no form "
                        "is timed)")
    return value == "1"


def _warn(text: str) -> None:
    print(f"tuned: {text}", file=sys.stderr, flush=True)

#----------------------------------------------------------------------------
# What candidates cost.

class Cost(NamedTuple):
    """What a candidate costs."""

    seconds: float
    kept: int = 0       # Bytes in memory between the passes, for the gradient.


class Trial:
    """A call to be timed: the forward pass and, where a gradient is wanted, the backward pass.

    It works on the values of the inputs and leaves no trace in the graph that they belong to.
    """

    def __init__(self, call: Form, inputs: Sequence[torch.Tensor | None]):
        self.call = call
        self.leaves = [None if t is None else t.detach().requires_grad_(wants_gradient(t)) for t in inputs]
        self.wanted = [t for t in self.leaves if t is not None and t.requires_grad]

    def forward(self) -> torch.Tensor:
        """The first pass alone."""
        return self.call(*self.leaves)

    def __call__(self) -> None:
        y = self.forward()
        if self.wanted:
            torch.autograd.grad(y, self.wanted, y.detach())


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes on the device, after one that loads code and takes memory."""
    call()
    run = _device_seconds if device.type == "cuda" else _host_seconds
    once = run(call, 1, device)
    return once if once > LONG_SECONDS else run(call, REPEATS, device)


def _device_seconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    """The least of several calls in a row, by the GPU's own clock."""
    with torch.cuda.device(device):
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        marks[-1].synchronize()
    milliseconds: list[float] = [a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)]
    return min(milliseconds) / 1e3


def _host_seconds(call: Callable[[], object], count: int, device: torch.device) -> float:
    times = [time.perf_counter()]
    for _ in range(count):
        call()
        times.append(time.perf_counter())
    return min(b - a for a, b in zip(times, times[1:], strict=False))


def kept_bytes(trial: Trial, device: torch.device) -> int:
    """What a GPU keeps between the passes, the result included; 0 where there is only one pass, and elsewhere."""
    if device.type != "cuda" or not trial.wanted:
        return 0
    before = torch.cuda.memory_allocated(device)
    y = trial.forward()
    kept = torch.cuda.memory_allocated(device) - before
    del y
    return kept


def wants_gradient(x: torch.Tensor) -> bool:
    """Whether a gradient of x may be asked for after what is done now."""
    return x.requires_grad and torch.is_grad_enabled()

#----------------------------------------------------------------------------
# The file of choices.

class Store:
    """Choices that were made for one kind of GPU, library and version of PyTorch. Processes may share it."""

    def __init__(self, device: torch.device):
        cuda = device.type == "cuda"
        self.device = torch.cuda.get_device_name(device) if cuda else device.type
        self.library = (compilation.cuda_target() if cuda else compilation.cpu_target()).name
        name = "-".join([re.sub(r"[^A-Za-z0-9]+", "-", self.device), self.library, torch.__version__])
        self.path = cache_dir() / "tuned" / f"{name}.json"
        self._can_write = True

    def read(self) -> dict[str, str]:
        """Call -> form. A damaged file counts as none, and says so in a line."""
        return {name: entry["form"] for name, entry in self._entries().items()}

    def _entries(self) -> dict[str, dict[str, Any]]:
        try:
            text = self.path.read_text(encoding="utf-8")
            entries: dict[str, dict[str, Any]] = parse_json(text)["choices"]
            if not all(isinstance(entry["form"], str) for entry in entries.values()):
                raise ValueError("not a file of choices")
            return entries
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _warn(f"{self.path} is damaged and does not count ({type(error).__name__}): forms are timed anew")
            return {}

    def add(self, name: str, form: str, costs: Mapping[str, Cost]) -> None:
        """Keep a choice beside those of other processes; one that another process made meanwhile stays."""
        if not self._can_write:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(self.path.with_suffix(".lock"), LOCK_SECONDS):
                entry = {"form": form, "microseconds": {k: round(1e6 * cost.seconds, 1) for k, cost in costs.items()},
                         "kept bytes": {k: cost.kept for k, cost in costs.items()}}
                entries = {name: entry} | self._entries()
                content = {"device": self.device, "library": self.library, "torch": torch.__version__,
                           "choices": dict(sorted(entries.items()))}
                atomic_write_text(self.path, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            self._can_write = False
            _warn(f"choices are not kept: {self.path.parent} cannot be written ({error.strerror or error})")

#----------------------------------------------------------------------------
# Choices.

class Choices:
    """Which form each call takes.

    Args:
        values: Call -> form, as another set had it.
        origin: Where they come from: the end of the line at the start.
        store: Where an open set looks first and keeps what it finds. Without one the set is closed.
    """

    def __init__(self, values: Mapping[str, str] | None = None, origin: str = "", store: Store | None = None):
        self.values = dict(values or {})        # For all calls that came. Plain values, to be sent and stored.
        self.origin, self.store = origin, store
        self._kept = {} if store is None else store.read()
        self._picked: dict[Hashable, Form] = {}
        self._lock = threading.Lock()           # Never held while operations run: autograd has threads of its own.

    def describe(self) -> str:
        """A line for the start of a program."""
        if self.store is None:
            return f"tuned: {self.origin}"
        return (f"tuned: {len(self._kept)} choices of {self.store.device} from {self.store.path}, new shapes are timed")

    def fastest(self, key: Hashable, name: Callable[[], str], candidates: Callable[[], Mapping[str, Form]],
                cost: Callable[[Form], Cost]) -> Form:
        """The form that a call takes.

        Args:
            key: What the choice depends on; looked up at every call.
            name: The same in words, for the file.
            candidates: By name, the default first.
            cost: What a candidate costs.
        """
        form = self._picked.get(key)
        if form is None:
            forms = candidates()
            form = forms[self.choose(name(), forms, cost)]
            if len(self._picked) >= MAX_PICKED:
                self._picked.clear()
            self._picked[key] = form
        return form

    def choose(self, name: str, forms: Mapping[str, Form], cost: Callable[[Form], Cost]) -> str:
        """The name of the form for a call that is described by `name`."""
        default = next(iter(forms))
        if len(forms) == 1:
            return default
        if name not in self.values and self.store is not None:
            kept, costs = self._kept.get(name), None
            if kept is not None and kept in forms:
                chosen = kept
            else:
                chosen, costs = self._time(forms, cost)
            with self._lock:        # Two threads may have timed the same.
                is_first = self.values.setdefault(name, chosen) is chosen
            if is_first and costs:
                self.store.add(name, chosen, costs)
        chosen = self.values.get(name, default)
        if chosen not in forms:
            _warn(f"{name}: there is no form {chosen!r} any more, the default {default!r} is taken")
            return default
        return chosen

    def _time(self, forms: Mapping[str, Form], cost: Callable[[Form], Cost]) -> tuple[str, dict[str, Cost]]:
        """(the fastest, the cost of each that runs). One that fails, for lack of memory mostly, is out."""
        costs: dict[str, Cost] = {}
        for name, form in forms.items():
            # The error of memory is one of these. If all candidates fail, the call itself says why.
            with contextlib.suppress(RuntimeError):
                costs[name] = cost(form)
            if name not in costs and torch.cuda.is_initialized():
                torch.cuda.empty_cache()        # Here, where nothing refers to what the candidate had.
        default = next(iter(forms))
        usual = costs.get(default)
        better = {name: seconds for name, (seconds, kept) in costs.items()
                  if usual is None or (seconds <= MARGIN * usual.seconds and kept <= MEMORY * usual.kept)}
        return min(better, key=lambda name: better[name], default=default), costs


_current: dict[str, Choices] = {}       # By type of device; made at the first call.


def open_choices(device: torch.device) -> Choices:
    """A set that knows what the cache folder holds and times what is new; closed and empty with STYLESAN_TUNE=0.

    Raises:
        UserError: STYLESAN_TUNE has another value.
    """
    return Choices(store=Store(device)) if is_on() else Choices(origin="off (STYLESAN_TUNE=0)")


def use(device: torch.device, choices: Choices | None) -> None:
    """Let all operations on devices of that type take these choices; None: those of the cache folder."""
    _current.pop(device.type, None)
    if choices is not None:
        _current[device.type] = choices


def current(device: torch.device) -> Choices:
    """The choices that operations take."""
    found = _current.get(device.type)
    return found if found is not None else _current.setdefault(device.type, open_choices(device))


def describe(device: torch.device | str) -> str | None:
    """One line for the start of a program; None where nothing is timed.

    Raises:
        UserError: STYLESAN_TUNE has a wrong value.
    """
    is_on()
    device = torch.device(device)
    return current(device).describe() if device.type in KINDS else None


#----------------------------------------------------------------------------
# What operations call.

def fastest(op: str, inputs: Sequence[torch.Tensor | None], facts: Mapping[str, Hashable],
            candidates: Callable[[], Mapping[str, Form]], call: Callable[..., torch.Tensor],
            batched: Sequence[int] = (0,)) -> Form:
    """The form of an operation that is fastest for these inputs, on a device of KINDS.

    Without a gradient, batches of about the same size count as one: the last batch of a program is often smaller.

    Args:
        op: Its name.
        inputs: Tensors that gradients are taken of, and others whose size matters; the first one is on the device.
        facts: What else matters to the speed, by name.
        candidates: The forms by name, the default first; only called for a new shape.
        call: `call(form, *inputs)` runs a form.
        batched: Which of the inputs have the batch as their first dimension.
    """
    first = inputs[0]
    assert first is not None, "the images are the first of the inputs"
    device = first.device
    kinds: list[tuple[Any, ...] | None] = [
        None if t is None else (t.shape, t.dtype, _layout(t), wants_gradient(t)) for t in inputs]
    if not any(kind is not None and kind[3] for kind in kinds):
        for i in batched:
            kind = kinds[i]
            assert kind is not None, "what has a batch is there"
            shape, *rest = kind
            kinds[i] = (_batch_like(shape[0]), *shape[1:]), *rest

    def name() -> str:
        tensors = ["none" if kind is None else " ".join(filter(None, [
            _sizes(kind[0]), str(kind[1]).removeprefix("torch."), kind[2], "gradient" if kind[3] else ""]))
            for kind in kinds]
        return f"{op} {', '.join(tensors)}; {', '.join(f'{what} {_text(value)}' for what, value in facts.items())}"

    def cost(form: Form) -> Cost:
        trial = Trial(lambda *leaves: call(form, *leaves), inputs)
        return Cost(seconds_of(trial, device), kept_bytes(trial, device))

    return current(device).fastest((op, *kinds, *facts.values()), name, candidates, cost)


def _layout(x: torch.Tensor) -> str:
    """How a tensor lies in memory; nothing if its last dimension is the innermost one."""
    if x.is_contiguous():
        return ""
    return "channels-last" if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) else "strided"


def _batch_like(size: int) -> str:
    """'1', '<=4', '<=16' and so on."""
    bound = 1
    while bound < size:
        bound *= 4
    return "1" if bound == 1 else f"<={bound}"


def _sizes(shape: Sequence[int | str]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _text(value: Hashable) -> str:
    if isinstance(value, torch.Size):
        return _sizes(value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value is None else str(value)
