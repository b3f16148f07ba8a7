# SPDX-License-Identifier: Apache-2.0
"""Who started this process: nobody, torchrun or Slurm's srun. Starting processes of this machine through torchrun."""
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

from dnnlib import UserError

EXIT_FILE = "STYLESAN_EXIT_FILE"        # Where the first process writes a code that torchrun would turn into 1.
FORWARDED = ("SIGTERM", "SIGUSR1")
DEFAULT_PORT = 29400

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Launch:
    """The place of this process among all, as its launcher tells."""

    launcher: str               # torchrun or slurm.
    rank: int                   # 0 to world_size - 1.
    world_size: int
    local_rank: int             # On this node.
    master_addr: str            # Of the store where processes find each other.
    master_port: int
    hosts_store: bool           # Whether this process serves the store; torchrun's agent usually does.


def read_launch(env: Mapping[str, str] | None = None) -> Launch | None:
    """What the environment says; None when this process was started by hand.

    torchrun sets RANK and so on. Under `srun` with more than one task the numbers are those of the Slurm step; a batch
    script, `salloc` or a step of one task count as started by hand, so that `--gpus` works there.

    Raises:
        UserError: a variable is missing or no number.
    """
    env = os.environ if env is None else env
    if "WORLD_SIZE" in env:
        rank = _number(env, "RANK")
        by_agent = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return Launch("torchrun", rank, _number(env, "WORLD_SIZE"), _number(env, "LOCAL_RANK", 0),
                      env.get("MASTER_ADDR", "localhost"), _number(env, "MASTER_PORT", DEFAULT_PORT),
                      hosts_store=rank == 0 and not by_agent)
    if "SLURM_PROCID" in env and _number(env, "SLURM_STEP_NUM_TASKS", 1) > 1:
        rank = _number(env, "SLURM_PROCID")
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost"
        # Jobs on one node, and steps of one job, must not meet at one port.
        job = _number(env, "SLURM_JOB_ID", 0) * 16 + _number(env, "SLURM_STEP_ID", 0)
        return Launch("slurm", rank, _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_LOCALID"),
                      env.get("MASTER_ADDR") or first_host(nodes), _number(env, "MASTER_PORT", 10000 + job % 20000),
                      hosts_store=rank == 0)
    return None


def first_host(nodes: str) -> str:
    """First name of a Slurm node list: 'gpu[07-09,12],login1' -> 'gpu07'."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^\[,]*)", nodes.strip())
    if match is None:
        raise UserError(f"SLURM_STEP_NODELIST={nodes!r} is not a node list: set MASTER_ADDR to the first node")
    return match[1] + (match[2] or "") + match[3]


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name)
    if value is None and default is not None:
        return default
    try:
        return int(value or "")
    except ValueError:
        raise UserError(f"the launcher's environment has {name}={value!r}, which is no number: start with torchrun, "
                        "srun or --gpus") from None

#----------------------------------------------------------------------------

def leave_exit_code(code: int) -> int:
    """The code to exit with, so that the launcher ends with `code`.

    torchrun takes every code but 0 for a crash: it starts the processes again or ends with 1. So where somebody waits
    for the code in a file, it is written there and the process ends with 0. Call it on the first process only with the
    code of all.
    """
    path = os.environ.get(EXIT_FILE)
    launch = read_launch()
    if code == 0 or not path or launch is None or launch.launcher != "torchrun":
        return code
    if launch.rank == 0:
        Path(path).write_text(f"{code}\n", encoding="utf-8")
    return 0


def run_local_processes(num_processes: int, argv: list[str], max_restarts: int = 0) -> int:
    """Start this script again in `num_processes` processes of this machine through torchrun.

    SIGTERM and SIGUSR1 go on to the processes, which save and stop.

    Args:
        num_processes: How many.
        argv: The script and its arguments.
        max_restarts: How often all of them are started again after one died.

    Returns:
        The exit code that the processes agreed on; 1 if one failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}",
               f"--max-restarts={max_restarts}"]
    with tempfile.TemporaryDirectory() as folder:
        exit_file = Path(folder) / "exit-code"
        # After "--" torchrun takes nothing for its own: it would read our --num as short for --numa-binding.
        process = subprocess.Popen([*command, "--", *argv], env=os.environ | {EXIT_FILE: str(exit_file)})
        handlers = {getattr(signal, name): signal.signal(getattr(signal, name), _forward_to(process))
                    for name in FORWARDED if hasattr(signal, name)}
        try:
            code = process.wait()
        except KeyboardInterrupt:
            code = process.wait()           # The terminal sent it to torchrun too.
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return int(exit_file.read_text(encoding="utf-8")) if code == 0 and exit_file.is_file() else code


def _forward_to(process: subprocess.Popen[bytes]) -> Callable[[int, FrameType | None], None]:
    """A signal handler that passes the signal to torchrun's children.

    Not to torchrun itself: it would leave them 30 seconds, and saving a large model may take longer.
    """
    def forward(number: int, _frame: FrameType | None) -> None:
        children = children_of(process.pid)
        for pid in children:
            os.kill(pid, number)
        if not children:
            process.terminate()             # Nothing to save yet.
    return forward


def children_of(pid: int) -> list[int]:
    """Process ids of the children of `pid`; none where /proc does not exist."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue                        # It has ended meanwhile.
        if parent == pid:
            found.append(int(path.parent.name))
    return found
