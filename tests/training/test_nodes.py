"""Two nodes: two torchrun agents in two network namespaces, joined by a cable; on the loopback where that is forbidden.

A namespace has its own interfaces, addresses and host name: agents find each other only by what a user gives them.
"""
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from legacy import open_snapshot
from tests.closeness import max_error
from tests.training.test_processes import OPTIONS, ROOT, environment, free_port

pytestmark = pytest.mark.slow

README = (ROOT / "README.md").read_text()
SPLIT_RUN = str(ROOT / "tests" / "training" / "split_run.py")


def sh(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Nodes:
    """Two hosts node0 and node1; `prefix(i)` goes before a command to run it on one. `head` is how both call node0."""

    def __init__(self) -> None:
        self.names = [f"{name}{uuid.uuid4().hex[:6]}" for name in ("sn0", "sn1")]
        self.folders = [Path("/etc/netns") / name for name in self.names]
        self.has_namespaces = self._make()
        self.head = "node0" if self.has_namespaces else "127.0.0.1"
        self.port = 29500 if self.has_namespaces else free_port()

    def _make(self) -> bool:
        """Namespaces with a veth pair between them; their /etc/hosts know both names."""
        if not (shutil.which("ip") and shutil.which("unshare") and os.geteuid() == 0):
            return False
        a, b = self.names
        try:
            for name, folder in zip(self.names, self.folders, strict=True):
                sh("ip", "netns", "add", name)
                folder.mkdir(parents=True)
                (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 node0\n10.77.0.2 node1\n")
            sh("ip", "link", "add", a, "netns", a, "type", "veth", "peer", "name", b, "netns", b)
            for i, name in enumerate(self.names):
                sh("ip", "-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", name)
                sh("ip", "-n", name, "link", "set", name, "up")
                sh("ip", "-n", name, "link", "set", "lo", "up")
            sh(*self._prefix(1), "true")
        except (subprocess.CalledProcessError, OSError):
            self.remove()
            return False
        return True

    def _prefix(self, i: int) -> list[str]:
        script = f'hostname node{i} && exec "$@"'
        return ["ip", "netns", "exec", self.names[i], "unshare", "--uts", "sh", "-c", script, "sh"]

    def prefix(self, i: int) -> list[str]:
        return self._prefix(i) if self.has_namespaces else []

    def remove(self) -> None:
        for name, folder in zip(self.names, self.folders, strict=True):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(folder, ignore_errors=True)

    def run(self, command: list[str]) -> list[str]:
        """Run the command on both nodes; returns their outputs."""
        started = [subprocess.Popen([*self.prefix(i), *command], env=environment(STYLESAN_OFFLINE="1"), text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for i in range(2)]
        outputs = [p.communicate(timeout=1500)[0] for p in started]
        for p, output in zip(started, outputs, strict=True):
            assert p.returncode == 0, output[-6000:]
        return outputs


@pytest.fixture(scope="module")
def nodes():
    found = Nodes()
    yield found
    if found.has_namespaces:
        found.remove()


def readme_launcher(nodes: Nodes, processes: int) -> list[str]:
    """The torchrun of the README's multi-node section, for two nodes of so many processes."""
    (line,) = re.findall(r"^(torchrun --nnodes=4 --nproc-per-node=8 .*--rdzv-id=stem .*?) *\\$", README, re.M)
    words = line.replace("--nnodes=4", "--nnodes=2").replace("=8", f"={processes}").split()
    assert words.pop(0) == "torchrun"
    endpoint = f"{nodes.head}:{nodes.port}"
    return [sys.executable, "-m", "torch.distributed.run", *(w.replace("HEAD_NODE:29500", endpoint) for w in words)]


def test_readme_command_trains_on_two_nodes(nodes, data16, tmp_path):
    out = tmp_path / "runs"
    outputs = nodes.run([*readme_launcher(nodes, 1), str(ROOT / "train.py"), *OPTIONS, f"--outdir={out}",
                         f"--data={data16}", "--kimg=0.016"])
    assert sum(output.count("training for") for output in outputs) == 1         # One process speaks for all.
    assert "2 process(es)" in "".join(outputs)
    (folder,) = out.iterdir()
    assert open_snapshot(folder)["progress"]["cur_nimg"] == 16

#----------------------------------------------------------------------------

def split_run(data: Path, folder: Path, **batch_sizes: int) -> list[str]:
    """The command, with a file of results in the folder for each micro-batch size."""
    return [SPLIT_RUN, str(data), "2", *(f"{batch_gpu}={folder / name}" for name, batch_gpu in batch_sizes.items())]


@pytest.mark.numeric
def test_weights_do_not_depend_on_how_the_batch_is_split(nodes, data16, tmp_path):
    """--ghost-batch, float64: 1 process x 1 micro-batch, 1 x 4, and 2 nodes x 2 processes, 5 iterations, to 1e-9.

    Everything that a training state holds is compared: networks, running means of w, of path lengths and of BatchNorm,
    singular vectors. And what every sample is made of is a function of its position, bit by bit.
    """
    subprocess.run([sys.executable, *split_run(data16, tmp_path, whole=8, four=2)], env=environment(), check=True,
                   timeout=1500)
    nodes.run([*readme_launcher(nodes, 2), *split_run(data16, tmp_path, nodes=2)])
    results = [torch.load(tmp_path / name) for name in ("whole", "four", "nodes")]

    first = results[0]
    assert len(first["seen"]) == (5 + 2 + 5) * 8                # Gmain, Greg, Dmain.
    assert float(first["tensors"]["pl_mean"]) > 0
    for other in results[1:]:
        assert other["seen"] == first["seen"]
        assert set(other["tensors"]) == set(first["tensors"])
        for name, value in first["tensors"].items():
            assert max_error(other["tensors"][name], value) <= 1e-9, name
