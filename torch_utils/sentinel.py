# SPDX-License-Identifier: Apache-2.0
"""The program of a sentinel (`torch_utils.peer_monitor.Sentinel`): kills the process that started it when that is mute.

Usage: sentinel.py LABEL SECONDS, with signs of life on its input. It knows nothing of the project, so that it starts at
once and takes no memory.
"""
import os
import select
import signal
import sys


def main() -> None:
    """Until the input ends, or there was nothing to read for so many seconds."""
    label, seconds = sys.argv[1], float(sys.argv[2])
    watched, silent = os.getppid(), 0.0
    for name in ("SIGINT", "SIGHUP", "SIGTERM", "SIGUSR1"):     # Meant for the other one, which decides what to do.
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    while os.getppid() == watched:
        wait = min(1.0, seconds / 4)
        if select.select([0], [], [], wait)[0]:
            silent = 0.0
            if not os.read(0, 4096):
                return
        else:
            silent += wait          # While this process runs: with the whole job stopped no time passes.
        if silent >= seconds:
            print(f"{label}: process {watched} showed no sign of life for {silent:.0f} s: it is stopped or hangs, and "
                  "is killed", file=sys.stderr, flush=True)
            os.kill(watched, getattr(signal, "SIGKILL", signal.SIGTERM))
            return


if __name__ == "__main__":
    main()
