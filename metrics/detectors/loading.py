# SPDX-License-Identifier: Apache-2.0
"""From the name of a detector to the loaded network."""
import sys
from pathlib import Path

import torch

from dnnlib import UserError
from dnnlib.download import Asset, Found, find_asset, local_file
from dnnlib.util import file_sha256, is_address, list_some
from metrics.detectors.base import DETECTORS, Detector, DetectorKind, State
from metrics.detectors.judges import load_judge
from metrics.detectors.random_weights import RANDOM_SUFFIX, hash_state, random_state
from metrics.detectors.timm_networks import PREFIX, find_timm_weights, load_timm, model_of, timm_asset
from torch_utils import distributed
from torch_utils.weights import read_weights

#----------------------------------------------------------------------------
# Names and files.

def local_path(spec: str) -> Path | None:
    """Path of a judge named as 'local:PATH', 'PATH.safetensors' or an address, which is downloaded once.

    None for the name of a registered detector.
    """
    if is_address(spec):
        return local_file(spec)
    if spec.startswith("local:"):
        return Path(spec.removeprefix("local:"))
    return Path(spec) if spec.endswith(".safetensors") else None


def asset_of(spec: str) -> Asset | None:
    """The published file that detector `spec` needs; None if it needs none, or is a judge's file itself. A network of
    timm needs one only where its weights are not on this machine.

    Raises:
        UserError: unknown detector, or no judge where `spec` says.
    """
    path = local_path(spec)
    if path is not None:
        if not path.is_file():
            raise UserError(f"--detector={spec}: no such file: {path}: train a judge, or name another detector")
        return None
    if model_of(spec) is not None:
        return timm_asset(spec)
    name = spec.removesuffix(RANDOM_SUFFIX)
    if name not in DETECTORS:
        raise UserError(f"--detector={spec}: unknown detector: choose from {', '.join(sorted(DETECTORS))}, "
                        f"name a network of timm as {PREFIX}MODEL, or give the path of a .safetensors judge")
    return None if spec.endswith(RANDOM_SUFFIX) else DETECTORS[name].asset


def require(spec: str, weights_dir: str | None = None, offline: bool | None = None,
            allow_unverified: bool = False) -> Path | None:
    """Find (or fetch) the file that detector `spec` needs; None if it needs none. Cheap: call it before a long run.

    Raises:
        UserError: unknown detector, or the file is missing; the message says where to get it and where to put it.
    """
    if model_of(spec) is not None:
        return find_timm_weights(spec, _checked_folder(weights_dir, spec), offline)
    found = _find(spec, weights_dir, offline, allow_unverified)
    return local_path(spec) if found is None else found.path


def _checked_folder(weights_dir: str | None, what: str) -> str | None:
    """The folder of --weights. Raises UserError: it is not there."""
    if weights_dir and not Path(weights_dir).is_dir():
        raise UserError(f"--weights={weights_dir}: no such folder: name one with {what}, or leave it out")
    return weights_dir


def _find(spec: str, weights_dir: str | None, offline: bool | None, allow_unverified: bool) -> Found | None:
    asset = asset_of(spec)
    if asset is None:
        return None
    folder = _checked_folder(weights_dir, asset.filename)
    return find_asset(asset, [folder] if folder else [], offline, allow_unverified)

#----------------------------------------------------------------------------
# Loading.

def load_detector(spec: str, device: torch.device, weights_dir: str | None = None, offline: bool | None = None,
                  allow_unverified: bool = False) -> Detector:
    """Build a detector from its name, 'name:random' (seeded random weights) or the path of a local judge.

    Random numbers elsewhere are not disturbed: networks of known kinds are made on the meta device, which draws none.

    Args:
        spec: A name in `DETECTORS` or 'timm:MODEL', with or without ':random'; 'local:PATH'; 'PATH.safetensors'.
        device: Where it computes.
        weights_dir: Folder to look in first.
        offline: Never download; None: as the environment says.
        allow_unverified: Take a file of weights whose SHA-256 is not the published one; its own goes into the record.

    Raises:
        UserError: unknown name, missing or damaged file.
    """
    if model_of(spec) is not None:
        return load_timm(spec, device, _checked_folder(weights_dir, spec), offline)
    found = distributed.node_first(lambda: _find(spec, weights_dir, offline, allow_unverified))
    if (path := local_path(spec)) is not None:
        return load_judge(path, device)
    kind = DETECTORS[spec.removesuffix(RANDOM_SUFFIX)]
    with torch.device("meta"):
        net = kind.make_net()
    if found is None:
        state = random_state(net)
        sha256 = hash_state(state)
    else:
        state = _fitting(kind, read_state(found.path), net, spec, found.path)
        sha256 = found.sha256 or file_sha256(found.path)
        warn_unverified(found, sha256, spec)
    net.load_state_dict(state, strict=True, assign=True)
    net.requires_grad_(False).eval()
    net = (kind.rebuild(net, device) if kind.rebuild else net).to(device)
    return Detector(spec, sha256, kind.feature_dim, kind.outputs, lambda images: kind.forward(net, images), device,
                    dims=kind.dims, resize=kind.resize, verified=found is None or found.verified)


def read_state(path: Path) -> State:
    """A plain state dict, read without running code. Raises UserError."""
    return read_weights(path)


def _fitting(kind: DetectorKind, state: State, net: torch.nn.Module, spec: str, path: Path) -> State:
    """The tensors of a file under the network's names, in float32: every one there, none besides, shapes equal.

    Raises:
        UserError: they are not.
    """
    wanted = net.state_dict()
    counters = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in wanted.items()
                if name.endswith("num_batches_tracked")}                # Unused in evaluation, and not in every file.
    problem: str | None = "it holds no tensors by name"
    if isinstance(state, dict) and state and all(isinstance(x, torch.Tensor) for x in state.values()):
        state = {**counters, **kind.convert(state)}
        problem = misfit(state, wanted)
    if problem:
        raise UserError(f"{path}: its tensors do not fit the network of {spec} ({problem}): fetch it again")
    return {name: x.float() if x.is_floating_point() else x for name, x in state.items()}


def misfit(state: State, wanted: State) -> str | None:
    """What keeps `state` from being loaded, or None."""
    if missing := sorted(wanted.keys() - state.keys()):
        return f"it lacks {list_some(missing, 3)}"
    if unknown := sorted(state.keys() - wanted.keys()):
        return f"it has besides {list_some(unknown, 3)}"
    if other := [name for name, x in wanted.items() if state[name].shape != x.shape]:
        return f"other shape of {list_some(other, 3)}"
    return None


def warn_unverified(found: Found, sha256: str, spec: str) -> None:
    if not found.verified:
        distributed.print0(f"Warning: {found.path}: unverified weights of {spec} (sha256 {sha256}): values compare "
                           "only with those of the same file", file=sys.stderr)
