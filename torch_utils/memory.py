# SPDX-License-Identifier: Apache-2.0
"""Memory of the machine and of this process, as far as the system tells."""
import re
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:     # Not on Windows.
    resource = None     # type: ignore[assignment]

MEMINFO, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes that this process may still take: what the machine has left, or its control group; None where unknown."""
    found = []
    try:
        text = MEMINFO.read_text(encoding="utf-8")
        found += [int(kib) * 1024 for kib in re.findall(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)]
    except OSError:
        pass                # Not Linux.
    try:                    # Without the cache of files, which gives way.
        used = re.search(r"^anon (\d+)$", (GROUP / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE)
        limit = int((GROUP / "memory.max").read_text(encoding="utf-8"))
        found.append(max(limit - int(used[1] if used else 0), 0))
    except (OSError, ValueError):
        pass                # No such control group, or one without a limit ("max").
    return min(found, default=None)


def peak_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that this process took at most, of a GPU or of the machine; None where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024      # Bytes in the unit of ru_maxrss.
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
