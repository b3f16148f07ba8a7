# SPDX-License-Identifier: Apache-2.0
"""Who started this process: nobody, torchrun or Slurm's srun. Starting processes of this machine through torchrun."""
import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from dnnlib import UserError
from dnnlib.util import atomic_write_text

EXIT_FILE = "STYLESAN_EXIT_FILE"        # Where the first process writes a code that torchrun would turn into 1.
# Save and stop; also what terminals send: Ctrl-C and their end.
STOP_SIGNALS = frozenset(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP")
                         if hasattr(signal, name))
LAUNCHER_FOLDER = "STYLESAN_LAUNCHER"   # Folder of the process that `--gpus` starts all others from:
ALIVE, AGENT = "alive", "agent"         # a pipe that only it has open for writing; the process id of torchrun.
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)       # Windows has one way to end a process.
CAN_PAUSE = hasattr(signal, "SIGSTOP") and hasattr(signal, "SIGCONT") and hasattr(os, "killpg")
DEFAULT_PORT = 29400
POLL_SECONDS = 5.0
IDLE_SECONDS = 60.0         # For torchrun to end after its processes.
TWICE_SECONDS = 0.3         # Two signals that come closer are one Ctrl-C that came two ways.

Handler = Callable[[int, FrameType | None], None]

#----------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Launch:
    """The place of this process among all, as its launcher tells."""

    launcher: str               # torchrun or slurm.
    rank: int                   # 0 to world_size - 1.
    world_size: int
    local_rank: int             # On this node.
    master_addr: str            # Where the store is in which processes find each other.
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

def leaves_exit_code() -> bool:
    """Whether somebody waits for the exit code in a file, because torchrun would turn it into 1."""
    launch = read_launch()
    return bool(os.environ.get(EXIT_FILE)) and launch is not None and launch.launcher == "torchrun"


def leave_exit_code(code: int) -> int:
    """The code to exit with, so that the launcher ends with `code`.

    torchrun takes every code but 0 for a crash: it starts the processes again or ends with 1. So where somebody waits
    for the code in a file, it is written there and the process ends with 0. The code is that of all processes, or that
    of the first one which failed.
    """
    if code == 0 or not leaves_exit_code():
        return code
    atomic_write_text(os.environ[EXIT_FILE], f"{code}\n")
    return 0


def run_local_processes(num_processes: int, argv: list[str], max_restarts: int = 0) -> int:
    """Start this script again in `num_processes` processes of this machine through torchrun.

    Signals that mean "save and stop" go on to the processes, once; a second Ctrl-C ends all of them. If this process is
    killed, they end, too.

    Args:
        num_processes: How many.
        argv: The script and its arguments.
        max_restarts: How often all of them are started again after one died.

    Returns:
        The exit code that the processes agreed on; 1 if one failed.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}",
               f"--max-restarts={max_restarts}"]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        env = os.environ | {EXIT_FILE: str(folder / "exit-code"), LAUNCHER_FOLDER: name}
        if hasattr(os, "mkfifo"):
            os.mkfifo(folder / ALIVE)
            stack.callback(os.close, os.open(folder / ALIVE, os.O_RDWR | os.O_NONBLOCK))    # For as long as this lives.
        # After "--" torchrun takes nothing for its own: it would read our --num as short for --numa-binding. In a
        # process group of its own it gets no signals from the terminal, which would reach the processes twice.
        process = subprocess.Popen([*command, "--", *argv], env=env, process_group=0 if os.name == "posix" else None)
        atomic_write_text(folder / AGENT, f"{process.pid}\n")
        agent = _Agent(process)
        stack.enter_context(agent.forwarding())
        code = agent.wait()
        exit_file = folder / "exit-code"
        return int(exit_file.read_text(encoding="utf-8")) if exit_file.is_file() else code


class _Agent:
    """torchrun's process, and what becomes of signals to the process that started it."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self.process = process
        self._interrupted: float | None = None      # When Ctrl-C was pressed.
        self._ended_by = 0                          # The signal after which everything was killed.

    @contextlib.contextmanager
    def forwarding(self) -> Iterator[None]:
        """Handlers for the block. What was ignored stays so: by nohup, or by a shell in the background."""
        wanted: dict[int, Handler] = dict.fromkeys(STOP_SIGNALS, self._forward)
        if CAN_PAUSE and hasattr(signal, "SIGTSTP"):
            wanted[signal.SIGTSTP] = self._pause
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()
                  if signal.getsignal(number) is not signal.SIG_IGN}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def wait(self) -> int:
        """The exit code, once it has ended. It is killed if it does not end after its processes have."""
        idle = 0
        while True:
            try:
                code = self.process.wait(timeout=POLL_SECONDS)
                return 128 + self._ended_by if self._ended_by else code if code >= 0 else 128 - code
            except subprocess.TimeoutExpired:
                states = [state_of(pid) for pid in children_of(self.process.pid)]
                idle = idle + 1 if states and all(state == "Z" for state in states) else 0
                if idle * POLL_SECONDS >= IDLE_SECONDS:
                    print("torchrun does not end although its processes have: killed", file=sys.stderr, flush=True)
                    self.process.kill()

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """Not to torchrun itself: it would leave the processes 30 seconds, and saving a large model may take longer."""
        now, children = time.monotonic(), children_of(self.process.pid)
        is_second = (number == signal.SIGINT and self._interrupted is not None
                     and now - self._interrupted > TWICE_SECONDS)
        self._interrupted = self._interrupted or (now if number == signal.SIGINT else None)
        if is_second or not children:               # Or there is nothing to save yet.
            self._ended_by = number
            self.process.kill()                     # First, or it would report the end of its processes as a failure.
            number = KILL
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _pause(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z: the processes have groups of their own, so the terminal reaches only this one."""
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in (*children_of(self.process.pid), self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, number)
            if number == signal.SIGSTOP:
                os.kill(os.getpid(), signal.SIGSTOP)        # Here this process is stopped; after `fg` it goes on.


def end_with_launcher() -> None:
    """In a process of `run_local_processes`: end all of them when the one that started them is gone."""
    name = os.environ.get(LAUNCHER_FOLDER)
    if not name or not hasattr(os, "mkfifo"):
        return
    try:
        fd = os.open(Path(name) / ALIVE, os.O_RDONLY | os.O_NONBLOCK)
        os.set_blocking(fd, True)
    except FileNotFoundError:
        fd = -1
    threading.Thread(target=_wait_for_launcher, args=(fd, Path(name)), name="launcher", daemon=True).start()


def _wait_for_launcher(fd: int, folder: Path) -> None:
    if fd >= 0 and os.read(fd, 1):          # Nobody writes: it returns when nobody has it open any more.
        return
    agent = int((folder / AGENT).read_text(encoding="utf-8")) if (folder / AGENT).is_file() else 0
    print(f"process {os.getpid()} ends, because train.py, which started it, is gone", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    if agent and agent == os.getppid():
        for pid in (agent, *(pid for pid in children_of(agent) if pid != os.getpid())):     # It may be stopped.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, KILL)
    os._exit(1)


def state_of(pid: int) -> str:
    """'T' for stopped, 'Z' for ended but not yet waited for, and so on; '' where /proc does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


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
