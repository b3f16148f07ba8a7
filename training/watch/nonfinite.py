# SPDX-License-Identifier: Apache-2.0
"""Explains to the user of a run whose gradients stopped being finite where that began, and what to go back to."""
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dnnlib import UserError
from dnnlib.util import atomic_write_text
from torch_utils import distributed, misc
from torch_utils.nested import first_nonfinite
from training.run.formats import read_snapshot
from training.run.snapshots import kimg_digits, snapshots_by_age
from training.step.guard import GradientGuard
from training.step.micro_batch import MicroBatch
from training.step.phases import Phase
from training.trainer import Trainer

MAX_NAMES = 10      # Names of tensors in a list of the dump.

#----------------------------------------------------------------------------

def is_finite(value: Any) -> bool:
    """Whether all floating-point tensors in nested lists, tuples and dicts are finite."""
    return first_nonfinite(value) is None


def broken_weights(trainer: Trainer) -> str | None:
    """Name of a weight, a moment of an optimiser or the like that is not finite any more; None while all are.

    To be asked before something is saved: such a run is over. Every process must call it, and all get the same answer.
    """
    bad = first_nonfinite(trainer.state_dict()) if distributed.rank() == 0 else None
    found: str | None = distributed.broadcast_object(bad)
    return found


def phase_of(tensor: str, phases: Sequence[Phase]) -> Phase:
    """The phase to look at when this tensor of a training state is not finite: the first one of its network."""
    network = "D" if "D" in tensor.split(".")[:2] else "G"          # 'D.x', 'optimizers.D.x'.
    return next(phase for phase in phases if phase.name.startswith(network))


class ForwardWatch:
    """Notes within its block in which order modules run, and the first one whose output is not finite.

    Modules inside others end before them, so the first one is as deep as possible.
    """

    def __init__(self, networks: Mapping[str, torch.nn.Module]):
        self.networks = networks
        self.order: dict[str, int] = {}         # Name of a module -> position of its first call.
        self.first_bad: str | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> "ForwardWatch":
        for top, network in self.networks.items():
            for name, module in network.named_modules(prefix=top):
                self._handles.append(module.register_forward_pre_hook(
                    lambda module, args, name=name: self._begin(name)))
                self._handles.append(module.register_forward_hook(
                    lambda module, args, output, name=name: self._end(name, output)))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, name: str) -> None:
        self.order.setdefault(name, len(self.order))

    def _end(self, name: str, output: Any) -> None:
        if self.first_bad is None and not is_finite(output):
            self.first_bad = name

    def in_forward_order(self, tensors: list[str]) -> list[str]:
        """Names of parameters, sorted by when their module ran; those that did not run as a module come last."""
        last = len(self.order)
        return sorted(tensors, key=lambda name: self.order.get(name.rpartition(".")[0], last))

#----------------------------------------------------------------------------

def parameter_at(phase: Phase, element: int | None) -> str | None:
    """Name of the parameter that holds this element of the phase's flat gradient."""
    if element is None:
        return None
    names = {id(p): name for name, p in phase.module.named_parameters()}
    for p in phase.parameters:
        if element < p.numel():
            return names[id(p)]
        element -= p.numel()
    return None


def rerun(phase: Phase, batch: MicroBatch, networks: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """Run a phase once more without a step and look at every layer. Every process must call it.

    Returns:
        What the first process that saw something found. first_bad_output: the first module whose output was not
        finite; bad_gradients: names of parameters in forward order.
    """
    own_name = next(name for name, network in networks.items() if network is phase.module)
    phase.before_step()
    with ForwardWatch(networks) as watch, misc.requires_grad(phase.module, phase.parameters):
        phase.backward(batch, len(batch.z) * distributed.world_size())
    bad = [f"{own_name}.{name}" for name, p in phase.module.named_parameters()
           if p.grad is not None and not is_finite(p.grad)]
    phase.optimizer.zero_grad(set_to_none=True)
    found = {"first_bad_output": watch.first_bad, "bad_gradients": watch.in_forward_order(bad)}
    everywhere = distributed.all_gather_object(found)
    return next((f for f in everywhere if f["first_bad_output"]),
                next((f for f in everywhere if f["bad_gradients"]), found))


def bad_tensors(networks: Mapping[str, torch.nn.Module]) -> list[str]:
    """Parameters and buffers that are not finite themselves."""
    return [f"{top}.{name}" for top, network in networks.items() for name, value in network.state_dict().items()
            if not is_finite(value)]


def last_good_snapshot(folder: Path) -> str | None:
    """Name of the newest snapshot whose networks are readable and finite."""
    for path in reversed(snapshots_by_age(folder)):
        try:
            read_snapshot(path)
        except UserError:
            continue
        return path.name
    return None

#----------------------------------------------------------------------------

def explain_nonfinite(folder: Path, phase: Phase, batch: MicroBatch, guard: GradientGuard,
                      networks: Mapping[str, torch.nn.Module], cur_nimg: int, broken: str | None = None) -> str:
    """Find where non-finite gradients of a phase come from, write nonfinite-<kimg>.json; returns what to tell the user.

    Every process must call it; rank 0 writes.

    Args:
        batch: A micro-batch of the phase, to try once more.
        networks: By the names that layers get in the report: G, D, ...
        cur_nimg: Images shown.
        broken: A tensor of the state that is not finite, if that is why the run ends.
    """
    found = rerun(phase, batch, networks)
    recorded = parameter_at(phase, guard.first_element(phase.name))
    steps = guard.steps_in_a_row().get(phase.name, 0)
    dump = {
        "phase": phase.name,
        "kimg": cur_nimg / 1e3,
        "steps_in_a_row": steps,
        "nonfinite_elements": guard.counts(),
        "first_bad_layer": found["first_bad_output"],
        "first_bad_gradient": next(iter(found["bad_gradients"]), None),
        "first_bad_gradient_of_the_last_step": recorded,
        "bad_gradients": len(found["bad_gradients"]),
        "not_finite_in_the_state": broken,
        "bad_weights": bad_tensors(networks)[:MAX_NAMES],
        "last_good_snapshot": None,
    }
    name = f"nonfinite-{kimg_digits(cur_nimg)}.json"
    if distributed.rank() == 0:
        dump["last_good_snapshot"] = last_good_snapshot(folder)
        atomic_write_text(folder / name, json.dumps(dump, indent=2) + "\n")
    layer = dump["first_bad_layer"] or "none: outputs are finite, the backward pass overflows"
    reason = f"gradients of {phase.name} were not finite in the last {steps} steps"
    if broken is not None:
        reason = f"{broken} is not finite any more, and nothing was saved with it"
    gradient = dump["first_bad_gradient"] or recorded or "none"
    return (f"STOPPED: {reason}. First layer with a bad output: {layer}; first bad gradient: {gradient}. Last good "
            f"snapshot: {dump['last_good_snapshot'] or 'none'}. Start a new run from it with --fp32=1, or with half "
            f"--glr and --dlr. Details: {name}")
