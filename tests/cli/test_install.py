# SPDX-License-Identifier: Apache-2.0
"""Installing a clone: without network, in an environment of its own, from which every other folder can import."""
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from tests.legacy.test_snapshots import own_snapshot
from torch_utils import checkpoint
from training.generator.layer_schedule import stem_config
from training.networks_stylegan3 import Generator

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("dnnlib", "torch_utils", "training", "metrics", "inference", "data_prep", "transport")
LOAD = """
import sys
import torch
import data_prep, dnnlib, inference, legacy, metrics, torch_utils, training, transport
from legacy import load_network
G = load_network(sys.argv[1]).G_ema
print(*G(torch.zeros(1, G.z_dim), torch.eye(G.c_dim)[:1]).shape)
print(legacy.__file__)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """The files that git tracks, without tests: an installation writes beside them."""
    folder = tmp_path_factory.mktemp("clone")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("tests/", "docs/", "benchmarks/")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints; pip finds no index."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_CONFIG_FILE": os.devnull}
    result = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True,
                            timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_a_clone_that_pip_installed_is_found_from_every_folder(clone, tmp_path):
    # An environment that borrows the packages of this one, but not this checkout.
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    (own,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", clone, cwd=clone)

    snapshot, elsewhere = tmp_path / "network-snapshot-000001.pkl", tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.manual_seed(0)
    checkpoint.save(snapshot, own_snapshot(Generator(stem_config(8, 3, 64, 4, z_dim=8, w_dim=8, c_dim=2, embed_dim=6))))
    assert run(python, "-c", LOAD, snapshot, cwd=elsewhere).splitlines() == ["1 3 8 8", str(clone / "legacy.py")]


@pytest.mark.slow
def test_a_wheel_has_every_module_and_the_sources_of_the_operations(clone, tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, clone, cwd=clone)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(clone).as_posix() for package in PACKAGES for path in (clone / package).rglob("*")
              if path.suffix == ".py" or path.name == "py.typed" or path.parent.name == "csrc"}
    assert packed == wanted | {path.name for path in clone.glob("*.py")}
